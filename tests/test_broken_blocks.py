"""Ending broken requests in vLLM's real scheduler: nothing of theirs reaches another request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.request import FinishReason, RequestStatus

from tests.scheduling import BLOCK, Scheduling, pair

NO_DRAFTS = {"verification": "all", "depth": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair(tmp_path_factory.mktemp("pair"))


def made(folder: Path, **options: Any) -> Scheduling:
    scheduling = Scheduling(folder, dspark=NO_DRAFTS, **options)
    scheduling.starts(finds_broken=True)
    return scheduling


@pytest.mark.parametrize("asynchronous", [True, False], ids=["async", "sync"])
def test_logprobs_of_its_prompt_go_with_it(folder: Path, asynchronous: bool) -> None:
    """vLLM asserts that a request which emits nothing has none; the engine would die of it."""
    on = made(folder, asynchronous=asynchronous)
    on.add("bad", range(20), prompt_logprobs=1)
    on.add("good", range(30, 50), prompt_logprobs=1)
    of = LogprobsTensors(torch.zeros(19, 2).long(), torch.zeros(19, 2), torch.zeros(19).long())
    _, outputs = on.step(void={"bad": 1}, prompt_logprobs_dict={"bad": of, "good": of})
    ended = {output.request_id: output for output in outputs[0].outputs}
    assert ended["bad"].finish_reason == FinishReason.ERROR
    assert ended["good"].finish_reason is None
    assert ended["good"].new_prompt_logprobs_tensors is of


def zeroed_and_found(on: Scheduling, prompt: list[int]) -> tuple[set[int], int]:
    """Blocks that the next step has zeroed, and tokens that a request with the same prompt then
    finds in the prefix cache."""
    zeroed = set(on.scheduler.schedule().new_block_ids_to_zero or ())
    on.add("next", [*prompt, 9], most=4)
    step = on.scheduler.schedule()
    (new,) = step.scheduled_new_reqs
    return zeroed, new.num_computed_tokens


PROMPT = list(range(100, 140))


@pytest.mark.parametrize("left", ["ended", "aborted", "preempted", "aborted in its prefill"])
def test_blocks_are_found_wherever_the_request_went(folder: Path, left: str) -> None:
    """Its broken step is under way when it goes. Catches blocks that stay in the prefix cache, or
    that others get as they are."""
    on = made(folder, max_num_batched_tokens=64)
    on.add("other", [1], most=50)
    on.step()
    prompt = PROMPT * 3 if "prefill" in left else PROMPT
    on.add("bad", prompt)
    step = on.scheduler.schedule()
    blocks = set(on.held("bad"))
    output = on.output(step, void={"bad": 1})
    if left == "preempted":
        request = on.scheduler.requests["bad"]
        on.scheduler.running.remove(request)
        on.scheduler._preempt_request(request, 0.0)
    elif left == "aborted":
        on.scheduler.finish_requests("bad", RequestStatus.FINISHED_ABORTED)
    on.scheduler.update_from_output(step, output)
    if "prefill" in left:
        assert "bad" in on.scheduler.requests  # it fails once its prompt is through
        on.scheduler.finish_requests("bad", RequestStatus.FINISHED_ABORTED)
    assert "bad" not in on.scheduler.requests
    zeroed, found = zeroed_and_found(on, prompt)
    assert len(blocks) > 2
    assert zeroed == blocks
    assert found == 0


def test_sound_requests_leave_their_blocks_in_the_cache(folder: Path) -> None:
    """Catches a request that is taken for a broken one because it was aborted too."""
    on = made(folder, max_num_batched_tokens=64)
    on.add("good", PROMPT)
    step = on.scheduler.schedule()
    output = on.output(step)
    on.scheduler.finish_requests("good", RequestStatus.FINISHED_ABORTED)
    on.scheduler.update_from_output(step, output)
    zeroed, found = zeroed_and_found(on, PROMPT)
    assert not zeroed
    assert found > 0


def test_nothing_is_kept_of_steps_that_ended(folder: Path) -> None:
    """Two steps are under way at a time, and requests leave all the while."""
    on = made(folder)
    on.add("other", [1], most=200)
    on.step()
    before = on.scheduler.schedule()
    for i in range(20):
        on.add(f"short {i}", PROMPT, most=1)
        step = on.scheduler.schedule()
        on.scheduler.update_from_output(before, on.output(before))
        on.scheduler.finish_requests(f"short {i}", RequestStatus.FINISHED_ABORTED)
        before = step
        assert len(on.scheduler._left) <= 2
    assert on.scheduler._left
    on.scheduler.update_from_output(before, on.output(before))
    assert not on.scheduler._left


def test_a_block_that_was_written_anew_is_not_zeroed(folder: Path) -> None:
    """A broken request shares a block with a sound one, which is preempted, and whose block goes
    to a third in the very same step. It holds that one's prompt from then on."""
    on = made(folder, blocks=15, max_num_batched_tokens=128, long_prefill_token_threshold=32)
    shared, long = list(range(32)), list(range(100, 308))  # 13 blocks
    on.add("long", long, most=1)
    on.add("bad", [*shared, 50, 51])
    on.step()
    on.add("sharer", [*shared, 60, 61])
    on.step()
    block = on.held("bad")[0]
    assert on.held("sharer")[0] == block
    on.step(void={"bad": 1})
    while "long" in on.scheduler.requests:
        taken_over = block in on.held("long")
        on.step()
    assert taken_over
    on.scheduler.finish_requests("sharer", RequestStatus.FINISHED_ABORTED)
    zeroed, found = zeroed_and_found(on, long)
    assert block not in zeroed
    assert block in on.held("next")[: found // BLOCK]
