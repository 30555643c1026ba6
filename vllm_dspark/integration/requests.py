"""What a request says about its own verification, and what the policy must know of it.

Sent with a request as `SamplingParams.extra_args`, over HTTP as `vllm_xargs`:

    dspark_max_verified    drafts to verify in a step at most, 0 to γ; γ if not given
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_VERIFIED = "dspark_max_verified"
_KNOWN = (MAX_VERIFIED,)


class RequestOptionError(ValueError):
    """An option of a request cannot be used.

    Attributes:
        option: its name.
        value: what was given.
    """

    def __init__(self, message: str, option: str, value: Any) -> None:
        super().__init__(message)
        self.option = option
        self.value = value


@dataclass(frozen=True)
class RequestFacts:
    """What the policy knows of a request, from its sampling parameters."""

    sampled: bool = False  # temperature above zero
    constrained: bool = False  # a grammar restricts its output
    max_verified: int | None = None  # drafts a step, None for all

    @classmethod
    def of(cls, sampling_params: Any) -> RequestFacts:
        """From vLLM's SamplingParams, which were checked in the front end; None is a request
        that generates nothing."""
        if sampling_params is None:
            return cls()
        return cls(
            sampled=sampling_params.temperature > 0,
            constrained=sampling_params.structured_outputs is not None,
            max_verified=(sampling_params.extra_args or {}).get(MAX_VERIFIED),
        )


def check_options(extra_args: Mapping[str, Any] | None, gamma: int) -> None:
    """Refuse options of ours that are unknown or out of range; others are none of our business.

    Args:
        extra_args: of the request.
        gamma: γ of the engine.

    Raises:
        RequestOptionError: naming what was given and what is allowed.
    """
    for name, value in (extra_args or {}).items():
        if not name.startswith("dspark"):
            continue
        if name not in _KNOWN:
            near = difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.0)[0]
            raise RequestOptionError(
                f"unknown option {name!r} in extra_args; nearest is {near!r}", name, value
            )
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= gamma:
            raise RequestOptionError(
                f"{name} is {value!r}; needed is a whole number from 0 to {gamma}, the drafts "
                "that this engine draws",
                name,
                value,
            )
