"""Reading a drafter's config in both published formats, and refusing what does not fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.pairs import drafter_config
from vllm_dspark.checkpoint import (
    DrafterMismatchError,
    DrafterSpec,
    TargetShape,
    drafter_spec,
    pair_problems,
)

QWEN3_TARGET: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "intermediate_size": 64,
}
GEMMA4_TARGET: dict[str, Any] = QWEN3_TARGET | {
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "num_key_value_heads": 2,
    "global_head_dim": 64,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
}
SHAPE = TargetShape(hidden_size=32, vocab_size=64, num_layers=3)

# deepseek-ai/dspark_qwen3_4b_block7 as documented, for Qwen/Qwen3-4B.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen3DSparkModel"],
    "model_type": "qwen3",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "vocab_size": 151936,
    "num_hidden_layers": 5,
    "num_target_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "block_size": 7,
    "target_layer_ids": [1, 9, 17, 25, 33],
    "mask_token_id": 151669,
    "markov_rank": 256,
    "markov_head_type": "vanilla",
    "enable_confidence_head": True,
    "confidence_head_with_markov": True,
}
QWEN3_4B = TargetShape(hidden_size=2560, vocab_size=151936, num_layers=36)
QWEN3_8B = TargetShape(hidden_size=4096, vocab_size=151936, num_layers=36)


def read(config: dict[str, Any]) -> DrafterSpec:
    spec = drafter_spec("the drafter", config)
    assert spec is not None
    return spec


def test_published_drafter_reads_and_fits() -> None:
    spec = read(PUBLISHED)
    assert (spec.family, spec.layout, spec.num_layers) == ("qwen3", "deepspec", 5)
    assert (spec.depth, spec.predicts_from_anchor) == (7, True)
    assert spec.target_layer_ids == (1, 9, 17, 25, 33)
    assert (spec.rank, spec.head_type, spec.mask_token_id) == (256, "vanilla", 151669)
    assert (spec.has_confidence, spec.confidence_with_markov) == (True, True)
    assert (spec.head_dim, spec.num_heads, spec.num_kv_heads) == (128, 32, 8)
    assert pair_problems(spec, QWEN3_4B) == []
    assert pair_problems(spec, QWEN3_4B, 7) == []


def test_published_drafter_does_not_fit_the_next_size() -> None:
    """Same family, vocabulary and depth: only the width tells the two targets apart."""
    (problem,) = pair_problems(read(PUBLISHED), QWEN3_8B)
    assert "2560" in problem
    assert "4096" in problem


@pytest.mark.parametrize("head_type", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("confidence", [True, False])
@pytest.mark.parametrize("predicts", [True, False])
def test_both_formats_give_the_same_spec(head_type: str, confidence: bool, predicts: bool) -> None:
    """Formats differ in nesting and in counting target layers from 0 or 1, in nothing else."""
    deepspec, speculators = (
        read(
            drafter_config(
                QWEN3_TARGET,
                layout=layout,
                head_type=head_type,
                confidence=confidence,
                sample_from_anchor=predicts,
                target_layer_ids=(0, 2),
            )
        )
        for layout in ("deepspec", "speculators")
    )
    assert deepspec.layout == "deepspec"
    assert speculators.layout == "speculators"
    assert deepspec.target_layer_ids == (0, 2)
    assert dataclasses.replace(deepspec, layout="speculators") == speculators


@pytest.mark.parametrize(
    ("layout", "predicts", "depth"),
    [
        ("deepspec", None, 7),  # the paper's block: the anchor predicts
        ("speculators", None, 6),  # 1+N: it does not, unless the config says so
        ("speculators", True, 7),
        ("speculators", False, 6),
    ],
)
def test_depth_follows_the_block_layout(layout: str, predicts: bool | None, depth: int) -> None:
    config = drafter_config(QWEN3_TARGET, layout=layout, sample_from_anchor=predicts)
    assert read(config).depth == depth


def test_gemma4_uses_its_global_attention_sizes() -> None:
    """Its draft layers attend fully, with the wider heads; values are the keys' projection."""
    spec = read(drafter_config(GEMMA4_TARGET))
    assert (spec.family, spec.shares_kv, spec.head_dim, spec.num_kv_heads) == (
        "gemma4",
        True,
        64,
        1,
    )
    apart = read(drafter_config(GEMMA4_TARGET | {"attention_k_eq_v": False}))
    assert (apart.shares_kv, apart.num_kv_heads) == (False, 2)


def test_head_dim_is_derived_where_it_is_not_given() -> None:
    config = drafter_config({k: v for k, v in QWEN3_TARGET.items() if k != "head_dim"})
    assert read(config).head_dim == 16


@pytest.mark.parametrize(
    "architectures",
    [["K3DSparkModel"], ["DSparkDraftModel"], ["MuseSparkDSparkModel"], ["Qwen3ForCausalLM"], []],
    ids=str,
)
def test_architectures_that_vllm_serves_alone_are_left_to_it(architectures: list[str]) -> None:
    config = drafter_config(QWEN3_TARGET) | {"architectures": architectures, "model_type": "other"}
    assert drafter_spec("x", config) is None


