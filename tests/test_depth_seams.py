"""What choosing and drafting depths leans on in vLLM, in the sources of every supported version."""

from __future__ import annotations

import ast

import pytest

from tests.test_seams import GPU, RUNNER
from tests.test_seams import vllm as vllm
from tests.vllm_sources import Sources, calls, parameters

SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
ASYNC = "vllm.v1.core.sched.async_scheduler:AsyncScheduler"
DSPARK = f"{GPU}.spec_decode.dspark.speculator:DSparkSpeculator"


@pytest.mark.parametrize(
    ("target", "names"),
    [
        (f"{SCHEDULER}.schedule", "self throttle_prefills"),
        (f"{SCHEDULER}.update_from_output", "self scheduler_output model_runner_output"),
        (f"{SCHEDULER}.get_request_counts", "self"),
        (f"{DSPARK}.init_cudagraph_manager", "self cudagraph_mode"),
        (f"{DSPARK}.capture", "self"),
        ("vllm.v1.worker.gpu_worker:Worker.execute_model", "self scheduler_output"),
        ("vllm.v1.worker.gpu_worker:Worker.sample_tokens", "self grammar_output"),
        ("vllm.v1.worker.gpu_worker:Worker.start_draft_weight_update", "self"),
        (f"{SCHEDULER}.update_draft_token_ids", "self draft_token_ids"),
    ],
)
def test_methods_that_we_override_or_call(vllm: Sources, target: str, names: str) -> None:
    function = vllm.function(target)
    assert function is not None
    assert parameters(function) == tuple(names.split())


@pytest.mark.parametrize(
    ("target", "names"),
    [
        (
            SCHEDULER,
            "dynamic_sd_lookup num_lookahead_tokens num_spec_tokens running requests "
            "kv_cache_manager max_num_scheduled_tokens max_model_len vllm_config "
            "max_num_active_reqs deferred_waiting",
        ),
        ("vllm.v1.core.kv_cache_manager:KVCacheManager", "block_pool coordinator"),
        ("vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator", "single_type_managers"),
        (
            "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager",
            "req_to_blocks block_size",
        ),
        (
            "vllm.v1.request:Request",
            "spec_token_ids num_computed_tokens num_output_placeholders request_id",
        ),
        (
            DSPARK,
            "num_speculative_steps num_query_per_req _anchor_idx draft_token_confidence_probs "
            "query_cudagraph_manager max_num_reqs",
        ),
        (f"{GPU}.cudagraph_utils:CudaGraphManager", "graphs cudagraph_mode varlen_decode"),
        (RUNNER, "execute_model_state cudagraph_manager num_speculative_steps device"),
        (
            f"{GPU}.model_runner:ExecuteModelState",
            "input_batch num_spec_tokens_to_schedule",
        ),
        (f"{GPU}.input_batch:InputBatch", "num_reqs num_computed_tokens_np"),
        (f"{GPU}.async_utils:AsyncOutput", "model_runner_output"),
        (
            "vllm.v1.core.sched.output:SchedulerOutput",
            "scheduled_spec_decode_tokens total_num_scheduled_tokens scheduled_new_reqs",
        ),
        ("vllm.v1.outputs:ModelRunnerOutput", "sampled_token_ids req_id_to_index"),
        ("vllm.config.scheduler:SchedulerConfig", "scheduler_cls async_scheduling"),
        (
            "vllm.config.speculative:SpeculativeConfig",
            "num_speculative_tokens num_speculative_tokens_per_batch_size",
        ),
        ("vllm.config.vllm:VllmConfig", "scheduler_config kv_transfer_config"),
        ("vllm.config.parallel:ParallelConfig", "data_parallel_size pipeline_parallel_size"),
    ],
)
def test_attributes_we_lean_on(vllm: Sources, target: str, names: str) -> None:
    assert set(names.split()) - vllm.assigned(target) == set()


def test_load_is_what_vllm_counts(vllm: Sources) -> None:
    """Who may run, and who waits for that alone; as it reports them itself."""
    schedule, stats = (vllm.function(f"{SCHEDULER}.{name}") for name in ("schedule", "make_stats"))
    assert schedule is not None
    assert stats is not None
    assert "self.max_num_active_reqs" in ast.unparse(schedule)
    assert "num_waiting_reqs=num_waiting - num_deferred" in ast.unparse(stats)
    assert "num_deferred = len(self.deferred_waiting)" in ast.unparse(stats)
    assert vllm.function(f"{SCHEDULER}.pause_state") is not None


@pytest.mark.parametrize("target", [f"{SCHEDULER}.schedule", f"{SCHEDULER}._update_after_schedule"])
def test_schedulers_have_what_is_extended(vllm: Sources, target: str) -> None:
    assert vllm.function(target) is not None


