"""What our workers add to vLLM's, so that the manager hears of requests."""

from __future__ import annotations

from functools import partial
from typing import Any

from vllm_dspark.integration.proposer import DSparkProposer
from vllm_dspark.integration.rejection import KernelRejectionSampler
from vllm_dspark.integration.verification.create import create_for_host
from vllm_dspark.integration.verification.head import head_line
from vllm_dspark.integration.verification.manager import VerificationManager
from vllm_dspark.integration.verification.profile import profile_source


class VerificationHooks:
    """Mixed into a worker class of vLLM's, before it."""

    model_runner: Any

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """The KV cache is there: so are the attention backends, and the manager can be."""
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]  # the worker has it
        connect(self.model_runner)

    def execute_model(self, scheduler_output: Any) -> Any:
        """A step begins. During warm-up vLLM takes the manager away."""
        manager = self.model_runner.adaptive_verification
        if isinstance(manager, VerificationManager):
            manager.begin_step(scheduler_output)
        return super().execute_model(scheduler_output)  # type: ignore[misc]  # the worker has it


def connect(runner: Any) -> None:
    """Give the runner a manager if it has none yet, and let the proposer know it."""
    if not isinstance(runner.speculator, DSparkProposer):
        return
    if runner.adaptive_verification is None:
        runner.adaptive_verification = create_for_host(runner)
    manager = runner.adaptive_verification
    if manager is not None:
        manager.head_line = partial(head_line, runner)
        manager.source = profile_source(runner, manager.mode)
        if isinstance(runner.rejection_sampler, KernelRejectionSampler):
            manager.outcomes_of = runner.rejection_sampler.outcomes_of
        if runner.speculator.plan.varies:
            manager.depths = (0, *runner.speculator.plan.depths)
            manager.draw_at = partial(setattr, runner.speculator, "idle_depth")
    runner.speculator.verification = manager
