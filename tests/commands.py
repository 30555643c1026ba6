"""Giving a benchmark's command in the test's own process."""

from __future__ import annotations

from collections.abc import Sequence

import typer
from typer.testing import CliRunner


def refused(app: typer.Typer, words: Sequence[object], code: int) -> str:
    """What a command that is refused says on stderr, without the frame and line breaks of a
    terminal.

    Args:
        code: exit code: 2 for an option, 1 for anything else. A traceback is neither.
    """
    done = CliRunner().invoke(app, list(map(str, words)))
    assert isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code == code, done.output
    return " ".join(done.stderr.translate(str.maketrans("│─╭╮╰╯", " " * 6)).split())
