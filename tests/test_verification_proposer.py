"""What the proposer does for verification: confidences of every kind, and passing on outcomes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.worker.gpu.spec_decode.dspark.speculator import DSparkSpeculator

from tests.test_proposer import make_model, make_proposer
from vllm_dspark.config import DSparkConfig, DSparkConfigError
from vllm_dspark.integration.proposer import DSparkProposer


@pytest.mark.parametrize("head_type", ["vanilla", "gated", "rnn"])
def test_peak_of_the_distribution_that_a_draft_is_drawn_from(head_type: str) -> None:
    """Markov bias included, since that is what is drawn from."""
    proposer, hidden = make_proposer(make_model(head_type), 3, 4, 4)
    proposer.use_confidence_head = False
    proposer.peak_confidence = True
    proposer._sample_sequential(3, hidden)
    for k, (logits, *_) in enumerate(proposer.seen):
        probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
        peak = 1 / probabilities.sum(axis=1)
        found = proposer.draft_token_confidence_probs[:3, k].numpy()
        np.testing.assert_allclose(found, peak, rtol=1e-5)


def test_peak_does_not_look_at_the_draft() -> None:
    """Whatever word is drawn, its own confidence is the same: otherwise a word would have a say in
    whether it is verified."""
    found = []
    for word in range(2):
        proposer, hidden = make_proposer(make_model("vanilla"), 2, 1, 1)
        proposer.use_confidence_head, proposer.peak_confidence = False, True
        proposer._sample_logits = lambda *_, word=word: torch.full((2,), word)
        proposer._sample_sequential(2, hidden)
        assert proposer.draft_tokens[:2, 0].tolist() == [word, word]
        found.append(proposer.draft_token_confidence_probs[:2].clone())
    assert (found[0] == found[1]).all()


def loaded(
    monkeypatch: pytest.MonkeyPatch, config: DSparkConfig, has_head: bool, ours: bool = True
) -> Any:
    """A proposer that has loaded a drafter, whose estimator vLLM would switch on."""
    model = make_model("vanilla")
    if not has_head:
        model.model.confidence_head = None
    if not ours:
        model.sequential_head = None
    monkeypatch.setattr(DSparkSpeculator, "load_draft_model", lambda self, *args: model)
    proposer: Any = object.__new__(DSparkProposer)
    proposer.dspark_config = config
    proposer.use_confidence_head = False
    proposer.use_acceptance_estimator = True
    hf_config = SimpleNamespace(architectures=["DSparkDraftModel"])
    proposer.draft_model_config = SimpleNamespace(hf_config=hf_config)
    proposer.load_draft_model(None, set())
    return proposer


@pytest.mark.parametrize("verification", ["adaptive", "all"])
@pytest.mark.parametrize("has_head", [True, False])
def test_where_confidences_come_from(
    monkeypatch: pytest.MonkeyPatch, verification: Any, has_head: bool
) -> None:
    """From the head if there is one, and only where they are read. vLLM's estimator, which would
    write over them and calibrate a second time, is off."""
    proposer = loaded(monkeypatch, DSparkConfig(verification=verification), has_head)
    adaptive = verification == "adaptive"
    assert proposer.use_confidence_head is (adaptive and has_head)
    assert proposer.peak_confidence is (adaptive and not has_head)
    assert proposer.use_acceptance_estimator is False


def test_drafter_that_offers_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No head, and drafts that vLLM draws: only seen once the drafter is loaded."""
    with pytest.raises(DSparkConfigError, match=r"no confidence head.*Fix: .*all"):
        loaded(monkeypatch, DSparkConfig(verification="adaptive"), has_head=False, ours=False)
    loaded(monkeypatch, DSparkConfig(verification="all"), has_head=False, ours=False)


def test_outcomes_are_passed_on() -> None:
    """To the manager, if the engine has one by now."""
    proposer: Any = object.__new__(DSparkProposer)
    proposer.acceptance_estimator = None
    told: list[Any] = []
    outcome = torch.tensor([2]), torch.tensor([1])
    proposer.observe_verification(torch.tensor([0]), *outcome)
    proposer.verification = SimpleNamespace(observe=lambda *seen: told.append(seen))
    proposer.observe_verification(torch.tensor([0]), *outcome)
    assert told == [outcome]
