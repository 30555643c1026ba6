"""Which requests need vLLM's own processing, and who verifies: on stand-ins for the runner."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from tests import verify_cases
from vllm_dspark.config import DSparkConfigError
from vllm_dspark.integration import rejection, rejection_method
from vllm_dspark.integration.grammar_rejection import GrammarRejectionSampler
from vllm_dspark.integration.processing import DeviceOptions, needs_processing
from vllm_dspark.integration.rejection import KernelRejectionSampler, RejectionHooks
from vllm_dspark.kernels.dispatch import VARIABLE

VOCAB = 50


def array(values: list[Any], dtype: Any) -> SimpleNamespace:
    return SimpleNamespace(np=np.array(values, dtype=dtype))


def sampler(**changes: Any) -> Sampler:
    """vLLM's, with what ours reads of it. Eight requests: plain, at temperature 0.7, with min-p,
    top-k, top-p, a penalty, bias beside a temperature, forbidden words and greedy."""
    states = SimpleNamespace(
        vocab_size=VOCAB,
        temperature=array([1, 0.7, 1, 1, 0.7, 1, 0.7, 0], np.float32),
        min_p=array([0, 0, 0.1, 0, 0, 0, 0, 0], np.float32),
        top_k=array([VOCAB, VOCAB, VOCAB, 5, VOCAB, VOCAB, VOCAB, 5], np.int32),
        top_p=array([1, 1, 1, 1, 0.9, 1, 1, 1], np.float32),
        seeds=array(list(range(8)), np.int64),
    )

    def only(*places: int) -> np.ndarray:
        return np.isin(np.arange(8), places)

    made: dict[str, Any] = {
        "sampling_states": states,
        "needs_logits_processing": ~only(0),
        "logits_processors": [
            SimpleNamespace(use_logit_bias=only(6)),
            SimpleNamespace(use_penalty=only(5)),
            SimpleNamespace(num_bad_words=SimpleNamespace(np=only(7).astype(np.int32))),
        ],
        "thinking_budget_state": SimpleNamespace(enabled=False),
        "return_sampling_mask": False,
        "use_fp64_gumbel": False,
        "logprobs_mode": "raw_logprobs",
    }
    one = Sampler.__new__(Sampler)
    one.__dict__.update(made | changes)
    return one


def test_temperature_and_min_p_are_the_kernels() -> None:
    """Top-k of a greedy request changes nothing, forbidden words do."""
    everyone = np.arange(8)
    assert needs_processing(sampler(), everyone).tolist() == [False] * 3 + [True] * 5
    assert needs_processing(sampler(), np.array([4, 1, 0])).tolist() == [True, False, False]
    assert needs_processing(sampler(), np.array([0])).tolist() == [False]


def test_budgets_for_thinking_count() -> None:
    budget = SimpleNamespace(enabled=True, use_thinking_budget=np.arange(8) == 1)
    found = needs_processing(sampler(thinking_budget_state=budget), np.arange(4))
    assert found.tolist() == [False, True, False, True]


def test_processors_of_others_may_want_every_request_that_is_flagged() -> None:
    others = [*sampler().logits_processors, SimpleNamespace(apply=None)]
    found = needs_processing(sampler(logits_processors=others), np.arange(8))
    assert found.tolist() == [False] + [True] * 7


def test_options_are_copied_when_they_change() -> None:
    states, options = sampler().sampling_states, DeviceOptions(torch.device("cpu"))
    temperature, seeds, min_p = options.of(states, np.array([0, 1]))
    assert temperature.tolist() == pytest.approx(states.temperature.np.tolist())
    assert seeds.tolist() == list(range(8))
    assert min_p is None
    again, _, min_p = options.of(states, np.array([2]))
    assert again is temperature
    assert min_p is not None
    assert min_p.tolist() == pytest.approx(states.min_p.np.tolist())
    states.temperature.np[1] = 0.2
    assert options.of(states, np.array([0]))[0].tolist()[1] == pytest.approx(0.2)
    assert temperature.tolist()[1] == pytest.approx(0.7)  # launches under way keep what they read


class Worker:
    """What the hooks are mixed into."""

    model_runner: Any

    def load_model(self) -> None:
        """The runner is there already, without kernels: what they hold must outlive weights that
        an engine discards to sleep."""
        self.model_runner.speculator.has_weights = True


class HookedWorker(RejectionHooks, Worker):
    """As our workers are made."""


class Speculator:
    """What the hooks see of a proposer."""

    proposal = None
    has_weights = False
    kernels_after_weights: bool | None = None
    followed: Any = None

    def load_kernels(self) -> None:
        self.kernels_after_weights = self.has_weights

    def follow(self, sampling_states: Any) -> None:
        self.followed = sampling_states


def runner(kernels: str, **changes: Any) -> SimpleNamespace:
    config = SimpleNamespace(
        num_speculative_tokens=3,
        enable_adaptive_verification=False,
        rejection_sample_method="standard",
        fly_entropy_threshold=0.3,
        fly_entropy_top_k=3,
    )
    made: dict[str, Any] = {
        "sampler": sampler(),
        "speculative_config": config,
        "device": torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        "max_num_reqs": 8,
        "model_config": SimpleNamespace(dtype=torch.float32),
        "vllm_config": SimpleNamespace(additional_config={"dspark": {"kernels": kernels}}),
        "speculator": Speculator(),
    }
    made |= changes
    made["rejection_sampler"] = RejectionSampler(
        made["sampler"], made["speculative_config"], made["device"]
    )
    return SimpleNamespace(**made)


@pytest.mark.parametrize(
    ("changes", "ours"),
    [
        ({}, True),
        ({"kernels": "auto"}, False),
        ({"sampler": sampler(use_fp64_gumbel=True)}, False),
        ({"sampler": sampler(return_sampling_mask=True)}, False),
        ({"batch_sharder": object()}, False),
        ({"model_config": SimpleNamespace(dtype=torch.float64)}, False),
    ],
    ids=["triton", "auto", "float64 noise", "sampling mask", "sharded", "float64 logits"],
)
def test_who_verifies(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], ours: bool) -> None:
    """Ours where it was asked for and can, vLLM's own otherwise."""
    monkeypatch.delenv(VARIABLE, raising=False)
    worker = HookedWorker()
    worker.model_runner = runner(**({"kernels": "triton"} | changes))
    worker.load_model()
    assert isinstance(worker.model_runner.rejection_sampler, KernelRejectionSampler) is ours
    speculator = worker.model_runner.speculator
    assert speculator.kernels_after_weights
    assert speculator.followed is worker.model_runner.sampler.sampling_states


