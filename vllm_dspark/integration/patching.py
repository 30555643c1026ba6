"""Replacing one function of vLLM's, on the record.

A `Patch` names its target, why it is needed, where upstream it would belong and the parameters
the target must have. It refuses to touch a target that looks different, does nothing when
applied twice, and can be undone. `LEDGER` holds all patches of this package; nothing is applied
by importing them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from vllm_dspark.compat import IncompatibleVllmError, require_supported_vllm, supported_range

_MARK = "__dspark_patch__"


@dataclass(frozen=True)
class Patch:
    """One seam into vLLM.

    Attributes:
        target: "module:qualified.name" of the function.
        reason: what the replacement adds.
        upstream: the hook in vLLM that would make this patch unnecessary.
        parameters: the names that the target's parameters must have, in order; by vLLM version
            ("0.32") where supported versions differ.
        wrap: takes the original function, returns the replacement.
        static: the target is a staticmethod of its class.
    """

    target: str
    reason: str
    upstream: str
    parameters: tuple[str, ...] | Mapping[str, tuple[str, ...]]
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
    static: bool = False

    def apply(self) -> bool:
        """Put the replacement in place; False if it already was.

        Raises:
            IncompatibleVllmError: the target is missing or has other parameters.
        """
        owner, name = self._owner()
        original = getattr(owner, name, None)
        if getattr(original, _MARK, None) is self:
            return False
        self._require_parameters(original)
        assert original is not None
        replacement = functools.wraps(original)(self.wrap(original))
        setattr(replacement, _MARK, self)
        setattr(owner, name, staticmethod(replacement) if self.static else replacement)
        return True

    def undo(self) -> bool:
        """Put the original back; False if the patch was not in place."""
        owner, name = self._owner()
        current: Any = getattr(owner, name, None)
        if getattr(current, _MARK, None) is not self:
            return False
        original = current.__wrapped__
        setattr(owner, name, staticmethod(original) if self.static else original)
        return True

    def is_applied(self) -> bool:
        """Whether the replacement is in place in this process."""
        owner, name = self._owner()
        return getattr(getattr(owner, name, None), _MARK, None) is self

    def check(self) -> None:
        """Look at the target without touching it.

        Raises:
            IncompatibleVllmError: as `apply` would.
        """
        owner, name = self._owner()
        current = getattr(owner, name, None)
        if getattr(current, _MARK, None) is not self:
            self._require_parameters(current)

    def parameters_on(self, version: Version) -> tuple[str, ...]:
        """The parameters that the target must have on a vLLM version."""
        if isinstance(self.parameters, tuple):
            return self.parameters
        return self.parameters[f"{version.major}.{version.minor}"]

    def _owner(self) -> tuple[Any, str]:
        module, _, path = self.target.partition(":")
        *parents, name = path.split(".")
        try:
            owner: Any = importlib.import_module(module)
            for parent in parents:
                owner = getattr(owner, parent)
        except (ImportError, AttributeError) as error:
            raise self._incompatible(f"cannot reach it: {error}") from error
        return owner, name

    def _require_parameters(self, function: Any) -> None:
        if function is None:
            raise self._incompatible("found nothing of that name")
        found = tuple(inspect.signature(function).parameters)
        if found != self.parameters_on(require_supported_vllm()):
            raise self._incompatible(f"found parameters ({', '.join(found)})")

    def _incompatible(self, found: str) -> IncompatibleVllmError:
        version = require_supported_vllm()
        return IncompatibleVllmError(
            f"vllm-dspark wants to extend {self.target} ({self.reason}) and {found}; needed are "
            f"parameters ({', '.join(self.parameters_on(version))}). This is vLLM {version}, "
            f"supported is {supported_range()}. Fix: install a supported, unmodified vLLM, or "
            "leave dspark out of VLLM_PLUGINS."
        )
