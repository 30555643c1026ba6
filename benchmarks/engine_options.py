"""Options of the engine that every arm of a comparison shares."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.arms import ArmSpec
from benchmarks.engine_settings import not_on_a_cpu
from vllm_dspark import cpu

INSTRUMENTS = "benchmarks.instruments.StepCounters"


def capture_sizes(limit: int) -> list[int]:
    """Sizes of CUDA graphs, in tokens, up to `limit`; above 32 no step grows by over a quarter."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 129, 16), *range(160, 257, 32)]
    sizes += [*range(320, 513, 64), *range(640, 1025, 128), *range(1280, 2049, 256)]
    sizes += [*range(2560, 8193, 512)]
    return [size for size in sizes if size <= limit]


def engine_options(
    target: str,
    arm: ArmSpec,
    *,
    has_gpu: bool,
    dtype: str,
    max_model_len: int,
    max_num_seqs: int,
    graph_tokens: int,
    kv_cache_gib: float,
    gpu_share: float,
    seed: int,
    graphs: str = "decode",
) -> dict[str, Any]:
    """Arguments of `LLM`, and by another spelling of `vllm serve`, for one arm.

    Args:
        graph_tokens: largest step, in tokens, that is captured as a CUDA graph: the same for all
            arms of a comparison.
        kv_cache_gib: a fixed size, so that arms do not differ in it, and engines that start at the
            same time do not measure each other.
        gpu_share: memory, as a share of the device's, that has to be free at the start.
        graphs: "vllm" leaves compilation and graphs to vLLM, as a server in production has them.
            The others compile nothing, which starts in seconds: "decode" captures decode steps
            alone, and a step with a prefill is launched kernel by kernel; "breakable" captures
            those too, in pieces around attention. Without a GPU there are none, whatever this is.

    Raises:
        ValueError: without a GPU, a dtype or number of requests that an engine there does not have
            (`engine_settings.settle` has what it does).
    """
    if not has_gpu and (problems := not_on_a_cpu(dtype, max_num_seqs)):
        raise ValueError("; ".join(problems))
    compilation: dict[str, Any] = {"cudagraph_capture_sizes": capture_sizes(graph_tokens)}
    if graphs == "decode":
        compilation |= {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    if graphs == "breakable":
        compilation |= {"mode": 0, "cudagraph_mode": "FULL_AND_PIECEWISE"}
    options: dict[str, Any] = {
        "model": target,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": 8192,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
        "gpu_memory_utilization": gpu_share,
        "seed": seed,
        "worker_extension_cls": INSTRUMENTS,
        "compilation_config": compilation,
    }
    if not has_gpu:
        options = {k: v for k, v in options.items() if k not in _GPU_ONLY}
        options |= cpu.ENGINE_OPTIONS | {"max_num_seqs": max_num_seqs}
    if arm.speculative is not None:
        options["speculative_config"] = arm.speculative
    if arm.additional:
        options["additional_config"] = arm.additional
    return options | arm.engine


_GPU_ONLY = ("gpu_memory_utilization", "compilation_config", "max_num_batched_tokens")


def engine_environment(arm: ArmSpec, has_gpu: bool, graphs: str = "decode") -> dict[str, str]:
    """Environment of an arm's process; `graphs` as in `engine_options`."""
    base = dict(os.environ) if has_gpu else cpu.environment()
    breakable = {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"} if graphs == "breakable" else {}
    return base | breakable | arm.env
