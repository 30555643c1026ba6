"""Sweeps made by hand, for tests of their format and of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.results_format import Arm, Kind, Run, Spread, Sweep, SweepSettings

PROVENANCE: dict[str, Any] = {
    "command": "python -m benchmarks.sweep --out sweep.json",
    "versions": {"vllm": "0.33.0"},
    "gpu": "NVIDIA H200",
    "commit": "abc1234",
    "date": "2025-11-20",
}


def run(
    concurrency: int, rate: float, per_user: float | None = None, repeat: int = 0, **more: Any
) -> Run:
    """A run of `rate` tok/s; tok/s/user is rate / concurrency unless given."""
    per_user = rate / concurrency if per_user is None else per_user
    time_ms = Spread(mean=1000 / per_user, p50=900 / per_user, p99=3000 / per_user)
    values: dict[str, Any] = {
        "concurrency": concurrency,
        "temperature": 1.0,
        "repeat": repeat,
        "prompts": 6 * concurrency,
        "output_tokens": round(10 * rate),
        "seconds": 10.0,
        "tokens_per_second": rate,
        "tokens_per_second_per_user": per_user,
        "time_per_output_token_ms": time_ms,
        "time_to_first_token_ms": Spread(mean=50.0, p50=40.0, p99=90.0),
        "date": "2025-11-20",
    }
    return Run(**values | more)


def arm(kind: Kind, gamma: int | None, *runs: Run, **more: Any) -> Arm:
    """An arm with these runs."""
    options: dict[str, Any] = {"num_speculative_tokens": gamma}
    values: dict[str, Any] = {"options": options, "provenance": PROVENANCE, "runs": list(runs)}
    return Arm(kind=kind, gamma=gamma, **values | more)


def sweep(arms: Mapping[str, Arm], **settings: Any) -> Sweep:
    """A sweep of these arms; `settings` replace single ones."""
    values: dict[str, Any] = {
        "mode": "offline",
        "target": "Qwen/Qwen3-8B",
        "drafter": None,
        "dataset": "gsm8k",
        "dataset_digest": "0" * 64,
        "prompts_per_slot": 6,
        "min_prompts": 6,
        "max_tokens": 256,
        "max_model_len": 2048,
        "max_num_seqs": 256,
        "dtype": "bfloat16",
        "drafting": "probabilistic",
        "seed": 0,
    }
    return Sweep(
        version=1,
        settings=SweepSettings(**values | settings),
        provenance=dict(PROVENANCE),
        arms=dict(arms),
    )


def tiny() -> Sweep:
    """Five arms at concurrency 1 and 4, complete, with ratios that a person can check."""

    def two(kind: Kind, gamma: int | None, alone: float, together: float) -> Arm:
        known: dict[str, Any] = {}
        if gamma is not None:
            known = {"accepted_length": 2.5, "verified_per_request": 3.25}
        return arm(kind, gamma, run(1, alone, **known), run(4, together, **known))

    return sweep(
        {
            "no speculation": two("none", None, 100, 400),
            "fixed 1": two("fixed", 1, 150, 450),
            "vllm-dspark": two("ours", 7, 330, 500),
            "fixed 7": two("fixed", 7, 300, 420),
            "built-in adaptive": two("built-in adaptive", 7, 280, 360),
        }
    )
