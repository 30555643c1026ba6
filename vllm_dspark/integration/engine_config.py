"""The request seam on the finished VllmConfig: where DSpark takes its place in the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_dspark import __version__
from vllm_dspark.checkpoint import DrafterSpec
from vllm_dspark.compat import require_supported_vllm
from vllm_dspark.config import DSparkConfig, DSparkConfigError
from vllm_dspark.integration.candidate_mode import ours_are_wanted, refuse_candidates
from vllm_dspark.integration.depth_plan import DepthPlan, settle_depth
from vllm_dspark.integration.draft_quantization import settle_quantization
from vllm_dspark.integration.drafter_config import read_spec
from vllm_dspark.integration.prefill_graphs import settle_prefill_graphs
from vllm_dspark.integration.rejection_method import refuse_biased_blocks
from vllm_dspark.integration.seams import open_front_end_seams
from vllm_dspark.integration.verification.calibrated import calibration_of
from vllm_dspark.integration.verification.plan import Plan, make_plan, settle

# Platform's worker → ours, by qualified name: the name travels with the config into every
# worker process, on this machine or another.
_WORKERS = {
    "vllm.v1.worker.gpu_worker.Worker": "vllm_dspark.integration.worker.DSparkWorker",
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_dspark.integration.cpu_worker.DSparkCpuWorker",
}


def wrap_validate_adaptive_verification(original: Callable[..., Any]) -> Callable[..., Any]:
    """Called once for every finished VllmConfig, after the platform chose its worker.

    vLLM's own check, which knows its own verification manager, is left out where that is not used.
    """

    def _validate_adaptive_verification(self: Any) -> None:
        speculative_config = self.speculative_config
        asked = speculative_config is not None and speculative_config.method == "dspark"
        if not (asked and _take_place(self)):
            original(self)

    return _validate_adaptive_verification


def _take_place(vllm_config: Any) -> bool:
    """False if vLLM's built-in DSpark is to serve."""
    from vllm.logger import init_logger

    logger = init_logger("vllm.dspark")  # below "vllm", so that vLLM's log settings hold
    config = DSparkConfig.from_additional_config(vllm_config.additional_config)
    if not config.enabled:
        logger.info_once(
            "vllm-dspark %s: turned off by additional_config, vLLM's built-in DSpark serves",
            __version__,
        )
        return False
    parallel = vllm_config.parallel_config
    if parallel.worker_cls in _WORKERS.values():
        return True  # a copy that vLLM makes of a config we have seen, the drafter's for one
    if parallel.worker_cls not in _WORKERS:
        raise ValueError(
            f"vllm-dspark found worker class {parallel.worker_cls!r} and extends one of "
            f"{', '.join(_WORKERS)}. Fix: drop --worker-cls, or turn the plugin off with "
            '--additional-config \'{"dspark": {"enabled": false}}\'.'
        )
    method = vllm_config.speculative_config.rejection_sample_method
    refuse_biased_blocks(method, ours_are_wanted(config))
    settle_pipeline(vllm_config)
    spec = read_spec(vllm_config.speculative_config.draft_model_config)
    refuse_candidates(config, spec)
    quantization = settle_quantization(vllm_config, config, spec)
    plan = make_plan(vllm_config, config, spec)
    settle(vllm_config, plan)
    settle_prefill_graphs(vllm_config, config)
    obstacle = settle_depth(vllm_config, config)
    depth_plan = DepthPlan.of(vllm_config)
    refuse_narrow_steps(depth_plan, vllm_config.scheduler_config)
    depth = depth_plan.describe() + (f" ({obstacle})" if obstacle else "")
    calibration = "none"
    if plan.adaptive:
        found = calibration_of(vllm_config, config)
        calibration = f"online, {found.why}"
        if found.refused:
            calibration = "online alone"
            logger.warning("vllm-dspark: %s", found.why)
    parallel.worker_cls = _WORKERS[parallel.worker_cls]
    open_front_end_seams()
    described = describe(vllm_config, config, spec, quantization, plan, depth, calibration)
    logger.info("vllm-dspark %s: %s", __version__, described)
    return True


def settle_pipeline(vllm_config: Any) -> None:
    """Pipeline stages need asynchronous scheduling. With synchronous, vLLM's engine fetches the
    drafts of a step as soon as that is launched and schedules them before the token that comes
    first, so that the next step has more drafts than tokens and a stage dies of it (0.32.0 and
    0.33.0, `EngineCore.post_step`).

    vLLM turns it off on every CPU, as not needed there; here it is, so it is turned on again.

    Raises:
        DSparkConfigError: it is off elsewhere.
    """
    from vllm.platforms import current_platform

    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    if parallel.pipeline_parallel_size == 1 or scheduler.async_scheduling:
        return
    if current_platform.is_cpu() and parallel.distributed_executor_backend == "mp":
        scheduler.async_scheduling = True
        return
    raise DSparkConfigError(
        f"pipeline_parallel_size is {parallel.pipeline_parallel_size} and scheduling is "
        f"synchronous, with which vLLM {require_supported_vllm()} fails at the first drafts. Fix: "
        "--async-scheduling, or --pipeline-parallel-size 1."
    )


def refuse_narrow_steps(plan: DepthPlan, scheduler: Any) -> None:
    """vLLM has room for max_num_batched_tokens in a draft pass, and writes past its end where all
    requests together have more (0.32.0 and 0.33.0, `prepare_dflash_inputs`).

    Args:
        scheduler: vLLM's configuration of it.

    Raises:
        DSparkConfigError: they can have more.
    """
    requests, room = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
    each = plan.queries(plan.depths[-1])
    if requests * each > room:
        raise DSparkConfigError(
            f"a draft pass of {requests} requests (max_num_seqs) has {each} tokens for each, "
            f"{requests * each} in all, but max_num_batched_tokens is {room}. Fix: "
            f"--max-num-batched-tokens {requests * each}, or --max-num-seqs {room // each}."
        )


def describe(
    vllm_config: Any,
    config: DSparkConfig,
    spec: DrafterSpec | None,
    quantization: str,
    plan: Plan,
    depth: str,
    calibration: str,
) -> str:
    """The start-up line: what was taken over and every mode that was chosen."""
    speculative = vllm_config.speculative_config
    draft = speculative.draft_model_config
    drafter = "model-specific drafter, vLLM's own heads" if spec is None else spec.describe()
    numbers = "" if quantization == "none" else f" in {quantization.upper()}"
    words = "" if config.draft_candidates is None else f" from {config.draft_candidates} candidates"
    return (
        f"active, proposer and verification taken over from vLLM's built-in DSpark; "
        f"drafter {draft.model}{numbers}: {drafter}; γ={speculative.num_speculative_tokens}, "
        f"drafting {speculative.draft_sample_method}{words}, "
        f"depth {depth}, verification {plan.describe()}, "
        f"{speculative.rejection_sample_method} rejection sampling, "
        f"confidence {config.confidence}, calibration {calibration}"
    )
