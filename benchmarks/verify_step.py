"""One step's logits, drafts and requests, made up, as a model runner hands them to its sampler."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.verify_traffic import Shape, ragged_lengths

REGIMES = ("temperature 0", "temperature 1", "temperature 0.7", "mixed", "top-p for a tenth")
NOISE = 1.0  # of the target's logits against the draft's, whose spread is 3


def sampling(regime: str, request: int) -> dict[str, float]:
    """Options of one request."""
    if regime == "mixed":
        return {"temperature": (0.0, 0.7, 1.0)[request % 3]}
    if regime == "top-p for a tenth":
        return {"temperature": 1.0} | ({"top_p": 0.9} if request % 10 == 0 else {})
    return {"temperature": float(regime.split()[1])}


class Step:
    """One step's logits, drafts and requests, as the runner hands them to its sampler."""

    def __init__(self, shape: Shape, regime: str, device: str) -> None:
        torch.manual_seed(0)
        random = np.random.default_rng(0)
        self.shape, self.regime, self.device = shape, regime, torch.device(device)
        requests, gamma, vocab = shape.requests, shape.gamma, shape.vocab
        self.lengths = ragged_lengths(requests, gamma, random)
        dtype = {2: torch.bfloat16, 4: torch.float32}[shape.itemsize]
        ends = np.append(0, (self.lengths + 1).cumsum()).astype(np.int32)
        slots = np.arange(requests, dtype=np.int32)
        expanded = torch.tensor(slots.repeat(self.lengths + 1), device=device)
        local = np.arange(ends[-1]) - ends[:-1].repeat(self.lengths + 1)
        rows = len(local)
        with torch.device(device):
            self.draft_logits = (3 * torch.randn(requests, gamma, vocab)).to(dtype)
            self.logits = torch.empty(rows, vocab, dtype=dtype)
            tokens = torch.zeros(rows, dtype=torch.int32)
        for row, (slot, step) in enumerate(zip(expanded.tolist(), local.tolist(), strict=True)):
            own = self.draft_logits[slot, min(step, gamma - 1)].float()
            self.logits[row] = own + NOISE * torch.randn_like(own)
            if step < self.lengths[slot]:
                heat = sampling(regime, slot)["temperature"]
                drawn = own / (heat or 1.0)
                if shape.dense and heat:
                    drawn = drawn - torch.empty_like(drawn).exponential_().log()
                tokens[row + 1] = drawn.argmax()
        local_pos = torch.tensor(local, dtype=torch.int32, device=device)
        self.batch = SimpleNamespace(
            num_reqs=requests,
            idx_mapping=torch.tensor(slots, device=device),
            idx_mapping_np=slots,
            expanded_idx_mapping=expanded,
            expanded_local_pos=local_pos,
            input_ids=tokens,
            positions=torch.arange(rows, device=device) + 1000,
            logits_indices=torch.arange(rows, device=device),
            cu_num_logits=torch.tensor(ends, device=device),
            cu_num_logits_np=ends,
            num_draft_tokens_per_req=self.lengths.astype(np.int32),
            seq_lens=torch.full((requests,), 2000, dtype=torch.int32, device=device),
            seq_lens_cpu_upper_bound=torch.full((requests,), 2000, dtype=torch.int32),
        )

    def runner(self) -> SimpleNamespace:
        """As much of a model runner as a rejection sampler asks for."""
        from vllm import SamplingParams
        from vllm.v1.worker.gpu.sample.sampler import Sampler
        from vllm.v1.worker.gpu.sample.states import SamplingStates

        requests, shape = self.shape.requests, self.shape
        states = SamplingStates(requests, shape.vocab)
        needs = np.zeros(requests, dtype=bool)
        for request in range(requests):
            params = SamplingParams(**sampling(self.regime, request), seed=request)
            needs[request] = states.add_request(request, params)
        states.apply_staged_writes()
        sampler: Any = object.__new__(Sampler)
        prompts = torch.full((requests,), 10, dtype=torch.int32, device=self.device)
        sampler.__dict__.update(
            sampling_states=states,
            needs_logits_processing=needs,
            logits_processors=[],
            thinking_budget_state=SimpleNamespace(enabled=False, apply=lambda *given: None),
            req_states=SimpleNamespace(prefill_len=SimpleNamespace(gpu=prompts)),
            logprobs_mode="raw_logprobs",
            compute_nans=False,
            use_fp64_gumbel=False,
            return_sampling_mask=False,
        )
        config = SimpleNamespace(
            num_speculative_tokens=shape.gamma,
            enable_adaptive_verification=False,
            rejection_sample_method="standard",
            fly_entropy_threshold=0.0,
            fly_entropy_top_k=1,
        )
        return SimpleNamespace(
            sampler=sampler,
            speculative_config=config,
            device=self.device,
            max_num_reqs=requests,
            speculator=SimpleNamespace(proposal=None),  # drafts are not from candidates
        )
