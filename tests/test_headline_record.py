"""What is kept of the headline figures, and what is never mixed: nothing is measured for real."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import headline
from benchmarks.engine_process import EngineError
from benchmarks.prompts import PromptSet
from benchmarks.results_format import save
from tests.commands import refused
from tests.engine import MICRO
from tests.sweeps import arm, run, sweep, tiny

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
FIGURES = {"0": {"accepted_length": 2.0, "conditional": [0.5, None], "rounds": 9.0}}
ONE, TWO = (MICRO / f"dspark-{head}" for head in ("vanilla", "rnn"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the drafters that are measured; "fails" ends as an engine that dies."""
    names: list[str] = []

    def lengths(target: str, drafters: dict[str, Path], *_: Any, **options: Any) -> dict[str, Any]:
        (name,) = drafters
        if name == "fails":
            raise EngineError("arm fails ended")
        names.append(name)
        return {name: FIGURES}

    monkeypatch.setattr(headline, "accepted_lengths", lengths)
    monkeypatch.setattr(headline, "load_prompts", lambda *_: PromptSet("python-text", ("a",)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return names


def measure(out: Path, drafters: str, *words: object) -> list[str]:
    """A command that measures (a)."""
    command = ["--out", out, "--target", MICRO, "--drafters", drafters, *words]
    return list(map(str, command))


def invoke(words: list[str]) -> str:
    """A command that succeeds, and what it printed."""
    done = CliRunner().invoke(headline.app, words)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def test_a_drafter_is_added_under_the_same_settings(tmp_path: Path, measured: list[str]) -> None:
    """What is there is not measured again, and where nothing is measured nothing is said to be."""
    out = tmp_path / "x.json"
    invoke(measure(out, f"one={ONE}"))
    first = json.loads(out.read_text())
    invoke(measure(out, f"one={ONE},two={TWO}"))
    assert measured == ["one", "two"]
    second = json.loads(out.read_text())
    assert list(second["acceptance"]) == ["one", "two"]
    assert second["acceptance_settings"] == first["acceptance_settings"]
    before = out.read_bytes()
    invoke(measure(out, f"one={ONE}"))
    assert out.read_bytes() == before
    assert measured == ["one", "two"]


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--gamma", 3, "gamma 7 → 3"),
        ("--max-tokens", 8, "max_tokens 128 → 8"),
        ("--prompts", 2, "prompts 48 → 2"),
        ("--concurrency", 2, "concurrency 8 → 2"),
        ("--target", "somebody/model", "target 'micro-python' → 'somebody/model'"),
    ],
)
@pytest.mark.parametrize("drafter", ["one", "two"])
def test_other_settings_are_refused(
    drafter: str, option: str, value: object, complaint: str, tmp_path: Path, measured: list[str]
) -> None:
    """Whether the drafter is in the file or is to be added to it."""
    out = tmp_path / "x.json"
    invoke(measure(out, f"one={ONE}"))
    before = out.read_bytes()
    command = measure(out, f"{drafter}={ONE}", option, value)
    assert complaint in refused(headline.app, command, 2)
    assert out.read_bytes() == before
    assert measured == ["one"]


def test_a_name_stands_for_one_checkpoint(tmp_path: Path, measured: list[str]) -> None:
    """By what is in it: the same one in another folder is the same."""
    out = tmp_path / "x.json"
    invoke(measure(out, f"one={ONE}"))
    shutil.copytree(ONE, tmp_path / "copy")
    invoke(measure(out, f"one={tmp_path / 'copy'}"))
    assert measured == ["one"]
    assert "another checkpoint" in refused(headline.app, measure(out, f"one={TWO}"), 2)
    (tmp_path / "copy" / "config.json").unlink()
    words = measure(out, f"three={tmp_path / 'copy'}")
    assert "is no drafter's checkpoint" in refused(headline.app, words, 1)


