"""The policies of a simulation: what vLLM would do, and our own classes at work."""

from __future__ import annotations

import numpy as np
import pytest
from vllm.v1.worker.gpu.spec_decode.adaptive_verification import build_cost_tables_from_curves

from tests.simulations import GAMMA, cost_model, drafter, engine, replica
from vllm_dspark.simulation.built_in import BuiltIn, _tables
from vllm_dspark.simulation.loads import closed_loop
from vllm_dspark.simulation.ours import Ours, usual_depths
from vllm_dspark.simulation.policies import Batch, FixedDepth, Outcome, Policy
from vllm_dspark.simulation.workload import Lengths

CAPTURED = [1, 2, 4, 8, 16, 32]


def batch(requests: int, drafts: int = GAMMA) -> Batch:
    """Requests that all decode, in the first slots."""
    return Batch(
        step=0, slots=np.arange(requests), drafts=np.full(requests, drafts),
        base_tokens=requests, sampling=requests, context_tokens=0, depth=GAMMA,
    )  # fmt: skip


def drew(of: Batch, confidence: np.ndarray) -> Outcome:
    """That step ran and drew a block for each."""
    none = np.zeros_like(of.slots)
    return Outcome(of, none, none, of.slots, confidence, None, 1.0, False)  # type: ignore[arg-type]  # no shape is read


def test_built_in_tables_are_those_of_vllm() -> None:
    """Stairs at captured sizes, as vLLM's own function makes of the same curve."""
    cost, context = cost_model(captured=CAPTURED, context_ms=0.01), 100
    on = engine(cost, most_requests=8, most_tokens=32)
    sizes = np.array(CAPTURED)
    requests = np.minimum(sizes, 8)
    verify = cost.verify_ms(sizes, requests, requests * context, 0 * sizes)
    drafts = cost.draft_ms(np.arange(1, 9), GAMMA, 0, 0)
    their_draft, their_verify = build_cost_tables_from_curves(
        list(enumerate(drafts.tolist(), start=1)),
        list(zip(CAPTURED, verify.tolist(), strict=True)),
        max_num_reqs=8, max_batch_tokens=32, cudagraph_limit=32,
    )  # fmt: skip
    our_verify, our_draft = _tables(on, GAMMA, context)
    np.testing.assert_allclose(our_draft[1:], their_draft[1:])
    np.testing.assert_allclose(our_verify[sizes], their_verify[sizes])
    # Below 8, between captured sizes, ours has the context of fewer requests.
    np.testing.assert_allclose(our_verify[9:33], their_verify[9:33])


def test_built_in_takes_new_requests_for_certain() -> None:
    policy = BuiltIn(GAMMA, engine(cost_model(verify=[[1, 64], [5.0, 5.1]]), most_requests=8))
    step = batch(2)
    policy.ended(drew(step, np.full((2, GAMMA), 0.01)))
    policy.ended(drew(step, np.full((2, GAMMA), 0.01)))
    dear = engine(cost_model(verify=[[1, 64], [5.0, 25.0]]), most_requests=8)
    wary = BuiltIn(GAMMA, dear)
    assert wary.lengths(step).sum() == 2 * GAMMA
    for _ in range(2):
        wary.ended(drew(step, np.full((2, GAMMA), 0.01)))
    assert wary.lengths(step).sum() == 0
    wary.admit(5, 1)
    assert wary.lengths(step).tolist() == [0, GAMMA]


def test_built_in_decides_by_the_block_before() -> None:
    """How many is one block late, whose is not."""
    policy = BuiltIn(GAMMA, engine(cost_model(verify=[[1, 64], [5.0, 60.0]]), most_requests=8))
    step = batch(2)
    sure, hopeless = [0.99] * GAMMA, [0.01] * GAMMA
    policy.ended(drew(step, np.array([sure, hopeless])))
    policy.ended(drew(step, np.array([hopeless, sure])))
    assert policy.lengths(step).tolist() == [0, GAMMA]


@pytest.mark.parametrize("wanted", [0.0, 0.4, 1.7, 3.0])
def test_built_in_verifies_what_it_was_told_to(wanted: float) -> None:
    policy = BuiltIn(GAMMA, engine(), verified=wanted)
    total = sum(int(policy.lengths(batch(5)).sum()) for _ in range(40))
    assert total == pytest.approx(40 * 5 * wanted, abs=1)


def throughput(policy: Policy, concurrency: int, **cost: object) -> tuple[float, float]:
    """tok/s and drafts per request and step of a closed loop."""
    on = engine(cost_model(**cost), most_requests=64)  # type: ignore[arg-type]  # named as there
    lengths = Lengths(prompt=16, output=200, spread=0.3)
    result = closed_loop(
        lambda seed: replica(policy, on, seed=seed, drafter=drafter()),
        concurrency, lengths, 4 * concurrency, 0,
    )  # fmt: skip
    return result.tokens_per_second, result.drafted_per_request


STEEP = {"verify": [[1, 8, 64, 256], [5.0, 5.5, 20.0, 80.0]], "draft_ms": 0.3}


@pytest.mark.parametrize("concurrency", [1, 8, 64])
def test_ours_is_about_as_good_as_the_best_fixed_depth(concurrency: int) -> None:
    """The real controller and policy, on costs that make another depth best at each load."""
    on = engine(cost_model(**STEEP), most_requests=64)  # type: ignore[arg-type]  # named as there
    ours, drafted = throughput(Ours(GAMMA, on), concurrency, **STEEP)
    fixed = {d: throughput(FixedDepth(d), concurrency, **STEEP)[0] for d in range(GAMMA + 1)}
    best = max(fixed, key=lambda depth: fixed[depth])
    assert ours > 0.95 * fixed[best]
    if concurrency == 1:
        assert best == GAMMA
        assert drafted > 2.5
    if concurrency == 64:
        assert drafted < 1.5


def test_ours_corrects_a_wrong_profile() -> None:
    """Every step takes twice as long as its profile says, which it hears of step by step."""
    sizes = [1.0, 64.0, 256.0]
    policy = Ours(GAMMA, engine(cost_model([sizes, [5.0, 7.0, 16.0]], draft_ms=1.0)))
    on = engine(cost_model([sizes, [10.0, 14.0, 32.0]], draft_ms=2.0), most_requests=64)
    made = replica(policy, on)
    closed_loop(lambda seed: made, 32, Lengths(prompt=16, output=300), 128, 0)
    step = (32, 32, 0, 32, 0)
    assert policy.controller.cost.error < 10
    assert policy.controller.cost.step_ms(*step) == pytest.approx(on.cost.step_ms(*step), rel=0.2)


def test_usual_depths_are_those_of_the_plugin() -> None:
    from vllm_dspark.integration.depth_plan import _STEPS

    for gamma in (1, 2, 4, 7):
        assert set(usual_depths(gamma)) == {0, gamma, *(d for d in _STEPS if d < gamma)}
