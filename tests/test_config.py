"""What an operator may set, and how each wrong setting is answered."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from vllm_dspark.config import (
    CANDIDATES,
    DEFAULT_CANDIDATES,
    DSparkConfig,
    DSparkConfigError,
)
from vllm_dspark.kernels.candidates import SIZES


def read(options: Any) -> DSparkConfig:
    return DSparkConfig.from_additional_config({"dspark": options})


@pytest.mark.parametrize(
    "additional_config",
    [
        {},
        {"dspark": {}},
        {"other_plugin": {"enabled": False}},
        None,
        pytest.param(SimpleNamespace(compute_hash=lambda: "theirs"), id="another plugin's object"),
    ],
    ids=str,
)
def test_absent_options_are_all_defaults(additional_config: Any) -> None:
    """vLLM lets other plugins put anything there; without our entry nothing is read."""
    config = DSparkConfig.from_additional_config(additional_config)
    assert config == DSparkConfig(enabled=True, confidence="auto", check_weights=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enabled": False},
        {"confidence": "always", "check_weights": False},
        {"enabled": True, "confidence": "never", "check_weights": True},
        {"verification": "adaptive", "verification_mode": "host", "profile_context": 4096},
        {"draft_candidates": 128},
        {"draft_candidates": None},
    ],
    ids=str,
)
def test_round_trip(options: dict[str, Any]) -> None:
    """What was read is what was written, and reads the same again."""
    config = read(options)
    assert options.items() <= config.model_dump().items()
    assert config.model_dump(exclude_unset=True) == options
    assert read(config.model_dump()) == config


@pytest.mark.parametrize(
    ("unknown", "nearest"),
    [
        ("enable", "enabled"),
        ("Enabled", "enabled"),
        ("confidense", "confidence"),
        ("check_weight", "check_weights"),
        ("check-weights", "check_weights"),
        ("verifikation", "verification"),
        ("verify_mode", "verification_mode"),
        ("profile_contexts", "profile_context"),
    ],
)
def test_unknown_key_names_the_nearest(unknown: str, nearest: str) -> None:
    """A typo must not be ignored, and the answer must say what was meant."""
    with pytest.raises(DSparkConfigError) as caught:
        read({unknown: True})
    message = str(caught.value)
    assert f"unknown key {unknown!r}" in message
    assert f"nearest is {nearest!r}" in message
    for known in DSparkConfig.model_fields:
        assert repr(known) in message


def test_key_like_nothing_known_is_refused_too() -> None:
    """The nearest key exists for every input, however far away."""
    with pytest.raises(DSparkConfigError, match=r"unknown key 'zzz'; nearest is '\w+'"):
        read({"zzz": 1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("enabled", "true"),  # JSON's true, not a word
        ("enabled", 1),
        ("enabled", None),
        ("check_weights", 0),
        ("check_weights", "no"),
        ("confidence", "Auto"),
        ("confidence", True),
        ("confidence", 0.5),
        ("confidence", ["auto"]),
        ("verification", "adaptiv"),
        ("verification", True),
        ("verification_mode", "gpu"),
        ("profile_context", 0),
        ("profile_context", 512.0),
        ("profile_context", "512"),
        ("draft_candidates", 8),  # the kernels begin at 16
        ("draft_candidates", 48),
        ("draft_candidates", -16),
        ("draft_candidates", True),
        ("draft_candidates", 64.0),
        ("draft_candidates", "64"),
    ],
)
def test_wrong_type_or_value_is_named(key: str, value: Any) -> None:
    """Strict: nothing is guessed from a value of another type."""
    with pytest.raises(DSparkConfigError) as caught:
        read({key: value})
    assert f"{key!r} is {value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "count"), [(16, 16), (256, 256), ("auto", DEFAULT_CANDIDATES), (0, None)]
)
def test_candidates(given: Any, count: int | None) -> None:
    """None of them and 0 are the same thing: all words."""
    assert read({"draft_candidates": given}).draft_candidates == count


def test_candidates_are_what_the_kernels_take() -> None:
    """Written down twice, so that reading options imports no Triton."""
    assert SIZES == CANDIDATES
    assert DEFAULT_CANDIDATES in CANDIDATES


def test_all_problems_come_at_once() -> None:
    with pytest.raises(DSparkConfigError) as caught:
        read({"enabled": "yes", "confidence": "maybe", "chek_weights": True})
    message = str(caught.value)
    assert "'enabled' is 'yes'" in message
    assert "'confidence' is 'maybe'" in message
    assert "nearest is 'check_weights'" in message


@pytest.mark.parametrize("options", [True, "off", ["enabled"], 3, None], ids=repr)
def test_entry_that_is_no_mapping(options: Any) -> None:
    with pytest.raises(DSparkConfigError) as caught:
        read(options)
    assert repr(options) in str(caught.value)
    assert "'enabled'" in str(caught.value)


@pytest.mark.parametrize("confidence", ["auto", "always", "never"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_only_contradictions_are_refused(confidence: str, adaptive: bool) -> None:
    """Adaptive verification reads the confidences that `never` forbids; all else goes together."""
    config = read({"confidence": confidence})
    if confidence == "never" and adaptive:
        with pytest.raises(DSparkConfigError, match=r'"never".*enable_adaptive_verification.*Fix'):
            config.check_against(adaptive_verification=adaptive)
    else:
        config.check_against(adaptive_verification=adaptive)


@pytest.mark.parametrize(
    ("options", "adaptive", "sides"),
    [
        ({"verification": "all"}, True, ['"all"', "enable_adaptive_verification"]),
        ({"verification": "all", "verification_mode": "host"}, False, ['"all"', '"host"']),
        ({"verification": "all", "verification_mode": "device"}, False, ['"all"', '"device"']),
        ({"verification": "adaptive", "confidence": "never"}, False, ['"never"', '"adaptive"']),
    ],
    ids=str,
)
def test_contradiction_names_both_sides(options: Any, adaptive: bool, sides: list[str]) -> None:
    with pytest.raises(DSparkConfigError, match="Fix: drop one of the two") as caught:
        read(options).check_against(adaptive_verification=adaptive)
    assert all(side in str(caught.value) for side in sides)


@pytest.mark.parametrize(
    "options",
    [
        {"verification": "all"},
        {"verification": "adaptive"},
        {"verification": "adaptive", "verification_mode": "device"},
        {"verification_mode": "host"},
        {"verification": "all", "confidence": "never"},
        {"confidence": "never", "verification_mode": "host"},
    ],
    ids=str,
)
def test_what_goes_together(options: Any) -> None:
    """With nothing asked for elsewhere."""
    read(options).check_against(adaptive_verification=False)


def test_config_cannot_be_changed_afterwards() -> None:
    """Every part of the engine sees the same options."""
    config = read({})
    with pytest.raises(ValidationError):
        config.enabled = False
