"""Random checkpoints in the published formats: a target, and DSpark drafters for it.

    write_target(folder)                              # Qwen3ForCausalLM or Gemma4ForCausalLM
    write_drafter(folder / "dspark", folder)          # its drafter, found by the bare word

They are files as they are published: `config.json` and fp32 safetensors, without a tokenizer
(give the engine `skip_tokenizer_init=True` and token ids). The weights are random, but such
that target and drafter know of each other: the target's next word hangs mostly on the last
one, and the Markov head is a low-rank copy of that table. So drafts are neither always
accepted nor always rejected, greedily and by sampling.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from vllm_dspark.checkpoint import DrafterSpec, drafter_spec
from vllm_dspark.weights import Shape, expected_weights

_MIXING = 0.4  # what a target's layer adds to the residual stream, against an embedding of 1


def write_target(
    folder: Path,
    *,
    family: str = "qwen3",
    vocab_size: int = 64,
    hidden_size: int = 32,
    num_layers: int = 3,
    num_heads: int = 2,
    num_kv_heads: int = 1,
    head_dim: int = 32,
    intermediate_size: int = 64,
    max_position_embeddings: int = 512,
    soft_cap: float | None = 30.0,
    seed: int = 0,
    scale: float = 2.0,
) -> Path:
    """Write a target checkpoint with transformers' own model class and `save_pretrained`.

    Args:
        folder: made if it is not there.
        family: "qwen3" or "gemma4" (text only, every layer with full attention, values shared
            with keys; its full-attention heads are twice `head_dim` wide, as published ones).
        head_dim: vLLM's CPU attention takes 32, 64, 80, 96, 112, 128, ...
        soft_cap: Gemma4's `final_logit_softcapping`; Qwen3 has none.
        seed: the weights are a function of it.
        scale: standard deviation of the logits. About 1 makes flat distributions, 4 and more
            makes them peaked.

    Returns:
        `folder`.
    """
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_position_embeddings,
        "layer_types": ["full_attention"] * num_layers,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    published: dict[str, Any] = {}
    if family == "qwen3":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))
    elif family == "gemma4":
        published = {"global_head_dim": 2 * head_dim, "num_global_key_value_heads": num_kv_heads}
        config = transformers.Gemma4TextConfig(
            **sizes,
            **published,
            attention_k_eq_v=True,
            final_logit_softcapping=soft_cap,
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=vocab_size,
        )
        model = transformers.Gemma4ForCausalLM(config)
    else:
        raise ValueError(f"family is {family!r}, known are 'qwen3' and 'gemma4'")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = _random_weights(shapes, seed)
    mixers = ("o_proj", "down_proj")
    if family == "gemma4":  # it norms again behind them
        mixers = ("post_attention_layernorm", "post_feedforward_layernorm")
    for name, weight in weights.items():
        if name.split(".")[-2] in mixers:
            weight *= _MIXING
        if family == "gemma4" and name.endswith("q_norm.weight"):
            weight *= (2 * head_dim) ** -0.5  # Gemma4 does not scale its attention scores
    if family == "gemma4":  # it multiplies embeddings by sqrt(width) itself
        weights["model.embed_tokens.weight"] *= hidden_size**-0.5
    fading = 0.85 ** torch.arange(hidden_size)  # most of it in few directions, as in real ones
    weights["lm_head.weight"] *= scale * fading / fading.square().mean().sqrt()
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    # Newer transformers fold these two into `per_layer_config`; published files spell them out.
    path = folder / "config.json"
    written = json.loads(path.read_text()) | published
    if published:
        written.pop("per_layer_config", None)
    path.write_text(json.dumps(written, indent=2) + "\n")
    return folder


def write_drafter(
    folder: Path,
    target_folder: Path,
    *,
    seed: int = 1,
    scale: float = 1.0,
    agreement: float = 0.8,
    **options: Any,
) -> Path:
    """Write a DSpark drafter for the target in `target_folder`.

    Args:
        folder: made if it is not there.
        seed: the weights are a function of it.
        scale: factor on the Markov bias and the confidence logit. The base logits' spread is
            the target's, whose LM head is shared (Gemma4's drafter holds a copy).
        agreement: in [0, 1), share of the target's own next-word table in the draft logits; the
            rest is noise. 0 is a drafter that knows nothing of its target.
        options: head type, layout, sizes; see `drafter_config`.

    Returns:
        `folder`.
    """
    config = drafter_config(json.loads((target_folder / "config.json").read_text()), **options)
    if "speculators_config" in config:
        config["speculators_config"]["verifier"]["name_or_path"] = str(target_folder)
    spec = drafter_spec(str(folder), config)
    assert spec is not None
    target = load_file(target_folder / "model.safetensors")
    weights = _random_weights(expected_weights(spec), seed)
    _teach(weights, spec, target, scale, agreement)
    if spec.family == "gemma4":
        weights["embed_tokens.weight"] = target["model.embed_tokens.weight"].clone()
        weights["lm_head.weight"] = target["lm_head.weight"].clone()
        for i in range(spec.num_layers):
            weights[f"layers.{i}.layer_scalar"] = torch.ones(1)
            weights[f"layers.{i}.self_attn.q_norm.weight"] *= spec.head_dim**-0.5
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def drafter_config(
    target_config: Mapping[str, Any],
    *,
    head_type: str = "vanilla",
    layout: str = "deepspec",
    block_size: int = 7,
    num_layers: int = 1,
    rank: int = 8,
    target_layer_ids: Iterable[int] = (0, 1),
    confidence: bool = True,
    with_markov: bool = True,
    sample_from_anchor: bool | None = None,
) -> dict[str, Any]:
    """Contents of config.json of a drafter for the target with `target_config`.

    Args:
        head_type: "vanilla", "gated" or "rnn".
        layout: "deepspec" (the target's config.json with DSpark's fields added) or
            "speculators" (layer config nested, target layers counted from one).
        block_size: query tokens of a block; γ is the same, or one less where the anchor does
            not predict.
        num_layers: layers of the draft backbone.
        rank: r of the Markov head.
        target_layer_ids: 0-based target layers whose hidden states it reads.
        confidence: with a confidence head.
        with_markov: the confidence head reads the Markov embedding too.
        sample_from_anchor: the anchor predicts (γ = block_size) or not (γ = block_size − 1).
            None writes no such field, which means yes in "deepspec", no in "speculators".
    """
    layer = dict(target_config) | {
        "num_hidden_layers": num_layers,
        "layer_types": ["full_attention"] * num_layers,
        "tie_word_embeddings": False,
    }
    layer.pop("architectures")
    dspark: dict[str, Any] = {
        "block_size": block_size,
        "mask_token_id": target_config["vocab_size"] - 1,
        "markov_rank": rank,
        "markov_head_type": head_type,
        "enable_confidence_head": confidence,
        "confidence_head_with_markov": confidence and with_markov,
    }
    if sample_from_anchor is not None:
        dspark["sample_from_anchor"] = sample_from_anchor
    if layout == "deepspec":
        architecture = {"qwen3": "Qwen3DSparkModel", "gemma4_text": "Gemma4DSparkModel"}
        return layer | {
            "architectures": [architecture[layer["model_type"]]],
            "num_target_layers": target_config["num_hidden_layers"],
            "target_layer_ids": list(target_layer_ids),
            **dspark,
        }
    if layout != "speculators":
        raise ValueError(f"layout is {layout!r}, known are 'deepspec' and 'speculators'")
    depth = block_size if sample_from_anchor else block_size - 1
    return {
        "architectures": ["DSparkSpeculator"],
        "speculators_model_type": "dspark",
        "transformer_layer_config": layer,
        "aux_hidden_state_layer_ids": [i + 1 for i in target_layer_ids],
        "draft_vocab_size": target_config["vocab_size"],
        "target_hidden_size": target_config["hidden_size"],
        "speculators_config": {
            "algorithm": "dspark",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": depth}],
            "verifier": {
                "name_or_path": "random target",
                "architectures": target_config["architectures"],
            },
        },
        **dspark,
    }


def _random_weights(shapes: Mapping[str, Shape], seed: int) -> dict[str, torch.Tensor]:
    """Norms near one; biases small; matrices that keep the scale of what goes through."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in sorted(shapes.items()):
        noise = torch.randn(shape, generator=generator)
        if name.endswith("layer_scalar"):
            weights[name] = torch.ones(shape)
        elif name.endswith("norm.weight"):
            weights[name] = 1 + 0.1 * noise
        elif name.endswith(".bias"):
            weights[name] = 0.1 * noise
        elif name.endswith(("embed_tokens.weight", "markov_w1.weight")):
            weights[name] = noise
        else:
            weights[name] = noise / math.sqrt(shape[-1])
    return weights


