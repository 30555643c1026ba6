"""Requests whose logits are no distribution: who finds them, and how they end.

The engine is real, and so is what breaks it: the checkpoint's embedding of one word is NaN. A
prompt with that word has NaN logits from there on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine import Request, engine, observed, run, tokens
from tests.pairs import write_drafter, write_target
from tests.verification_cases import runner_of
from vllm_dspark.integration.broken_logits import CheckedSampler, broken_rows, void_tokens
from vllm_dspark.integration.broken_requests import BrokenRequests
from vllm_dspark.integration.rejection import KernelRejectionSampler
from vllm_dspark.integration.step_report import Startup, StepReport, attach_report

NAN, INF = float("nan"), float("inf")
BROKEN_WORD = 37
FREE = {"max_tokens": 28, "ignore_eos": True, "detokenize": False}
PROMPT = [5, 9, 2, BROKEN_WORD, 11, 4]


def test_rows_without_a_distribution() -> None:
    """-inf alone is what a grammar makes of most words, and breaks nothing."""
    logits = torch.tensor(
        [[1.0, -INF, 3.0], [1.0, NAN, 3.0], [1.0, INF, 3.0], [-INF, -INF, -INF], [0.0, 0.0, 0.0]]
    )
    for dtype in (torch.float32, torch.bfloat16):
        assert broken_rows(logits.to(dtype)).tolist() == [False, True, True, True, False]


def test_tokens_from_the_first_broken_row_on_are_void() -> None:
    """Of five requests: whole; broken behind its last token; at it; from its second on; in the
    middle of its prefill, where nothing is emitted. Two rows belong to nobody."""
    offsets = torch.tensor([0, 2, 5, 6, 10, 11], dtype=torch.int32)
    emitted = torch.tensor([2, 2, 1, 4, 0], dtype=torch.int32)
    broken = torch.zeros(13, dtype=torch.bool)
    broken[[4, 5, 7, 8, 10, 12]] = True  # 4 is behind the second token of its request
    void = void_tokens(broken, offsets, emitted)
    assert void.tolist() == [0, 0, 1, 3, 1]
    assert void.dtype == torch.int32


class Engine:
    """vLLM's scheduler, as far as `BrokenRequests` asks it for something."""

    def __init__(self) -> None:
        self.requests = {"a": None, "b": None, "c": None}
        self.encoder_cache_mismatch_reqs: set[str] = set()
        self.kv_cache_manager = SimpleNamespace(
            get_block_ids=lambda name: ([ord(name)], [1]),
            evict_blocks=self._evict,
            block_pool=SimpleNamespace(
                blocks=[SimpleNamespace(ref_cnt=1, block_hash=None) for _ in range(128)]
            ),
        )
        self.evicted: set[int] = set()
        self.new: list[int] | None = None
        self.seen: list[list[list[int]]] = []

    def _evict(self, blocks: set[int]) -> None:
        self.evicted |= blocks

    def schedule(self) -> Any:
        return SimpleNamespace(new_block_ids_to_zero=self.new)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> None:
        self.seen.append(model_runner_output.sampled_token_ids)


class Scheduler(BrokenRequests, Engine):
    """Ours, over that."""


def output(void: dict[str, int] | None, startup: Startup | None = None) -> Any:
    """Of a step: `c` is in the middle of its prefill, `g` was aborted."""
    made = SimpleNamespace(
        sampled_token_ids=[[1, 2, 3], [4], [], [5]],
        req_id_to_index={"a": 0, "b": 1, "c": 2, "g": 3},
        num_nans_in_logits=void,
        prompt_logprobs_dict={},
        prompt_token_id_logprobs_dict={},
    )
    attach_report(made, StepReport(startup=startup))
    return made


def test_scheduler_takes_void_tokens_out() -> None:
    """What was sampled before them stays. Who has no tokens yet, or is gone, does not end, but its
    blocks are noted."""
    scheduler = Scheduler()
    every = {"a": 2, "b": 1, "c": 1, "g": 1}
    scheduler.update_from_output(None, output(every, Startup((0,), None, finds_broken=True)))
    assert scheduler.seen == [[[1], [], [], [5]]]
    assert scheduler.encoder_cache_mismatch_reqs == {"a", "b"}
    assert scheduler.evicted == {1, *map(ord, every)}
    assert scheduler.broken == set(every)
    scheduler.update_from_output(None, output({"a": 0, "b": 0, "c": 0, "g": 0}))
    scheduler.update_from_output(None, output(None))
    assert scheduler.seen[1:] == [[[1, 2, 3], [4], [], [5]]] * 2
    assert not scheduler.broken


def test_blocks_are_zeroed_when_nobody_holds_them() -> None:
    """Once each, and not while a sound request shares them. vLLM's own list goes along."""
    scheduler = Scheduler()
    scheduler.update_from_output(
        None, output({"a": 1, "b": 1}, Startup((0,), None, finds_broken=True))
    )
    assert scheduler.schedule().new_block_ids_to_zero is None
    blocks = scheduler.kv_cache_manager.block_pool.blocks
    blocks[ord("a")].ref_cnt = blocks[ord("b")].ref_cnt = 0
    scheduler.new = [7]
    assert sorted(scheduler.schedule().new_block_ids_to_zero) == [7, ord("a"), ord("b")]
    blocks[1].ref_cnt = 0  # which both of them held
    scheduler.new = None
    assert scheduler.schedule().new_block_ids_to_zero == [1]
    assert scheduler.schedule().new_block_ids_to_zero is None


