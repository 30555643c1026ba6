"""The engine drafts as deep as its scheduler says, and the scheduler learns what that costs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from tests.depth_runs import (
    AUTO,
    ChosenDepths,
    by_anchor,
    choose_by,
    proposals,
    scheduled,
    scheduler_of,
    worker_of,
)
from tests.engine import MICRO, Request, engine, observed, run, tokens
from tests.test_equivalence_heads import PROMPTS, batch
from tests.verification_cases import manager_of
from vllm_dspark.scheduler.cost_model import CostModel
from vllm_dspark.scheduler.depth import DepthPolicy
from vllm_dspark.scheduler.fixed import FixedPolicy

pytestmark = pytest.mark.engine

GAMMA = 7
FREE = {"max_tokens": 24, "ignore_eos": True}
SKIPPED = 200


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    """One engine, at γ until a test says otherwise; it has run once."""
    drafter = f"dspark:{MICRO / 'dspark-vanilla'}"
    with engine(MICRO, drafter, enable_prefix_caching=False, **AUTO) as llm:
        scheduler = scheduler_of(llm)
        assert scheduler.controller.policy is None  # it waits for the workers
        assert scheduler.dynamic_sd_lookup is None
        with scheduled(llm) as steps:
            run(llm, [Request("import os\n", FREE)])
        assert steps[0].num_spec_tokens_to_schedule == GAMMA
        yield llm


@pytest.fixture
def all_verified(llm: Any) -> Iterator[None]:
    """Every draft is verified, so that what is accepted depends on nothing else."""
    manager = manager_of(llm)
    kept, manager.policy = manager.policy, FixedPolicy(8, GAMMA)
    yield
    manager.policy = kept


def test_depth_shows_everywhere(llm: Any) -> None:
    """What the runner is told, what the next step schedules, and K/V slots follow the depth."""
    depths = [7, 3, 0, 0, 1, 5, 4, 0, 7, 2, 2, 6]
    choose_by(llm, ChosenDepths(lambda step: depths[step % len(depths)]))
    with scheduled(llm) as steps, proposals(llm) as drafted:
        run(llm, [Request("def main(", FREE | {"max_tokens": 30})])
    told = [step.num_spec_tokens_to_schedule for step in steps]
    assert told == [depths[i % len(depths)] for i in range(len(steps))]
    for before, step in pairwise(steps):
        verified = sum(map(len, step.scheduled_spec_decode_tokens.values()))
        assert verified == before.num_spec_tokens_to_schedule
        assert step.total_num_scheduled_tokens == 1 + verified
    # 4 drafts are the first of a block of 5, 6 of one of 7.
    slots = {0: 0, 1: 1, 2: 2, 3: 3, 4: 5, 5: 5, 6: 7, 7: 7}
    assert [step.noted_lookahead for step in steps] == [slots[depth] for depth in told]
    assert [len(drafts) for _, _, drafts in drafted] == told


def test_block_table_covers_what_is_drafted(llm: Any) -> None:
    """At every step each request holds blocks for its tokens and for the block behind them."""
    random = np.random.default_rng(3)
    choose_by(llm, ChosenDepths(lambda step: int(random.integers(GAMMA + 1))))
    scheduler = scheduler_of(llm)
    manager = scheduler.kv_cache_manager
    shortest = []
    original = scheduler.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        for name in output.num_scheduled_tokens:
            request = scheduler.requests[name]  # its tokens of this step are counted by now
            needed = request.num_computed_tokens + scheduler.num_lookahead_tokens
            held = min(len(ids) for ids in manager.get_block_ids(name)) * scheduler.block_size
            shortest.append(held - min(needed, scheduler.max_model_len))
        return output

    scheduler.schedule = schedule
    try:
        run(llm, batch(8))
    finally:
        del scheduler.schedule
    assert len(shortest) > 50
    assert min(shortest) >= 0


def test_drafting_resumes_as_if_it_had_never_stopped(llm: Any, all_verified: None) -> None:
    """After 200 steps without drafts the drafter proposes, at every anchor that both runs pass,
    exactly what it proposes when it was never stopped. Catches context K/V that is not kept up."""
    request = Request("x = 1\n", {"max_tokens": 240, "ignore_eos": True})
    runs = []
    for skipped in (0, SKIPPED):
        choose_by(llm, ChosenDepths(partial(depth_after, skipped)))
        with proposals(llm) as seen:
            (output,) = run(llm, [request])
        runs.append((tokens([output])[0], by_anchor(seen)))
    (words, never), (words_skipped, resumed) = runs
    assert words == words_skipped
    assert min(resumed) > SKIPPED
    both = sorted(never.keys() & resumed.keys())
    assert len(both) >= 5
    assert [resumed[anchor] for anchor in both] == [never[anchor] for anchor in both]


def depth_after(skipped: int, step: int) -> int:
    return GAMMA if step >= skipped else 0


@pytest.mark.parametrize(("depth", "least"), [(1, 0.45), (3, 0.35)])
def test_shallow_blocks_are_accepted(
    llm: Any, all_verified: None, depth: int, least: float
) -> None:
    """Catches anchors, rows and positions taken from the layout of another depth: the output would
    be exact all the same. Seen is a share of 0.60 of drafts at depth 1, 0.47 at depth 3."""
    choose_by(llm, ChosenDepths(lambda step: depth))
    with observed(llm) as seen:
        run(llm, [Request(prompt, {"max_tokens": 32, "ignore_eos": True}) for prompt in PROMPTS])
    assert seen[0].drafted / seen[0].rounds > 0.95 * depth
    assert seen[0].accepted / seen[0].drafted > least


def test_scheduler_and_workers_learn_the_same(llm: Any) -> None:
    """Measured times reach the scheduler's cost model, and go on with the plan to workers of other
    processes. One in the same process goes by the scheduler's. It is what these times teach, in
    their order, and near to what steps take."""
    scheduler, costs = scheduler_of(llm), manager_of(llm).costs
    scheduler._learned.clear()
    scheduler.controller.cost = CostModel.default(GAMMA)
    choose_by(llm, ChosenDepths(lambda step: (7, 0, 3)[step // 4 % 3]))
    with scheduled(llm) as steps:
        run(llm, batch(8))
        run(llm, [Request("def main(", {"max_tokens": 60, "ignore_eos": True})])
    assert costs.model is scheduler.controller.cost
    told = [step for output in steps for step in output.dspark_plan.steps]
    assert len(told) > 20
    assert {step.depth for step in told} == {0, 3, 7}
    assert all(step.tokens == step.logits_rows >= step.requests > 0 for step in told)
    taught = CostModel.default(GAMMA)
    for step in [*told, *scheduler._learned]:  # no step was there to hand the last ones on
        taught.observe(step.shape, step.ms)
    for shape in SHAPES:
        predicted = taught.step_ms(*shape)
        assert costs.model.step_ms(*shape) == predicted
        nearest = [step.ms for step in told if step.depth == shape[-1]]
        assert (
            0.1 < float(predicted) / float(np.median(nearest)) < 10
        )  # other units are further off


# Tokens, requests, context tokens, logits rows, depth.
SHAPES = ((2, 2, 60, 2, 0), (32, 4, 200, 32, 7))


def test_survival_follows_what_is_accepted(llm: Any) -> None:
    """The running mean that travels with the reports stays a mean of probabilities, is of this
    text, and each position knows how long it was not seen."""
    controller = scheduler_of(llm).controller
    choose_by(llm, ChosenDepths(lambda step: 3))
    run(llm, batch(8))
    survival, age = controller._survival, controller._age
    assert (survival > 0).all()
    assert (np.diff(survival[:3]) < 0).all()
    assert 0.3 < survival[0] < 0.9  # seen is 0.62; unseen it would be 0.8
    assert age[:3].max() < 8 < age[3:].min()


def test_depth_that_does_not_pay_is_left(llm: Any) -> None:
    """The real policy with the real controller: where drafting costs ten times a step, depth falls
    to none and the engine goes on without drafts; where it is free, it is γ."""
    controller = scheduler_of(llm).controller
    controller.observe_step = lambda *step: True  # keep the prices
    for free, expected in ((False, 0), (True, GAMMA)):
        controller.policy = DepthPolicy(GAMMA, (0, 1, 2, 3, 5, 7))
        controller.cost = Prices(free)
        with scheduled(llm) as steps:
            run(llm, [Request("def main(", FREE)])
        depths = [step.num_spec_tokens_to_schedule for step in steps]
        assert depths[-1] == expected, depths
    del controller.observe_step


class Prices(CostModel):
    """A step takes one ms; so does each draft, or none at all."""

    def __init__(self, free: bool) -> None:
        self._start(CostModel.default(GAMMA)._times.profile)
        self.free = free

    def step_ms(self, tokens: Any, *shape: Any) -> Any:
        _, _, depth = np.broadcast_arrays(tokens, shape[0], shape[-1])
        return 1.0 + (0.0 if self.free else 10.0) * depth

    def steady_ms(self, requests: Any, context_tokens: Any, depths: Any) -> Any:
        return self.step_ms(requests, requests, depths)


def test_snapshot_and_worker_agree(llm: Any) -> None:
    """The worker drafts at the depth that the scheduler chose, in every step."""
    meter = worker_of(llm).meter
    meter.depths = []
    policy = ChosenDepths(lambda step: step % (GAMMA + 1))
    choose_by(llm, policy)
    run(llm, [Request("import os\n", FREE)])
    assert meter.depths == policy.chosen[: len(meter.depths)]
    assert len(meter.depths) > 5
    meter.depths = None
