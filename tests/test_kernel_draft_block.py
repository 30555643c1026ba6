"""A block from end to end in candidate mode, its confidences, and its noise."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from scipy.stats import kstest

from tests.kernel_cases import DEVICE, NAN, block, draws
from vllm_dspark.kernels.candidate import CandidateDrafter
from vllm_dspark.kernels.candidate_reference import candidate_reference
from vllm_dspark.kernels.confidence import confidence
from vllm_dspark.kernels.confidence_reference import confidence_reference
from vllm_dspark.kernels.gumbel import gumbel, noise_key
from vllm_dspark.kernels.gumbel_reference import gumbel_reference
from vllm_dspark.kernels.head_weights import ConfidenceWeights

UNTOUCHED = -7


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_candidate_block(kind: str) -> None:
    """Fewer drafts than γ, room for more requests, base logits with padding behind the words."""
    case = block(kind, 3, 2, 2000, 24)
    wide = torch.full((3, 2, 2048), 1e9, device=DEVICE)
    wide[..., :2000] = case.base
    drafter = CandidateDrafter(case.head, 5, 4, 32, torch.float32)
    chosen = draws(3, 2, [0.0, 1.0, 1.3])
    ids = torch.full((3, 4, 32), UNTOUCHED, dtype=torch.int32, device=DEVICE)
    logprobs = torch.full((3, 4, 32), NAN, device=DEVICE)
    arguments = (wide[..., :2000], case.hidden, case.anchors, case.tokens, chosen)
    drafter.draw(*arguments, ids, logprobs)
    tokens, expected_ids, expected = candidate_reference(
        case.base, case.hidden, case.anchors, case.head, 32, chosen
    )
    slots = chosen.slots[:, 0]
    assert torch.equal(case.tokens[:, :2], tokens)
    assert torch.equal(ids[slots][:, :2], expected_ids)
    torch.testing.assert_close(logprobs[slots][:, :2].double(), expected, rtol=0, atol=2e-5)
    assert (ids[:, 2:] == UNTOUCHED).all()
    assert logprobs[:, 2:].isnan().all()
    first = (case.tokens.clone(), logprobs.clone())
    drafter.draw(*arguments, ids, logprobs)
    assert torch.equal(case.tokens, first[0])
    assert torch.equal(logprobs.nan_to_num(), first[1].nan_to_num())  # the same in every run
    with pytest.raises(ValueError, match="more than there is room"):
        drafter.draw(case.base.repeat(4, 1, 1), case.hidden, case.anchors, case.tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_embed", [True, False])
@pytest.mark.parametrize(("requests", "depth", "rank"), [(1, 1, 96), (3, 4, 8)])
def test_confidences(
    requests: int, depth: int, rank: int, with_embed: bool, dtype: torch.dtype
) -> None:
    """With and without the embedding, with temperatures; columns beyond the block stay."""
    case = block("vanilla", requests, depth, 50, rank, dtype)
    weights = case.confidence
    torch.manual_seed(1)
    scale = torch.rand(depth).to(DEVICE) + 0.5
    weight = weights.weight if with_embed else weights.weight[: case.hidden.shape[2]]
    weights = ConfidenceWeights(weight, weights.bias if with_embed else None, scale)
    case.tokens[:, :depth] = torch.randint(50, (requests, depth)).to(DEVICE)
    out = torch.full((requests, depth + 1), NAN, device=DEVICE)
    confidence(case.hidden, case.head.w1, weights, case.anchors, case.tokens, out)
    expected = confidence_reference(
        case.hidden, case.head.w1, weights, case.anchors, case.tokens[:, :depth]
    )
    torch.testing.assert_close(out[:, :depth].double(), expected, rtol=1e-5, atol=0)
    assert out[:, depth:].isnan().all()


def test_confidence_refuses_what_does_not_fit() -> None:
    case = block("vanilla", 2, 2, 50, 8)
    out = torch.empty(2, 2, device=DEVICE)
    narrow = ConfidenceWeights(case.confidence.weight[:-1], None, case.confidence.temperatures)
    with pytest.raises(ValueError, match=r"needed is D or D \+ r"):
        confidence(case.hidden, case.head.w1, narrow, case.anchors, case.tokens, out)
    with pytest.raises(ValueError, match="2 columns or more"):
        confidence(
            case.hidden, case.head.w1, case.confidence, case.anchors, case.tokens, out[:, :1]
        )


@triton.jit
def noise_kernel(seed_ptr, position_ptr, out_ptr, step, BY_STEP: tl.constexpr, N: tl.constexpr):
    row, word = tl.program_id(0), tl.arange(0, N)
    key = noise_key(tl.load(seed_ptr + row), tl.load(position_ptr + row), step, BY_STEP)
    tl.store(out_ptr + row * N + word, gumbel(key, word))


@pytest.mark.parametrize("by_step", [False, True])
def test_noise_is_the_references_and_gumbel(by_step: bool) -> None:
    """Seeds of both signs and of more than 32 bits; Kolmogorov-Smirnov, p above 0.001."""
    seeds = torch.tensor([0, -3, 2**40 + 5], device=DEVICE)
    positions = torch.tensor([0, 4000, 10], device=DEVICE)
    out = torch.full((3, 1024), NAN, device=DEVICE)
    noise_kernel[(3,)](seeds, positions, out, 2, BY_STEP=by_step, N=1024)
    words = torch.arange(1024, device=DEVICE)
    expected = gumbel_reference(seeds, positions, words, step=2, by_step=by_step)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    uniform = torch.exp(-torch.exp(-out.flatten().cpu().double()))
    assert kstest(uniform, "uniform").pvalue > 1e-3
