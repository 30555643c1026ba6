"""How requests sample: what the kernels take of it, and which need more than that."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.utils.torch_utils import async_tensor_h2d

Ints = npt.NDArray[np.integer]


class DeviceOptions:
    """Temperature, seeds and min-p of all requests in the device's own memory.

    vLLM keeps them in the host's, where kernels read them over the bus, and thousands of programs
    of a launch each would. They change only with the requests, so they are copied only then.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[str, tuple[npt.NDArray[Any], torch.Tensor]] = {}

    def of(
        self, states: Any, slots: Ints
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """By slot: temperature float32, seeds int64, min-p float32, None if none of the requests
        in `slots` int [R] has it."""
        min_p = self._copy("min_p", states) if states.min_p.np[slots].any() else None
        return self._copy("temperature", states), self._copy("seeds", states), min_p

    def _copy(self, name: str, states: Any) -> torch.Tensor:
        values = getattr(states, name).np
        kept = self._kept.get(name)
        if kept is None or not np.array_equal(kept[0], values):
            host = values.copy()  # what is copied from must not change under way
            kept = self._kept[name] = host, async_tensor_h2d(host, device=self._device)
        return kept[1]


class DraftFilters:
    """Top-k and top-p of all requests, kept where a draft's CUDA graph reads them.

    Attributes:
        top_k: int32 [slots], the vocabulary's size or more for none.
        top_p: float32 [slots], 1 for none.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.top_k = torch.full((slots,), np.iinfo(np.int32).max, dtype=torch.int32, device=device)
        self.top_p = torch.ones(slots, device=device)
        self._kept: dict[str, npt.NDArray[Any]] = {}
        self._states: Any = None

    def follow(self, states: Any) -> None:
        """From now on, take them from a sampler's `sampling_states`."""
        self._states = states

    def refresh(self) -> None:
        """Copy what has changed, ahead of a draft's launch. Never waits for the device."""
        if self._states is None:  # warm-up, before there are requests
            return
        for name, out in (("top_k", self.top_k), ("top_p", self.top_p)):
            values = getattr(self._states, name).np
            kept = self._kept.get(name)
            if kept is None or not np.array_equal(kept, values):
                host = self._kept[name] = values.copy()
                async_tensor_h2d(host, out=out)


def needs_processing(sampler: Any, slots: Ints) -> npt.NDArray[np.bool_]:
    """bool [R], for the requests in `slots` int [R], as vLLM's sampler keeps their options.

    vLLM's own flag says that a request needs anything at all. Where temperature or min-p would
    explain it, the states of its processors say whether there is more; a processor that is not
    vLLM's keeps no such state, so with one of these every flagged request counts.
    """
    flagged = np.asarray(sampler.needs_logits_processing[slots])
    if not flagged.any():
        return flagged
    states = sampler.sampling_states
    heat = states.temperature.np[slots]
    kernels_do = (heat != 0) & ((heat != 1) | (states.min_p.np[slots] != 0))
    filtered = (states.top_k.np[slots] != states.vocab_size) | (states.top_p.np[slots] != 1)
    more = (heat != 0) & filtered
    for processor in (*sampler.logits_processors, sampler.thinking_budget_state):
        more |= _active(processor, slots)
    return flagged & (more | ~kernels_do)


def _active(processor: Any, slots: Ints) -> npt.NDArray[np.bool_]:
    if not getattr(processor, "enabled", True):  # thinking budgets without a reasoning parser
        return np.zeros(len(slots), dtype=bool)
    for name in ("use_logit_bias", "use_penalty", "use_thinking_budget"):
        if hasattr(processor, name):
            return np.asarray(getattr(processor, name)[slots])
    if hasattr(processor, "num_bad_words"):
        return np.asarray(processor.num_bad_words.np[slots] > 0)
    return np.ones(len(slots), dtype=bool)
