"""What vLLM found on this machine."""

from __future__ import annotations


def has_triton() -> bool:
    """Whether vLLM found a Triton backend, which its V2 model runner needs."""
    from vllm.triton_utils import HAS_TRITON

    return HAS_TRITON
