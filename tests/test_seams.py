"""What the integration needs of vLLM, looked up in the sources of every supported version.

The installed version is read where it is; the other's wheel is fetched once and its source
files are kept in `.cache/`. Nothing of it is imported, so that a version that does not run
here is checked as well.
"""

from __future__ import annotations

import ast

import pytest

from tests.vllm_sources import SUPPORTED, NoRegistryError, Sources, calls, parameters
from vllm_dspark.compat import installed_vllm, supported_range
from vllm_dspark.integration.engine_config import _WORKERS
from vllm_dspark.integration.ledger import LEDGER
from vllm_dspark.integration.patching import Patch

GPU = "vllm.v1.worker.gpu"
DSPARK = f"{GPU}.spec_decode.dspark.speculator:DSparkSpeculator"
MODELS = "vllm.model_executor.models"


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


def test_runner_takes_init_speculator_from_its_own_module(vllm: Sources) -> None:
    """The patch replaces the name in the runner's module: it must be imported at its top."""
    tree = vllm.module(f"{GPU}.model_runner")
    assert tree is not None
    names = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert "init_speculator" in names


# Overridden, called or re-used without a patch: parameters as our code counts on them.
@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (f"{DSPARK}.__init__", "self vllm_config device"),
        (f"{DSPARK}.load_draft_model", "self target_model target_attn_layer_names"),
        (f"{DSPARK}._sample_sequential", "self num_reqs head_hidden"),
        (f"{DSPARK}._sample_logits", "self logits idx_map sample_pos step"),
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
            "use_confidence_head draft_model_config model",
        ),
        (f"{MODELS}.qwen3_dspark:Qwen3DSparkForCausalLM", "model config draft_model_config"),
        (f"{MODELS}.gemma4_dspark:Gemma4DSparkForCausalLM", "model config draft_model_config"),
        (f"{MODELS}.qwen3_dspark:Qwen3DSparkModel", "markov_head confidence_head"),
        (f"{MODELS}.gemma4_dspark:Gemma4DSparkModel", "markov_head confidence_head"),
        (
            "vllm.engine.arg_utils:EngineArgs",
            "speculative_config spec_method spec_model spec_tokens additional_config",
        ),
        (
            "vllm.config.speculative:SpeculativeConfig",
            "method draft_model_config enable_adaptive_verification num_speculative_tokens "
            "draft_sample_method rejection_sample_method",
        ),
        ("vllm.config.parallel:ParallelConfig", "worker_cls"),
        (
            "vllm.config.vllm:VllmConfig",
            "speculative_config parallel_config additional_config",
        ),
    ],
)
def test_attributes_we_lean_on(vllm: Sources, target: str, names: str) -> None:
    assert set(names.split()) - vllm.assigned(target) == set()


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
