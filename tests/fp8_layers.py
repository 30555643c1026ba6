"""vLLM's own linear layers, quantized in place, in a process of their own: they need an engine's
configuration and process groups. Run by `tests.test_draft_quantization`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_dspark.integration.draft_quantization import _quantize


def errors(target: str) -> dict[str, tuple[str, float, float]]:
    """Of each kind of layer that a drafter has, with outputs up to a thousand times as large as
    others: dtype of its weight; root of the mean square of its error, relative to that of the
    output, over the outputs the worst; and the same of the layer when Dynamo traced it."""
    arguments: dict[str, Any] = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 64}
    limits = {"max_num_batched_tokens": 64, "max_num_seqs": 2}
    config = EngineArgs(model=target, **arguments, **limits).create_engine_config()
    found = {}
    with set_current_vllm_config(config), tempfile.TemporaryDirectory() as folder:
        address = f"file://{Path(folder) / 'store'}"
        init_distributed_environment(1, 0, address, 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        with set_default_torch_dtype(torch.bfloat16):
            layers = (
                QKVParallelLinear(64, 32, 2, 1, bias=False),
                MergedColumnParallelLinear(64, [48, 48], bias=False),
                RowParallelLinear(64, 96, bias=False),
            )
            for layer in layers:
                found[type(layer).__name__] = _error(layer)
    return found


@torch.no_grad()
def _error(layer: Any) -> tuple[str, float, float]:
    generator = torch.Generator().manual_seed(0)
    layer.weight.normal_(generator=generator)
    rows = layer.weight.shape[0]
    layer.weight.mul_(torch.logspace(-2, 1, rows, dtype=torch.bfloat16)[:, None])
    inputs = torch.randn(128, 64, generator=generator, dtype=torch.float32).bfloat16()
    exact = inputs.float() @ layer.weight.float().T
    _quantize(layer)
    traced = torch.compile(layer, backend="eager", fullgraph=True)
    offs = []
    for run in (layer, traced):
        off = (run(inputs)[0].float() - exact).square().mean(0).sqrt()
        offs.append(float((off / exact.square().mean(0).sqrt()).max()))
    return str(layer.weight.dtype), offs[0], offs[1]
