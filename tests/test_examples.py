"""`make serve` as a user runs it: ready line, a curl that works, and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from vllm_dspark.server import free_port

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_serve_until_told_to_stop(how: signal.Signals) -> None:
    """The printed curl answers; Ctrl-C and a polite kill both end the server and its engine."""
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    command = [sys.executable, "-m", "examples.serve", "--port", str(free_port())]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        printed = ""
        for line in process.stdout:
            printed += line
            if "Ctrl-C stops it" in line:
                break
        curl = re.search(r"^curl .*?\}'$", printed, re.DOTALL | re.MULTILINE)
        assert curl is not None, printed
        answer = subprocess.run(["bash", "-c", curl[0]], capture_output=True, text=True, check=True)
        assert '"completion_tokens":64' in answer.stdout
        children = psutil.Process(process.pid).children(recursive=True)
        assert children, "the server and its engine"
        process.send_signal(how)
        process.wait(60)
        assert not psutil.wait_procs(children, timeout=10)[1]
    finally:
        process.kill()
