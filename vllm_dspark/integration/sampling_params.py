"""The request seam on sampling parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def wrap_validate_spec_decode(original: Callable[..., Any]) -> Callable[..., Any]:
    """Accept min_p and logit_bias where DSpark speculates.

    vLLM refuses both with any speculation, which the V1 runner needs. DSpark runs on the V2
    runner alone, whose rejection sampler puts every row of target logits, drafts' rows
    included, through the same processing as a plain sampling step.
    """

    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if speculative_config is None or speculative_config.method != "dspark":
            original(self, speculative_config)

    return _validate_spec_decode
