"""Markov and confidence heads against independent references; see `references.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.references import arrays, make_head, reference_biases
from vllm_dspark.heads import HEADS, ConfidenceHead, build_markov_head

# Modules run in float64 too, so only the order of summation differs.
EXACT: Any = {"rtol": 1e-11, "atol": 1e-12}

HEAD_TYPES = ("vanilla", "gated", "rnn")
# requests, gamma, rank, vocabulary, width
SIZES = [
    (1, 1, 5, 7, 3),  # nothing is a power of two, nothing repeats
    (1, 7, 5, 7, 3),
    (3, 1, 1, 2, 1),  # rank and width one
    (8, 7, 16, 33, 12),
]


def block(requests: int, gamma: int, vocab: int, width: int) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(vocab, (requests, gamma), generator=generator)
    hidden = torch.randn(requests, gamma, width, generator=generator, dtype=torch.float64)
    return tokens, hidden


@pytest.mark.parametrize(("batch", "gamma", "rank", "vocab", "width"), SIZES)
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_teacher_forced_block(
    head_type: str, batch: int, gamma: int, rank: int, vocab: int, width: int
) -> None:
    """The way training sees the head: all tokens known."""
    head = make_head(head_type, rank, vocab, width)
    tokens, hidden = block(batch, gamma, vocab, width)
    expected = reference_biases(head_type, arrays(head), tokens.numpy(), hidden.numpy())
    np.testing.assert_allclose(head.block_bias(tokens, hidden).numpy(), expected, **EXACT)


@pytest.mark.parametrize(("batch", "gamma", "rank", "vocab", "width"), SIZES)
@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_step_by_step(
    head_type: str, batch: int, gamma: int, rank: int, vocab: int, width: int
) -> None:
    """The way serving sees it: one position at a time, state carried along."""
    head = make_head(head_type, rank, vocab, width)
    tokens, hidden = block(batch, gamma, vocab, width)
    expected = reference_biases(head_type, arrays(head), tokens.numpy(), hidden.numpy())
    state = None
    for k in range(gamma):
        embed = head.embed(tokens[:, k])
        if k == 0:
            state = head.initial_state(embed)
        latent, state = head.advance(embed, hidden[:, k], state)
        np.testing.assert_allclose(head.bias(latent).numpy(), expected[:, k], **EXACT)


def test_block_takes_any_leading_shape() -> None:
    """Training batches are [sequences, anchors, gamma]."""
    head = make_head("rnn", 5, 7, 3)
    tokens, hidden = block(6, 4, 7, 3)
    folded = head.block_bias(tokens.view(2, 3, 4), hidden.view(2, 3, 4, 3))
    torch.testing.assert_close(folded.view(6, 4, 7), head.block_bias(tokens, hidden))


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_what_each_position_depends_on(head_type: str) -> None:
    """Changing the first token moves the biases of an RNN head everywhere, of the others only
    at the first position; the hidden state matters to all but the vanilla head."""
    head = make_head(head_type, 5, 7, 3)
    tokens, hidden = block(1, 4, 7, 3)
    before = head.block_bias(tokens, hidden)
    other_token = tokens.clone()
    other_token[0, 0] = (tokens[0, 0] + 1) % 7
    moved = (head.block_bias(other_token, hidden) != before).any(-1)[0].tolist()
    assert moved == ([True] * 4 if head_type == "rnn" else [True, False, False, False])
    other_hidden = hidden.clone()
    other_hidden[0, 1] += 1
    moved = (head.block_bias(tokens, other_hidden) != before).any(-1)[0].tolist()
    expected = {"vanilla": [False] * 4, "gated": [False, True, False, False]}
    assert moved == expected.get(head_type, [False, True, True, True])


@pytest.mark.parametrize("head_type", HEAD_TYPES)
def test_reduced_draft_vocabulary(head_type: str) -> None:
    """W1 has the target's words, W2 the drafter's."""
    head = make_head(head_type, 5, 7, 3, draft_vocab_size=4)
    tokens, hidden = block(2, 3, 7, 3)
    expected = reference_biases(head_type, arrays(head), tokens.numpy(), hidden.numpy())
    assert expected.shape == (2, 3, 4)
    np.testing.assert_allclose(head.block_bias(tokens, hidden).numpy(), expected, **EXACT)


@pytest.mark.parametrize(
    ("head_type", "names"),
    [
        ("vanilla", set()),
        ("gated", {"gate_proj.weight", "gate_proj.bias"}),
        ("rnn", {"joint_proj.weight", "joint_proj.bias"}),
    ],
)
def test_parameters_are_called_as_published(head_type: str, names: set[str]) -> None:
    """A state_dict is the `markov_head.*` part of a checkpoint, with nothing renamed."""
    head = make_head(head_type, 5, 7, 3)
    assert set(head.state_dict()) == {"markov_w1.weight", "markov_w2.weight"} | names


@pytest.mark.parametrize(("batch", "gamma", "rank", "vocab", "width"), SIZES)
@pytest.mark.parametrize("with_markov", [True, False])
def test_confidence_head(
    with_markov: bool, batch: int, gamma: int, rank: int, vocab: int, width: int
) -> None:
    torch.manual_seed(3)
    head = ConfidenceHead(hidden_size=width, rank=rank, with_markov=with_markov)
    head = head.double().requires_grad_(False)
    _, hidden = block(batch, gamma, vocab, width)
    embed = torch.randn(batch, gamma, rank, dtype=torch.float64)
    features = np.concatenate([hidden, embed], axis=-1) if with_markov else hidden.numpy()
    expected = features @ head.proj.weight.numpy()[0] + head.proj.bias.numpy()[0]
    logits = head(hidden, embed)
    assert logits.shape == (batch, gamma)
    np.testing.assert_allclose(logits.numpy(), expected, **EXACT)
    assert set(head.state_dict()) == {"proj.weight", "proj.bias"}


@pytest.mark.parametrize("head_type", ["lstm", "Vanilla", ""])
def test_unknown_head_type_lists_the_known(head_type: str) -> None:
    with pytest.raises(ValueError, match="'vanilla', 'gated', 'rnn'") as caught:
        build_markov_head(head_type, vocab_size=7, draft_vocab_size=7, rank=5, hidden_size=3)
    assert repr(head_type) in str(caught.value)


def test_table_of_heads_matches_their_names() -> None:
    assert {name: head.head_type for name, head in HEADS.items()} == {n: n for n in HEAD_TYPES}
