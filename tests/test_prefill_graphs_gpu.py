"""On a GPU: a step with a prefill beside decodes replays one full graph, exact in fp32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.engine import TINY, Request, engine, observed, run, tokens
from tests.test_gpu import GRAPHS, REQUESTS, TWO_RANKS, speculation
from tests.verification_cases import RandomBudget, manager_of, runner_of

pytestmark = [pytest.mark.gpu, pytest.mark.engine]

BOTH: dict[str, Any] = GRAPHS | {
    "dtype": "float32",
    "max_num_batched_tokens": 128,  # prompts that are longer come in chunks
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_AND_PIECEWISE",
        "cudagraph_capture_sizes": [1, 8, 16, 32, 64, 128],
    },
}
LONG = Request("def f(x):\n" + "    x = x + 1\n" * 40, {"max_tokens": 24}, arrives=9)
MIXED = [*REQUESTS, LONG]


@pytest.fixture
def breakable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compilation, which starts in seconds, there are pieces only so."""
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")


@pytest.fixture(scope="module")
def reference() -> list[list[int]]:
    """What the target says by itself."""
    with engine(TINY, dtype="float32", **GRAPHS) as llm:
        return tokens(run(llm, MIXED))


@contextmanager
def replays(llm: Any) -> Iterator[Counter[str]]:
    """Steps of the target, by the kind of graph."""
    graphs = runner_of(llm).cudagraph_manager
    whole, pieces = graphs.run_fullgraph, graphs.run_pw_graph
    seen: Counter[str] = Counter()

    def run_fullgraph(description: Any) -> Any:
        bounded = description.max_query_len is not None
        seen["decode" if bounded else "prefill"] += 1
        return whole(description)

    def run_pw_graph(*args: Any) -> Any:
        seen["pieces"] += 1
        return pieces(*args)

    graphs.run_fullgraph, graphs.run_pw_graph = run_fullgraph, run_pw_graph
    try:
        yield seen
    finally:
        del graphs.run_fullgraph, graphs.run_pw_graph


@pytest.mark.usefixtures("breakable")
@pytest.mark.parametrize("mode", ["device", "host"])
@pytest.mark.parametrize("drafting", ["greedy", "probabilistic"])
def test_fp32_tokens_equal(reference: list[list[int]], mode: str, drafting: str) -> None:
    """Requests that arrive one after the other, one of them in chunks; as it serves, and with
    random budgets. Catches a graph that replays the shapes it was captured with."""
    chosen = {"verification": "adaptive", "verification_mode": mode, "prefill_graphs": "full"}
    options = BOTH | {"additional_config": {"dspark": chosen}}
    with engine(TINY, speculation(drafting), **options) as llm:
        with replays(llm) as seen, observed(llm) as rounds:
            assert tokens(run(llm, MIXED)) == reference
            manager = manager_of(llm)
            if mode == "device":
                manager.policy = RandomBudget(manager.policy)
            for _ in range(2):
                assert tokens(run(llm, MIXED)) == reference
    assert seen["pieces"] == 0
    assert seen["prefill"] > 3 * len(REQUESTS)
    assert seen["decode"] > 20
    assert rounds[0].accepted_length > 1.3


def test_fp32_tokens_equal_under_torch_compile(reference: list[list[int]]) -> None:
    """As vLLM compiles by default: code in pieces, captured as one graph."""
    chosen = {"verification": "adaptive", "prefill_graphs": "full"}
    options = BOTH | {"additional_config": {"dspark": chosen}}
    options["compilation_config"] = BOTH["compilation_config"] | {"mode": 3}
    with engine(TINY, speculation("greedy"), **options) as llm:
        with replays(llm) as seen, observed(llm) as rounds:
            for _ in range(2):
                assert tokens(run(llm, MIXED)) == reference
    assert seen["pieces"] == 0
    assert seen["prefill"] > 2 * len(REQUESTS)
    assert rounds[0].accepted_length > 1.3


@pytest.mark.usefixtures("breakable")
@TWO_RANKS
def test_fp32_tokens_equal_on_two_ranks(reference: list[list[int]]) -> None:
    """Each rank replays its own graphs, with the ranks' sums inside them."""
    chosen = {"verification": "adaptive", "prefill_graphs": "full"}
    options = BOTH | {"additional_config": {"dspark": chosen}, "tensor_parallel_size": 2}
    with engine(TINY, speculation("greedy"), **options) as llm, observed(llm) as rounds:
        for _ in range(2):
            assert tokens(run(llm, MIXED)) == reference
    assert rounds[0].accepted_length > 1.3
