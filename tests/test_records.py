"""Records: written whole, and read back only if they are such records."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import typer
from typing_extensions import TypedDict

from benchmarks.records import (
    RecordError,
    read_record,
    require_same_settings,
    save_record,
    write_record,
)


class Shape(TypedDict):
    """Some record."""

    values: list[int]


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    """Over an older one, readable by others, in a folder that was not there."""
    path = tmp_path / "new" / "x.json"
    assert read_record(path, Shape, "a command") is None
    assert path.parent.is_dir()
    for values in ([1], [2, 3]):
        save_record(path, {"values": values})
        assert read_record(path, Shape, "a command") == {"values": values}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"values": [1, "x"]}'])
def test_what_is_something_else_is_refused(content: str, tmp_path: Path) -> None:
    """With the file and what would have written it."""
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(RecordError, match=r"x\.json is no record of a command: .*Fix: name ano"):
        read_record(path, Shape, "a command")


def test_where_nothing_can_be_is_known_at_once(tmp_path: Path) -> None:
    """A file in place of a folder, and a folder in place of a file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        read_record(tmp_path / "file" / "x.json", Shape, "a command")
    with pytest.raises(OSError):
        read_record(tmp_path, Shape, "a command")


def test_settings_that_only_one_has_differ_too(tmp_path: Path) -> None:
    require_same_settings(tmp_path, {"a": 1, "b": 2.0}, {"b": 2, "a": 1})
    with pytest.raises(typer.BadParameter, match="b 2 → None, c None → 3"):
        require_same_settings(tmp_path, {"a": 1, "b": 2}, {"a": 1, "c": 3})


def test_a_table_lies_beside_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(tmp_path / "new", "x", {"a": 1}, "| table |\n")
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == {"a": 1}
    assert (tmp_path / "new" / "x.md").read_text() == "| table |\n"
    assert "| table |" in capsys.readouterr().out
