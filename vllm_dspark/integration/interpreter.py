"""The seam on vLLM's sampling where Triton's interpreter stands for the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def wrap_apply_top_k_top_p_triton(original: Callable[..., Any]) -> Callable[..., Any]:
    """Use vLLM's own torch implementation. The kernel calls tensor methods on its loop variable,
    which is a plain int in the interpreter."""

    def apply_top_k_top_p_triton(logits: Any, k: Any, p: Any, **hints: Any) -> Any:
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

        return apply_top_k_top_p_pytorch(logits, k, p)

    return apply_top_k_top_p_triton
