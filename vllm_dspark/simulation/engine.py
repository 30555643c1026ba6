"""What steps take on the simulated engine."""

from __future__ import annotations

from vllm_dspark import checks
from vllm_dspark.scheduler.cost_model import CostModel, StepShape

# Seen on an H200 at 8B: 26 to 30 ms to the first token of a prompt alone, a prefill outside of
# graphs.
LAUNCH_MS = 20.0


class Engine:
    """A cost model, and what it does not know of: steps with a prefill.

    Those run outside of CUDA graphs, so that the host has to launch every kernel of theirs. They
    take what their tokens take, and `launch_ms` at least.

    Args:
        cost: prices steps.
        launch_ms: ms, at least 0.
        most_requests, most_tokens: of a step.

    Raises:
        ValueError: an argument, which it names, is outside of that.
    """

    def __init__(
        self,
        cost: CostModel,
        launch_ms: float = LAUNCH_MS,
        most_requests: int = 256,
        most_tokens: int = 8192,
    ) -> None:
        self.cost = cost
        self.launch_ms = checks.amount("launch_ms", launch_ms)
        self.most_requests = checks.whole("most_requests", most_requests, least=1)
        self.most_tokens = checks.whole("most_tokens", most_tokens, least=1)

    def step_ms(self, shape: StepShape, prefills: bool) -> float:
        """Milliseconds of a step.

        Args:
            shape: what it works on.
            prefills: whether part of a prompt is among it.
        """
        device_ms = float(
            self.cost.step_ms(
                shape.tokens,
                shape.requests,
                shape.context_tokens,
                shape.logits_rows,
                shape.depth,
            )
        )
        return max(device_ms, self.launch_ms) if prefills else device_ms
