"""Drafts that a grammar rejects: what comes in their place follows the target under the grammar.

They were drawn without it, so they have to be judged like any other: that a word was drawn in vain
tells of what the drafter prefers. Those behind them are judged by rows that know no grammar, and
may not be.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from tests.scheduling import Scheduling, pair
from vllm_dspark.integration import grammar_rejection
from vllm_dspark.integration.grammar_rejection import GrammarRejectionSampler, unjudged
from vllm_dspark.kernels.verify import Method, Verifier
from vllm_dspark.kernels.verify_batch import Batch, DenseDraft

WORDS, REQUESTS, TIMES = 8, 64, 2
ALLOWED = torch.tensor([0.5, 0.5])  # of the target, under the grammar
DRAWN = torch.tensor([0.5, 0.0, 0.5])  # the last one is forbidden


def logits_of(probabilities: torch.Tensor) -> torch.Tensor:
    """[V], -inf where nothing is."""
    logits = torch.full((WORDS,), -torch.inf)
    logits[: len(probabilities)] = probabilities.log()
    return logits


def first_words(method: Method, judged: Any) -> torch.Tensor:
    """int64 [TIMES · REQUESTS]: the word of each that stands where one word had been drafted.

    Args:
        judged: rows that are not to be, bool [N], from those that vLLM calls invalid, logits and
            tokens.
    """
    found = []
    for time in range(TIMES):
        generator = torch.Generator().manual_seed(time)
        drafts = torch.multinomial(DRAWN, REQUESTS, True, generator=generator)
        logits = torch.zeros(2 * REQUESTS, WORDS)  # the row behind the draft knows no grammar
        logits[::2] = logits_of(ALLOWED)
        tokens = torch.zeros(2 * REQUESTS, dtype=torch.int64)
        tokens[1::2] = drafts
        invalid = torch.zeros(2 * REQUESTS, dtype=torch.bool)
        invalid[1::2] = drafts >= len(ALLOWED)
        batch = Batch(
            logits=logits,
            offsets=torch.arange(0, 2 * REQUESTS + 1, 2, dtype=torch.int32),
            tokens=tokens.masked_fill(judged(invalid, logits, tokens), -1),
            positions=5 + torch.arange(2 * REQUESTS) % 2,
            slots=torch.arange(REQUESTS, dtype=torch.int32),
            temperature=torch.ones(REQUESTS),
            seeds=torch.randint(-(2**62), 2**62, (REQUESTS,), generator=generator),
            gamma=1,
            draft=DenseDraft(logits_of(DRAWN).repeat(REQUESTS, 1, 1)),
        )
        found.append(Verifier(REQUESTS, 1, torch.device("cpu")).verify(batch, method).tokens[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("method", ["standard", "block"])
def test_words_follow_the_target(method: Method) -> None:
    """The drafter never draws the second allowed word. Where a forbidden draft is left out, as vLLM
    does, either word follows it, which makes the first one 0.75."""
    words = first_words(method, unjudged)
    assert words.max() < len(ALLOWED)
    error = (0.25 / len(words)) ** 0.5
    assert abs(float((words == 0).float().mean()) - 0.5) < 3.5 * error
    left_out = first_words(method, lambda invalid, logits, tokens: invalid)
    assert float((left_out == 0).float().mean()) > 0.5 + 3.5 * error


def test_the_first_of_a_block_is_judged_where_its_row_forbids_it() -> None:
    """Two requests of three drafts and one. Of the first all but one draft are invalid; its row
    forbids the second draft. The row of the other's draft lets it pass: it knows no grammar yet."""
    logits = torch.zeros(6, WORDS)
    logits[1, 3] = logits[2, 4] = -torch.inf
    tokens = torch.tensor([1, 2, 3, 4, 1, 5])
    invalid = torch.tensor([False, False, True, True, False, True])
    found = unjudged(invalid, logits, tokens)
    assert found.tolist() == [False, False, False, True, False, True]
    assert invalid.tolist() == [False, False, True, True, False, True]


def test_placeholders_are_not_judged() -> None:
    """They are no words, and the row of another says nothing of them."""
    logits = torch.full((2, WORDS), -torch.inf)
    tokens = torch.tensor([1, -1])
    judged = tokens.masked_fill(unjudged(torch.tensor([False, True]), logits, tokens), -1)
    assert judged.tolist() == [1, -1]


def test_vllms_own_sampler_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where our kernels do not verify."""
    logits, tokens = torch.full((2, WORDS), -torch.inf), torch.tensor([1, 2])
    told: list[Any] = []
    monkeypatch.setattr(RejectionSampler, "__call__", lambda self, *args: told.append(args[3]))
    monkeypatch.setattr(grammar_rejection, "gather_inputs", lambda *_: (tokens, tokens))
    sampler = GrammarRejectionSampler.__new__(GrammarRejectionSampler)
    sampler.sampler = SimpleNamespace()
    sampler(logits, SimpleNamespace(), None, torch.tensor([False, True]))
    sampler(logits, SimpleNamespace(), None, None)
    assert told[0].tolist() == [False, False]
    assert told[1] is None


def test_without_asynchronous_scheduling_the_rejected_draft_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a placeholder, for the worker knows what was drafted. vLLM cuts the block before it, and
    the worker draws from the target there."""
    on = Scheduling(pair(tmp_path), asynchronous=False)
    manager = on.scheduler.structured_output_manager
    monkeypatch.setattr(
        manager,
        "validate_tokens",
        lambda request, drafts: [d for d in drafts if 0 <= d < 9] if request.use_structured_output
        else drafts,
    )  # fmt: skip
    named = {name: on.add(name, [1, 2], most=20) for name in ("free", "bound", "cut", "ended")}
    on.step()
    for name in ("bound", "cut", "ended"):
        named[name].structured_output_request = object()
    drafts = {"free": [3, 9, 4], "bound": [3, 4, 5], "cut": [3, 9, -1], "ended": [3, -1, -1]}
    on.scheduler.update_draft_token_ids(DraftTokenIds(list(drafts), list(drafts.values())))
    kept = {name: request.spec_token_ids for name, request in named.items()}
    assert kept["free"] == [3, 9, 4]
    assert kept["bound"] == [3, 4, 5]
    assert kept["cut"] == [3, -1]
    assert kept["ended"] == [3]