def test_vllms_own_sampler_keeps_what_it_was_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it verifies, ours takes its place for the sake of grammars. Catches tokens without the
    watermark that was asked for."""
    monkeypatch.delenv(VARIABLE, raising=False)
    worker = HookedWorker()
    worker.model_runner = runner("auto")
    theirs = worker.model_runner.rejection_sampler
    theirs.watermark_key = 5
    worker.load_model()
    ours = worker.model_runner.rejection_sampler
    assert type(ours) is GrammarRejectionSampler
    assert vars(ours) == vars(theirs)


def test_batches_without_drafts_launch_no_kernel_of_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row would be a variant of it that no warm-up has compiled."""
    monkeypatch.setattr(rejection, "gather_inputs", None)
    batch = SimpleNamespace(
        input_ids=torch.arange(50, 60, dtype=torch.int32),
        positions=torch.arange(20, 30),
        logits_indices=torch.tensor([7]),
        idx_mapping_np=np.array([3]),
    )
    made = KernelRejectionSampler(runner("triton"))
    tokens, positions = made._inputs(batch)
    assert made._most_drafts(batch) == 0  # so that no program looks for any
    assert (tokens.tolist(), positions.tolist()) == ([57], [27])
    assert (tokens.dtype, positions.dtype) == (torch.int32, torch.int64)


def test_most_drafts_are_those_of_the_requests_in_question() -> None:
    """The largest number among them; γ where only the device knows. Catches a launch that is too
    narrow for the longest block, and one that is as wide as another request's."""
    made = KernelRejectionSampler(runner("triton"))
    batch = SimpleNamespace(
        logits_indices=np.arange(5), idx_mapping_np=np.arange(2), num_draft_tokens_per_req=None
    )
    assert made._most_drafts(batch) == 3
    batch.num_draft_tokens_per_req = np.array([1, 2])
    assert [made._most_drafts(batch), made._most_drafts(batch, [0])] == [2, 1]


@pytest.mark.parametrize(
    ("by_block", "proposal", "slots", "method"),
    [
        (True, None, [0, 7], "block"),
        (True, None, [7], "standard"),  # greedy
        (True, "candidates", [7], "block"),  # in as many launches
        (False, None, [0, 7], "standard"),
    ],
)
def test_blocks_are_for_steps_that_sample(
    monkeypatch: pytest.MonkeyPatch, by_block: bool, proposal: Any, slots: list[int], method: str
) -> None:
    monkeypatch.setattr(rejection, "needs_processing", lambda _, slots: np.zeros_like(slots))
    made = KernelRejectionSampler(runner("triton"))
    made.use_block_verification, made._proposal = by_block, proposal
    case = verify_cases.batch((1,) * len(slots), 33, gamma=3)
    verify, asked = made.verifier.verify, []

    def watched(batch: Any, how: Any) -> Any:
        asked.append(how)
        return verify(batch, how)

    monkeypatch.setattr(made.verifier, "verify", watched)
    step = SimpleNamespace(
        idx_mapping_np=np.array(slots),
        logits_indices=torch.arange(2 * len(slots)),
        num_draft_tokens_per_req=np.ones(len(slots), np.int32),
    )
    made._verify_batch(case, step, case.tokens)
    assert asked == [method]
    assert method in made.methods


def test_blocks_that_ours_cannot_verify_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vLLM's own do not sample them exactly; known once the sampler is there."""
    monkeypatch.setattr(rejection_method, "require_supported_vllm", lambda: Version("0.32.0"))
    worker = HookedWorker()
    worker.model_runner = runner("triton")
    worker.model_runner.speculative_config.rejection_sample_method = "block"
    worker.load_model()
    worker.model_runner = runner("triton", sampler=sampler(use_fp64_gumbel=True))
    worker.model_runner.speculative_config.rejection_sample_method = "block"
    with pytest.raises(DSparkConfigError, match=r"vLLM 0\.32\.0.*Fix:"):
        worker.load_model()


def test_models_with_a_sampler_of_their_own_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "triton")

    class Special(RejectionSampler):
        pass

    worker = HookedWorker()
    worker.model_runner = runner("auto")
    given = worker.model_runner.rejection_sampler
    given.__class__ = Special
    worker.load_model()
    assert worker.model_runner.rejection_sampler is given
    worker.model_runner.rejection_sampler = None  # a rank that does not sample
    worker.load_model()
    assert worker.model_runner.rejection_sampler is None
