"""The depth that is chosen where the host may bind, against the best depth that never changes.

See `host_bound` for the server. A run is one seed of a noisy clock and of acceptance; what is asked
of it leaves room for other seeds.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from tests.host_bound import CONTEXT, LOADS, Phase, Server, launching, nothing

HOSTS = {"slow host": launching, "no host": nothing}


@functools.cache
def phases(host: str) -> list[Phase]:
    """Loads up and down, one after the other, from a profile of the device alone."""
    server = Server(HOSTS[host])
    return [server.run(requests) for requests in LOADS]


def test_the_server_has_something_to_choose() -> None:
    """No depth suits all loads, and the profile alone would choose another where the host binds."""
    assert {phase.best for phase in phases("slow host")} >= {0, 1, 3, 7}
    slow, device = Server(), Server(nothing)
    for requests, depth in ((1, 1), (4, 3), (16, 1)):
        assert slow.step_ms(requests, depth, depth) > 1.1 * device.step_ms(requests, depth, depth)
    assert slow.step_ms(256, 1, 1) == device.step_ms(256, 1, 1)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("phase", range(len(LOADS)))
def test_nearly_as_good_as_the_best_static_depth(host: str, phase: int) -> None:
    """In each phase, what was learned on the way and all probes included."""
    found = phases(host)[phase]
    assert found.requests == LOADS[phase]
    assert found.share >= 0.97
    assert found.switches <= 3
    assert found.slow <= 0.01


@pytest.mark.parametrize("scale", [0.25, 0.5])
def test_a_host_that_always_binds(scale: float) -> None:
    """A small model: whatever drafts takes the host's time, and by the profile drafting looks many
    times as good as it is. Depth 0 was never seen when the first choice falls."""
    server = Server(scale=scale)
    for requests in (1, 16, 64):
        found = server.run(requests)
        assert found.best == 0
        assert found.share >= 0.9
        assert np.bincount(found.depths)[0] > 0.8 * len(found.depths)


def predicted(server: Server, requests: int, depth: int) -> float:
    """ms of a steady state."""
    many = np.array(requests)
    return float(server.controller.cost.steady_ms(many, many * CONTEXT, np.array(depth)))


def test_a_host_that_changes_is_relearned() -> None:
    """1.8 times as long at 4 requests, where drafting stops to pay by that, and back. Each within
    300 steps: what depths 0 and 7 cost is known, and the choice follows."""
    server = Server()
    assert server.run(4).depths[-1] in (3, 5, 7)
    server.host = lambda requests, depth: (1.8 if depth else 1) * launching(requests, depth)
    server.run(4, 300)
    slow = server.run(4)
    assert slow.best == 0
    assert slow.share >= 0.97
    for depth in (0, 7):
        assert predicted(server, 4, depth) == pytest.approx(
            server.step_ms(4, depth, depth), rel=0.1
        )
    server.host = launching
    server.run(4, 300)
    back = server.run(4)
    assert back.best == 7
    assert back.share >= 0.97
    assert predicted(server, 4, 7) == pytest.approx(server.step_ms(4, 7, 7), rel=0.1)


def test_a_device_that_slows_down_is_told_from_a_slow_host() -> None:
    """Steps that draft take half as long again, all at once. It looks like the host until depth 0
    is probed; then the device's time is known at other loads too."""
    server = Server()
    server.run(16)
    server.scale = 1.5
    server.run(16)
    assert server.run(16).share >= 0.97
    for requests, depth in ((16, 0), (16, 3), (64, 0), (64, 1)):
        assert predicted(server, requests, depth) == pytest.approx(
            server.step_ms(requests, depth, depth), rel=0.15
        )


def test_probes_are_few_in_the_long_run() -> None:
    """Those of what survives included; but there are some to the end."""
    for requests in (4, 256):
        server = Server()
        assert server.run(requests, 500).probed < 0.05
        assert 0 < server.run(requests, 6000).probed < 0.01


def test_the_same_run_gives_the_same_depths() -> None:
    """Counts and no clock."""
    runs = [[d for requests in (1, 64) for d in server.run(requests, 200).depths]
            for server in (Server(), Server())]  # fmt: skip
    assert runs[0] == runs[1]
