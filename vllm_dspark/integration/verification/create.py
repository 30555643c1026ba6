"""Making the manager, once the attention backends are known."""

from __future__ import annotations

from typing import Any

from packaging.version import Version

from vllm_dspark.calibration.online import OnlineCalibrator
from vllm_dspark.compat import require_supported_vllm
from vllm_dspark.config import DSparkConfig, DSparkConfigError
from vllm_dspark.integration.depth_plan import DepthPlan
from vllm_dspark.integration.step_report import EVERY
from vllm_dspark.integration.verification.allocation_kernel import allocation_of
from vllm_dspark.integration.verification.arrivals import Arrivals, DeviceArrivals
from vllm_dspark.integration.verification.batch import Layout
from vllm_dspark.integration.verification.calibrated import calibration_of
from vllm_dspark.integration.verification.costs import StepCosts
from vllm_dspark.integration.verification.device import DeviceVerification
from vllm_dspark.integration.verification.host import HostVerification
from vllm_dspark.integration.verification.manager import VerificationManager
from vllm_dspark.integration.verification.plan import host_reason, unsupported
from vllm_dspark.scheduler.fixed import FixedPolicy
from vllm_dspark.scheduler.verification import VerificationPolicy

_NO_LIMIT = 1 << 40  # rows: the rejection sampler takes them in chunks where the host knows them


def create_for_graphs(
    *,
    vllm_config: Any,
    attn_groups: Any,
    req_states: Any,
    query_start_loc: Any,
    num_bonus_tokens: int,
    max_total_logits: int,
    target_layer_names: set[str] | None = None,
    additional_attn_cg_support: Any = None,
    **_: Any,
) -> VerificationManager | None:
    """The manager that vLLM is to know of when it decides which CUDA graphs it captures.

    With one it captures graphs that replay batches of mixed lengths. That is for device mode, and
    for host mode where the attention backends can; otherwise None, graphs are what they would be
    without us, and `create_for_host` makes the manager afterwards.

    Args: those of `maybe_create_adaptive_verification_manager` in vLLM.

    Raises:
        DSparkConfigError: device mode was forced and a backend does not allow it.
    """
    config = DSparkConfig.from_additional_config(vllm_config.additional_config)
    adaptive = config.verification == "adaptive"
    if not adaptive and not DepthPlan.of(vllm_config).varies:
        return None
    layout = _layout(vllm_config, req_states, query_start_loc, num_bonus_tokens, max_total_logits)
    width = req_states.num_speculative_steps + num_bonus_tokens
    backends = attn_groups, vllm_config, width, target_layer_names, additional_attn_cg_support
    not_ragged = _no_ragged_graphs(*backends)
    if not adaptive:  # all drafts are verified, but not always γ
        if not_ragged:
            return None
        return _make(HostVerification, vllm_config, config, layout, trims_replay=True)
    reason = host_reason(vllm_config) or _no_device_lengths(attn_groups, target_layer_names)
    reason = reason or not_ragged or ("asked for" if config.verification_mode == "host" else None)
    if reason is None:
        _log("device", "the attention backends take query lengths from the device")
        return _make(DeviceVerification, vllm_config, config, layout, trims_replay=True)
    if config.verification_mode == "device":
        raise DSparkConfigError(
            f'verification_mode is "device", but {reason}. Fix: leave verification_mode out, or '
            "choose another attention backend."
        )
    _log("host", reason)
    if not_ragged:
        return None
    return _make(HostVerification, vllm_config, config, layout, trims_replay=True)


def create_for_host(runner: Any) -> VerificationManager | None:
    """The manager of an engine whose CUDA graphs, if it has some, need not know of it.

    Verifies all of γ where that was planned, so that requests can still ask for less.

    Args:
        runner: vLLM's V2 model runner, with its KV cache.
    """
    vllm_config = runner.vllm_config
    config = DSparkConfig.from_additional_config(vllm_config.additional_config)
    if unsupported(vllm_config) is not None:
        return None
    bonus = runner.model_state.num_new_sampled_tokens_per_step
    limit = _max_chunk_logits(runner.vocab_size)
    query_start_loc = runner.input_buffers.query_start_loc
    layout = _layout(vllm_config, runner.req_states, query_start_loc, bonus, limit)
    graphs = vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
    return _make(HostVerification, vllm_config, config, layout, trims_replay=not graphs)


