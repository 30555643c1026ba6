"""Shapes to inflate to: Qwen3's published sizes with their drafters', or one's own from JSON."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """What the sizes of one layer's matrices depend on. The names are those of config.json."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> LayerSizes:
        """The sizes that a config.json states.

        Raises:
            ValueError: one is missing.
        """
        names = [field.name for field in dataclasses.fields(LayerSizes)]
        if lacking := [name for name in names if name not in config]:
            raise ValueError(f"config.json lacks {', '.join(lacking)}")
        return LayerSizes(**{name: config[name] for name in names})


@dataclass(frozen=True, kw_only=True)
class Shape(LayerSizes):
    """A target and its drafter, which has the target's layer sizes."""

    num_hidden_layers: int
    vocab_size: int
    tie_word_embeddings: bool
    draft_layers: int = 5
    draft_target_layers: int = 5  # target layers whose outputs the drafter reads
    markov_rank: int = 256

    def __post_init__(self) -> None:
        """Refuse sizes that no model can have.

        Raises:
            ValueError: naming the field, what was found and what is needed.
        """
        for field in dataclasses.fields(self):
            value, whole = getattr(self, field.name), field.name != "tie_word_embeddings"
            if whole and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} is {value!r}, needed is a whole number above 0")
            if not whole and type(value) is not bool:
                raise ValueError(f"{field.name} is {value!r}, needed is true or false")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, needed is a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )


def _qwen3(width: int, layers: int, heads: int, mlp: int, tied: bool) -> Shape:
    return Shape(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=mlp,
        vocab_size=151_936,
        tie_word_embeddings=tied,
    )


# From the config.json of Qwen/Qwen3-0.6B, -1.7B, -4B and -8B; the drafter's numbers from
# deepseek-ai/dspark_qwen3_8b_block7, also where no drafter is published (0.6B, 1.7B).
SHAPES = {
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288, tied=False),
}


def find_shape(text: str) -> Shape:
    """A name in `SHAPES`, or the path of a JSON file with `Shape`'s fields.

    Raises:
        ValueError: neither, an unknown or missing field, or a size that cannot be.
    """
    if text.lower() in SHAPES:
        return SHAPES[text.lower()]
    path = Path(text)
    if not path.is_file():
        raise ValueError(
            f"shape {text!r} is neither known nor a JSON file. Known are {', '.join(SHAPES)}"
        )
    fields = json.loads(path.read_text())
    known = {field.name: field for field in dataclasses.fields(Shape)}
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds {fields!r}, needed is an object with {', '.join(known)}")
    for name in fields.keys() - known.keys():
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"{path} has the unknown field {name!r}; nearest is {nearest!r}")
    required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
    if lacking := sorted(required - fields.keys()):
        raise ValueError(f"{path} lacks {', '.join(lacking)}")
    return Shape(**fields)