def _teach(
    weights: dict[str, torch.Tensor],
    spec: DrafterSpec,
    target: Mapping[str, torch.Tensor],
    scale: float,
    agreement: float,
) -> None:
    """Mix the best rank-r copy of the target's logits on its embeddings alone into W1 W2."""
    embedding = target["model.embed_tokens.weight"]
    normed = embedding / embedding.square().mean(-1, keepdim=True).sqrt()
    table = normed @ target["lm_head.weight"].T  # [V, V], row: the last word
    left, strength, right = torch.linalg.svd(table)
    w1, w2, rank = "markov_head.markov_w1.weight", "markov_head.markov_w2.weight", spec.rank
    known1, known2 = left[:, :rank], right[:rank].T * strength[:rank]
    spread = known1.std()
    opened = 2 if spec.head_type == "gated" else 1  # random gates are half open
    weights[w1] = (1 - agreement) * weights[w1] + agreement * known1 / spread
    weights[w2] = scale * ((1 - agreement) * weights[w2] + agreement * known2 * spread * opened)
    weights["norm.weight"] *= 1 - agreement  # the base logits are noise
    if spec.head_type == "rnn":  # let the output see the embedding as it is
        joint = weights["markov_head.joint_proj.weight"]
        joint[2 * rank :] *= 1 - agreement
        joint[2 * rank :, rank : 2 * rank] += agreement * torch.eye(rank)
    if spec.has_confidence:
        weights["confidence_head.proj.weight"] *= scale / (1 - agreement)
