"""What the integration needs of vLLM, looked up in the sources of every supported version.

The installed version is read where it is; the other's wheel is fetched once and its source
files are kept in `.cache/`. Nothing of it is imported, so that a version that does not run
here is checked as well.
"""

from __future__ import annotations

import ast

import pytest
from packaging.version import Version

from tests.vllm_sources import SUPPORTED, NoRegistryError, Sources, calls, parameters
from vllm_dspark.compat import installed_vllm, supported_range
from vllm_dspark.integration.engine_config import _WORKERS
from vllm_dspark.integration.ledger import LEDGER
from vllm_dspark.integration.patching import Patch

GPU = "vllm.v1.worker.gpu"
DSPARK = f"{GPU}.spec_decode.dspark.speculator:DSparkSpeculator"
RUNNER = f"{GPU}.model_runner:GPUModelRunner"
MODELS = "vllm.model_executor.models"
REJECTION = f"{GPU}.spec_decode.rejection_sampler"
SAMPLE = f"{GPU}.sample"
DUMMY_RUN = (
    "self num_tokens args skip_attn uniform_decode context_len skip_eplb is_profile "
    "valid_dummy_state_slots randomize_inputs kwargs"
)


@pytest.fixture(scope="module", params=SUPPORTED)
def vllm(request: pytest.FixtureRequest) -> Sources:
    """Sources of one supported version."""
    try:
        return Sources(request.param)
    except NoRegistryError as error:
        pytest.skip(str(error))


def test_all_supported_versions_are_looked_at() -> None:
    """A widened range needs its versions listed here."""
    assert all(supported_range().contains(version) for version in SUPPORTED)
    installed = installed_vllm()
    assert installed is not None
    assert installed.base_version in SUPPORTED
    minors = [minor for minor in range(100) if supported_range().contains(f"0.{minor}.0")]
    assert [f"0.{minor}.0" for minor in minors] == list(SUPPORTED)


@pytest.mark.parametrize("patch", LEDGER, ids=lambda patch: patch.target)
def test_patched_function_has_the_parameters_we_expect(vllm: Sources, patch: Patch) -> None:
    function = vllm.function(patch.target)
    assert function is not None, f"{patch.target} is gone"
    assert parameters(function) == patch.parameters_on(vllm.version)
    decorators = {ast.unparse(decorator) for decorator in function.decorator_list}
    assert ("staticmethod" in decorators) is patch.static
    assert decorators <= {"staticmethod"}


# A patch is worth nothing where nobody calls what it replaces.
@pytest.mark.parametrize(
    ("caller", "callee"),
    [
        ("vllm.engine.arg_utils:AsyncEngineArgs.add_cli_args", "add_cli_args"),
        ("vllm.engine.arg_utils:EngineArgs.create_engine_config", "create_speculative_config"),
        ("vllm.config.vllm:VllmConfig.__post_init__", "_validate_adaptive_verification"),
        ("vllm.sampling_params:SamplingParams.verify", "_validate_spec_decode"),
        (f"{GPU}.model_runner:GPUModelRunner.__init__", "init_speculator"),
        ("vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p", "apply_top_k_top_p_triton"),
        (f"{DSPARK}._generate_draft", "_sample_sequential"),
        (f"{RUNNER}.initialize_kv_cache", "maybe_create_adaptive_verification_manager"),
        # what the manager and the proposer are told, and by whom
        (f"{RUNNER}.add_requests", "add_request"),
        (f"{RUNNER}.gather_batch_req_state", "get_num_tokens"),
        (f"{RUNNER}.gather_batch_req_state", "sort_batch_req_ids"),
        (f"{RUNNER}.prepare_inputs", "compact_batch"),
        (f"{RUNNER}.prepare_inputs", "reallocate_drafts"),
        (f"{RUNNER}.sample_tokens", "observe_verification"),
        (f"{RUNNER}.sample_tokens", "record_confidences"),
        (f"{RUNNER}.capture_model", "batches_to_profile"),
        (f"{RUNNER}.capture_model", "set_initial_cost_curves"),
        (f"{RUNNER}.execute_model", "make_lora_inputs"),
        # where our rejection sampler takes its place, and who calls it
        ("vllm.v1.worker.gpu_worker:Worker.load_model", "load_model"),
        (f"{RUNNER}.load_model", "RejectionSampler"),
        (f"{RUNNER}.sample", "rejection_sampler"),
        ("vllm.v1.worker.gpu_worker:Worker.initialize_from_config", "initialize_kv_cache"),
        ("vllm.v1.worker.gpu_worker:Worker.execute_model", "execute_model"),
    ],
)
def test_vllm_still_calls_the_seam(vllm: Sources, caller: str, callee: str) -> None:
    function = vllm.function(caller)
    assert function is not None, f"{caller} is gone"
    assert calls(function, callee)


