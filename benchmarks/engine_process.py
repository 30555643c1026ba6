"""An engine in a process of its own: started, driven pass by pass, and ended for certain."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.engine_child import MARK
from benchmarks.errors import BenchmarkError

ROOT = Path(__file__).parent.parent
_TAIL = 40


class EngineError(BenchmarkError, RuntimeError):
    """The engine's process ended; the message holds its last lines."""


class EngineProcess:
    """vLLM's `LLM` in a child process, in a process group of its own.

    Args:
        name: for messages.
        options: arguments of `LLM`.
        env: environment of the process.
        limit_s: seconds after which a start or a pass is given up.
        module: what runs in the child; it answers as `engine_child` does.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        env: Mapping[str, str],
        limit_s: float = 900,
        module: str = "benchmarks.engine_child",
    ) -> None:
        self.name = name
        self.limit_s = limit_s
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env=with_root_on_path(env) | {"VLLM_LOGGING_STREAM": "ext://sys.stderr"},
            start_new_session=True,
        )
        self._send(options)

    def ready(self) -> float:
        """Wait until the engine is up; seconds that it took.

        Raises:
            EngineError: the process ended instead.
        """
        return self._result()["startup_s"]

    def run(self, **task: Any) -> dict[str, Any]:
        """One pass, see `engine_child.one_pass`.

        Raises:
            EngineError: the process ended instead.
        """
        self._send(task)
        return self._result()

    def stop(self) -> None:
        """End the process and the engine's own."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_result` says why
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _result(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        overdue = threading.Event()

        def give_up() -> None:
            overdue.set()
            self.stop()

        watchdog = threading.Timer(self.limit_s, give_up)
        watchdog.start()
        try:
            for line in self._process.stdout:
                if line.startswith(MARK):
                    return json.loads(line.removeprefix(MARK))
        finally:
            watchdog.cancel()
        why = f"did not answer within {self.limit_s:g} s" if overdue.is_set() else "ended"
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()[-_TAIL:]
        raise EngineError(f"arm {self.name} {why} (exit code {code}):\n" + "\n".join(lines))


def with_root_on_path(env: Mapping[str, str]) -> dict[str, str]:
    """`env` with this repository importable, which `benchmarks.instruments` must be in a worker."""
    path = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    return dict(env) | {"PYTHONPATH": os.pathsep.join(path)}
