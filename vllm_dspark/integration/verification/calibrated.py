"""The calibration artifact of an engine, from its configuration."""

from __future__ import annotations

from typing import Any

from vllm_dspark.calibration.finding import Found, find_artifact
from vllm_dspark.config import DSparkConfig


def calibration_of(vllm_config: Any, config: DSparkConfig) -> Found:
    """See `find_artifact`.

    Args:
        vllm_config: vLLM's, finished.
        config: ours.

    Raises:
        ArtifactError: an artifact was named and cannot be used.
    """
    speculative = vllm_config.speculative_config
    return find_artifact(
        config.calibration,
        target=vllm_config.model_config.model,
        drafter=speculative.draft_model_config.model,
        gamma=speculative.num_speculative_tokens,
        dtype=str(vllm_config.model_config.dtype).removeprefix("torch."),
    )
