"""Dense drafting: two launches a position against the whole computation in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare
from vllm.v1.worker.gpu.sample import gumbel as vllm_gumbel

from tests.kernel_cases import DEVICE, NAN, Block, block, draws
from vllm_dspark.kernels.dense import DenseDrafter
from vllm_dspark.kernels.dense_pick import dense_pick
from vllm_dspark.kernels.dense_reference import dense_reference
from vllm_dspark.kernels.dense_scores import BLOCK_V, dense_scores, tile_count
from vllm_dspark.kernels.dense_scores_reference import dense_scores_reference
from vllm_dspark.kernels.draws import Draws
from vllm_dspark.kernels.gumbel import DRAFT_SALT
from vllm_dspark.kernels.gumbel_reference import gumbel_reference

UNTOUCHED = -7


def drafter(case: Block, room: int | None = None) -> DenseDrafter:
    """With buffers that hold NaN and nonsense, as `torch.empty` may."""
    made = DenseDrafter(case.head, room or case.base.shape[0])
    made._best.fill_(NAN)
    made._where.fill_(1 << 30)
    made._latents.fill_(NAN)
    return made


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize(
    ("requests", "depth", "vocab", "rank"),
    [
        (1, 1, 300, 96),  # one request, γ = 1, a rank that is no power of two
        (
            17,
            2,
            131,
            8,
        ),  # rows beyond a block of 16, a rank below a block, a last tile of three words
        (3, 3, 64, 64),  # exactly one tile, states that swap twice
    ],
)
def test_greedy_tokens_are_the_references(
    kind: str, requests: int, depth: int, vocab: int, rank: int
) -> None:
    case = block(kind, requests, depth, vocab, rank)
    drafter(case, requests + 2).draw(case.base, case.hidden, case.anchors, case.tokens)
    expected, _ = dense_reference(case.base, case.hidden, case.anchors, case.head)
    assert torch.equal(case.tokens[:, :depth], expected)
    assert (case.tokens[:, depth:] == UNTOUCHED).all()


@pytest.mark.parametrize("requests", [1, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tables_in_fp8(requests: int, dtype: torch.dtype) -> None:
    """What is drawn and what is kept for verification are of the same numbers, each word's row with
    a scale of its own: some rows here are a thousand times as large as others."""
    case = block("vanilla", requests, 3, 300, 96, dtype)
    case.head.w2.mul_(torch.logspace(-2, 1, 300, device=DEVICE).to(dtype)[:, None])
    head = case.head.in_fp8()
    assert head.w2_scale is not None
    exact, rows = case.head.w2.double(), head.w2.double() * head.w2_scale.double()[:, None]
    off = (rows - exact).abs().amax(dim=1) / exact.abs().amax(dim=1)
    assert off.max() < 0.036  # half a step of three bits, beside the largest: 16 of 448
    chosen = draws(requests, 3, 0.0, by_step=True)
    cache = torch.full((requests, 3, 300), NAN, device=DEVICE)
    drafter(replace(case, head=head)).draw(
        case.base, case.hidden, case.anchors, case.tokens, chosen, cache
    )
    expected, logits = dense_reference(case.base, case.hidden, case.anchors, head, chosen)
    assert torch.equal(case.tokens[:, :3], expected)
    torch.testing.assert_close(cache[chosen.slots[:, 0]].double(), logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ties_go_to_the_lowest_word(dtype: torch.dtype) -> None:
    """Whole numbers, so sums are exact in every dtype; words of several tiles tie for the best."""
    case = block("vanilla", 5, 2, 3 * BLOCK_V + 7, 16, dtype, whole=True)
    drafter(case).draw(case.base, case.hidden, case.anchors, case.tokens)
    expected, logits = dense_reference(case.base, case.hidden, case.anchors, case.head)
    best = logits == logits.amax(dim=-1, keepdim=True)
    tiles = [set((row.nonzero()[:, 0] // BLOCK_V).tolist()) for row in best.flatten(0, 1)]
    assert any(len(tied) > 1 for tied in tiles)
    assert torch.equal(case.tokens[:, :2], expected)


def test_infinite_and_undefined_logits() -> None:
    """-inf and NaN are not drawn; where nothing else is left, word 0 is; padding behind the
    vocabulary never wins."""
    case = block("vanilla", 3, 1, 2 * BLOCK_V + 1)
    case.base[0] = -torch.inf
    case.base[1, 0, :] = -torch.inf
    case.base[1, 0, -1] = -90.0
    case.base[2, 0, ::2] = NAN
    drafter(case).draw(case.base, case.hidden, case.anchors, case.tokens, draws(3, 1))
    drawn = case.tokens[:, 0].tolist()
    assert drawn[:2] == [0, 2 * BLOCK_V]
    assert drawn[2] % 2 == 1


def test_rows_of_wider_tensors() -> None:
    """Strided base logits and tokens; a padded vocabulary behind the logits is not read."""
    case = block("rnn", 4, 2, 200)
    wide = torch.full((4, 2, 256), 1e9, device=DEVICE)
    wide[..., :200] = case.base
    drafter(case).draw(wide[..., :200], case.hidden, case.anchors, case.tokens)
    expected, _ = dense_reference(case.base, case.hidden, case.anchors, case.head)
    assert torch.equal(case.tokens[:, :2], expected)


def vllm_draws(logits: torch.Tensor, chosen: Draws, step: int, cache: torch.Tensor) -> torch.Tensor:
    """Tokens of vLLM's own sampler for logits [R, V], through its own cache."""
    return vllm_gumbel.gumbel_sample(
        logits,
        chosen.slots[:, step],
        chosen.temperature,
        chosen.seeds,
        chosen.positions[:, step] - 1,
        apply_temperature=True,
        is_drafting=True,
        logits_cache=cache,
        logits_cache_col=torch.tensor(step, dtype=torch.int32, device=DEVICE),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_and_cache_are_vllms(dtype: torch.dtype) -> None:
    """Draw for draw and bit for bit, for the same seeds, positions and logits, greedy and padding
    rows among them. Whole numbers, so that both sum to the same logits."""
    requests, depth, vocab = 12, 3, 2 * BLOCK_V + 44
    case = block("vanilla", requests, depth, vocab, 16, dtype, whole=True)
    heat = [0.0, 1.0, 0.7, 3.0, 1.0, 0.0, 1.0, 5.0, 2.0, 1.0, 1.0, 1.0]
    by_step = hasattr(vllm_gumbel, "spec_step_seed")
    chosen = draws(requests, depth, heat, by_step=by_step, first_seed=-4, padded=2)
    cache = torch.full((requests, depth, vocab), NAN, dtype=dtype, device=DEVICE)
    theirs = torch.full_like(cache, NAN)
    drafter(case).draw(case.base, case.hidden, case.anchors, case.tokens, chosen, cache)
    _, logits = dense_reference(
        case.base, case.hidden, case.anchors, case.head, chosen, cache_dtype=dtype
    )
    for k in range(depth):
        drawn = vllm_draws(logits[:, k].to(dtype).contiguous(), chosen, k, theirs)
        assert torch.equal(case.tokens[:, k], drawn)
    assert torch.equal(cache.isnan(), theirs.isnan())
    assert torch.equal(cache.nan_to_num(), theirs.nan_to_num())
    assert cache.isnan().any(dim=-1).sum() == 2 * depth  # the slots of the padding rows
    _, greedy = dense_reference(case.base, case.hidden, case.anchors, case.head)
    assert (case.tokens[:, 0] != greedy[:, 0].argmax(-1)).any()  # noise decided some


def test_noise_is_keyed_as_vllms() -> None:
    assert DRAFT_SALT.value == vllm_gumbel._DRAFT_NOISE_SALT.value


def test_step_is_mixed_into_the_seed() -> None:
    """As vLLM 0.33 does: other draws than without, and those of the reference."""
    case = block("vanilla", 8, 3, 256, 16, whole=True)
    tokens = []
    for by_step in (False, True):
        chosen = draws(8, 3, by_step=by_step)
        drafter(case).draw(case.base, case.hidden, case.anchors, case.tokens, chosen)
        expected, _ = dense_reference(case.base, case.hidden, case.anchors, case.head, chosen)
        assert torch.equal(case.tokens[:, :3], expected)
        tokens.append(case.tokens[:, :3].clone())
    assert torch.equal(tokens[0][:, 0], tokens[1][:, 0])  # step 0 changes no seed
    assert (tokens[0] != tokens[1]).any()


@pytest.mark.parametrize("requests", [1, 40])
@pytest.mark.parametrize("gap", [-0.3, -3e-5, 3e-5, 1e-3])
def test_draws_next_to_a_tie(requests: int, gap: float) -> None:
    """Two words of a tile whose scores are close, each by other shares of logit and noise."""
    generator = torch.Generator().manual_seed(requests)
    rank, heat, vocab = 16, 0.5, 2 * BLOCK_V
    chosen = draws(requests, 1, heat)
    words = torch.arange(vocab, device=DEVICE)
    noise = gumbel_reference(chosen.seeds[chosen.slots[:, 0]], chosen.positions[:, 0] - 1, words)
    pair = torch.rand(requests, BLOCK_V, generator=generator).argsort(1)[:, :2].to(DEVICE)
    level = torch.tensor([0.0, gap], device=DEVICE).double() + 10
    base = torch.full((requests, vocab), -100.0, device=DEVICE)
    base.scatter_(1, pair, ((level - noise.gather(1, pair)) * heat).float())
    latent, w2 = (torch.zeros(rows, rank, device=DEVICE) for rows in (requests, vocab))
    best = torch.full((requests, tile_count(vocab)), NAN, device=DEVICE)
    where = torch.zeros_like(best, dtype=torch.int32)
    dense_scores(base, latent, None, w2, chosen, 0, best, where)
    _, score = dense_scores_reference(base, latent, w2, chosen, 0)
    assert torch.equal(where[:, 0].long(), pair[:, int(gap > 0)])
    assert torch.equal(where[:, 0].long(), score[:, :BLOCK_V].argmax(1))
    torch.testing.assert_close(best[:, 0].double(), score[:, :BLOCK_V].amax(1), atol=1e-4, rtol=0)


def test_drawn_tokens_have_the_distribution() -> None:
    """Chi-square over 1,024 seeds at temperature 0.8, of one row of logits; p above 0.001."""
    count, vocab = 1024, 12
    case = block("vanilla", 1, 1, vocab, 16)
    chosen = draws(count, 1, 0.8)
    case.base[..., 5] = -torch.inf
    base = case.base.expand(count, 1, vocab)
    tokens = torch.full((count, 1), UNTOUCHED, device=DEVICE)
    hidden = case.hidden.expand(count, 1, -1)
    anchors = case.anchors.repeat(count)
    DenseDrafter(case.head, count).draw(base, hidden, anchors, tokens, chosen)
    _, logits = dense_reference(case.base, case.hidden, case.anchors, case.head)
    expected = torch.softmax(logits[0, 0] / 0.8, dim=-1).cpu() * count
    seen = torch.bincount(tokens[:, 0].cpu(), minlength=vocab)
    assert seen[5] == 0
    possible = expected > 0
    assert chisquare(seen[possible], expected[possible]).pvalue > 1e-3


def test_reduced_vocabulary_is_drawn_under_the_targets_ids() -> None:
    """Noise, embeddings and cache go by target ids; unmapped columns of the cache stay."""
    words = 3 * torch.arange(150) + 1
    case = block("vanilla", 6, 2, 150, 16, whole=True, words=words, targets=500)
    chosen = draws(6, 2)
    cache = torch.full((6, 2, 500), -torch.inf, device=DEVICE)
    drafter(case).draw(case.base, case.hidden, case.anchors, case.tokens, chosen, cache)
    expected, logits = dense_reference(case.base, case.hidden, case.anchors, case.head, chosen)
    assert torch.equal(case.tokens[:, :2], expected)
    by_row = cache[chosen.slots[:, 0]]
    assert torch.equal(by_row[..., words.to(DEVICE)].double(), logits)
    assert by_row.isneginf().sum() == 6 * 2 * 350


def test_refusals_name_what_is_wrong() -> None:
    case = block("vanilla", 2, 1, 40, 16)
    with pytest.raises(ValueError, match="room is for 1"):
        DenseDrafter(case.head, 1).draw(case.base, case.hidden, case.anchors, case.tokens)
    best = torch.empty(2, tile_count(40) + 1, device=DEVICE)
    arguments = (case.base[:, 0], case.head.w1, case.anchors, case.head.w2, None, 0)
    with pytest.raises(ValueError, match="best and where"):
        dense_scores(*arguments, best, best.int())
    with pytest.raises(ValueError, match="nothing to pick"):
        dense_pick(None, None, case.anchors, case.head, None)
    cache = torch.empty(2, 1, 40, device=DEVICE)
    with pytest.raises(ValueError, match="needs draws"):
        dense_scores(*arguments, best[:, :1].clone(), best[:, :1].int(), cache=cache)
    small = case.head.in_fp8()
    arguments = (case.base[:, 0], case.head.w1, case.anchors, small.w2, None, 0)
    with pytest.raises(ValueError, match="needed is float8_e4m3fn with a scale"):
        dense_scores(*arguments, best[:, :1].clone(), best[:, :1].int())