def test_counts_of_vllms_own_end_nothing() -> None:
    """With VLLM_COMPUTE_NANS_IN_LOGITS it counts NaNs, in rows that have no say too."""
    scheduler = Scheduler()
    scheduler.update_from_output(None, output({"a": 7}, Startup((0,), None)))
    assert scheduler.seen == [[[1, 2, 3], [4], [], [5]]]
    assert not scheduler.encoder_cache_mismatch_reqs


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that breaks at one word, which neither it nor its drafter comes to by itself."""
    folder = write_target(tmp_path_factory.mktemp("pair"), seed=5)
    write_drafter(folder / "dspark", folder, seed=6)
    rows = {
        "model.embed_tokens.weight": NAN,
        "lm_head.weight": 0.0,
        "markov_head.markov_w2.weight": 0.0,
    }
    for path in (folder / "model.safetensors", folder / "dspark" / "model.safetensors"):
        weights = load_file(path)
        for name in rows.keys() & weights.keys():
            weights[name][BROKEN_WORD] = rows[name]  # its logit is 0
        save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=[True, False], ids=["async", "sync"])
def llm(pair: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    options: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "async_scheduling": request.param,
        "max_num_batched_tokens": 64,
        "additional_config": {"dspark": {"kernels": "triton", "verification": "all"}},
    }
    with engine(pair, "dspark", **options) as made:
        yield made


def healthy() -> list[Request]:
    """Greedy and sampled, at once and later; one shares the first block of `PROMPT` with it."""
    return [
        Request([5, 9, 2, 8], FREE),
        Request([1, 2, 3], FREE | {"temperature": 1.0, "seed": 1}),
        Request([7], FREE | {"temperature": 0.7, "top_p": 0.9, "seed": 2}, arrives=2),
        Request([4, 4, 6], FREE | {"logprobs": 2}, arrives=6),
    ]


@contextmanager
def outcomes(llm: Any) -> Iterator[list[tuple[torch.Tensor, ...]]]:
    """Of every step that our kernels verify: emitted tokens and rejected drafts as vLLM counts
    them and as they do, and whose logits are broken."""
    runner = runner_of(llm)
    sampler, original = runner.rejection_sampler, runner.speculator.observe_verification
    seen: list[tuple[torch.Tensor, ...]] = []

    def observe(slots: Any, emitted: torch.Tensor, rejected: torch.Tensor) -> None:
        table = sampler.outcomes_of(emitted)
        if table is not None:
            tensors = torch.stack((emitted, rejected)), table, sampler.verdict.failed
            seen.append(tuple(tensor.clone() for tensor in tensors))
        original(slots, emitted, rejected)

    runner.speculator.observe_verification = observe
    try:
        yield seen
    finally:
        del runner.speculator.observe_verification


def check_outcomes(seen: list[tuple[torch.Tensor, ...]]) -> None:
    """The same of all that could be judged. A broken row rejects nothing."""
    theirs, ours, failed = (torch.cat(tensors, dim=-1) for tensors in zip(*seen, strict=True))
    sound = failed == 0
    assert torch.equal(ours[:, sound], theirs[:, sound])
    assert torch.equal(ours[0], theirs[0])
    assert ours[1, sound].count_nonzero() > 3
    assert theirs[1, ~sound].count_nonzero() > 0
    assert ours[1, ~sound].count_nonzero() == 0


@pytest.mark.engine
def test_one_request_ends_with_an_error_and_no_other_notices(llm: Any) -> None:
    """Broken from its first token on, in a batch that verifies drafts; by its prompt alone, or
    greedily or with options that vLLM processes; after a prompt in two steps."""
    assert isinstance(runner_of(llm).rejection_sampler, KernelRejectionSampler)
    broken = [
        Request(PROMPT, FREE, arrives=3),
        Request(PROMPT, FREE | {"temperature": 1.0, "top_k": 5}, arrives=4),
        Request([BROKEN_WORD, *range(30)] + 40 * [3], FREE | {"logprobs": 1}, arrives=5),
        Request(PROMPT, FREE | {"prompt_logprobs": 1}, arrives=6),
    ]
    outputs = run(llm, healthy() + broken)
    assert [o.outputs[0].finish_reason for o in outputs[4:]] == ["error"] * 4
    assert tokens(outputs)[4:] == [[], [], [], []]
    with observed(llm) as seen:
        expected = run(llm, healthy())  # the engine goes on
    assert seen[0].accepted > 10
    assert [o.outputs[0].finish_reason for o in expected] == ["length"] * 4
    assert tokens(outputs)[:4] == tokens(expected)


@pytest.mark.engine
def test_a_step_without_drafts_looks_too(llm: Any) -> None:
    """A request that is alone is sampled by vLLM's sampler when its prompt is through."""
    assert isinstance(runner_of(llm).sampler, CheckedSampler)
    for _ in range(2):  # nothing of it is in the prefix cache
        (output,) = run(llm, [Request(PROMPT * 8, FREE)])
        assert (output.outputs[0].finish_reason, tokens([output])) == ("error", [[]])
        assert output.num_cached_tokens == 0


@pytest.mark.engine
def test_tokens_before_count(llm: Any) -> None:
    """A request that comes to the word keeps what it has said, the word included. If the word ends
    it, it has not failed."""
    bias = FREE | {"logit_bias": {BROKEN_WORD: 6.0}}
    first = [Request([8, i], bias) for i in range(4)]
    with outcomes(llm) as seen:
        outputs = run(llm, first + healthy())
    for output in outputs[: len(first)]:
        (said,) = tokens([output])
        assert output.outputs[0].finish_reason == "error"
        assert said[-1] == BROKEN_WORD
        assert BROKEN_WORD not in said[:-1]
    ended = [Request(r.prompt, r.params | {"stop_token_ids": [BROKEN_WORD]}) for r in first]
    for output in run(llm, ended):
        assert output.outputs[0].finish_reason == "stop"
    check_outcomes(seen)
