"""The benchmarks' own errors, and the one place where an error becomes a line of text.

Errors in options are typer's (`BadParameter`, exit code 2); whatever else a user can mend ends a
command with exit code 1. A traceback is left to what nobody foresaw.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from vllm_dspark.calibrate import CalibrationError
from vllm_dspark.checkpoint import DrafterMismatchError
from vllm_dspark.compat import IncompatibleVllmError
from vllm_dspark.drafters import UnknownDrafterError

P = ParamSpec("P")
R = TypeVar("R")


class BenchmarkError(Exception):
    """What was found, what is needed and how to mend it, in words for whoever gave the command."""


_OF_THE_PACKAGE = (
    CalibrationError,
    DrafterMismatchError,
    IncompatibleVllmError,
    UnknownDrafterError,
)


def plain_errors(command: Callable[P, R]) -> Callable[P, R]:
    """A command that says on stderr what went wrong, and ends with exit code 1."""

    @functools.wraps(command)
    def plain(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except (BenchmarkError, *_OF_THE_PACKAGE, OSError, json.JSONDecodeError) as error:
            typer.echo(in_words(error), err=True)
            raise typer.Exit(1) from None

    return plain


def in_words(error: Exception) -> str:
    """What an error says to whoever gave the command: one line, unless its own words are an
    engine's last ones."""
    if isinstance(error, BenchmarkError):
        return str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        return (
            f"{error.filename}: {error.strerror}. Needed is a path that can be read, or written if "
            "it is --out. Fix: correct the path"
        )
    first, *table = map(str.strip, str(error).splitlines() or [""])
    line = f"{first} {', '.join(table)}".strip()
    if isinstance(error, UnknownDrafterError):
        return f"{line.removesuffix('.')}. Fix: --drafter PATH_OR_ID"
    if isinstance(error, json.JSONDecodeError):
        return f"a file is broken JSON ({line}). Fix: restore the file, or name another"
    return line
