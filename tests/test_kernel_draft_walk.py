"""The walk over candidates: tokens, and the distribution that each was drawn from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from tests.kernel_cases import DEVICE, NAN, Block, block, draws
from vllm_dspark.kernels.candidate_walk import candidate_walk
from vllm_dspark.kernels.candidate_walk_reference import candidate_walk_reference
from vllm_dspark.kernels.candidates_reference import candidates_reference
from vllm_dspark.kernels.dense import DenseDrafter
from vllm_dspark.kernels.draws import Draws

UNTOUCHED = -7


def walk(case: Block, count: int, chosen: Draws | None, proposal: bool = True) -> dict[str, Any]:
    """Run the kernel and the reference on the case's true candidates, outputs poisoned.

    Returns:
        tokens, and by row ids and logprobs, as the kernel wrote them.
    """
    rows, depth, vocab = case.base.shape
    ids, values = candidates_reference(case.base.reshape(-1, vocab), count)
    ids, values = (x.view(rows, depth, count).contiguous() for x in (ids, values))
    scratch = torch.full((rows, 2, case.head.rank), NAN, dtype=case.head.w1.dtype, device=DEVICE)
    shape = (rows, depth + 1, count)
    out_ids = torch.full(shape, UNTOUCHED, dtype=torch.int32, device=DEVICE)
    out = torch.full(shape, NAN, device=DEVICE)
    written = (out_ids, out) if proposal else (None, None)
    share = case.head.hidden_part(case.hidden)
    candidate_walk(
        ids, values, case.anchors, case.head, share, scratch, chosen, case.tokens, *written
    )
    tokens, expected_ids, expected = candidate_walk_reference(
        ids, values, case.anchors, case.head, share, chosen
    )
    assert torch.equal(case.tokens[:, :depth], tokens)
    assert (case.tokens[:, depth:] == UNTOUCHED).all()
    if proposal and chosen is not None:
        assert (out_ids[:, depth] == UNTOUCHED).all()
        assert out[:, depth].isnan().all()
        slots = chosen.slots[:, 0]
        real = slots >= 0
        by_row = out_ids[slots][:, :depth], out[slots][:, :depth]
        assert torch.equal(by_row[0][real], expected_ids[real])
        torch.testing.assert_close(by_row[1][real].double(), expected[real], rtol=0, atol=2e-5)
        return {"tokens": tokens, "ids": by_row[0], "logprobs": by_row[1], "real": real}
    return {"tokens": tokens}


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize(
    ("requests", "depth", "vocab", "rank", "count"),
    [
        (1, 1, 300, 96, 16),  # one request, γ = 1, a rank that is no power of two
        (4, 3, 131, 8, 64),  # a rank below a block, states that are handed on twice
        (2, 2, 700, 64, 128),
    ],
)
def test_tokens_and_proposal(
    kind: str, requests: int, depth: int, vocab: int, rank: int, count: int
) -> None:
    """Every head; the first slot greedy, the others at temperature 0.9."""
    case = block(kind, requests, depth, vocab, rank)
    heat = [0.0, 0.9, 0.9, 0.9][:requests]
    found = walk(case, count, draws(requests, depth, heat))
    mass = found["logprobs"].exp().sum(dim=-1)
    torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-5)
    certain = (found["logprobs"] == 0.0).sum(dim=-1)
    assert (certain[-1] == 1).all()  # the last row has slot 0
    greedy = draws(requests, depth, 0.0)
    tokens = walk(case, count, greedy)["tokens"]
    assert torch.equal(walk(case, count, None, proposal=False)["tokens"], tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype: torch.dtype) -> None:
    """Whole numbers: exact in both, ties resolved to the lowest word."""
    case = block("vanilla", 3, 2, 200, 32, dtype, whole=True)
    walk(case, 32, draws(3, 2, [0.0, 1.0, 0.5], padded=1))


def test_draws_are_the_dense_ones_where_every_word_is_a_candidate() -> None:
    """Noise goes by word, so K = V draws the same tokens as dense drafting, with either key."""
    for by_step in (False, True):
        case = block("vanilla", 6, 3, 128, 16, whole=True)
        chosen = draws(6, 3, 1.0, by_step=by_step, first_seed=-3)
        tokens = walk(case, 128, chosen)["tokens"]
        DenseDrafter(case.head, 6).draw(case.base, case.hidden, case.anchors, case.tokens, chosen)
        assert torch.equal(case.tokens[:, :3], tokens)


def test_filters_of_the_request() -> None:
    """Top-k and top-p, alone, together, looser than the candidates, and off."""
    filters = ([5, 300, 300, 4, 200, 1], [1.0, 0.6, 1.0, 0.9, 1.0, 1.0])
    case = block("vanilla", 6, 2, 300, 16)
    found = walk(case, 32, draws(6, 2, 0.8, filters=filters))
    kept = (found["logprobs"] > -torch.inf).sum(dim=-1).flip(0)  # by slot
    assert (kept[0] == 5).all()
    assert ((kept[1] > 0) & (kept[1] < 32)).all()
    assert (kept[2] == 32).all()
    assert (kept[3] <= 4).all()
    assert (kept[4] == 32).all()
    assert (kept[5] == 1).all()


def test_infinite_and_undefined_logits() -> None:
    """Nothing to draw from: the lowest candidate, for certain, with filters or without. One
    number among NaN and -inf: that."""
    case = block("vanilla", 4, 1, 100, 16)
    case.base[0] = -torch.inf
    case.base[2] = -torch.inf
    case.base[1, 0] = NAN
    case.base[1, 0, 77] = -50.0
    found = walk(case, 16, draws(4, 1, 1.0, filters=([3, 9, 100, 2], [0.5, 1.0, 1.0, 0.9])))
    assert found["tokens"][:3, 0].tolist() == [0, 77, 0]


def test_drawn_tokens_have_the_proposals_distribution() -> None:
    """Chi-square over 400 seeds at temperature 0.8; p above 0.001."""
    count, k = 400, 16
    one = block("vanilla", 1, 1, 60, 16)
    case = Block(
        one.head, one.confidence,
        one.base.repeat(count, 1, 1), one.hidden.repeat(count, 1, 1), one.anchors.repeat(count),
        torch.full((count, 2), UNTOUCHED, device=DEVICE),
    )  # fmt: skip
    found = walk(case, k, draws(count, 1, 0.8))
    expected = found["logprobs"][0, 0].double().softmax(dim=-1).cpu() * count
    ids = found["ids"][0, 0].long()
    seen = (found["tokens"] == ids).sum(dim=0).cpu()
    rare = expected < 5  # too few for the test: together
    seen = torch.cat([seen[~rare], seen[rare].sum(dim=0, keepdim=True)])
    expected = torch.cat([expected[~rare], expected[rare].sum(dim=0, keepdim=True)])
    assert len(seen) > 4
    assert chisquare(seen, expected).pvalue > 1e-3


def test_reduced_vocabulary_is_proposed_under_the_targets_ids() -> None:
    words = 3 * torch.arange(150) + 1
    case = block("vanilla", 3, 2, 150, 16, words=words, targets=500)
    found = walk(case, 32, draws(3, 2))
    assert (found["ids"] % 3 == 1).all()
    assert found["ids"].max() > 150


def test_refusals_name_what_is_wrong() -> None:
    case = block("gated", 2, 1, 40, 16)
    ids, values = candidates_reference(case.base[:, 0], 16)
    ids, values = ids[:, None].contiguous(), values[:, None].contiguous()
    share = case.head.hidden_part(case.hidden)
    arguments = (ids, values, case.anchors, case.head, share)
    with pytest.raises(ValueError, match="needs a contiguous share and a scratch"):
        candidate_walk(*arguments, None, None, case.tokens)
    scratch = torch.empty(2, 2, 16, device=DEVICE)
    with pytest.raises(ValueError, match="needs draws"):
        candidate_walk(*arguments, scratch, None, case.tokens, ids, values)
    narrow = (ids[..., :8].contiguous(), values[..., :8].contiguous())
    with pytest.raises(ValueError, match=r"must be \[slots, 1 or more, 16\]"):
        candidate_walk(*arguments, scratch, draws(2, 1), case.tokens, *narrow)
