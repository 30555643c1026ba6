"""Verified rounds as a calibrator is told of them: one step of R requests, or several steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class Rounds(NamedTuple):
    """What was predicted, and what came of it; see `OnlineCalibrator.observe`."""

    confidence: npt.NDArray[Any]  # [R, γ]
    accepted: npt.NDArray[Any]  # int [R]
    verified: npt.NDArray[Any]  # int [R]
    sampled: npt.NDArray[Any]  # bool [R]
    learn: npt.NDArray[Any]  # bool [R]
    request: npt.NDArray[Any] | None  # int [R]

    @classmethod
    def of(
        cls,
        gamma: int,
        confidence: npt.ArrayLike,
        accepted: npt.ArrayLike,
        verified: npt.ArrayLike,
        sampled: npt.ArrayLike,
        learn: npt.ArrayLike | None,
        request: npt.ArrayLike | None,
    ) -> Rounds:
        """From arguments that are still to be checked.

        Raises:
            ValueError: naming an argument of another shape or type.
        """
        confidence = shaped("confidence", confidence, (-1, gamma), "fiu")
        rounds = confidence.shape[:1]
        return cls(
            confidence,
            shaped("accepted", accepted, rounds, "iu"),
            shaped("verified", verified, rounds, "iu"),
            shaped("sampled", sampled, rounds, "b"),
            np.ones(rounds, bool) if learn is None else shaped("learn", learn, rounds, "b"),
            None if request is None else shaped("request", request, rounds, "iu"),
        )


def join(
    steps: Sequence[Rounds], most: int, turn: int
) -> tuple[Rounds, npt.NDArray[np.int64] | None]:
    """Rounds of one step after the other, either all or none with requests.

    Args:
        steps: at least one.
        most: rounds of a step, on average; of more than that each second, third, … is taken.
        turn: which of those is the first; to be counted up from call to call.

    Returns:
        The rounds, and int64 [rounds], how many of the steps came after that of each; None if there
        is but one step.
    """
    counts = [len(step.sampled) for step in steps]
    later = np.arange(len(steps))[::-1].repeat(counts)
    stride = max(-(-len(later) // (most * len(steps))), 1)
    kept = slice(turn % stride, None, stride)
    *columns, requests = zip(*steps, strict=True)
    confidence, accepted, verified, sampled, learn = (np.concatenate(c)[kept] for c in columns)
    request = None if requests[0] is None else np.concatenate(requests)[kept]
    rounds = Rounds(confidence, accepted, verified, sampled, learn, request)
    return rounds, later[kept] if len(steps) > 1 else None


def shaped(
    name: str, values: npt.ArrayLike, shape: tuple[int, ...], kinds: str
) -> npt.NDArray[Any]:
    """`values` as an array of that shape, −1 for any number of rows, of a dtype in `kinds`.

    Raises:
        ValueError: they are not; it names them.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f"{name} must have shape {shape}: {error}") from None
    if shape[0] == -1 and array.ndim == len(shape):
        shape = (array.shape[0], *shape[1:])
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    if not array.size:  # an empty list is of floats
        return array.astype(np.bool_ if kinds == "b" else np.int64)
    if array.dtype.kind not in kinds:
        wanted = {"b": "bool", "iu": "integers", "fiu": "numbers"}[kinds]
        raise ValueError(f"{name} must hold {wanted}, got dtype {array.dtype}")
    return array
