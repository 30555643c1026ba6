"""Which measured times are learned from."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_dspark.scheduler.gate import NOISE_FIRST, NOISE_LEAST, REGIME_STEPS, SPREADS, Gate


def test_what_noise_and_doubt_explain_is_learned_from() -> None:
    """Up to four standard deviations of both together; beyond, nothing."""
    for variance in (0.0, 0.1):
        limit = SPREADS * np.hypot(NOISE_FIRST, np.sqrt(variance))
        assert Gate().judge(0.99 * limit, variance, 1) == (0.99 * limit, False)
        assert Gate().judge(-1.01 * limit, variance, 1) is None


@pytest.mark.parametrize("steps", [3, REGIME_STEPS])
def test_refused_times_that_agree_are_a_new_regime(steps: int) -> None:
    """What stands for them is the median, or what was asked for; the count starts over."""
    for pick, expected in (({}, 2.0), ({"pick": min}, 1.5)):
        gate = Gate(**pick)
        ratios = [1.5, *[2.0] * (steps - 2), 2.5]
        verdicts = [gate.judge(ratio, 0.0, 1, steps=steps) for ratio in ratios]
        assert verdicts[:-1] == [None] * (steps - 1)
        assert verdicts[-1] == (expected, True)
        assert gate.regimes == 1
        assert gate.judge(2.0, 0.0, 1, steps=steps) is None


def test_times_that_fit_outweigh_refused_ones() -> None:
    """One for one, of all kinds or of one: every other time is refused for long, and no regime
    comes of it. A kind whose times are all refused is one, whatever the others do."""
    gate = Gate()
    for _ in range(100):
        assert gate.judge(0.0, 0.0, 1) is not None
        assert gate.judge(2.0, 0.0, 1) is None
    verdicts = []
    for _ in range(REGIME_STEPS):
        for _ in range(3):
            assert gate.judge(0.0, 0.0, 1) is not None
        verdicts.append(gate.judge(2.0, 0.0, 2))
    assert verdicts == [None] * (REGIME_STEPS - 1) + [(2.0, True)]


def test_doubtful_times_count_as_refused() -> None:
    gate = Gate()
    verdicts = [gate.judge(0.01, 0.0, 1, doubtful=True) for _ in range(REGIME_STEPS)]
    assert verdicts == [None] * (REGIME_STEPS - 1) + [(0.01, True)]


def test_cleared_times_count_no_more() -> None:
    gate = Gate()
    for kind in (1, 2):
        for _ in range(REGIME_STEPS - 1 - (kind - 1) * 5):
            assert gate.judge(2.0, 0.0, kind) is None
        gate.clear(kind)
    assert gate.judge(2.0, 0.0, 1) is None
    assert gate.regimes == 0


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_noise_is_learned_and_bounded(noise: float) -> None:
    """By the median: one time in fifty that is thrice as long does not show."""
    gate, random = Gate(), np.random.default_rng(0)
    seen = []
    for step in range(3000):
        gate.judge(random.normal(0, noise) + (np.log(3) if random.random() < 0.02 else 0), 0.0, 1)
        if step > 500:
            seen.append(gate.noise)
    assert np.mean(seen) == pytest.approx(noise, rel=0.2)
    for _ in range(500):
        gate.judge(0.0, 0.0, 1)
    assert gate.noise == NOISE_LEAST


def test_a_new_regime_may_have_other_noise() -> None:
    """Hardly any was left. Catches what was learned of it that is kept, so that the first times of
    the new one are refused."""
    gate = Gate()
    for _ in range(200):
        gate.judge(0.0, 0.0, 1)
    assert gate.noise == NOISE_LEAST
    for _ in range(REGIME_STEPS):
        gate.judge(2.0, 0.0, 1)
    assert gate.regimes == 1
    assert gate.noise == NOISE_FIRST
