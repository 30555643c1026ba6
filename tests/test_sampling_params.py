"""Which sampling parameters pass with which kind of speculation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dspark.plugin import register

REFUSED_BY_VLLM: list[dict[str, Any]] = [{"min_p": 0.1}, {"logit_bias": {3: 2.0}}]


def validate(params: dict[str, Any], method: str | None) -> None:
    """vLLM's own check of a request against the engine's speculation."""
    from vllm import SamplingParams

    register()
    config = None if method is None else SimpleNamespace(method=method)
    SamplingParams(**params)._validate_spec_decode(config)


@pytest.mark.parametrize("params", [*REFUSED_BY_VLLM, {}], ids=str)
def test_dspark_takes_every_parameter(params: dict[str, Any]) -> None:
    validate(params, "dspark")


@pytest.mark.parametrize("params", REFUSED_BY_VLLM, ids=str)
@pytest.mark.parametrize("method", ["ngram", "dflash", "eagle3"])
def test_other_methods_still_refuse(params: dict[str, Any], method: str) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="not yet supported with speculative decoding"):
        validate(params, method)


@pytest.mark.parametrize("params", [*REFUSED_BY_VLLM, {}], ids=str)
def test_without_speculation_nothing_is_refused(params: dict[str, Any]) -> None:
    validate(params, None)


@pytest.mark.parametrize("method", ["ngram", "dflash"])
def test_other_methods_go_on_with_plain_parameters(method: str) -> None:
    validate({"temperature": 0.5, "top_p": 0.9}, method)
