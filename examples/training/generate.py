"""Text in the target's own words, for the drafter's training.

A drafter is measured on what the target writes, not on what people wrote. Rows start with a
few tokens of real text and go on with what the target samples.
"""

from __future__ import annotations

import time

import torch
from transformers import DynamicCache, Qwen3ForCausalLM

from .optimise import autocast
from .stream import random_windows

PROMPT_TOKENS = 32
BATCH_ROWS = {"cuda": 1024, "cpu": 64}
TEMPERATURES = (1.0, 1.0, 0.0)  # taken in turn by the rows of a batch


@torch.no_grad()
def continue_rows(
    model: Qwen3ForCausalLM, prompts: torch.Tensor, length: int, generator: torch.Generator
) -> torch.Tensor:
    """Continue int64 [N, P] to [N, length]; row i samples at `TEMPERATURES[i % 3]`."""
    temperature = torch.tensor(TEMPERATURES, device=prompts.device)
    temperature = temperature[torch.arange(len(prompts), device=prompts.device) % len(TEMPERATURES)]
    cache = DynamicCache()
    rows, last = [prompts], prompts
    for _ in range(length - prompts.shape[1]):
        with autocast(prompts.device):
            hidden = model.model(last, past_key_values=cache, use_cache=True).last_hidden_state
            logits = model.lm_head(hidden[:, -1]).float()
        # argmax(u / T + Gumbel noise) is a draw from softmax(u / T); scaling by T keeps T = 0.
        noise = torch.empty_like(logits).exponential_(generator=generator)
        noise = noise.clamp_min_(1e-20).log_()
        last = (logits - temperature[:, None] * noise).argmax(-1, keepdim=True)
        rows.append(last)
    return torch.cat(rows, dim=1)


def generate_rows(
    model: Qwen3ForCausalLM,
    stream: torch.Tensor,
    *,
    rows: int,
    length: int,
    max_seconds: float,
    generator: torch.Generator,
) -> torch.Tensor:
    """About `rows` rows of `length` tokens, fewer when `max_seconds` is over: int32 [N, length].

    At least one batch is always made.
    """
    started = time.monotonic()
    batches: list[torch.Tensor] = []
    batch_size = min(BATCH_ROWS[stream.device.type], rows)
    while len(batches) * batch_size < rows:
        prompts = random_windows(stream, batch_size, min(PROMPT_TOKENS, length // 2), generator)
        batches.append(continue_rows(model, prompts, length, generator).int())
        seconds = time.monotonic() - started
        print(f"generated {len(batches) * batch_size:6d}/{rows} rows {seconds:6.1f} s", flush=True)
        # Stop where one more batch of the usual length would overrun the limit.
        if seconds * (len(batches) + 1) / len(batches) > max_seconds:
            break
    return torch.cat(batches)
