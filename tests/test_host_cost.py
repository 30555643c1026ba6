"""The host's work of a step, timed for real at two small sizes; no figure is kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.host_cost import app, measure
from benchmarks.host_engine import CONTEXT
from benchmarks.host_server import ENTRIES, PARTS, Server
from benchmarks.spans import Spans


def server(requests: int, trims: bool = False) -> Server:
    return Server(requests, 7, trims, False, torch.device("cpu"), Spans(), False)


@pytest.mark.parametrize("mode", ["host", "device"])
def test_command_writes_json(tmp_path: Path, mode: str) -> None:
    """Every size is in it, whole and trimmed, part by part, with what it ran on."""
    out = tmp_path / "host.json"
    arguments = ["--requests", "1,5", "--steps", "20", "--warm-up", "20"]
    done = CliRunner().invoke(app, [*arguments, "--mode", mode, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "drafts verified" in done.output
    written = json.loads(out.read_text())
    assert [(run["requests"], run["trims"]) for run in written["runs"]] == [
        (1, False), (5, False), (1, True), (5, True),
    ]  # fmt: skip
    for run in written["runs"]:
        assert run["mode"] == mode
        assert 0 < run["total_us"][0] <= run["total_us"][1]
        assert {f"{owner}.{name}" for owner, names in ENTRIES.items() for name in names} <= set(
            run["parts_us"]
        )
    assert {"versions", "commit", "date"} <= written["provenance"].keys()


@pytest.mark.parametrize("mode", [False, True], ids=["host", "device"])
def test_loads_are_what_they_are_called(mode: bool) -> None:
    """All drafts are verified, or some of them: either alone would time one path only."""
    whole, trimmed = (
        measure(16, 7, trims, mode, "cpu", steps=20, warm_up=50) for trims in (False, True)
    )
    assert whole["verified"] == 1
    assert 0.1 < trimmed["verified"] < 0.9


def test_unknown_mode_is_refused() -> None:
    assert CliRunner().invoke(app, ["--mode", "both"]).exit_code == 2


def test_parts_are_there() -> None:
    """A part that was renamed would silently count as its caller's."""
    made = Server(2, 3, False, True, torch.device("cpu"), Spans(), True)
    for _ in range(20):
        made.step()
    seen = {label for step in made._spans.steps for label in step}
    known = {f"{owner}.{name}" for owner, names in PARTS.items() for name in names}
    assert known - seen <= {"policy.allocate"}  # nothing is shared out on the host


def test_spans_are_exclusive() -> None:
    """What a span inside of another takes is not the outer one's."""
    spans = Spans()
    inner = spans.timed(lambda: sum(range(200_000)), "inner")
    outer = spans.timed(lambda: inner() + inner(), "outer")
    outer()
    spans.end_step()
    (step,) = spans.steps
    assert step["inner"] > 20 * step["outer"] > 0


def test_scheduler_counts_context_when_requests_come_or_time_passes() -> None:
    """Not in every step; but a load that changed is seen at once."""
    scheduler = server(3).scheduler
    seen = []
    for number in range(40):
        for request in scheduler.running:
            request.num_computed_tokens = CONTEXT + number
        seen.append(scheduler._context())
    assert seen[0] == 3 * CONTEXT
    counted = np.flatnonzero(np.diff(seen)) + 1
    assert counted.tolist() == [16, 32]
    assert seen[32] == 3 * (CONTEXT + 32)
    del scheduler.running[0]
    assert scheduler._context() == 2 * (CONTEXT + 39)