def test_config_seam_comes_after_the_platform_chose_its_worker(vllm: Sources) -> None:
    """We replace `worker_cls`, which the platform must not overwrite afterwards."""
    function = vllm.function("vllm.config.vllm:VllmConfig.__post_init__")
    assert function is not None
    (seam,) = calls(function, "_validate_adaptive_verification")
    platform = calls(function, "check_and_update_config")
    assert platform
    assert max(platform) < seam


@pytest.mark.parametrize("name", ["init_speculator", "maybe_create_adaptive_verification_manager"])
def test_runner_takes_it_from_its_own_module(vllm: Sources, name: str) -> None:
    """The patch replaces the name in the runner's module: it must be imported at its top."""
    tree = vllm.module(f"{GPU}.model_runner")
    assert tree is not None
    names = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert name in names


# Overridden, called or re-used without a patch: parameters as our code counts on them.
@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (f"{DSPARK}.__init__", "self vllm_config device"),
        (f"{DSPARK}.load_draft_model", "self target_model target_attn_layer_names"),
        (f"{DSPARK}._sample_sequential", "self num_reqs head_hidden"),
        (f"{DSPARK}._sample_logits", "self logits idx_map sample_pos step"),
        (f"{DSPARK}.observe_verification", "self idx_mapping num_sampled num_rejected"),
        (
            f"{GPU}.model_runner:sort_batch_req_ids",
            "num_tokens_per_req draft_tokens decode_query_len",
        ),
        (f"{GPU}.spec_decode.rejection_sampler:get_max_chunk_logits", "vocab_size"),
        (f"{REJECTION}:RejectionSampler.__init__", "self sampler spec_config device watermark_key"),
        (
            f"{REJECTION}:RejectionSampler.__call__",
            "self logits input_batch draft_logits invalid_drafts",
        ),
        (
            f"{REJECTION}:RejectionSampler._get_logprobs_tensors",
            "self sampled num_sampled logits cu_num_logits cu_num_logits_np max_num_logprobs",
        ),
        (
            f"{REJECTION}:gather_draft_sampled",
            "input_ids positions logits_indices expanded_idx_mapping expanded_local_pos "
            "prefill_len",
        ),
        (
            f"{GPU}.input_batch:get_num_sampled_and_rejected",
            "num_sampled seq_lens cu_num_logits idx_mapping prefill_len",
        ),
        (
            f"{SAMPLE}.sampler:Sampler.apply_sampling_params",
            "self logits expanded_idx_mapping idx_mapping idx_mapping_np pos input_ids "
            "expanded_local_pos seq_lens_upper_bound_np skip_top_k_top_p",
        ),
        (f"{SAMPLE}.states:SamplingStates.max_num_logprobs", "self idx_mapping_np"),
        ("vllm.v1.worker.gpu_worker:Worker.load_model", "self load_dummy_weights"),
        (
            f"{GPU}.attn_utils:get_query_lens_mismatch_unsupported_backend",
            "attn_groups checked_layer_names",
        ),
        (
            f"{GPU}.attn_utils:get_varlen_cudagraph_unsupported_backend",
            "attn_groups vllm_config max_query_len checked_layer_names",
        ),
        ("vllm.utils.torch_utils:async_tensor_h2d", "data device dtype out"),
        ("vllm.v1.worker.gpu_worker:Worker.initialize_from_config", "self kv_cache_config"),
        ("vllm.v1.worker.gpu_worker:Worker.execute_model", "self scheduler_output"),
        (
            "vllm.distributed.parallel_state:GroupCoordinator.broadcast_object",
            "self obj src",
        ),
        (
            "vllm.v1.attention.backend:AttentionBackend.supports_device_cpu_query_lens_mismatch",
            "cls",
        ),
        (f"{RUNNER}._dummy_run", DUMMY_RUN),
        (f"{GPU}.spec_decode:init_speculator", "vllm_config device req_states"),
        (f"{MODELS}.qwen3_dspark:Qwen3DSparkForCausalLM.__init__", "self vllm_config prefix"),
        (f"{MODELS}.qwen3_dspark:Qwen3DSparkForCausalLM.load_weights", "self weights"),
        (f"{MODELS}.qwen3_dspark:Qwen3DSparkForCausalLM.markov_embed", "self token_ids"),
        (
            f"{MODELS}.qwen3_dspark:Qwen3DSparkForCausalLM.compute_draft_logits",
            "self hidden_states",
        ),
        (f"{MODELS}.qwen3_dspark:Qwen3DSparkForCausalLM.map_draft_to_target", "self draft_ids"),
        (
            f"{MODELS}.qwen3_dspark:Qwen3DSparkForCausalLM.compute_confidence",
            "self head_hidden markov_embed",
        ),
        (f"{MODELS}.gemma4_dspark:Gemma4DSparkForCausalLM.__init__", "self vllm_config prefix"),
        (f"{MODELS}.gemma4_dspark:Gemma4DSparkForCausalLM.load_weights", "self weights"),
        (
            f"{MODELS}.gemma4_dspark:Gemma4DSparkForCausalLM.compute_draft_logits",
            "self hidden_states",
        ),
        (f"{MODELS}.registry:_ModelRegistry.register_model", "self model_arch model_cls"),
        (f"{MODELS}.registry:_ModelRegistry.get_supported_archs", "self"),
        ("vllm.config.model:ModelConfig.get_hidden_size", "self"),
        ("vllm.config.model:ModelConfig.get_vocab_size", "self"),
        ("vllm.config.model:ModelConfig.get_total_num_hidden_layers", "self"),
        ("vllm.v1.worker.gpu_worker:Worker.init_device", "self"),
        ("vllm.v1.worker.cpu_worker:CPUWorker.init_device", "self"),
        (
            "vllm.transformers_utils.repo_utils:get_hf_file_to_dict",
            "file_name model revision",
        ),
        ("vllm.logger:init_logger", "name"),
        (
            "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p_pytorch",
            "logits k p allow_cpu_sync",
        ),
    ],
)
def test_function_we_lean_on(vllm: Sources, target: str, expected: str) -> None:
    function = vllm.function(target)
    assert function is not None, f"{target} is gone"
    assert " ".join(parameters(function)) == expected


