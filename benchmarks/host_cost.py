"""What the plugin adds to the host's work of a step: scheduler and worker in one process.

    python -m benchmarks.host_cost --out FILE.json

Steady decode of R requests at γ drafts, once where all drafts are verified and once where they are
so dear that some are trimmed. No engine runs: vLLM's part is a stand-in, whose time is left out.
Each part has the time that was spent in it and in no other part. The total is measured in a run of
its own, without a clock around every part. Times are µs that one thread was on a core.

On a GPU the manager's tensors are there, and launching kernels counts; what they take does not.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.errors import plain_errors
from benchmarks.host_engine import ENGINE
from benchmarks.host_server import Server
from benchmarks.options import numbers
from benchmarks.provenance import provenance
from benchmarks.records import save_record
from benchmarks.spans import Spans

app = typer.Typer(help=__doc__)

WARM_UP = 200  # steps, after which all that is learned has settled


def measure(
    requests: int,
    gamma: int,
    trims: bool,
    device_mode: bool,
    device: str,
    steps: int,
    warm_up: int = WARM_UP,
) -> dict[str, Any]:
    """Time one load.

    Args:
        requests, gamma: R and γ.
        trims, device_mode, device: see `Server`.
        steps: that are timed, after `warm_up` others.

    Returns:
        "total_us" and "parts_us" (by part): [mean, p99] of a step. "verified" is the share of
        drafts that were.
    """
    totals, parts, share = Spans(), Spans(), 0.0
    for spans in (totals, parts):
        server = Server(
            requests, gamma, trims, device_mode, torch.device(device), spans, spans is parts
        )
        for _ in range(warm_up):
            server.step()
        spans.steps.clear()
        gc.collect()
        for _ in range(steps):
            server.step()
        counters = server.manager.counters
        share = counters.verified / counters.scheduled
    labels = sorted({label for step in parts.steps for label in step} - {ENGINE})
    return {
        "requests": requests,
        "trims": trims,
        "mode": server.manager.mode,
        "verified": share,
        "total_us": _mean_and_p99(
            [sum(us for label, us in step.items() if label != ENGINE) for step in totals.steps]
        ),
        "parts_us": {
            label: _mean_and_p99([step.get(label, 0.0) for step in parts.steps]) for label in labels
        },
    }


def _mean_and_p99(times: list[float]) -> list[float]:
    return [round(float(np.mean(times)), 2), round(float(np.percentile(times, 99)), 2)]


@app.command()
@plain_errors
def main(
    out: Annotated[Path | None, typer.Option(help="JSON to write.")] = None,
    requests: Annotated[str, typer.Option(help="Requests in a step.")] = "1,16,64,256",
    gamma: Annotated[int, typer.Option(help="Drafts a round.")] = 7,
    steps: Annotated[int, typer.Option(help="Timed steps of each load.")] = 600,
    warm_up: Annotated[int, typer.Option(help="Steps before those.")] = WARM_UP,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    mode: Annotated[str, typer.Option(help="host or device.")] = "host",
) -> None:
    """Time every load, print tables, and write JSON if asked to."""
    if mode not in ("host", "device"):
        raise typer.BadParameter(f"mode is host or device, got {mode!r}")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter(f"device is cpu, or cuda where torch sees a GPU, got {device!r}")
    sizes = numbers("--requests", requests, int, 1)
    torch.set_num_threads(1)
    runs = [
        measure(size, gamma, trims, mode == "device", device, steps, warm_up)
        for trims in (False, True)
        for size in sizes
    ]
    for trims in (False, True):
        Console().print(_table([run for run in runs if run["trims"] == trims], trims))
    if out is not None:
        settings = {"gamma": gamma, "steps": steps, "device": device, "mode": mode}
        result = {"settings": settings, "runs": runs, "provenance": provenance()}
        save_record(out, result)


def _table(runs: list[dict[str, Any]], trims: bool) -> Table:
    """Mean and p99 of each part, by number of requests."""
    title = "µs a step, mean / p99, " + ("trimmed" if trims else "all verified")
    table = Table("part", *(f"R = {run['requests']}" for run in runs), title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {label: None for run in runs for label in run["parts_us"]}
    for label in rows:
        cells = [run["parts_us"].get(label, [0.0, 0.0]) for run in runs]
        table.add_row(label, *(_cell(cell) for cell in cells))
    table.add_section()
    table.add_row("total", *(_cell(run["total_us"]) for run in runs))
    table.add_row("drafts verified", *(f"{run['verified']:.0%}" for run in runs))
    return table


def _cell(times: list[float]) -> str:
    return f"{times[0]:.0f} / {times[1]:.0f}"


if __name__ == "__main__":
    app()
