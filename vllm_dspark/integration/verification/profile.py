"""Whether an engine profiles its steps at start-up: it need not, where that was done before.

Tensor-parallel ranks run dummy steps together, and price steps alike. So the first rank alone looks
into the cache, and all go by what it found. Data-parallel engines look into it each for itself
and may have to run dummy steps together, too: with more than one, all of them profile.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from typing import Any

from vllm_dspark import __version__
from vllm_dspark.config import DSparkConfig
from vllm_dspark.integration.cost_cache import CostCache, cache_folder
from vllm_dspark.integration.verification.costs import StepCosts
from vllm_dspark.kernels.dispatch import wanted


class ProfileSource:
    """Of one engine.

    Args:
        choice: `profile` of DSparkConfig.
        key: what a profile holds for, but for the captured graphs.
        engines: in data parallel.
    """

    def __init__(self, choice: str, key: dict[str, str], engines: int = 1) -> None:
        self._choice, self._key = choice, key
        self._refusal = "" if choice == "auto" else f"profile is {choice}"
        if engines > 1:
            self._refusal = f"{engines} engines in data parallel"
        self._cache: CostCache | None = None
        self._began = 0.0
        self._why = ""

    def settle(self, costs: StepCosts, captured: Sequence[int]) -> bool:
        """Bring prices from elsewhere, if there are some.

        Args:
            costs: to fill.
            captured: tokens of captured graphs, ascending.

        Returns:
            Whether nothing is left to profile.
        """
        from vllm.distributed.parallel_state import get_tp_group

        if self._choice == "skip":
            _log("not profiled, a guess that every step corrects: profile is skip")
            return True
        self._began = time.perf_counter()
        key = self._key | {"graphs": " ".join(map(str, captured))}
        self._cache = cache = CostCache(cache_folder(), key)
        group = get_tp_group()
        found: tuple[str | None, str] = (None, self._refusal)
        if not self._refusal:
            found = cache.read() if group.rank_in_group == 0 else (None, "")
            found = group.broadcast_object(found, src=0)
        text, self._why = found
        if text is None:
            return False
        costs.restore(cache.model(text), captured)
        _log(f"from {cache.path}")
        return True

    def keep(self, costs: StepCosts) -> None:
        """Steps were profiled; the first rank writes it down."""
        from vllm.distributed.parallel_state import get_tp_group

        if self._cache is None or get_tp_group().rank_in_group != 0:
            return
        seconds = time.perf_counter() - self._began
        problem = self._cache.write(costs.model)
        kept = f"not kept: {problem}" if problem else f"kept in {self._cache.path}"
        _log(f"profiled in {seconds:.1f} s ({self._why}), {kept}")


def profile_source(runner: Any, mode: str) -> ProfileSource:
    """Of the engine of vLLM's V2 model runner, which has its KV cache.

    Args:
        mode: of the verification manager.
    """
    vllm_config = runner.vllm_config
    config = DSparkConfig.from_additional_config(vllm_config.additional_config)
    engines = vllm_config.parallel_config.data_parallel_size
    return ProfileSource(config.profile, profile_key(runner, config, mode), engines)


def profile_key(runner: Any, config: DSparkConfig, mode: str) -> dict[str, str]:
    """All that step times depend on, as far as an engine is told: shapes, not weights; hardware;
    what runs them, and how.

    Args:
        runner: its drafter is loaded, and what draws with it is chosen.
        mode: of the verification manager.
    """
    import torch
    import triton
    import vllm

    engine = runner.vllm_config
    model, parallel, cache = engine.model_config, engine.parallel_config, engine.cache_config
    speculative, scheduler = engine.speculative_config, engine.scheduler_config
    drafter, proposer, lora = speculative.draft_model_config, runner.speculator, engine.lora_config
    on_gpu = runner.device.type == "cuda"
    entries = {
        "target": _digest(model.hf_config),
        "drafter": _digest(drafter.hf_config),
        "device": torch.cuda.get_device_name(runner.device) if on_gpu else runner.device.type,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm-dspark": __version__,
        "environment": _environment(),
        "dtype": (model.dtype, drafter.dtype),
        "quantization": (model.quantization, drafter.quantization, config.draft_quantization),
        "kv cache": f"{cache.cache_dtype}, blocks of {cache.block_size}",
        "ranks": (
            parallel.tensor_parallel_size,
            parallel.pipeline_parallel_size,
            parallel.prefill_context_parallel_size,
            parallel.decode_context_parallel_size,
            parallel.enable_expert_parallel,
            speculative.draft_tensor_parallel_size,
        ),
        "compilation": (
            engine.compilation_config.mode,
            engine.compilation_config.cudagraph_mode,
        ),
        "attention": (_backends(runner.attn_groups), _backends(proposer.attn_groups)),
        "lora": lora and (lora.max_loras, lora.max_lora_rank),
        "limits": (
            scheduler.max_num_seqs,
            scheduler.max_num_batched_tokens,
            model.max_model_len,
        ),
        "drafting": (speculative.num_speculative_tokens, speculative.draft_sample_method),
        # On a device, what shares budgets out and what verifies follows from what was asked for.
        "kernels": wanted(config.kernels, os.environ)[0],
        "drawing": (
            "reference" if proposer.kernels is None else "triton",
            config.draft_candidates,
            proposer.use_confidence_head,
            proposer.peak_confidence,
        ),
        "depth": (config.depth, config.draft_block, proposer.plan.varies, proposer.plan.depths),
        "verification": (config.verification, mode),
        "context": config.profile_context,
    }
    return {name: str(value) for name, value in entries.items()}


def _digest(hf_config: Any) -> str:
    """Of a model's shape, by any name."""
    return _hash({k: v for k, v in hf_config.to_dict().items() if k != "_name_or_path"})


def _environment() -> str:
    """Of the variables that are set and that vLLM takes to change what it compiles."""
    from vllm import envs

    return _hash({k: v for k, v in envs.compile_factors().items() if k in os.environ})


def _hash(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _backends(attn_groups: Any) -> list[str]:
    return sorted({group.backend.get_name() for groups in attn_groups for group in groups})


def _log(what: str) -> None:
    from vllm.logger import init_logger

    init_logger("vllm.dspark").info_once("vllm-dspark: step costs: %s", what)
