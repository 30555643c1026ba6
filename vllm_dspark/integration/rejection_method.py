"""How drafts are verified that were drawn: one by one, or blocks as a whole.

Verification by blocks accepts more of what was drawn from the drafter's own distribution, and the
same of what was not. It looks at drafts that it then drops: vLLM 0.32 draws those again with the
same noise, so that what is emitted leans away from them; 0.33 and our kernels do not.
"""

from __future__ import annotations

from typing import Any

from packaging.version import Version

from vllm_dspark.compat import require_supported_vllm
from vllm_dspark.config import DSparkConfig, DSparkConfigError

_EXACT_SINCE = Version("0.33")


def with_method(asked: dict[str, Any], config: DSparkConfig, watermarked: bool) -> dict[str, Any]:
    """A speculative config that says how drafts are verified: as it was asked for, or else by
    blocks where that gains and every kernel that may verify is exact.

    Args:
        asked: complete, with method dspark.
        watermarked: tokens are, which vLLM has for drafts that are verified one by one.
    """
    gamma = asked.get("num_speculative_tokens") or 1
    drafts = gamma if config.depth == "auto" else config.depth
    drawn = asked.get("draft_sample_method") == "probabilistic" and drafts > 1
    exact = require_supported_vllm() >= _EXACT_SINCE
    if not (config.enabled and drawn and exact) or watermarked:
        return asked
    return {"rejection_sample_method": "block"} | asked


def refuse_biased_blocks(method: str, by_ours: bool) -> None:
    """
    Args:
        by_ours: whether our kernels verify.

    Raises:
        DSparkConfigError: blocks are to be verified as a whole by kernels that are not exact.
    """
    found = require_supported_vllm()
    if method == "block" and not by_ours and found < _EXACT_SINCE:
        raise DSparkConfigError(
            f'rejection_sample_method is "block", which vLLM {found} does not sample exactly. Fix: '
            '"standard", vLLM 0.33, or --additional-config \'{"dspark": {"kernels": "triton"}}\'.'
        )
