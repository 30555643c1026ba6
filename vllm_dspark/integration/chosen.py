"""What was chosen where the configuration left it open, for every process of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MEASURED = 9  # major compute capability


def record(vllm_config: Any, **chosen: Any) -> None:
    """Write options of `DSparkConfig` into the configuration that travels; compiled code is kept
    apart by them, too. An `additional_config` that is no object carries nothing: all defaults."""
    additional = vllm_config.additional_config
    if isinstance(additional, Mapping):
        options = {**additional.get("dspark", {}), **chosen}
        vllm_config.additional_config = {**additional, "dspark": options}


def like_measured(vllm_config: Any) -> bool:
    """Whether an engine is one like those that choices were measured to be faster in: on CUDA's
    compute capability 9, on one rank, and without torch.compile."""
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return False
    capability = current_platform.get_device_capability()
    alone = vllm_config.parallel_config.tensor_parallel_size == 1
    as_is = vllm_config.compilation_config.mode == CompilationMode.NONE
    return alone and as_is and capability is not None and capability.major == _MEASURED
