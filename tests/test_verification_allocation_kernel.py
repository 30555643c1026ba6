"""Allocation by our kernel against allocation by torch, as device mode calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.child import ask, clean_environment
from tests.kernel_cases import DEVICE
from tests.manager_driver import GAMMA, SLOTS, layout
from tests.test_verification_allocation import taught
from vllm_dspark.config import DSparkConfig
from vllm_dspark.integration.verification.allocation import (
    Allocation,
    Candidates,
    TorchAllocation,
)
from vllm_dspark.integration.verification.allocation_kernel import KernelAllocation, allocation_of
from vllm_dspark.kernels import allocate as module

NAN = float("nan")
SIZES = [(1, 1, 1), (1, 7, 1), (5, 3, 2), (37, 7, 1), (70, 15, 1)]
NOTHING = -7


class Computing(TorchDispatchMode):
    """Operations of torch's that are not views.

    Attributes:
        operations: their names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


class Launches:
    """In the place of a kernel.

    Attributes:
        grids: of its launches.
    """

    def __init__(self) -> None:
        self.grids: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **named: self.grids.append(grid)


def candidates(limits: np.ndarray, sampled: np.ndarray, others: np.ndarray) -> Candidates:
    """As device mode makes them: rows of one table."""
    host = np.stack([limits, np.cumsum(others), sampled]).astype(np.int32)
    regime = int(sampled[0]) if (sampled == sampled[0]).all() else None
    limits_there, others_ends, regimes = torch.from_numpy(host).to(DEVICE)
    return Candidates(int(limits.sum()), limits_there, others_ends, regimes, regime)


def makers(slots: int, gamma: int, bonus: int = 1) -> list[Allocation]:
    """Torch's, and the kernel's."""
    device = torch.device(DEVICE)
    return [TorchAllocation(slots, bonus, device), KernelAllocation(slots, gamma, bonus, device)]


def laid_out(allocation: Any, *arguments: Any) -> list[int]:
    """Offsets, then queries; nothing else is written."""
    count = len(arguments[2].limits)
    offsets, queries = torch.full((2, count + 2), NOTHING, dtype=torch.int32, device=DEVICE)
    offsets[0] = queries[0] = 0
    allocation(*arguments, offsets[: count + 1], queries[: count + 1])
    assert offsets[-1] == queries[-1] == NOTHING
    return [*offsets.tolist(), *queries.tolist()]


@pytest.mark.parametrize(("requests", "gamma", "bonus"), SIZES)
def test_the_same_layout(requests: int, gamma: int, bonus: int) -> None:
    """Any budget; greedy, sampled and both; limits of all kinds; confidences that tie, that are no
    probability, and that lie in order or somewhere in a table."""
    slots, random = requests + 3, np.random.default_rng(gamma)
    maps = torch.from_numpy(np.stack(taught(gamma).affine())).float().to(DEVICE)
    by_torch, by_kernel = makers(slots, gamma, bonus)
    lengths = set()
    for number in range(6):
        table = random.beta(4, 1.5, (slots, gamma)).astype(np.float32)
        table[::2] = random.choice([0.0, 0.3, 0.9, 1.0], (len(table[::2]), gamma))
        table[0] = NAN
        limits = np.full(requests, gamma) if number % 2 else random.integers(0, gamma + 1, requests)
        sampled = random.integers(0, 2, requests) if number % 3 else np.full(requests, number % 2)
        asked = candidates(limits, sampled, random.integers(1, 9, requests))
        order = torch.from_numpy(random.permutation(slots)[:requests].astype(np.int32))
        places = None if number % 4 == 0 else order.to(DEVICE)
        for budget in {0, 1, asked.most // 2, asked.most - 1, asked.most} - {-1}:
            if budget <= asked.most:
                confidence = torch.from_numpy(table).to(DEVICE)
                arguments = confidence, places, asked, maps, budget
                ours = laid_out(by_kernel, *arguments)
                assert ours == laid_out(by_torch, *arguments)
                lengths.add(tuple(ours[: requests + 1]))
    assert len(lengths) >= min(requests * gamma + 1, 6)


def config(kernels: str) -> DSparkConfig:
    return DSparkConfig.from_additional_config({"dspark": {"kernels": kernels}})


@pytest.mark.parametrize(
    ("kernels", "gamma", "expected"),
    [
        ("auto", GAMMA, TorchAllocation),
        ("reference", GAMMA, TorchAllocation),
        ("triton", GAMMA, KernelAllocation),
        ("triton", module.MOST_DRAFTS + 1, TorchAllocation),
    ],
)
def test_who_serves(kernels: str, gamma: int, expected: type) -> None:
    """The kernel where it was asked for and can."""
    assert type(allocation_of(config(kernels), layout(), gamma)) is expected


def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one launch replaces: torch starts at least ten operations that compute."""
    by_torch, by_kernel = makers(SLOTS, GAMMA)
    confidence = torch.rand(SLOTS, GAMMA, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    maps = torch.ones(2, 2, GAMMA, device=DEVICE)
    asked = candidates(np.full(4, GAMMA), np.array([0, 1, 0, 1]), np.ones(4, dtype=np.int64))
    places = torch.arange(4, device=DEVICE)
    out = torch.zeros(2, 5, dtype=torch.int32, device=DEVICE)
    launched = Launches()
    monkeypatch.setattr(module, "allocate_kernel", launched)
    counts = []
    for allocation in (by_torch, by_kernel):
        with Computing() as seen:
            allocation(confidence, places, asked, maps, 5, *out)
        counts.append(seen.operations)
    assert len(counts[0]) >= 10, counts[0]
    assert launched.grids == [(1,)]
    assert counts[1] == []


def test_every_variant_is_compiled_at_start_up() -> None:
    """Whatever a step brings, by what Triton tells launches apart by."""
    code = """
        import torch
        from tests.kernel_compile import Watched
        from vllm_dspark.integration.verification.allocation import Candidates
        from vllm_dspark.integration.verification.allocation_kernel import KernelAllocation
        from vllm_dspark.kernels import allocate as module

        module.allocate_kernel = watched = Watched(module.allocate_kernel)
        allocation = KernelAllocation(100, 7, 1, torch.device("cpu"))
        compiled = set(watched.variants)
        confidence, maps = torch.rand(100, 7), torch.ones(2, 2, 7)
        for requests in (1, 3, 16, 17, 64, 100):
            for dtype in (None, torch.int32, torch.int64):
                for start in range(4):
                    ints = torch.ones(4, 128, dtype=torch.int32)[:3, start : start + requests]
                    out = torch.zeros(2, 128, dtype=torch.int32)[:, start : start + requests + 1]
                    places = None if dtype is None else torch.arange(start, 128, dtype=dtype)
                    candidates = Candidates(requests, ints[0], ints[1], ints[2], None)
                    budget = 16 * start + requests
                    allocation(confidence, places, candidates, maps, budget, out[0], out[1])
        answer = [len(compiled), sorted(watched.variants - compiled)]
    """
    environment = clean_environment(PYTHONPATH=str(Path(__file__).parent.parent))
    compiled, missing = ask(code, environment)
    assert missing == []
    assert compiled == 4  # 16, 32, 64 and 128 rows
