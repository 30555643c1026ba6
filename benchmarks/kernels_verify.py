"""Verifying a step's drafts on a GPU, from target logits to tokens: our kernels against vLLM's own.

    python -m benchmarks.kernels_verify --out FILE.json

Both arms are the rejection sampler that a model runner would call, that of the installed vLLM and
ours, on the same random logits: a draft's distribution is the target's with noise, so that drafts
pass about as often as a trained drafter's, which the record states. Lengths are ragged
(`benchmarks.verify_traffic`). Regimes are temperatures 0, 1 and 0.7, all three mixed, and top-p for
every tenth request at temperature 1.

A time is the median of calls that are queued behind a busy device, so that the host's part does
not show; memory is what a call allocates at its peak. The floor is the time that the bytes which
must be read take at the bandwidth of a large copy, measured in the same run. Allocation of a step's
budget is timed likewise against the torch operations that the engine uses.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.kernels_draft import copy_bandwidth
from benchmarks.provenance import provenance
from benchmarks.verify_step import REGIMES, Step, sampling
from benchmarks.verify_traffic import Shape, floor_bytes

CALLS = 30

app = typer.Typer(help=__doc__)


def arms(step: Step) -> dict[str, Callable[[], Any]]:
    """Both samplers on one step; each call gives vLLM's `SamplerOutput`."""
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

    from vllm_dspark.integration.rejection import KernelRejectionSampler

    runner = step.runner()
    theirs = RejectionSampler(runner.sampler, runner.speculative_config, runner.device)
    ours = KernelRejectionSampler(runner)
    given = (step.logits, step.batch, step.draft_logits if step.shape.dense else None)
    return {"built-in": lambda: theirs(*given), "ours": lambda: ours(*given)}


def allocations(requests: int, gamma: int, device: str) -> dict[str, Callable[[], torch.Tensor]]:
    """Half of a step's drafts shared out: by the engine's torch operations, and in one launch. Each
    call gives the boundaries of the logits' rows."""
    from vllm_dspark.calibration.memory import LOGIT_LIMIT
    from vllm_dspark.calibration.online import MARGIN
    from vllm_dspark.integration.verification.allocation import admit, calibrated_survival
    from vllm_dspark.kernels.allocate import Calibration, allocate

    torch.manual_seed(0)
    with torch.device(device):
        confidence = torch.rand(requests, gamma)
        slope, intercept = torch.ones(2, gamma), torch.zeros(2, gamma)
        limits = torch.full((requests,), gamma, dtype=torch.int32)
        ends = torch.arange(1, requests + 1, dtype=torch.int32)
        offsets, queries = torch.zeros(2, requests + 1, dtype=torch.int32)
    budget = requests * gamma // 2
    maps = Calibration(slope, intercept, float(1 / (1 + np.exp(LOGIT_LIMIT))), MARGIN)

    def by_torch() -> torch.Tensor:
        survival = calibrated_survival(confidence, 1, slope, intercept)
        admitted = admit(survival, limits, budget).cumsum(0, dtype=torch.int32)
        torch.add(admitted, ends, out=offsets[1:])
        torch.add(admitted, ends, out=queries[1:])
        return offsets

    def at_once() -> torch.Tensor:
        allocate(confidence, maps, 1, budget, ends, offsets, queries, limits=limits)
        return offsets

    return {"torch": by_torch, "ours": at_once}


def queued_ms(call: Callable[[], Any]) -> float:
    """Median time of a call on the device, its launches queued while the device is busy."""
    times = []
    for i in range(CALLS + 3):
        torch.cuda._sleep(20_000_000)  # about 10 ms: longer than the host takes for a call
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        call()
        ended.record()
        torch.cuda.synchronize()
        if i >= 3:  # the first ones compile
            times.append(started.elapsed_time(ended))
    return statistics.median(times)


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most device memory that a call holds at a time, besides what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(shape: Shape, regime: str, bandwidth: float) -> list[dict[str, Any]]:
    """Both arms at one shape and regime, on the GPU."""
    step = Step(shape, regime, "cuda")
    calls, rows = arms(step), []
    expected = calls["built-in"]()
    accepted = (expected.num_sampled - 1).tolist()
    greedy = [sampling(regime, i)["temperature"] == 0 for i in range(shape.requests)]
    moved = floor_bytes(shape, accepted, step.lengths.tolist(), greedy)
    for arm, call in calls.items():
        found = call()
        same = (found.num_sampled == expected.num_sampled).float().mean().item()
        rows.append(
            {
                "arm": arm, "requests": shape.requests, "gamma": shape.gamma, "regime": regime,
                "drafts": "dense" if shape.dense else "one-hot", "rows": len(step.logits),
                "accepted": sum(accepted), "verified": int(step.lengths.sum()),
                "same_lengths": same, "peak_bytes": peak_bytes(call), "floor_bytes": moved,
            }
            | timed(queued_ms(call), moved, bandwidth)
        )  # fmt: skip
    return rows


def timed(milliseconds: float, moved: int, bandwidth: float) -> dict[str, float]:
    """A time with what the bandwidth alone would allow."""
    floor = moved / bandwidth * 1e3
    return {"ms": milliseconds, "floor_ms": floor, "share_of_floor": floor / milliseconds}


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="JSON to write.")],
    requests: Annotated[str, typer.Option(help="R, comma-separated.")] = "1,16,64,256",
    gamma: Annotated[int, typer.Option(help="Drafts of a block.")] = 7,
) -> None:
    """Every regime at every R, dense and one-hot; writes JSON, prints a table."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("this benchmark needs an NVIDIA GPU, and torch sees none")
    bandwidth, rows, shares = copy_bandwidth(), [], []
    for count in map(int, requests.split(",")):
        for dense in (True, False):
            for regime in REGIMES:
                rows += measure(Shape(count, gamma, dense=dense), regime, bandwidth)
        for arm, call in allocations(count, gamma, "cuda").items():
            shares.append({"arm": arm, "requests": count, "gamma": gamma, "ms": queued_ms(call)})
    record = {"provenance": provenance(), "bytes_per_second": bandwidth, "rows": rows}
    out.write_text(json.dumps(record | {"allocation": shares}, indent=1) + "\n")
    for shown in (table(rows), allocation_table(shares)):
        Console().print(shown)


def table(rows: list[dict[str, Any]]) -> Table:
    """Times side by side, with the factor against vLLM's at the same shape and regime."""
    shown = Table("R", "drafts", "regime", "arm", "ms", "× built-in", "share of floor", "peak MB")
    base = 1.0
    for row in rows:
        base = row["ms"] if row["arm"] == "built-in" else base
        cells = [str(row["requests"]), row["drafts"], row["regime"], row["arm"]]
        figures = [f"{row['ms']:.3f}", f"{base / row['ms']:.2f}", f"{row['share_of_floor']:.0%}"]
        shown.add_row(*cells, *figures, f"{row['peak_bytes'] / 1e6:.1f}")
    return shown


def allocation_table(shares: list[dict[str, Any]]) -> Table:
    """Times of allocation side by side."""
    shown, base = Table("R", "allocation by", "ms", "× torch"), 1.0
    for row in shares:
        base = row["ms"] if row["arm"] == "torch" else base
        figures = [f"{row['ms']:.4f}", f"{base / row['ms']:.2f}"]
        shown.add_row(str(row["requests"]), row["arm"], *figures)
    return shown


if __name__ == "__main__":
    app()
