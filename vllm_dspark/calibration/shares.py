"""How much of what a calibrator remembers came from each request, and how much more it may add."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

# Requests followed at a time, above what an engine runs at once.
SLOTS = 4096
# Doublings of the scale after which the table is brought back to 1; float64 ends at 2^1023.
RESCALE = 500.0


class RequestShares:
    """Weight that each request holds per cell, forgotten at the pace of everything else.

    A cell is what is limited on its own, here a position of a regime. A request is a number of
    its own, such as a running count of requests. It shares a slot with those that are a multiple
    of `SLOTS` away; the one seen last owns the slot and starts from nothing, so no request has
    to be signed off.

    Args:
        cells: how many.
        limit: weight that a request may hold in a cell, in observations.
    """

    def __init__(self, cells: int, limit: float) -> None:
        self.limit = limit
        self._owner = np.full(SLOTS, np.iinfo(np.int64).min)
        # In units of 2^(−scale), so that forgetting is one addition, not a pass over the table.
        self._held = np.zeros((SLOTS, cells))
        self._scale = np.zeros(cells)

    def claim(self, request: Ints) -> Ints:
        """Slots [R] of these requests [R], emptied where another one had them."""
        slot = request % SLOTS
        new = slot[self._owner[slot] != request]
        if new.size:
            self._held[new] = 0
            self._owner[slot] = request
        return slot

    def allowed(self, slot: Ints, cell: Ints) -> Floats:
        """Weight in [0, 1] that each of n observations may have: what is left of the limit."""
        held = self._held.take(slot * self._scale.size + cell)
        return np.clip(self.limit - held * np.exp2(-self._scale).take(cell), 0, 1)

    def forget(self, half_lives: Floats) -> None:
        """Halve what is held `half_lives` times, float64 [cells]."""
        self._scale += half_lives
        if self._scale.max() > RESCALE:
            self._held *= np.exp2(-self._scale)
            self._scale[:] = 0

    def add(self, slot: Ints, cell: Ints, weight: Floats) -> None:
        """Book the weight that each of n observations was given."""
        index = slot * self._scale.size + cell
        np.add.at(self._held.reshape(-1), index, weight * np.exp2(self._scale).take(cell))
