"""The tiny pair, and why it cannot become a given shape."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.errors import BenchmarkError
from benchmarks.inflation.checkpoint import Checkpoint
from benchmarks.inflation.shapes import LayerSizes, Shape
from vllm_dspark.checkpoint import DrafterSpec, TargetShape, drafter_spec, pair_problems
from vllm_dspark.drafters import drafters_beside


class CannotInflateError(BenchmarkError, ValueError):
    """A pair cannot become the shape that was asked for. The message lists all reasons."""


@dataclass(frozen=True)
class Pair:
    """A target's checkpoint and its drafter's."""

    target: Checkpoint
    drafter: Checkpoint
    spec: DrafterSpec

    @property
    def layers(self) -> int:
        """Layers of the target."""
        return int(self.target.config["num_hidden_layers"])

    @property
    def vocab_size(self) -> int:
        """Words of the target, V. The last one is the dead word."""
        return int(self.target.config["vocab_size"])

    @property
    def lm_head(self) -> str:
        """The tensor that serves as the target's LM head: its embedding if the two are tied."""
        tied = bool(self.target.config.get("tie_word_embeddings"))
        return "model.embed_tokens.weight" if tied else "lm_head.weight"


def open_pair(folder: Path, drafter: Path | None = None) -> Pair:
    """A target's folder and a drafter's, by default the only drafter inside of it.

    Raises:
        CheckpointError: a folder is no checkpoint.
        CannotInflateError: no drafter was named, and not exactly one is there.
        DrafterMismatchError: the drafter's config makes no sense.
    """
    target = Checkpoint(folder)
    if drafter is None:
        beside = drafters_beside(str(folder))
        if len(beside) != 1:
            listed = ", ".join(map(str, beside)) or "none"
            raise CannotInflateError(
                f"one drafter is needed in {folder}, found {listed}. Fix: name it (--drafter)."
            )
        drafter = beside[0]
    checkpoint = Checkpoint(drafter)
    spec = drafter_spec(str(drafter), checkpoint.config)
    if spec is None:
        raise CannotInflateError(f"{drafter} is no DSpark drafter. Fix: name one (--drafter).")
    return Pair(target, checkpoint, spec)


def require_inflatable(pair: Pair, shape: Shape) -> None:
    """Refuse what the construction cannot do.

    Raises:
        CannotInflateError: every reason, as what was found and what is needed.
    """
    if problems := _kind_problems(pair) or _size_problems(pair, shape):
        listed = "; ".join(f"({i}) {problem}" for i, problem in enumerate(problems, 1))
        raise CannotInflateError(
            f"{pair.target.folder} cannot be inflated: {listed}. Fix: take a shape that is large "
            f"enough, or a pair trained for it (examples/tiny-python suits Qwen3's shapes)."
        )


def _kind_problems(pair: Pair) -> list[str]:
    """What is wrong with the pair, whatever the shape."""
    config, spec = pair.target.config, pair.spec
    problems = pair_problems(
        spec, TargetShape(LayerSizes.of(config).hidden_size, pair.vocab_size, pair.layers)
    )
    if list(config.get("architectures") or ()) != ["Qwen3ForCausalLM"]:
        problems.append(
            f"the target's architectures are {config.get('architectures')}, needed is "
            "Qwen3ForCausalLM"
        )
    if spec.family != "qwen3" or spec.layout != "deepspec" or not spec.predicts_from_anchor:
        problems.append(
            f"the drafter is a {spec.describe()}, needed is a qwen3 one in deepspec format with "
            "a predicting anchor"
        )
    if not (spec.has_confidence and spec.confidence_with_markov):
        problems.append("the drafter lacks a confidence head with Markov features")
    if spec.vocab_size != pair.vocab_size or spec.draft_vocab_size != pair.vocab_size:
        problems.append(
            f"the drafter reads {spec.vocab_size} words and proposes {spec.draft_vocab_size}, "
            f"needed are the target's {pair.vocab_size}"
        )
    for checkpoint in (pair.target, pair.drafter):
        problems += _unsupported(checkpoint)
    return problems


def _unsupported(checkpoint: Checkpoint) -> list[str]:
    """Parts of Qwen3 that the construction does not cover."""
    problems, name = [], checkpoint.folder.name
    if checkpoint.config.get("attention_bias"):
        problems.append(f"{name} has attention_bias, needed is none")
    types = set(checkpoint.config.get("layer_types") or ["full_attention"])
    if types != {"full_attention"}:
        problems.append(
            f"{name} has layers of {', '.join(sorted(types))}, needed is full_attention"
        )
    dtypes = {checkpoint.tensor(tensor).dtype for tensor in checkpoint.names}
    if dtypes != {torch.bfloat16}:
        found = ", ".join(sorted(map(str, dtypes)))
        problems.append(f"{name} holds weights in {found}, needed is torch.bfloat16 throughout")
    return problems


def _size_problems(pair: Pair, shape: Shape) -> list[str]:
    """What the shape is too small for, or cannot be changed to."""
    target, drafter = LayerSizes.of(pair.target.config), LayerSizes.of(pair.drafter.config)
    problems = []
    for who, sizes in (("target", target), ("drafter", drafter)):
        if sizes.head_dim != shape.head_dim:
            problems.append(
                f"{who}: head_dim is {sizes.head_dim}, needed is the shape's {shape.head_dim}, "
                "because rotary embedding and head norms cannot be padded"
            )
        group, room = (s.num_attention_heads // s.num_key_value_heads for s in (sizes, shape))
        for what, found, needed in (
            ("hidden_size", shape.hidden_size, 2 * sizes.hidden_size),
            ("num_key_value_heads", shape.num_key_value_heads, sizes.num_key_value_heads),
            ("query heads per KV head", room, group),
            ("intermediate_size", shape.intermediate_size, sizes.intermediate_size),
        ):
            problems += _too_small(f"{who}: {what}", found, needed)
    spec = pair.spec
    filled_up = shape.draft_target_layers - len(spec.target_layer_ids)
    problems += _too_small("draft_target_layers", filled_up, 0, len(spec.target_layer_ids))
    # The last layer cannot be read by the drafter, and is a real one only if there are two.
    layers = max(pair.layers, 2) + max(filled_up, 0)
    problems += _too_small("num_hidden_layers", shape.num_hidden_layers, layers)
    problems += _too_small("vocab_size", shape.vocab_size, pair.vocab_size)
    problems += _too_small("draft_layers", shape.draft_layers, spec.num_layers)
    problems += _too_small("markov_rank", shape.markov_rank, spec.rank)
    if shape.tie_word_embeddings and not pair.target.config.get("tie_word_embeddings"):
        problems.append("the shape ties LM head and embedding, the target has two different ones")
    return problems


def _too_small(what: str, found: int, needed: int, offset: int = 0) -> list[str]:
    if found >= needed:
        return []
    return [f"{what} of the shape is {found + offset}, needed is at least {needed + offset}"]
