"""What the load-aware decision costs the host: `choose_budget`, then `allocate`.

    python -m benchmarks.scheduler --out FILE.json

Medians over repeated calls on random survival, at several numbers of requests R. Half of the
sizes have all γ drafts, half have between 0 and γ. The step cost is a line with a stair every
64 drafts, tuned so that the chosen budget lies inside of the range.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.errors import plain_errors
from benchmarks.options import numbers
from benchmarks.provenance import provenance
from benchmarks.records import save_record
from vllm_dspark.scheduler.budget import allocate, choose_budget
from vllm_dspark.scheduler.survival import prefix_survival

app = typer.Typer(help=__doc__)


def measure(requests: int, gamma: int, ragged: bool, repeats: int, seed: int) -> dict[str, Any]:
    """Median µs of each function, and of the two in turn, at one size."""
    random = np.random.default_rng(seed)
    survival = prefix_survival(random.beta(5, 2, (requests, gamma)))
    lengths = np.full(requests, gamma)
    if ragged:
        lengths = random.integers(0, gamma + 1, requests)
    drafts = np.arange(lengths.sum() + 1)
    step_ms = 5 * (1 + 0.3 * drafts / requests) + 0.05 * (drafts // 64)
    budget = choose_budget(survival, lengths, step_ms, requests)
    return {
        "requests": requests,
        "gamma": gamma,
        "drafts": int(lengths.sum()),
        "budget": budget,
        "choose_us": _median_us(
            lambda: choose_budget(survival, lengths, step_ms, requests), repeats
        ),
        "allocate_us": _median_us(lambda: allocate(survival, lengths, budget), repeats),
        "together_us": _median_us(
            lambda: allocate(
                survival, lengths, choose_budget(survival, lengths, step_ms, requests)
            ),
            repeats,
        ),
    }


def _median_us(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + repeats // 10):
        started = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - started) / 1000)
    return statistics.median(times[repeats // 10 :])  # the first tenth warms up


@app.command()
@plain_errors
def main(
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
    requests: Annotated[str, typer.Option(help="Requests in a step.")] = "1,16,64,256,512",
    gamma: Annotated[int, typer.Option(help="Drafts a round.")] = 7,
    repeats: Annotated[int, typer.Option(help="Timed calls of each.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the survival.")] = 0,
) -> None:
    """Time every size, print a table, and write JSON if asked to."""
    sizes = numbers("--requests", requests, int, 1)
    runs = [
        measure(size, gamma, ragged, repeats, seed) for ragged in (False, True) for size in sizes
    ]
    Console().print(_table(runs))
    if out is not None:
        settings = {"gamma": gamma, "repeats": repeats, "seed": seed}
        result = {"settings": settings, "runs": runs, "provenance": provenance()}
        save_record(out, result)


def _table(runs: list[dict[str, Any]]) -> Table:
    table = Table("requests", "drafts", "budget", "choose µs", "allocate µs", "together µs")
    for run in runs:
        table.add_row(
            *(str(run[key]) for key in ("requests", "drafts", "budget")),
            *(f"{run[key]:.0f}" for key in ("choose_us", "allocate_us", "together_us")),
        )
    return table


if __name__ == "__main__":
    app()
