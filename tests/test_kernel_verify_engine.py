"""The engine verifying with our kernels: what it says is what it said before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.engine import MICRO, Request, engine, observed, run, tokens
from tests.test_equivalence_features import PREFIX, SCHEMA
from tests.test_losslessness import (
    GAMMA,
    POSITIONS,
    PROMPT,
    REGIMES,
    SIGNIFICANCE,
    exact_joint,
    p_value,
)
from tests.test_losslessness import pair as pair
from tests.verification_cases import runner_of
from vllm_dspark.integration.processing import needs_processing
from vllm_dspark.integration.rejection import KernelRejectionSampler

pytestmark = pytest.mark.engine

OURS: dict[str, Any] = {"dspark": {"kernels": "triton", "verification": "all"}}
SAMPLES = 72  # of each regime; seeds are fixed


def greedy() -> list[Request]:
    """One request for every way in which logits are changed before the likeliest word is taken."""
    from vllm.sampling_params import StructuredOutputsParams

    free = {"max_tokens": 16, "ignore_eos": True}
    constraint = StructuredOutputsParams(json=SCHEMA)
    return [
        Request("def f(self", free),
        Request("import ", free | {"logprobs": 3}),
        Request("for i in ", free | {"presence_penalty": 1.5}),
        Request("return ", free | {"logit_bias": {40: 6.0}}),
        Request("config = ", {"max_tokens": 60, "structured_outputs": constraint}),
        Request(PREFIX * 2 + "    def get(self", free, arrives=2),  # prefilled in two steps
        Request("x = ", free | {"bad_words": ["1", " 1"]}, arrives=4),
    ]


def drawn(first: int = 0) -> list[Request]:
    """Seeded requests with every option of sampling; those before `first` are left out."""
    free = {"max_tokens": 12, "ignore_eos": True}
    ways: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 0.6, "min_p": 0.1},
        {"temperature": 1.2, "top_k": 5, "frequency_penalty": 0.5},
        {"temperature": 0.0},
        {"temperature": 0.8, "logprobs": 2},
    ]
    requests = [Request(f"def g{i}(", free | way | {"seed": 100 + i}) for i, way in enumerate(ways)]
    return requests[first:]


@pytest.fixture(scope="module")
def shared() -> dict[str, Any]:
    json_only = {"backend": "xgrammar", "disable_any_whitespace": True}
    lengths = {"max_model_len": 512, "max_num_batched_tokens": 128}
    return {"structured_outputs_config": json_only, **lengths}


@pytest.fixture(scope="module")
def target(shared: dict[str, Any]) -> list[Any]:
    """What the target says by itself."""
    with engine(MICRO, **shared) as llm:
        return run(llm, greedy())


@pytest.fixture(scope="module")
def ours(shared: dict[str, Any]) -> Iterator[Any]:
    """An engine whose drafts are drawn and verified by our kernels."""
    config = {
        "method": "dspark",
        "model": str(MICRO / "dspark-vanilla"),
        "draft_sample_method": "probabilistic",
    }
    with engine(MICRO, config, additional_config=OURS, **shared) as llm:
        yield llm


def test_greedy_output_is_the_targets(target: list[Any], ours: Any) -> None:
    """Penalties, bias, forbidden words, a grammar and a prompt in two steps, in one batch."""
    with observed(ours) as seen:
        outputs = run(ours, greedy())
    assert tokens(outputs) == tokens(target)
    assert seen[0].accepted_length > 1.5
    assert runner_of(ours).rejection_sampler.verdict is not None
    assert json.loads(outputs[4].outputs[0].text)["kind"] in ("alpha", "beta")
    for a, b in zip(target[1].outputs[0].logprobs, outputs[1].outputs[0].logprobs, strict=True):
        assert set(a) == set(b)
        for word in a:
            assert b[word].logprob == pytest.approx(a[word].logprob, abs=1e-4)


@pytest.fixture(scope="module")
def together(ours: Any) -> list[list[int]]:
    """What seeded requests say in one batch."""
    return tokens(run(ours, drawn()))


def test_seeded_output_does_not_depend_on_the_batch(ours: Any, together: list[list[int]]) -> None:
    """A seeded request says the same twice, beside others and alone."""
    assert tokens(run(ours, drawn())) == together
    assert tokens(run(ours, drawn(first=5))) == together[5:]


def test_greedy_output_is_the_one_of_vllms_kernels(ours: Any, together: list[list[int]]) -> None:
    """The same engine with vLLM's own sampler in it says the same. A sampled request's tokens are
    other draws from the same distribution."""
    requests = drawn(first=4)
    assert requests[0].params["temperature"] == 0
    runner = runner_of(ours)
    kernels = runner.rejection_sampler
    assert isinstance(kernels, KernelRejectionSampler)
    runner.rejection_sampler = KernelRejectionSampler.__base__(
        runner.sampler, runner.speculative_config, runner.device
    )
    try:
        assert tokens(run(ours, requests))[0] == together[4]
    finally:
        runner.rejection_sampler = kernels


def test_only_rows_that_ask_for_it_are_processed(
    ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the six has top-p, one top-k and a penalty. Temperature and min-p do not count."""
    sampler = runner_of(ours).sampler
    seen: list[tuple[int, int]] = []
    apply = type(sampler).apply_sampling_params

    def counted(self: Any, logits: Any, *others: Any, **named: Any) -> Any:
        seen.append((len(others[1]), len(logits)))
        return apply(self, logits, *others, **named)

    monkeypatch.setattr(type(sampler), "apply_sampling_params", counted)
    needed: list[list[bool]] = []
    call = KernelRejectionSampler.__call__

    def verified(self: Any, logits: Any, batch: Any, *others: Any) -> Any:
        needed.append(needs_processing(sampler, batch.idx_mapping_np).tolist())
        return call(self, logits, batch, *others)

    monkeypatch.setattr(KernelRejectionSampler, "__call__", verified)
    run(ours, drawn())
    assert max(map(sum, needed)) == 2
    gamma = runner_of(ours).speculator.num_speculative_steps
    steps = [(requests, rows) for requests, rows in seen if rows > requests]
    assert steps
    assert all(requests <= 2 and rows <= requests * (gamma + 1) for requests, rows in steps)


@pytest.mark.parametrize("method", ["standard", "block"])
def test_sampled_output_follows_the_target(pair: Any, method: str) -> None:
    """Requests of all regimes in one batch; each must follow its own distribution."""
    config = {
        "method": "dspark",
        "draft_sample_method": "probabilistic",
        "rejection_sample_method": method,
        "num_speculative_tokens": GAMMA,
    }
    fixed = {"max_tokens": POSITIONS, "ignore_eos": True, "detokenize": False}
    requests = [
        Request(PROMPT, regime | fixed | {"seed": i})
        for i in range(SAMPLES)
        for regime in REGIMES.values()
    ]
    options = {"skip_tokenizer_init": True, "max_num_seqs": 16, "additional_config": OURS}
    with engine(pair, config, **options) as llm, observed(llm) as seen:
        samples = np.array(tokens(run(llm, requests)))
        assert runner_of(llm).rejection_sampler.verdict is not None
    assert 0.05 < seen[0].accepted / seen[0].drafted < 0.95
    for i, regime in enumerate(REGIMES.values()):
        joint = exact_joint(pair, regime)
        own = samples[i :: len(REGIMES)]
        assert p_value(own, joint) > SIGNIFICANCE
        for position in range(POSITIONS):
            others = tuple(j for j in range(POSITIONS) if j != position)
            assert p_value(own[:, [position]], np.asarray(joint.sum(others))) > SIGNIFICANCE
