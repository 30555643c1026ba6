"""Candidates: the K largest base logits, exactly, with ties and numbers that are none."""

from __future__ import annotations

import pytest
import torch

from tests.kernel_cases import DEVICE, NAN
from vllm_dspark.kernels.candidates import CandidateFinder
from vllm_dspark.kernels.candidates_reference import candidates_reference


def check(base: torch.Tensor, count: int) -> torch.Tensor:
    """Compare with the reference; buffers and outputs start as nonsense."""
    rows, vocab = base.shape
    finder = CandidateFinder(vocab, count, rows + 1, base.dtype, DEVICE)
    finder._maxima.fill_(NAN)
    finder._chosen.fill_(1 << 30)
    ids = torch.full((rows, count), -7, dtype=torch.int32, device=DEVICE)
    values = torch.full((rows, count), NAN, device=DEVICE)
    finder.find(base, ids, values)
    expected_ids, expected_values = candidates_reference(base, count)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(values, expected_values)
    return ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "vocab", "count"),
    [
        (1, 5000, 16),  # many more groups than candidates
        (3, 64 * 33 + 5, 32),  # one group more than candidates, and that one of five words
        (2, 300, 64),  # fewer groups than candidates: no choice of groups
        (2, 64, 64),  # every word is a candidate
        (1, 9000, 256),  # groups of 32
        (1, 32 * 20_000, 256),  # more groups than 15 bits count
    ],
)
def test_candidates_are_the_largest(rows: int, vocab: int, count: int, dtype: torch.dtype) -> None:
    torch.manual_seed(vocab)
    check(torch.randn(rows, vocab).to(DEVICE, dtype), count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_across_groups(dtype: torch.dtype) -> None:
    """Four values in all, both zeros among them: the K-th is tied in hundreds of groups."""
    torch.manual_seed(3)
    base = torch.randint(-1, 2, (4, 3000)).to(DEVICE, dtype)
    base[1] = 0.0
    base[1, ::2] = -0.0
    ids = check(base, 16)
    assert ids[1].tolist() == list(range(16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [8.0, -8.0])
def test_numbers_of_any_size(dtype: torch.dtype, scale: float) -> None:
    """The K-th largest is many powers of two below the largest, below zero, or next to it."""
    torch.manual_seed(4)
    sign = 1 - 2 * torch.randint(2, (3, 2500))
    base = sign * torch.exp(scale * torch.randn(3, 2500)).clamp(1e-6, 6e4)
    base[1] = -base[1].abs()
    base[2] = torch.finfo(dtype).max - 0.01 * base[2]
    base[2, 40:50] = torch.finfo(dtype).min
    check(base.to(DEVICE, dtype), 64)


def test_all_in_one_group() -> None:
    """The K largest are neighbours, the other groups' largest all smaller."""
    base = torch.zeros(1, 2000, device=DEVICE)
    base[0, 70:86] = torch.arange(16.0) + 1
    assert check(base, 16).tolist() == [list(range(70, 86))]


@pytest.mark.parametrize("numbers", [0, 1, 15, 40])
def test_infinities_and_undefined(numbers: int) -> None:
    """Fewer numbers than K: the rest are the lowest words at -inf, NaN among them."""
    base = torch.full((2, 1500), -torch.inf, device=DEVICE)
    base[1, ::3] = NAN
    base[:, 1499 - 7 * torch.arange(numbers)] = torch.arange(float(numbers)).to(DEVICE) - 20
    if numbers:
        base[0, 700] = torch.inf
    check(base, 16)


def test_rows_of_a_padded_vocabulary() -> None:
    """What lies behind the vocabulary is not a candidate."""
    wide = torch.full((3, 2048), 1e9, device=DEVICE)
    torch.manual_seed(5)
    wide[:, :1990] = torch.randn(3, 1990)
    check(wide[:, :1990], 16)


def test_refusals_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="K is 24"):
        CandidateFinder(300, 24, 1, torch.float32, DEVICE)
    with pytest.raises(ValueError, match="at most V = 50"):
        CandidateFinder(50, 64, 1, torch.float32, DEVICE)
    with pytest.raises(ValueError, match="float64"):
        CandidateFinder(300, 16, 1, torch.float64, DEVICE)
    with pytest.raises(ValueError, match="66000, possible are 65535"):
        CandidateFinder(300, 16, 4400 * 15, torch.float32, DEVICE)
    finder = CandidateFinder(300, 16, 1, torch.float32, DEVICE)
    ids = torch.empty(1, 16, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="made for"):
        finder.find(torch.zeros(1, 299, device=DEVICE), ids, ids.float())
    with pytest.raises(ValueError, match="values must be"):
        finder.find(torch.zeros(1, 300, device=DEVICE), ids, torch.empty(1, 17, device=DEVICE))