def test_depth_is_read_from_the_lookup(vllm: Sources) -> None:
    """Once for every step with requests, from the object that takes the place of vLLM's table, and
    from nothing else; the next step has as many placeholders."""
    schedule = vllm.function(f"{SCHEDULER}.schedule")
    assert schedule is not None
    reads = [
        node
        for node in ast.walk(schedule)
        if isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr == "dynamic_sd_lookup"
    ]
    assert len(reads) == 1
    after = vllm.function(f"{ASYNC}._update_after_schedule")
    assert after is not None
    assert "scheduler_output.num_spec_tokens_to_schedule" in ast.unparse(after)


def test_lookahead_is_read_while_scheduling(vllm: Sources) -> None:
    """From the attribute that follows the depth, wherever slots are taken."""
    schedule = vllm.function(f"{SCHEDULER}.schedule")
    assert schedule is not None
    text = ast.unparse(schedule)
    assert text.count("num_lookahead_tokens=self.num_lookahead_tokens") == 1  # running requests
    assert "0 if limit_lookahead_tokens else self.num_lookahead_tokens" in text  # new ones


def test_eager_profile_runs_no_graph(vllm: Sources) -> None:
    """At depth 0 vLLM 0.32 is told so; 0.33 returns before it matters."""
    propose = vllm.function(f"{DSPARK}.propose")
    assert propose is not None
    text = ast.unparse(propose)
    assert "need_eager=is_profile" in text
    assert ("if num_speculative_tokens == 0:" in text) == (str(vllm.version) != "0.32.0")


def test_drafts_beyond_the_depth_are_masked_by_the_runner(vllm: Sources) -> None:
    """The proposer returns γ columns, whatever it drew."""
    sample = vllm.function(f"{RUNNER}.sample_tokens")
    assert sample is not None
    assert "draft_tokens[:, num_spec_tokens:] = -1" in ast.unparse(sample)
    assert len(calls(sample, "propose")) == 1


@pytest.mark.parametrize(
    ("target", "names"),
    [
        (f"{DSPARK}._precompute_context_kv", "self start end dummy_run"),
        (
            f"{DSPARK}._store_hidden_states",
            "self num_tokens last_hidden_states aux_hidden_states num_graph_tokens",
        ),
        (
            f"{DSPARK}._prepare_graph_replay",
            "self input_batch num_graph_reqs last_hidden_states aux_hidden_states num_rejected "
            "dummy_run",
        ),
        (f"{DSPARK}._num_graph_context_tokens", "self num_reqs"),
        (f"{GPU}.cudagraph_utils:CudaGraphManager._init_candidates", "self"),
        (
            f"{GPU}.cudagraph_utils:CudaGraphManager.capture",
            "self create_forward_fn progress_bar_desc",
        ),
        (f"{GPU}.cudagraph_utils:CudaGraphManager.run_fullgraph", "self desc"),
    ],
)
def test_context_graphs_take_the_place_of_these(vllm: Sources, target: str, names: str) -> None:
    """Where vLLM stages hidden states for its draft graphs. 0.32 does not, and has none of ours."""
    stages = "_aux_staging" in vllm.assigned(DSPARK)
    assert stages == (vllm.version.minor >= 33)
    if stages:
        function = vllm.function(target)
        assert function is not None
        assert parameters(function) == tuple(names.split())


def test_slots_of_the_target_are_the_drafters_where_nothing_was_rejected(vllm: Sources) -> None:
    """What vLLM lays out for the context at depth 0, and we take from the target's step: the same
    attributes, which the target's step has filled before, for every group of caches."""
    if vllm.version.minor < 33:
        return  # no graphs to store them by
    propose, prepare = vllm.function(f"{DSPARK}.propose"), vllm.function(f"{RUNNER}.prepare_attn")
    assert propose is not None
    assert prepare is not None
    text = ast.unparse(propose)
    assert "enumerate(self.draft_kv_cache_group_ids)" in text
    assert "self.block_tables.slot_mappings[gid]" in text
    assert "self.context_positions" in text
    assert "self._context_slot_mappings[i]" in text
    assert "if self.pcp_manager is not None" in text
    assert len(calls(prepare, "compute_slot_mappings")) == 1
    slots = vllm.function(f"{GPU}.block_table:BlockTables.compute_slot_mappings")
    assert slots is not None
    assert "self.slot_mappings if out is None else out" in ast.unparse(slots)


def test_descriptor_of_a_graph_begins_with_mode_tokens_and_requests(vllm: Sources) -> None:
    found = vllm.find(f"{GPU}.cudagraph_utils:BatchExecutionDescriptor")
    assert isinstance(found, ast.ClassDef)
    fields = [ast.unparse(node.target) for node in found.body if isinstance(node, ast.AnnAssign)]
    assert fields[:3] == ["cg_mode", "num_tokens", "num_reqs"]
