"""Set-up of every test process, before anything imports triton or vllm."""

from __future__ import annotations

import os

import pytest
import torch

from vllm_dspark import cpu

HAS_GPU = torch.cuda.is_available()

# The engine runs in the test's own process: one start-up less, and failures show their origin.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
if not HAS_GPU:
    cpu.activate()
    # Each test process has one core's worth of work; more threads only fight.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with a reason, where there is no GPU."""
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and torch sees none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
