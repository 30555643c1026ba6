"""What drafting from candidates costs: the figures of its benchmarks, against cases by hand."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.candidate_overlap import (
    DENSE,
    Source,
    compare,
    draft_probability,
    expected_rounds,
    sources_of,
    target_probabilities,
)
from benchmarks.candidate_overlap import markdown as overlap_markdown
from benchmarks.candidates import REGIMES, figures, markdown
from benchmarks.inflation.forward import Probe, in_fp8, run_pair
from benchmarks.inflation.pair import open_pair
from benchmarks.reference_kernels import ReferenceCandidates, ReferenceDense, ReferenceVerifier
from tests.engine import MICRO
from tests.kernel_cases import DEVICE, block, draws
from tests.verify_cases import batch
from vllm_dspark.kernels.candidate import CandidateDrafter
from vllm_dspark.kernels.dense import DenseDrafter
from vllm_dspark.kernels.verify import Verifier


def test_figures_of_an_engine() -> None:
    """Of 10 rounds, 4 accept none, 3 one, and 3 both."""
    counters = {
        "vllm:spec_decode_num_drafts": 10.0,
        "vllm:spec_decode_num_accepted_tokens_per_pos[0]": 6.0,
        "vllm:spec_decode_num_accepted_tokens_per_pos[1]": 3.0,
    }
    accepted = [0] * 4 + [1] * 3 + [2] * 3
    found = figures(counters, 2)
    assert found["accepted_length"] == pytest.approx(1 + np.mean(accepted))
    assert found["standard_error"] == pytest.approx(np.std(accepted) / np.sqrt(10))
    assert found["rounds"] == 10
    arms = {"all words": dict.fromkeys(REGIMES, found)}
    table = markdown({"pair": "a pair", "gamma": 2, "kernels": "these", "arms": arms})
    assert table.count("1.900 ± 0.263 (10 rounds)") == len(REGIMES)


def test_rounds_along_a_text() -> None:
    """None accepted, all accepted, and one of two with a chance of a half."""
    assert expected_rounds(np.zeros((5, 3))) == 5
    assert expected_rounds(np.ones((9, 2))) == 3
    assert expected_rounds(np.ones((7, 2))) == 3  # the last one ends beyond the text
    # Two words: the first round reaches the second word's end or leaves one more to do.
    assert expected_rounds(np.full((2, 1), 0.5)) == 1.5


def test_rounds_are_those_of_speculation() -> None:
    """Over all texts of two words, by the rules of rejection sampling written down for γ = 1."""
    random = np.random.default_rng(0)
    p, q = random.dirichlet(np.ones(3), 4), random.dirichlet(np.ones(3), 4)
    # Distributions 0 for the first word, 1 + x for the second, behind the word x.
    mean = 0.0
    for x, y in product(range(3), repeat=2):
        reached = np.minimum(1, [[q[0, x] / p[0, x]], [q[1 + x, y] / p[1 + x, y]]])
        mean += p[0, x] * p[1 + x, y] * expected_rounds(reached)
    overlap = np.minimum(p[0], q[0]).sum()
    assert mean == pytest.approx(2 - overlap)  # one round if its draft is accepted, else two


@pytest.mark.parametrize("source", sources_of(40).values(), ids=list(sources_of(40)))
@pytest.mark.parametrize("regime", REGIMES.values(), ids=list(REGIMES))
def test_probabilities(regime: dict[str, Any], source: Source) -> None:
    """Of all words they sum to 1, and the words that have none are those that are left out."""
    torch.manual_seed(1)
    base, logits = 3 * torch.randn(2, 40), 3 * torch.randn(2, 40)
    words = torch.arange(40)
    each = [
        draft_probability(base[[row] * 40], logits[[row] * 40], words, regime, source)
        for row in range(2)
    ]
    for row, q in enumerate(each):
        assert q.sum() == pytest.approx(1)
        if source.candidates:
            others = base[row].argsort(descending=True)[source.candidates :]
            assert not q[others].any()
        if regime["temperature"] == 0:
            assert sorted(q.tolist())[-2:] == [0, 1]
    p = target_probabilities(logits, regime)
    assert p.sum(-1).tolist() == pytest.approx([1, 1])
    if not source.candidates and (source.filtered or "top_p" not in regime):
        torch.testing.assert_close(torch.stack(each), p)
    if "top_p" in regime:
        whole = torch.softmax(logits.double(), -1)
        kept = (whole * (p > 0)).sum(-1)
        least = torch.where(p > 0, whole, 1.0).amin(-1)
        assert (kept >= 0.9).all()
        assert (kept - least < 0.9).all()  # no word more than needed


@pytest.mark.parametrize(
    ("source", "weights"),
    [
        (Source(0, filtered=False), [1, 10, 3, 6]),
        (Source(0), [0, 10, 3, 6]),  # 0.5 + 0.3 falls short of 0.9, and 0.15 more reaches it
        (Source(2), [0, 10, 3, 0]),  # 10/13 falls short
    ],
)
def test_top_p_by_hand(source: Source, weights: list[int]) -> None:
    """Four words; the two likeliest by base logits are not the two by logits."""
    logits = torch.tensor([[1.0, 10.0, 3.0, 6.0]]).log().expand(4, 4)
    base = torch.tensor([[0.0, 2.0, 3.0, 1.0]]).expand(4, 4)
    regime = REGIMES["temperature 1, top-p 0.9"]
    q = draft_probability(base, logits, torch.arange(4), regime, source)
    assert q.tolist() == pytest.approx([weight / sum(weights) for weight in weights])


def test_filters_change_nothing_without_top_p() -> None:
    """To the last bit: the change against all words is exactly 0."""
    dense, filtered = (sources_of(40)[name] for name in (DENSE, f"{DENSE}, filtered"))
    logits = torch.randn(40, 40, generator=torch.Generator().manual_seed(1))
    for regime in REGIMES.values():
        q, ours = (
            draft_probability(logits, logits, torch.arange(40), regime, source)
            for source in (dense, filtered)
        )
        assert torch.equal(q, ours) == ("top_p" not in regime)


def test_a_drafter_in_fp8() -> None:
    """Rows have a scale of their own and three bits. All that is rounded is the drafter's: with
    nothing left of its factors it proposes every word alike, and the target says what it said."""
    rows = torch.randn(4, 300) * torch.tensor([1e-3, 1.0, 1e3, 0.0])[:, None]
    off = (in_fp8(rows) - rows).abs() / rows.abs().amax(1, keepdim=True).clamp_min(1e-12)
    assert 0.01 < off[:3].max() < 0.036  # half a step next to the largest: 16 of 448
    assert (off[3] == 0).all()
    pair = open_pair(MICRO, MICRO / "dspark-vanilla")
    probe = Probe(torch.arange(40)[None], torch.tensor([[8, 20]]))
    exact = run_pair(pair, probe, torch.device("cpu"))
    rounded = run_pair(pair, probe, torch.device("cpu"), in_fp8)
    nothing = run_pair(pair, probe, torch.device("cpu"), torch.zeros_like)
    for other in (rounded, nothing):
        assert torch.equal(other.logits, exact.logits)
    assert (nothing.draft_logits == 0).all()
    change = (rounded.draft_logits - exact.draft_logits).std() / exact.draft_logits.std()
    assert 0.005 < change < 0.2


def test_compared_with_dense() -> None:
    """Text by text a tenth more rounds is a change without any error."""
    dense = np.array([20.0, 30.0, 25.0])
    found = compare(1.1 * dense, dense, emitted=60)
    assert found["accepted_length"] == pytest.approx(180 / (1.1 * 75))
    assert found["change_percent"] == pytest.approx(100 / 1.1 - 100)
    assert found["change_standard_error"] == pytest.approx(0, abs=1e-9)
    assert found["standard_error"] > 0
    arms = {name: dict.fromkeys(REGIMES, found) for name in ("all words", "16 candidates")}
    table = overlap_markdown({"pair": "", "gamma": 7, "texts": 3, "emitted": 60, "arms": arms})
    assert table.count("-9.09 ± 0.00 %") == len(REGIMES)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the references stand in on a CPU")
def test_references_draw_as_the_kernels_do() -> None:
    """Tokens, cached logits and proposals, with a row that only pads."""
    case, requests, depth = block("rnn", 3, 2, vocab=80, rank=8), 3, 2
    wanted = draws(requests, depth, padded=1)
    drawn = []
    for candidates, all_words in (
        (CandidateDrafter, DenseDrafter),
        (ReferenceCandidates, ReferenceDense),
    ):
        few = candidates(case.head, requests, depth, 16, torch.float32)
        inputs = case.base, case.hidden, case.anchors
        ids = torch.zeros(requests, depth, 16, dtype=torch.int32)
        logprobs, cache = torch.zeros(requests, depth, 16), torch.zeros(requests, depth, 80)
        tokens = case.tokens.clone(), case.tokens.clone()
        few.draw(*inputs, tokens[0], wanted, ids, logprobs)
        all_words(case.head, requests).draw(*inputs, tokens[1], wanted, cache)
        drawn.append((*tokens, ids, logprobs, cache))
    for ours, reference in zip(*drawn, strict=True):
        torch.testing.assert_close(ours, reference)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the references stand in on a CPU")
@pytest.mark.parametrize("method", ["standard", "block"])
def test_references_verify_as_the_kernels_do(method: Any) -> None:
    case = batch([2, 0, 4], 37, "compact")
    ours, reference = (
        kind(3, case.gamma, DEVICE).verify(case, method) for kind in (Verifier, ReferenceVerifier)
    )
    assert torch.equal(ours.tokens, reference.tokens)
    assert torch.equal(ours.counts, reference.counts)
