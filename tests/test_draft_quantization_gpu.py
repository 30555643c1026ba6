"""On a GPU: a drafter in FP8 accepts as much, and what is emitted stays the target's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import test_losslessness as exact
from tests.engine import TINY, Request, engine, observed, run
from tests.test_gpu import GRAPHS, TWO_RANKS, speculation
from tests.verification_cases import runner_of

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

FP8 = torch.float8_e4m3fn
MANY = [
    Request(f"import os\n\n\ndef function_{i}(", {"max_tokens": 96, "ignore_eos": True})
    for i in range(64)
]


def options(quantization: str, **changes: Any) -> dict[str, Any]:
    chosen = {"verification": "all", "draft_quantization": quantization}
    return GRAPHS | {"dtype": "bfloat16", "additional_config": {"dspark": chosen}} | changes


def test_accepted_length_stays_and_the_target_is_left_alone() -> None:
    """Within 3 %: scales that are wrong, or of another layer, cost most of it."""
    lengths = {}
    for quantization in ("none", "fp8"):
        with engine(TINY, speculation("greedy"), **options(quantization)) as llm:
            runner = runner_of(llm)
            drafter, target = runner.speculator.model, runner.model
            layer = drafter.model.layers[0]
            products = layer.self_attn.qkv_proj, layer.mlp.down_proj, drafter.lm_head
            expected = FP8 if quantization == "fp8" else torch.bfloat16
            assert {product.weight.dtype for product in products} == {expected}
            assert (drafter.lm_head is target.lm_head) is (quantization == "none")
            assert target.lm_head.weight.dtype == torch.bfloat16
            assert drafter.model._fused_kv_weight.dtype == torch.bfloat16
            with observed(llm) as seen:
                run(llm, MANY)
            lengths[quantization] = seen[0].accepted_length
    assert lengths["fp8"] == pytest.approx(lengths["none"], rel=0.03)
    assert lengths["fp8"] > 2.0


COMPILED = {"compilation_config": GRAPHS["compilation_config"] | {"mode": 3}}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(COMPILED, id="torch.compile"),
        pytest.param({"tensor_parallel_size": 2}, id="two ranks", marks=TWO_RANKS),
    ],
)
def test_accepted_length_stays_in_other_engines(changes: dict[str, Any]) -> None:
    """Code that was compiled for other weights, or shards with scales of another rank, lose it."""
    lengths = {}
    for quantization in ("none", "fp8"):
        with engine(TINY, speculation("greedy"), **options(quantization, **changes)) as llm:
            with observed(llm) as seen:
                run(llm, MANY)
            lengths[quantization] = seen[0].accepted_length
    assert lengths["fp8"] == pytest.approx(lengths["none"], rel=0.03)
    assert lengths["fp8"] > 2.0


@pytest.mark.parametrize("method", ["standard", "block"])
def test_sampled_output_follows_the_target(tmp_path: Path, method: str) -> None:
    """Chi-square over all continuations of three words: verification goes by what FP8 drew from,
    not by what the checkpoint's own numbers would have."""
    exact.write_pair(tmp_path)
    regime = exact.REGIMES["temperature 1"]
    config = {
        "method": "dspark",
        "draft_sample_method": "probabilistic",
        "rejection_sample_method": method,
        "num_speculative_tokens": exact.GAMMA,
    }
    with engine(tmp_path, config, **options("fp8", skip_tokenizer_init=True)) as llm:
        assert runner_of(llm).speculator.model.lm_head.weight.dtype == FP8
        with observed(llm) as seen:
            samples = exact.sample(llm, regime, 4000)
    assert 0.05 < seen[0].accepted / seen[0].drafted < 0.95
    joint = exact.exact_joint(tmp_path, regime)
    assert exact.p_value(samples, joint) > exact.SIGNIFICANCE
