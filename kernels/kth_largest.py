"""The k-th largest of many integers, without sorting: by counting how many reach a trial."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kth_largest(keys, k, low, high, COUNTS: tl.constexpr, SHIFT: tl.constexpr):
    """The largest number in low..high that at least k keys reach; `low` must be one.

    Two trials at a time leave a third of the range; their counts share an integer.

    Args:
        keys: int32, of one or two dimensions.
        k: int.
        low, high: integers of one type, which holds their distance and two more.
        COUNTS: int32 or int64, for two counts, each of SHIFT bits and without a sign.

    Returns:
        A scalar of the type of `low`.
    """
    while low < high:
        third = (high - low + 2) // 3
        lower, upper = low + third, tl.minimum(low + 2 * third, high)
        both = (keys >= lower).to(COUNTS) + ((keys >= upper).to(COUNTS) << SHIFT)
        if len(keys.shape) == 2:  # row by row: without a copy of the keys in another order
            both = tl.sum(both, axis=1)
        counts = tl.sum(both, axis=0)
        reach_lower, reach_upper = (counts & ((1 << SHIFT) - 1)) >= k, (counts >> SHIFT) >= k
        high = tl.where(reach_upper, high, tl.where(reach_lower, upper - 1, lower - 1))
        low = tl.where(reach_upper, upper, tl.where(reach_lower, lower, low))
    return low
