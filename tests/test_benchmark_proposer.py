"""The comparison of proposers, run for real on the micro pair: two arms, JSON, no figure kept."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import proposer
from tests.commands import refused
from tests.engine import MICRO
from vllm_dspark import cpu


def test_table_takes_medians_and_tells_different_tokens() -> None:
    """Median, ratio and spread are of the passes; a differing digest shows."""
    runs = {
        "built-in": [{"tokens_per_second": r, "tokens_crc32": 1} for r in (90.0, 100.0, 110.0)],
        "ours": [{"tokens_per_second": r, "tokens_crc32": 2} for r in (100.0, 120.0, 130.0)],
    }
    columns = [list(column.cells) for column in proposer._table({"4": runs}).columns]
    assert columns == [["4"], ["100"], ["120"], ["1.200"], ["25.0%"], ["no"]]


def test_an_arm_that_ends_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    """A target that does not exist ends both engines; the error says which arm and why."""
    command = [sys.executable, "-m", "benchmarks.proposer"]
    command += ["--target", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out.json")]
    done = subprocess.run(
        command, env=cpu.environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "arm built-in ended" in done.stderr
    assert not (tmp_path / "out.json").exists()


def test_other_settings_are_not_mixed_into_a_file(tmp_path: Path) -> None:
    """Resuming with another temperature is refused before an engine starts."""
    out = tmp_path / "out.json"
    out.write_text(json.dumps({"settings": {"temperature": 1.0}, "runs": {}}))
    with pytest.raises(Exception, match="other settings"):
        proposer.compare(tmp_path, out)


RESULT = Path(__file__).parent.parent / "benchmarks" / "results" / "proposer-h200.json"
TINY = ["--target", "examples/tiny-python"]


def measured(monkeypatch: pytest.MonkeyPatch, has_gpu: bool) -> list[tuple[dict[str, Any], Any]]:
    """Settings and loads of every measurement that is asked for; none is made."""
    asked: list[tuple[dict[str, Any], Any]] = []

    def measure(settings: dict[str, Any], loads: Any, todo: list[int], *rest: Any) -> None:
        asked.append((settings, todo))

    monkeypatch.setattr(proposer, "_measure", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    return asked


@pytest.mark.parametrize("has_gpu", [False, True])
def test_a_file_of_old_is_shown_by_any_machine(
    has_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left to be run, so nothing is asked of this machine."""
    asked = measured(monkeypatch, has_gpu)
    out = tmp_path / "out.json"
    shutil.copy(RESULT, out)
    words = [*TINY, "--out", str(out), "--concurrencies", "1,16,64"]
    done = CliRunner().invoke(proposer.app, words)
    assert done.exit_code == 0, done.output
    assert "1.028" in done.stdout
    assert asked == []
    assert "gamma 7 → 3" in refused(proposer.app, [*words, "--gamma", "3"], 2)
    assert out.read_bytes() == RESULT.read_bytes()


@pytest.mark.parametrize("with_loads", [False, True])
def test_a_concurrency_is_added(
    with_loads: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the file are kept, and which they were is no setting, though some files say so."""
    asked = measured(monkeypatch, True)
    out, held = tmp_path / "out.json", json.loads(RESULT.read_text())
    if with_loads:
        held["settings"]["concurrencies"] = "1,16,64"
    out.write_text(json.dumps(held))
    done = CliRunner().invoke(
        proposer.app, [*TINY, "--out", str(out), "--concurrencies", "1,32,64,128"]
    )
    assert done.exit_code == 0, done.output
    ((settings, todo),) = asked
    assert todo == [32, 128]
    assert settings == json.loads(RESULT.read_text())["settings"]


def test_without_a_gpu_the_record_says_what_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 and few requests; another dtype, more requests, or a GPU's file are refused."""
    asked = measured(monkeypatch, False)
    monkeypatch.setattr(proposer, "_table", lambda runs: "")
    words = ["--target", str(MICRO), "--out", str(tmp_path / "out.json")]
    assert CliRunner().invoke(proposer.app, words).exit_code == 0
    ((settings, todo),) = asked
    assert (settings["dtype"], settings["kv_cache_gib"], todo) == ("float32", 0.25, [1, 4, 8])
    assert "bfloat16" in refused(proposer.app, [*words, "--dtype", "bfloat16"], 2)
    assert "16 requests" in refused(proposer.app, [*words, "--concurrencies", "1,16"], 2)
    shutil.copy(RESULT, tmp_path / "h200.json")
    words = [*TINY, "--out", str(tmp_path / "h200.json"), "--concurrencies", "4"]
    assert "dtype 'bfloat16' → 'float32'" in refused(proposer.app, words, 2)
    assert len(asked) == 1
