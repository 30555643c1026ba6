"""What the LM head takes: a part of every step that vLLM's dummy runs leave out.

With LoRA the head may have adapters. Their kernels go by a mapping of rows to adapters that was set
beforehand, and write as many rows as that has, whatever they are given. So every number of rows
gets a mapping of its own, with all adapters in use, as in dummy runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

_REPEATS = 5
_MOST_ROWS = 256  # logits of more rows would need memory that may not be free


def head_line(runner: Any) -> tuple[float, float]:
    """Time LM head and argmax on a GPU, for few rows and for many.

    Args:
        runner: vLLM's V2 model runner. All tensor-parallel ranks must call this together.

    Returns:
        ms without any row and ms for each row, at least 0 both; 0 where there is no GPU.
    """
    device = runner.input_buffers.query_start_loc.device
    if device.type != "cuda":
        return 0.0, 0.0
    width = runner.model_config.get_hidden_size()
    most = max(min(runner.max_num_reqs, _MOST_ROWS), 2)
    hidden = torch.zeros((most, width), dtype=runner.model_config.dtype, device=device)
    few_ms, most_ms = (_time(runner, hidden[:rows]) for rows in (1, most))
    slope = max((most_ms - few_ms) / (most - 1), 0.0)
    return max(few_ms - slope, 0.0), slope


def _time(runner: Any, hidden: torch.Tensor) -> float:
    """Median ms of LM head and argmax of [rows, D]."""
    times = []
    lora = runner.lora_config
    with runner.maybe_dummy_run_with_lora(
        lora,
        num_scheduled_tokens=np.ones(len(hidden), dtype=np.int32),
        num_sampled_tokens=None,  # one of each request
        num_active_loras=0 if lora is None else lora.max_loras,
    ):
        for _ in range(_REPEATS):
            began = torch.cuda.Event(enable_timing=True)
            ended = torch.cuda.Event(enable_timing=True)
            began.record()
            runner.model.compute_logits(hidden).argmax(dim=-1)
            ended.record()
            ended.synchronize()
            times.append(began.elapsed_time(ended))
    return float(np.median(times))
