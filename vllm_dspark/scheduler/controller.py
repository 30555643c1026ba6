"""What the engine's scheduler knows about speculation, and the depth that it draws from it.

Costs, survival and the depth policy in one place, fed by reports of steps that ended. Nothing
here reads a clock or a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vllm_dspark import checks
from vllm_dspark.scheduler.cost_model import CostModel, StepShape
from vllm_dspark.scheduler.depth import DepthPolicy, Goal
from vllm_dspark.scheduler.running_survival import RunningSurvival
from vllm_dspark.scheduler.thinning import Thinning

STANDS = 4  # steps that the predictions behind a choice stand at most


class DepthController:
    """Chooses the draft depth of every step.

    Args:
        gamma: γ, drafts of a full block, at least 1.
        goal: what depth is chosen for.
        fixed: a depth that never changes, 0 to γ; None to choose.
        max_requests: the most that can run at once.
        cost: predicts what a step takes, until `start` brings a better one.

    Attributes:
        depth: int, of the last step.
        cost: CostModel.
        policy: None before `start`, or if nothing is to be chosen.
        ignored: reports, times and means that made no sense and taught nothing.

    Raises:
        ValueError: an argument, which it names, is outside of that.
    """

    def __init__(
        self,
        gamma: int,
        goal: Goal,
        *,
        fixed: int | None = None,
        max_requests: int | None = None,
        cost: CostModel | None = None,
    ) -> None:
        self.gamma = checks.whole("gamma", gamma, least=1)
        if fixed is not None and checks.whole("fixed", fixed, least=0) > gamma:
            raise ValueError(f"fixed must lie in 0..{gamma}, got {fixed}")
        self.goal, self.fixed, self._max_requests = goal, fixed, max_requests
        self.cost = cost or CostModel.default(gamma)
        self.depth = gamma if fixed is None else fixed
        self.policy: DepthPolicy | None = None
        self.ignored = 0
        self._thinning = Thinning()
        self._outcomes = RunningSurvival(gamma)
        self._survival, self._age = self._outcomes.mean, self._outcomes.age

    @property
    def varies(self) -> bool:
        """Whether the depth may be another one in the next step."""
        return self.policy is not None

    def start(self, depths: Sequence[int], profile: str | None) -> None:
        """The workers are ready.

        Args:
            depths: that can be drafted at the price of their size. Without 0 among them, the
                engine can run nothing but full blocks at full speed, and depth stays γ.
            profile: `CostModel.to_json` of what was profiled, if anything was.
        """
        try:
            if profile is not None:
                self.cost = CostModel.from_json(profile, {})
            if self.fixed is None and 0 in depths and len(set(depths)) > 1:
                self.policy = DepthPolicy(
                    self.gamma,
                    depths,
                    self.goal,
                    max_requests=self._max_requests,
                    stands=STANDS,
                )
        except ValueError:
            self.ignored += 1

    def observe_step(self, shape: Sequence[int], ms: float, usual: bool) -> bool:
        """A step took `ms`. Of steps that go on as they are, some are passed over; see `Thinning`.

        Args:
            shape: fields of its StepShape.
            ms: from the end of the step before to the end of this one.
            usual: it ran in the way that its size was profiled.

        Returns:
            Whether whoever learns costs is to hear of it: not if it made no sense or was passed
            over.
        """
        try:
            step = StepShape(*shape)
            stands = 1
            if usual:
                stands = self._thinning.takes(step.requests, step.tokens, step.depth)
            if not stands:
                return False
            believed = self.cost.observe(step, ms, graph=usual, stands=stands)
        except (ValueError, TypeError):
            self.ignored += 1
            return False
        if usual:
            self._thinning.learned(believed)
        return True

    def observe_survival(self, survival: Sequence[float], age: Sequence[float]) -> None:
        """Running means as a worker knows them: [γ] probabilities, and steps since each was seen.
        They take the place of what outcomes say, which trimmed blocks bias."""
        means = np.asarray(survival, dtype=np.float64)
        ages = np.asarray(age, dtype=np.float64)
        shape = (self.gamma,)
        if not (
            means.shape == ages.shape == shape
            and ((means >= 0) & (means <= 1)).all()
            and (ages >= 0).all()
        ):
            self.ignored += 1
            return
        self._survival, self._age = means, ages

    def observe_outcomes(self, survival: npt.NDArray[np.float64]) -> None:
        """What became of a step's drafts where all were verified; see `RunningSurvival.step`."""
        self._outcomes.step(survival)

    def choose(
        self, *, requests: int, waiting: int, context_tokens: int, free_kv_fraction: float
    ) -> int:
        """The depth of the step that is being scheduled; arguments as `DepthPolicy.choose`."""
        if self.policy is None:
            return self.depth
        if requests == 0 and waiting > 0:
            requests, waiting = 1, waiting - 1  # one of them starts the engine
        self.depth = self.policy.choose(
            requests=requests,
            waiting=waiting,
            survival=self._survival,
            context_tokens=context_tokens,
            free_kv_fraction=min(max(free_kv_fraction, 0.0), 1.0),
            cost=self.cost,
            age=self._age,
        )
        return self.depth

    def snapshot(self) -> dict[str, float]:
        """For metrics."""
        policy = self.policy
        return {
            "depth": self.depth,
            "switches": policy.switches if policy else 0,
            "probing": bool(policy and policy.probing),
            "cost_error_percent": self.cost.error if math.isfinite(self.cost.error) else 0.0,
            "ignored": self.ignored,
        }
