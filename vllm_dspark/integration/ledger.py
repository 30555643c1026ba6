"""All patches of this package, in the order in which they come into play.

Four groups. The *interpreter* seams belong to running without a GPU (`vllm_dspark.cpu`), with or
without DSpark; they are put in place when the plugin loads in a process that asked for it, and
in no other. The *request* seams are put in place when the plugin loads: they are how a request
for DSpark reaches us at all, and they hand everything else on unchanged. The *front-end* seams are
put in place where a configuration that asks for DSpark is finished, the *engine* seams in a worker
process, and only when its engine was asked for DSpark.
"""

from __future__ import annotations

from vllm_dspark.integration.arguments import wrap_add_cli_args, wrap_create_speculative_config
from vllm_dspark.integration.engine_config import wrap_validate_adaptive_verification
from vllm_dspark.integration.front_end import wrap_client_init, wrap_stat_loggers_init
from vllm_dspark.integration.interpreter import wrap_apply_top_k_top_p_triton
from vllm_dspark.integration.patching import Patch
from vllm_dspark.integration.prefill_graphs import wrap_init_candidates
from vllm_dspark.integration.runner import (
    wrap_init_speculator,
    wrap_maybe_create_adaptive_verification_manager,
)
from vllm_dspark.integration.sampling_params import wrap_validate_spec_decode

_MANAGER_ARGUMENTS = (
    "enable_adaptive_verification",
    "attn_groups",
    "req_states",
    "query_start_loc",
    "num_bonus_tokens",
    "max_total_logits",
    "vllm_config",
    "target_layer_names",
    "additional_attn_cg_support",
)

REQUEST_SEAMS = (
    Patch(
        target="vllm.engine.arg_utils:EngineArgs.add_cli_args",
        reason="--speculative-config takes the bare word dspark and dspark:PATH_OR_ID",
        upstream="a registry of named speculative configs behind --speculative-config",
        parameters=("parser",),
        wrap=wrap_add_cli_args,
        static=True,
    ),
    Patch(
        target="vllm.engine.arg_utils:EngineArgs.create_speculative_config",
        reason="finds the drafter, checks options and checkpoint before anything loads",
        upstream="a validation hook for plugins in SpeculativeConfig",
        parameters=("self", "target_model_config", "target_parallel_config"),
        wrap=wrap_create_speculative_config,
    ),
    Patch(
        target="vllm.config.vllm:VllmConfig._validate_adaptive_verification",
        reason=(
            "a finished config that asks for DSpark gets our worker class, and what our adaptive "
            "verification supports (eager, CPU, LoRA) is not refused"
        ),
        upstream="a hook for plugins at the end of VllmConfig.__post_init__",
        parameters=("self",),
        wrap=wrap_validate_adaptive_verification,
    ),
    Patch(
        target="vllm.sampling_params:SamplingParams._validate_spec_decode",
        reason=(
            "min_p and logit_bias work with DSpark: the V2 runner applies both to every row; our "
            "own options in extra_args are checked"
        ),
        upstream="a check that knows the model runner's version, and a hook for extra_args",
        parameters=("self", "speculative_config"),
        wrap=wrap_validate_spec_decode,
    ),
)

FRONT_END_SEAMS = (
    Patch(
        target="vllm.v1.engine.core_client:MPClient.__init__",
        reason="the front end reads our stats of the scheduler, for /metrics",
        upstream="a field for plugins in SchedulerStats",
        parameters=(
            "self",
            "asyncio_mode",
            "vllm_config",
            "executor_class",
            "log_stats",
            "client_addresses",
            "renderer",
        ),
        wrap=wrap_client_init,
    ),
    Patch(
        target="vllm.v1.metrics.loggers:StatLoggerManager.__init__",
        reason="our metrics stand beside vLLM's, where an engine serves DSpark by us",
        upstream="a stat logger plugin that does not turn stats on where they are off",
        parameters=(
            "self",
            "vllm_config",
            "engine_idxs",
            "custom_stat_loggers",
            "enable_default_loggers",
            "aggregate_engine_logging",
            "client_count",
        ),
        wrap=wrap_stat_loggers_init,
    ),
)

ENGINE_SEAMS = (
    Patch(
        target="vllm.v1.worker.gpu.model_runner:init_speculator",
        reason="the runner builds our proposer for method dspark",
        upstream="a registry of speculators by method name",
        parameters=("vllm_config", "device", "req_states"),
        wrap=wrap_init_speculator,
    ),
    Patch(
        target=("vllm.v1.worker.gpu.model_runner:maybe_create_adaptive_verification_manager"),
        reason="the runner gets our verification manager for method dspark, in every mode",
        upstream="a registry of verification managers, or a way to hand one to the runner",
        parameters={
            "0.32": _MANAGER_ARGUMENTS,
            "0.33": (*_MANAGER_ARGUMENTS, "copy_admitted_drafts_to_host"),
        },
        wrap=wrap_maybe_create_adaptive_verification_manager,
    ),
    Patch(
        target="vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager._init_candidates",
        reason="steps with a prefill are one CUDA graph beside those of decode steps",
        upstream="a cudagraph_mode with full graphs for both, each of its own",
        parameters=("self",),
        wrap=wrap_init_candidates,
    ),
)

INTERPRETER_SEAMS = (
    Patch(
        target="vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p_triton",
        reason="top-k and top-p in vLLM's torch code: Triton's interpreter cannot run this kernel",
        upstream="an interpreter whose loop variables are tensors",
        parameters={
            "0.32": ("logits", "k", "p", "mask_value"),
            "0.33": ("logits", "k", "p", "mask_value", "has_topp_only_rows"),
        },
        wrap=wrap_apply_top_k_top_p_triton,
    ),
)

LEDGER = REQUEST_SEAMS + FRONT_END_SEAMS + ENGINE_SEAMS + INTERPRETER_SEAMS
