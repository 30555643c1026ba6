"""Which weights a drafter checkpoint must hold, and whether its files hold them.

Only safetensors headers are read, so the check costs milliseconds whatever the model's size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from vllm_dspark.checkpoint import DrafterMismatchError, DrafterSpec

Shape = tuple[int, ...]

# Parts whose names a checkpoint may only use for weights that its config announces.
_CLAIMED = ("markov_head.", "confidence_head.", "layers.")


def expected_weights(spec: DrafterSpec) -> dict[str, Shape]:
    """Name → shape of every weight that must be there. Embedding and LM head are not: they
    are the target's unless the checkpoint brings its own."""
    width, rank = spec.hidden_size, spec.rank
    context = len(spec.target_layer_ids) * spec.target_hidden_size
    weights: dict[str, Shape] = {
        "fc.weight": (width, context),
        "hidden_norm.weight": (width,),
        "norm.weight": (width,),
        "markov_head.markov_w1.weight": (spec.vocab_size, rank),
        "markov_head.markov_w2.weight": (spec.draft_vocab_size, rank),
    }
    if spec.head_type == "gated":
        weights["markov_head.gate_proj.weight"] = (rank, width + rank)
        weights["markov_head.gate_proj.bias"] = (rank,)
    if spec.head_type == "rnn":
        weights["markov_head.joint_proj.weight"] = (3 * rank, 2 * rank + width)
        weights["markov_head.joint_proj.bias"] = (3 * rank,)
    if spec.has_confidence:
        features = width + (rank if spec.confidence_with_markov else 0)
        weights["confidence_head.proj.weight"] = (1, features)
        weights["confidence_head.proj.bias"] = (1,)
    if spec.family == "gemma4":  # scales its own embedding, so it cannot share the target's
        weights["embed_tokens.weight"] = (spec.vocab_size, width)
        weights["lm_head.weight"] = (spec.draft_vocab_size, width)
    for i in range(spec.num_layers):
        weights |= {f"layers.{i}.{name}": shape for name, shape in _layer_weights(spec).items()}
    return weights


def _layer_weights(spec: DrafterSpec) -> dict[str, Shape]:
    width, mlp, head = spec.hidden_size, spec.intermediate_size, spec.head_dim
    queries, keys = spec.num_heads * head, spec.num_kv_heads * head
    weights: dict[str, Shape] = {
        "self_attn.q_proj.weight": (queries, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, queries),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "mlp.gate_proj.weight": (mlp, width),
        "mlp.up_proj.weight": (mlp, width),
        "mlp.down_proj.weight": (width, mlp),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    if not spec.shares_kv:
        weights["self_attn.v_proj.weight"] = (keys, width)
    if spec.family == "gemma4":
        weights["pre_feedforward_layernorm.weight"] = (width,)
        weights["post_feedforward_layernorm.weight"] = (width,)
    return weights


def weight_problems(spec: DrafterSpec, found: Mapping[str, Shape | None]) -> list[str]:
    """Why a checkpoint's weights do not match its config, one phrase a reason.

    Args:
        found: name → shape of the weights that are there; None where the shape is unknown.
            Shapes are not compared for quantized checkpoints.
    """
    expected = expected_weights(spec)
    missing = sorted(expected.keys() - found.keys())
    optional = {f"layers.{i}.layer_scalar" for i in range(spec.num_layers)}
    extra = sorted(
        name
        for name in found.keys() - expected.keys() - optional
        if name.startswith(_CLAIMED) and not spec.quantized
    )
    problems = []
    if missing and not (spec.quantized and not any(m.startswith(_CLAIMED[:2]) for m in missing)):
        problems.append(f"weights are missing: {_shorten(missing)}")
    if extra:
        problems.append(
            f"weights are there that its config ({spec.head_type} head, "
            f"{'a' if spec.has_confidence else 'no'} confidence head, {spec.num_layers} layers) "
            f"does not announce: {_shorten(extra)}"
        )
    if not spec.quantized:
        problems += [
            f"{name} has shape {list(shape)}, its config says {list(expected[name])}"
            for name, shape in sorted(found.items())
            if shape is not None and name in expected and shape != expected[name]
        ]
    if spec.draft_vocab_size < spec.vocab_size:
        needed = {"lm_head.weight", "d2t"}
        if lacking := sorted(needed - found.keys()):
            problems.append(
                f"draft_vocab_size {spec.draft_vocab_size} is below vocab_size {spec.vocab_size}, "
                f"which needs {_shorten(lacking)}"
            )
    return problems


def read_headers(folder: Path) -> dict[str, Shape | None] | None:
    """Name → shape of all weights in a checkpoint folder's safetensors files, from their
    headers alone; None if the folder holds none (another format, which vLLM may know).

    Raises:
        DrafterMismatchError: a file is truncated or unreadable, or a shard is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in _shards(folder, index)]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    found: dict[str, Shape | None] = {}
    for file in files:
        if not file.is_file():
            raise DrafterMismatchError(str(folder), [f"its index names {file.name}, not there"])
        found |= _read_header(folder, file)
    return found


def _shards(folder: Path, index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{index.name} is truncated or damaged: {error!r}"
        raise DrafterMismatchError(str(folder), [problem]) from None


def _read_header(folder: Path, file: Path) -> dict[str, Shape | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as weights:
            return {
                name: tuple(weights.get_slice(name).get_shape())
                for name in weights.keys()  # noqa: SIM118 - not a mapping
            }
    except SafetensorError as error:
        size = file.stat().st_size
        raise DrafterMismatchError(
            str(folder), [f"{file.name} ({size} bytes) is truncated or damaged: {error}"]
        ) from None


def _shorten(names: Iterable[str], limit: int = 6) -> str:
    names = list(names)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
