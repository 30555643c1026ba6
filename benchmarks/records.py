"""Records of measurements as JSON: written whole, and read back only if they are such records."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from pydantic import TypeAdapter, ValidationError

from benchmarks.errors import BenchmarkError
from vllm_dspark.outputs import replacing


class RecordError(BenchmarkError, ValueError):
    """A file is not the record that it should be."""


def write_record(folder: Path, name: str, result: Mapping[str, Any], table: str) -> None:
    """Write `name`.json and `name`.md into a folder, which is made if need be, and print the
    table."""
    folder.mkdir(parents=True, exist_ok=True)
    save_record(folder / f"{name}.json", result)
    (folder / f"{name}.md").write_text(table)
    typer.echo(table)


def save_record(path: Path, result: Mapping[str, Any]) -> None:
    """Write JSON, see `write_whole`."""
    write_whole(path, json.dumps(result, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old text or the new one, never a part.
    Its folder is made if need be.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_record(path: Path, shape: type, maker: str) -> dict[str, Any] | None:
    """What a file of an earlier run holds; None if there is no file, whose folder is made, so that
    a path that cannot be is known before anything is measured.

    Args:
        shape: the TypedDict that it has to be.
        maker: command that writes such files, for errors.

    Raises:
        OSError: it cannot be read, or its folder cannot be made.
        RecordError: it holds something else; names the file and what is wrong.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return None
    try:
        return TypeAdapter(shape).validate_json(path.read_bytes())
    except ValidationError as error:
        raise RecordError(
            f"{path} is no record of {maker}: {problems(error)}. Needed is a file that it wrote, "
            "or none. Fix: name another file"
        ) from None


def problems(error: ValidationError) -> str:
    """Every place that is wrong, and how, in one line."""
    places = ((".".join(map(str, one["loc"])), one["msg"]) for one in error.errors())
    return "; ".join(": ".join(filter(None, place)) for place in places)


def require_same_settings(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Refuse to put runs of different settings into one file.

    Raises:
        typer.BadParameter: they differ; names the file and each setting, old → new.
    """
    differ = [
        f"{key} {old.get(key)!r} → {new.get(key)!r}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]
    if differ:
        raise typer.BadParameter(
            f"{path} holds other settings: {', '.join(differ)}. Fix: give the same ones, or "
            "another --out"
        )
