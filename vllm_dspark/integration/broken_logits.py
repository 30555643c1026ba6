"""Finding requests whose next token would be drawn from logits that are no distribution.

Logits are broken where one is NaN or +inf, or all are -inf. What is said of a request is how many
of its last tokens in the step mean nothing, and it is said in place of vLLM's count of NaNs, for
`broken_requests` to read. Where our kernels verify, they say it (`Verdict.failed`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler

from vllm_dspark.config import DSparkConfig
from vllm_dspark.integration.candidate_mode import ours_are_wanted
from vllm_dspark.kernels.dispatch import is_measured


class BrokenHooks:
    """Mixed into a worker class of vLLM's, before it."""

    model_runner: Any

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """The KV cache is there: be able to zero blocks of it, on every rank."""
        super().initialize_from_config(kv_cache_config)  # type: ignore[misc]  # the worker has it
        runner = self.model_runner
        config = DSparkConfig.from_additional_config(runner.vllm_config.additional_config)
        ours = ours_are_wanted(config, is_measured(runner.device))
        if ours and runner.kv_block_zeroer is None:
            runner._init_kv_zero_meta()


class CheckedSampler(Sampler):
    """In the place of a runner's own, with all that it has; for steps without drafts.

    Attributes:
        beside_drafts: samples a step as one is sampled in which some have drafts, so that a seeded
            request gets the same token whether or not its neighbours have any. None while the
            engine starts, when vLLM measures the memory that its own way takes.
    """

    beside_drafts: Callable[[torch.Tensor, Any], SamplerOutput] | None = None

    def __init__(self, sampler: Sampler) -> None:
        self.__dict__ = sampler.__dict__

    def __call__(self, logits: torch.Tensor, input_batch: Any) -> SamplerOutput:
        """Sample a token for each request, and say for whom it means nothing."""
        if self.beside_drafts is not None and not self._tells_of_words(input_batch):
            return self.beside_drafts(logits, input_batch)
        broken = broken_rows(logits)
        output = super().__call__(logits, input_batch)
        output.num_nans = broken.int()  # a row for each request
        return output

    def _tells_of_words(self, input_batch: Any) -> bool:
        """Whether logprobs of given words are asked for, or given tokens are replayed, which vLLM
        does in steps without drafts alone."""
        dims = self.get_logprobs_dims(input_batch.idx_mapping_np)
        return self.trace_replay_state is not None or (dims is not None and dims[1] > 0)


def broken_rows(logits: torch.Tensor) -> torch.Tensor:
    """bool [N], which rows of logits [N, V] are no distribution."""
    most = logits.amax(dim=-1)  # NaN where one is
    return most.sub_(most).ne_(0).bool()  # of what is finite nothing is left


def void_tokens(
    broken: torch.Tensor,  # bool [N], of `broken_rows`
    offsets: torch.Tensor,  # int32 [R + 1], first row of each request
    emitted: torch.Tensor,  # int32 [R], tokens; the i-th came from the request's i-th row
) -> torch.Tensor:
    """int32 [R], tokens from the first broken row on. Rows behind the last token's do not count. In
    the middle of a prefill, where nothing is emitted, the one row does: 1 where it is broken."""
    rows, requests = len(broken), len(emitted)
    row = torch.arange(rows, dtype=offsets.dtype, device=broken.device)
    request = torch.searchsorted(offsets[1:], row, right=True)  # R for rows of nobody
    place = torch.where(broken, row - offsets[request], rows)
    first = place.new_full((requests + 1,), rows)
    first.scatter_reduce_(0, request, place, "amin")
    return (emitted.clamp(min=1) - first[:requests]).clamp_(min=0).int()
