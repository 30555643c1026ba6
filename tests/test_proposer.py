"""The sequential stage against a step-by-step reference in numpy float64.

The proposer is a bare object with only the buffers that the stage reads; the drafter is our
real model class with a plain matrix for an LM head. So what runs is the code that serves, and
what it is compared with is written from the formulas alone:

    logits_k = cap(h_k · LM) + bias_k(x_(k-1), h_k, state),   x_k = argmax logits_k
    c_k = sigmoid(w · [h_k ; W1[x_(k-1)]] + b)
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.spec_decode.dspark.speculator import DSparkSpeculator

from tests.references import arrays, make_head, reference_biases, sigmoid
from vllm_dspark.config import DSparkConfig
from vllm_dspark.heads import ConfidenceHead
from vllm_dspark.integration.models import DSparkGemma4ForCausalLM, DSparkQwen3ForCausalLM
from vllm_dspark.integration.proposer import DSparkProposer

VOCAB, WIDTH, RANK = 23, 6, 5
MAX_REQUESTS = 10
UNTOUCHED = -5
# Everything runs in float64, so only the order of summation differs.
EXACT: Any = {"rtol": 1e-10, "atol": 1e-11}


class PlainHead(nn.Module):
    """What `LogitsProcessor` asks of vLLM's ParallelLMHead, on one rank."""

    tp_size = 1

    def __init__(self, words: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(words, WIDTH).double(), requires_grad=False)
        apply = lambda layer, x, bias=None: nn.functional.linear(x, layer.weight, bias)  # noqa: E731
        self.quant_method = SimpleNamespace(apply=apply)


def make_model(
    head_type: str, *, soft_cap: float | None = None, words: int = VOCAB, with_markov: bool = True
) -> Any:
    """A drafter without its backbone: Gemma4's if it caps its logits, else Qwen3's."""
    cls = DSparkQwen3ForCausalLM if soft_cap is None else DSparkGemma4ForCausalLM
    model: Any = cls.__new__(cls)
    nn.Module.__init__(model)
    torch.manual_seed(11)
    model.model = nn.Module()
    model.sequential_head = make_head(head_type, RANK, VOCAB, WIDTH, draft_vocab_size=words)
    model.model.markov_head = model.sequential_head
    confidence = ConfidenceHead(hidden_size=WIDTH, rank=RANK, with_markov=with_markov)
    model.model.confidence_head = confidence.double().requires_grad_(False)
    model.lm_head = PlainHead(words)
    with set_current_vllm_config(VllmConfig()):
        model.logits_processor = LogitsProcessor(words, soft_cap=soft_cap)
    model.draft_id_to_target_id = None
    if words < VOCAB:  # draft word i is target word 2i, stored as the difference i
        model.draft_id_to_target_id = torch.arange(words)
    return model


def make_proposer(model: Any, requests: int, gamma: int, queries: int) -> tuple[Any, torch.Tensor]:
    """A proposer with `queries` query tokens a request, of which the last γ predict.

    Returns:
        The proposer, and the backbone's output with a few rows of padding behind it.
    """
    torch.manual_seed(requests * 100 + gamma)
    tokens = MAX_REQUESTS * queries
    rows = torch.arange(MAX_REQUESTS)[:, None] * queries + torch.arange(queries - gamma, queries)
    proposer: Any = object.__new__(DSparkProposer)
    proposer.__dict__.update(
        device=torch.device("cpu"),
        model=model,
        num_speculative_steps=gamma,
        sample_indices=rows.flatten(),
        sample_idx_mapping=torch.arange(MAX_REQUESTS).repeat_interleave(gamma),
        sample_pos=torch.arange(MAX_REQUESTS * gamma),
        input_buffers=SimpleNamespace(input_ids=torch.randint(VOCAB, (tokens,))),
        _anchor_idx=torch.arange(MAX_REQUESTS) * queries,
        _step_cols=torch.arange(gamma),
        draft_tokens=torch.full((MAX_REQUESTS, gamma), UNTOUCHED),
        draft_token_confidence_probs=torch.full((MAX_REQUESTS, gamma), float(UNTOUCHED)),
        draft_logits=None,  # greedy
        acceptance_estimator=None,
        use_confidence_head=True,
        _draft_topk=None,
    )
    seen: list[Any] = []

    def sample(logits: Any, request: Any, position: Any, step: int) -> Any:
        seen.append((logits.numpy().copy(), request.tolist(), position.tolist(), step))
        return DSparkProposer._sample_logits(proposer, logits, request, position, step)

    proposer.seen = seen
    proposer._sample_logits = sample
    return proposer, torch.randn(tokens + 3, WIDTH, dtype=torch.float64)


