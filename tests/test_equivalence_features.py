"""Greedy equivalence where other features of the engine meet speculation.

One engine without and one with DSpark run the same scenarios; each test compares one and
asserts that what it is named after happened.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.engine import MICRO, Request, Speculation, counters, engine, observed, run, tokens

pytestmark = pytest.mark.engine

PREFIX = (
    "import os\nimport sys\n\n\nclass Parser(object):\n"
    "    def __init__(self, name, value):\n        self.name = name\n"
)
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["alpha", "beta"]}, "ok": {"type": "boolean"}},
    "required": ["kind", "ok"],
    "additionalProperties": False,
}


@dataclass
class Results:
    """Outputs of all scenarios on one engine, and what the engine counted meanwhile."""

    outputs: dict[str, list[Any]] = field(default_factory=dict)
    speculation: dict[str, Speculation] = field(default_factory=dict)
    counters: dict[str, dict[str, float]] = field(default_factory=dict)


def scenarios(plain: list[list[int]], eos: int) -> dict[str, list[Request]]:
    """Requests by scenario.

    Args:
        plain: the target's own tokens for "plain", from which stop conditions are cut so
            that they fall anywhere in a block.
        eos: a token to be treated as any other.
    """
    from vllm.sampling_params import StructuredOutputsParams

    free = {"max_tokens": 24, "ignore_eos": True}
    constraint = StructuredOutputsParams(json=SCHEMA)
    stops = range(2, 18, 2)
    return {
        "max_tokens": [Request("def f(self", {"max_tokens": n, "ignore_eos": True})
                       for n in range(1, 9)],
        "stop_token": [Request("def f(self", {"max_tokens": 24, "stop_token_ids": [plain[0][i]]})
                       for i in stops],
        "stop_string": [Request("def f(self", {"max_tokens": 24, "stop": stop})
                        for stop in ("\n    ", "self.")],
        "eos": [Request("x = 1\n\n\n", {"max_tokens": 60}),
                Request("x = 1\n\n\n", {"max_tokens": 60, "ignore_eos": True,
                                        "logit_bias": {eos: 4.0}})],
        "logprobs": [Request("import ", free | {"logprobs": 3}), Request("class A", free)],
        "penalties": [
            Request("for i in ", free | {"presence_penalty": 1.5}),
            Request("for i in ", free | {"frequency_penalty": 0.8}),
            Request("for i in ", free | {"repetition_penalty": 1.3}),
            Request("for i in ", free),
        ],
        "logit_bias": [Request("return ", free | {"logit_bias": {plain[0][3]: 6.0}}),
                       Request("return ", free | {"logit_bias": {plain[0][1]: -100.0}})],
        "json_schema": [
            Request("config = ", {"max_tokens": 60, "structured_outputs": constraint}),
            Request("def g(x", free),
        ],
        "chunked_prefill": [Request(PREFIX * 2 + "    def get(self", free),
                            Request("if x", free)],
        "shared_prefix": [Request(PREFIX + tail, free, arrives=6 * i)
                          for i, tail in enumerate(("    def a(", "    def b(", "    def a("))],
        "aborts": [Request("while True", free | {"max_tokens": 40}, aborted_after=5),
                   Request("with open(", free),
                   Request("raise Value", free | {"max_tokens": 40}, arrives=3, aborted_after=9),
                   Request("assert ", free, arrives=4)],
    }  # fmt: skip


NAMES = list(scenarios([[0] * 24], 0))


@pytest.fixture(scope="module")
def results() -> tuple[Results, Results]:
    """All scenarios without and with DSpark."""
    made = Results(), Results()
    drafter = f"dspark:{MICRO / 'dspark-vanilla'}"
    # 128 tokens a step: PREFIX twice does not fit into one
    shared = {"max_model_len": 512, "max_num_batched_tokens": 128, "enable_prefix_caching": True}
    # a small model would fill an object with spaces where it may
    json_only = {"backend": "xgrammar", "disable_any_whitespace": True}
    for results, speculative_config in zip(made, (None, drafter), strict=True):
        with engine(
            MICRO, speculative_config, structured_outputs_config=json_only, **shared
        ) as llm:
            first = run(llm, [Request("def f(self", {"max_tokens": 24, "ignore_eos": True})])
            results.outputs["plain"] = first
            plain = tokens(made[0].outputs["plain"])
            eos = llm.get_tokenizer().eos_token_id
            for name, requests in scenarios(plain, eos).items():
                before = counters(llm)
                with observed(llm) as seen:
                    results.outputs[name] = run(llm, requests)
                results.speculation[name] = seen[0]
                after = counters(llm)
                results.counters[name] = {k: after[k] - before.get(k, 0.0) for k in after}
    return made


def check_equal(name: str, target: Sequence[Any], ours: Sequence[Any]) -> None:
    """Outputs of the scenario of this name: tokens, text and reason to finish."""
    if name == "aborts":  # an aborted request ends somewhere: one is a prefix of the other
        for a, b in zip(tokens(target), tokens(ours), strict=True):
            shorter = min(len(a), len(b))
            assert a[:shorter] == b[:shorter]
        return
    assert tokens(ours) == tokens(target)
    for a, b in zip(target, ours, strict=True):
        assert b.outputs[0].text == a.outputs[0].text
        assert b.outputs[0].finish_reason == a.outputs[0].finish_reason


@pytest.mark.parametrize("name", ["plain", *NAMES])
def test_equals_target(results: tuple[Results, Results], name: str) -> None:
    """Tokens, text and reason to finish are the target's own."""
    target, ours = (r.outputs[name] for r in results)
    check_equal(name, target, ours)
    if name == "aborts":  # the others go on to their end
        requests = scenarios(tokens(results[0].outputs["plain"]), 0)[name]
        for request, a, b in zip(requests, tokens(target), tokens(ours), strict=True):
            assert request.aborted_after is not None or len(a) == len(b) == 24