def _make(
    kind: type[VerificationManager],
    vllm_config: Any,
    config: DSparkConfig,
    layout: Layout,
    trims_replay: bool,
) -> VerificationManager:
    slots, gamma = layout.req_states.max_num_reqs, layout.req_states.num_speculative_steps
    depth = DepthPlan.of(vllm_config)
    adaptive = config.verification == "adaptive"
    if not adaptive and not depth.varies:
        return HostVerification(layout, FixedPolicy(slots, gamma), None, None)
    device = layout.query_start_loc.device
    alone = vllm_config.parallel_config.tensor_parallel_size == 1
    costs = StepCosts(
        gamma=gamma,
        most_requests=slots,
        most_tokens=layout.req_states.max_num_batched_tokens,
        context=config.profile_context,
        most_context=layout.req_states.max_model_len,
        trims_replay=trims_replay,
        learns=alone and not depth.ours,
        num_bonus_tokens=layout.num_bonus_tokens,
    )
    if not adaptive:
        return HostVerification(layout, FixedPolicy(slots, gamma), costs, None)
    artifact = calibration_of(vllm_config, config).artifact
    temperatures = None if artifact is None else artifact.temperatures
    calibrator = OnlineCalibrator(gamma, temperatures, steps=EVERY)
    policy = VerificationPolicy(slots, gamma, calibrator, costs, stands=EVERY)
    arrivals = Arrivals()
    if device.type == "cuda":
        arrivals = DeviceArrivals(slots, gamma, device, alone)
    if kind is DeviceVerification:
        allocation = allocation_of(config, layout, gamma)
        manager = DeviceVerification(
            calibrator, layout, policy, costs, arrivals, allocation=allocation
        )
        manager.samples = True  # the host does not rank
        return manager
    return HostVerification(layout, policy, costs, arrivals)


def _layout(
    vllm_config: Any, req_states: Any, query_start_loc: Any, bonus: int, limit: int
) -> Layout:
    # With its flag set, vLLM's rejection sampler takes all rows at once.
    at_once = vllm_config.speculative_config.enable_adaptive_verification
    return Layout(
        req_states=req_states,
        query_start_loc=query_start_loc,
        num_bonus_tokens=bonus,
        max_total_logits=limit if at_once else _NO_LIMIT,
        returns_admitted=require_supported_vllm() >= Version("0.33"),
    )


def _max_chunk_logits(vocab_size: int) -> int:
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import get_max_chunk_logits

    return get_max_chunk_logits(vocab_size)


def _no_device_lengths(attn_groups: Any, layers: set[str] | None) -> str | None:
    from vllm.v1.worker.gpu.attn_utils import get_query_lens_mismatch_unsupported_backend

    backend = get_query_lens_mismatch_unsupported_backend(attn_groups, checked_layer_names=layers)
    return None if backend is None else f"{backend} reads query lengths on the host"


def _no_ragged_graphs(
    attn_groups: Any, vllm_config: Any, width: int, layers: set[str] | None, additional: Any
) -> str | None:
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.worker.gpu.attn_utils import get_varlen_cudagraph_unsupported_backend

    if not vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
        return "there are no full CUDA graphs"
    found = get_varlen_cudagraph_unsupported_backend(
        attn_groups, vllm_config, width, checked_layer_names=layers
    )
    backend = None if found is None else found[0]
    if backend is None and additional is not None and additional[0] != AttentionCGSupport.ALWAYS:
        backend = additional[1]
    return None if backend is None else f"{backend} cannot replay batches of mixed lengths"


def _log(mode: str, reason: str) -> None:
    from vllm.logger import init_logger

    init_logger("vllm.dspark").info_once(
        "vllm-dspark: verification adaptive, %s mode: %s", mode, reason
    )