def reference(
    proposer: Any,
    hidden: np.ndarray,
    requests: int,
    cap: float | None = None,
    cap_all: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [R, γ], logits [R, γ, V], confidences [R, γ], one request and position at a time."""
    model, gamma = proposer.model, proposer.num_speculative_steps
    head, lm_head = model.sequential_head, model.lm_head.weight.numpy()
    confidence = model.model.confidence_head
    w, b = confidence.proj.weight.numpy()[0], confidence.proj.bias.numpy()[0]
    weights = arrays(head)
    tokens = np.zeros((requests, gamma), dtype=np.int64)
    logits = np.zeros((requests, gamma, lm_head.shape[0]))
    confidences = np.zeros((requests, gamma))
    squash = (lambda u: u) if cap is None else (lambda u: cap * np.tanh(u / cap))
    for r in range(requests):
        rows = proposer.sample_indices.view(-1, gamma)[r].numpy()
        previous = [int(proposer.input_buffers.input_ids[proposer._anchor_idx[r]])]
        for k in range(gamma):
            prefix = np.array([previous])
            bias = reference_biases(head.head_type, weights, prefix, hidden[rows[: k + 1]][None])
            base = lm_head @ hidden[rows[k]]
            bias = bias[0, k]
            logits[r, k] = squash(base + bias) if cap_all else squash(base) + bias
            word = int(logits[r, k].argmax())
            tokens[r, k] = word if model.draft_id_to_target_id is None else 2 * word
            features = hidden[rows[k]]
            if confidence.with_markov:
                features = np.concatenate([features, weights["markov_w1.weight"][previous[-1]]])
            confidences[r, k] = sigmoid(features @ w + b)
            previous.append(int(tokens[r, k]))
    return tokens, logits, confidences


def check(proposer: Any, hidden: torch.Tensor, requests: int, cap: float | None = None) -> None:
    """Run the stage and compare logits, tokens and confidences with the reference's."""
    proposer._sample_sequential(requests, hidden)
    tokens, logits, confidences = reference(proposer, hidden.numpy(), requests, cap)
    gamma = proposer.num_speculative_steps
    assert len(proposer.seen) == gamma
    for k, (seen, request, position, step) in enumerate(proposer.seen):
        np.testing.assert_allclose(seen, logits[:, k], **EXACT)
        assert request == list(range(requests))
        assert position == [r * gamma + k for r in range(requests)]
        assert step == k
    np.testing.assert_array_equal(proposer.draft_tokens[:requests].numpy(), tokens)
    assert (proposer.draft_tokens[requests:] == UNTOUCHED).all()
    if proposer.use_confidence_head:
        found = proposer.draft_token_confidence_probs[:requests].numpy()
        np.testing.assert_allclose(found, confidences, rtol=1e-6)  # the buffer is float32
        assert (proposer.draft_token_confidence_probs[requests:] == UNTOUCHED).all()


@pytest.mark.parametrize("gamma", [1, 2, 7])
@pytest.mark.parametrize("requests", [1, 3, 8])
@pytest.mark.parametrize("head_type", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("anchor_predicts", [True, False])
def test_block_is_drawn_left_to_right(
    anchor_predicts: bool, head_type: str, requests: int, gamma: int
) -> None:
    """In both block layouts; rows of the batch beyond R stay untouched."""
    model = make_model(head_type)
    proposer, hidden = make_proposer(model, requests, gamma, gamma + (not anchor_predicts))
    check(proposer, hidden, requests)


@pytest.mark.parametrize("head_type", ["vanilla", "gated", "rnn"])
def test_reduced_draft_vocabulary(head_type: str) -> None:
    """Logits are over draft words, drafts and Markov embeddings over the target's."""
    proposer, hidden = make_proposer(make_model(head_type, words=9), 3, 4, 4)
    check(proposer, hidden, 3)
    assert (proposer.draft_tokens[:3] % 2 == 0).all()
    assert proposer.draft_tokens[:3].max() > 9  # the map was needed


def test_confidence_without_markov_features() -> None:
    proposer, hidden = make_proposer(make_model("vanilla", with_markov=False), 3, 4, 4)
    check(proposer, hidden, 3)


def test_unused_confidence_head_is_not_evaluated() -> None:
    proposer, hidden = make_proposer(make_model("rnn"), 3, 4, 4)
    proposer.use_confidence_head = False
    proposer.model.model.confidence_head = None  # evaluating it would fail
    proposer._sample_sequential(3, hidden)
    assert (proposer.draft_token_confidence_probs == UNTOUCHED).all()
    assert (proposer.draft_tokens[:3] != UNTOUCHED).all()


@pytest.mark.parametrize("head_type", ["vanilla", "gated", "rnn"])
def test_gemma4_caps_the_base_logits_only(head_type: str) -> None:
    """The published model adds the bias behind the cap. On this very case capping the sum
    gives other tokens, so the test can tell the two apart."""
    cap = 1.5
    proposer, hidden = make_proposer(make_model(head_type, soft_cap=cap), 8, 7, 7)
    check(proposer, hidden, 8, cap)
    capped_sum, _, _ = reference(proposer, hidden.numpy(), 8, cap, cap_all=True)
    uncapped, _, _ = reference(proposer, hidden.numpy(), 8)
    drawn = proposer.draft_tokens[:8].numpy()
    assert (drawn != capped_sum).any()
    assert (drawn != uncapped).any()


def test_drafter_with_vllms_own_head_takes_vllms_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Model-specific drafters have no head of ours."""
    proposer, hidden = make_proposer(make_model("vanilla"), 3, 4, 4)
    handed_on: list[Any] = []
    monkeypatch.setattr(
        DSparkSpeculator, "_sample_sequential", lambda self, *args: handed_on.append(args)
    )
    proposer.model.sequential_head = None
    proposer._sample_sequential(3, hidden)
    del proposer.model.sequential_head
    proposer._sample_sequential(2, hidden)
    assert [count for count, _ in handed_on] == [3, 2]
    assert proposer.seen == []


@pytest.mark.parametrize("has_head", [True, False])
@pytest.mark.parametrize(
    ("mode", "adaptive"),  # never and adaptive verification are refused before
    [("auto", True), ("auto", False), ("always", True), ("always", False), ("never", False)],
)
def test_when_confidences_are_computed(
    monkeypatch: pytest.MonkeyPatch, mode: Any, adaptive: bool, has_head: bool
) -> None:
    """`auto` leaves it to what vLLM decided, `always` means every draft, if there is a head."""
    model = make_model("vanilla")
    if not has_head:
        model.model.confidence_head = None

    def load(self: Any, *args: Any) -> Any:
        self.use_confidence_head = adaptive and has_head
        return model

    monkeypatch.setattr(DSparkSpeculator, "load_draft_model", load)
    proposer: Any = object.__new__(DSparkProposer)
    proposer.dspark_config = DSparkConfig(confidence=mode)
    hf_config = SimpleNamespace(architectures=["DSparkDraftModel"])
    proposer.draft_model_config = SimpleNamespace(hf_config=hf_config)
    assert proposer.load_draft_model(None, set()) is model
    expected = has_head and (adaptive or mode == "always")
    assert proposer.use_confidence_head is expected
