"""`python -m examples.training`: what becomes of the folder that is trained into, and when.

Stand-ins take the place of tokenizer, target and drafters: what is trained is tested elsewhere.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.training import __main__ as command
from examples.training.corpus import Corpus, Split
from examples.training.placing import placed
from tests.engine import MICRO

SHIPPED = sorted(str(p.relative_to(MICRO)) for p in MICRO.rglob("*") if p.is_file())


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A copy of the shipped pair."""
    return Path(shutil.copytree(MICRO, tmp_path / "pair"))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that ran; each writes a file of its name into the folder it is given."""
    ran: list[str] = []

    def step(name: str, position: int, file: str) -> None:
        def run(*arguments: Any, **_named: Any) -> None:
            path = arguments[position] / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
            ran.append(name)

        monkeypatch.setattr(command, name, run)

    def load_corpus(*_: Any) -> Corpus:
        ran.append("load_corpus")
        return Corpus(Split(), Split(), 0, 0)

    monkeypatch.setattr(command, "load_corpus", load_corpus)
    monkeypatch.setattr(command, "make_streams", lambda *_: None)
    step("make_tokenizer", 2, "tokenizer.json")
    step("make_target", 3, "training.json")
    step("make_drafters", 2, "dspark-vanilla/config.json")
    return ran


def train(*arguments: str | Path) -> tuple[int, str]:
    """Exit status and what was printed."""
    words = ["train", "--preset", "micro-python", "--no-evaluate", "--device", "cpu"]
    done = CliRunner().invoke(command.app, [*words, *map(str, arguments)])
    return done.exit_code, done.output


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("interrupted", ["make_tokenizer", "make_target", "make_drafters"])
@pytest.mark.parametrize("option", ["--overwrite", "--reuse-target"])
def test_an_interrupt_leaves_the_pair_as_it_was(
    pair: Path, steps: list[str], monkeypatch: pytest.MonkeyPatch, option: str, interrupted: str
) -> None:
    """Its drafters among it, and nothing beside it. What is reused is not trained."""
    step = getattr(command, interrupted)

    def stop(*arguments: Any, **named: Any) -> None:
        step(*arguments, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, interrupted, stop)
    code, _ = train("--out", pair, option)
    if option == "--reuse-target" and interrupted != "make_drafters":
        assert code == 0
        assert interrupted not in steps
        return
    assert code != 0
    assert steps[-1] == interrupted
    assert contents(pair) == contents(MICRO)
    assert list(pair.parent.iterdir()) == [pair]


def test_a_new_pair_takes_the_place_whole(pair: Path, steps: list[str]) -> None:
    """Drafters of the old target go with it; other files in the folder stay."""
    (pair / "notes.txt").write_text("mine")
    code, text = train("--out", pair, "--overwrite")
    assert code == 0, text
    assert steps == ["load_corpus", "make_tokenizer", "make_target", "make_drafters"]
    there = contents(pair)
    assert [name for name in there if name.startswith("dspark")] == ["dspark-vanilla/config.json"]
    assert there["notes.txt"] == b"mine"
    assert there["training.json"] == b"make_target"
    assert list(pair.parent.iterdir()) == [pair]


def test_a_reused_target_keeps_its_other_drafters(pair: Path, steps: list[str]) -> None:
    """They fit it. Nobody has to say that the folder may hold something."""
    code, text = train("--out", pair, "--reuse-target")
    assert code == 0, text
    assert steps == ["load_corpus", "make_drafters"]
    changed = {name for name, file in contents(pair).items() if file != (MICRO / name).read_bytes()}
    assert changed == {"dspark-vanilla/config.json"}
    assert sorted(contents(pair)) == SHIPPED


def test_folders_that_are_missing_are_made(tmp_path: Path, steps: list[str]) -> None:
    code, _ = train("--out", tmp_path / "a" / "b")
    assert code == 0
    assert sorted(contents(tmp_path)) == [
        "a/b/dspark-vanilla/config.json", "a/b/tokenizer.json", "a/b/training.json"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "found"),
    [
        ("pair", [], r"found something in '.*/pair'.*--overwrite"),
        ("pair/config.json", [], "found something in"),
        ("other", ["--overwrite"], r"found no training\.json in '.*/other'"),
        ("pair/config.json", ["--overwrite"], r"found no training\.json"),
        ("other", ["--reuse-target"], "found no target in"),
        ("nowhere", ["--reuse-target"], "found no target in"),
        ("nowhere", ["--heads", "vanilla,foo"], "known are vanilla, gated, rnn, none"),
    ],
)
def test_what_is_no_place_for_it_is_refused_before_anything_runs(
    pair: Path, steps: list[str], name: str, options: list[str], found: str
) -> None:
    """Somebody's own folder is not replaced by a pair, not even where overwriting was asked for."""
    (pair.parent / "other").mkdir()
    (pair.parent / "other" / "thesis.txt").write_text("mine")
    before = contents(pair.parent)
    code, text = train("--out", pair.parent / name, *options)
    assert code in (1, 2)
    assert re.search(found, " ".join(text.replace("│", "").split())), text
    assert steps == []
    assert contents(pair.parent) == before


def test_the_default_folder_is_the_shipped_pair_and_refused(
    steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(MICRO.parents[1])
    code, text = train()
    assert (code, steps) == (1, [])
    assert "examples/micro-python" in text


def test_an_exchange_that_fails_is_undone(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two renames the folder is away; the old one comes back."""
    rename = Path.rename

    def second_fails(self: Path, target: Path) -> Path:
        if target == pair.resolve() and "old" not in self.name:
            raise OSError("no space")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OSError, match="no space"), placed(pair, keep_drafters=False) as work:
        (work / "config.json").write_text("new")
    assert contents(pair) == contents(MICRO)
    assert list(pair.parent.iterdir()) == [pair]


@pytest.mark.parametrize("option", ["--no-write", "--write"])
def test_figures_are_written_unless_told_otherwise(
    pair: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """The measuring itself is tested elsewhere."""
    figures = {"accepted_length": 9.0, "rounds": 1, "ties": 0, "acceptance": [], "confidence": []}
    monkeypatch.setattr(command, "evaluate", lambda *_: dict(figures))
    for name in ("text_prompts", "chat_prompts"):
        monkeypatch.setattr(command, name, lambda *_: [])
    monkeypatch.setattr(command, "load_corpus", lambda *_: Corpus(Split(), Split(), 0, 0))
    words = ["evaluate", str(pair), option]
    done = CliRunner().invoke(command.app, words)
    assert done.exit_code == 0, done.output
    assert "accepted length 9.00" in done.output
    same = (pair / "training.json").read_bytes() == (MICRO / "training.json").read_bytes()
    assert same is (option == "--no-write")
