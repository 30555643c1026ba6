"""What a DSpark drafter checkpoint is, and whether it fits its target.

Two formats are published. DeepSpec's config.json is the target's with DSpark's fields added;
speculators' nests the layer config under `transformer_layer_config` and counts target layers
from one. `DrafterSpec` is what both say, in DeepSpec's terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_dspark.heads import HEADS

_FAMILIES = {
    "Qwen3DSparkModel": "qwen3",
    "Qwen3OmniDSparkModel": "qwen3",
    "DSparkSpeculator": "qwen3",
    "Gemma4DSparkModel": "gemma4",
}


class DrafterMismatchError(ValueError):
    """A drafter checkpoint is broken, or does not belong to its target."""

    def __init__(self, drafter: str, problems: list[str]) -> None:
        listed = "; ".join(f"({i}) {p}" for i, p in enumerate(problems, 1))
        super().__init__(
            f"DSpark drafter {drafter!r} cannot be used: {listed}. Fix: give the drafter that was "
            "trained for this target (--speculative-config dspark:PATH_OR_ID), or fetch its "
            "checkpoint anew."
        )
        self.problems = problems


@dataclass(frozen=True)
class TargetShape:
    """The sizes of a target that a drafter depends on."""

    hidden_size: int
    vocab_size: int
    num_layers: int


@dataclass(frozen=True)
class DrafterSpec:
    """A drafter checkpoint's config, the same for both published formats."""

    family: str  # "qwen3" or "gemma4"
    layout: str  # "deepspec" or "speculators"
    hidden_size: int
    target_hidden_size: int
    vocab_size: int  # words it can read
    draft_vocab_size: int  # words it can propose
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    shares_kv: bool  # values are the keys' projection (Gemma4's attention_k_eq_v)
    block_size: int
    predicts_from_anchor: bool  # the anchor is the first predicting position
    target_layer_ids: tuple[int, ...]  # 0-based; -1 is the embedding's output
    mask_token_id: int
    head_type: str
    rank: int
    has_confidence: bool
    confidence_with_markov: bool
    quantized: bool

    @property
    def depth(self) -> int:
        """γ, the number of tokens it drafts at most."""
        return self.block_size if self.predicts_from_anchor else self.block_size - 1

    def describe(self) -> str:
        """One phrase for log lines."""
        confidence = "no confidence head"
        if self.has_confidence:
            features = " with Markov features" if self.confidence_with_markov else ""
            confidence = f"confidence head{features}"
        anchor = "predicting anchor" if self.predicts_from_anchor else "bonus anchor"
        return (
            f"{self.family} drafter in {self.layout} format, {self.num_layers} layers, "
            f"{self.head_type} Markov head of rank {self.rank}, {confidence}, {anchor}"
        )


class _Reader:
    """Reads typed fields and collects what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def count(self, source: Mapping[str, Any], name: str, default: int | None = None) -> int:
        """A whole number of at least 1; 1 in its place, so that reading goes on."""
        value = source.get(name)
        if value is None and default is not None:
            return default
        if value is None:
            self.problems.append(f"its config.json lacks {name!r}")
        elif not _is_int(value) or value < 1:
            self.problems.append(f"{name} is {value!r}, needed is a whole number of at least 1")
        else:
            return value
        return 1

    def rank(self, config: Mapping[str, Any]) -> int:
        """The Markov head's rank; 0 and absence mean that there is no Markov head."""
        rank = config.get("markov_rank") or 0
        if not _is_int(rank) or rank < 1:
            self.problems.append(
                f"markov_rank is {rank!r}, needed is at least 1 (a drafter without a Markov head "
                'is DFlash: serve it with method "dflash")'
            )
        return rank

    def mask_token_id(self, config: Mapping[str, Any], vocab_size: int) -> int:
        """The word that stands for a position to be drafted."""
        value = config.get("mask_token_id")
        if value is None:
            self.problems.append("its config.json lacks 'mask_token_id'")
        elif not _is_int(value) or not 0 <= value < vocab_size:
            self.problems.append(
                f"mask_token_id is {value!r}, outside its vocabulary of {vocab_size}"
            )
        else:
            return value
        return 0

    def layer_ids(self, config: Mapping[str, Any], speculators: bool) -> tuple[int, ...]:
        """Target layers the drafter reads, 0-based; speculators count them from 1."""
        name = "aux_hidden_state_layer_ids" if speculators else "target_layer_ids"
        ids = config.get(name)
        if ids is None:
            self.problems.append(f"its config.json lacks {name!r}")
            return ()
        if not isinstance(ids, list | tuple) or not ids or not all(map(_is_int, ids)):
            self.problems.append(f"{name} is {ids!r}, needed is a list of layer numbers")
            return ()
        if list(ids) != sorted(set(ids)):
            self.problems.append(f"{name} {list(ids)} are not strictly increasing")
        return tuple(i - 1 for i in ids) if speculators else tuple(ids)


