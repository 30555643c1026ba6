"""What the sequential stage costs on a GPU: base logits, then γ draws one after another, against
the same base logits with all γ drawn at once, as a drafter without a Markov head does.

Both are captured in a CUDA graph and replayed; medians over replays. Weights and hidden states are
random, sizes are a large model's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vllm_dspark.heads import build_markov_head

_REPLAYS = 50


def stage_times(
    requests: int,
    gammas: Sequence[int],
    *,
    vocab_size: int = 151_936,
    hidden_size: int = 4096,
    rank: int = 256,
) -> list[dict[str, Any]]:
    """For every γ: `parallel_ms` (LM head and one argmax over all positions), `sequential_ms` (LM
    head, then per position W1, W2, sum and argmax), greedy, bf16, R = `requests`.

    Raises:
        RuntimeError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("the stage's time needs a GPU, and torch sees none")
    torch.manual_seed(0)
    with torch.device("cuda"):
        lm_head = torch.randn(vocab_size, hidden_size, dtype=torch.bfloat16) * hidden_size**-0.5
        head = build_markov_head(
            "vanilla",
            vocab_size=vocab_size,
            draft_vocab_size=vocab_size,
            rank=rank,
            hidden_size=hidden_size,
        )
    head = head.to(torch.bfloat16).requires_grad_(False)
    rows = []
    for gamma in gammas:
        hidden = torch.randn(requests, gamma, hidden_size, device="cuda", dtype=torch.bfloat16)
        anchors = torch.randint(vocab_size, (requests,), device="cuda")

        def parallel(hidden: torch.Tensor = hidden) -> torch.Tensor:
            return (hidden @ lm_head.T).argmax(-1)

        def sequential(
            hidden: torch.Tensor = hidden, anchors: torch.Tensor = anchors, gamma: int = gamma
        ) -> torch.Tensor:
            logits, previous, drawn = hidden @ lm_head.T, anchors, []
            for k in range(gamma):
                latent, _ = head.advance(head.embed(previous), hidden[:, k], None)
                previous = (logits[:, k] + head.bias(latent)).argmax(-1)
                drawn.append(previous)
            return torch.stack(drawn, 1)

        rows.append(
            {
                "requests": requests,
                "gamma": gamma,
                "parallel_ms": graph_ms(parallel),
                "sequential_ms": graph_ms(sequential),
            }
        )
    return rows


def graph_ms(function: Callable[[], torch.Tensor]) -> float:
    """Median time of a CUDA graph's replay, ms."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # what it reads may still be being made
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)
