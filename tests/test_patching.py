"""`Patch` on a small module made for the test."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from packaging.version import Version

from vllm_dspark.compat import IncompatibleVllmError
from vllm_dspark.integration import patching
from vllm_dspark.integration.patching import Patch

SOURCE = '''
def function(a, b=2):
    """Its own words."""
    return ("original", a, b)


class Owner:
    def method(self, a):
        return ("original", self.tag, a)

    @staticmethod
    def static(a):
        return ("original", a)

    class Inner:
        def method(self, a):
            return ("original", a)

    tag = "owner"


class Heir(Owner):
    pass
'''
NAME = "patching_target_of_this_test"


@pytest.fixture
def module() -> Iterator[Any]:
    """A fresh module, importable by name."""
    made = types.ModuleType(NAME)
    exec(SOURCE, made.__dict__)
    sys.modules[NAME] = made
    yield made
    del sys.modules[NAME]


def extend(original: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return ("extended", *original(*args, **kwargs))

    return replacement


def patch(path: str, *parameters: str, **changes: Any) -> Patch:
    fields: dict[str, Any] = {
        "target": f"{NAME}:{path}",
        "reason": "the reason given",
        "upstream": "a hook",
        "parameters": parameters,
        "wrap": extend,
    }
    return Patch(**(fields | changes))


TARGETS = {
    "function": (("a", "b"), lambda module: module.function(1), ("original", 1, 2)),
    "Owner.method": (("self", "a"), lambda m: m.Owner().method(1), ("original", "owner", 1)),
    "Owner.static": (("a",), lambda module: module.Owner.static(1), ("original", 1)),
    "Owner.Inner.method": (("self", "a"), lambda m: m.Owner.Inner().method(1), ("original", 1)),
}


@pytest.mark.parametrize("path", TARGETS)
def test_apply_and_undo(module: Any, path: str) -> None:
    parameters, call, original = TARGETS[path]
    seam = patch(path, *parameters, static=path == "Owner.static")
    assert not seam.is_applied()
    assert call(module) == original
    assert seam.apply() is True
    assert seam.is_applied()
    assert call(module) == ("extended", *original)
    assert seam.undo() is True
    assert not seam.is_applied()
    assert call(module) == original
    assert seam.undo() is False


@pytest.mark.parametrize("path", TARGETS)
def test_applying_twice_extends_once(module: Any, path: str) -> None:
    """Plugins load more than once in a process."""
    parameters, call, original = TARGETS[path]
    seam = patch(path, *parameters, static=path == "Owner.static")
    assert [seam.apply(), seam.apply(), seam.apply()] == [True, False, False]
    assert call(module) == ("extended", *original)


def test_static_method_stays_static(module: Any) -> None:
    """On an instance too, it must not get the instance as its first argument."""
    seam = patch("Owner.static", "a", static=True)
    seam.apply()
    assert module.Owner().static(1) == ("extended", "original", 1)
    assert module.Heir.static(1) == ("extended", "original", 1)
    seam.undo()
    assert module.Owner().static(1) == ("original", 1)


def test_replacement_looks_like_the_original(module: Any) -> None:
    """Others may inspect it, and so does a second plugin that patches the same function."""
    patch("function", "a", "b").apply()
    assert module.function.__doc__ == "Its own words."
    assert module.function.__name__ == "function"
    assert list(inspect.signature(module.function).parameters) == ["a", "b"]


def test_two_patches_of_one_target(module: Any) -> None:
    """Each knows its own: the second wraps the first, and neither takes the other for itself."""
    first = patch("function", "a", "b")
    second = dataclasses.replace(first, reason="another")
    assert first.apply()
    assert second.apply()
    assert module.function(1) == ("extended", "extended", "original", 1, 2)
    assert second.undo()
    assert module.function(1) == ("extended", "original", 1, 2)
    assert first.undo()
    assert module.function(1) == ("original", 1, 2)


@pytest.mark.parametrize(
    "parameters",
    [("a",), ("a", "b", "c"), ("b", "a"), ("a", "x"), ()],
    ids=["dropped", "added", "swapped", "renamed", "none"],
)
@pytest.mark.parametrize("act", [Patch.apply, Patch.check])
def test_other_parameters_are_refused(
    module: Any, parameters: tuple[str, ...], act: Callable[[Patch], Any]
) -> None:
    """The target stays as it was; the message names target, reason, found, needed and fix."""
    before = module.function
    with pytest.raises(IncompatibleVllmError) as caught:
        act(patch("function", *parameters))
    assert module.function is before
    message = str(caught.value)
    assert f"{NAME}:function" in message
    assert "the reason given" in message
    assert "found parameters (a, b)" in message
    assert f"needed are parameters ({', '.join(parameters)})" in message
    assert "Fix:" in message


@pytest.mark.parametrize(("version", "fits"), [("0.32.0", True), ("0.33.1", False)])
def test_parameters_by_version(
    module: Any, monkeypatch: pytest.MonkeyPatch, version: str, fits: bool
) -> None:
    """Where supported versions differ, each is held to its own list."""
    monkeypatch.setattr(patching, "require_supported_vllm", lambda: Version(version))
    seam = patch("function", parameters={"0.32": ("a", "b"), "0.33": ("a", "b", "c")})
    if fits:
        seam.apply()
        assert seam.is_applied()
    else:
        with pytest.raises(IncompatibleVllmError, match=r"needed are parameters \(a, b, c\)"):
            seam.apply()
        assert not seam.is_applied()


@pytest.mark.parametrize(
    ("target", "found"),
    [
        (f"{NAME}:gone", "found nothing of that name"),
        (f"{NAME}:Owner.gone", "found nothing of that name"),
        (f"{NAME}:Gone.method", "cannot reach it"),
        ("no_such_module_anywhere:function", "cannot reach it"),
    ],
)
@pytest.mark.parametrize("act", [Patch.apply, Patch.check])
def test_missing_target_is_named(
    module: Any, target: str, found: str, act: Callable[[Patch], Any]
) -> None:
    with pytest.raises(IncompatibleVllmError) as caught:
        act(patch("x", "a", target=target))
    assert target in str(caught.value)
    assert found in str(caught.value)


def test_check_does_not_touch(module: Any) -> None:
    before = dict(vars(module)), dict(vars(module.Owner))
    for path, (parameters, _, _) in TARGETS.items():
        patch(path, *parameters).check()
    assert (dict(vars(module)), dict(vars(module.Owner))) == before


def test_check_passes_where_it_is_applied(module: Any) -> None:
    seam = patch("function", "a", "b")
    seam.apply()
    seam.check()
    assert seam.is_applied()


def test_error_inside_wrap_leaves_the_target(module: Any) -> None:
    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        raise ZeroDivisionError

    before = module.function
    with pytest.raises(ZeroDivisionError):
        patch("function", "a", "b", wrap=broken).apply()
    assert module.function is before
