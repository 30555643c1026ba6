"""Gumbel noise that is a function of (seed, position, word) alone.

The hash is MurmurHash3_x86_32 (A. Appleby, public domain) over four 32-bit words: low and high
half of the request's seed, the position, the word. vLLM keys its own sampler the same way
(`v1/worker/gpu/sample/gumbel.py`), so a draft drawn here is the one that it would have drawn. The
first three words are the same for a whole row of logits: `noise_key` absorbs them once per row,
and `gumbel` the fourth per word.
"""

from __future__ import annotations

import triton
import triton.language as tl

# vLLM adds this to the position of a draft, so that a proposal and the residual it may be replaced
# from never share noise. Positions are below it.
DRAFT_SALT = tl.constexpr(1 << 30)


@triton.jit
def _rotate(bits, N: tl.constexpr):
    return (bits << N) | (bits >> (32 - N))


@triton.jit
def _absorb(state, word):
    word = _rotate(word * 0xCC9E2D51, 15) * 0x1B873593
    return _rotate(state ^ word, 13) * 5 + 0xE6546B64


@triton.jit
def noise_key(seed, position, step, BY_STEP: tl.constexpr):
    """What the noise of a row shares.

    Args:
        seed: int64, of the request.
        position: int64, of the token before the drawn one.
        step: which draft of the block, counted from 0. Mixed into the seed if BY_STEP, as vLLM
            0.33 does where it caches draft logits.

    Returns:
        uint32, shaped like `seed`.
    """
    if BY_STEP:
        seed = seed ^ (tl.cast(step, tl.int64) << 32)
    position = position + DRAFT_SALT
    state = _absorb((seed ^ seed).to(tl.uint32), (seed & 0xFFFFFFFF).to(tl.uint32))
    state = _absorb(state, ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    return _absorb(state, (position & 0xFFFFFFFF).to(tl.uint32))


@triton.jit
def gumbel(key, word):
    """Standard Gumbel noise, float32: -log(-log(1 - u)) with u uniform in (0, 1).

    The noise that wins an argmax comes from u near 0, where float32 is finest; there log(1 - u)
    is summed as a series. u takes all 32 bits of the hash, in two halves that float32 holds
    exactly.

    Args:
        key: uint32, from `noise_key`.
        word: int, id in the target's vocabulary. Broadcast against `key`.
    """
    bits = _absorb(key, word.to(tl.uint32)) ^ 16  # 16 bytes were hashed
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    bits = bits ^ (bits >> 16)
    high = (bits >> 16).to(tl.int32).to(tl.float32)
    low = (bits & 0xFFFF).to(tl.int32).to(tl.float32)
    u = high * (1.0 / (1 << 16)) + (low + 0.5) * (1.0 / (1 << 32))
    # -log(1 - u) = u + u²/2 + u³/3 + ..., eight terms by Horner's rule, innermost first
    series = 1.0 / 8
    for n in tl.static_range(1, 8):
        series = 1.0 / (8 - n) + u * series
    exponential = tl.where(u < 0.25, u * series, -tl.log(tl.maximum(1.0 - u, 1.0 / (1 << 24))))
    return -tl.log(exponential)
