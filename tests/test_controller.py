"""The controller between reports and the depth policy: what it passes on, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import step_cases
from tests.step_cases import DEPTHS, GAMMA, SURVIVAL
from vllm_dspark.scheduler.controller import DepthController
from vllm_dspark.scheduler.cost_model import CostModel
from vllm_dspark.scheduler.depth import Goal

PROFILE = step_cases.model().to_json({})
SEEN = [0.0] * GAMMA


def controller(**changes: Any) -> DepthController:
    return DepthController(GAMMA, Goal(), **changes)


def choose(control: DepthController, requests: int, waiting: int = 0, steps: int = 1) -> int:
    """The depth after some steps of one load."""
    for _ in range(steps):
        control.choose(
            requests=requests,
            waiting=waiting,
            context_tokens=requests * step_cases.CONTEXT,
            free_kv_fraction=0.9,
        )
    return control.depth


def test_full_depth_until_the_workers_are_ready() -> None:
    """Whatever the load: which depths there are is not known yet."""
    control = controller()
    assert not control.varies
    assert choose(control, 256, steps=50) == GAMMA


def test_depth_follows_the_load() -> None:
    """With the profile of an 8B server: deep for one request, hardly at all for 256."""
    control = controller()
    control.start(DEPTHS, PROFILE)
    control.observe_survival(SURVIVAL.tolist(), SEEN)
    assert control.varies
    assert choose(control, 1, steps=50) >= 5
    assert choose(control, 256, steps=100) <= 1
    assert choose(control, 1, steps=100) >= 5


def test_profile_is_used() -> None:
    """The workers' profile takes the place of the guess."""
    control = controller()
    before = control.cost
    control.start(DEPTHS, None)
    assert control.cost is before
    control.start(DEPTHS, PROFILE)
    shape = 64, 64, 64 * step_cases.CONTEXT, 64, 3
    assert float(control.cost.step_ms(*shape)) == pytest.approx(
        float(step_cases.model().step_ms(*shape))
    )


@pytest.mark.parametrize("depth", [0, 4, GAMMA])
def test_fixed_depth(depth: int) -> None:
    """Neither load nor reports change it."""
    control = controller(fixed=depth)
    control.start(DEPTHS, PROFILE)
    assert not control.varies
    assert choose(control, 1, steps=20) == choose(control, 256, steps=20) == depth


@pytest.mark.parametrize("depths", [(GAMMA,), (1, GAMMA), (0,)])
def test_engine_without_a_choice(depths: tuple[int, ...]) -> None:
    """Graphs for one length only: depth stays γ."""
    control = controller()
    control.start(depths, None)
    assert not control.varies
    assert choose(control, 256, steps=50) == GAMMA


def test_survival_of_workers_takes_precedence_over_outcomes() -> None:
    """Outcomes of trimmed blocks say less survives than would. Until a worker says something they
    are all there is."""
    control = controller()
    control.start(DEPTHS, PROFILE)
    for _ in range(200):
        control.observe_outcomes(np.zeros((4, GAMMA)))
    assert choose(control, 1, steps=60) <= 1
    control.observe_survival(SURVIVAL.tolist(), SEEN)
    for _ in range(60):
        control.observe_outcomes(np.zeros((4, GAMMA)))
        choose(control, 1)
    assert control.depth >= 5


def test_waiting_requests_start_the_engine() -> None:
    """With nobody running, the first step is decided for those that wait: catches a first step
    that decides nothing, and drafts nothing."""
    control = controller()
    control.start(DEPTHS, PROFILE)
    control.observe_survival(SURVIVAL.tolist(), SEEN)
    control.choose(requests=0, waiting=1, context_tokens=0, free_kv_fraction=1.0)
    assert control.depth >= 5


@pytest.mark.parametrize(
    ("shape", "ms"),
    [
        ((8, 8, 80, 8, 0), float("nan")),
        ((8, 8, 80, 8, 0), -1.0),
        ((8, 8, 80, 8, GAMMA + 1), 5.0),
        ((8, -8, 80, 8, 0), 5.0),
        ((8, 8), 5.0),
    ],
)
def test_nonsense_times_teach_nothing(shape: tuple[int, ...], ms: float) -> None:
    control = controller()
    control.start(DEPTHS, PROFILE)
    before = float(control.cost.step_ms(8, 8, 80, 8, 0))
    assert not control.observe_step(shape, ms, True)
    assert control.ignored == 1
    assert float(control.cost.step_ms(8, 8, 80, 8, 0)) == before


@pytest.mark.parametrize(
    ("survival", "age"),
    [
        ([0.5], [0.0]),
        ([1.5] * GAMMA, SEEN),
        ([float("nan")] * GAMMA, SEEN),
        (SURVIVAL.tolist(), [-1.0] * GAMMA),
    ],
)
def test_nonsense_survival_is_ignored(survival: list[float], age: list[float]) -> None:
    control = controller()
    control.start(DEPTHS, PROFILE)
    control.observe_survival(SURVIVAL.tolist(), SEEN)
    expected = choose(control, 1, steps=50)
    control.observe_survival(survival, age)
    assert control.ignored == 1
    assert choose(control, 1, steps=50) == expected


@pytest.mark.parametrize(("depths", "profile"), [((0, 99), None), (DEPTHS, "no profile")])
def test_nonsense_at_start_leaves_full_depth(depths: tuple[int, ...], profile: Any) -> None:
    control = controller()
    control.start(depths, profile)
    assert control.ignored == 1
    assert choose(control, 256, steps=50) == GAMMA


def test_times_correct_the_costs() -> None:
    """Steps that take twice as long as profiled are predicted so."""
    control = controller()
    control.start(DEPTHS, PROFILE)
    for _ in range(300):
        for depth in (0, 3):
            step = step_cases.shape(16, depth)
            assert control.observe_step(
                (step.tokens, step.requests, step.context_tokens, step.logits_rows, step.depth),
                2 * step_cases.step_ms(step),
                True,
            )
    step = step_cases.shape(16, 3)
    assert step_cases.predicted(control.cost, step) == pytest.approx(
        2 * step_cases.step_ms(step), rel=0.1
    )
    assert control.snapshot()["cost_error_percent"] < 10


@pytest.mark.parametrize("fixed", [-1, GAMMA + 1])
def test_fixed_depth_is_checked(fixed: int) -> None:
    with pytest.raises(ValueError, match="fixed"):
        controller(fixed=fixed)


def test_profile_text_is_the_cost_models_own() -> None:
    """What `start` is given is what `to_json` gives without a key."""
    assert CostModel.from_json(PROFILE, {}).gamma == GAMMA
