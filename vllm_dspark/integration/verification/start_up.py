"""What vLLM's runner asks of a manager once its CUDA graphs are captured: steps to be timed.

Only full graphs have sizes of their own. Without any, as with piecewise ones, there is nothing to
ask for, and prices stay a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vllm_dspark.integration.verification.costs import StepCosts
from vllm_dspark.integration.verification.profile import ProfileSource


class StartUp:
    """Mixed into the manager.

    Attributes:
        costs: to be profiled; None where nobody asks for prices.
        head_line: times the LM head; see `head.head_line`.
        depths: that are drafted, γ the last.
        source: where a profile may come from; None always profiles, and keeps nothing.
        draw_at: tells the proposer how deep dummy runs draft; None for γ.
    """

    costs: StepCosts | None
    depths: Sequence[int] = ()
    source: ProfileSource | None = None
    _profiles = False  # dummy runs are being timed

    def __init__(self) -> None:
        self.head_line: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0)
        self.draw_at: Callable[[int | None], None] = lambda depth: None

    def batches_to_profile(self, capture_sizes: list[int]) -> Iterator[dict[str, Any]]:
        """Arguments of dummy runs to be timed.

        Args:
            capture_sizes: tokens of captured full graphs, ascending.
        """
        self._profiles = False
        if self.costs is None:
            return
        if self.source is not None and self.source.settle(self.costs, capture_sizes):
            return
        for batch in self.costs.batches(capture_sizes, self.depths, self.draw_at):
            self._profiles = True
            yield batch
        if not self._profiles:
            _log_guess()

    def set_initial_cost_curves(self, samples: list[Any]) -> None:
        """Timings of those runs. All tensor-parallel ranks go by the first one's."""
        from vllm.distributed.parallel_state import get_tp_group

        if self.costs is None or not self._profiles:
            return
        profile = get_tp_group().broadcast_object((samples, self.head_line()), src=0)
        self.costs.learn_profile(*profile)
        if self.source is not None:
            self.source.keep(self.costs)


def _log_guess() -> None:
    from vllm.logger import init_logger

    init_logger("vllm.dspark").info_once(
        "vllm-dspark: step costs: not profiled, a guess that every step corrects: "
        "no full CUDA graph was captured that could be timed"
    )
