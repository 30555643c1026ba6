"""The parts of the inflation that need no model: shapes, axes, places of layers, noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.inflation.axes import (
    absent,
    concatenate,
    leading,
    place,
    query_heads,
    spread_ids,
    spread_layers,
    twice,
    words,
)
from benchmarks.inflation.noise import FAINT, SIGMA, Noise
from benchmarks.inflation.shapes import SHAPES, Shape, find_shape

FIELDS: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 9,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 640,
    "vocab_size": 2304,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("name", "billions"), [("0.6b", 0.596), ("1.7b", 1.721), ("4b", 4.022), ("8b", 8.191)]
)
def test_published_shapes_have_the_published_number_of_parameters(
    name: str, billions: float
) -> None:
    """A wrong digit in any size changes the count. The counts are those of Qwen's checkpoints."""
    shape = find_shape(f"qwen3-{name}")
    width, heads = shape.hidden_size, shape.num_attention_heads + shape.num_key_value_heads
    attention = 2 * width * heads * shape.head_dim + 2 * shape.head_dim
    layer = attention + 3 * width * shape.intermediate_size + 2 * width
    tables = 1 if shape.tie_word_embeddings else 2
    count = shape.num_hidden_layers * layer + tables * shape.vocab_size * width + width
    assert count / 1e9 == pytest.approx(billions, abs=5e-4)


def test_a_shape_from_json(tmp_path: Path) -> None:
    """Fields are read, the drafter's have their published values where they are not given."""
    path = tmp_path / "shape.json"
    path.write_text(json.dumps(FIELDS | {"markov_rank": 96}))
    shape = find_shape(str(path))
    assert shape == Shape(**FIELDS, markov_rank=96)
    assert (shape.draft_layers, shape.draft_target_layers) == (5, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_sizes": 1}, "unknown field 'hidden_sizes'; nearest is 'hidden_size'"),
        ({"hidden_size": 0}, "hidden_size is 0, needed is a whole number above 0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, needed is true or false"),
        ({"num_attention_heads": 5}, "needed is a multiple of num_key_value_heads 2"),
        ({"head_dim": None}, "lacks head_dim"),
    ],
)
def test_shapes_that_cannot_be(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Each is refused by name; None takes the field away."""
    fields = {key: value for key, value in (FIELDS | change).items() if value is not None}
    path = tmp_path / "shape.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        find_shape(str(path))


def test_an_unknown_shape_lists_the_known_ones() -> None:
    """A misspelt name is taken for a path, and the message says what would have been known."""
    with pytest.raises(ValueError, match=r"'qwen3-9b' is neither.*qwen3-8b"):
        find_shape("qwen3-9b")
    assert find_shape("Qwen3-8B") is SHAPES["qwen3-8b"]


def test_query_heads_stay_with_their_kv_head() -> None:
    """4 heads in 2 groups go to groups of 3: the second group begins at head 3, not at head 2."""
    axis = query_heads(4, 2, 9, 3, head_dim=5)
    large = torch.zeros(45, 1)
    place(large, torch.arange(1.0, 5).repeat_interleave(5)[:, None], axis, leading(1, 1))
    assert large[::5, 0].tolist() == [1, 2, 0, 3, 4, 0, 0, 0, 0]


def test_concatenated_axes_are_offset_on_both_sides() -> None:
    """A copy that lands at the wrong offset, an absent part that takes tiny places, or a dead
    word that is not copied shows in the one row."""
    columns = concatenate([twice(2, 5), absent(3), leading(1, 2)])
    large, small = torch.zeros(4, 10), torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    place(large, small, words(2, 4), columns)
    assert large[0].tolist() == [1, 2, 1, 2, 0, 0, 0, 0, 3, 0]
    assert large[1:].tolist() == [[4, 5, 4, 5, 0, 0, 0, 0, 6, 0]] * 3


def test_place_refuses_other_sizes() -> None:
    """Slices would quietly cut a matrix that is larger than its axes."""
    with pytest.raises(ValueError, match=r"shape \[3, 2\], needed is \[2, 2\]"):
        place(torch.zeros(4, 4), torch.zeros(3, 2), leading(2, 4), leading(2, 4))


@pytest.mark.parametrize(
    ("small", "large", "expected"),
    [
        (1, 6, [0]),
        (2, 2, [0, 1]),
        (5, 36, [0, 8, 17, 26, 35]),
        (5, 7, [0, 1, 3, 4, 6]),
    ],
)
def test_layers_are_spread_evenly(small: int, large: int, expected: list[int]) -> None:
    """Distinct places, the first and the last layer among them."""
    assert spread_layers(small, large) == expected


def test_ids_are_filled_up_with_the_farthest_layers() -> None:
    """Strictly increasing, only inserted layers are added, and -1 (the embedding) is kept."""
    real = spread_layers(5, 36)
    inserted = set(range(35)) - set(real)
    assert spread_ids([0, 17, 26], inserted, 5) == [0, 9, 17, 26, 34]
    assert spread_ids([-1, 0], {1, 2, 3}, 3) == [-1, 0, 3]
    assert spread_ids([0, 2], {1}, 2) == [0, 2]


def test_noise_is_normal_and_faint_is_the_same_scaled() -> None:
    """Two levels with the same mantissas; a faint weight that rounds to zero would show."""
    noise = Noise(0)
    loud = noise.tensor("a", (301, 1000), faint=False)
    assert loud.dtype == torch.bfloat16
    assert float(loud.float().std()) == pytest.approx(SIGMA, rel=0.01)
    assert abs(float(loud.float().mean())) < 5 * SIGMA / len(loud.flatten()) ** 0.5
    faint = noise.tensor("a", (301, 1000), faint=True)
    assert torch.equal(faint.float() / FAINT, loud.float())
    assert bool((faint != 0).all())


def test_noise_depends_on_seed_and_name_alone() -> None:
    """Order of calls must not matter, threads make them; other names and seeds differ. The
    tensor is longer than the pool, so the seam between two turns of it is inside."""
    first, second = Noise(3), Noise(3)
    shape = (2100, 8001)
    wanted = first.tensor("layer", shape, faint=False)
    other = second.tensor("another", shape, faint=False)
    assert torch.equal(second.tensor("layer", shape, faint=False), wanted)
    assert not torch.equal(other, wanted)
    assert not torch.equal(Noise(4).tensor("layer", (10, 10), faint=False), wanted[:10, :10])
    assert not torch.equal(wanted[0], wanted[1])
