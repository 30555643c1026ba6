"""Speculative decoding at temperature 0 in plain torch: a reference, and the figures.

It uses the exported weights (rounded to bf16) in fp32. Every speculative continuation is held
against the target's own greedy one and has to be the same, token by token. The one excuse is a
tie: the two ways of computing a logit differ in the last bits, so where the two best logits
differ by less than `TIE_LOGITS` either word is right. Ties are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedTokenizerBase, Qwen3ForCausalLM

from .corpus import Split
from .drafter import Drafter, KeysValues
from .target import target_features
from .tokenizer import format_chat

TIE_LOGITS = 1e-4
PROMPT_TOKENS = 64


@dataclass
class Trace:
    """One continuation and its rounds."""

    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)  # best minus second-best logit, per token
    accepted: list[int] = field(default_factory=list)  # drafts accepted, per round
    confidences: list[list[float]] = field(default_factory=list)  # [gamma] per round


@torch.no_grad()
def greedy(target: Qwen3ForCausalLM, prompt: Sequence[int], count: int) -> Trace:
    """`count` tokens of the target alone, one forward pass each."""
    trace, cache, last = Trace(), DynamicCache(), list(prompt)
    while len(trace.tokens) < count:
        ids = torch.tensor([last], device=target.device)
        logits = target(ids, past_key_values=cache, use_cache=True).logits[0, -1]
        best = logits.topk(2)
        trace.tokens.append(int(best.indices[0]))
        trace.margins.append(float(best.values[0] - best.values[1]))
        last = trace.tokens[-1:]
    return trace


class ContextCache:
    """The drafter's context keys and values, grown as the target reads tokens."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter
        self.length = 0
        self.layers: list[KeysValues] = []

    def extend(self, features: torch.Tensor) -> None:
        """Add features [1, n, m * D] of the next n positions."""
        count = features.shape[1]
        positions = torch.arange(self.length, self.length + count, device=features.device)
        new = self.drafter.context_keys_values(features, positions[None])
        if self.layers:
            new = [
                (torch.cat([old[0], more[0]], dim=2), torch.cat([old[1], more[1]], dim=2))
                for old, more in zip(self.layers, new, strict=True)
            ]
        self.layers, self.length = new, self.length + count


@torch.no_grad()
def speculate(
    target: Qwen3ForCausalLM, drafter: Drafter, prompt: Sequence[int], count: int
) -> Trace:
    """At least `count` tokens by drafting and verifying whole blocks."""
    trace, cache, context = Trace(), DynamicCache(), ContextCache(drafter)

    def read(tokens: Sequence[int]) -> tuple[list[int], torch.Tensor]:
        """Greedy choice after each token, and the features at each token."""
        ids = torch.tensor([list(tokens)], device=target.device)
        out = target(ids, past_key_values=cache, use_cache=True, output_hidden_states=True)
        features = target_features(out.hidden_states, drafter.target_layer_ids)
        return out.logits[0].argmax(-1).tolist(), features

    choices, features = read(prompt)
    context.extend(features)
    trace.tokens.append(choices[-1])
    while len(trace.tokens) < count:
        anchor = trace.tokens[-1]  # at position context.length, not read by the target yet
        drafts, confidences = drafter.draft(target, anchor, context.length, context.layers)
        choices, features = read([anchor, *drafts])
        accepted = 0
        while accepted < len(drafts) and drafts[accepted] == choices[accepted]:
            accepted += 1
        rejected = len(drafts) - accepted
        if rejected:
            cache.crop(-rejected)
        context.extend(features[:, : accepted + 1])
        trace.tokens += [*drafts[:accepted], choices[accepted]]
        trace.accepted.append(accepted)
        trace.confidences.append(confidences)
    return trace


def is_tie(reference: Trace, speculative: Trace) -> bool:
    """Whether the two part, at a tie. False: they agree.

    Raises:
        AssertionError: they part where the target has a clear preference.
    """
    for place, (want, got) in enumerate(zip(reference.tokens, speculative.tokens, strict=False)):
        if want != got:
            margin = reference.margins[place]
            if margin >= TIE_LOGITS:
                raise AssertionError(
                    f"token {place} is {got}, greedy decoding gives {want} by {margin:.2e} logits"
                )
            return True
    return False


def summarise(traces: Sequence[Trace], block_size: int) -> dict[str, Any]:
    """Accepted length (tokens per round, the target's own included), and per position k:

    `acceptance` is the share of rounds that reached k in which draft k was accepted,
    `confidence` the mean confidence in those same rounds. None: no round got there.
    """
    accepted = np.array([a for trace in traces for a in trace.accepted])
    confidences = np.array([c for trace in traces for c in trace.confidences])
    acceptance, confidence, reached_rounds = [], [], []
    for k in range(block_size):
        reached = accepted >= k
        reached_rounds.append(int(reached.sum()))
        acceptance.append(float((accepted[reached] > k).mean()) if reached.any() else None)
        confidence.append(float(confidences[reached, k].mean()) if reached.any() else None)
    return {
        "accepted_length": float(accepted.mean() + 1),
        "rounds": len(accepted),
        "rounds_reaching": reached_rounds,
        "acceptance": acceptance,
        "confidence": confidence,
    }


def text_prompts(stream: torch.Tensor, count: int, length: int = PROMPT_TOKENS) -> list[list[int]]:
    """Pieces of held-out text, spread evenly over `stream`."""
    starts = np.linspace(0, stream.numel() - length, count).astype(int)
    return [stream[start : start + length].tolist() for start in starts]


def chat_prompts(tokenizer: PreTrainedTokenizerBase, split: Split, count: int) -> list[list[int]]:
    """Questions of held-out chat samples, spread evenly over them."""
    picks = np.linspace(0, len(split.chats) - 1, min(count, len(split.chats))).astype(int)
    texts = [format_chat(tokenizer, split.chats[i][0], None) for i in picks]
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def evaluate(
    target: Qwen3ForCausalLM,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    references: Sequence[Trace],
) -> dict[str, Any]:
    """Figures of `summarise` over all prompts, held against `greedy` traces of the same."""
    traces, ties = [], 0
    for prompt, reference in zip(prompts, references, strict=True):
        trace = speculate(target, drafter, prompt, len(reference.tokens))
        ties += is_tie(reference, trace)
        traces.append(trace)
    return {**summarise(traces, drafter.block_size), "prompts": len(traces), "ties": ties}
