"""The comparison of proposers, run for real on the micro pair: two arms, JSON, no figure kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import proposer
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
    assert "arm built-in ended" in done.stdout
    assert not (tmp_path / "out.json").exists()


def test_other_settings_are_not_mixed_into_a_file(tmp_path: Path) -> None:
    """Resuming with another temperature is refused before an engine starts."""
    out = tmp_path / "out.json"
    out.write_text(json.dumps({"settings": {"temperature": 1.0}, "runs": {}}))
    with pytest.raises(Exception, match="other settings"):
        proposer.compare(tmp_path, out)
