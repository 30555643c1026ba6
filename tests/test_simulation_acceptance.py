"""Simulated drafters: as often right as they are said to be, and as well informed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from vllm_dspark.simulation.acceptance import Drafter, conditional_acceptance

CONDITIONAL = np.array([0.9, 0.6, 0.3])


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 4.0])
def test_acceptance_has_the_mean_that_was_asked_for(sharpness: float) -> None:
    accepts, _ = Drafter(CONDITIONAL, sharpness).draw(np.random.default_rng(0), 40_000)
    np.testing.assert_allclose(accepts.mean(axis=0), CONDITIONAL, atol=0.01)
    assert (accepts.std(axis=0) > 0.05).all() == (sharpness > 0)


def test_confidence_without_noise_is_the_truth() -> None:
    accepts, confidence = Drafter(CONDITIONAL, 2.0, 0.0).draw(np.random.default_rng(1), 50)
    np.testing.assert_allclose(confidence, accepts)


def test_noise_hides_and_overconfidence_raises() -> None:
    def draws(**how: float) -> tuple[np.ndarray, np.ndarray]:
        return Drafter(CONDITIONAL, 1.0, **how).draw(np.random.default_rng(2), 20_000)

    quiet, loud = draws(noise=0.1), draws(noise=3.0)
    correlations = [np.corrcoef(a[:, 0], c[:, 0])[0, 1] for a, c in (quiet, loud)]
    assert correlations[0] > 0.95
    assert correlations[1] < 0.5
    accepts, confidence = draws(noise=0.0, overconfidence=0.5)
    assert (confidence > accepts).all()


def emitted(conditional: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Accepted lengths of γ = 1, 2, …"""
    survival = np.cumprod(np.asarray(conditional, dtype=np.float64))
    return np.asarray(1 + np.cumsum(survival), dtype=np.float64)


@pytest.mark.parametrize(
    ("truth", "blocks"),
    [
        ([0.7], [1]),
        ([0.8, 0.7, 0.6], [1, 2, 3]),
        ([0.85, 0.8, 0.78, 0.74, 0.7, 0.68, 0.66], range(1, 8)),
        ([0.9, 0.88, 0.85, 0.82, 0.78, 0.75, 0.7], range(1, 8)),
        ([0.95] * 16, [1, 16]),
        ([0.5] * 5, [5]),
    ],
)
def test_a_smooth_acceptance_is_read_off_lengths(truth: list[float], blocks: list[int]) -> None:
    lengths = emitted(truth)
    found = conditional_acceptance({block: lengths[block - 1] for block in blocks})
    np.testing.assert_allclose(found, truth, atol=0.01)
    np.testing.assert_allclose(emitted(found), lengths, rtol=0.001)


def test_between_known_blocks_acceptance_changes_bit_by_bit() -> None:
    """γ = 1 and 5 are known: position 1, and what 2 to 5 give together."""
    lengths = emitted([0.8, 0.6, 0.5, 0.45, 0.45])
    found = conditional_acceptance({5: lengths[4], 1: lengths[0]})
    assert found[0] == pytest.approx(0.8, abs=0.001)
    assert emitted(found)[4] == pytest.approx(lengths[4], rel=0.001)
    assert (np.diff(found) < 0).all()
    assert np.abs(np.diff(found)).max() < 0.2


@pytest.mark.parametrize("wrong", [0.004, -0.004])
def test_chance_in_a_length_does_not_make_deep_acceptance_leap(wrong: float) -> None:
    """Of γ = 5, where position 5 survives once in 30: differences of lengths would make it and its
    neighbours differ by 0.3 and more. All lengths still come out."""
    truth = np.array([0.56, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    blocks = np.array([1, 2, 3, 5, 7])
    lengths = emitted(truth)[blocks - 1] * np.array([1, 1, 1, 1 + wrong, 1])
    found = conditional_acceptance(dict(zip(blocks.tolist(), lengths.tolist(), strict=True)))
    np.testing.assert_allclose(emitted(found)[blocks - 1], lengths, rtol=0.005)
    assert np.abs(np.diff(found)).max() < 0.15
    np.testing.assert_allclose(found, truth, atol=0.15)


def test_acceptance_of_the_measured_sweep_is_plausible() -> None:
    """No position beside another that is accepted twice as often, and every length within 0.5 %."""
    lengths = {1: 1.5593, 2: 1.8268, 3: 1.9801, 5: 2.0679, 7: 2.1076}
    found = conditional_acceptance(lengths)
    again = emitted(found)[np.array(list(lengths)) - 1]
    np.testing.assert_allclose(again, list(lengths.values()), rtol=0.005)
    assert np.abs(np.diff(found)).max() < 0.2
    assert found[5:].max() < 0.7


def test_acceptance_beyond_the_longest_block_is_that_of_its_last_position() -> None:
    found = conditional_acceptance({1: 1.8, 2: 2.2}, 4)
    np.testing.assert_allclose(found, [0.8, 0.5, 0.5, 0.5], atol=0.005)
    assert found[1] == found[2] == found[3]
    assert conditional_acceptance({3: 2.0}, 2).size == 3


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ({2: 1.0}, [0.001] * 2), ({3: 4.0}, [0.999] * 3), ({3: 5.0}, [0.999] * 3),
        ({1: 2.0, 3: 4.0}, [0.999] * 3),
    ],
)  # fmt: skip
def test_acceptance_stays_within_its_range(lengths: dict[int, float], expected: list) -> None:
    """Drafts that are never accepted, always, or more often than that."""
    np.testing.assert_allclose(conditional_acceptance(lengths), expected, atol=1e-6)


@pytest.mark.parametrize(
    "lengths",
    [{}, {0: 1.5}, {1: 0.9}, {1: 1.5, 2: 1.4}, {1: float("nan")}, {1: float("inf")}],
)
def test_impossible_lengths_are_refused(lengths: dict[int, float]) -> None:
    with pytest.raises(ValueError, match="accepted_lengths"):
        conditional_acceptance(lengths)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (([0.5, 1.0],), "conditional"), (([],), "conditional"), (([[0.5]],), "conditional"),
        (([0.5], -1.0), "sharpness"), (([0.5], 1.0, -0.1), "noise"),
    ],
)  # fmt: skip
def test_impossible_drafters_are_refused(arguments: tuple, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Drafter(*arguments)
