"""Drawing a block of drafts on a GPU, from base logits to tokens and confidences: our kernels
against vLLM's own loop.

    python -m benchmarks.kernels_draft --out FOLDER

Every arm gets the same base logits, hidden states and weights, random and of Qwen3-8B's sizes, is
captured in a CUDA graph and replayed; times are medians. vLLM's arm is the loop of the installed
version, `DSparkSpeculator._sample_sequential`, with the LM head's product taken out, which all arms
share. The floor is the time that the bytes of `benchmarks.draft_traffic` take at the bandwidth of a
large copy, measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import typer

from benchmarks.draft_traffic import Shape, built_in_bytes, candidate_bytes, dense_bytes
from benchmarks.errors import plain_errors
from benchmarks.options import numbers
from benchmarks.provenance import provenance
from benchmarks.records import write_record
from benchmarks.sequential import graph_ms
from benchmarks.tables import markdown
from vllm_dspark.heads import ConfidenceHead, build_markov_head
from vllm_dspark.kernels.candidate import CandidateDrafter
from vllm_dspark.kernels.confidence import confidence
from vllm_dspark.kernels.dense import DenseDrafter
from vllm_dspark.kernels.draws import Draws
from vllm_dspark.kernels.head_weights import ConfidenceWeights, HeadWeights

WIDTH = 4096  # of Qwen3-8B's hidden states

app = typer.Typer(help=__doc__)


class Inputs:
    """What every arm draws from, on one device, and the buffers it draws into."""

    def __init__(self, shape: Shape, device: str) -> None:
        torch.manual_seed(0)
        dtype = {2: torch.bfloat16, 4: torch.float32}[shape.itemsize]
        rows, gamma, vocab = shape.requests, shape.gamma, shape.vocab
        with torch.device(device):
            sizes = {"rank": shape.rank, "hidden_size": WIDTH}
            head = build_markov_head("vanilla", vocab_size=vocab, draft_vocab_size=vocab, **sizes)
            self.head = head.to(dtype).requires_grad_(False)
            judge = ConfidenceHead(hidden_size=WIDTH, rank=shape.rank, with_markov=True)
            self.confidence_head = judge.requires_grad_(False)  # float32, as vLLM keeps it
            self.base = torch.randn(rows, gamma, vocab, dtype=dtype)
            self.hidden = torch.randn(rows, gamma, WIDTH, dtype=dtype)
            self.anchors = torch.randint(vocab, (rows,), dtype=torch.int32)
            self.slots = torch.arange(rows)[:, None].repeat(1, gamma)
            self.positions = torch.arange(gamma).repeat(rows, 1) + 100
            self.temperature, self.seeds = torch.ones(rows), torch.arange(rows)
            self.tokens = torch.zeros(rows, gamma, dtype=torch.int64)
            self.confidences = torch.zeros(rows, gamma)
            self.cache = torch.zeros(rows, gamma, vocab, dtype=dtype) if shape.drawn else None
        self.shape = shape


def built_in(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """vLLM's loop on these inputs."""
    from vllm.v1.worker.gpu.spec_decode.dspark.speculator import DSparkSpeculator

    shape, head, judge = inputs.shape, inputs.head, inputs.confidence_head
    flat = inputs.base.flatten(0, 1)
    speculator: Any = object.__new__(DSparkSpeculator)
    speculator.__dict__.update(
        model=SimpleNamespace(
            compute_draft_logits=lambda hidden: flat,
            map_draft_to_target=lambda ids: ids,
            markov_embed=head.embed,
            markov_bias=head.bias,
            compute_confidence=lambda hidden, embed: torch.sigmoid(
                judge(hidden.float(), embed.float())
            ),
        ),
        num_speculative_steps=shape.gamma,
        sample_indices=torch.arange(len(flat), device=flat.device),
        sample_idx_mapping=inputs.slots.flatten(),
        sample_pos=inputs.positions.flatten(),
        input_buffers=SimpleNamespace(input_ids=inputs.anchors),
        _anchor_idx=torch.arange(shape.requests, device=flat.device),
        _step_cols=torch.arange(shape.gamma, dtype=torch.int32, device=flat.device),
        draft_tokens=inputs.tokens,
        draft_token_confidence_probs=inputs.confidences,
        draft_logits=inputs.cache,
        temperature=inputs.temperature,
        seeds=inputs.seeds,
        use_confidence_head=True,
        use_fp64_gumbel=False,
        acceptance_estimator=None,
        draft_watermarker=None,
        _d2t_scatter_index=None,
        _draft_topk=None,
    )
    hidden = inputs.hidden.flatten(0, 1)

    def draw() -> torch.Tensor:
        speculator._sample_sequential(shape.requests, hidden)
        return inputs.tokens

    return draw


