"""`vllm-dspark calibrate`, as a person calls it. Made-up rounds stand in for the engine's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.engine import MICRO
from vllm_dspark.calibration.artifact import CalibrationArtifact
from vllm_dspark.calibration.sts import MIN_OBSERVATIONS
from vllm_dspark.cli import app
from vllm_dspark.integration import recording
from vllm_dspark.reliability import SUFFIXES

GAMMA = 7
PAIR = (str(MICRO), "--drafter", str(MICRO / "dspark-vanilla"))
Record = dict[str, list[Any]]


def overconfident(count: int) -> Record:
    """Rounds of a head that says 0.9 where half are accepted, two a request."""
    accepted = np.random.default_rng(0).geometric(0.5, count) - 1
    return {
        "confidence": [[0.9] * GAMMA] * count,
        "accepted": accepted.clip(max=GAMMA).tolist(),
        "verified": [GAMMA] * count,
        "request": (np.arange(count) // 2).tolist(),
    }


def honest() -> Record:
    """Rounds of a head that says a half where exactly half are accepted, on both sides."""
    accepted = [k for k in range(GAMMA) for _ in range(2 ** (GAMMA - 1 - k))] + [GAMMA]
    return {
        "confidence": [[0.5] * GAMMA] * 2 * 2**GAMMA,
        "accepted": [k for k in accepted for _ in range(2)],
        "verified": [GAMMA] * 2 * 2**GAMMA,
        "request": list(range(2 * 2**GAMMA)),
    }


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Record | Exception], list[str]]:
    """Call it with what the engine is to give; the list it returns has an entry for each run."""

    def give(answer: Record | Exception) -> list[str]:
        started: list[str] = []

        def record(target: str, *rest: Any) -> tuple[Record, str]:
            started.append(target)
            if isinstance(answer, Exception):
                raise answer
            return answer, "float32"

        monkeypatch.setattr(recording, "record", record)
        return started

    return give


def calibrate(*arguments: str | Path) -> tuple[int, str]:
    """Exit status and what was printed."""
    words = ["calibrate", *map(str, arguments)]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert done.exception is None or isinstance(done.exception, SystemExit)  # no traceback
    return done.exit_code, done.output


def test_missing_folders_of_both_files_are_made(tmp_path: Path, runs: Any) -> None:
    """They are not found missing after the run, which then is lost."""
    started = runs(overconfident(600))
    out, diagram = tmp_path / "new" / "mine.json", tmp_path / "other" / "deep" / "mine.svg"
    code, text = calibrate(*PAIR, "--out", out, "--diagram", diagram)
    assert (code, len(started)) == (0, 1), text
    assert min(CalibrationArtifact.load(out).temperatures[:3]) > 1.5
    assert "<svg" in diagram.read_text()
    assert [p.name for p in (*out.parent.iterdir(), *diagram.parent.iterdir())] == [
        "mine.json", "mine.svg"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("out", "diagram", "found"),
    [
        ("a.json", "a.bmp", "--diagram '{}/a.bmp' cannot be written: its suffix is '.bmp'"),
        ("a.json", "a", "needed is one of " + ", ".join(SUFFIXES)),
        ("file/a.json", "a.png", "--out '{}/file/a.json' cannot be written: its folder"),
        ("a.json", "file/a.png", "--diagram '{}/file/a.png' cannot be written: its folder"),
        ("folder", "a.png", "--out '{}/folder' cannot be written: it is a folder"),
        ("a.png", None, "--out and --diagram are one file"),
    ],
)
def test_what_cannot_be_written_ends_it_before_the_engine_starts(
    tmp_path: Path, runs: Any, out: str, diagram: str | None, found: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    started = runs(overconfident(600))
    options: list[str | Path] = ["--diagram", tmp_path / diagram] if diagram else []
    code, text = calibrate(*PAIR, "--out", tmp_path / out, *options)
    assert (code, started) == (1, [])
    assert found.replace("{}", str(tmp_path)) in text
    assert len(text.splitlines()) == 1


def test_a_folder_without_a_checkpoint_is_one_line(tmp_path: Path, runs: Any) -> None:
    """And nothing is made for it: what is beside it stays as it was."""
    started = runs(overconfident(600))
    empty, out = tmp_path / "empty", tmp_path / "new" / "a.json"
    empty.mkdir()
    for role, folders in (("target", (empty, empty)), ("drafter", (MICRO, empty))):
        code, text = calibrate(folders[0], "--drafter", folders[1], "--out", out)
        assert (code, started) == (1, [])
        assert text == (
            f"the {role} '{empty}' is no checkpoint: found config.json: No such file or directory. "
            f"Needed are config.json and weights as safetensors. Fix: give the {role}'s folder "
            "that has them.\n"
        )
    assert list(tmp_path.iterdir()) == [empty]


def test_an_error_of_the_system_is_one_line(tmp_path: Path, runs: Any) -> None:
    """Whatever the engine misses while it starts."""
    runs(FileNotFoundError(2, "No such file or directory", "/lost/tokenizer.json"))
    code, text = calibrate(*PAIR, "--out", tmp_path / "a.json")
    assert code == 1
    assert text.startswith("/lost/tokenizer.json: No such file or directory. Needed is")
    assert "Fix:" in text
    assert len(text.splitlines()) == 1


def test_too_few_rounds_are_counted_and_not_called_honest(tmp_path: Path, runs: Any) -> None:
    """A half of 120 is fitted on, fewer than a fit takes, so the temperatures are all 1."""
    runs(overconfident(120))
    out = tmp_path / "a.json"
    code, text = calibrate(*PAIR, "--out", out)
    assert (code, out.exists()) == (1, False)
    assert (
        "nothing written: too few rounds: 60 were fitted on, 100 are needed. Fix: more prompts or "
        "--max-tokens\n"
    ) in text
    assert "more honest" not in text


def test_positions_with_too_few_rounds_are_named_beside_those_that_were_fitted(
    tmp_path: Path, runs: Any
) -> None:
    """The last rounds of requests verify less, so that deep positions run short first."""
    rounds = overconfident(2 * MIN_OBSERVATIONS)
    rounds["verified"][:4] = [GAMMA - 2] * 4  # of requests 0 and 1, one of which is held out
    rounds["accepted"] = np.minimum(rounds["accepted"], rounds["verified"]).tolist()
    runs(rounds)
    code, text = calibrate(*PAIR, "--out", tmp_path / "a.json")
    assert code == 0
    assert "too few rounds for drafts 6, 7, which keep temperature 1: 98 were fitted on" in text
    temperatures = CalibrationArtifact.load(tmp_path / "a.json").temperatures
    assert temperatures[5:] == (1, 1)
    assert 1 not in temperatures[:3]


def test_temperatures_that_do_not_help_are_not_written(tmp_path: Path, runs: Any) -> None:
    """Enough rounds, and nothing to correct."""
    runs(honest())
    code, text = calibrate(*PAIR, "--out", tmp_path / "a.json")
    assert (code, (tmp_path / "a.json").exists()) == (1, False)
    assert "nothing written: the temperatures do not make survival more honest" in text
    assert "too few" not in text


def test_drafting_is_one_of_two_words(runs: Any) -> None:
    """The command line says so, and no library of its inside."""
    started = runs(overconfident(600))
    code, text = calibrate(*PAIR, "--drafting", "foo")
    assert (code, started) == (2, [])
    assert "greedy" in text
    assert "probabilistic" in text
    assert "pydantic" not in text
