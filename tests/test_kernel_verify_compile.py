"""The verification kernels compile for an H100 as they are launched at 8B shape, without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.child import ask, clean_environment

ROOT = Path(__file__).parent.parent
# Qwen3's vocabulary in bf16, 7 drafts; with min-p and processed rows if asked.
SCRIPT = """
import torch
from tests.kernel_compile import Recorder, Watched
from vllm_dspark.kernels import (
    block_verify, residual, verify_accept, verify_min_p, verify_stats,
)
from vllm_dspark.kernels.verify import Verifier
from vllm_dspark.kernels.verify_batch import Batch, CompactDraft, DenseDraft

gamma, vocab, candidates = 7, 151_936, 64
drafts = {
    "one-hot": None,
    "dense": DenseDraft(torch.empty(4, gamma, vocab, dtype=torch.bfloat16)),
    "compact": CompactDraft(
        torch.empty(4, gamma, candidates, dtype=torch.int32), torch.empty(4, gamma, candidates)
    ),
}
kernels = [
    (module, name, getattr(module, name))
    for module in (block_verify, residual, verify_accept, verify_min_p, verify_stats)
    for name in dir(module)
    if name.endswith("_kernel")
]

def replace(stand_in):
    stand_ins = {name: stand_in(kernel) for _, name, kernel in kernels}
    for module, name, _ in kernels:
        setattr(module, name, stand_ins[name])
    return stand_ins

def batch_of(requests, min_p, processed, start=0, slots=64):
    rows = requests * (gamma + 1)
    return Batch(
        logits=torch.empty(rows, vocab, dtype=torch.bfloat16),
        offsets=torch.zeros(start + requests + 1, dtype=torch.int32)[start:],
        tokens=torch.zeros(rows, dtype=torch.int32),
        positions=torch.zeros(rows, dtype=torch.int64),
        slots=torch.zeros(start + requests, dtype=torch.int32)[start:],
        temperature=torch.ones(slots),
        seeds=torch.zeros(slots, dtype=torch.int64),
        gamma=gamma,
        min_p=torch.zeros(slots) if min_p else None,
        draft=drafts[KIND],
        processed=torch.empty(8, vocab) if processed else None,
        processed_row=torch.zeros(rows, dtype=torch.int32) if processed else None,
    )
"""


@pytest.mark.parametrize("kind", ["one-hot", "dense", "compact"])
def test_kernels_compile_for_a_gpu(kind: str, tmp_path: Path) -> None:
    """Catches what only the interpreter understands, and tiles that do not fit in registers. 64
    registers are what eight programs of 128 threads on a multiprocessor may have each."""
    environment = clean_environment(PYTHONPATH=str(ROOT), TRITON_CACHE_DIR=str(tmp_path))
    script = (
        f"KIND = {kind!r}\n{SCRIPT}"
        + """
answer = {}
recorders = replace(lambda kernel: Recorder(kernel, answer))
for extra, method in ((False, "standard"), (True, "block")):
    for recorder in recorders.values():
        recorder.label = f"{method}:"
    Verifier(64, gamma, torch.device("cpu")).verify(batch_of(64, extra, extra), method)
"""
    )
    found: dict[str, dict[str, Any]] = ask(script, environment)
    expected = {"verify_stats", "verify_min_p", "verify_accept", "residual", "residual_pick"}
    if kind == "dense":
        expected |= {"block_prefix", "block_overlap"}
    assert {name.split()[-1].rstrip("'") for name in found} == {f"{n}_kernel" for n in expected}
    for name, usage in found.items():
        assert usage["stack"] == 0, (name, usage)  # no spills
        assert usage["shared"] <= 8 << 10, (name, usage)
        assert usage["registers"] <= (80 if "overlap" in name else 64), (name, usage)


@pytest.mark.parametrize("kind", ["one-hot", "dense", "compact"])
def test_batches_of_any_size_need_no_other_variant(kind: str) -> None:
    """What serving meets at first must not be compiled while requests wait: batches of any size,
    of requests with min-p, with rows to process, with either or both. Nor is more compiled. An
    engine of 4 requests has no batch so large that rejected rows are skipped."""
    script = (
        f"KIND = {kind!r}\n{SCRIPT}"
        + """
from itertools import product
from vllm_dspark.integration.verify_kernels import verification_compiled

def variants():
    return {(name, variant) for name, found in watched.items() for variant in found.variants}

watched = replace(Watched)
answer = []
engines = ((4, (1, 2, 3, 4)), (64, (1, 2, 3, 4, 16, 17, 32)))
methods = ["standard"], ["block", "standard"][: 2 if KIND == "dense" else 1]
for methods, (slots, sizes) in product(methods, engines):
    verifier = Verifier(slots, gamma, torch.device("cpu"))
    for found in watched.values():
        found.variants.clear()
    with verification_compiled(verifier, methods):  # what vLLM's warm-up verifies first
        verifier.verify(batch_of(4, True, True, slots=slots), methods[0])
    compiled = variants()
    for found in watched.values():
        found.variants.clear()
    for min_p, processed in product((False, True), repeat=2):
        for requests, start in product(sizes, (0, 1, 4)):
            batch = batch_of(requests, min_p, processed, start, slots)
            for method in methods:
                verifier.verify(batch, method)
    served = variants()
    answer.append((len(compiled), sorted(served - compiled), sorted(compiled - served)))
"""
    )
    found = ask(script, clean_environment(PYTHONPATH=str(ROOT)))
    for _, missing, idle in found:
        assert missing == []
        assert idle == []
    # Four kernels, and one for sums with min-p. One by one and with many rows, programs look what
    # others found. Blocks of dense drafts have two kernels more, and steps that are all greedy are
    # verified one by one beside them.
    by_block = [30, 34] if kind == "dense" else [18, 18]
    assert [compiled for compiled, *_ in found] == [18, 22, *by_block]
