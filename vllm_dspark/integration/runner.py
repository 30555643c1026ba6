"""The engine seams in vLLM's V2 model runner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_dspark.integration.chosen import serves_dspark


def wrap_init_speculator(original: Callable[..., Any]) -> Callable[..., Any]:
    """Method dspark gets our proposer; every other method, and an engine in this process
    whose configuration turns us off, vLLM's own."""

    def init_speculator(vllm_config: Any, device: Any, req_states: Any) -> Any:
        if not serves_dspark(vllm_config):
            return original(vllm_config, device, req_states)
        from vllm_dspark.integration.proposer import DSparkProposer

        return DSparkProposer(vllm_config, device)

    return init_speculator


def wrap_maybe_create_adaptive_verification_manager(
    original: Callable[..., Any],
) -> Callable[..., Any]:
    """Method dspark gets our manager or, where CUDA graphs need not know of it, none as yet."""

    def maybe_create_adaptive_verification_manager(*, vllm_config: Any, **arguments: Any) -> Any:
        if not serves_dspark(vllm_config):
            return original(vllm_config=vllm_config, **arguments)
        from vllm_dspark.integration.verification.create import create_for_graphs

        return create_for_graphs(vllm_config=vllm_config, **arguments)

    return maybe_create_adaptive_verification_manager
