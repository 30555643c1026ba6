"""Full CUDA graphs for steps that have a prefill beside decodes.

In its default mode vLLM captures such a step in pieces and launches attention between them, layer
by layer. That takes the host longer than the device takes for the rest, and speculation has more
such steps than decoding has: the more tokens a step emits, the fewer steps lie between the arrivals
of two requests. Where attention can replay batches of any lengths, one graph takes the whole step,
as with vLLM's `cudagraph_mode` FULL. Decode steps keep their own graphs. vLLM's adaptive
verification has no such mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vllm_dspark.config import DSparkConfig
from vllm_dspark.integration.chosen import like_measured, no_carrier, record, refusal, serves_dspark


def settle_prefill_graphs(vllm_config: Any, config: DSparkConfig) -> None:
    """Write what was chosen into the configuration that travels to the workers, which says already
    what verification is.

    Raises:
        DSparkConfigError: full graphs were asked for that this engine cannot have.
    """
    asked = config.prefill_graphs
    problem = None if asked == "piecewise" else obstacle(vllm_config)
    if asked == "full" and problem is not None:
        raise refusal("prefill_graphs", asked, problem)
    if asked == "auto" and (problem is not None or not like_measured(vllm_config)):
        record(vllm_config, prefill_graphs="piecewise")


def obstacle(vllm_config: Any) -> str | None:
    """Why a step with a prefill cannot be one graph, as far as the configuration says; None if it
    can be."""
    from vllm.config.compilation import CUDAGraphMode

    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    mode = vllm_config.compilation_config.cudagraph_mode
    if mode != CUDAGraphMode.FULL_AND_PIECEWISE:
        return f"cudagraph_mode is {mode.name}, needed is FULL_AND_PIECEWISE"
    if model.is_hybrid or model.is_encoder_decoder or model.is_multimodal_model:
        return "the target reads more than text, or has other layers than attention"
    ranks = {
        "data_parallel_size": parallel.data_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "decode_context_parallel_size": parallel.decode_context_parallel_size,
        "prefill_context_parallel_size": parallel.prefill_context_parallel_size,
    }
    if several := [f"{name} is {size}" for name, size in ranks.items() if size > 1]:
        return f"{several[0]}, needed is 1"
    others = {
        "LoRA adapters": vllm_config.lora_config is not None,
        "K/V connectors, which look at every layer": vllm_config.kv_transfer_config is not None,
        "kv_sharing_fast_prefill": vllm_config.cache_config.kv_sharing_fast_prefill,
        "microbatches": parallel.use_ubatching,
    }
    if asked := [name for name, is_on in others.items() if is_on]:
        return f"it was not tried together with {asked[0]}"
    if DSparkConfig.from_additional_config(vllm_config.additional_config).verification == "all":
        return "all drafts are verified, needed is adaptive verification"
    return no_carrier(vllm_config)


def wrap_init_candidates(original: Callable[..., Any]) -> Callable[..., Any]:
    """The target's manager of CUDA graphs gets full ones in the place of pieces; all others, and
    those of engines without DSpark, what they had."""

    def _init_candidates(self: Any) -> None:
        from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

        original(self)
        if isinstance(self, ModelCudaGraphManager) and _wanted(self):
            make_whole(self)

    return _init_candidates


def make_whole(manager: Any) -> None:
    """Turn the graphs in pieces into full ones, before any is captured.

    Args:
        manager: vLLM's `ModelCudaGraphManager`, which looks for graphs of decode steps first.
    """
    from vllm.config.compilation import CUDAGraphMode

    pieces = manager._capture_descs.pop(CUDAGraphMode.PIECEWISE, [])
    whole = {
        piece: replace(
            piece,
            cg_mode=CUDAGraphMode.FULL,
            num_reqs=min(piece.num_tokens, manager.max_num_reqs),
        )
        for piece in pieces
    }
    full = [*manager._capture_descs.get(CUDAGraphMode.FULL, []), *whole.values()]
    full.sort(key=lambda graph: graph.num_tokens, reverse=True)  # the others share its memory
    manager._capture_descs[CUDAGraphMode.FULL] = full
    for candidates in manager._candidates.values():
        candidates[:] = [whole.get(graph, graph) for graph in candidates]


def _wanted(manager: Any) -> bool:
    """
    Raises:
        DSparkConfigError: full graphs were asked for, and an attention backend cannot replay them.
    """
    from vllm.config.compilation import CUDAGraphMode

    vllm_config = manager.vllm_config
    in_pieces = manager.cudagraph_mode == CUDAGraphMode.FULL_AND_PIECEWISE
    if not (in_pieces and manager.varlen_decode and serves_dspark(vllm_config)):
        return False
    asked = DSparkConfig.from_additional_config(vllm_config.additional_config).prefill_graphs
    if asked == "piecewise":
        return False
    unable = _no_mixed_lengths(vllm_config)
    if unable is not None and asked == "full":
        raise refusal("prefill_graphs", asked, unable)
    return unable is None


def _no_mixed_lengths(vllm_config: Any) -> str | None:
    """The first attention backend whose graphs cannot replay batches of any lengths, in words."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.v1.attention.backend import AttentionCGSupport

    for layer in vllm_config.compilation_config.static_forward_context.values():
        if not isinstance(layer, AttentionLayerBase):
            continue
        spec = layer.get_kv_cache_spec(vllm_config)
        if spec is None:  # shares another's
            continue
        backend = layer.get_attn_backend()
        support = backend.get_builder_cls().get_cudagraph_support(vllm_config, spec)
        if support != AttentionCGSupport.ALWAYS:
            return f"{backend.get_name()} cannot replay batches with a prefill"
    return None
