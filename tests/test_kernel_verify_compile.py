"""The verification kernels compile for an H100 as they are launched at 8B shape, without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.child import ask, clean_environment

ROOT = Path(__file__).parent.parent
# Qwen3's vocabulary in bf16, 64 requests of 7 drafts, one by one; then by blocks, with min-p and
# processed rows as well.
SCRIPT = """
import torch
from tests.kernel_compile import Recorder
from vllm_dspark.kernels import (
    block_verify, residual, verify_accept, verify_min_p, verify_stats,
)
from vllm_dspark.kernels.verify import Verifier
from vllm_dspark.kernels.verify_batch import Batch, CompactDraft, DenseDraft

requests, gamma, vocab, candidates = 64, 7, 151_936, 64
rows = requests * (gamma + 1)
drafts = {
    "one-hot": None,
    "dense": DenseDraft(torch.empty(4, gamma, vocab, dtype=torch.bfloat16)),
    "compact": CompactDraft(
        torch.empty(4, gamma, candidates, dtype=torch.int32), torch.empty(4, gamma, candidates)
    ),
}
answer = {}
recorders = [
    (module, name, Recorder(getattr(module, name), answer))
    for module in (block_verify, residual, verify_accept, verify_min_p, verify_stats)
    for name in dir(module)
    if name.endswith("_kernel")
]
for module, name, recorder in recorders:
    setattr(module, name, recorder)
for extra, method in ((False, "standard"), (True, "block")):
    batch = Batch(
        logits=torch.empty(rows, vocab, dtype=torch.bfloat16),
        offsets=torch.zeros(requests + 1, dtype=torch.int32),
        tokens=torch.zeros(rows, dtype=torch.int32),
        positions=torch.zeros(rows, dtype=torch.int64),
        slots=torch.zeros(requests, dtype=torch.int32),
        temperature=torch.ones(requests),
        seeds=torch.zeros(requests, dtype=torch.int64),
        gamma=gamma,
        min_p=torch.zeros(requests) if extra else None,
        draft=drafts[KIND],
        processed=torch.empty(8, vocab) if extra else None,
        processed_row=torch.zeros(rows, dtype=torch.int32) if extra else None,
    )
    for _, _, recorder in recorders:
        recorder.label = f"{method}:"
    Verifier(requests, gamma, torch.device("cpu")).verify(batch, method)
"""


@pytest.mark.parametrize("kind", ["one-hot", "dense", "compact"])
def test_kernels_compile_for_a_gpu(kind: str, tmp_path: Path) -> None:
    """Catches what only the interpreter understands, and tiles that do not fit in registers. 64
    registers are what eight programs of 128 threads on a multiprocessor may have each."""
    environment = clean_environment(PYTHONPATH=str(ROOT), TRITON_CACHE_DIR=str(tmp_path))
    found: dict[str, dict[str, Any]] = ask(f"KIND = {kind!r}\n{SCRIPT}", environment)
    expected = {"verify_stats", "verify_min_p", "verify_accept", "residual", "residual_pick"}
    if kind == "dense":
        expected |= {"block_prefix", "block_overlap"}
    assert {name.split()[-1].rstrip("'") for name in found} == {f"{n}_kernel" for n in expected}
    for name, usage in found.items():
        assert usage["stack"] == 0, (name, usage)  # no spills
        assert usage["shared"] <= 8 << 10, (name, usage)
        assert usage["registers"] <= (80 if "overlap" in name else 64), (name, usage)
