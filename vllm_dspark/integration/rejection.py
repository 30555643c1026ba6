"""The runner's rejection sampler with our verification kernels in it.

vLLM's own turns the logits of the whole batch into float32 as soon as one request has a temperature
other than 0 or 1, or any other option of sampling. Ours reads them as they are: temperature, min-p
and seeds are the kernels' business. Requests that ask for more (top-k, top-p, penalties, bias,
forbidden words, processors of others) go through vLLM's own processing, their rows alone. A
grammar's mask is in the logits already.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import (
    RejectionSampler,
    get_max_chunk_logits,
)

from vllm_dspark.config import DSparkConfig
from vllm_dspark.integration.broken_logits import CheckedSampler, broken_rows, void_tokens
from vllm_dspark.integration.candidate_mode import choose_kernels
from vllm_dspark.integration.grammar_rejection import (
    GrammarRejectionSampler,
    gather_inputs,
    unjudged,
)
from vllm_dspark.integration.processing import DeviceOptions, needs_processing
from vllm_dspark.integration.rejection_method import refuse_biased_blocks
from vllm_dspark.kernels.dispatch import device_obstacle, is_measured
from vllm_dspark.kernels.verify import Method, Verifier
from vllm_dspark.kernels.verify_batch import Batch, DenseDraft
from vllm_dspark.kernels.verify_verdict import Verdict


class RejectionHooks:
    """Mixed into a worker class of vLLM's, before it."""

    model_runner: Any

    def load_model(self, *args: Any, **options: Any) -> None:
        """Once the model is there, choose what draws drafts and what verifies them, and put our
        sampler in the place of the runner's where our kernels are to verify. Not while the model
        loads: the memory of that is given up when an engine sleeps, and only weights are put back.

        Raises:
            DSparkConfigError: drafting from candidates needs our kernels, or exact verification
                by blocks does, and they cannot.
        """
        super().load_model(*args, **options)  # type: ignore[misc]  # the worker has it
        runner = self.model_runner
        if runner.rejection_sampler is not None:
            runner.speculator.load_kernels()
            config = DSparkConfig.from_additional_config(runner.vllm_config.additional_config)
            faster = is_measured(runner.device)
            choice = choose_kernels(config, "verified", _obstacle(runner), faster)
            method = runner.speculative_config.rejection_sample_method
            refuse_biased_blocks(method, choice.triton)
            if choice.triton:
                runner.sampler = CheckedSampler(runner.sampler)
                runner.rejection_sampler = KernelRejectionSampler(runner)
            elif type(runner.rejection_sampler) is RejectionSampler:
                runner.rejection_sampler = GrammarRejectionSampler.of(runner.rejection_sampler)
            runner.speculator.follow(runner.sampler.sampling_states)
            _log("Triton kernels" if choice.triton else "vLLM's own kernels", choice.why)


def _obstacle(runner: Any) -> str | None:
    """Why our kernels cannot verify in this engine; None if they can."""
    theirs, sampler = runner.rejection_sampler, runner.sampler
    method = runner.speculative_config.rejection_sample_method
    if type(theirs) is not RejectionSampler:
        return f"this model brings a {type(theirs).__name__} of its own"
    if method not in ("standard", "block"):
        return f"rejection sampling is {method!r}"
    if theirs.watermark_key is not None:
        return "tokens are watermarked"
    if type(sampler) is not Sampler:
        return f"this model brings a {type(sampler).__name__} of its own"
    if sampler.return_sampling_mask:
        return "the words that could be sampled are to be returned"
    if sampler.use_fp64_gumbel:
        return "the Gumbel noise is to be float64"
    if runner.speculator.proposal is not None and sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES:
        return f"{sampler.logprobs_mode} are vLLM's own kernels' to tell"
    if getattr(runner, "batch_sharder", None) is not None:
        return "sampling is shared out among ranks"
    return device_obstacle(runner.device, runner.model_config.dtype)


