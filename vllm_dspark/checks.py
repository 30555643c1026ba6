"""Argument checks of the pure core: each raises a ValueError that names the argument.

Booleans are refused where numbers are meant: a mask in the place of a length, or of a
probability, is a swapped argument.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import numpy.typing as npt


def numbers(
    name: str, values: npt.ArrayLike, ndim: int, shape: str, kinds: str = "fiu"
) -> npt.NDArray[Any]:
    """`values` as a non-empty array of `ndim` dimensions whose dtype kind is one of `kinds`.

    Args:
        shape: how to call the expected shape in the error, such as "[R, γ]".
    """
    try:
        array = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} must be an array {shape}: {error}") from None
    if array.ndim != ndim:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} {shape} is empty: its shape is {array.shape}")
    if array.dtype.kind not in kinds:
        wanted = "numbers" if "f" in kinds else "integers"
        raise ValueError(f"{name} must hold {wanted}, got dtype {array.dtype}")
    return array


def probabilities(name: str, values: npt.ArrayLike, ndim: int, shape: str) -> npt.NDArray[Any]:
    """`values` as float32 (if they are that already) or float64, all in [0, 1], none NaN."""
    array = numbers(name, values, ndim, shape)
    if array.dtype != np.float32:
        array = array.astype(np.float64, copy=False)
    lowest, highest = array.min(), array.max()
    if not (lowest >= 0 and highest <= 1):  # NaN fails both
        raise ValueError(f"{name} must lie in [0, 1], got {lowest} to {highest}")
    return array


def positives(name: str, values: npt.ArrayLike, shape: str) -> npt.NDArray[np.float64]:
    """`values` as float64 of one dimension, all above zero and finite."""
    array = numbers(name, values, 1, shape).astype(np.float64, copy=False)
    lowest, highest = array.min(), array.max()
    if not (lowest > 0 and highest < math.inf):
        raise ValueError(f"{name} must be positive and finite, got {lowest} to {highest}")
    return array


def lengths(
    name: str, values: npt.ArrayLike, shape: str, count: int, limit: int
) -> npt.NDArray[np.int64]:
    """`values` as int64 [count], all in 0..limit."""
    array = numbers(name, values, 1, shape, kinds="iu")
    if array.shape != (count,):
        raise ValueError(f"{name} must have shape {shape} = ({count},), got {array.shape}")
    lowest, highest = array.min(), array.max()
    if lowest < 0 or highest > limit:
        raise ValueError(f"{name} must lie in 0..{limit}, got {lowest} to {highest}")
    return array.astype(np.int64, copy=False)


def whole(name: str, value: Any, least: int) -> int:
    """`value` as an int of at least `least`; 2.0 is not one."""
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def amount(name: str, value: Any) -> float:
    """`value` as a finite float of at least zero."""
    try:
        if isinstance(value, (bool, np.bool_, str, bytes)):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {number}")
    return number
