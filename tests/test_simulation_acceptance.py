"""Simulated drafters: as often right as they are said to be, and as well informed."""

from __future__ import annotations

import numpy as np
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


def test_conditional_acceptance_is_read_off_lengths() -> None:
    """γ = 1 and 3 are known: position 1 exactly, 2 and 3 alike and to the right sum."""
    survival = np.cumprod([0.8, 0.5, 0.5])
    found = conditional_acceptance({3: 1 + survival.sum(), 1: 1.8})
    np.testing.assert_allclose(found, [0.8, 0.5, 0.5], atol=1e-6)


def test_acceptance_beyond_the_longest_block_is_that_of_its_last_position() -> None:
    np.testing.assert_allclose(
        conditional_acceptance({1: 1.8, 2: 2.2}, 4), [0.8, 0.5, 0.5, 0.5], atol=1e-6
    )
    assert conditional_acceptance({3: 2.0}, 2).size == 3


@pytest.mark.parametrize("lengths", [{}, {0: 1.5}, {1: 1.5, 2: 1.4}, {1: float("nan")}])
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
