"""This process becomes another program that runs vLLM on the CPU through the interpreter."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import NoReturn

from vllm_dspark import cpu


class CannotRunError(ValueError):
    """The system refuses to run a program: what was found, what is needed, how to fix it."""


def become(program: str, command: Sequence[str]) -> NoReturn:
    """Run a program in the place of this one.

    Args:
        program: path of its file.
        command: its name as it was given, and its arguments.

    Raises:
        CannotRunError: the system cannot run it, a script without its first line for one.
    """
    try:
        os.execve(program, list(command), cpu.environment())
    except OSError as error:
        found = f"{program!r} cannot be run: {error.strerror}."
        # Neither a program nor a script that names one, or it names one that is not there.
        if error.errno in (errno.ENOEXEC, errno.ENOENT):
            found += (
                " Needed is a program for this machine, or a script whose first line says what "
                f"runs it. Fix: a line such as #!/bin/sh, or vllm-dspark cpu -- sh {program}"
            )
        raise CannotRunError(found) from None
