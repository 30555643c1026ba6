"""Errors that a user can mend end a benchmark with a line and exit code 1, not with a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer

from benchmarks import calibration, candidate_overlap, candidates, headline, proposer, sweep
from benchmarks.engine_process import EngineError
from benchmarks.errors import plain_errors
from benchmarks.prompts import PromptsError
from benchmarks.records import RecordError
from tests.commands import refused
from tests.engine import MICRO
from vllm_dspark.calibrate import CalibrationError
from vllm_dspark.checkpoint import DrafterMismatchError
from vllm_dspark.drafters import UnknownDrafterError


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (CalibrationError("too few"), "too few\n"),
        (PromptsError("no prompts"), "no prompts\n"),
        (RecordError("no record"), "no record\n"),
        (EngineError("ended:\nits last\nlines"), "ended:\nits last\nlines\n"),
        (DrafterMismatchError("d", ["a problem"]), "a problem"),
        (
            UnknownDrafterError("None. Known:\n  a -> b\n  c -> d"),
            "Known: a -> b, c -> d. Fix: --d",
        ),
        (FileNotFoundError(2, "No such file", "x.json"), "x.json: No such file. Needed is"),
        (OSError("words\nof a library"), "words of a library\n"),
        (json.JSONDecodeError("Expecting value", "{", 1), "broken JSON (Expecting value: line 1"),
    ],
)
def test_each_kind_is_said(error: Exception, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On stderr; only an engine's last lines are more than one."""

    @plain_errors
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as ended:
        command()
    assert ended.value.exit_code == 1
    text = capsys.readouterr().err
    assert said in text
    assert text.count("\n") == 1 or isinstance(error, EngineError)


@pytest.mark.parametrize("error", [ValueError("a bug"), typer.BadParameter("an option"), KeyError])
def test_others_pass(error: Exception) -> None:
    """Options have typer's own way; what nobody foresaw keeps its traceback."""

    @plain_errors
    def command() -> None:
        raise error

    with pytest.raises((ValueError, typer.BadParameter, KeyError)):
        command()


@pytest.mark.parametrize("module", [calibration, candidates, candidate_overlap, sweep])
def test_a_target_without_anything_in_it(module: object, tmp_path: Path) -> None:
    """Every command that looks for a drafter says what it did not find."""
    (tmp_path / "empty").mkdir()
    words = ["--target", tmp_path / "empty", "--out", tmp_path / "out"]
    text = refused(module.app, words, 1)  # type: ignore[attr-defined]  # a module of a command
    assert "empty" in text
    assert "Fix: " in text
    assert not (tmp_path / "out").exists()


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    """Its file, not only the place in some JSON."""
    shutil.copytree(MICRO, tmp_path / "pair")
    (tmp_path / "pair" / "config.json").write_text("{")
    words = ["--target", tmp_path / "pair", "--out", tmp_path / "out"]
    words += ["--drafter", tmp_path / "pair" / "dspark-vanilla"]
    assert "config.json is broken JSON" in refused(candidate_overlap.app, words, 1)


@pytest.mark.parametrize("content", ["", "no JSON", "[]", '{"runs": 3}', '{"arms": {}}'])
@pytest.mark.parametrize(
    ("module", "target"), [(proposer, ["--target", MICRO]), (headline, [])], ids=["p", "h"]
)
def test_a_file_that_is_no_record_is_left_alone(
    module: object, target: list[object], content: str, tmp_path: Path
) -> None:
    """Neither read as one nor written over."""
    out = tmp_path / "out.json"
    out.write_text(content)
    words = ["--out", out, *target]
    text = refused(module.app, words, 1)  # type: ignore[attr-defined]  # a module of a command
    assert "out.json is no record of benchmarks." in text
    assert out.read_text() == content
    assert len(list(tmp_path.iterdir())) == 1


def test_a_sweep_file_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before an arm is started; a folder is no file either."""
    out = tmp_path / "out.json"
    out.write_text("no JSON")
    monkeypatch.setattr(sweep, "measure", pytest.fail)
    words = ["--target", MICRO, "--drafter", MICRO / "dspark-vanilla", "--concurrencies", "1"]
    assert "is no sweep of version 1" in refused(sweep.app, [*words, "--out", out], 1)
    assert "Is a directory" in refused(sweep.app, [*words, "--out", tmp_path], 1)
