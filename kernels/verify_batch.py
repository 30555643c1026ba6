"""What one call of the verification kernels works on.

Row n of the logits is the target's distribution behind one token. The rows of request r are
offsets[r] to offsets[r + 1] - 1: the row of its last emitted token, then one for each of its ℓ_r
drafts. So row offsets[r] + i judges draft i, which is the token of the row after it, and the last
row gives the bonus token. ℓ_r may be 0, and is known to the device alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

ONE_HOT, DENSE, COMPACT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # forms of q

# Words of a tile. It is a function of the vocabulary alone: sums are split in the same places
# whatever else is in the batch, so a request's tokens do not depend on its neighbours.
MOST_WORDS = 4096
MOST_VOCAB = 1 << 24  # a word's id is kept as a float32


@dataclass(frozen=True)
class DenseDraft:
    """Draft logits of the whole vocabulary, as vLLM caches them.

    Attributes:
        logits: [slots, γ, V'], any float, before temperature; words contiguous. Words beyond V' are
            never drafted.
    """

    logits: torch.Tensor


@dataclass(frozen=True)
class CompactDraft:
    """Draft distributions over K candidates; all other words are never drafted.

    Attributes:
        ids: int32 [slots, γ, K], different words of the target's vocabulary.
        logprobs: float32 [slots, γ, K], after temperature, normalised over the candidates; -inf
            pads, whatever the id. Strides as those of `ids`.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """R requests with N rows. Tensors of a request's options are read by slot, its place in the
    engine's request table.

    Attributes:
        logits: [N, V], bf16, fp16 or fp32; words contiguous. -inf excludes a word.
        offsets: int32 [R + 1], first row of each request, then N or the rows in use.
        tokens: int [N], the token that each row stands behind. A negative draft is a placeholder:
            it ends the request's drafts, and the row before it gives the replacement.
        positions: int64 [N], of `tokens` in their sequences; they key the randomness.
        slots: int [R].
        temperature: float32 [slots], 0 takes the likeliest word.
        seeds: int64 [slots].
        gamma: most drafts that a request can have.
        most_drafts: most that one of this batch has, as far as the host knows; None for γ. It saves
            programs that find nothing to do.
        min_p: float32 [slots], probability relative to the likeliest word below which a word is
            excluded, 0 for none; None if no request has one.
        draft: what the drafts were drawn from; None where each was the only word it could be.
        processed: float32 [P, V], logits that already went through the temperature and everything
            else that its request asks for; None if there are none.
        processed_row: int32 [N], the row's place in `processed`, -1 where `logits` counts. Given
            exactly where `processed` is.

    Raises:
        ValueError: shapes or strides do not fit.
    """

    logits: torch.Tensor
    offsets: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    temperature: torch.Tensor
    seeds: torch.Tensor
    gamma: int
    most_drafts: int | None = None
    min_p: torch.Tensor | None = None
    draft: DenseDraft | CompactDraft | None = None
    processed: torch.Tensor | None = None
    processed_row: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.logits.ndim != 2 or self.logits.stride(1) != 1:
            raise ValueError("logits must be [N, V] with contiguous words")
        rows, vocab = self.logits.shape
        if not 0 < vocab <= MOST_VOCAB:
            raise ValueError(f"logits has {vocab} words, possible are 1 to {MOST_VOCAB}")
        if self.offsets.shape != (self.requests + 1,):
            raise ValueError(f"offsets must be [{self.requests + 1}], one more than slots")
        if self.tokens.shape != (rows,) or self.positions.shape != (rows,):
            raise ValueError(f"tokens and positions must be [{rows}], one for each row of logits")
        if not 0 <= self.steps <= self.gamma:
            raise ValueError(f"most_drafts is {self.most_drafts}, possible are 0 to {self.gamma}")
        if (self.processed is None) != (self.processed_row is None):
            raise ValueError("processed and processed_row are given together or not at all")
        if self.processed is not None and (
            self.processed.stride(1) != 1 or self.processed.shape[1] != vocab
        ):
            raise ValueError(f"processed must be [P, {vocab}] with contiguous words")
        self._check_draft()

    def _check_draft(self) -> None:
        if isinstance(self.draft, DenseDraft):
            shape, last = self.draft.logits.shape, self.draft.logits.stride(-1)
        elif isinstance(self.draft, CompactDraft):
            shape, last = self.draft.ids.shape, self.draft.ids.stride(-1)
            same = self.draft.logprobs.stride() == self.draft.ids.stride()
            if self.draft.logprobs.shape != shape or not same:
                raise ValueError("ids and logprobs of the draft must have one shape and strides")
        else:
            return
        if len(shape) != 3 or shape[1] < self.gamma or last != 1:
            raise ValueError(f"draft must be [slots, {self.gamma}, words] with contiguous words")
        if isinstance(self.draft, DenseDraft) and shape[2] > self.vocab_size:
            raise ValueError(
                f"draft has {shape[2]} words, more than the {self.vocab_size} of logits"
            )

    @property
    def steps(self) -> int:
        """Steps at which a request of this batch may have a draft."""
        return self.gamma if self.most_drafts is None else self.most_drafts

    @property
    def requests(self) -> int:
        """R."""
        return self.slots.shape[0]

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.logits.shape[1]

    @property
    def kind(self) -> int:
        """ONE_HOT, DENSE or COMPACT."""
        forms = {type(None): ONE_HOT, DenseDraft: DENSE, CompactDraft: COMPACT}
        return forms[type(self.draft)].value

    @property
    def candidates(self) -> int:
        """K of a compact draft in the next power of two, else 1."""
        if not isinstance(self.draft, CompactDraft):
            return 1
        return triton.next_power_of_2(self.draft.ids.shape[2])

    def target_arguments(self) -> tuple[torch.Tensor | int | None, ...]:
        """The five that `target_logits` takes first."""
        processed, stride = (
            self.processed,
            0 if self.processed is None else self.processed.stride(0),
        )
        return self.logits, self.logits.stride(0), processed, stride, self.processed_row

    def draft_arguments(self) -> tuple[torch.Tensor | int | None, ...]:
        """The five that `draft_probability` takes first."""
        if isinstance(self.draft, DenseDraft):
            logits = self.draft.logits
            return logits, None, logits.stride(0), logits.stride(1), logits.shape[2]
        if isinstance(self.draft, CompactDraft):
            ids = self.draft.ids
            return self.draft.logprobs, ids, ids.stride(0), ids.stride(1), ids.shape[2]
        return None, None, 0, 0, 0

    def request_arguments(self) -> tuple[torch.Tensor | None, ...]:
        """Where the rows are and how each request samples, in the order that the kernels take."""
        return (
            self.offsets, self.tokens, self.positions, self.slots, self.temperature, self.min_p,
            self.seeds,
        )  # fmt: skip


def tile_words(vocab_size: int) -> int:
    """Words of a tile: a power of two."""
    return min(MOST_WORDS, triton.next_power_of_2(vocab_size))


def tile_count(vocab_size: int) -> int:
    """Tiles of the vocabulary."""
    return triton.cdiv(vocab_size, tile_words(vocab_size))
