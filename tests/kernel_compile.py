"""Compiling our drafting kernels for an H100 ahead of time, on any machine.

Run in a process without the interpreter. What a launcher passes decides how a kernel is compiled,
so the launchers run as they are, on CPU tensors of the real dtypes and sizes, with a `Recorder` in
the place of each kernel. The tensors are never read, so they take no memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from vllm_dspark.heads import ConfidenceHead, build_markov_head
from vllm_dspark.kernels import candidate_walk, candidates, confidence, dense_pick, dense_scores
from vllm_dspark.kernels.candidate import CandidateDrafter
from vllm_dspark.kernels.dense import DenseDrafter
from vllm_dspark.kernels.draws import Draws
from vllm_dspark.kernels.head_weights import ConfidenceWeights, HeadWeights

Found = dict[str, dict[str, int]]  # kernel → what it takes of the device
HOPPER = GPUTarget("cuda", 90, 32)
_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int32: "i32", torch.int64: "i64", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages")


class Recorder:
    """Stands for a kernel: compiles it for what it is launched with instead of running it."""

    def __init__(self, kernel: Any, found: Found) -> None:
        self.kernel, self.found, self.label = kernel, found, ""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(0 < size < 1 << 31 for size in grid)
        assert all(size < 1 << 16 for size in grid[1:])
        return self

    def __call__(self, *args: Any, **named: Any) -> None:
        options = {name: named.pop(name) for name in _OPTIONS if name in named}
        values = dict(zip(self.kernel.arg_names, args, strict=False)) | named
        assert values.keys() == set(self.kernel.arg_names)
        static = {p.name for p in self.kernel.params if p.is_constexpr}
        signature, constants, attrs = {}, {}, {}
        for place, name in enumerate(self.kernel.arg_names):
            value = values[name]
            if name in static or value is None:
                signature[name], constants[name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + _TYPES[value.dtype]
                aligned = value.data_ptr() % 16 == 0
            else:
                signature[name] = "i32" if abs(value) < 1 << 31 else "i64"
                aligned = value % 16 == 0
            if aligned and not self.kernel.params[place].do_not_specialize:
                attrs[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attrs)
        compiled = triton.compile(source, target=HOPPER, options=options)
        usage = resources(compiled.asm["cubin"])
        usage["shared"] = compiled.metadata.shared
        usage["threads"] = 32 * compiled.metadata.num_warps
        usage["matrix"] = int("wgmma" in compiled.asm["ptx"] or "mma.sync" in compiled.asm["ptx"])
        name = f"{self.label} {self.kernel.__name__}"
        while name in self.found:
            name += "'"
        self.found[name] = usage


class Watched:
    """Stands for a kernel: notes what Triton tells its launches apart by, and runs nothing."""

    def __init__(self, kernel: Any) -> None:
        backend = make_backend(HOPPER)
        self._bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        self.variants: set[str] = set()

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **named: Any) -> None:
            _, specialization, options = self._bind(*args, **named)
            self.variants.add(str((specialization, sorted(options.items()))))

        return launch


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of stack a thread, which is where spilled registers go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert found is not None, done.stdout
    return {"registers": int(found[1]), "stack": int(found[2])}


def compile_blocks(
    kind: str, rows: int, dtype: str, vocab: int, rank: int, counts: list[int], depth: int = 2
) -> Found:
    """Compile every kernel of a block of `rows` requests: greedy, drawn with a cache, from
    `counts` candidates, and its confidences. Hidden states are 4,096 wide."""
    found: Found = {}
    recorders = []
    for module in (candidate_walk, candidates, confidence, dense_pick, dense_scores):
        for name in [n for n in dir(module) if n.endswith("_kernel")]:
            recorders.append(Recorder(getattr(module, name), found))
            setattr(module, name, recorders[-1])

    def label(text: str) -> None:
        for recorder in recorders:
            recorder.label = text

    torch.set_default_dtype(getattr(torch, dtype))
    width = 4096
    sizes = {"vocab_size": vocab, "draft_vocab_size": vocab, "rank": rank, "hidden_size": width}
    with torch.device("meta"):
        made = build_markov_head(kind, **sizes)
    head = HeadWeights.of(made.to_empty(device="cpu").requires_grad_(False))
    base, hidden = torch.empty(rows, depth, vocab), torch.zeros(rows, depth, width)
    anchors = torch.zeros(rows, dtype=torch.int32)
    tokens, slots, positions = torch.zeros(3, rows, depth, dtype=torch.int64)
    heat = torch.ones(rows, dtype=torch.float32)
    seeds, top_k = tokens[:, 0].contiguous(), anchors + 1
    chosen = Draws(slots, positions, heat, seeds, True, top_k, heat.clone())
    label("greedy")
    DenseDrafter(head, rows).draw(base, hidden, anchors, tokens)
    label("drawn")
    DenseDrafter(head, rows).draw(base, hidden, anchors, tokens, chosen, base)
    if head.w1.dtype != torch.float32:
        label("drawn, in FP8")
        small = replace(head, w2=head.w2.to(torch.float8_e4m3fn), w2_scale=heat.new_ones(vocab))
        DenseDrafter(small, rows).draw(base, hidden, anchors, tokens, chosen, base)
    for count in counts:
        label(f"K={count}")
        drafter = CandidateDrafter(head, rows, depth, count, base.dtype)
        ids = torch.zeros(rows, depth, count, dtype=torch.int32)
        drafter.draw(base, hidden, anchors, tokens, chosen, ids, ids.float())
    weights = ConfidenceWeights.of(
        ConfidenceHead(hidden_size=width, rank=rank, with_markov=True), depth,
        torch.ones(depth, dtype=torch.float32),
    )  # fmt: skip
    label("")
    out = torch.empty(rows, depth, dtype=torch.float32)
    confidence.confidence(hidden, head.w1, weights, anchors, tokens, out)
    return found
