"""The verification manager and its costs where the draft depth varies."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests import manager_driver as driver
from tests.verification_cases import PlainCalibrator, Prices
from vllm_dspark.integration.verification.arrivals import Arrivals
from vllm_dspark.integration.verification.costs import StepCosts
from vllm_dspark.integration.verification.host import HostVerification
from vllm_dspark.scheduler.cost_model import StepShape
from vllm_dspark.scheduler.verification import VerificationPolicy

GAMMA = 3
SLOTS = np.arange(2)


def policy(*step_ms: float) -> VerificationPolicy:
    """Two requests in slots 0 and 1."""
    made = VerificationPolicy(4, GAMMA, PlainCalibrator(), Prices(*(step_ms or (1.0,))))
    for slot in range(2):
        made.add_request(slot, 0)
    return made


def arrive(made: VerificationPolicy, step: int, confidence: Any, verified: int = 0) -> None:
    """Step `step` ends: `verified` drafts of each were verified, a new block was drawn or none."""
    counts = np.full(2, verified)
    if confidence is not None:
        made.drafted(step, SLOTS, GAMMA)
    made.outcomes_arrived(step, SLOTS, counts * 0, counts)
    if confidence is not None:
        made.confidences_arrived(step, SLOTS, np.asarray(confidence, dtype=np.float32))


BLOCK = [[0.9, 0.5, 0.5], [0.8, 0.5, np.nan]]
SURVIVAL = [[0.9, 0.45, 0.225], [0.8, 0.4, np.nan]]


def test_block_retires_with_the_step_that_verifies_it() -> None:
    """Not before: what may still be verified must not decide on anything. And only once."""
    made = policy()
    arrive(made, 0, BLOCK)
    assert made.retired().shape == (0, GAMMA)
    arrive(made, 1, BLOCK, verified=3)
    np.testing.assert_allclose(made.retired(), SURVIVAL, rtol=1e-6)
    assert made.retired().shape == (0, GAMMA)


def test_block_that_nobody_follows_retires_too() -> None:
    """After it, drafting stopped: catches a probe whose outcome is never told."""
    made = policy()
    arrive(made, 0, BLOCK)
    arrive(made, 1, None, verified=3)
    assert len(made.retired()) == 2
    for step in range(2, 5):
        arrive(made, step, None)
        assert len(made.retired()) == 0


def test_block_that_was_trimmed_away_retires() -> None:
    """Its step is over, though none of its drafts was verified."""
    made = policy()
    arrive(made, 0, BLOCK)
    arrive(made, 1, None, verified=0)
    assert len(made.retired()) == 2


def test_block_of_a_request_that_left_is_not_told() -> None:
    made = policy()
    arrive(made, 0, BLOCK)
    made.add_request(1, 1)
    arrive(made, 1, None, verified=3)
    np.testing.assert_allclose(made.retired(), SURVIVAL[:1], rtol=1e-6)


@pytest.mark.parametrize(
    ("accepted", "verified", "survival"),
    [(0, 3, [0, 0, 0]), (1, 3, [1, 0, 0]), (3, 3, [1, 1, 1]), (1, 1, [1, 0.5, 0.25]),
     (0, 0, [0.9, 0.45, 0.225])],
)  # fmt: skip
def test_under_a_grammar_what_came_of_drafts_counts(
    accepted: int, verified: int, survival: list[float]
) -> None:
    """A drafter that is sure of what the grammar rejects drafts in vain. Drafts behind those that
    were verified may survive as the confidence says."""
    made = policy()
    made.add_request(0, 0, constrained=True)
    arrive(made, 0, BLOCK)
    made.outcomes_arrived(1, SLOTS, np.full(2, accepted), np.full(2, verified))
    np.testing.assert_allclose(made.retired(), [survival, SURVIVAL[1]], rtol=1e-6)


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_what_a_request_keeps_from_verification_is_in_vain(limit: int) -> None:
    made = policy()
    made.add_request(0, 0, max_verified=limit)
    arrive(made, 0, BLOCK)
    arrive(made, 1, None, verified=limit)
    expected = [s if k < limit else 0.0 for k, s in enumerate(SURVIVAL[0])]
    np.testing.assert_allclose(made.retired(), [expected, SURVIVAL[1]], rtol=1e-6)


def test_without_a_listener_nothing_piles_up() -> None:
    made = policy()
    for step in range(100):
        arrive(made, step, BLOCK, verified=3)
    assert len(made.retired()) <= 2 * 8


@pytest.mark.parametrize("depth", [0, 1, GAMMA])
def test_budget_prices_the_step_at_its_own_depth(depth: int) -> None:
    """The draft pass of the step is part of what its budget pays for."""
    made = policy()
    made.choose(SLOTS, np.full(2, GAMMA), 2, 2, 40, depth)
    made.choose(SLOTS, np.full(2, GAMMA), 2, 2, 40)
    asked: Any = made.costs
    assert [shape[4] for shape in asked.asked] == [depth, GAMMA]


class Line(Arrivals):
    """Counts what is timed, sent and collected."""

    def __init__(self) -> None:
        super().__init__()
        self.timed = self.sent = self.collected = 0

    def start(self) -> None:
        self.timed += 1
        super().start()

    def send(self, *table: Any) -> None:
        self.sent += 1
        super().send(*table)

    def collect(self, step: int) -> Any:
        arrived = super().collect(step)
        self.collected += len(arrived)
        return arrived


def driven(learns: bool) -> tuple[Any, Line]:
    """A manager in host mode with two requests."""
    line = Line()
    costs = StepCosts(
        gamma=driver.GAMMA,
        most_requests=8,
        most_tokens=64,
        context=10,
        most_context=100,
        trims_replay=True,
        learns=learns,
    )
    decides = VerificationPolicy(driver.SLOTS, driver.GAMMA, PlainCalibrator(), costs)
    manager = HostVerification(driver.layout(), decides, costs, line)
    driver.begin(manager, {"a": None, "b": None})
    return manager, line


def run_step(manager: Any, drafts: int, depth: int) -> None:
    """A step that has `drafts` of each request to verify and draws `depth`."""
    driver.begin(manager, {}, depth)
    if drafts:
        lengths = dict.fromkeys("ab", 1 + drafts)
        driver.step(manager, lengths, dict.fromkeys("ab", drafts))
    driver.end(manager, ["a", "b"], [1, 1], [0, 0], [[0.5] * driver.GAMMA] * 2)


def test_step_without_drafts_costs_nothing() -> None:
    """One that neither verifies nor draws sends nothing; what was sent before is collected, and a
    block that it ends is told of. Catches a line that fills up while drafting rests."""
    manager, line = driven(learns=True)
    run_step(manager, 0, driver.GAMMA)
    run_step(manager, driver.GAMMA, 0)
    sent = line.sent
    for _ in range(20):
        run_step(manager, 0, 0)
    assert line.sent == sent == 2
    assert line.collected == sent
    assert len(manager.policy.retired()) == 2
    run_step(manager, 0, driver.GAMMA)
    assert line.sent == sent + 1


@pytest.mark.parametrize("learns", [True, False])
def test_steps_are_timed_where_their_times_are_used(learns: bool) -> None:
    manager, line = driven(learns)
    for _ in range(5):
        run_step(manager, driver.GAMMA, driver.GAMMA)
    assert line.timed == (5 if learns else 0)


def step_costs() -> StepCosts:
    return StepCosts(
        gamma=GAMMA,
        most_requests=64,
        most_tokens=128,
        context=100,
        most_context=1000,
        trims_replay=True,
        learns=False,
    )


CAPTURED = [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]


def timing(batch: dict[str, int], depth: int) -> Any:
    """A device whose target takes 5 ms and 0.01 a token, whose drafter 0.1 a draft and request."""
    size = batch["num_tokens"]
    requests = min(size, 64)
    return SimpleNamespace(
        forward_ms=5 + 0.01 * size,
        drafter_ms=0.2 + 0.1 * requests * depth,
        num_target_tokens=size,
        num_reqs=requests,
        full_cudagraph=size <= 64,
    )


def test_profile_prices_every_depth() -> None:
    """Each batch is drafted at the depth that its time is taken for, and after all of them dummy
    runs draft γ again. Catches depths whose times are taken for one another's."""
    costs = step_costs()
    told: list[int | None] = []
    timings = []
    for batch in costs.batches(CAPTURED, (0, 1, 2, GAMMA), told.append):
        depth = told[-1]
        assert depth is not None
        timings.append(timing(batch, depth))
    assert told[-1] is None
    assert set(told) == {0, 1, 2, GAMMA, None}
    assert len(timings) < 150
    assert not costs.profiled
    costs.learn_profile(timings)
    assert costs.profiled
    for depth in (0, 1, 2, GAMMA):
        for requests in (1, 32, 64):
            drafting = costs.model.draft_ms(requests, depth, 0, requests)
            assert float(drafting) == pytest.approx(0.2 + 0.1 * requests * depth, rel=0.05)


def test_profile_without_depths_is_of_full_blocks() -> None:
    costs = step_costs()
    batches = list(costs.batches(CAPTURED))
    costs.learn_profile([timing(batch, GAMMA) for batch in batches])
    assert float(costs.model.draft_ms(32, GAMMA, 0, 32)) == pytest.approx(9.8, rel=0.05)


def test_missing_timings_are_an_error() -> None:
    """Depths are told apart by order alone."""
    costs = step_costs()
    batches = list(costs.batches(CAPTURED, (0, 1, GAMMA)))
    with pytest.raises(RuntimeError, match="were to be profiled"):
        costs.learn_profile([timing(batch, GAMMA) for batch in batches[1:]])


def test_costs_learn_what_they_are_told() -> None:
    """From a plan, also where they do not learn from times of their own."""
    costs = step_costs()
    shape = StepShape(8, 8, 80, 8, 0)
    before = float(costs.model.step_ms(8, 8, 80, 8, 0))
    for _ in range(50):
        costs.observe(shape, 3 * before, True)
    assert float(costs.model.step_ms(8, 8, 80, 8, 0)) == pytest.approx(3 * before, rel=0.1)