@pytest.mark.parametrize(
    ("target", "names"),
    [
        (
            DSPARK,  # what the proposer reads and writes
            "sample_indices sample_idx_mapping sample_pos _anchor_idx draft_tokens "
            "draft_token_confidence_probs draft_logits input_buffers num_speculative_steps "
            "use_confidence_head use_acceptance_estimator draft_model_config model vllm_config "
            "speculative_config temperature seeds draft_watermarker use_fp64_gumbel",
        ),
        (
            RUNNER,  # what a worker of ours reads and writes
            "adaptive_verification speculator req_states input_buffers model_state vocab_size "
            "vllm_config",
        ),
        (
            f"{GPU}.states:RequestState",
            "req_id_to_index index_to_req_id num_computed_tokens_np prefill_len max_num_reqs "
            "num_speculative_steps max_num_batched_tokens max_model_len",
        ),
        (RUNNER, "rejection_sampler sampler speculative_config device max_num_reqs batch_sharder"),
        (
            f"{REJECTION}:RejectionSampler",
            "sampler num_speculative_steps use_block_verification watermark_key",
        ),
        (
            f"{SAMPLE}.sampler:Sampler",
            "needs_logits_processing sampling_states logits_processors thinking_budget_state "
            "logprobs_mode return_sampling_mask use_fp64_gumbel compute_nans req_states",
        ),
        (
            f"{SAMPLE}.states:SamplingStates",
            "temperature top_k top_p min_p seeds vocab_size num_logprobs",
        ),
        (f"{SAMPLE}.logit_bias:LogitBiasState", "use_logit_bias"),
        (f"{SAMPLE}.penalties:PenaltiesState", "use_penalty"),
        (f"{SAMPLE}.bad_words:BadWordsState", "num_bad_words"),
        (f"{SAMPLE}.thinking_budget:ThinkingBudgetState", "enabled use_thinking_budget"),
        (
            f"{GPU}.input_batch:InputBatch",
            "cu_num_logits cu_num_logits_np num_draft_tokens_per_req expanded_local_pos num_tokens "
            "expanded_idx_mapping logits_indices positions input_ids seq_lens "
            "seq_lens_cpu_upper_bound num_draft_tokens",
        ),
        (f"{GPU}.input_batch:InputBatch", "idx_mapping idx_mapping_np"),
        (f"{GPU}.input_batch:InputBuffers", "query_start_loc"),
        (
            f"{GPU}.async_utils:StepTimingSample",
            "forward_ms drafter_ms num_target_tokens num_reqs full_cudagraph",
        ),
        (
            "vllm.v1.core.sched.output:SchedulerOutput",
            "scheduled_new_reqs num_spec_tokens_to_schedule",
        ),
        (
            f"{GPU}.cudagraph_utils:CudaGraphManager",  # what prefill graphs read and write
            "_candidates _capture_descs vllm_config cudagraph_mode varlen_decode max_num_reqs",
        ),
        (
            f"{GPU}.cudagraph_utils:BatchExecutionDescriptor",
            "cg_mode num_tokens num_reqs max_query_len",
        ),
        ("vllm.v1.core.sched.output:NewRequestData", "req_id sampling_params"),
        ("vllm.sampling_params:SamplingParams", "temperature structured_outputs extra_args"),
        (f"{MODELS}.qwen3_dspark:Qwen3DSparkForCausalLM", "model config draft_model_config"),
        (f"{MODELS}.gemma4_dspark:Gemma4DSparkForCausalLM", "model config draft_model_config"),
        ("vllm.model_executor.layers.logits_processor:LogitsProcessor", "head_dtype"),
        (f"{MODELS}.qwen3_dspark:Qwen3DSparkModel", "markov_head confidence_head"),
        (f"{MODELS}.gemma4_dspark:Gemma4DSparkModel", "markov_head confidence_head"),
        (
            "vllm.engine.arg_utils:EngineArgs",
            "speculative_config spec_method spec_model spec_tokens additional_config "
            "watermark_config",
        ),
        (
            "vllm.config.speculative:SpeculativeConfig",
            "method draft_model_config enable_adaptive_verification num_speculative_tokens "
            "draft_sample_method rejection_sample_method",
        ),
        (
            "vllm.config.parallel:ParallelConfig",
            "worker_cls pipeline_parallel_size prefill_context_parallel_size "
            "tensor_parallel_size enable_batch_sharded_sampling",
        ),
        ("vllm.config.model:ModelConfig", "return_sampling_mask"),
        ("vllm.config.attention:AttentionConfig", "backend"),
        ("vllm.config.compilation:CompilationConfig", "cudagraph_mode mode static_forward_context"),
        (
            "vllm.config.vllm:VllmConfig",
            "speculative_config parallel_config additional_config model_config lora_config "
            "compilation_config attention_config aux_output_config",
        ),
    ],
)
def test_attributes_we_lean_on(vllm: Sources, target: str, names: str) -> None:
    assert set(names.split()) - vllm.assigned(target) == set()


