"""The request seam on the finished VllmConfig: where DSpark takes its place in the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_dspark import __version__
from vllm_dspark.config import DSparkConfig
from vllm_dspark.integration.drafter_config import read_spec

# Platform's worker → ours, by qualified name: the name travels with the config into every
# worker process, on this machine or another.
_WORKERS = {
    "vllm.v1.worker.gpu_worker.Worker": "vllm_dspark.integration.worker.DSparkWorker",
    "vllm.v1.worker.cpu_worker.CPUWorker": "vllm_dspark.integration.cpu_worker.DSparkCpuWorker",
}


def wrap_validate_adaptive_verification(original: Callable[..., Any]) -> Callable[..., Any]:
    """Called once for every finished VllmConfig, after the platform chose its worker."""

    def _validate_adaptive_verification(self: Any) -> None:
        original(self)
        speculative_config = self.speculative_config
        if speculative_config is not None and speculative_config.method == "dspark":
            _take_place(self)

    return _validate_adaptive_verification


def _take_place(vllm_config: Any) -> None:
    from vllm.logger import init_logger

    logger = init_logger("vllm.dspark")  # below "vllm", so that vLLM's log settings hold
    config = DSparkConfig.from_additional_config(vllm_config.additional_config)
    if not config.enabled:
        logger.info_once(
            "vllm-dspark %s: turned off by additional_config, vLLM's built-in DSpark serves",
            __version__,
        )
        return
    parallel = vllm_config.parallel_config
    if parallel.worker_cls in _WORKERS.values():
        return  # a copy that vLLM makes of a config we have seen, the drafter's for one
    if parallel.worker_cls not in _WORKERS:
        raise ValueError(
            f"vllm-dspark found worker class {parallel.worker_cls!r} and extends one of "
            f"{', '.join(_WORKERS)}. Fix: drop --worker-cls, or turn the plugin off with "
            '--additional-config \'{"dspark": {"enabled": false}}\'.'
        )
    parallel.worker_cls = _WORKERS[parallel.worker_cls]
    logger.info("vllm-dspark %s: %s", __version__, describe(vllm_config, config))


def describe(vllm_config: Any, config: DSparkConfig) -> str:
    """The start-up line: what was taken over and every mode that was chosen."""
    speculative = vllm_config.speculative_config
    draft = speculative.draft_model_config
    spec = read_spec(draft)
    drafter = "model-specific drafter, vLLM's own heads" if spec is None else spec.describe()
    verification = "adaptive (vLLM's)" if speculative.enable_adaptive_verification else "all of γ"
    return (
        f"active, proposer taken over from vLLM's built-in DSpark; drafter {draft.model}: "
        f"{drafter}; γ={speculative.num_speculative_tokens}, "
        f"drafting {speculative.draft_sample_method}, "
        f"verification {verification} by {speculative.rejection_sample_method} rejection sampling, "
        f"confidence {config.confidence}"
    )
