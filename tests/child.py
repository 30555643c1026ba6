"""Asking another Python process: what a fresh one sees, imports and raises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from typing import Any

_MARK = "answer of the child: "


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment without what the test set-up put there for the interpreter."""
    ours = ("TRITON_INTERPRET", "PYTHONPATH")
    kept = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("VLLM_")}
    return kept | changes


def ask(code: str, env: Mapping[str, str], timeout: float = 300) -> Any:
    """Run `code` and return what it leaves in the variable `answer`, through JSON.

    The working folder is an empty one, so that packages come from where they are installed.
    """
    script = f"import json\n{textwrap.dedent(code)}\nprint({_MARK!r} + json.dumps(answer))\n"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=dict(env),
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(_MARK))
    return json.loads(line.removeprefix(_MARK))