def test_files_without_settings_are_shown_but_not_extended(
    tmp_path: Path, measured: list[str]
) -> None:
    """A committed one is drawn again to the byte; its figures are not passed off as new ones."""
    out, folder = tmp_path / "headline.json", RESULTS / "h200-8b-whole"
    shutil.copy(folder / "headline.json", out)
    for drafters in (f"DSpark 1 layer={ONE}", f"another={ONE}"):
        words = measure(out, drafters, "--gamma", 3, "--max-tokens", 8)
        assert "without their settings" in refused(headline.app, words, 2)
    assert not out.with_suffix(".md").exists()
    invoke(["--out", str(out)])
    assert out.read_bytes() == (folder / "headline.json").read_bytes()
    assert out.with_suffix(".md").read_text() == (folder / "headline.md").read_text()
    assert measured == []


@pytest.mark.parametrize("name", ["inflated", "tiny-python"])
def test_other_files_of_old_are_read(name: str, tmp_path: Path, measured: list[str]) -> None:
    shutil.copy(RESULTS / "inflation-acceptance" / f"{name}.json", tmp_path / "x.json")
    assert "2.25" in invoke(["--out", str(tmp_path / "x.json")])


def test_options_that_need_each_other(tmp_path: Path, measured: list[str]) -> None:
    """None of them is silently left out."""
    out = ["--out", str(tmp_path / "x.json")]
    for words in (["--drafters", f"one={ONE}"], ["--target", str(MICRO)]):
        assert "need each other" in refused(headline.app, [*out, *words], 2)
    assert "Fix: --sweep FILE" in refused(headline.app, [*out, "--ours", "x"], 2)
    assert "end in .md" in refused(headline.app, ["--out", tmp_path / "x.md"], 2)
    words = measure(tmp_path / "x.json", f"one={ONE}", "--concurrency", 16)
    assert "found 16 requests in a step" in refused(headline.app, words, 2)
    assert measured == []
    assert not list(tmp_path.iterdir())


def test_the_sweep_is_read_before_anything_is_measured(tmp_path: Path, measured: list[str]) -> None:
    """One that is not there, is none, has no run, or has several arms of ours."""
    broken, empty, several = (tmp_path / f"{name}.json" for name in ("broken", "empty", "several"))
    broken.write_text("{")
    save(sweep({}), empty)
    both = tiny()
    both.arms["triton"] = arm("ours", 7, run(1, 1000))
    save(both, several)
    out = tmp_path / "x.json"
    for file, complaint, code in (
        (tmp_path / "nope.json", "nope.json: No such file", 1),
        (broken, "is no sweep", 1),
        (empty, "has any run", 2),
        (several, "Fix: --ours NAME", 2),
    ):
        words = measure(out, f"one={ONE}", "--sweep", file)
        assert complaint in refused(headline.app, words, code)
    assert measured == []
    assert not out.exists()
    invoke([*measure(out, f"one={ONE}"), "--sweep", str(several), "--ours", "triton"])
    assert json.loads(out.read_text())["ours"] == "triton"
    words = ["--out", str(out), "--sweep", str(several), "--ours", "fixed 1"]
    assert "no arm 'fixed 1' of kind" in refused(headline.app, words, 2)


def test_the_arm_of_the_committed_sweep_can_be_chosen(tmp_path: Path, measured: list[str]) -> None:
    """It has two of kind ours."""
    words = ["--out", str(tmp_path / "x.json")]
    words += ["--sweep", str(RESULTS / "kernels-h200" / "sweep.json")]
    assert "'triton'" in refused(headline.app, words, 2)
    invoke([*words, "--ours", "triton"])


def test_what_was_measured_is_kept_when_the_next_fails(tmp_path: Path, measured: list[str]) -> None:
    """Drafter by drafter."""
    out = tmp_path / "x.json"
    words = measure(out, f"one={ONE},fails={TWO}")
    assert "arm fails ended" in refused(headline.app, words, 1)
    kept = json.loads(out.read_text())
    assert list(kept["acceptance"]) == list(kept["drafters"]) == ["one"]
    assert len(kept["provenance"]) == 1


def test_no_figure_of_an_earlier_sweep_stays(tmp_path: Path, measured: list[str]) -> None:
    """A sweep without γ = 1 has nothing to match, and so has the record."""
    out, file = tmp_path / "x.json", tmp_path / "sweep.json"
    whole = tiny()
    save(whole, file)
    assert "with γ=1" in invoke(["--out", str(out), "--sweep", str(file)])
    del whole.arms["fixed 1"]
    save(whole, file)
    assert "with γ=1" not in invoke(["--out", str(out), "--sweep", str(file)])
