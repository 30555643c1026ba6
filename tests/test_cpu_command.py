"""`vllm-dspark cpu -- COMMAND`: what the system refuses to run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("first", ["", "#!/no/such/program\n"], ids=["none", "of nothing there"])
def test_a_script_that_cannot_be_run_is_one_line(tmp_path: Path, first: str) -> None:
    """A shell would run a script without its first line by itself; the system does not."""
    script = tmp_path / "script"
    script.write_text(f"{first}echo never\n")
    script.chmod(0o755)
    command = shutil.which("vllm-dspark", path=str(Path(sys.executable).parent))
    assert command is not None
    done = subprocess.run([command, "cpu", "--", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"'{script}' cannot be run: ")
    assert f"Fix: a line such as #!/bin/sh, or vllm-dspark cpu -- sh {script}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
