"""`verify_math.uniform` in plain Python: Philox 4x32-10 (Salmon et al. 2011), that of `tl.rand`."""

from __future__ import annotations

_ALL = 0xFFFFFFFF


def uniform_reference(seed: int, position: int) -> float:
    """u in (0, 1) for an int64 seed and a position of at least 0."""
    key = [seed & _ALL, (seed >> 32) & _ALL]
    counter = [position & _ALL, (position >> 32) & _ALL, 0, 0]
    for _ in range(10):
        left, right = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (right >> 32) ^ counter[1] ^ key[0],
            right & _ALL,
            (left >> 32) ^ counter[3] ^ key[1],
            left & _ALL,
        ]
        key = [(key[0] + 0x9E3779B9) & _ALL, (key[1] + 0xBB67AE85) & _ALL]
    # As a signed number, folded to 31 bits, times the scale that keeps the largest below 1.
    bits = counter[0]
    return max(bits if bits < 1 << 31 else _ALL - bits, 1) * 4.6566127342e-10