@pytest.mark.parametrize("name", NAMES)
def test_speculation_ran(results: tuple[Results, Results], name: str) -> None:
    """Every scenario verified drafts and had some accepted; the reference had none."""
    target, ours = results
    assert target.speculation[name].rounds == 0
    assert ours.speculation[name].accepted > 0


@pytest.mark.parametrize("name", ["max_tokens", "stop_token"])
def test_end_falls_inside_a_block(results: tuple[Results, Results], name: str) -> None:
    """More tokens were accepted than kept, so some block was cut short."""
    ours = results[1]
    kept = sum(len(t) - 1 for t in tokens(ours.outputs[name]))
    speculation = ours.speculation[name]
    assert speculation.rounds + speculation.accepted > kept


def test_stop_reasons(results: tuple[Results, Results]) -> None:
    """The stop scenarios really end by a stop condition."""
    for name in ("stop_token", "stop_string"):
        assert any(o.outputs[0].finish_reason == "stop" for o in results[1].outputs[name])


def test_logprobs_are_the_targets(results: tuple[Results, Results]) -> None:
    """Same ranked words, same values up to rounding between batch shapes."""
    target, ours = (r.outputs["logprobs"][0].outputs[0].logprobs for r in results)
    assert len(target) == len(ours) == 24
    for a, b in zip(target, ours, strict=True):
        assert set(a) == set(b)
        for word in a:
            assert b[word].logprob == pytest.approx(a[word].logprob, abs=1e-4)
            assert b[word].rank == a[word].rank


def test_json_matches_schema(results: tuple[Results, Results]) -> None:
    """The constrained request finished with an object of the schema."""
    answer = json.loads(results[1].outputs["json_schema"][0].outputs[0].text)
    assert answer["kind"] in ("alpha", "beta")
    assert isinstance(answer["ok"], bool)


def test_penalties_and_bias_change_the_output(results: tuple[Results, Results]) -> None:
    """Otherwise these scenarios would compare nothing new."""
    *penalised, free = tokens(results[1].outputs["penalties"])
    assert all(t != free for t in penalised)
    biased = tokens(results[1].outputs["logit_bias"])
    assert biased[0] != biased[1]


def test_prefix_cache_was_hit(results: tuple[Results, Results]) -> None:
    """The later requests of the scenario found their prefix cached."""
    assert results[1].counters["shared_prefix"]["vllm:prefix_cache_hits"] > 0


def test_prefill_was_chunked(results: tuple[Results, Results]) -> None:
    """The long prompt did not fit into one step."""
    assert len(results[1].outputs["chunked_prefill"][0].prompt_token_ids) > 128


def test_aborted_requests_ended_early(results: tuple[Results, Results]) -> None:
    """The aborts took effect beside live requests, which went on to the end."""
    lengths = [len(t) for t in tokens(results[1].outputs["aborts"])]
    assert lengths[0] < 40
    assert lengths[2] < 40
    assert lengths[1] == lengths[3] == 24
