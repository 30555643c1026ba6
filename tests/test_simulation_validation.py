"""Simulated against measured: a sweep made up from known costs, and the one that was measured."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.simulations import cost_model
from vllm_dspark.simulation.acceptance import Drafter, conditional_acceptance
from vllm_dspark.simulation.command import verifies_by_block
from vllm_dspark.simulation.engine import Engine
from vllm_dspark.simulation.fitting import fit_engine
from vllm_dspark.simulation.loads import closed_loop
from vllm_dspark.simulation.measured import Measured, read_sweep
from vllm_dspark.simulation.options import Options
from vllm_dspark.simulation.policies import FixedDepth
from vllm_dspark.simulation.replica import Replica
from vllm_dspark.simulation.validation import BAR, misses, validate
from vllm_dspark.simulation.workload import Lengths

SWEEP = Path(__file__).parent.parent / "benchmarks/results/h200-8b/sweep.json"
GAMMA, LAUNCH_MS, CONTEXT = 4, 15.0, 4.9152e-05
LENGTHS = Lengths(prompt=32, output=96)
LOADS = (1, 8, 32)


@functools.cache
def made_up() -> str:
    """What a sweep would hold of an engine whose costs are known."""
    table = [[1, 16, 64, 128, 256, 512, 8192], [5.0, 5.2, 6.0, 7.5, 11.0, 19.0, 240.0]]
    cost = cost_model(table, draft_ms=0.4, context_ms=CONTEXT, gamma=GAMMA)  # type: ignore[arg-type]  # ints are floats
    on = Engine(cost, LAUNCH_MS)
    drafter = Drafter([0.7, 0.6, 0.5, 0.5])
    arms: dict[str, Any] = {}
    for gamma in range(GAMMA + 1):
        arms[f"γ = {gamma}"] = {
            "kind": "fixed" if gamma else "none",
            "gamma": gamma or None,
            "options": {"env": {}},
            "runs": [_run(Replica(FixedDepth(gamma), on, drafter, 9), load) for load in LOADS],
        }
    settings = {"max_tokens": 96, "max_num_seqs": 256, "max_model_len": 512, "extra": {}}
    return json.dumps({"settings": settings, "arms": arms})


def _run(on: Replica, load: int) -> dict[str, Any]:
    requests = max(6 * load, 24)
    result = closed_loop(lambda seed: on, load, LENGTHS, requests, 9)
    return {
        "concurrency": load, "temperature": 1.0, "prompts": requests, "seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second, "accepted_length": result.accepted_length,
        "verified_per_request": result.verified_per_request,
    }  # fmt: skip


@pytest.fixture(scope="module")
def known() -> Measured:
    """The made-up sweep."""
    return read_sweep(made_up(), LENGTHS.prompt)


def test_known_costs_are_found_again(known: Measured) -> None:
    """Fitted on γ of 0, 1 and 4, arms of 2 and 3 come out right."""
    gammas = (0, 1, 4)
    drafter = Drafter(conditional_acceptance(known.accepted_lengths(gammas)))
    fit = fit_engine(known, gammas, drafter)
    assert fit.error < 0.02
    assert fit.engine.launch_ms > 5  # nothing but prefills tells of it, and those are few
    rows = validate(known, fit, drafter, gammas)
    assert [row.fitted for row in rows] == [g in gammas for g in range(5) for _ in LOADS]
    assert not misses(rows)
    predicted = [row.ratio for row in rows if not row.fitted]
    assert np.abs(np.array(predicted) - 1).max() < 0.05


def test_misses_are_told(known: Measured) -> None:
    """A drafter that is right half as often does not pass for the measured one."""
    gammas = (0, 1, 4)
    drafter = Drafter(conditional_acceptance(known.accepted_lengths(gammas)))
    fit = fit_engine(known, gammas, drafter)
    rows = validate(known, fit, Drafter(drafter.conditional / 2), gammas)
    assert {row.arm for row in misses(rows)} == {"γ = 1", "γ = 2", "γ = 3", "γ = 4"}


def test_measured_sweep_is_predicted() -> None:
    """Fixed arms that no cost was fitted to. Where a measurement contradicts its neighbours, such
    as an arm that took longer than one that verifies more, no monotone cost can follow; such
    cells are a tenth of all at most."""
    measured = read_sweep(SWEEP.read_text(), 64)
    arms = tuple(arm for arm in measured.arms if arm.kind in ("none", "fixed"))
    measured = replace(measured, arms=arms)
    gammas = (0, *sorted(arm.gamma for arm in arms if arm.gamma)[::2])
    drafter = Drafter(conditional_acceptance(measured.accepted_lengths(gammas)))
    rows = validate(measured, fit_engine(measured, gammas, drafter), drafter, gammas)
    predicted = [row for row in rows if not row.fitted]
    assert len(predicted) >= 6
    assert len(misses(predicted)) <= 0.1 * len(predicted)
    assert float(np.median([abs(row.ratio - 1) for row in predicted])) < BAR / 2
    assert not misses([row for row in rows if row.fitted])


@pytest.mark.parametrize(
    ("temperature", "drafting", "drawn"),
    [(1.0, "probabilistic", True), (1.0, "greedy", False), (0.0, "probabilistic", False)],
)
def test_drafts_of_greedy_requests_are_not_drawn(
    temperature: float, drafting: str, drawn: bool
) -> None:
    """Blocks are for those that are; an option may say otherwise."""
    data = json.loads(SWEEP.read_text())
    data["settings"]["drafting"] = drafting
    for arm in data["arms"].values():
        for run in arm["runs"]:
            run["temperature"] = temperature
    measured = read_sweep(json.dumps(data), 64)
    assert measured.drawn is drawn
    assert verifies_by_block(Options(sweep=SWEEP), measured) is drawn
    assert verifies_by_block(Options(sweep=SWEEP, blocks=False), measured) is False
    assert verifies_by_block(Options(sweep=SWEEP, blocks=True), measured) is True
    assert verifies_by_block(Options(acceptance=(0.5,)), None) is False


def test_ours_is_predicted_as_it_verifies() -> None:
    """Blocks emit more for the same costs; the other arms stay as they are."""
    measured = read_sweep((SWEEP.parents[1] / "h200-8b-peers/sweep.json").read_text(), 64)
    gammas = (0, 3, 7)
    few = tuple(
        replace(arm, cells=arm.cells[:1])
        for arm in measured.arms
        if arm.kind == "ours" or (arm.kind != "built-in adaptive" and arm.gamma in gammas)
    )
    measured = replace(measured, arms=few)
    drafter = Drafter(conditional_acceptance(measured.accepted_lengths(gammas)))
    fit = fit_engine(measured, gammas, drafter)
    found = {
        blocks: {
            row.arm: row.simulated
            for row in validate(measured, fit, drafter, gammas, by_block=blocks)
        }
        for blocks in (False, True)
    }
    ours = {blocks: rows.pop("vllm-dspark") for blocks, rows in found.items()}
    assert found[True] == found[False]
    assert ours[True] > 1.02 * ours[False]


def test_built_in_arms_stand_there_twice() -> None:
    data = json.loads(made_up())
    arm = data["arms"]["γ = 4"] | {"kind": "built-in adaptive"}
    arm["options"] = {"env": {"VLLM_ADAPTIVE_VERIFICATION_PROFILE_CONTEXT_LEN": "256"}}
    for run, verified in zip(arm["runs"], (3.5, 2.0, 0.5), strict=True):
        run["verified_per_request"] = verified
    data["arms"]["built in"] = arm
    measured = read_sweep(json.dumps(data), LENGTHS.prompt)
    assert measured.arms[-1].profile_context == 256
    drafter = Drafter([0.7, 0.6, 0.5, 0.5])
    fit = fit_engine(measured, (0, 4), drafter)
    rows = [row for row in validate(measured, fit, drafter, (0, 4)) if row.kind == arm["kind"]]
    assert [row.concurrency for row in rows] == [1, 1, 8, 8, 32, 32]
    given = [row for row in rows if "as many as measured" in row.arm]
    assert [row.simulated_verified for row in given] == pytest.approx([3.5, 2.0, 0.5], rel=0.1)


def test_lengths_of_a_sweep_with_a_spread() -> None:
    data = json.loads(made_up())
    data["settings"]["extra"] = {"length_spread": 0.5}
    lengths = read_sweep(json.dumps(data), 10).lengths
    assert lengths.output * (1 + lengths.spread) == pytest.approx(96)
    assert lengths.output * (1 - lengths.spread) == pytest.approx(48)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {}, "arms": {"a": 1}}'])
def test_what_is_no_sweep_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        read_sweep(text, 10)


def test_a_missing_temperature_or_arm_is_named(known: Measured) -> None:
    with pytest.raises(ValueError, match=r"temperature 0\.5"):
        read_sweep(made_up(), 10, 0.5)
    with pytest.raises(ValueError, match="γ = 7"):
        fit_engine(known, (0, 7), Drafter([0.5] * 7))
    with pytest.raises(ValueError, match="gammas"):
        fit_engine(known, (0,), Drafter([0.5]))


def test_what_an_engine_was_given_beside_is_no_policy_to_be_replayed() -> None:
    """No arm takes the place of the one without speculation that costs are fitted to."""
    data = json.loads(made_up())
    options = {"engine": {"prefill_schedule_interval": 4}}
    data["arms"] = {"interval": data["arms"]["γ = 0"] | {"options": options}} | data["arms"]
    assert [arm.name for arm in read_sweep(json.dumps(data), 10).arms] == list(data["arms"])[1:]
