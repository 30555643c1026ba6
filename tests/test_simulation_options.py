"""What is asked for: refused with the option's name, before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_dspark.simulation.options import Options, SimulationError, numbers, whole_numbers

SWEEP = Path("sweep.json")
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("text", "expected"), [("", ()), ("1", (1.0,)), ("0.5,2,", (0.5, 2.0)), ("1e2", (100.0,))]
)
def test_numbers(text: str, expected: tuple[float, ...]) -> None:
    assert numbers("--rate", text, "10,40") == expected


def test_whole_numbers() -> None:
    found = whole_numbers("--fixed", "1,4.0", "1,3")
    assert found == (1, 4)
    assert all(type(value) is int for value in found)


@pytest.mark.parametrize("text", ["high", "1,x", ",", "inf", "-inf", "nan", "0", "-1", "1e999"])
def test_what_is_no_list_is_refused(text: str) -> None:
    for parse in (numbers, whole_numbers):
        with pytest.raises(SimulationError, match=r"^--rate .*Fix: such as --rate 10,40"):
            parse("--rate", text, "10,40")


@pytest.mark.parametrize("text", ["1.7", "2,0.5"])
def test_fractions_are_not_cut_off(text: str) -> None:
    with pytest.raises(SimulationError, match=r"^--fixed must be whole, got (1\.7|0\.5)"):
        whole_numbers("--fixed", text, "1,3")


@pytest.mark.parametrize("text", ["1", "1,0.7", "0.5,1.5"])
def test_a_limit_is_named(text: str) -> None:
    with pytest.raises(SimulationError, match=r"^--acceptance must lie above 0 and below 1"):
        numbers("--acceptance", text, "0.8,0.7", most=1.0)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "name",
    ["temperature", "sharpness", "noise", "overconfidence", "floor", "seconds", "launch_ms"],
)
def test_numbers_must_be_finite(name: str, value: float) -> None:
    with pytest.raises(SimulationError, match=f"^--{name.replace('_', '-')} must be a finite"):
        Options(**{name: value})  # type: ignore[arg-type]  # all of them are numbers


def test_a_floor_is_above_0() -> None:
    with pytest.raises(SimulationError, match=r"^--floor must be above 0, got 0"):
        Options(floor=0.0)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"sweep": SWEEP, "launch_ms": 5.0}, "--launch-ms would do nothing"),
        ({"seconds": 5.0}, "--seconds would do nothing"),
        ({"temperature": 0.0, "acceptance": (0.5,)}, "--temperature would do nothing"),
        ({"rate": (1.0,), "requests": 3}, "--requests would do nothing"),
        ({"rate": (1.0,), "concurrency": (1,)}, "--concurrency and --rate"),
        ({"validate": True}, "--validate needs a sweep"),
    ],
)
def test_what_would_do_nothing_is_refused(given: dict[str, Any], named: str) -> None:
    with pytest.raises(SimulationError, match=named):
        Options(**given)


def test_launch_ms_beside_a_profile_does_something() -> None:
    assert Options(sweep=SWEEP, profile=SWEEP, launch_ms=5.0).launch_ms == 5.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("profile", SWEEP), ("concurrency", (1,)), ("rate", (1.0,)), ("gpus", 2), ("output", 9),
        ("fixed", (1,)), ("floor", 1.0), ("requests", 3), ("seconds", 5.0), ("max_num_seqs", 4),
        ("launch_ms", 5.0), ("plot", SWEEP),
    ],
)  # fmt: skip
def test_what_a_validation_has_no_use_for(name: str, value: Any) -> None:
    option = "--" + name.replace("_", "-")
    with pytest.raises(SimulationError, match=f"--validate .* has no use for {option}. Fix"):
        Options(sweep=SWEEP, validate=True, **{name: value})


def test_what_a_validation_needs() -> None:
    Options(
        sweep=SWEEP, validate=True, temperature=0.0, acceptance=(0.5,), sharpness=2.0, noise=0.1,
        overconfidence=0.2, blocks=False, prompt=9, seed=3, json=SWEEP,
    )  # fmt: skip