def _log(who: str, why: str) -> None:
    from vllm.logger import init_logger

    init_logger("vllm.dspark").info_once("vllm-dspark: drafts are verified by %s: %s", who, why)


class KernelRejectionSampler(GrammarRejectionSampler):
    """In the place of a runner's own, with its sampler and its options.

    Attributes:
        verifier: runs our kernels.
        verdict: of the last step that our kernels verified, on the device.
    """

    verdict: Verdict | None = None
    _emitted: torch.Tensor | None = None  # what was returned as such with it

    def __init__(self, runner: Any) -> None:
        super().__init__(runner.sampler, runner.speculative_config, runner.device)
        self.verifier = Verifier(runner.max_num_reqs, self.num_speculative_steps, runner.device)
        self._options = DeviceOptions(runner.device)
        self._proposal = runner.speculator.proposal  # of candidates, by slot as `draft_logits` are

    def __call__(
        self,
        logits: torch.Tensor,  # [N, V]
        input_batch: Any,
        draft_logits: torch.Tensor | None = None,  # [slots, γ, V]
        invalid_drafts: torch.Tensor | None = None,  # bool [N]
    ) -> SamplerOutput:
        """Verify a step's drafts. Never waits for the device."""
        slots = input_batch.idx_mapping_np
        logprobs = self.sampler.sampling_states.max_num_logprobs(slots)
        if self.sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES and logprobs != NO_LOGPROBS:
            # All rows are processed and kept then.
            broken = broken_rows(logits)
            output = super().__call__(logits, input_batch, draft_logits, invalid_drafts)
            output.num_nans = void_tokens(broken, input_batch.cu_num_logits, output.num_sampled)
            return output
        tokens, positions = self._inputs(input_batch)
        judged = tokens
        if invalid_drafts is not None:
            judged = tokens.masked_fill(unjudged(invalid_drafts, logits, tokens), -1)
        temperature, seeds, min_p = self._options.of(self.sampler.sampling_states, slots)
        batch = Batch(
            logits=logits,
            offsets=input_batch.cu_num_logits,
            tokens=judged,
            positions=positions,
            slots=input_batch.idx_mapping,
            temperature=temperature,
            seeds=seeds,
            gamma=self.num_speculative_steps,
            most_drafts=self._most_drafts(input_batch),
            min_p=min_p,
            draft=self._proposal if draft_logits is None else DenseDraft(draft_logits),
        )
        self.verdict = self._verify_batch(batch, input_batch, tokens)
        return self._output(logits, input_batch, self.verdict, logprobs)

    @property
    def methods(self) -> tuple[Method, ...]:
        """How steps are verified: those with a sampled request, then those without. Greedy requests
        come out the same, and blocks of dense drafts take two launches more."""
        if not self.use_block_verification:
            return ("standard",)
        return ("block",) if self._proposal is not None else ("block", "standard")

    def serve_all_steps(self, runner: Any) -> None:
        """From now on steps without drafts are sampled here too; see `CheckedSampler`."""
        runner.sampler.beside_drafts = lambda logits, input_batch: self(
            logits, input_batch, runner.speculator.draft_logits
        )

    def _inputs(self, input_batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Input token and position of each row, [N] each; -1 for drafts that are placeholders.

        vLLM's kernel is compiled for batches with drafts before there are requests, and only then.
        """
        rows = input_batch.logits_indices
        if not _has_drafts(input_batch):
            return input_batch.input_ids[rows], input_batch.positions[rows]
        return gather_inputs(input_batch, self.sampler)

    def _verify_batch(self, batch: Batch, input_batch: Any, tokens: torch.Tensor) -> Verdict:
        """At once or, where processed rows would take more memory than vLLM allows itself, some
        requests after others. `tokens` [N] are the batch's before placeholders."""
        special = np.flatnonzero(needs_processing(self.sampler, input_batch.idx_mapping_np))
        width = self._most_drafts(input_batch, special) + 1
        most = max(1, get_max_chunk_logits(batch.vocab_size) // width)
        heats = self.sampler.sampling_states.temperature.np[input_batch.idx_mapping_np]
        method = self.methods[0] if heats.any() else self.methods[-1]
        verdicts = []
        for start, stop in pairwise([0, *special[most::most], batch.requests]):
            part = replace(
                batch, offsets=batch.offsets[start : stop + 1], slots=batch.slots[start:stop]
            )
            some = special[(start <= special) & (special < stop)]
            if len(some):
                processed, row = self._process(
                    batch.logits, input_batch, tokens, batch.positions, some, width
                )
                part = replace(part, processed=processed, processed_row=row)
            verdicts.append(self.verifier.verify(part, method))
        return Verdict.joined(verdicts)

    def outcomes_of(self, num_sampled: torch.Tensor) -> torch.Tensor | None:
        """`Verdict.outcomes` of the step that returned this; None if our kernels did not verify."""
        if self.verdict is None or num_sampled is not self._emitted:
            return None
        return self.verdict.outcomes

    def _most_drafts(self, input_batch: Any, requests: Any = slice(None)) -> int:
        """Most drafts of some requests of a batch; an upper bound where the device trims."""
        if not _has_drafts(input_batch):
            return 0
        scheduled = input_batch.num_draft_tokens_per_req
        if scheduled is None:
            return self.num_speculative_steps
        return int(scheduled[requests].max(initial=0))

    def _process(
        self,
        logits: torch.Tensor,
        input_batch: Any,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        special: npt.NDArray[np.intp],
        width: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """vLLM's processing of the rows of `special` requests.

        How many rows a request has is known to the device alone, so each gets `width`. Those that
        it does not have repeat its last row, and nobody reads them.

        Returns:
            float32 [P, V]; int32 [N], each row's place in it or -1.
        """
        rows, device = logits.shape[0], logits.device
        requests = async_tensor_h2d(special, device=device)
        start, stop = (input_batch.cu_num_logits[requests + i].long()[:, None] for i in (0, 1))
        step = torch.arange(width, device=device)
        own = (start + step < stop).flatten()
        row = torch.minimum(start + step, stop - 1).flatten()
        slots = input_batch.idx_mapping[requests]
        processed = self.sampler.apply_sampling_params(
            logits[row],
            slots.repeat_interleave(width),
            slots,
            input_batch.idx_mapping_np[special],
            positions[row],
            tokens[row],
            step.to(input_batch.expanded_local_pos.dtype).repeat(len(special)),
            input_batch.seq_lens_cpu_upper_bound.numpy()[special],
        )
        place = torch.full((rows + 1,), -1, dtype=torch.int32, device=device)
        # Repeated rows go to one more place, which is cut off.
        numbers = torch.arange(len(row), dtype=torch.int32, device=device)
        place[torch.where(own, row, rows)] = numbers
        return processed, place[:rows]

    def _output(
        self, logits: torch.Tensor, input_batch: Any, verdict: Verdict, logprobs: int
    ) -> SamplerOutput:
        tensors = self._get_logprobs_tensors(
            verdict.tokens,
            verdict.emitted,
            logits,
            input_batch.cu_num_logits,
            input_batch.cu_num_logits_np,
            logprobs,
        )
        sampled, rejected = get_num_sampled_and_rejected(
            verdict.emitted,  # set to 0 in place where the prompt is not through
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.sampler.req_states.prefill_len.gpu,
        )
        self._emitted = sampled
        return SamplerOutput(
            sampled_token_ids=verdict.tokens,
            logprobs_tensors=tensors,
            num_nans=verdict.failed,  # which its last token is, see `broken_logits`
            num_sampled=sampled,
            num_rejected=rejected,
        )


def _has_drafts(input_batch: Any) -> bool:
    """Whether some request has more rows than the one that every request has."""
    return len(input_batch.logits_indices) > len(input_batch.idx_mapping_np)
