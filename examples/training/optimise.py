"""The loop that both trainings share.

It is bounded twice, in steps and in seconds. The learning rate follows the larger of the two
fractions, so it is annealed to zero whichever limit is met first.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

WARMUP = 0.03  # share of the training in which the learning rate rises
MAX_GRADIENT_NORM = 1.0

# Metrics of one step: name → scalar tensor, on the device.
Metrics = dict[str, torch.Tensor]


@dataclass
class Progress:
    """What happened in a training."""

    steps: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)  # mean over the last interval


def learning_rate_scale(progress: float) -> float:
    """Linear warm-up, then half a cosine down to zero. Domain and range [0, 1]."""
    if progress < WARMUP:
        return max(progress, 1e-3) / WARMUP
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1.0 - WARMUP))))


def autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """bf16 arithmetic on a GPU, plain fp32 elsewhere."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def build_optimizer(
    module: nn.Module, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters. Only matrices are decayed."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = all(parameter.is_cuda for parameter in trainable)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=fused)


def fit(
    step_fn: Callable[[int], tuple[torch.Tensor, Metrics]],
    module: nn.Module,
    *,
    label: str,
    steps: int,
    max_seconds: float,
    learning_rate: float,
    weight_decay: float,
    log_every: int = 100,
) -> Progress:
    """Minimise `step_fn(step)` → (loss, metrics) over the parameters of `module`.

    The clock is read at points where the device has caught up, every 10 steps, so that a
    queue of launched steps does not overrun `max_seconds`.

    Raises:
        FloatingPointError: the loss is no longer finite.
    """
    optimizer = build_optimizer(module, learning_rate, weight_decay)
    progress, since_log = Progress(), 0
    totals: Metrics = {}
    started = time.monotonic()
    while progress.steps < steps and progress.seconds < max_seconds:
        fraction = max(progress.steps / steps, progress.seconds / max_seconds)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * learning_rate_scale(fraction)
        loss, metrics = step_fn(progress.steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()

        progress.steps += 1
        since_log += 1
        for name, value in {"loss": loss, **metrics}.items():
            totals[name] = totals[name] + value.detach() if name in totals else value.detach()
        synchronise = progress.steps % 10 == 0 or progress.steps == steps
        if synchronise and not math.isfinite(loss.item()):
            raise FloatingPointError(f"{label}: loss is not finite at step {progress.steps}")
        progress.seconds = time.monotonic() - started
        last = progress.steps >= steps or progress.seconds >= max_seconds
        if progress.steps % log_every == 0 or last:
            progress.metrics = {name: float(total) / since_log for name, total in totals.items()}
            totals, since_log = {}, 0
            figures = "  ".join(f"{name} {value:.4f}" for name, value in progress.metrics.items())
            print(
                f"{label} {progress.steps:6d}/{steps} {progress.seconds:6.1f} s  {figures}",
                flush=True,
            )
    return progress
