"""What our workers add to vLLM's, so that scheduler and workers hear of each other."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from vllm_dspark.config import DSparkConfigError
from vllm_dspark.integration.depth_plan import DepthPlan
from vllm_dspark.integration.draft_depth import DraftDepth, of_one_length
from vllm_dspark.integration.input_kernels import inputs_compiled
from vllm_dspark.integration.rejection import KernelRejectionSampler
from vllm_dspark.integration.step_clock import DeviceClock, HostClock
from vllm_dspark.integration.step_meter import StepMeter
from vllm_dspark.integration.step_report import EVERY, Startup, attach_report, take_plan
from vllm_dspark.integration.verify_kernels import verification_compiled


class DepthHooks:
    """Mixed into a worker class of vLLM's, before it.

    Attributes:
        meter: None until the first step that our scheduler planned.
    """

    model_runner: Any
    meter: StepMeter | None = None

    def load_model(self, *args: Any, **options: Any) -> None:
        """The model is there, and the drafter can look what graphs the target has."""
        super().load_model(*args, **options)  # type: ignore[misc]  # the worker has it
        runner = self.model_runner
        if isinstance(runner.speculator, DraftDepth):
            runner.speculator.target_graphs = lambda: runner.cudagraph_manager

    def compile_or_warm_up_model(self) -> Any:
        """Start-up's last part; see vLLM's. Where it warms kernels up, none that lays out a draft
        pass or verifies drafts by us is left to compile, whatever requests will ask for."""
        runner = self.model_runner
        with ExitStack() as warming_up:
            if isinstance(runner.speculator, DraftDepth):
                warming_up.enter_context(inputs_compiled(runner.speculator.plan))
            if isinstance(runner.rejection_sampler, KernelRejectionSampler):
                ours = runner.rejection_sampler
                warming_up.enter_context(verification_compiled(ours.verifier, ours.methods))
            done = super().compile_or_warm_up_model()  # type: ignore[misc]  # the worker has it
        if isinstance(runner.rejection_sampler, KernelRejectionSampler):
            runner.rejection_sampler.serve_all_steps(runner)
        return done

    def start_draft_weight_update(self) -> None:
        """See vLLM's.

        Raises:
            DSparkConfigError: always, before any weight is touched.
        """
        raise DSparkConfigError(
            "vllm-dspark: a drafter's weights cannot be updated in a server that runs: what was "
            "made of them at the start, CUDA graphs and FP8 copies, would stay. Fix: start a server"
            " on the new drafter, or leave DSpark to vLLM's built-in one, additional_config "
            '{"dspark": {"enabled": false}}.'
        )

    def execute_model(self, scheduler_output: Any) -> Any:
        """A step begins; see vLLM's. Warm-up steps are not planned by our scheduler."""
        plan = take_plan(scheduler_output)
        if plan is None:
            return super().execute_model(scheduler_output)  # type: ignore[misc]  # the worker has it
        if self.meter is None:
            self.meter = make_meter(self.model_runner)
        self.meter.begin(plan)
        output = super().execute_model(scheduler_output)  # type: ignore[misc]  # the worker has it
        state = self.model_runner.execute_model_state
        if state is not None:
            self.meter.launched(
                scheduler_output, state.input_batch, state.num_spec_tokens_to_schedule
            )
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        """A step ends; see vLLM's."""
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]  # the worker has it
        if self.meter is not None:
            attach_report(output, self.meter.end())
        return output


def make_meter(runner: Any) -> StepMeter:
    """The meter of a runner that is ready to serve."""
    manager = runner.adaptive_verification
    costs = getattr(manager, "costs", None)
    profile = costs.model.to_json({}) if costs is not None and costs.profiled else None
    clock = DeviceClock() if runner.device.type == "cuda" else HostClock()
    startup = Startup(
        depths=_full_speed_depths(runner),
        costs=profile,
        finds_broken=isinstance(runner.rejection_sampler, KernelRejectionSampler),
    )
    return StepMeter(runner.num_speculative_steps, manager, clock, startup, every=EVERY)


def _full_speed_depths(runner: Any) -> tuple[int, ...]:
    """Depths whose drafts the target can verify at the price of their number: see `plan_within`."""
    speculator = runner.speculator
    if not isinstance(speculator, DraftDepth):
        return (runner.num_speculative_steps,)
    if of_one_length(runner.cudagraph_manager):
        _log_one_length(speculator.plan)
        return (runner.num_speculative_steps,)
    return (0, *speculator.plan.depths)


def one_length_line(gamma: int, fixed: int | None) -> str:
    """What to say where CUDA graphs are captured for γ drafts a request alone.

    Args:
        gamma: γ.
        fixed: the depth that was asked for, if one was.
    """
    why = f"CUDA graphs of the target are captured for {gamma} drafts a request alone"
    if fixed is None or fixed == gamma:
        return (
            f"depth stays {gamma}: {why}, since all drafts are verified, or the attention "
            "backends replay no mix of lengths"
        )
    instead = f"num_speculative_tokens {fixed}" if fixed else "no speculation"
    return f"depth is {fixed}, but {why}, so steps run outside of them. Fix: {instead} instead"


def _log_one_length(plan: DepthPlan) -> None:
    from vllm.logger import init_logger

    logger = init_logger("vllm.dspark")
    tell = logger.info_once if plan.fixed in (None, plan.gamma) else logger.warning_once
    tell("vllm-dspark: %s", one_length_line(plan.gamma, plan.fixed))
