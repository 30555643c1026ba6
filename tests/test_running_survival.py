"""The running mean of survival: what it converges to, forgets, and knows about its own age."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_dspark.scheduler.running_survival import (
    FIRST_GUESS,
    STEPS,
    RunningSurvival,
    outcomes,
)

NOTHING = np.empty((0, 3))


def row(*survival: float) -> np.ndarray:
    return np.array([survival])


def test_before_anything_was_seen() -> None:
    """A guess that falls along the block, infinitely old."""
    running = RunningSurvival(3)
    np.testing.assert_allclose(running.mean, FIRST_GUESS ** np.array([1, 2, 3]))
    assert np.isinf(running.age).all()
    running.step(NOTHING)
    assert np.isinf(running.age).all()


@pytest.mark.parametrize("gamma", [1, 3, 7])
@pytest.mark.parametrize("requests", [1, 5, 256])
def test_converges_to_the_mean(requests: int, gamma: int) -> None:
    """Whatever the number of requests and positions; the guess is gone."""
    random = np.random.default_rng(gamma)
    truth = np.linspace(0.7, 0.1, gamma)
    running = RunningSurvival(gamma)
    late = []
    for step in range(3000):
        running.step((random.random((requests, gamma)) < truth).astype(float))
        if step >= 300:
            late.append(running.mean.copy())
    # 0.01 is a standard error of one request's mean
    np.testing.assert_allclose(np.mean(late, axis=0), truth, atol=0.04)
    assert (np.std(late, axis=0) < 0.09).all()


def test_unseen_positions_keep_their_mean_and_age() -> None:
    """NaN is not a zero: a position that is not drafted is not one that fails."""
    running = RunningSurvival(3)
    for _ in range(200):
        running.step(row(0.9, 0.5, 0.2))
    for _ in range(10):
        running.step(row(0.9, np.nan, np.nan))
    np.testing.assert_allclose(running.mean, [0.9, 0.5, 0.2], atol=0.02)
    assert running.age.tolist() == [0, 10, 10]


def test_what_lies_behind_follows_what_gets_that_far() -> None:
    """Other text, of which the first position alone is seen, is drafted better, then not at all,
    then better again. Catches memory of whole prefixes, which keeps a shallow depth shallow."""
    running = RunningSurvival(3)
    for _ in range(400):
        running.step(row(0.5, 0.2, 0.1))
    for first in (0.9, 0.0, 0.9):
        for _ in range(400):
            running.step(row(first, np.nan, np.nan))
        np.testing.assert_allclose(running.mean, first * np.array([1, 0.4, 0.2]), atol=0.01)
        assert (np.diff(running.mean) <= 0).all()


def test_no_mean_is_above_one() -> None:
    """The second position is seen of the better request alone, so it looks better than the first
    one, which then gets better. Catches a share above 1 of what gets that far."""
    running = RunningSurvival(2)
    for _ in range(300):
        running.step(np.array([[0.9, 0.9], [0.1, np.nan]]))
    assert running.mean[1] > running.mean[0]
    for _ in range(300):
        running.step(row(0.9, np.nan))
    assert (running.mean <= 1).all()


@pytest.mark.parametrize("requests", [1, 16, 256])
def test_what_is_seen_after_long_counts_for_more(requests: int) -> None:
    """A probe of 32 drafts after 256 steps outweighs all that was known. Catches forgetting by
    observations, which drowns a probe of a deep position in its past."""
    running = RunningSurvival(2)
    for _ in range(500):
        running.step(np.tile([0.9, 0.05], (requests, 1)))
    for _ in range(256):
        running.step(np.tile([0.9, np.nan], (requests, 1)))
    for _ in range(max(32 // requests, 1)):
        running.step(np.tile([0.9, 0.8], (requests, 1)))
    assert running.mean[1] > 0.6
    assert running.mean[0] == pytest.approx(0.9)


def test_follows_a_change_of_text() -> None:
    """Within two time constants most of the way, however many requests told of the past."""
    running = RunningSurvival(1)
    for _ in range(1000):
        running.step(np.full((64, 1), 0.9))
    for _ in range(int(2 * STEPS)):
        running.step(np.full((1, 1), 0.3))
    assert running.mean[0] < 0.3 + 0.6 * np.exp(-1)


def test_never_seen_for_ages_stays_finite() -> None:
    running = RunningSurvival(1)
    for _ in range(60_000):
        running.step(np.empty((0, 1)))
    assert np.isfinite(running.mean).all()
    running.step(row(0.25))
    assert running.mean[0] == pytest.approx(0.25)


def test_several_steps_at_once() -> None:
    """As if the others of them had seen nothing: forgotten as much, and as old."""
    one, other = RunningSurvival(3), RunningSurvival(3)
    for number in range(30):
        seen = row(0.9, 0.6, np.nan if number > 5 else 0.2)
        for _ in range(7):
            one.step(NOTHING)
        one.step(seen)
        other.step(seen, steps=8)
    np.testing.assert_allclose(other.mean, one.mean, rtol=1e-12)
    assert other.age.tolist() == one.age.tolist() == [0, 0, 24 * 8]


def test_outcomes() -> None:
    """Accepted drafts survived, the first rejected one and all behind it did not, and those that
    were not verified say nothing."""
    found = outcomes([0, 2, 3, 0], [2, 3, 3, 0], 4)
    nan = np.nan
    expected = [[0, 0, nan, nan], [1, 1, 0, nan], [1, 1, 1, nan], [nan] * 4]
    np.testing.assert_array_equal(found, expected)
    assert outcomes([], [], 4).shape == (0, 4)


def test_gamma_is_checked() -> None:
    with pytest.raises(ValueError, match="gamma"):
        RunningSurvival(0)
