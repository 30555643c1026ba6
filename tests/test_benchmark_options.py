"""Options of the benchmarks that hold lists and checkpoints: by hand, and in every command."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from benchmarks import (
    candidates,
    headline,
    host_cost,
    kernels_draft,
    kernels_verify,
    proposer,
    scheduler,
    sweep,
)
from benchmarks.options import checkpoint_name, named_folders, numbers
from tests.commands import refused


def test_numbers_keep_their_order_and_count_once() -> None:
    """A load that is there twice would be run twice, for one cell."""
    assert numbers("--x", "4, 1,4", int, 1) == [4, 1]
    assert numbers("--x", "0,0.7,1e0", float, 0.0) == [0.0, 0.7, 1.0]


@pytest.mark.parametrize("text", ["", "x", "1,x", "1,", "1.5", "0", "-1", "1;2"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    """No list at all, words, an end that is missing, and numbers that mean nothing as a count."""
    with pytest.raises(typer.BadParameter, match="needed are whole numbers of 1 or more") as error:
        numbers("--x", text, int, 1)
    assert error.value.param_hint == "--x"


@pytest.mark.parametrize("text", ["nan", "inf", "-0.1", "1,a"])
def test_what_is_no_temperature_is_refused(text: str) -> None:
    """`float` takes words that no request may have."""
    with pytest.raises(typer.BadParameter, match="needed are numbers of 0 or more"):
        numbers("--x", text, float, 0.0)


@pytest.mark.parametrize(
    ("app", "option"),
    [
        (sweep.app, "--concurrencies"),
        (sweep.app, "--temperatures"),
        (proposer.app, "--concurrencies"),
        (candidates.app, "--counts"),
        (scheduler.app, "--requests"),
        (host_cost.app, "--requests"),
        (kernels_draft.app, "--requests"),
        (kernels_draft.app, "--gammas"),
        (kernels_draft.app, "--candidates"),
        (kernels_verify.app, "--requests"),
    ],
)
def test_every_command_says_which_list_is_wrong(
    app: typer.Typer, option: str, tmp_path: Path
) -> None:
    """Before anything is looked up, started or written."""
    words: list[object] = ["--out", tmp_path / "out", option, "1,x"]
    if app in (sweep.app, proposer.app, candidates.app):
        words += ["--target", "somebody/model"]
    assert f"Invalid value for {option}: found 'x' in '1,x'" in refused(app, words, 2)
    assert not list(tmp_path.iterdir())


def test_named_folders(tmp_path: Path) -> None:
    """Names may have spaces, and a path an equals sign."""
    (tmp_path / "a=b").mkdir()
    text = f"one layer={tmp_path},B={tmp_path / 'a=b'}"
    assert named_folders("--x", text) == {"one layer": tmp_path, "B": tmp_path / "a=b"}
    assert named_folders("--x", "") == {}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("foo", "needed is NAME=FOLDER"),
        ("=.", "needed is NAME=FOLDER"),
        ("foo=", "needed is NAME=FOLDER"),
        ("a=.,a=.", "'a' is there twice"),
        ("a=/nonexistent", "/nonexistent is no folder"),
    ],
)
def test_what_names_no_folder_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    """By the parser, and by the command that has such an option."""
    with pytest.raises(typer.BadParameter, match=complaint):
        named_folders("--x", text)
    words = ["--out", tmp_path / "x.json", "--target", "somebody/model", "--drafters", text]
    assert complaint in refused(headline.app, words, 2)
    assert not list(tmp_path.iterdir())


def test_checkpoint_names(tmp_path: Path) -> None:
    """A folder by its name, a hub id as it is; a path that leads nowhere would go into the
    record."""
    assert checkpoint_name("--x", f"{tmp_path}/") == tmp_path.name
    assert checkpoint_name("--x", "somebody/model") == "somebody/model"
    for nowhere in ("/nonexistent", "./nonexistent"):
        with pytest.raises(typer.BadParameter, match="is no folder"):
            checkpoint_name("--x", nowhere)
