"""The engine drafting with our kernels: greedy output equals the target's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.depth_runs import worker_of
from tests.engine import MICRO, Request, engine, observed, run, tokens
from vllm_dspark.integration.draft_kernels import DraftKernels
from vllm_dspark.integration.rejection import KernelRejectionSampler
from vllm_dspark.kernels import dispatch

PROMPTS = ("import os\n", "def main():\n    ", "x = 1\ny = 2\n", "    for i in range(")

pytestmark = pytest.mark.engine


def batch(temperature: float) -> list[Request]:
    """Four requests of different lengths; the second half sampled at `temperature`."""
    return [
        Request(
            prompt,
            {
                "max_tokens": 24 - 3 * i,
                "ignore_eos": True,
                "temperature": temperature if i > 1 else 0.0,
                "seed": i,
            },
            arrives=2 * i,
        )
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def reference() -> list[list[int]]:
    """What the target says by itself."""
    with engine(MICRO) as llm:
        return tokens(run(llm, batch(0.0)))


@pytest.mark.parametrize(
    ("head", "drafting", "verification", "kernels"),
    [("vanilla", "probabilistic", "adaptive", "auto"), ("rnn", "greedy", "all", "triton")],
)
def test_greedy_equals_target(
    monkeypatch: pytest.MonkeyPatch,
    reference: list[list[int]],
    head: str,
    drafting: str,
    verification: str,
    kernels: str,
) -> None:
    """Alone and beside sampled requests, which share launches and the draft cache with them. With
    adaptive verification, confidences are the kernels', too. Where ours were measured to be faster,
    vLLM's kernels verify what ours drew."""
    monkeypatch.setattr(dispatch, "is_measured", lambda device: True)
    drawn: list[int] = []
    draw = DraftKernels.draw

    def counted(self: Any, proposer: Any, base_logits: Any, *others: Any) -> None:
        drawn.append(len(base_logits))
        draw(self, proposer, base_logits, *others)

    monkeypatch.setattr(DraftKernels, "draw", counted)
    ours = {"dspark": {"kernels": kernels, "verification": verification}}
    config = {
        "method": "dspark",
        "model": str(MICRO / f"dspark-{head}"),
        "draft_sample_method": drafting,
    }
    with engine(MICRO, config, additional_config=ours) as llm:
        verifier = worker_of(llm).model_runner.rejection_sampler
        assert isinstance(verifier, KernelRejectionSampler) == (kernels == "triton")
        confidence = worker_of(llm).model_runner.speculator.kernels._confidence
        if verification == "adaptive":
            stored = load_file(MICRO / f"dspark-{head}" / "model.safetensors")
            (weight,) = stored["confidence_head.proj.weight"].float()
            assert torch.equal(confidence.weight.cpu(), weight)
        with observed(llm) as seen:
            assert tokens(run(llm, batch(0.0))) == reference
            assert tokens(run(llm, batch(1.0)))[:2] == reference[:2]
    assert len(drawn) > 10
    assert seen[0].accepted_length > 1.5
