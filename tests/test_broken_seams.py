"""What ending broken requests needs of vLLM, in the sources of every supported version."""

from __future__ import annotations

import ast

import pytest

from tests.test_seams import GPU, RUNNER, SAMPLE
from tests.test_seams import vllm as vllm
from tests.vllm_sources import Sources, calls, parameters

SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
COUNTS = "num_nans_in_logits"


def text(vllm: Sources, target: str) -> str:
    function = vllm.function(target)
    assert function is not None, f"{target} is gone"
    return ast.unparse(function)


def test_scheduler_ends_what_it_is_told_to(vllm: Sources) -> None:
    """The set that we add to is read once the tokens of the step are taken in, and whoever is in
    it ends with an error."""
    update = text(vllm, f"{SCHEDULER}.update_from_output")
    taken_in = update.index("self._update_request_with_output(")
    told = update.index("error_req_ids.update(self.encoder_cache_mismatch_reqs)")
    ended = update.index("self.finish_requests(error_req_ids, RequestStatus.FINISHED_ERROR)")
    assert taken_in < told < ended


def test_finished_requests_are_not_ended_again(vllm: Sources) -> None:
    """Those whose last sound tokens ended them are among the names."""
    finish = text(vllm, f"{SCHEDULER}.finish_requests")
    assert "if request is None or request.is_finished():" in finish


def test_counts_come_with_the_tokens(vllm: Sources) -> None:
    """In one copy from the device, whatever vLLM itself is told to look for."""
    output = f"{GPU}.async_utils:AsyncOutput"
    sent, read = text(vllm, f"{output}.__init__"), text(vllm, f"{output}.get_output")
    assert "if sampler_output.num_nans is not None:" in sent
    assert sent.index("num_nans") < sent.index("self.copy_event.record")
    assert f"self.model_runner_output.{COUNTS} = dict(" in read


def test_counts_alone_change_nothing_for_vllm(vllm: Sources) -> None:
    """It notes them on the request, for a metric that has a switch of its own."""
    update = text(vllm, f"{SCHEDULER}.update_from_output")
    assert update.count(f"request.{COUNTS} = ") == 1
    assert update.count(f"{COUNTS}=request.{COUNTS}") == 1


def test_blocks_are_zeroed_before_the_step_runs(vllm: Sources) -> None:
    """On the list that comes with the step, also with one that runs no token."""
    update = text(vllm, f"{RUNNER}.update_requests")
    assert "self.kv_block_zeroer.zero_block_ids(scheduler_output.new_block_ids_to_zero)" in update
    execute = text(vllm, f"{RUNNER}.execute_model")
    assert execute.index("self.update_requests(") < execute.index("total_num_scheduled_tokens == 0")
    assert vllm.function(f"{RUNNER}._init_kv_zero_meta") is not None


@pytest.mark.parametrize("giving", ["_preempt_request", "_free_blocks"])
def test_all_blocks_are_given_back_at_one_place(vllm: Sources, giving: str) -> None:
    """While it still says how many tokens of the request are under way."""
    given = text(vllm, f"{SCHEDULER}.{giving}")
    assert given.count("self._free_request_blocks(request)") == 1
    assert "kv_cache_manager" not in given
    assert "request.num_in_flight_tokens = " not in given


def test_tokens_under_way_are_counted(vllm: Sources) -> None:
    """From the step that is scheduled to the one that is taken in."""
    counted = "request.num_in_flight_tokens"
    assert f"{counted} += num_scheduled_token" in text(vllm, f"{SCHEDULER}._update_after_schedule")
    update = text(vllm, f"{SCHEDULER}.update_from_output")
    assert f"{counted} -= num_tokens_scheduled" in update


def test_a_request_that_emits_nothing_has_no_logprobs_of_its_prompt(vllm: Sources) -> None:
    """vLLM asserts it; these are what we take out."""
    update = text(vllm, f"{SCHEDULER}.update_from_output")
    assert "assert not prompt_logprobs_tensors" in update
    assert "assert prompt_token_id_logprobs is None" in update
    for taken in ("prompt_logprobs_dict", "prompt_token_id_logprobs_dict"):
        assert f"{taken} = model_runner_output.{taken}" in update
        assert f"{taken}.get(req_id)" in update


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (f"{SAMPLE}.sampler:Sampler.__call__", "self logits input_batch"),
        ("vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks", "self block_ids"),
        ("vllm.v1.core.kv_cache_manager:KVCacheManager.get_block_ids", "self request_id"),
        (f"{SCHEDULER}._free_request_blocks", "self request"),
    ],
)
def test_parameters(vllm: Sources, target: str, expected: str) -> None:
    function = vllm.function(target)
    assert function is not None, f"{target} is gone"
    assert " ".join(parameters(function)) == expected


def test_sampler_is_called_where_nothing_is_drafted(vllm: Sources) -> None:
    """By the runner's attribute, which we replace."""
    function = vllm.function(f"{RUNNER}.sample")
    assert function is not None
    assert calls(function, "sampler")
