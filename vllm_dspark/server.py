"""One `vllm serve` process, from start to certain end.

Examples, tests and benchmarks start real servers; this is the one place that knows how to wait
for one, how to tell why it failed, and how to leave nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

_TAIL = 30  # lines of the server's log in an error
_GRACE = 20.0  # seconds between asking a server to stop and ending its process group


class ServerError(RuntimeError):
    """The server cannot be started, never got healthy, or died; the message says why."""


def free_port() -> int:
    """A port on the loopback interface that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class VllmServer:
    """Context manager around `vllm serve MODEL ARGS`; inside, the server is healthy.

    Args:
        model: path or hub id of the target.
        args: further arguments of `vllm serve`, without host and port.
        env: environment of the process, this one's if None (see `vllm_dspark.cpu`).
        port: port on 127.0.0.1; a free one if None.
        startup_s: seconds until it must be healthy.
        log: file for the server's output; a temporary one if None.

    Raises:
        ServerError: on entering, if the port is taken, no vLLM is installed, the process ends,
            or `startup_s` runs out. The last lines of the server's output are in the message.
    """

    def __init__(
        self,
        model: str,
        args: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        port: int | None = None,
        startup_s: float = 600.0,
        log: Path | None = None,
    ) -> None:
        self.port = free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self.startup_s = startup_s
        self.env = dict(os.environ if env is None else env)
        self.command = [_vllm(), "serve", model, "--host", "127.0.0.1", "--port", str(self.port)]
        self.command += args
        self.log = log or Path(tempfile.mkstemp(prefix="vllm-serve-", suffix=".log")[1])
        self._keep_log = log is not None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> VllmServer:
        self.start()
        try:
            self.wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        if kind is None and not self._keep_log:
            self.log.unlink(missing_ok=True)

    def start(self) -> None:
        """Start the process in a group of its own."""
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                raise ServerError(
                    f"port {self.port} is in use. Fix: stop what listens there, or give another."
                )
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command, env=self.env, stdout=log, stderr=log, start_new_session=True
            )

    def wait_until_healthy(self) -> None:
        """Return once /health answers 200."""
        import httpx

        deadline = time.monotonic() + self.startup_s
        while time.monotonic() < deadline:
            self.check_alive()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5.0).status_code == 200:
                    return
            time.sleep(0.5)
        raise self._error(f"was not healthy within {self.startup_s:.0f} s")

    def check_alive(self) -> None:
        """Raise ServerError if the process has ended."""
        assert self._process is not None, "start() first"
        code = self._process.poll()
        if code is not None:
            raise self._error(f"ended with exit code {code}")

    def stop(self) -> None:
        """End the process and all its children: politely, then for certain."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # an engine process that outlived its parent
        process.wait()

    def tail(self, lines: int = _TAIL) -> str:
        """The last lines of the server's output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def counters(self) -> dict[str, float]:
        """The server's Prometheus counters and gauges; see `summed`."""
        import httpx
        from prometheus_client.parser import text_string_to_metric_families

        text = httpx.get(f"{self.url}/metrics", timeout=30.0).text
        return summed(text_string_to_metric_families(text))

    def _error(self, what: str) -> ServerError:
        return ServerError(
            f"the server {what}: {' '.join(self.command)}\nlast lines of {self.log}:\n{self.tail()}"
        )


def summed(families: Iterable[Any]) -> dict[str, float]:
    """Samples of Prometheus' metric families by name, summed over labels. What has a depth is there
    by depth, too, as `name[depth]`."""
    totals: dict[str, float] = {}
    for family in families:
        for sample in family.samples:
            names = [sample.name]
            if depth := sample.labels.get("depth"):
                names.append(f"{sample.name}[{depth}]")
            for name in names:
                totals[name] = totals.get(name, 0.0) + sample.value
    return totals


def _vllm() -> str:
    beside_python = Path(sys.executable).parent / "vllm"
    found = str(beside_python) if beside_python.is_file() else shutil.which("vllm")
    if found is None:
        raise ServerError('found no `vllm` command. Fix: pip install "vllm-dspark[cuda]" (or cpu).')
    return found
