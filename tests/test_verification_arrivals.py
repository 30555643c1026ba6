"""Tables on their way to the host, where device and host are one. `test_verification_gpu.py` has
the other line."""

from __future__ import annotations

import numpy as np
import torch

from vllm_dspark.integration.verification.arrivals import Arrivals


def test_what_is_sent_arrives_once_and_in_order() -> None:
    """And is a copy: the runner and the drafter use their buffers again."""
    line = Arrivals()
    slots = np.array([4, 1], dtype=np.intp)
    emitted, rejected = torch.tensor([3, 1]), torch.tensor([0, 2])
    confidence = torch.tensor([[0.5, 0.25], [1.0, 0.0]])
    line.send(7, slots, emitted, rejected, confidence, 2)
    slots[:] = 9
    for tensor in (emitted, rejected, confidence):
        tensor.fill_(9)
    line.send(8, slots[:1], emitted[:1], rejected[:1], confidence[:1], 2)
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
    line.send(0, np.array([0]), torch.tensor([0]), torch.tensor([0]), torch.ones(1, 3), 3)
    (arrival,) = line.collect(1)
    assert (arrival.accepted.tolist(), arrival.verified.tolist()) == ([0], [0])


def test_beyond_the_depth_nothing_is_known() -> None:
    line = Arrivals()
    for depth in (0, 2, 3):
        line.send(0, np.array([0]), torch.tensor([1]), torch.tensor([0]), torch.ones(1, 3), depth)
    arrived = line.collect(1)
    assert [int((~np.isnan(a.confidence)).sum()) for a in arrived] == [0, 2, 3]
    assert [a.depth for a in arrived] == [0, 2, 3]


def test_only_steps_that_were_started_are_timed() -> None:
    line = Arrivals()
    one, none = torch.tensor([1]), torch.tensor([0])
    line.send(0, np.array([0]), one, none, torch.ones(1, 2), 2)
    line.start()
    line.send(1, np.array([0]), one, none, torch.ones(1, 2), 2)
    line.send(2, np.array([0]), one, none, torch.ones(1, 2), 2)
    times = [arrival.ms for arrival in line.collect(3)]
    assert times[0] is times[2] is None
    assert times[1] is not None
    assert times[1] > 0
