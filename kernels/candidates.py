"""Candidates: the K likeliest words of every position by its base logits alone.

One pass over the base logits, then work on a small part of them:

    1. the largest of every GROUP neighbouring words;
    2. the K groups with the largest of these;
    3. the K largest words among those groups' K · GROUP.

Every one of the K largest words is in those groups: were it in none, K groups would each hold a
word that outranks it. With equals ranked by the lower word, and groups by the lower group, that
holds for ties too, so the choice is exact and the same in every run.

The K largest of N keys are found without sorting. The K-th largest key is searched for: keys that
reach a trial are counted, for two trials at a time, which leaves a third of the range. As a rule it
is within two powers of two of the largest, where there are 256 keys of bf16: seven counts. What
reaches it is then written in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_dspark.kernels.kth_largest import kth_largest

_ROWS_OF_GROUPS = 64  # groups that a program of the first launch takes: 8 KB of bf16
SIZES = (16, 32, 64, 128, 256)


@triton.jit
def _number(value):
    """Float32; what is no number counts as -inf, and 0 has one sign."""
    value = value.to(tl.float32)
    return tl.where(value == value, tl.where(value == 0.0, 0.0, value), -float("inf"))


@triton.jit
def group_maxima_kernel(
    value_ptr,  # [rows, V], rows value_stride apart
    value_stride,
    out_ptr,  # [rows, groups], dtype of the values, out
    vocab,
    groups,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    value = tl.load(value_ptr + row * value_stride + word, mask=word < vocab, other=-float("inf"))
    tl.store(out_ptr + row * groups + group, tl.max(_number(value), axis=1), mask=group < groups)


@triton.jit
def select_kernel(
    value_ptr,  # [rows, N], rows value_stride apart
    value_stride,
    group_ptr,  # int32 [rows, K]: look only at these groups of GROUP; None: at all N
    index_ptr,  # int32 [rows, K], out, ascending
    kept_ptr,  # float32 [rows, K], out, or None
    count,  # N
    GROUP: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    WINDOW: tl.constexpr,  # keys of two powers of two
):
    # Two counts share an integer.
    COUNTS: tl.constexpr = tl.int32 if BLOCK < 32768 else tl.int64
    SHIFT: tl.constexpr = 16 if BLOCK < 32768 else 32
    MASK: tl.constexpr = (1 << SHIFT) - 1
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    index = lane
    if group_ptr is not None:
        index = tl.load(group_ptr + row * K + lane // GROUP) * GROUP + lane % GROUP
    has = index < count
    value = tl.load(value_ptr + row * value_stride + index, mask=has, other=-float("inf"))
    value = _number(value)
    bits = value.to(tl.int32, bitcast=True)
    # Integers that order as the floats do; bits below the dtype's last are the same for all.
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - BITS)
    lowest = -(1 << (BITS - 1))
    key = tl.where(has, key, lowest)  # below that of -inf

    # The K-th largest lies in low..high. Integers of 64 bits hold the distance of any two keys.
    high = tl.max(key, axis=0).to(tl.int64)
    near = tl.maximum(high - WINDOW, lowest)
    reached = tl.sum((key >= near).to(tl.int32), axis=0) >= K
    low = tl.where(reached, near, lowest)
    high = tl.where(reached, high, near - 1)
    low = kth_largest(key, K, low, high, COUNTS, SHIFT)

    above, equal = key > low, key == low
    room = K - tl.sum(above.to(tl.int32), axis=0)
    places = tl.cumsum(above.to(COUNTS) + (equal.to(COUNTS) << SHIFT), axis=0)
    equals = places >> SHIFT
    taken = above | (equal & (equals <= room))
    at = row * K + (places & MASK) + tl.minimum(equals, room) - 1
    tl.store(index_ptr + at, index, mask=taken)
    if kept_ptr is not None:
        tl.store(kept_ptr + at, value, mask=taken)


_MOST_ROWS = 65535  # of a grid's second dimension


def group_size(count: int) -> int:
    """Words of a group for K = `count`: so that the last choice is among 4,096 where it can be."""
    return 64 if count <= 64 else 32


class CandidateFinder:
    """Owns what lies between the launches.

    Args:
        vocab_size: V, at least K.
        count: K, one of `SIZES`.
        max_rows: most rows of a call, R · γ.
        dtype: of the base logits, float32, bfloat16 or float16.

    Raises:
        ValueError: a K, dtype or number of rows that the kernels do not take.
    """

    _BITS = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}  # noqa: RUF012

    def __init__(
        self, vocab_size: int, count: int, max_rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if count not in SIZES or count > vocab_size:
            raise ValueError(f"K is {count}, needed is one of {SIZES}, at most V = {vocab_size}")
        if max_rows > _MOST_ROWS:
            raise ValueError(f"R · γ is {max_rows}, possible are {_MOST_ROWS}: fewer requests or γ")
        if dtype not in self._BITS:
            raise ValueError(f"base logits are {dtype}, known are {list(self._BITS)}")
        self.vocab_size, self.count, self._bits = vocab_size, count, self._BITS[dtype]
        self.group = group_size(count)
        groups = triton.cdiv(vocab_size, self.group)
        self._maxima = torch.empty(max_rows, groups, dtype=dtype, device=device)
        self._chosen = torch.empty(max_rows, count, dtype=torch.int32, device=device)

    def find(
        self,
        base_logits: torch.Tensor,  # [rows, V], the finder's dtype; words contiguous
        ids: torch.Tensor,  # int32 [rows, K], out: draft words, ascending
        values: torch.Tensor,  # float32 [rows, K], out: their base logits
    ) -> None:
        """The K largest base logits of each row, the lowest words among equals. NaN counts as
        -inf; a row with fewer numbers than K is filled up with its lowest words at -inf.

        Raises:
            ValueError: shapes or strides that the kernels do not take.
        """
        rows, vocab = base_logits.shape
        if vocab != self.vocab_size or base_logits.stride(1) != 1 or rows > len(self._maxima):
            raise ValueError(
                f"base_logits is {tuple(base_logits.shape)}, made for [{len(self._maxima)} or "
                f"fewer, {self.vocab_size}] with words side by side"
            )
        if base_logits.dtype != self._maxima.dtype:
            raise ValueError(f"base_logits is {base_logits.dtype}, made for {self._maxima.dtype}")
        for name, tensor in (("ids", ids), ("values", values)):
            if tensor.shape != (rows, self.count) or not tensor.is_contiguous():
                raise ValueError(f"{name} must be [{rows}, {self.count}], contiguous")
        groups = self._maxima.shape[1]
        among = None
        if groups > self.count:
            group_maxima_kernel[(triton.cdiv(groups, _ROWS_OF_GROUPS), rows)](
                base_logits,
                base_logits.stride(0),
                self._maxima,
                vocab,
                groups,
                GROUP=self.group,
                BLOCK=_ROWS_OF_GROUPS,
                num_warps=4,
            )
            among = self._chosen
            self._select(self._maxima[:rows], None, groups, among, None)
        self._select(base_logits, among, vocab, ids, values)

    def _select(
        self,
        values: torch.Tensor,
        among: torch.Tensor | None,
        count: int,
        out: torch.Tensor,
        kept: torch.Tensor | None,
    ) -> None:
        block = triton.next_power_of_2(count) if among is None else self.count * self.group
        select_kernel[(values.shape[0],)](
            values,
            values.stride(0),
            among,
            out,
            kept,
            count,
            GROUP=self.group,
            K=self.count,
            BLOCK=block,
            BITS=self._bits,
            WINDOW=1 << (self._bits - 8),
            num_warps=min(max(4, block // 512), 16),
        )
