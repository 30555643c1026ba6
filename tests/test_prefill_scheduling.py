"""Prompts that wait for each other, in vLLM's real scheduler, by a clock of the test's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.scheduling import Scheduling, pair
from vllm_dspark.integration import scheduler as module

DECODE_MS, EXTRA_MS = 10.0, 40.0
PLACES = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair(tmp_path_factory.mktemp("pair"))


class Server:
    """Steps that take as long as the test says, and what was in each.

    Attributes:
        groups: prompts that each step began, where it began any.
        waited: by request, ms from its arrival until a step began it.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, **options: Any) -> None:
        ours = {"depth": 0, "verification": "all"} | options.pop("dspark", {})
        self.on = Scheduling(folder, blocks=256, dspark=ours, **options)
        self.now = 0.0
        patch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now / 1000))
        self.groups: list[int] = []
        self.waited: dict[str, float] = {}
        self._arrived: dict[str, float] = {}
        self._names = 0

    def add(self, most: int, prompt: int = 12) -> str:
        name = str(self._names)
        self._names += 1
        self._arrived[name] = self.now
        self.on.add(name, [self._names] * prompt, most=most)
        return name

    def step(self) -> Any:
        step, _ = self.on.step()
        new = [each.req_id for each in step.scheduled_new_reqs]
        self.waited |= {name: self.now - self._arrived[name] for name in new}
        self.groups += [len(new)] * bool(new)
        self.now += DECODE_MS + EXTRA_MS * bool(new)
        return step

    @property
    def load(self) -> int:
        return sum(self.on.scheduler.get_request_counts())

    def serve(self, steps: int) -> None:
        """As many requests in flight as there are places, of lengths that differ."""
        for _ in range(steps):
            while self.load < PLACES:
                self.add(most=20 + 7 * self._names % 23)
            self.step()


def learned(folder: Path, patch: pytest.MonkeyPatch, **options: Any) -> Server:
    server = Server(folder, patch, **options)
    server.serve(300)
    server.groups.clear()
    server.waited.clear()
    return server


def test_prompts_share_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than where none is held back, and none for longer than it may be."""
    alone = learned(folder, monkeypatch, dspark={"prefill_wait_ms": 0})
    alone.serve(300)
    assert alone.on.scheduler.prefills.held == 0
    assert set(alone.waited.values()) == {0.0}
    server = learned(folder, monkeypatch)
    server.serve(300)
    assert server.on.scheduler.prefills.extra_ms == pytest.approx(EXTRA_MS, rel=0.2)
    assert sum(server.groups) / len(server.groups) > 1.5 * sum(alone.groups) / len(alone.groups)
    assert 0 < max(server.waited.values()) <= 40.0


def test_more_prompts_than_places(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a backlog as many wait as there are places: vLLM's own rule would begin each at once."""
    server = learned(folder, monkeypatch, max_num_seqs=PLACES)
    for _ in range(60):
        server.add(most=20 + 7 * server._names % 23)
    while server.load:
        server.step()
    assert len(server.waited) >= 60
    assert sum(server.groups) / len(server.groups) > 1.5


def test_a_prompt_under_way_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps prefill in any case, so nothing else waits for them."""
    server = learned(folder, monkeypatch, max_num_batched_tokens=32)
    long = server.add(most=4, prompt=200)
    held = server.on.scheduler.prefills.held
    while long not in server.waited:
        server.step()
    before = server.on.scheduler.prefills.held
    server.add(most=4)
    while server.on.scheduler.requests[long].is_prefill_chunk:
        assert server.step().num_scheduled_tokens.get(long)
    assert server.on.scheduler.prefills.held == before >= held


def test_nothing_is_left_waiting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last prompt is begun, whether others end or its own client goes."""
    server = learned(folder, monkeypatch)
    server.serve(50)
    gone = server.add(most=9)
    server.on.scheduler.finish_requests(gone, module_status())
    last = server.add(most=9)
    for _ in range(200):
        server.step()
    assert server.load == 0
    assert last in server.waited
    assert gone not in server.waited


def module_status() -> Any:
    from vllm.v1.request import RequestStatus

    return RequestStatus.FINISHED_ABORTED


def test_a_pause_holds_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an operator keeps from starting is not counted as held back."""
    server = learned(folder, monkeypatch)
    scheduler = server.on.scheduler
    scheduler.set_pause_state(module.PauseState.PAUSED_NEW)
    held = scheduler.prefills.held
    name = server.add(most=9)
    for _ in range(10):
        server.step()
    assert scheduler.prefills.held == held
    scheduler.set_pause_state(module.PauseState.UNPAUSED)
    for _ in range(10):
        server.step()
    assert name in server.waited
