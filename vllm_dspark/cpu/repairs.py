"""Three gaps of Triton 3.9's interpreter that vLLM's sampling kernels and ours fall into.

1. Masked loads, stores and atomics pass the mask to compiled code that takes booleans only;
   `tensor_mask & scalar` gives integers, and the call fails with "mask has unsupported
   dtype". The mask is cast to bool here.
2. `libdevice` functions are declarations without a body, so they return None. The ones that
   vLLM's sampler calls get a body in plain `triton.language`.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


def repair_interpreter() -> None:
    """Close the gaps in this process. Doing it twice is a no-op."""
    import triton.language as tl
    import triton.language.extra.libdevice as libdevice
    from triton.runtime.interpreter import InterpreterBuilder

    for name, mask_index in (
        ("create_masked_load", 1),
        ("create_masked_store", 2),
        ("create_atomic_rmw", 3),
    ):
        method = getattr(InterpreterBuilder, name)
        if not hasattr(method, "__wrapped__"):
            setattr(InterpreterBuilder, name, _with_bool_mask(method, mask_index))
    if not hasattr(InterpreterBuilder.create_dot, "__wrapped__"):
        InterpreterBuilder.create_dot = _with_wide_operands(InterpreterBuilder.create_dot)

    def log1p(x: Any) -> Any:
        # log(1 + x), corrected for the digits that 1 + x drops when x is small.
        shifted = 1.0 + x
        lost = shifted - 1.0
        return tl.where(lost == 0.0, x, tl.log(shifted) * (x / tl.where(lost == 0.0, 1.0, lost)))

    def isnan(x: Any) -> Any:
        return x != x

    libdevice.log1p = log1p
    libdevice.isnan = isnan


def _with_bool_mask(method: Any, mask_index: int) -> Any:
    @functools.wraps(method)
    def wrapper(self: Any, *args: Any) -> Any:
        mask = args[mask_index]
        if mask.data.dtype != np.bool_:
            mask.data = mask.data.astype(np.bool_)
        return method(self, *args)

    return wrapper


def _with_wide_operands(create_dot: Any) -> Any:
    import triton.language as tl

    @functools.wraps(create_dot)
    def wrapper(self: Any, a: Any, b: Any, *args: Any) -> Any:
        a, b = (
            self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
        )
        return create_dot(self, a, b, *args)

    return wrapper
