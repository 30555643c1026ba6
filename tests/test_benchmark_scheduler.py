"""The timing of the decision, run for real at two small sizes; no figure is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.scheduler import app, measure


def test_command_writes_json(tmp_path: Path) -> None:
    """Every size is in it, full and ragged, with what it ran on."""
    out = tmp_path / "scheduler.json"
    arguments = ["--requests", "1,33", "--repeats", "20", "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "together" in done.output
    written = json.loads(out.read_text())
    assert [run["requests"] for run in written["runs"]] == [1, 33, 1, 33]
    assert all(run["together_us"] > 0 for run in written["runs"])
    assert written["settings"] == {"gamma": 7, "repeats": 20, "seed": 0}
    assert {"versions", "commit", "date"} <= written["provenance"].keys()


@pytest.mark.parametrize("ragged", [False, True])
def test_budget_lies_inside_of_the_range(ragged: bool) -> None:
    """Admitting nothing or everything takes a shortcut, and would flatter the figure."""
    run = measure(256, 7, ragged, repeats=10, seed=0)
    assert 0 < run["budget"] < run["drafts"]
    assert (run["drafts"] < 256 * 7) == ragged
