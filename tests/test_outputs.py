"""Files that a long run ends in: refused before it, and never half written."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_dspark.outputs import OutputError, make_ready, replacing


def test_missing_folders_are_made_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.json"
    make_ready("--out", path)
    assert path.parent.is_dir()
    assert list(path.parent.iterdir()) == []


def test_a_file_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    """The look at the folder must not cost the result of an earlier run."""
    path = tmp_path / "c.json"
    path.write_text("old")
    make_ready("--out", path)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("picture.jpg", "its suffix is '.jpg', needed is one of .png, .svg"),
        ("picture", "its suffix is ''"),
        ("folder.png", "it is a folder"),
        ("file/picture.png", "takes no files"),
        ("file/deeper/picture.png", "takes no files"),
    ],
)
def test_what_could_not_be_written_is_refused(tmp_path: Path, name: str, found: str) -> None:
    """A suffix nobody draws, a folder of that name, a file where a folder is needed."""
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"^--diagram .*Fix: another --diagram$") as caught:
        make_ready("--diagram", tmp_path / name, (".png", ".svg"))
    assert found in str(caught.value)


def test_a_device_is_not_replaced() -> None:
    with pytest.raises(OutputError, match="it is a device"):
        make_ready("--out", Path("/dev/null"))


def test_suffixes_are_the_same_in_capitals(tmp_path: Path) -> None:
    make_ready("--diagram", tmp_path / "A.PNG", (".png",))


def test_a_link_stays_one(tmp_path: Path) -> None:
    path, link = tmp_path / "c.json", tmp_path / "link.json"
    link.symlink_to(path)
    with replacing(link) as partial:
        partial.write_text("new")
    assert link.is_symlink()
    assert path.read_text() == "new"


def test_a_block_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as partial:
            partial.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert [p.read_text() for p in tmp_path.iterdir()] == ["new"]
