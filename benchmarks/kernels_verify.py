"""Verifying a step's drafts on a GPU, from target logits to tokens: our kernels against vLLM's own.

    python -m benchmarks.kernels_verify --out FOLDER

Both arms of the first table are the rejection sampler that a model runner would call, that of the
installed vLLM and ours, on the same random logits: a draft's distribution is the target's with
noise, so that drafts pass about as often as a trained drafter's, which the record states. Lengths
are ragged (`benchmarks.verify_traffic`). Regimes are temperatures 0, 1 and 0.7, all three mixed,
and top-p for every tenth request at temperature 1.

A time is the median of calls that are queued behind a busy device, so that the host's part does
not show; memory is what a call allocates at its peak. The floor is the time that the bytes which
must be read take at the bandwidth of a large copy, measured in the same run.

The second table shares half of a step's drafts out, on the same random confidences, timed likewise:
by `AdaptiveVerificationManager.reallocate_drafts` of the installed vLLM, by the torch operations of
our engine, and by our kernel in one launch. vLLM's includes its two copies int32 [R] from the host,
which it makes in every step; our engine copies only when the requests change, so ours has none.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.errors import plain_errors
from benchmarks.kernels_draft import copy_bandwidth
from benchmarks.options import numbers
from benchmarks.provenance import provenance
from benchmarks.records import write_record
from benchmarks.tables import markdown
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
    """Half of a step's drafts shared out: by vLLM's manager, by our engine's torch operations, and
    in one launch. Each call gives the boundaries of the logits' rows, int32 [R + 1].

    Calibration maps every confidence to itself, so that all rank by the same survival.
    """
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

    theirs = built_in_allocation(confidence, budget)
    return {"built-in": theirs, "torch": by_torch, "ours": at_once}


def built_in_allocation(confidence: torch.Tensor, budget: int) -> Callable[[], torch.Tensor]:
    """vLLM's own sequence on confidences float32 [R, γ], of requests with γ drafts and one other
    token each. Its manager has no more slots than there are requests, so that no tail is filled;
    the ranking is compiled in the first call."""
    from vllm.v1.worker.gpu.spec_decode.adaptive_verification import AdaptiveVerificationManager

    requests, gamma = confidence.shape
    ids = [str(i) for i in range(requests)]
    drafts, others = dict.fromkeys(ids, gamma), dict.fromkeys(ids, 1)
    with confidence.device:
        slots = torch.arange(requests)
        capacity, other_tokens = torch.zeros(2, requests, dtype=torch.int32)
        offsets, queries = torch.zeros(2, requests + 1, dtype=torch.int32)
    manager: Any = object.__new__(AdaptiveVerificationManager)
    manager.__dict__.update(
        num_speculative_steps=gamma,
        num_bonus_tokens=1,
        query_start_loc=queries,
        _confidence_probs=confidence,
        _batch_draft_capacity=capacity,
        _num_non_draft_tokens=other_tokens,
        _cu_num_logits=offsets,
        _copy_admitted_drafts_to_host=False,
    )

    def reallocate() -> torch.Tensor:
        manager._batch_budget = (drafts, others, budget)  # as `get_num_tokens` leaves it; used up
        boundaries: torch.Tensor = manager.reallocate_drafts(ids, slots)[0]
        return boundaries

    return reallocate


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
@plain_errors
def main(
    out: Annotated[Path, typer.Option(help="Folder for verify.json and verify.md.")],
    requests: Annotated[str, typer.Option(help="R, comma-separated.")] = "1,16,64,256",
    gamma: Annotated[int, typer.Option(help="Drafts of a block.")] = 7,
) -> None:
    """Every regime at every R, dense and one-hot; then allocation."""
    counts = numbers("--requests", requests, int, 1)
    if not torch.cuda.is_available():
        raise typer.BadParameter("this benchmark needs an NVIDIA GPU, and torch sees none")
    bandwidth, rows, shares = copy_bandwidth(), [], []
    for count in counts:
        for dense in (True, False):
            for regime in REGIMES:
                rows += measure(Shape(count, gamma, dense=dense), regime, bandwidth)
        for arm, call in allocations(count, gamma, "cuda").items():
            shares.append({"arm": arm, "requests": count, "gamma": gamma, "ms": queued_ms(call)})
    record = {"provenance": provenance(), "bytes_per_second": bandwidth, "rows": rows}
    record["allocation"] = shares
    write_record(out, "verify", record, f"{table(rows)}\n\n{allocation_table(shares)}\n")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Times and peak memory side by side, vLLM's first."""
    lines = []
    for theirs, own in zip(rows[::2], rows[1::2], strict=True):
        lines.append(
            [
                theirs["drafts"], theirs["regime"], str(theirs["requests"]),
                f"{theirs['ms']:.3f}", f"{own['ms']:.3f}", f"{theirs['ms'] / own['ms']:.2f}",
                f"{own['share_of_floor']:.0%}",
                *(f"{row['peak_bytes'] / 1e6:.1f}" for row in (theirs, own)),
            ]
        )  # fmt: skip
    header = ["drafts", "requests' regime", "R", "built-in, ms", "ours, ms", "× built-in"]
    header += ["of the floor", "built-in, MB at its peak", "ours, MB"]
    return markdown(header, lines, words=2)


def allocation_table(shares: Sequence[Mapping[str, Any]]) -> str:
    """Times of allocation side by side, vLLM's first."""
    lines = []
    for measured in zip(shares[::3], shares[1::3], shares[2::3], strict=True):
        theirs, _, own = measured
        times = [f"{1e3 * share['ms']:.1f}" for share in measured]
        lines.append([str(own["requests"]), *times, f"{theirs['ms'] / own['ms']:.2f}"])
    header = ["R", "allocation built in, µs", "by torch, µs", "in one launch, µs", "× built-in"]
    return markdown(header, lines)


if __name__ == "__main__":
    app()
