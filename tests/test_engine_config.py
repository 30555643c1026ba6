"""What the finished configuration of an engine is refused for."""

from __future__ import annotations

import pytest
from packaging.version import Version

from vllm_dspark.config import DSparkConfig, DSparkConfigError
from vllm_dspark.integration import engine_config


@pytest.mark.parametrize(
    ("method", "version", "kernels", "variable", "refused"),
    [
        ("standard", "0.32.0", "auto", "", False),
        ("block", "0.32.0+cpu", "auto", "", True),
        ("block", "0.32.0", "triton", "reference", True),
        ("block", "0.32.0", "triton", "", False),
        ("block", "0.32.0", "auto", "triton", False),
        ("block", "0.33.0", "auto", "", False),
    ],
)
def test_blocks_that_are_not_sampled_exactly_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    method: str, version: str, kernels: str, variable: str, refused: bool,
) -> None:  # fmt: skip
    """Only where vLLM 0.32's own kernels would verify by blocks; the variable beats the option."""
    monkeypatch.setenv("DSPARK_KERNELS", variable)
    monkeypatch.setattr(engine_config, "require_supported_vllm", lambda: Version(version))
    config = DSparkConfig.from_additional_config({"dspark": {"kernels": kernels}})
    if refused:
        with pytest.raises(DSparkConfigError, match=f"vLLM {version.split('+')[0]}.*Fix:"):
            engine_config.refuse_biased_blocks(method, config)
    else:
        engine_config.refuse_biased_blocks(method, config)
