"""Files that a long run ends in: possible before it starts, and afterwards whole or as before."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class OutputError(ValueError):
    """A file could not be written in the end: what was found, what is needed, how to fix it."""


def make_ready(option: str, path: Path, suffixes: Sequence[str] = ()) -> None:
    """Make the folder that `path` is to be written into, and see that it takes files.

    Args:
        option: which named `path`, for the error.
        suffixes: of names that will do, such as ".png"; none for all.

    Raises:
        OutputError: the suffix is another, `path` is a folder or a device, or its folder cannot be
            made or written to.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        found = f"its suffix is {path.suffix!r}"
        raise _impossible(option, path, f"{found}, needed is one of {', '.join(suffixes)}")
    if path.exists() and not path.is_file():  # a device would be replaced too
        kind = "folder" if path.is_dir() else "device"
        raise _impossible(option, path, f"it is a {kind}, needed is the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:  # what permissions say is not the whole truth
            partial.touch()
            partial.unlink()
    except OSError as error:
        found = f"its folder {str(path.parent)!r} takes no files ({error.strerror})"
        raise _impossible(option, path, f"{found}, needed is one that does") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path`, of the same suffix, to write to, which becomes `path` if the block ends
    well. A link stays one, to the new file.

    Whoever reads `path` at the same time sees the old file or the new one. A block that leaves
    nothing there changes nothing.
    """
    path = path.resolve()
    partial = path.with_name(f".{uuid.uuid4().hex[:12]}.{path.name}")
    try:
        yield partial
        if partial.exists():
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _impossible(option: str, path: Path, problem: str) -> OutputError:
    return OutputError(
        f"{option} {str(path)!r} cannot be written: {problem}. Fix: another {option}"
    )
