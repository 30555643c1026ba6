"""Whether DSpark is ours in an engine, and what was chosen where its configuration left it open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_dspark.config import DSparkConfig, DSparkConfigError
from vllm_dspark.kernels.dispatch import MEASURED


def serves_dspark(vllm_config: Any) -> bool:
    """Whether this engine's DSpark is ours."""
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method != "dspark":
        return False
    return DSparkConfig.from_additional_config(vllm_config.additional_config).enabled


def no_carrier(vllm_config: Any) -> str | None:
    """Why nothing can be recorded; None if it can be."""
    if isinstance(vllm_config.additional_config, Mapping):
        return None
    return "additional_config is not an object that could carry the decision"


def refusal(option: str, asked: str, problem: str) -> DSparkConfigError:
    """The error where an option asks for what an engine cannot do."""
    return DSparkConfigError(
        f'additional_config["dspark"]: {option} is "{asked}", but {problem}. Fix: leave it out.'
    )


def record(vllm_config: Any, **chosen: Any) -> None:
    """Write options of `DSparkConfig` into the configuration that travels; compiled code is kept
    apart by them, too. An `additional_config` that is no object carries nothing: all defaults."""
    additional = vllm_config.additional_config
    if no_carrier(vllm_config) is None:
        options = {**additional.get("dspark", {}), **chosen}
        vllm_config.additional_config = {**additional, "dspark": options}


def like_measured(vllm_config: Any) -> bool:
    """Whether an engine is one like those that choices were measured to be faster in: on such a
    CUDA device (`is_measured` asks a worker's own), on one rank, compiled by vLLM or not at all."""
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return False
    capability = current_platform.get_device_capability()
    alone = vllm_config.parallel_config.tensor_parallel_size == 1
    mode = vllm_config.compilation_config.mode
    as_usual = mode in (CompilationMode.NONE, CompilationMode.VLLM_COMPILE)
    return alone and as_usual and capability is not None and capability.major == MEASURED
