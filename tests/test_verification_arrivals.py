"""Tables on their way to the host, where device and host are one. `test_verification_gpu.py` has
the other line."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_dspark.integration.verification import arrivals
from vllm_dspark.integration.verification.arrivals import Arrivals


def test_what_is_sent_arrives_once_and_in_order() -> None:
    """And is a copy: the runner and the drafter use their buffers again."""
    line = Arrivals()
    slots = np.array([4, 1], dtype=np.intp)
    outcomes = torch.tensor([[3, 1], [0, 2]])
    confidence = torch.tensor([[0.5, 0.25], [1.0, 0.0]])
    line.send(7, slots, outcomes, confidence, 2)
    slots[:] = 9
    for tensor in (outcomes, confidence):
        tensor.fill_(9)
    line.send(8, slots[:1], outcomes[:, :1], confidence[:1], 2)
    first, second = line.collect(9)
    assert (first.step, second.step) == (7, 8)
    assert first.slots.tolist() == [4, 1]
    assert (first.accepted.tolist(), first.verified.tolist()) == ([2, 0], [2, 2])
    assert first.confidence.tolist() == [[0.5, 0.25], [1.0, 0.0]]
    assert first.confidence.dtype == np.float32
    assert line.collect(10) == []


def test_middle_of_a_prefill_verified_nothing() -> None:
    """It emits no token, so there is no target's own to take off."""
    line = Arrivals()
    line.send(0, np.array([0]), torch.tensor([[0], [0]]), torch.ones(1, 3), 3)
    (arrival,) = line.collect(1)
    assert (arrival.accepted.tolist(), arrival.verified.tolist()) == ([0], [0])


def test_beyond_the_depth_nothing_is_known() -> None:
    line = Arrivals()
    for depth in (0, 2, 3):
        line.send(0, np.array([0]), torch.tensor([[1], [0]]), torch.ones(1, 3), depth)
    arrived = line.collect(1)
    assert [int((~np.isnan(a.confidence)).sum()) for a in arrived] == [0, 2, 3]
    assert [a.depth for a in arrived] == [0, 2, 3]


def test_time_goes_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of steps that were started and follow on another that was: what came in between counts, a
    prefill, a pause or a step that sent nothing does not."""
    line, now = Arrivals(), [0.0]
    monkeypatch.setattr(arrivals.time, "perf_counter", lambda: now[0])
    outcomes = torch.tensor([[1], [0]])
    for step, started, taken in (
        (0, False, 1.0), (1, True, 2.0), (2, True, 3.0), (3, True, 4.0), (4, False, 5.0),
        (5, True, 6.0), (6, True, 7.0), (8, True, 8.0), (9, True, 9.0),
    ):  # fmt: skip
        now[0] += taken / 2  # the host, before it begins
        if started:
            line.start()
        now[0] += taken / 2
        line.send(step, np.array([0]), outcomes, torch.ones(1, 2), 2)
    times = {arrival.step: arrival.ms for arrival in line.collect(10)}
    assert {step: ms for step, ms in times.items() if ms is not None} == {
        2: pytest.approx(3000.0), 3: pytest.approx(4000.0), 6: pytest.approx(7000.0),
        9: pytest.approx(9000.0),
    }  # fmt: skip
    assert len(times) == 9
