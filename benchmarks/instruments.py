"""What a benchmark reads inside the worker process, through vLLM's `worker_extension_cls`.

vLLM counts a draft that adaptive verification trimmed as a rejected one, so how many drafts were
verified cannot be told from its metrics. The manager that trims, vLLM's or ours, tells the runner
how many tokens a step will have; the difference is counted here, for every arm alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class StepCounters:
    """Mixed into vLLM's worker; its methods are called by `collective_rpc`."""

    model_runner: Any

    def benchmark_counters(self) -> dict[str, float]:
        """Totals since the first call, which starts the counting.

        Returns:
            verified: drafts verified; rounds: (request, step) pairs that had drafts to verify.
            Both 0 where no manager trims, and vLLM's own counters tell. memory_gib: the most
            device memory that torch's allocator ever held in this process, 0 without a GPU.
        """
        import torch

        manager = getattr(self.model_runner, "adaptive_verification", None)
        counts = vars(self).setdefault("_benchmark_counts", {"verified": 0.0, "rounds": 0.0})
        if manager is not None and "get_num_tokens" not in vars(manager):
            manager.get_num_tokens = _counted(manager.get_num_tokens, counts)
        reserved = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
        return counts | {"memory_gib": reserved / 2**30}


def _counted(get_num_tokens: Any, counts: dict[str, float]) -> Any:
    def counting(
        num_tokens_per_req: Mapping[str, int], draft_tokens: Mapping[str, Sequence[int]]
    ) -> int:
        total = get_num_tokens(num_tokens_per_req, draft_tokens)
        drafts = [len(draft_tokens.get(request, ())) for request in num_tokens_per_req]
        counts["verified"] += total - (sum(num_tokens_per_req.values()) - sum(drafts))
        counts["rounds"] += sum(1 for count in drafts if count)
        return total

    return counting
