"""The verification kernels compile for an H100 as they are launched at 8B shape, without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.child import ask, clean_environment

ROOT = Path(__file__).parent.parent
# Qwen3's vocabulary in bf16, 7 drafts; with `extra`, min-p and processed rows as well.
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

def verify(requests, extra, method, start=0):
    rows = requests * (gamma + 1)
    batch = Batch(
        logits=torch.empty(rows, vocab, dtype=torch.bfloat16),
        offsets=torch.zeros(start + requests + 1, dtype=torch.int32)[start:],
        tokens=torch.zeros(rows, dtype=torch.int32),
        positions=torch.zeros(rows, dtype=torch.int64),
        slots=torch.zeros(start + requests, dtype=torch.int32)[start:],
        temperature=torch.ones(requests),
        seeds=torch.zeros(requests, dtype=torch.int64),
        gamma=gamma,
        min_p=torch.zeros(requests) if extra else None,
        draft=drafts[KIND],
        processed=torch.empty(8, vocab) if extra else None,
        processed_row=torch.zeros(rows, dtype=torch.int32) if extra else None,
    )
    Verifier(requests, gamma, torch.device("cpu")).verify(batch, method)
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
    verify(64, extra, method)
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
    """What serving meets at first must not be compiled while requests wait."""
    script = (
        f"KIND = {kind!r}\n{SCRIPT}"
        + """
answer = []
for extra, method in ((False, "standard"), (True, "standard"), (True, "block")):
    watched = replace(Watched)
    for requests in (1, 2, 3, 4, 16, 17, 32):
        for start in (0, 1, 4):
            verify(requests, extra, method, start)
    answer += [(name, len(found.variants)) for name, found in watched.items()]
"""
    )
    found = ask(script, clean_environment(PYTHONPATH=str(ROOT)))
    assert sum(variants for _, variants in found) >= 12
    # With many rows its programs look what others found: one variant more.
    more = {name for name, variants in found if variants > 1}
    assert more <= {"verify_stats_kernel"}
    assert all(variants <= 2 for _, variants in found)
