"""The draw after the accepted drafts: nine words in tiles of four, so the last is by itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.kernel_cases import DEVICE
from tests.test_losslessness import p_value
from tests.verify_cases import INF, KINDS, NAN, drawn, on_device
from vllm_dspark.kernels import residual
from vllm_dspark.kernels.verify_batch import Batch, CompactDraft, DenseDraft
from vllm_dspark.kernels.verify_reference import draw

VOCAB, WORDS = 9, 4
TEMPERATURE = 0.7
SAMPLES = 1 << 15 if DEVICE.type == "cuda" else 96  # the interpreter needs about 40 ms for each
SIGNIFICANCE = 1e-3  # of one test; there are 5 and seeds are fixed
REJECTED = 5
# Heavy tiles are not those with the heaviest word, so that a tile's sum is told from its largest.
P = np.array([0.12, 0.12, 0.12, 0.12, 0.02, 0.28, 0.02, 0.02, 0.18])
Q = {
    "one-hot": np.eye(VOCAB)[REJECTED],
    "dense": np.array([0.06, 0.06, 0.06, 0.06, 0.01, 0.66, 0.02, 0.02, 0.05]),
    "compact": np.array([0, 0.36, 0, 0, 0, 0.5, 0, 0, 0.14]),
}


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residual, "WORDS", WORDS)
    assert residual.residual_tiles(VOCAB) == (WORDS, 3)


def case(
    kind: str, p: np.ndarray, q: np.ndarray, requests: int, heat: float = TEMPERATURE
) -> Batch:
    """Requests that differ in their seeds alone, each with one draft from q and a bonus row."""
    with np.errstate(divide="ignore"):
        logits, logprobs = torch.tensor(np.log(p)).float(), torch.tensor(np.log(q)).float()
    draft: DenseDraft | CompactDraft | None = None
    if kind == "dense":
        draft = DenseDraft((TEMPERATURE * logprobs).repeat(requests, 1, 1))
    elif kind == "compact":
        ids = torch.tensor([8, 1, 5, 0], dtype=torch.int32)  # 0 is padding or one with q = 0
        own = logprobs[ids.long()].repeat(requests, 1, 1)
        draft = CompactDraft(ids.repeat(requests, 1, 1), own.contiguous())
    return on_device(
        Batch(
            logits=(TEMPERATURE * logits + 3).repeat(2 * requests, 1),
            offsets=torch.arange(0, 2 * requests + 1, 2, dtype=torch.int32),
            tokens=torch.tensor([0, REJECTED]).repeat(requests),
            positions=torch.tensor([50, 51]).repeat(requests),
            slots=torch.arange(requests),
            temperature=torch.full((requests,), heat),
            seeds=torch.arange(requests) * 1_000_003 + 17,
            gamma=1,
            draft=draft,
        )
    )


def tokens_of(batch: Batch, rejected: int, factor: float = 1.0) -> list[int]:
    """What is drawn for each request, none of which may fail."""
    verdict = drawn(batch, [rejected] * batch.requests, factor)
    assert not verdict.failed.any()
    assert (verdict.tokens[:, 1] == -1).all()
    return verdict.tokens[:, 0].tolist()


@pytest.mark.parametrize("kind", [*KINDS, "bonus"])
def test_draws_follow_what_is_left(kind: str) -> None:
    """max(p - q, 0) in place of a draft, p after the last."""
    left = P if kind == "bonus" else np.clip(P - Q[kind], 0, None)
    batch = case("dense" if kind == "bonus" else kind, P, Q.get(kind, Q["dense"]), SAMPLES)
    tokens = np.array(tokens_of(batch, -1 if kind == "bonus" else REJECTED))
    if kind == "one-hot":
        left = np.where(np.arange(VOCAB) == REJECTED, 0, P)
    assert p_value(tokens[:, None], left / left.sum()) > SIGNIFICANCE


def test_reference_draws_follow_the_weights() -> None:
    """Many draws, which the kernels repeat one by one in `test_kernel_verify`."""
    batch = case("one-hot", P, P, 3000)
    tokens = [draw(batch, i, 0, torch.tensor(5 * P, device=DEVICE))[0] for i in range(3000)]
    assert p_value(np.array(tokens)[:, None], P) > SIGNIFICANCE


@pytest.mark.parametrize("kind", KINDS)
def test_rejected_draft_has_its_tile_to_itself(kind: str) -> None:
    """The other words of its tile are excluded, and of the third tile too: what is drawn is the one
    word of the first that is left."""
    p = np.zeros(VOCAB)
    p[[2, REJECTED]] = 0.4, 0.6
    assert tokens_of(case(kind, p, Q["one-hot"], 4), REJECTED) == [2] * 4


@pytest.mark.parametrize("kind", ["dense", "compact"])
def test_rejected_draft_is_taken_where_nothing_is_left(kind: str) -> None:
    """As after a block whose prefix passed by a ratio below 1, with p = q behind it."""
    p = Q["compact"]
    assert tokens_of(case(kind, p, p, 3), REJECTED, factor=0.99) == [REJECTED] * 3


@pytest.mark.parametrize("heat", [0.0, TEMPERATURE])
def test_broken_rows_fail_in_any_tile(heat: float) -> None:
    """Each alone; a word that is excluded, or a tile of them, breaks nothing."""
    batch = case("one-hot", P, P, 6, heat)
    logits = batch.logits.clone()
    logits[0, 6] = NAN
    logits[2, 8] = INF
    logits[4] = -INF
    logits[6, 4:] = -INF
    logits[8, :8] = -INF
    logits[10, 1] = NAN
    logits[10, 7] = INF
    verdict = drawn(replace(batch, logits=logits), [-1] * 6)
    assert verdict.failed.tolist() == [1, 1, 1, 0, 0, 1]
    tokens = verdict.tokens[:, 0].tolist()
    assert [tokens[i] for i in (0, 1, 2, 5)] == [0] * 4
    assert tokens[3] in range(4)
    assert tokens[4] == 8
