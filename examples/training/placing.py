"""A pair takes its folder's place when all of it is there; until then the folder is as it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .export import RECORD


class PlaceError(ValueError):
    """A folder cannot be trained into: what was found, what is needed, how to fix it."""


def require_place(folder: Path, *, overwrite: bool, reuse_target: bool) -> None:
    """Refuse a folder that is not the place for what is going to be trained.

    Raises:
        PlaceError: the target that is to be reused is not there; or something is there, and it is
            not to be replaced or is no pair.
    """
    if reuse_target:
        if not (folder / "config.json").is_file():
            raise PlaceError(
                f"found no target in {str(folder)!r}; needed is one to reuse. Fix: --out with its "
                "folder, or no --reuse-target"
            )
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        if not overwrite:
            raise PlaceError(
                f"found something in {str(folder)!r}; needed is an empty folder, or none. Fix: "
                "--out with another, or --overwrite to replace the pair there once the new one is "
                "trained"
            )
        if not (folder / RECORD).is_file():
            raise PlaceError(
                f"found no {RECORD} in {str(folder)!r}, so it is no pair of ours; needed is one to "
                "overwrite. Fix: --out with another folder"
            )


@contextmanager
def placed(folder: Path, *, keep_drafters: bool) -> Iterator[Path]:
    """A folder beside `folder` to build in, which becomes `folder` if the block ends well.

    It starts with what `folder` holds. If the block fails or is interrupted, it is deleted.

    Args:
        keep_drafters: start with the drafters too. They fit the target they were trained for
            alone.
    """
    folder = folder.resolve()
    work, old = (folder.with_name(f".{folder.name}.{kind}{os.getpid()}") for kind in ("", "old"))

    def left_out(path: str, names: list[str]) -> list[str]:
        top = Path(path) == folder
        return [n for n in names if top and n.startswith("dspark") and not keep_drafters]

    try:
        if folder.exists():
            shutil.copytree(folder, work, symlinks=True, ignore=left_out)
        else:
            work.mkdir(parents=True)
        yield work
        _exchange(folder, work, old)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(folder: Path, work: Path, old: Path) -> None:
    """`folder` becomes `old` and `work` `folder`, or nothing does."""
    try:
        if folder.exists():
            folder.rename(old)
        work.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
