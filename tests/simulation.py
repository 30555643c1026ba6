"""Speculative decoding by hand: a random target, a random drafter, and a real policy in the loop.

Words depend on the word before them alone, so the probability of every emitted word given its
predecessor is a row of the target's table, and each emitted word is one draw from it.
Confidences depend on drawn tokens as a confidence head's do: c_k is known once x_{k−1} is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# Lengths of all requests, from slots, drafts, budget, raw confidences of the current block.
Allocate = Callable[[Any, np.ndarray, np.ndarray, int, np.ndarray], np.ndarray]


def on_host(
    policy: Any, slots: np.ndarray, drafts: np.ndarray, budget: int, _: np.ndarray
) -> np.ndarray:
    """Host mode on a CPU: by the current block."""
    return policy.allocate(slots, drafts, budget)


def on_host_of_a_gpu(
    policy: Any, slots: np.ndarray, drafts: np.ndarray, budget: int, _: np.ndarray
) -> np.ndarray:
    """Host mode on a GPU: by the block before."""
    return policy.allocate(slots, drafts, budget, current=False)


class Simulation:
    """R requests that decode together, without end.

    Args:
        target, drafter: [V, V], row: distribution after that word.
        confidence: [V, γ], c_k after that word.
        policy: decides; its slots are the requests.
        allocate: whose drafts are verified.
        greedy: drafts are the likeliest words; otherwise they are drawn from the drafter.
        lag: steps between drawing and arrival of confidences, 0 on a CPU.
        samples: of four steps the policy hears of two.

    Attributes:
        lengths: int [rounds, R], verified drafts.
        pairs: int [V, V, V], emitted (word before last, last word, word).
    """

    def __init__(
        self,
        target: np.ndarray,
        drafter: np.ndarray,
        confidence: np.ndarray,
        policy: Any,
        allocate: Allocate,
        greedy: bool,
        lag: int,
        seed: int,
        samples: bool = False,
    ) -> None:
        self._samples = samples
        self.target, self._confidence, self._policy = target, confidence, policy
        self._drafter = np.eye(len(drafter))[drafter.argmax(axis=1)] if greedy else drafter
        self._allocate, self._lag = allocate, lag
        self._random = np.random.default_rng(seed)
        self._requests, self._gamma = len(policy.sampled), policy.gamma
        for slot in range(self._requests):
            policy.add_request(slot, 0, sampled=True)
        self.pairs = np.zeros((len(target),) * 3, dtype=np.int64)
        self.lengths = np.zeros((0, self._requests), dtype=np.int64)

    def run(self, rounds: int) -> None:
        """Decode that many rounds."""
        policy, requests, gamma = self._policy, self._requests, self._gamma
        slots, drafts = np.arange(requests), np.full(requests, gamma)
        before, last = np.zeros((2, requests), dtype=np.int64)
        verified = np.zeros(requests, dtype=np.int64)
        accepted = np.zeros(requests, dtype=np.int64)
        waiting: list[tuple[Any, ...]] = []
        lengths = []
        for step in range(rounds):
            words, confidence = self._draw(last)
            policy.drafted(step, slots, gamma)
            if not self._samples or step % 4 < 2:
                waiting.append((step, accepted, verified, confidence))
            while waiting and waiting[0][0] <= step - self._lag:
                drawn, *outcome, raw = waiting.pop(0)
                policy.outcomes_arrived(drawn, slots, *outcome)
                policy.confidences_arrived(drawn, slots, raw)
            budget = policy.standing(slots, drafts)
            if budget is None:
                budget = policy.choose(slots, drafts, requests, requests, 0)
            verified = self._allocate(policy, slots, drafts, budget, confidence)
            lengths.append(verified)
            accepted = np.zeros(requests, dtype=np.int64)
            for r in range(requests):
                for word in self._emit(last[r], words[r], verified[r]):
                    self.pairs[before[r], last[r], word] += 1
                    before[r], last[r] = last[r], word
                    accepted[r] += 1
            accepted -= 1  # the target's own word
        self.lengths = np.array(lengths)

    def _draw(self, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        words, confidence = [], []
        for k in range(self._gamma):
            confidence.append(self._confidence[last, k])
            last = self._one_of(self._drafter[last])
            words.append(last)
        return np.stack(words, axis=1), np.stack(confidence, axis=1).astype(np.float32)

    def _one_of(self, probabilities: np.ndarray) -> np.ndarray:
        """A word for each row [R, V]."""
        drawn = self._random.random((len(probabilities), 1))
        beyond = (probabilities.cumsum(axis=1) <= drawn).sum(axis=1)
        return np.minimum(beyond, probabilities.shape[1] - 1)

    def _emit(self, last: int, words: np.ndarray, length: int) -> list[int]:
        """Rejection sampling (Leviathan et al. 2023) of the first `length` drafts."""
        emitted: list[int] = []
        for word in words[:length]:
            p, q = self.target[last], self._drafter[last]
            if self._random.random() * q[word] >= p[word]:
                rest = np.maximum(p - q, 0)
                return [*emitted, int(self._one_of(rest[None] / rest.sum())[0])]
            emitted.append(int(word))
            last = word
        return [*emitted, int(self._one_of(self.target[[last]])[0])]