def drafter_spec(drafter: str, config: Mapping[str, Any]) -> DrafterSpec | None:
    """Read a drafter's config.json; None for an architecture that vLLM serves on its own
    (drafters inside DeepSeek-V4 checkpoints and other model-specific ones).

    Args:
        drafter: path or hub id, for messages.
        config: contents of config.json.

    Raises:
        DrafterMismatchError: fields are missing or make no sense; all problems are listed.
    """
    speculators = config.get("speculators_model_type") == "dspark"
    family = _family(config, speculators)
    if family is None:
        return None
    layer = config.get("transformer_layer_config") if speculators else config
    if not isinstance(layer, Mapping):
        problem = f"its transformer_layer_config is {layer!r}, needed is an object"
        raise DrafterMismatchError(drafter, [problem])
    read = _Reader()
    shares_kv = family == "gemma4" and bool(layer.get("attention_k_eq_v"))
    hidden_size = read.count(layer, "hidden_size")
    num_heads = read.count(layer, "num_attention_heads")
    vocab_size = read.count(layer, "vocab_size")
    head_dim = read.count(layer, "head_dim", max(hidden_size // num_heads, 1))
    num_kv_heads = read.count(layer, "num_key_value_heads")
    spec = DrafterSpec(
        family=family,
        layout="speculators" if speculators else "deepspec",
        hidden_size=hidden_size,
        target_hidden_size=read.count(config, "target_hidden_size", hidden_size),
        vocab_size=vocab_size,
        draft_vocab_size=read.count(config, "draft_vocab_size", vocab_size),
        num_layers=read.count(layer, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=(
            read.count(layer, "num_global_key_value_heads", num_kv_heads)
            if shares_kv
            else num_kv_heads
        ),
        head_dim=(
            read.count(layer, "global_head_dim", head_dim) if family == "gemma4" else head_dim
        ),
        intermediate_size=read.count(layer, "intermediate_size"),
        shares_kv=shares_kv,
        block_size=read.count(config, "block_size"),
        predicts_from_anchor=bool(config.get("sample_from_anchor", not speculators)),
        target_layer_ids=read.layer_ids(config, speculators),
        mask_token_id=read.mask_token_id(config, vocab_size),
        head_type=str(config.get("markov_head_type") or "vanilla").lower(),
        rank=read.rank(config),
        has_confidence=bool(config.get("enable_confidence_head", False)),
        confidence_with_markov=bool(config.get("confidence_head_with_markov", False)),
        quantized=bool(config.get("quantization_config") or layer.get("quantization_config")),
    )
    if problems := read.problems + _contradictions(spec):
        raise DrafterMismatchError(drafter, problems)
    return spec


def _family(config: Mapping[str, Any], speculators: bool) -> str | None:
    architectures = list(config.get("architectures") or [])
    if "DSparkDraftModel" in architectures and config.get("model_type") == "qwen3":
        return "qwen3"
    family = next((_FAMILIES[a] for a in architectures if a in _FAMILIES), None)
    return "qwen3" if family is None and speculators else family


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _contradictions(spec: DrafterSpec) -> list[str]:
    """What is wrong with a config as a whole, before any target is looked at."""
    problems = []
    if spec.head_type not in HEADS:
        known = ", ".join(map(repr, HEADS))
        problems.append(f"markov_head_type is {spec.head_type!r}, known are {known}")
    if spec.depth < 1 and not spec.predicts_from_anchor:
        problems.append(f"block_size {spec.block_size} leaves no position to draft")
    return problems


def pair_problems(
    spec: DrafterSpec, target: TargetShape, num_speculative_tokens: int | None = None
) -> list[str]:
    """Why a drafter does not fit a target, one phrase a reason; empty if it fits.

    Args:
        num_speculative_tokens: γ asked for, None for the checkpoint's own.
    """
    problems = []
    if spec.target_hidden_size != target.hidden_size:
        problems.append(
            f"it reads hidden states of width {spec.target_hidden_size}, "
            f"the target's are {target.hidden_size} wide"
        )
    if spec.vocab_size < target.vocab_size:
        problems.append(
            f"its vocabulary has {spec.vocab_size} words, the target's {target.vocab_size}"
        )
    outside = [i for i in spec.target_layer_ids if not -1 <= i < target.num_layers]
    if outside:
        problems.append(
            f"target_layer_ids {outside} are not among the target's layers "
            f"0 to {target.num_layers - 1}"
        )
    if num_speculative_tokens is not None and num_speculative_tokens > spec.depth:
        problems.append(
            f"num_speculative_tokens is {num_speculative_tokens}, but block_size "
            f"{spec.block_size} was trained to draft {spec.depth}"
        )
    return problems
