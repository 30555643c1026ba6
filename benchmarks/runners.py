"""One arm, up and running, whichever way it is driven: what a pass gives."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from benchmarks.lengths import output_lengths
from benchmarks.results_format import Run, Spread, SweepSettings

_ROUNDS, _DRAFTED, _ACCEPTED = (
    f"vllm:spec_decode_num_{name}" for name in ("drafts", "draft_tokens", "accepted_tokens")
)
STEPS = "vllm_dspark_steps_total["  # of a depth


class Runner(Protocol):
    """A started arm."""

    memory_gib: float | None

    def wait(self) -> float:
        """Until it is ready; seconds since its start."""

    def run(self, concurrency: int, temperature: float, repeat: int) -> Run:
        """One closed-loop pass."""

    def stop(self) -> None:
        """End it, and everything it started."""


def spread(values: Sequence[float]) -> Spread:
    """Mean, median and 99th percentile of times in ms; zeros if there are none."""
    if not len(values):
        return Spread(mean=0.0, p50=0.0, p99=0.0)
    p50, p99 = np.percentile(values, [50, 99])
    return Spread(mean=statistics.fmean(values), p50=float(p50), p99=float(p99))


def speculation(counters: Mapping[str, float], output_tokens: int) -> dict[str, float | None]:
    """Fields of `Run` about drafts, from what the counters grew by in a pass.

    A step of a request emits its accepted drafts and one token, so a pass had `output_tokens` less
    the accepted ones of them; steps without drafts are among them.
    """
    rounds = counters.get(_ROUNDS, 0.0)
    if not rounds:
        return {}
    drafted, accepted = counters[_DRAFTED], counters[_ACCEPTED]
    steps = output_tokens - accepted
    verified = drafted
    if counters.get("rounds"):  # a manager trims, and was watched
        verified = counters["verified"]
    return {
        "accepted_length": 1 + accepted / rounds,
        "verified_per_request": verified / steps,
        "drafted_per_request": drafted / steps,
        "skipped_per_request": max(drafted - verified, 0.0) / steps,
    }


def steps_by_depth(counters: Mapping[str, float]) -> dict[str, float] | None:
    """Steps of a pass by draft depth, from what the counters grew by in it."""
    found = {
        name[len(STEPS) : -1]: steps
        for name, steps in counters.items()
        if name.startswith(STEPS) and steps
    }
    return found or None


def today() -> str:
    """Day in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def prompt_count(settings: SweepSettings, concurrency: int) -> int:
    """Prompts of a pass."""
    return max(settings.min_prompts, settings.prompts_per_slot * concurrency)


def output_lengths_of(settings: SweepSettings, count: int) -> list[int]:
    """Tokens that each of `count` prompts emits at most, and with `ignore_eos` exactly."""
    share = float(str(settings.extra.get("length_spread", 0.0)))
    return output_lengths(count, settings.max_tokens, share, settings.seed)
