"""Which depths an engine drafts, and whether depth follows the load: from the configuration.

The scheduler and the workers read the same plan, each in its own process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_dspark.config import DSparkConfig, DSparkConfigError
from vllm_dspark.scheduler.goal import Goal

# One scheduler of ours for each of vLLM's, by whether scheduling is asynchronous.
SCHEDULERS = {
    True: "vllm_dspark.integration.scheduler.DSparkScheduler",
    False: "vllm_dspark.integration.scheduler.DSparkSyncScheduler",
}
# Every depth has CUDA graphs of its own. These are a factor of less than two apart, which a step
# hardly notices.
_STEPS = (1, 2, 3, 5)


@dataclass(frozen=True)
class DepthPlan:
    """What was decided.

    Attributes:
        gamma: γ, drafts of a full block.
        depths: ascending, above 0, γ the last: blocks that the drafter draws. Others are cut from
            the next one.
        fixed: a depth that never changes, 0 to γ; None where it may.
        ours: our scheduler runs, which tells the drafter the depth.
        bonus: query tokens of a block that draw nothing: 1 in the layout whose anchor does not
            predict.
        whole_backbone: the backbone runs on a full block at any depth above 0.
        goal: what depth is chosen for.
    """

    gamma: int
    depths: tuple[int, ...]
    fixed: int | None
    ours: bool
    bonus: int
    whole_backbone: bool
    goal: Goal

    @classmethod
    def of(cls, vllm_config: Any) -> DepthPlan:
        """The plan of an engine whose configuration went through `settle`."""
        config = DSparkConfig.from_additional_config(vllm_config.additional_config)
        speculative = vllm_config.speculative_config
        gamma = speculative.num_speculative_tokens
        ours = vllm_config.scheduler_config.scheduler_cls in SCHEDULERS.values()
        fixed = None
        if not ours:
            fixed, depths = gamma, {gamma}
            schedule = speculative.num_speculative_tokens_per_batch_size
            if schedule:  # vLLM's own: what to draft by number of requests
                fixed, depths = None, {min(entry[2], gamma) for entry in schedule}
        elif config.depth == "auto":
            depths = {*(depth for depth in _STEPS if depth < gamma), gamma}
        else:
            fixed = config.depth
            depths = {fixed}
        floor = config.target_tokens_per_second_per_user
        goal = Goal(config.goal) if floor is None else Goal("floor", floor)
        return cls(
            gamma=gamma,
            depths=tuple(sorted({*depths, gamma} - {0})),
            fixed=fixed,
            ours=ours,
            bonus=vllm_config.num_lookahead_tokens - gamma,
            whole_backbone=config.draft_block == "full",
            goal=goal,
        )

    @property
    def varies(self) -> bool:
        """Whether our scheduler may choose another depth from step to step."""
        return self.ours and self.fixed is None

    def block(self, depth: int) -> int:
        """The smallest block with that many drafts, 0 < depth ≤ γ."""
        return next(block for block in self.depths if block >= depth)

    def columns(self, block: int) -> int:
        """Predicting positions that the backbone runs per request for a block above 0."""
        return self.gamma if self.whole_backbone else block

    def queries(self, block: int) -> int:
        """Query tokens that the backbone runs per request for a block."""
        if block == 0:
            return 0
        return self.bonus + self.columns(block)

    def lookahead(self, depth: int) -> int:
        """K/V slots per request beyond the tokens of a step that ends with drafting `depth`
        tokens: the queries of the block, each of which has its K/V written. At depth 0 none: the
        drafter then writes K/V for tokens of the step alone."""
        return self.queries(self.block(depth)) if depth else 0

    def describe(self) -> str:
        """One phrase for log lines."""
        if self.fixed is not None:
            return str(self.fixed)
        if not self.ours:
            return "by vLLM's schedule"
        floor = self.goal.tokens_per_second_per_user
        wanted = self.goal.kind if floor is None else f"at least {floor:g} tokens/s per user"
        return f"0 to {self.gamma} by load, goal {wanted}"


def settle_depth(vllm_config: Any, config: DSparkConfig) -> str | None:
    """Put our scheduler in place where the depth is not simply γ.

    Returns:
        Why depth stays γ, or as vLLM schedules it, where it was to follow the load.

    Raises:
        DSparkConfigError: a depth was asked for that this engine cannot do.
    """
    gamma = vllm_config.speculative_config.num_speculative_tokens
    if config.depth != "auto":
        if config.depth > gamma:
            raise DSparkConfigError(
                f'additional_config["dspark"]: depth is {config.depth}, but γ is {gamma}. Fix: '
                f'0 to {gamma}, or "auto".'
            )
        if config.depth == gamma:
            return None
    obstacle = _obstacle(vllm_config)
    if obstacle is None:
        asynchronous = bool(vllm_config.scheduler_config.async_scheduling)
        vllm_config.scheduler_config.scheduler_cls = SCHEDULERS[asynchronous]
        return None
    if config.depth != "auto" or config.target_tokens_per_second_per_user is not None:
        asked = "depth" if config.depth != "auto" else "target_tokens_per_second_per_user"
        raise DSparkConfigError(
            f'additional_config["dspark"]: {asked} was given, but {obstacle}. Fix: leave it out.'
        )
    return obstacle


def _obstacle(vllm_config: Any) -> str | None:
    """Why depth cannot follow the load on this engine, if it cannot."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    scheduler = vllm_config.scheduler_config
    if vllm_config.speculative_config.num_speculative_tokens_per_batch_size:
        return "num_speculative_tokens_per_batch_size says what to draft"
    if scheduler.scheduler_cls is not None:
        return f"scheduler_cls is {scheduler.scheduler_cls!r}"
    if not isinstance(vllm_config.additional_config, Mapping):
        return "additional_config is not an object"
    if parallel.pipeline_parallel_size > 1:
        return "with pipeline parallelism the steps of several batches overlap"
    if parallel.data_parallel_size > 1 and model.is_moe:
        return "data-parallel ranks of a mixture of experts step together, at one depth"
    if vllm_config.kv_transfer_config is not None:
        return "the K/V connector counts on the blocks that full depth takes"
    if model.is_hybrid:
        return "recurrent layers keep their states by drafts"
    return None
