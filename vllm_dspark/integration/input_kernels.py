"""vLLM's kernel that lays out a draft pass, compiled for every depth before requests come.

Triton compiles a kernel anew for every block size, and for whole numbers that are 1 or multiples
of 16. vLLM's warm-up covers a block of γ drafts and the lengths that it happens to run. Depth, and
with it the queries of a request, varies here from step to step: each combination that a server
meets for the first time would hold all of its requests up for about half a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_dspark.integration.depth_plan import DepthPlan

LARGEST_BLOCK = 256  # tokens of a request that one program of vLLM's kernel lays out
_NAME = "_prepare_dflash_inputs_kernel"


@contextmanager
def inputs_compiled(plan: DepthPlan) -> Iterator[None]:
    """While active, the first launch of the kernel has all the others compiled that steps of
    `plan` can ask for. Nothing is launched that vLLM does not launch."""
    from vllm.v1.worker.gpu.spec_decode.dflash import speculator

    kernel = getattr(speculator, _NAME)
    setattr(speculator, _NAME, _Watched(kernel, plan))
    try:
        yield
    finally:
        setattr(speculator, _NAME, kernel)


class _Watched:
    """The kernel, with an eye on its arguments."""

    def __init__(self, kernel: Any, plan: DepthPlan) -> None:
        self._kernel, self._plan = kernel, plan
        self._compiled = False

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> Any:
            if not self._compiled:
                self._compiled = True
                self._compile(dict(zip(self._kernel.arg_names, args, strict=False)) | kwargs)
            return self._kernel[grid](*args, **kwargs)

        return launch

    def _compile(self, arguments: dict[str, Any]) -> None:
        for changed in variants(self._plan):
            self._kernel.warmup(grid=(1, 1), **arguments | changed)


def variants(plan: DepthPlan) -> list[dict[str, int]]:
    """Arguments of the kernel that stand for all that Triton tells apart."""
    kinds: dict[tuple[str, str], tuple[int, int]] = {}
    for block in plan.depths:
        queries, steps = plan.queries(block), plan.columns(block)
        kinds.setdefault((_kind(queries), _kind(steps)), (queries, steps))
    found, size = [], 2  # one token of a request and one query at least
    while size <= LARGEST_BLOCK:
        found += [
            {"num_query_per_req": queries, "num_speculative_steps": steps, "BLOCK_SIZE": size}
            for queries, steps in kinds.values()
        ]
        size *= 2
    return found


def _kind(number: int) -> str:
    """What Triton makes of a whole number: a constant 1, a multiple of 16, or any other."""
    return "one" if number == 1 else "aligned" if number % 16 == 0 else "any"
