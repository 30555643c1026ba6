"""Whether the number of verified drafts varies, and where lengths are known: from the config.

Decided once, when the configuration is finished, and written back into it, so that every process
of the engine reads one answer. What only the attention backends can say is left to `create`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from packaging.version import Version

from vllm_dspark.checkpoint import DrafterSpec
from vllm_dspark.compat import require_supported_vllm
from vllm_dspark.config import DSparkConfig, DSparkConfigError
from vllm_dspark.integration.chosen import no_carrier, record

Mode = Literal["device", "host"]


@dataclass(frozen=True)
class Plan:
    """What was decided.

    Attributes:
        adaptive: the number of verified drafts varies; otherwise it is all that are drafted.
        mode: device means device where the attention backends allow it.
        reason: why not adaptive, or why this mode.
    """

    adaptive: bool
    mode: Mode
    reason: str

    def describe(self) -> str:
        """One phrase for log lines."""
        kind = f"adaptive, {self.mode} mode" if self.adaptive else "all of γ"
        return f"{kind} ({self.reason})"


def make_plan(vllm_config: Any, config: DSparkConfig, spec: DrafterSpec | None) -> Plan:
    """Decide.

    Args:
        vllm_config: vLLM's, finished.
        config: ours.
        spec: the drafter's; None if vLLM serves it with code of its own.

    Raises:
        DSparkConfigError: what was asked for is not supported here; says what and why.
    """
    if config.verification == "all":
        return Plan(False, "host", "asked for")
    asked = config.verification == "adaptive"
    asked |= bool(vllm_config.speculative_config.enable_adaptive_verification)
    obstacle = unsupported(vllm_config)
    if not asked:
        if config.confidence == "never":
            obstacle = 'confidence is "never"'
        elif spec is None or not spec.has_confidence:
            obstacle = "the drafter has no confidence head"
        elif obstacle is None and vllm_config.model_config.is_hybrid:
            # Their states were seen to be right on a CPU alone.
            obstacle = 'recurrent layers, where "verification" has to be "adaptive" to trim drafts'
    if obstacle is not None:
        if asked:
            raise DSparkConfigError(
                f"adaptive verification was asked for, but {obstacle}. Fix: "
                '--additional-config \'{"dspark": {"verification": "all"}}\' and no '
                "enable_adaptive_verification."
            )
        return Plan(False, "host", obstacle)
    if config.verification_mode == "host":
        return Plan(True, "host", "asked for")
    needs_host = host_reason(vllm_config)
    if needs_host is None:
        return Plan(True, "device", "full CUDA graphs")
    if config.verification_mode == "device":
        raise DSparkConfigError(
            f'verification_mode is "device", but {needs_host}. Fix: leave verification_mode out.'
        )
    return Plan(True, "host", needs_host)


def unsupported(vllm_config: Any) -> str | None:
    """Why drafts cannot be trimmed at all on this engine, if they cannot."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    if parallel.pipeline_parallel_size > 1:
        return "pipeline ranks before the last one do not know the confidences"
    if parallel.prefill_context_parallel_size > 1:
        return "prefill context parallelism partitions the batch as it was scheduled"
    if parallel.enable_batch_sharded_sampling:
        return "batch-sharded sampling shards the batch as it was scheduled"
    if model.is_hybrid and (recurrent := recurrent_obstacle(vllm_config.cache_config)) is not None:
        return recurrent
    if getattr(model, "return_sampling_mask", False):
        return "returned sampling masks have the boundaries that were scheduled"
    if vllm_config.aux_output_config.enabled:
        return "returned experts have the boundaries that were scheduled"
    return no_carrier(vllm_config)


def recurrent_obstacle(cache_config: Any) -> str | None:
    """Why drafts cannot be trimmed where some layers are recurrent, if they cannot.

    Such layers keep a state for every draft of a block, and go on from the last accepted one's,
    however many were run. vLLM 0.32's convolution for CPUs places it by a whole block's length.
    """
    from vllm.platforms import current_platform

    if cache_config.use_replayssm or cache_config.use_kda_recoverssm:
        return "recurrent layers that replay or recover their states do so by whole blocks"
    if current_platform.is_cpu() and require_supported_vllm() < Version("0.33"):
        return "recurrent layers on a CPU take whole blocks only before vLLM 0.33"
    return None


def host_reason(vllm_config: Any) -> str | None:
    """Why lengths have to be known on the host, if the configuration says so."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return "the CPU backend reads query lengths on the host"
    if not current_platform.is_cuda_alike():
        return "device mode is for CUDA devices"
    if vllm_config.model_config.is_hybrid:
        return "recurrent layers tell drafts from prompts by query lengths on the host"
    if vllm_config.lora_config is not None:
        return "tokens are mapped to LoRA adapters on the host"
    if not vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
        return "there are no full CUDA graphs"
    backend = vllm_config.attention_config.backend
    if backend is not None and not backend.get_class().supports_device_cpu_query_lens_mismatch():
        return f"{backend.name} reads query lengths on the host"
    return None


def settle(vllm_config: Any, plan: Plan) -> None:
    """Write the plan into the configuration that travels to every process.

    vLLM's own flag is set in device mode alone. It makes vLLM choose attention that takes query
    lengths from the device, and its sampler read boundaries there; in host mode both have what is
    true on the host. vLLM's own manager is never made.
    """
    device = plan.adaptive and plan.mode == "device"
    vllm_config.speculative_config.enable_adaptive_verification = device
    decided = {"verification": "adaptive" if plan.adaptive else "all"}
    if plan.adaptive and plan.mode == "host":
        decided["verification_mode"] = "host"
    record(vllm_config, **decided)
