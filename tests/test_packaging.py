"""What gets installed, from each kind of distribution, seen by a Python without site-packages."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tests.child import clean_environment

ROOT = Path(__file__).parent.parent
CPU_FILES = (
    "site/dspark_interpreter/__init__.py",
    "site/dspark_interpreter/compiler.py",
    "site/dspark_interpreter/driver.py",
    "site/dspark_interpreter-1.0.dist-info/METADATA",
    "site/dspark_interpreter-1.0.dist-info/entry_points.txt",
    "vllm_cpu_metadata/vllm-0.32.0+cpu.dist-info/METADATA",
)

SETUPTOOLS = importlib.metadata.version("setuptools")

pytestmark = pytest.mark.skipif(
    Version(SETUPTOOLS) < Version("77"),
    reason=f"builds without isolation need setuptools 77, found {SETUPTOOLS}",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source tree without leftovers of earlier builds, and with one kernel file more."""
    tree = tmp_path_factory.mktemp("packaging") / "source"
    skip = shutil.ignore_patterns("__pycache__")
    for folder in ("vllm_dspark", "kernels"):
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=skip)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree / file)
    assert (tree / "vllm_dspark" / "kernels").is_symlink()
    (tree / "kernels" / "probe.py").write_text("ANSWER = 42\n")
    return tree


def call(*command: str | Path, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def built(source: Path) -> dict[str, Path]:
    """The sdist, and the wheel built from it, as `python -m build` does for a release."""
    out = source.parent / "dist"
    call("-m", "build", "--no-isolation", "--outdir", out, source, cwd=source.parent)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


def install(kind: str, source: Path, origin: Path) -> Path:
    target = source.parent / f"from_{kind}"
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
    call("-m", "pip", "install", *options, target, origin, cwd=source.parent)
    return target


def install_editable(source: Path) -> Path:
    """The wheel that pip makes of `-e`, unpacked: links to the source tree and metadata."""
    code = f"import setuptools.build_meta as b; b.build_editable({str(source.parent)!r})"
    before = set(source.parent.glob("*.whl"))
    call("-c", code, cwd=source)
    (wheel,) = set(source.parent.glob("*.whl")) - before
    target = source.parent / "from_editable"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


@pytest.fixture(scope="module", params=["sdist", "wheel", "tree", "editable"])
def installed(request: pytest.FixtureRequest, source: Path, built: dict[str, Path]) -> Path:
    """A folder that an installation filled, one for each kind."""
    if request.param == "editable":
        return install_editable(source)
    return install(request.param, source, built.get(request.param, source))


@pytest.fixture
def ask(installed: Path, tmp_path: Path) -> Callable[[str], Any]:
    """Runs code where only the standard library and the installation can be imported."""

    def run(code: str) -> Any:
        start = f"import json, site; site.addsitedir({str(installed)!r})\n"
        script = start + textwrap.dedent(code) + "\nprint(json.dumps(answer))"
        done = subprocess.run(
            [sys.executable, "-S", "-c", script],
            env=clean_environment(),
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return run


def test_package_and_kernels_import(ask: Callable[[str], Any]) -> None:
    """Kernels live outside the package's folder and come in through a symlink."""
    code = """
        import vllm_dspark
        import vllm_dspark.kernels
        from vllm_dspark.kernels.probe import ANSWER
        answer = [vllm_dspark.__version__, ANSWER]
    """
    version, probe = ask(code)
    assert probe == 42
    assert version[0].isdigit()
    assert "uninstalled" not in version


def test_no_top_level_kernels(ask: Callable[[str], Any], installed: Path) -> None:
    """It would stand in the way of the package of that name that transformers imports."""
    code = "import importlib.util; answer = str(importlib.util.find_spec('kernels'))"
    assert ask(code) == "None"
    assert not (installed / "kernels").exists()


@pytest.mark.parametrize("name", CPU_FILES)
def test_interpreter_files_are_there(ask: Callable[[str], Any], name: str) -> None:
    code = f"""
        import pathlib, vllm_dspark.cpu
        answer = (pathlib.Path(vllm_dspark.cpu.__file__).parent / {name!r}).is_file()
    """
    assert ask(code)


def test_calibration_prompts_are_there(ask: Callable[[str], Any]) -> None:
    """A wheel without them has nothing to calibrate with."""
    code = """
        import importlib.util, pathlib
        package = pathlib.Path(importlib.util.find_spec("vllm_dspark").origin).parent
        answer = (package / "calibration" / "prompts.txt").is_file()
    """
    assert ask(code) is True


def test_entry_points(ask: Callable[[str], Any]) -> None:
    """vLLM's plugin and our command, and no Triton backend before the opt-in."""
    code = """
        import sys
        from importlib.metadata import entry_points
        from vllm_dspark import cpu
        groups = "vllm.general_plugins", "console_scripts", "triton.backends"
        def seen():
            return [[[e.name, e.value] for e in entry_points(group=g)] for g in groups]
        before = seen()
        sys.path.insert(0, str(cpu.SITE))
        answer = [*before, seen()[2]]
    """
    plugins, scripts, backends, backends_after = ask(code)
    assert plugins == [["dspark", "vllm_dspark.plugin:register"]]
    assert scripts == [["vllm-dspark", "vllm_dspark.cli:main"]]
    assert backends == []
    assert backends_after == [["cpu", "dspark_interpreter"]]


def test_requirements_leave_vllm_to_the_extras(ask: Callable[[str], Any]) -> None:
    """Installing the plugin must never exchange the vLLM, torch or triton that is there."""
    code = "from importlib.metadata import requires; answer = requires('vllm-dspark')"
    plain = [text for text in ask(code) if "extra ==" not in text]
    assert sorted(name.split(">")[0] for name in plain) == [
        "packaging",
        "pydantic",
        "rich",
        "typer",
    ]


def test_sdist_holds_what_a_build_needs(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "vllm_dspark/py.typed"} <= names
    assert "vllm_dspark/kernels/probe.py" in names


def test_wheel_is_for_every_platform_and_typed(built: dict[str, Path]) -> None:
    assert built["wheel"].name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(built["wheel"]) as archive:
        names = archive.namelist()
    assert "vllm_dspark/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"vllm_dspark"}
