"""One simulated engine: steps, times and tokens that can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tests.simulations import LAUNCH_MS, cost_model, drafter, engine, replica, run
from vllm_dspark.simulation.policies import FixedDepth
from vllm_dspark.simulation.workload import Lengths, Request


def test_one_request_without_speculation() -> None:
    """A prefill that emits the first token, then one step a token."""
    one = replica(FixedDepth(0))
    (request,) = run(one, [Request(prompt=10, output=5)])
    assert one.totals.steps == 5
    assert one.totals.emitted == 5
    step_ms = float(cost_model().verify_ms(1, 1, 0, 1))
    assert (request.arrived, request.first) == (0.0, LAUNCH_MS)
    assert request.ended == pytest.approx(LAUNCH_MS + 4 * step_ms)
    assert request.per_token_ms == pytest.approx(step_ms)


@pytest.mark.parametrize(("accepts", "steps"), [(0.9999999, 4), (1e-7, 13)])
def test_accepted_drafts_save_steps(accepts: float, steps: int) -> None:
    """13 tokens: one of the prefill, then four or one a step."""
    one = replica(FixedDepth(3), drafter=drafter((accepts,) * 3, sharpness=0.0))
    run(one, [Request(prompt=10, output=13)])
    assert one.totals.steps == steps
    assert one.totals.emitted == 13
    assert one.totals.verified == 3 * (steps - 1)
    shapes = [(shape.tokens, shape.context_tokens) for shape, _ in one.shapes or []]
    assert shapes[:2] == [(10, 0), (4, 11)]


def test_prompts_are_cut_to_what_a_step_takes() -> None:
    """25 tokens of prompt, 10 a step; while one decodes, the other gets what room it leaves."""
    one = replica(FixedDepth(0), engine(most_tokens=10))
    run(one, [Request(prompt=5, output=20), Request(prompt=25, output=2)])
    tokens = [shape.tokens for shape, _ in one.shapes or []]
    assert tokens[:4] == [10, 10, 10, 3]  # 5 + 5, 1 + 9, 1 + 9, 1 + 2
    prefills = [prefill for _, prefill in one.shapes or []]
    assert prefills[:5] == [True] * 4 + [False]


def test_a_prompt_in_pieces_has_one_first_token() -> None:
    """Only its last piece emits; each step has one row of logits a request. Catches a first token
    for each piece, and rows for each token of the prompt or for none of it."""
    one = replica(FixedDepth(0), engine(most_tokens=10))
    run(one, [Request(prompt=25, output=2)])
    assert one.totals.firsts == 1
    assert [shape.logits_rows for shape, _ in one.shapes or []] == [1, 1, 1, 1]


def test_no_more_run_than_there_is_room_for() -> None:
    one = replica(FixedDepth(0), engine(most_requests=3))
    ended = run(one, [Request(prompt=4, output=6) for _ in range(8)])
    assert len(ended) == 8
    assert max(shape.requests for shape, _ in one.shapes or []) == 3


def test_an_arrival_joins_the_step_after_the_next() -> None:
    """The next step is scheduled already while this one runs."""
    one = replica(FixedDepth(0))
    one.submit(Request(prompt=4, output=10))
    one.step()
    one.submit(Request(prompt=4, output=10))
    one.step()
    one.step()
    assert [shape.requests for shape, _ in one.shapes or []] == [1, 1, 2]


def test_chance_has_the_mean_that_was_asked_for() -> None:
    """Emitted per round against 1 + a1 + a2 + a3, over some 30,000 rounds."""
    one = replica(FixedDepth(3))
    run(one, [Request(prompt=1, output=400) for _ in range(200)])
    totals = one.totals
    expected = 1 + np.cumprod([0.8, 0.7, 0.6]).sum()
    assert (totals.emitted - totals.firsts) / totals.rounds == pytest.approx(expected, rel=0.01)


def test_equal_seeds_give_equal_runs() -> None:
    def clock(seed: int) -> float:
        one = replica(FixedDepth(2), seed=seed, jitter=0.1)
        run(one, [Request(prompt=4, output=50) for _ in range(5)])
        return one.clock

    assert clock(3) == clock(3)
    assert clock(3) != clock(4)


def test_lengths_spread_about_their_mean() -> None:
    random = np.random.default_rng(0)
    draw = Lengths(prompt=40, output=100, spread=0.5).draw(random)
    requests = [next(draw) for _ in range(4000)]
    outputs = np.array([request.output for request in requests])
    assert (outputs.min(), outputs.max()) == (50, 150)
    assert outputs.mean() == pytest.approx(100, rel=0.02)
    assert len({request.prompt for request in requests}) > 20


@pytest.mark.parametrize("arguments", [{"prompt": 0}, {"output": 1.5}, {"spread": 1.0}])
def test_impossible_lengths_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Lengths(**arguments)
