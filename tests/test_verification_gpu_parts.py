"""On a GPU, without an engine: layouts, the ranking and the line of arrivals, and that nothing in
them waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.manager_driver import GAMMA, SLOTS, States, begin, check, step
from tests.test_verification_manager import FULL, NAMES, RISING
from tests.verification_cases import Prices
from vllm_dspark.calibration.online import OnlineCalibrator
from vllm_dspark.integration.verification.allocation import admit, calibrated_survival
from vllm_dspark.integration.verification.allocation_kernel import KernelAllocation
from vllm_dspark.integration.verification.arrivals import SETTLED, DeviceArrivals
from vllm_dspark.integration.verification.batch import Layout
from vllm_dspark.integration.verification.device import DeviceVerification
from vllm_dspark.integration.verification.host import HostVerification
from vllm_dspark.scheduler.verification import VerificationPolicy

pytestmark = pytest.mark.gpu


MODES = ["device", "kernel", "host"]  # kernel is device mode with our own


def make(mode: str, alone: bool) -> tuple[Any, Any, dict[str, int]]:
    """A manager that four requests have joined, their batch as the runner has it, and their
    tokens."""
    gpu = torch.device("cuda")
    starts = torch.zeros(SLOTS + 1, dtype=torch.int32, device=gpu)
    calibrator = OnlineCalibrator(GAMMA)
    policy = VerificationPolicy(SLOTS, GAMMA, calibrator, Prices(*RISING))
    line = DeviceArrivals(SLOTS, GAMMA, gpu, alone)
    rest = Layout(States(), starts, 1, 1 << 20, True), policy, None, line
    manager: Any = HostVerification(*rest)
    if mode != "host":
        allocation = KernelAllocation(SLOTS, GAMMA, 1, gpu) if mode == "kernel" else None
        manager = DeviceVerification(calibrator, *rest, allocation=allocation)
    begin(manager, {name: None for name in NAMES})
    index = manager.layout.req_states.req_id_to_index
    slots = np.array([index[name] for name in NAMES])
    batch = SimpleNamespace(idx_mapping_np=slots, idx_mapping=torch.from_numpy(slots).to(gpu))
    return manager, batch, dict.fromkeys(NAMES, GAMMA + 1)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any call that makes the host wait for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", MODES)
def test_nothing_waits_for_the_device(mode: str) -> None:
    """A whole step, trimmed or not: planning, layout, sending what was drawn, collecting."""
    manager, batch, batch_tokens = make(mode, alone=True)
    placeholders = {name: [-1] * GAMMA for name in NAMES}
    gpu = batch.idx_mapping.device
    ones = torch.ones(4, dtype=torch.int32, device=gpu)
    random = torch.rand(40, 4, GAMMA, device=gpu)
    verified = set()
    for number in range(40):
        rows = np.arange(5, dtype=np.int32) * (GAMMA + 1)
        lengths = np.full(4, GAMMA + 1, dtype=np.int32)
        with no_waiting():
            manager.get_num_tokens(batch_tokens, placeholders)
            manager.compact_batch(np.full(4, GAMMA, dtype=np.int32), lengths, rows)
            verified.add(manager.reallocate_drafts(NAMES, batch.idx_mapping)[2])
            manager.observe(ones, ones)
            manager.record_confidences(random[number], batch)
    assert len(verified) > 2


@pytest.mark.parametrize("mode", MODES)
def test_layout_on_the_device(mode: str) -> None:
    """The same checks as on CPU tensors, with a line of arrivals that takes its time."""
    manager, batch, batch_tokens = make(mode, alone=False)
    gpu = batch.idx_mapping.device
    random = torch.rand(30, 4, GAMMA, device=gpu)
    seen = set()
    for number in range(30):
        laid_out = step(manager, batch_tokens, FULL)
        check(laid_out, batch_tokens, FULL, exact=mode == "host")
        seen.add(tuple(laid_out.device))
        ones = torch.ones(4, dtype=torch.int32, device=gpu)
        manager.observe(ones, ones)
        manager.record_confidences(random[number], batch)
    assert len(seen) > 3


def test_tables_arrive_from_the_device() -> None:
    """Whole, in order, and copied before their buffers are used again. A rank among others takes
    each when it has settled, however early it came."""
    gpu = torch.device("cuda")
    for alone in (True, False):
        line = DeviceArrivals(4, 3, gpu, alone)
        buffer = torch.empty(4, 3, device=gpu)
        for number in range(20):
            line.start()
            buffer.fill_(number / 32)
            outcomes = torch.tensor([[number] * 2, [1, 1]], dtype=torch.int32, device=gpu)
            line.send(number, np.array([3, 1]), outcomes, buffer[:2], 2)
            buffer.fill_(float("nan"))
            torch.cuda.synchronize()
            arrived = line.collect(number + 1)
            settled = number + 1 - SETTLED
            expected = [number] if alone else [settled] if settled >= 0 else []
            assert [a.step for a in arrived] == expected
            for a in arrived:
                assert a.slots.tolist() == [3, 1]
                assert a.emitted.tolist() == [a.step] * 2
                assert a.rejected.tolist() == [1, 1]
                np.testing.assert_array_equal(a.confidence[:, :2], a.step / 32)
                assert np.isnan(a.confidence[:, 2]).all()
                # The first has none before it that its time could begin at.
                assert (a.ms is not None) is (alone and a.step > 0)


@pytest.mark.parametrize(("requests", "gamma"), [(1, 1), (5, 3), (256, 7), (1024, 7)])
def test_allocation_on_the_device(requests: int, gamma: int) -> None:
    """The sort is another one there; ties must fall the same way."""
    generator = torch.Generator().manual_seed(requests)
    confidence = torch.rand(requests, gamma, generator=generator)
    confidence[::2] = confidence[0].clone()  # half of the rows tie
    slope, intercept = torch.full((2, gamma), 0.8), torch.full((2, gamma), 0.1)
    regimes = torch.arange(requests) % 2
    survival = calibrated_survival(confidence, regimes, slope, intercept)
    capacities = torch.randint(0, gamma + 1, (requests,), generator=generator, dtype=torch.int32)
    for share in (0.0, 0.3, 0.7, 1.0):
        budget = int(share * int(capacities.sum()))
        expected = admit(survival, capacities, budget)
        assert admit(survival.cuda(), capacities.cuda(), budget).tolist() == expected.tolist()
    arguments = (t.cuda() for t in (confidence, regimes, slope, intercept))
    there = calibrated_survival(*arguments)
    torch.testing.assert_close(there.cpu(), survival, rtol=1e-4, atol=1e-7)
    assert (there.diff(dim=1) <= 0).all()
