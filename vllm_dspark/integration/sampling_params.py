"""The request seam on sampling parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_dspark.integration.requests import RequestOptionError, check_options


def wrap_validate_spec_decode(original: Callable[..., Any]) -> Callable[..., Any]:
    """Accept min_p and logit_bias where DSpark speculates, and check a request's own options.

    vLLM refuses both with any speculation, which the V1 runner needs. DSpark runs on the V2
    runner alone, whose rejection sampler puts every row of target logits, drafts' rows
    included, through the same processing as a plain sampling step.

    Our options (see `requests`) are refused here, in the front end, so that the sender gets a 400
    and the engine never sees them.
    """

    def _validate_spec_decode(self: Any, speculative_config: Any) -> None:
        if speculative_config is None or speculative_config.method != "dspark":
            original(self, speculative_config)
            return
        if not self.extra_args:
            return
        try:
            check_options(self.extra_args, speculative_config.num_speculative_tokens)
        except RequestOptionError as error:
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(
                str(error), parameter=error.option, value=error.value
            ) from None

    return _validate_spec_decode