def ours(inputs: Inputs, candidates: int | None) -> Callable[[], torch.Tensor]:
    """Our kernels on these inputs: candidate mode with that K, or dense."""
    from vllm.v1.worker.gpu.sample import gumbel

    shape, device = inputs.shape, inputs.base.device
    weights = HeadWeights.of(inputs.head)
    judge = ConfidenceWeights.of(inputs.confidence_head, shape.gamma)
    draws = None
    if shape.drawn:
        by_step = hasattr(gumbel, "spec_step_seed")
        draws = Draws(inputs.slots, inputs.positions, inputs.temperature, inputs.seeds, by_step)
    block = (inputs.base, inputs.hidden, inputs.anchors, inputs.tokens, draws)
    if candidates is None:
        dense = DenseDrafter(weights, shape.requests)
    else:
        few = CandidateDrafter(weights, shape.requests, shape.gamma, candidates, inputs.base.dtype)
        size = (shape.requests, shape.gamma, candidates)
        ids = torch.zeros(size, dtype=torch.int32, device=device) if shape.drawn else None
        logprobs = torch.zeros(size, device=device) if shape.drawn else None

    def draw() -> torch.Tensor:
        if candidates is None:
            dense.draw(*block, inputs.cache)
        else:
            few.draw(*block, ids, logprobs)
        confidence(
            inputs.hidden, weights.w1, judge, inputs.anchors, inputs.tokens, inputs.confidences
        )
        return inputs.tokens

    return draw


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 2 GiB."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (graph_ms(lambda: target.copy_(source)) * 1e-3)


def row(
    arm: str, shape: Shape, moved: int, milliseconds: float, bandwidth: float
) -> dict[str, Any]:
    """One measurement with what the bandwidth alone would allow."""
    floor = moved / bandwidth * 1e3
    return {
        "arm": arm, "requests": shape.requests, "gamma": shape.gamma, "drawn": shape.drawn,
        "ms": milliseconds, "bytes": moved, "floor_ms": floor,
        "share_of_floor": floor / milliseconds,
    }  # fmt: skip


def measure(shape: Shape, candidates: Sequence[int], bandwidth: float) -> list[dict[str, Any]]:
    """All arms at one shape, on the GPU. `same_tokens` is the share of dense drafts that are
    vLLM's: not all, since vLLM rounds the bias and the sum to bf16 and the kernels do not."""
    inputs = Inputs(shape, "cuda")
    theirs = built_in(inputs)
    rows = [row("built-in", shape, built_in_bytes(shape), graph_ms(theirs), bandwidth)]
    expected = theirs().clone()
    dense = ours(inputs, None)
    rows.append(row("dense", shape, dense_bytes(shape), graph_ms(dense), bandwidth))
    rows[-1]["same_tokens"] = (dense() == expected).float().mean().item()
    for count in candidates:
        few, moved = ours(inputs, count), candidate_bytes(shape, count)
        rows.append(row(f"candidates {count}", shape, moved, graph_ms(few), bandwidth))
    return rows


@app.command()
@plain_errors
def main(
    out: Annotated[Path, typer.Option(help="Folder for draft.json and draft.md.")],
    requests: Annotated[str, typer.Option(help="R, comma-separated.")] = "1,8,64,256",
    gammas: Annotated[str, typer.Option(help="γ, comma-separated.")] = "5,7,15",
    candidates: Annotated[str, typer.Option(help="K of candidate mode, likewise.")] = "64,256",
) -> None:
    """Every arm at every R and γ, greedy and drawn."""
    sizes = numbers("--candidates", candidates, int, 1)
    blocks = numbers("--gammas", gammas, int, 1)
    counts = numbers("--requests", requests, int, 1)
    if not torch.cuda.is_available():
        raise typer.BadParameter("this benchmark needs an NVIDIA GPU, and torch sees none")
    bandwidth, rows = copy_bandwidth(), []
    for drawn in (False, True):
        for gamma in blocks:
            for count in counts:
                rows += measure(Shape(count, gamma, drawn=drawn), sizes, bandwidth)
    record = {"provenance": provenance(), "bytes_per_second": bandwidth, "rows": rows}
    write_record(out, "draft", record, table(rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every shape's times side by side, with the factor against vLLM's loop."""
    shapes: dict[tuple[int, int, bool], dict[str, Mapping[str, Any]]] = {}
    for r in rows:
        shapes.setdefault((r["requests"], r["gamma"], r["drawn"]), {})[r["arm"]] = r
    arms = list(next(iter(shapes.values())))
    lines = []
    for (requests, gamma, drawn), found in shapes.items():
        cells = [str(requests), str(gamma), "drawn" if drawn else "greedy"]
        for arm in arms:
            cells.append(f"{found[arm]['ms']:.3f}")
            if arm != arms[0]:
                cells.append(f"{found[arms[0]]['ms'] / found[arm]['ms']:.2f}")
                cells.append(f"{found[arm]['share_of_floor']:.0%}")
        lines.append(cells)
    header = ["R", "γ", "drafts", f"{arms[0]}, ms"]
    for arm in arms[1:]:
        header += [f"{arm}, ms", f"× {arms[0]}", "of the floor"]
    return markdown(header, lines, words=3) + "\n"


if __name__ == "__main__":
    app()