QUANTIZATION = "vllm.model_executor.layers.quantization.online"


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (f"{QUANTIZATION}.lm_head:quantized_lm_head_copy", "lm_head quantization"),
        (
            f"{QUANTIZATION}.fp8:Fp8PtpcOnlineLinearMethod.process_weights_after_loading",
            "self layer",
        ),
        (
            f"{QUANTIZATION}.fp8:Fp8PtpcOnlineLinearMethod.create_weights",
            "self layer input_size_per_partition output_partition_sizes input_size output_size "
            "params_dtype extra_weight_attrs",
        ),
        ("vllm.model_executor.model_loader.reload.layerwise:get_layerwise_info", "layer"),
    ],
)
def test_quantization_we_lean_on(vllm: Sources, target: str, expected: str) -> None:
    """Where drafters run in FP8, from 0.33 on."""
    if vllm.version < Version("0.33"):
        return
    function = vllm.function(target)
    assert function is not None, f"{target} is gone"
    assert " ".join(parameters(function)) == expected


@pytest.mark.parametrize("worker", _WORKERS)
def test_worker_that_we_extend_exists(vllm: Sources, worker: str) -> None:
    module, _, name = worker.rpartition(".")
    assert isinstance(vllm.find(f"{module}:{name}"), ast.ClassDef)


@pytest.mark.parametrize("architecture", ["Qwen3DSparkModel", "Gemma4DSparkModel"])
def test_architecture_is_registered(vllm: Sources, architecture: str) -> None:
    tree = vllm.module(f"{MODELS}.registry")
    assert tree is not None
    constants = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert architecture in constants