def test_shared_architecture_name_is_told_apart_by_model_type() -> None:
    """DSparkDraftModel is Qwen3's for model_type qwen3, DeepSeek-V4's otherwise."""
    config = drafter_config(QWEN3_TARGET) | {"architectures": ["DSparkDraftModel"]}
    assert read(config).family == "qwen3"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"block_size": None}, "lacks 'block_size'"),
        ({"target_layer_ids": None}, "lacks 'target_layer_ids'"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"num_attention_heads": None}, "lacks 'num_attention_heads'"),
        ({"num_key_value_heads": None}, "lacks 'num_key_value_heads'"),
        ({"num_hidden_layers": None}, "lacks 'num_hidden_layers'"),
        ({"intermediate_size": None}, "lacks 'intermediate_size'"),
        ({"mask_token_id": None}, "lacks 'mask_token_id'"),
        ({"mask_token_id": 64}, "mask_token_id is 64, outside its vocabulary of 64"),
        ({"mask_token_id": -1}, "mask_token_id is -1"),
        ({"markov_head_type": "lstm"}, "'lstm', known are 'vanilla', 'gated', 'rnn'"),
        ({"markov_rank": 0}, "markov_rank is 0"),  # that is DFlash
        ({"markov_rank": None}, 'method "dflash"'),
        ({"target_layer_ids": [1, 0]}, "[1, 0] are not strictly increasing"),
        ({"target_layer_ids": [1, 1]}, "[1, 1] are not strictly increasing"),
        ({"target_layer_ids": []}, "target_layer_ids"),
        ({"block_size": 1, "sample_from_anchor": False}, "leaves no position to draft"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": "7"}, "block_size"),  # JSON written by hand: another type
        ({"block_size": 7.5}, "block_size"),
        ({"markov_rank": "8"}, "markov_rank"),
        ({"mask_token_id": "63"}, "mask_token_id"),
        ({"target_layer_ids": 3}, "target_layer_ids"),
        ({"target_layer_ids": ["a"]}, "target_layer_ids"),
    ],
    ids=str,
)
def test_each_fault_of_a_config_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(DrafterMismatchError) as caught:
        read(drafter_config(QWEN3_TARGET) | changes)
    assert named in str(caught.value)
    assert "'the drafter'" in str(caught.value)
    assert "Fix:" in str(caught.value)


@pytest.mark.parametrize("layer", ["absent", None, "qwen3"])
def test_speculators_config_without_layer_config(layer: str | None) -> None:
    config = drafter_config(QWEN3_TARGET, layout="speculators")
    del config["transformer_layer_config"]
    if layer != "absent":
        config["transformer_layer_config"] = layer
    with pytest.raises(DrafterMismatchError, match="transformer_layer_config"):
        read(config)


def test_all_faults_of_a_config_are_listed() -> None:
    changes = {"markov_head_type": "lstm", "mask_token_id": 99, "block_size": None}
    with pytest.raises(DrafterMismatchError) as caught:
        read(drafter_config(QWEN3_TARGET) | changes)
    assert len(caught.value.problems) == 3
    for number, problem in enumerate(caught.value.problems, 1):
        assert f"({number}) {problem}" in str(caught.value)


@pytest.mark.parametrize(
    ("target", "tokens", "named"),
    [
        (SHAPE, None, None),
        (SHAPE, 1, None),
        (SHAPE, 7, None),
        (SHAPE, 8, "num_speculative_tokens is 8, but block_size 7 was trained to draft 7"),
        (dataclasses.replace(SHAPE, hidden_size=48), None, "width 32, the target's are 48"),
        (dataclasses.replace(SHAPE, vocab_size=65), None, "64 words, the target's 65"),
        (dataclasses.replace(SHAPE, vocab_size=60), None, None),  # padded drafter: fits
        (dataclasses.replace(SHAPE, num_layers=2), None, "[2] are not among the target's layers"),
    ],
    ids=str,
)
def test_each_mismatch_of_a_pair_is_named(
    target: TargetShape, tokens: int | None, named: str | None
) -> None:
    spec = read(drafter_config(QWEN3_TARGET, target_layer_ids=(-1, 0, 2)))  # -1: the embedding
    problems = pair_problems(spec, target, tokens)
    assert len(problems) == (named is not None)
    assert named is None or named in problems[0]


def test_all_mismatches_of_a_pair_are_listed() -> None:
    spec = read(drafter_config(QWEN3_TARGET))
    assert len(pair_problems(spec, TargetShape(1, 1000, 1), 99)) == 4


def test_narrow_drafter_is_compared_by_the_width_it_reads() -> None:
    """speculators' drafters may be narrower than the target whose states they read."""
    config = drafter_config(QWEN3_TARGET | {"hidden_size": 16}, layout="speculators")
    config["target_hidden_size"] = 32
    assert pair_problems(read(config), SHAPE) == []
    assert pair_problems(read(config), dataclasses.replace(SHAPE, hidden_size=16)) != []
