"""What options hold: lists of values, comma-separated, and checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeVar

import typer

Number = TypeVar("Number", int, float)


def numbers(option: str, text: str, kind: type[Number], least: Number) -> list[Number]:
    """The numbers in the text of an option, in its order; one that is there twice counts once.

    Args:
        option: its name, for errors.
        kind: int or float.
        least: the smallest that makes sense.

    Raises:
        typer.BadParameter: a word is no finite number of that kind, or below `least`; or none is
            there.
    """
    found: list[Number] = []
    for word in text.split(","):
        try:
            value = kind(word)
        except ValueError:
            value = None
        if value is None or not math.isfinite(value) or value < least:
            what = "whole numbers" if kind is int else "numbers"
            raise typer.BadParameter(
                f"found {word!r} in {text!r}, needed are {what} of {least:g} or more, "
                "comma-separated, such as 1,4",
                param_hint=option,
            )
        found.append(value)
    return list(dict.fromkeys(found))


def named_folders(option: str, text: str) -> dict[str, Path]:
    """NAME=FOLDER, comma-separated, in the option's order; empty for an empty text.

    Raises:
        typer.BadParameter: a word is not of that form, a name is there twice, or no such folder.
    """
    found: dict[str, Path] = {}
    for word in filter(None, text.split(",")):
        name, _, folder = word.partition("=")
        problem = None
        if not (name and folder):
            problem = "needed is NAME=FOLDER, comma-separated"
        elif name in found:
            problem = f"the name {name!r} is there twice, needed is one of its own for each"
        elif not Path(folder).is_dir():
            problem = f"{folder} is no folder, needed is a drafter's checkpoint"
        if problem is not None:
            raise typer.BadParameter(f"found {word!r}: {problem}", param_hint=option)
        found[name] = Path(folder)
    return found


def checkpoint_name(option: str, checkpoint: str) -> str:
    """Name of a checkpoint for the record, which names no folder of a machine: the folder's own, or
    a hub id as it is.

    Raises:
        typer.BadParameter: it is a path, but no folder.
    """
    path = Path(checkpoint)
    if path.is_dir():
        return path.absolute().name
    if checkpoint.startswith(("/", "~", ".")):
        raise typer.BadParameter(
            f"{checkpoint} is no folder, needed is a checkpoint's folder or hub id",
            param_hint=option,
        )
    return checkpoint
