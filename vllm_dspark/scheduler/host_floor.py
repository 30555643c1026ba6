"""The least time of a step that drafts: launching one keeps the host busy, however fast the device.

A step takes whatever is longer, the device's time D or the floor

    H = fixed · (1 + each · requests)   ms,

of which nothing is profiled. A Kalman filter on log(measured / H) learns log fixed and log each.

* A measured time does not say which of D and H it is. The likelier is taken: either D explains it
  and H lies below, or H explains it and D lies below.
* A time that is D's still says that H is no longer: what was thought possible above is cut off.
* Times are too long by chance, never too short. So one below the floor refutes it at once, and a
  few in a row far above it must agree, of which the shortest counts.
* Doubt returns, sooner while nothing is drafted.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from vllm_dspark.scheduler.gate import REGIME_STEPS, SPREADS, Gate

# Of the smallest step that drafts on the device: a floor that nobody has seen yet changes little.
GUESS = 0.7
EACH, EACH_LEAST, EACH_MOST = 1 / 300, 1e-5, 0.1
LEVEL_DOUBT, EACH_DOUBT = 1.0, 0.7  # standard deviations of both before anything is seen
AGREE = 3  # times that raise a floor in doubt
LIKELIER = 3.0  # times, than the device, that the floor has to be to explain a time
RETURN_STEPS, UNSEEN_STEPS = 20000.0, 5000.0  # time constants of the return of doubt
Longer = Literal["device", "floor"]
_FULL = (LEVEL_DOUBT**2, 0.0, EACH_DOUBT**2)


class HostFloor:
    """The floor, and what was learned of it.

    Args:
        smallest_ms: what the smallest step that drafts takes on the device.

    Attributes:
        regimes: how often the floor was raised or refuted.
    """

    def __init__(self, smallest_ms: float) -> None:
        self._level, self._each = math.log(max(GUESS * smallest_ms, 1e-12)), math.log(EACH)
        self._doubt = _FULL  # variance, covariance, variance
        self._seen = False
        self._gate = Gate(min)
        self._refuted = 0
        self._move(0.0, 0.0)

    @property
    def regimes(self) -> int:
        return self._gate.regimes + self._refuted

    def ms(self, requests: Any) -> Any:
        """ms, float64 like `requests`, which are an array of ints or one."""
        return self._fixed_ms + self._each_ms * requests

    def doubt(self, requests: Any) -> Any:
        """Standard deviation of the logarithm of `ms`, whose argument this is."""
        share = 1 - self._fixed_ms / self.ms(requests)
        level, between, each = self._doubt
        return (level + 2 * share * between + share * share * each) ** 0.5

    def forget(self) -> None:
        """Times changed: it may be anything again."""
        self._doubt, self._seen = _FULL, False

    def rest(self, steps: int = 1) -> None:
        """A step did not draft, or several."""
        self._doubt = _toward_full(self._doubt, UNSEEN_STEPS / steps)

    def observe(
        self, requests: int, measured_ms: float, device_log: float, device_spread: float
    ) -> Longer | None:
        """Learn from a step that drafts.

        Args:
            requests: of the step.
            measured_ms: what it took.
            device_log: log(measured / predicted) of the device's time.
            device_spread: standard deviation of that, noise of the clock included.

        Returns:
            What it took as long as; None is neither, so far.
        """
        log_ratio = math.log(measured_ms / self.ms(requests))
        doubt, noise = self.doubt(requests), self._gate.noise
        if log_ratio < -SPREADS * math.hypot(doubt, noise):
            self.forget()
            self._refuted += 1
            doubt = self.doubt(requests)
        spread = math.hypot(doubt, noise)
        longer = _longer(device_log / device_spread, device_spread, log_ratio / spread, spread)
        if longer == "device":
            self._gate.clear(None)
            if log_ratio < -spread:  # the floor is longer than that, and not needed
                self.forget()
                doubt = self.doubt(requests)
                spread = math.hypot(doubt, noise)
            self._cut_off(requests, log_ratio / spread, doubt * doubt / spread)
            return longer
        explained = doubt * doubt if self._seen else 0.0
        steps = AGREE if longer else REGIME_STEPS
        verdict = self._gate.judge(log_ratio, explained, None, steps=steps)
        if verdict is None:
            return None
        if verdict.anew:
            self.forget()
        self._seen = True
        variance, noise = self.doubt(requests) ** 2, self._gate.noise
        gain = variance / (variance + noise * noise)
        self._update(requests, gain * verdict.log_ratio, gain * variance)
        return "floor"

    def _cut_off(self, requests: int, place: float, gain: float) -> None:
        """The floor lies below a measured time, `place` spreads above its mean."""
        if place > SPREADS:
            return  # no news
        place = max(place, -SPREADS)
        # Mean and variance of a normal variable that is cut off.
        rest = math.exp(-0.5 * place * place) / math.sqrt(2 * math.pi) / _below(place)
        self._update(requests, -gain * rest, gain * gain * rest * (rest + place))

    def _update(self, requests: int, change: float, certainty: float) -> None:
        """The logarithm of the floor of so many requests is off by `change`, and its variance
        smaller by `certainty`: regression of both parts on it."""
        share = 1 - self._fixed_ms / self.ms(requests)
        level, between, each = self._doubt
        variance = self.doubt(requests) ** 2
        of_level = (level + share * between) / variance
        of_each = (between + share * each) / variance
        self._move(of_level * change, of_each * change)
        kept = (
            level - of_level * of_level * certainty,
            between - of_level * of_each * certainty,
            each - of_each * of_each * certainty,
        )
        self._doubt = _toward_full(kept, RETURN_STEPS)

    def _move(self, level: float, each: float) -> None:
        self._level += level
        self._each = min(max(self._each + each, math.log(EACH_LEAST)), math.log(EACH_MOST))
        self._fixed_ms = math.exp(self._level)
        self._each_ms = self._fixed_ms * math.exp(self._each)


def _longer(device: float, device_spread: float, floor: float, spread: float) -> Longer | None:
    """Which of both was measured; of each log(measured / predicted), in standard deviations, and
    those. None if neither explains it; what is shorter than the device is no floor's."""
    device_fits = abs(device) <= SPREADS and floor >= -SPREADS
    floor_fits = abs(floor) <= SPREADS and device >= -SPREADS
    if device_fits and floor_fits:
        of_device = math.exp(-0.5 * device * device) / device_spread * _below(floor)
        of_floor = math.exp(-0.5 * floor * floor) / spread * _below(device)
        return "floor" if of_floor > LIKELIER * of_device else "device"
    if floor_fits:
        return "floor"
    return "device" if device_fits or device < 0 else None


def _toward_full(doubt: tuple[float, float, float], steps: float) -> tuple[float, float, float]:
    level, between, each = doubt
    full_level, full_between, full_each = _FULL
    return (
        level + (full_level - level) / steps,
        between + (full_between - between) / steps,
        each + (full_each - each) / steps,
    )


def _below(place: float) -> float:
    """Probability that a standard normal variable lies below `place`."""
    return 0.5 * math.erfc(-place / math.sqrt(2))
