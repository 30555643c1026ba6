"""How drafts are verified where the request leaves it open, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from packaging.version import Version

from vllm_dspark.config import DSparkConfig, DSparkConfigError
from vllm_dspark.integration import rejection_method
from vllm_dspark.integration.candidate_mode import ours_are_wanted


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
    monkeypatch.setattr(rejection_method, "require_supported_vllm", lambda: Version(version))
    config = DSparkConfig.from_additional_config({"dspark": {"kernels": kernels}})
    ours = ours_are_wanted(config)
    if refused:
        with pytest.raises(DSparkConfigError, match=f"vLLM {version.split('+')[0]}.*Fix:"):
            rejection_method.refuse_biased_blocks(method, ours)
    else:
        rejection_method.refuse_biased_blocks(method, ours)


@pytest.mark.parametrize(
    ("kernels", "variable", "faster", "wanted"),
    [
        ("auto", "", True, True),
        ("auto", "", False, False),
        ("auto", "reference", True, False),
        ("reference", "", True, False),
        ("triton", "", False, True),
    ],
)
def test_ours_are_wanted_where_they_are_faster_or_asked_for(
    monkeypatch: pytest.MonkeyPatch, kernels: str, variable: str, faster: bool, wanted: bool
) -> None:
    monkeypatch.setenv("DSPARK_KERNELS", variable)
    config = DSparkConfig.from_additional_config({"dspark": {"kernels": kernels}})
    assert ours_are_wanted(config, faster) is wanted


DRAWN = {"method": "dspark", "num_speculative_tokens": 7, "draft_sample_method": "probabilistic"}


@pytest.mark.parametrize(
    ("version", "changes", "options", "method"),
    [
        ("0.33.0", {}, {}, "block"),
        ("0.33.0", {}, {"depth": 2}, "block"),
        ("0.33.0", {}, {"kernels": "triton"}, "block"),
        ("0.33.0", {"rejection_sample_method": "standard"}, {}, "standard"),
        ("0.33.0", {"rejection_sample_method": "fly"}, {}, "fly"),
        ("0.33.0", {"draft_sample_method": "greedy"}, {}, None),
        ("0.33.0", {"num_speculative_tokens": 1}, {}, None),
        ("0.33.0", {"num_speculative_tokens": None}, {}, None),
        ("0.33.0", {}, {"depth": 1}, None),
        ("0.33.0", {}, {"enabled": False}, None),
        ("0.32.0+cpu", {}, {}, None),
        ("0.32.0", {}, {"kernels": "triton"}, None),
    ],
)
def test_drawn_drafts_are_verified_by_blocks_where_that_gains_and_is_exact(
    monkeypatch: pytest.MonkeyPatch,
    version: str, changes: dict[str, Any], options: dict[str, Any], method: str | None,
) -> None:  # fmt: skip
    """Nothing else is touched. None: nothing is said, which is vLLM's "standard"."""
    monkeypatch.setattr(rejection_method, "require_supported_vllm", lambda: Version(version))
    config = DSparkConfig.from_additional_config({"dspark": options})
    asked = DRAWN | changes
    expected = asked if method is None else asked | {"rejection_sample_method": method}
    assert rejection_method.with_method(asked, config, watermarked=False) == expected
    assert rejection_method.with_method(asked, config, watermarked=True) == asked
