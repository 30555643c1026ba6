"""Allocation in one launch, against the scheduler's ranking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.child import ask, clean_environment
from tests.kernel_cases import DEVICE, NAN
from vllm_dspark.kernels.allocate import MOST_DRAFTS, MOST_REQUESTS, Calibration, allocate
from vllm_dspark.kernels.allocate_reference import allocate_reference

ROOT = Path(__file__).parent.parent
NOTHING = -77


def maps(gamma: int, seed: int = 0) -> Calibration:
    """Different for every regime and position."""
    random = np.random.default_rng(seed)
    slope = torch.tensor(random.uniform(0.6, 1.5, (2, gamma)), dtype=torch.float32)
    intercept = torch.tensor(random.uniform(-0.5, 0.5, (2, gamma)), dtype=torch.float32)
    return Calibration(slope.to(DEVICE), intercept.to(DEVICE), 4.5e-5, 1e-5)


def check(
    confidence: torch.Tensor,
    calibration: Calibration,
    regimes: list[int],
    budget: int,
    limits: list[int] | None = None,
    bonus: int = 1,
) -> list[int]:
    """Lengths from both layouts, equal to the reference's; nothing else is written."""
    requests, gamma = confidence.shape
    others = np.random.default_rng(1).integers(1, 9, requests).cumsum()
    # Each request's confidences are somewhere in a larger table.
    places = torch.randperm(requests + 3, generator=torch.Generator().manual_seed(2))[:requests]
    table = torch.full((requests + 3, gamma), NAN)
    table[places] = confidence
    offsets, queries = torch.full((2, requests + 4), NOTHING, dtype=torch.int32, device=DEVICE)
    same = set(regimes) == {regimes[0]}
    allocate(
        table.to(DEVICE),
        calibration,
        regimes[0] if same else torch.tensor(regimes, device=DEVICE),
        budget,
        torch.tensor(others, dtype=torch.int32, device=DEVICE),
        offsets,
        queries,
        places=places.to(DEVICE),
        limits=None if limits is None else torch.tensor(limits, device=DEVICE),
        bonus=bonus,
    )
    assert offsets[requests + 1 :].tolist() == queries[requests + 1 :].tolist() == [NOTHING] * 3
    lengths = (offsets[: requests + 1].diff() - bonus).tolist()
    assert int(offsets[0]) == int(queries[0]) == 0
    assert (queries[1 : requests + 1].cpu().numpy() - others).tolist() == np.cumsum(
        lengths
    ).tolist()
    full = [gamma] * requests if limits is None else limits
    assert lengths == allocate_reference(confidence, calibration, regimes, budget, full)
    return lengths


@pytest.mark.parametrize(
    ("requests", "gamma"), [(1, 1), (1, 7), (5, 3), (17, 7), (70, 15), (MOST_REQUESTS, MOST_DRAFTS)]
)
def test_lengths_are_the_schedulers(requests: int, gamma: int) -> None:
    """Ragged, with requests that have no candidate; one draft, about half, all but one, all."""
    random = np.random.default_rng(requests + gamma)
    confidence = torch.tensor(random.beta(4, 1.5, (requests, gamma)), dtype=torch.float32)
    limits = random.integers(0, gamma + 1, requests).tolist()
    regimes = random.integers(0, 2, requests).tolist()
    total = sum(limits)
    budgets = {1, total // 2, total - 1, total} if requests < MOST_REQUESTS else {total // 2}
    for budget in budgets - {-1}:
        lengths = check(confidence, maps(gamma), regimes, budget, limits)
        assert sum(lengths) == min(budget, total)


@pytest.mark.parametrize("budget", [0, 1, 4, 5, 9, 13, 21, 30])
def test_ties_go_to_the_lower_row(budget: int) -> None:
    """Rows are the same in pairs, so every survival is there at least twice."""
    rows = torch.tensor([[0.9, 0.8, 0.7], [0.6, 0.5, 0.4], [0.95, 0.3, 0.2]])
    confidence = rows.repeat(2, 1)[[0, 3, 1, 4, 2, 5, 0]]
    lengths = check(confidence, maps(3), [1] * 7, budget)
    assert sum(lengths) == min(budget, 21)
    for first, second in ((0, 1), (1, 6), (2, 3), (4, 5)):
        assert lengths[first] - lengths[second] in (0, 1)


def test_extreme_confidences() -> None:
    """Never and always, and what is no probability."""
    confidence = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.5], [NAN, 0.5, 2.0], [-1.0, NAN, 0.0]])
    for budget in range(13):
        check(confidence, maps(3), [0, 1, 0, 1], budget)


def test_more_rows_than_drafts_and_buffers_that_do_not_fit() -> None:
    check(
        torch.rand(4, 2, generator=torch.Generator().manual_seed(0)), maps(2), [0] * 4, 5, bonus=2
    )
    ends = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="room for 4"):
        allocate(torch.rand(3, 2), maps(2), 0, 1, ends, ends, ends)
    with pytest.raises(ValueError, match=r"must be \[2, 5\]"):
        allocate(torch.rand(3, 5), maps(2), 0, 1, ends, torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match="3 requests with 16 drafts"):
        allocate(torch.rand(3, 16), maps(16), 0, 1, ends, torch.zeros(4), torch.zeros(4))


def test_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    """At its largest and at few requests. 64 registers are what 1024 threads may have each."""
    script = """
        import torch
        from tests.kernel_compile import Recorder
        from vllm_dspark.kernels import allocate as module

        answer = {}
        module.allocate_kernel = Recorder(module.allocate_kernel, answer)
        for requests, gamma in ((1024, 15), (16, 7)):
            maps = module.Calibration(torch.ones(2, gamma), torch.zeros(2, gamma), 4.5e-5, 1e-5)
            ints = torch.zeros(requests, dtype=torch.int32)
            out = torch.zeros(2, requests + 1, dtype=torch.int32)
            module.allocate(
                torch.rand(requests, gamma), maps, ints, 99, ints, *out, places=ints, limits=ints
            )
    """
    environment = clean_environment(PYTHONPATH=str(ROOT), TRITON_CACHE_DIR=str(tmp_path))
    found: dict[str, dict[str, Any]] = ask(script, environment)
    assert sorted(usage["threads"] for usage in found.values()) == [32, 1024]
    for usage in found.values():
        assert usage["stack"] == 0, usage
        assert usage["registers"] <= 64, usage
