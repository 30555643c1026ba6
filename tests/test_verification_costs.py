"""Step costs of an engine: which steps are profiled, what is made of their times, and of steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_dspark.integration.verification.costs import StepCosts
from vllm_dspark.scheduler.cost_model import StepShape

GAMMA = 3
CAPTURED = [4, 8, 16, 32]


def costs(**changes: Any) -> StepCosts:
    options: dict[str, Any] = {
        "gamma": GAMMA,
        "most_requests": 8,
        "most_tokens": 100,
        "context": 50,
        "most_context": 1000,
        "trims_replay": True,
        "learns": True,
    }
    return StepCosts(**(options | changes))


def timed(batch: dict[str, Any], eager_draft_ms: float = 0.0) -> Any:
    """What vLLM would say of a dummy run: 5 ms and 0.1 a token, 0.001 a token of context."""
    tokens = batch["num_tokens"]
    requests = min(tokens, 8)
    graph = tokens <= CAPTURED[-1]
    return SimpleNamespace(
        num_target_tokens=tokens,
        num_reqs=requests,
        forward_ms=5 + 0.1 * tokens + 0.001 * requests * batch["context_len"],
        drafter_ms=1.0 + (0.0 if graph else eager_draft_ms),
        full_cudagraph=graph,
    )


def profiled(head_line: tuple[float, float] = (0.0, 0.0), **changes: Any) -> StepCosts:
    made = costs(**changes)
    eager = changes.get("eager_draft_ms", 0.0)
    made.learn_profile([timed(b, eager) for b in made.batches(CAPTURED)], head_line)
    return made


def test_profiled_sizes() -> None:
    """Every captured size, doublings up to the largest step, and a second context for a few."""
    batches = list(costs().batches(CAPTURED))
    sizes = {b["num_tokens"] for b in batches if b["context_len"] == 50}
    assert sizes == {4, 8, 16, 32, 64, 100}
    longer = {b["num_tokens"] for b in batches if b["context_len"] == 200}
    assert len(longer) >= 3
    assert longer < sizes
    assert {b["context_len"] for b in batches} == {50, 200}


def test_graphs_for_whole_blocks_are_timed_with_such() -> None:
    """Batches of single tokens would not replay them."""
    batches = list(costs(trims_replay=False).batches(CAPTURED))
    uniform = {b["num_tokens"] for b in batches if b.get("uniform_decode")}
    assert uniform == set(CAPTURED)
    assert not any("uniform_decode" in b for b in costs().batches(CAPTURED))


@pytest.mark.parametrize(("bonus", "shorter"), [(1, 3), (2, 4)])
def test_graphs_for_shorter_blocks_are_left_out(bonus: int, shorter: int) -> None:
    """vLLM's own schedule with 7 and 2 drafts captures both sizes of blocks. Its dummy run fails on
    a size that is no number of the larger ones, and runs no more requests than there are."""
    whole = 7 + bonus
    captured = sorted({n * width for width in (shorter, whole) for n in range(1, 13)})
    made = costs(gamma=7, trims_replay=False, num_bonus_tokens=bonus, most_tokens=200)
    batches = list(made.batches(captured))
    uniform = {b["num_tokens"] for b in batches if b.get("uniform_decode")}
    assert uniform == {n * whole for n in range(1, 9)}
    others = {b["num_tokens"] for b in batches} - uniform
    assert min(others) > captured[-1]  # larger steps, which no graph has room for
    made.learn_profile([timed(b) for b in batches])
    curve = made.model.budget_curve(2, 2, 100, 2, 7, 14)
    assert (curve > 0).all()
    assert (np.diff(curve) >= 0).all()


def test_context_fits_the_model() -> None:
    contexts = {b["context_len"] for b in costs(most_context=100).batches(CAPTURED)}
    assert contexts == {50, 96}  # room for γ drafts and a bonus token


def test_nothing_to_profile_without_graphs() -> None:
    """The guess serves."""
    made = costs()
    assert list(made.batches([])) == []
    curve = made.budget_curve(4, 4, 400, 4, GAMMA, 12)
    assert curve.shape == (13,)
    assert (curve > 0).all()
    assert (np.diff(curve) >= 0).all()


def test_steps_that_nobody_timed() -> None:
    """vLLM ran them and has no times: it is not the vLLM that we know."""
    made = costs()
    assert list(made.batches(CAPTURED))
    with pytest.raises(RuntimeError, match="timed none"):
        made.learn_profile([])
    assert not made.profiled


def test_profile_is_what_is_priced() -> None:
    """Tokens padded to captured sizes, context apart, and the block."""
    curve = profiled().budget_curve(4, 4, 400, 4, GAMMA, 12)
    expected = [5 + 0.1 * size + 0.4 + 1 for size in [4, *[8] * 4, *[16] * 8]]
    np.testing.assert_allclose(curve, expected, rtol=0.03)


def test_head_is_part_of_the_step() -> None:
    """Dummy runs compute no logits; each admitted draft has a row of them."""
    without, with_head = profiled(), profiled(head_line=(0.5, 0.02))
    for drafts in (0, 12):
        difference = (
            with_head.budget_curve(4, 4, 400, 4, GAMMA, 12)[drafts]
            - without.budget_curve(4, 4, 400, 4, GAMMA, 12)[drafts]
        )
        assert difference == pytest.approx(0.5 + 0.02 * (4 + drafts), abs=0.1)


def test_drafts_of_eager_steps_are_not_taken_at_their_word() -> None:
    """While the target runs eagerly the drafter's time is mostly the host's."""
    made = costs()
    made.learn_profile([timed(b, eager_draft_ms=50.0) for b in made.batches(CAPTURED)])
    np.testing.assert_allclose(made.model.draft_ms(8, GAMMA, 0, 0), 1.0, rtol=0.1)


def shape(tokens: int) -> StepShape:
    return StepShape(tokens=tokens, requests=4, context_tokens=400, logits_rows=tokens, depth=GAMMA)


def test_steps_correct_the_profile() -> None:
    """Twice as slow throughout, as another load on the device makes it."""
    made = profiled()
    before = made.budget_curve(4, 4, 400, 4, GAMMA, 12)
    for _ in range(50):
        made.observe(shape(16), 2 * (5 + 1.6 + 0.4 + 1), replayed=True)
    np.testing.assert_allclose(made.budget_curve(4, 4, 400, 4, GAMMA, 12), 2 * before, rtol=0.1)


def test_leaving_the_graph_costs() -> None:
    """Where a trimmed batch cannot replay, the whole block may be cheaper than most of it. What
    such steps take is learned apart, and does not spoil the profile."""
    made = profiled(trims_replay=False)
    plain = profiled().budget_curve(4, 4, 400, 4, GAMMA, 12)
    curve = made.budget_curve(4, 4, 400, 4, GAMMA, 12)
    assert curve[-1] == plain[-1]
    np.testing.assert_allclose(curve[:-1], 1.5 * plain[:-1])
    for _ in range(100):
        made.observe(shape(14), 1.2 * plain[10], replayed=False)
    curve = made.budget_curve(4, 4, 400, 4, GAMMA, 12)
    assert curve[-1] == plain[-1]
    np.testing.assert_allclose(curve[:-1], 1.2 * plain[:-1], rtol=0.01)
    # Past the graphs nobody replays, whole or not.
    beyond = made.budget_curve(28, 8, 400, 8, GAMMA, 24)
    assert (beyond == profiled().budget_curve(28, 8, 400, 8, GAMMA, 24)).all()


def test_model_that_learns_elsewhere_is_followed() -> None:
    """Not taught a second time. What leaving a graph costs is still learned here."""
    made, other = profiled(trims_replay=False), profiled()
    before = other.budget_curve(4, 4, 400, 4, GAMMA, 12)
    made.follow(other.model)
    for _ in range(50):
        made.observe(shape(16), 99.0, replayed=True)
        made.observe(shape(14), 1.2 * before[10], replayed=False)
    assert (other.budget_curve(4, 4, 400, 4, GAMMA, 12) == before).all()
    curve = made.budget_curve(4, 4, 400, 4, GAMMA, 12)
    np.testing.assert_allclose(curve[:-1], 1.2 * before[:-1], rtol=0.01)


def test_times_that_are_none_are_left_out() -> None:
    made = profiled()
    before = made.budget_curve(4, 4, 400, 4, GAMMA, 12)
    for ms in (0.0, -1.0, float("nan")):
        made.observe(shape(16), ms, replayed=True)
    assert (made.budget_curve(4, 4, 400, 4, GAMMA, 12) == before).all()
