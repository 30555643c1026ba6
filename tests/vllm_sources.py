"""Source files of the supported vLLM versions, read without importing them."""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock
from packaging.version import Version

from vllm_dspark.compat import installed_vllm

SUPPORTED = ("0.32.0", "0.33.0")
CACHE = Path(__file__).parent.parent / ".cache"

Folder = Path | zipfile.Path
Function = ast.FunctionDef | ast.AsyncFunctionDef


class NoRegistryError(RuntimeError):
    """The version's wheel is not at hand and cannot be fetched."""


def source_root(version: str) -> Folder:
    """Folder that holds `vllm/` of `version`: the installed one, or the inside of an archive
    of its wheel's source files, which is kept in the cache.

    Raises:
        NoRegistryError: the wheel cannot be downloaded; the message is pip's.
    """
    installed = installed_vllm()
    if installed is not None and installed.base_version == version:
        spec = importlib.util.find_spec("vllm")
        assert spec is not None
        assert spec.origin is not None
        return Path(spec.origin).parent.parent
    archive = CACHE / f"vllm-{version}-sources.zip"
    CACHE.mkdir(exist_ok=True)
    with FileLock(archive.with_suffix(".lock")):  # test processes start together
        if not archive.is_file():
            _keep_sources(_download(version), archive)
    return zipfile.Path(archive)


def _download(version: str) -> Path:
    folder = CACHE / f"vllm-{version}-wheel"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--python-version=3.12", "--platform=manylinux_2_28_x86_64"]
    command += ["--dest", str(folder), f"vllm=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        shutil.rmtree(folder, ignore_errors=True)
        raise NoRegistryError(f"vllm {version} cannot be fetched: {done.stderr.strip()[-500:]}")
    return wheels[0]


def _keep_sources(wheel: Path, archive: Path) -> None:
    part = archive.with_suffix(".part")
    with (
        zipfile.ZipFile(wheel) as whole,
        zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as sources,
    ):
        for name in whole.namelist():
            if name.startswith("vllm/") and name.endswith(".py"):
                sources.writestr(name, whole.read(name))
    part.rename(archive)
    shutil.rmtree(wheel.parent)


class Sources:
    """Looking up definitions in one version's files.

    Args:
        version: one of SUPPORTED.

    Raises:
        NoRegistryError: see `source_root`.
    """

    def __init__(self, version: str) -> None:
        self.version = Version(version)
        self.root = source_root(version)
        self._modules: dict[str, ast.Module | None] = {}

    def module(self, name: str) -> ast.Module | None:
        """Syntax tree of a module or a package's __init__, None if there is none."""
        if name not in self._modules:
            path = name.replace(".", "/")
            files = (self.root / f"{path}.py", self.root / f"{path}/__init__.py")
            file = next((file for file in files if file.is_file()), None)
            self._modules[name] = None if file is None else ast.parse(file.read_text("utf-8"))
        return self._modules[name]

    def find(self, target: str) -> ast.AST | None:
        """Definition of "module:qualified.name", through imports and base classes."""
        module, _, path = target.partition(":")
        tree = self.module(module)
        found: ast.AST | None = None
        for i, name in enumerate(path.split(".")):
            scope = tree if i == 0 else found
            if scope is None:
                return None
            found = _definition(scope, name)
            if found is None and i == 0:
                found = self._imported(module, name)
            elif found is None and isinstance(scope, ast.ClassDef):
                found = self._inherited(module, scope, name)
        return found

    def function(self, target: str) -> Function | None:
        """As `find`, for functions and methods only."""
        found = self.find(target)
        return found if isinstance(found, Function) else None

    def assigned(self, target: str) -> set[str]:
        """Names of attributes that methods of a class and its bases assign to self, and the
        names declared in their bodies."""
        names: set[str] = set()
        for _, cls in self._lineage(target):
            for node in ast.walk(cls):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    names.add(node.attr)
            for node in cls.body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    names.add(node.target.id)
        return names

    def _lineage(self, target: str) -> Iterator[tuple[str, ast.ClassDef]]:
        module = target.partition(":")[0]
        cls = self.find(target)
        if not isinstance(cls, ast.ClassDef):
            return
        yield module, cls
        for base in cls.bases:
            if isinstance(base, ast.Name):
                home = self._home(module, base.id)
                if home is not None:
                    yield from self._lineage(f"{home}:{base.id}")

    def _home(self, module: str, name: str) -> str | None:
        """Module that defines what `module` calls `name`."""
        tree = self.module(module)
        if tree is None:
            return None
        if _definition(tree, name) is not None:
            return module
        for node in _statements(tree.body):
            if isinstance(node, ast.ImportFrom) and name in [a.name for a in node.names]:
                origin = node.module or ""
                if node.level:
                    origin = ".".join([*module.split(".")[: -node.level], origin])
                return self._home(origin, name)
        return None

    def _imported(self, module: str, name: str) -> ast.AST | None:
        home = self._home(module, name)
        return None if home in (None, module) else self.find(f"{home}:{name}")

    def _inherited(self, module: str, cls: ast.ClassDef, name: str) -> ast.AST | None:
        for base in cls.bases:
            if isinstance(base, ast.Name) and (home := self._home(module, base.id)):
                found = self.find(f"{home}:{base.id}.{name}")
                if found is not None:
                    return found
        return None


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs when a module is imported, inside `if` and `try` too."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])


def _definition(scope: ast.AST, name: str) -> ast.AST | None:
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, Function | ast.ClassDef) and node.name == name:
            return node
    return None


def parameters(function: Function) -> tuple[str, ...]:
    """Names as `inspect.signature` gives them."""
    arguments = function.args
    plain = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    star = [arguments.vararg.arg] if arguments.vararg else []
    keywords = [a.arg for a in arguments.kwonlyargs]
    double = [arguments.kwarg.arg] if arguments.kwarg else []
    return (*plain, *star, *keywords, *double)


def calls(function: ast.AST, name: str) -> list[int]:
    """Lines of calls of a function or method called `name`."""
    return sorted(
        node.lineno
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and name in (getattr(node.func, "id", None), getattr(node.func, "attr", None))
    )
