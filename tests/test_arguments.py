"""From a request for DSpark to a finished `VllmConfig`, and every refusal on the way.

These build configs through vLLM's own `EngineArgs`; no engine starts and no weights load.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tests.child import ask, clean_environment
from tests.conftest import HAS_GPU
from tests.pairs import write_drafter, write_target
from vllm_dspark.checkpoint import DrafterMismatchError
from vllm_dspark.config import DSparkConfigError
from vllm_dspark.drafters import UnknownDrafterError
from vllm_dspark.integration import rejection_method
from vllm_dspark.integration.engine_config import _WORKERS
from vllm_dspark.plugin import register

Configure = Callable[..., Any]

OFF = {"dspark": {"enabled": False}}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with one drafter beside it, in its folder."""
    folder = write_target(tmp_path_factory.mktemp("pair") / "target")
    write_drafter(folder / "dspark", folder)
    return folder


@pytest.fixture
def lonely(tmp_path: Path, target: Path) -> Path:
    """The same target with no drafter beside it."""
    folder = tmp_path / "lonely"
    folder.mkdir()
    for file in target.iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)
    return folder


@pytest.fixture(scope="module")
def configure(target: Path) -> Configure:
    """Builds a finished config from engine arguments."""
    register()
    from vllm.engine.arg_utils import EngineArgs

    def build(**arguments: Any) -> Any:
        base = {"model": str(target), "skip_tokenizer_init": True, "dtype": "float32"}
        limits = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "enforce_eager": True}
        return EngineArgs(**(base | limits | arguments)).create_engine_config()

    return build


def refusal(configure: Configure, kind: type[Exception], **arguments: Any) -> str:
    """The message that a request is refused with; our error itself, wrapped by nobody."""
    with pytest.raises(kind) as caught:
        configure(**arguments)
    assert type(caught.value) is kind
    return str(caught.value)


def requests(drafter: Path) -> dict[str, dict[str, Any]]:
    """All ways of asking for DSpark with the drafter in the target's folder."""
    return {
        "bare word": {"speculative_config": "dspark"},
        "bare word, named": {"speculative_config": f"dspark:{drafter}"},
        "method": {"speculative_config": {"method": "dspark"}},
        "method and model": {"speculative_config": {"method": "dspark", "model": str(drafter)}},
        "model": {"speculative_config": {"model": str(drafter)}},
        "flags": {"spec_method": "dspark", "spec_model": str(drafter)},
        "method flag": {"spec_method": "dspark"},
        "model flag": {"spec_model": str(drafter)},
    }


@pytest.mark.parametrize("way", requests(Path()))
def test_every_way_of_asking_gives_the_same_config(
    configure: Configure, target: Path, way: str
) -> None:
    config = configure(**requests(target / "dspark")[way])
    speculative = config.speculative_config
    assert speculative.method == "dspark"
    assert speculative.model == str(target / "dspark")
    assert speculative.num_speculative_tokens == 7
    assert config.parallel_config.worker_cls in _WORKERS.values()


@pytest.mark.parametrize(
    "asked",
    [
        {"speculative_config": {"method": "dspark", "num_speculative_tokens": 3}},
        {"speculative_config": {"method": "dspark", "num-speculative-tokens": 3}},
        {"speculative_config": "dspark", "spec_tokens": 3},
        {"spec_method": "dspark", "spec_tokens": 3},
    ],
    ids=str,
)
def test_fewer_tokens_than_trained_are_taken(configure: Configure, asked: dict[str, Any]) -> None:
    assert configure(**asked).speculative_config.num_speculative_tokens == 3


@pytest.mark.parametrize("asked", [None, "standard"])
def test_drawn_drafts_are_verified_by_blocks(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, asked: str | None
) -> None:
    """On vLLM 0.33, whose kernels for it are exact; see `test_rejection_method`."""
    monkeypatch.setattr(rejection_method, "require_supported_vllm", lambda: Version("0.33.0"))
    given = {"method": "dspark", "draft_sample_method": "probabilistic"}
    given |= {} if asked is None else {"rejection_sample_method": asked}
    found = configure(speculative_config=given).speculative_config.rejection_sample_method
    assert found == (asked or "block")


@pytest.mark.parametrize(
    ("layout", "anchor", "depth"),
    [("deepspec", None, 5), ("speculators", None, 4), ("speculators", True, 5)],
)
def test_gamma_defaults_to_what_the_drafter_was_trained_for(
    configure: Configure, target: Path, tmp_path: Path, layout: str, anchor: Any, depth: int
) -> None:
    """vLLM's default is block_size, one too many where the anchor does not predict."""
    drafter = write_drafter(
        tmp_path / "d", target, layout=layout, block_size=5, sample_from_anchor=anchor
    )
    config = configure(speculative_config=f"dspark:{drafter}")
    assert config.speculative_config.num_speculative_tokens == depth


def test_drafter_as_the_model(configure: Configure, target: Path, tmp_path: Path) -> None:
    """speculators' checkpoints name their target: vLLM serves it when given the drafter."""
    drafter = write_drafter(tmp_path / "d", target, layout="speculators")
    config = configure(model=str(drafter))
    assert config.model_config.model == str(target)
    assert config.speculative_config.num_speculative_tokens == 6
    assert config.parallel_config.worker_cls in _WORKERS.values()


@pytest.mark.parametrize("head_type", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize("family", ["qwen3", "gemma4"])
def test_all_published_heads_and_families(
    configure: Configure, tmp_path: Path, family: str, head_type: str
) -> None:
    folder = write_target(tmp_path / "target", family=family)
    write_drafter(folder / "dspark", folder, head_type=head_type)
    config = configure(model=str(folder), speculative_config="dspark")
    assert config.speculative_config.num_speculative_tokens == 7
    assert config.parallel_config.worker_cls in _WORKERS.values()


def test_callers_dict_is_left_alone(configure: Configure) -> None:
    asked = {"method": "dspark"}
    configure(speculative_config=asked)
    assert asked == {"method": "dspark"}


def test_turned_off_the_worker_stays_vllms(configure: Configure) -> None:
    """The drafter is still found for the bare word; nothing of ours runs."""
    config = configure(speculative_config="dspark", additional_config=OFF)
    assert config.speculative_config.method == "dspark"
    assert config.parallel_config.worker_cls in _WORKERS


def test_adaptive_verification_said_to_be_off_is_off(configure: Configure) -> None:
    """`false` is an answer; left out it is the plugin's choice, which on this machine is host mode.
    What the operator wrote in additional_config besides stays."""
    said = {"method": "dspark", "enable_adaptive_verification": False}
    config = configure(speculative_config=said, additional_config={"other": 1, "dspark": {}})
    assert config.additional_config["dspark"]["verification"] == "all"
    assert config.additional_config["other"] == 1
    left_out = configure(speculative_config={"method": "dspark"})
    assert left_out.additional_config["dspark"]["verification"] == "adaptive"


@pytest.mark.parametrize(
    "asked",
    [None, {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}],
    ids=str,
)
def test_other_requests_get_vllms_worker(configure: Configure, asked: Any) -> None:
    """Even with options of ours in additional_config, as a shared deployment may have them."""
    config = configure(speculative_config=asked, additional_config={"dspark": {"enable": 1}})
    assert config.parallel_config.worker_cls in _WORKERS


def test_foreign_worker_class_is_refused(configure: Configure) -> None:
    """Taking its place would drop what it does."""
    with pytest.raises(ValueError, match=r"worker class 'some\.Worker'.*Fix: drop --worker-cls"):
        configure(speculative_config="dspark", worker_cls="some.Worker")


def test_no_drafter_known(configure: Configure, lonely: Path) -> None:
    message = refusal(
        configure, UnknownDrafterError, model=str(lonely), speculative_config="dspark"
    )
    assert str(lonely) in message
    assert "Qwen/Qwen3-4B -> dspark:" in message


def test_unknown_option_names_the_nearest(configure: Configure) -> None:
    message = refusal(
        configure,
        DSparkConfigError,
        speculative_config="dspark",
        additional_config={"dspark": {"confidense": "always"}},
    )
    assert "nearest is 'confidence'" in message


def test_contradicting_options(configure: Configure) -> None:
    message = refusal(
        configure,
        DSparkConfigError,
        speculative_config={"method": "dspark", "enable_adaptive_verification": True},
        additional_config={"dspark": {"confidence": "never"}},
    )
    assert "enable_adaptive_verification" in message


@pytest.mark.parametrize("way", requests(Path()))
def test_more_tokens_than_trained(configure: Configure, target: Path, way: str) -> None:
    """Checked for every way of asking, also where vLLM alone would find out the method."""
    asked = requests(target / "dspark")[way] | {"spec_tokens": 8}
    message = refusal(configure, DrafterMismatchError, **asked)
    assert "num_speculative_tokens is 8, but block_size 7" in message


@pytest.mark.parametrize("tokens", [0, -1])
def test_less_than_one_token_is_vllms_to_refuse(configure: Configure, tokens: int) -> None:
    with pytest.raises(ValueError, match="num_speculative_tokens"):
        configure(speculative_config={"method": "dspark", "num_speculative_tokens": tokens})


@pytest.mark.parametrize("tokens", [True, "3", 2.5])
def test_tokens_that_are_no_whole_number(configure: Configure, tokens: Any) -> None:
    asked = {"method": "dspark", "num_speculative_tokens": tokens}
    message = refusal(configure, DSparkConfigError, speculative_config=asked)
    assert f"num_speculative_tokens is {tokens!r}" in message
    assert "1 to 7" in message


@pytest.mark.parametrize("word", ["ngram", "dsparks", ""])
def test_other_words_are_refused(configure: Configure, word: str) -> None:
    message = refusal(configure, DSparkConfigError, speculative_config=word)
    assert f"speculative_config is {word!r}" in message


def test_method_given_twice_is_vllms_to_refuse(configure: Configure) -> None:
    with pytest.raises(ValueError, match="mutually exclusive"):
        configure(speculative_config={"method": "dspark"}, spec_method="dspark")


def test_drafter_of_another_target(configure: Configure, lonely: Path, tmp_path: Path) -> None:
    """All that does not fit is listed at once."""
    other = write_target(tmp_path / "other", vocab_size=60, hidden_size=48, num_layers=5)
    drafter = write_drafter(tmp_path / "d", other, target_layer_ids=(0, 4))
    message = refusal(
        configure,
        DrafterMismatchError,
        model=str(lonely),
        speculative_config=f"dspark:{drafter}",
    )
    assert "width 48, the target's are 32" in message
    assert "60 words, the target's 64" in message
    assert "[4] are not among the target's layers 0 to 2" in message


def test_truncated_weights(configure: Configure, target: Path, tmp_path: Path) -> None:
    drafter = write_drafter(tmp_path / "d", target)
    file = drafter / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    asked = {"speculative_config": f"dspark:{drafter}"}
    assert "is truncated" in refusal(configure, DrafterMismatchError, **asked)
    unchecked = configure(**asked, additional_config={"dspark": {"check_weights": False}})
    assert unchecked.speculative_config.method == "dspark"


def test_weights_of_another_head(configure: Configure, target: Path, tmp_path: Path) -> None:
    drafter = write_drafter(tmp_path / "d", target, head_type="gated")
    path = drafter / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"markov_head_type": "vanilla"}))
    message = refusal(configure, DrafterMismatchError, speculative_config=f"dspark:{drafter}")
    assert "markov_head.gate_proj.weight" in message


def test_folder_that_is_no_drafter(configure: Configure, lonely: Path, tmp_path: Path) -> None:
    asked = {"model": str(lonely), "speculative_config": f"dspark:{lonely}"}
    assert "Qwen3ForCausalLM" in refusal(configure, DrafterMismatchError, **asked)
    asked["speculative_config"] = f"dspark:{tmp_path / 'nothing'}"
    message = refusal(configure, DrafterMismatchError, **asked)
    assert "no config.json could be read" in message


@pytest.mark.skipif(HAS_GPU, reason="needs a vLLM without Triton; this machine has a GPU")
def test_without_triton_the_way_out_is_named(target: Path) -> None:
    """The first thing a user of a machine without a GPU meets."""
    code = f"""
        from vllm.engine.arg_utils import EngineArgs
        try:
            args = EngineArgs(model={str(target)!r}, speculative_config="dspark",
                              skip_tokenizer_init=True)
            answer = str(args.create_engine_config())
        except Exception as error:
            answer = [type(error).__name__, str(error)]
    """
    kind, message = ask(code, clean_environment())
    assert kind == "DSparkConfigError"
    assert "vllm-dspark cpu -- vllm serve" in message


@pytest.mark.parametrize("model", ["ngram", "[ngram]", "/no/such/folder", None])
def test_model_without_method_that_cannot_be_read_is_vllms_business(model: str | None) -> None:
    """Other methods are found by their model too; ours must not fail requests for them."""
    from vllm_dspark.integration.arguments import _names_a_drafter

    assert not _names_a_drafter(model, None)


def test_model_without_method_is_known_by_its_config(target: Path) -> None:
    """The drafter's folder alone asks for DSpark."""
    from vllm_dspark.integration.arguments import _names_a_drafter

    assert _names_a_drafter(str(target / "dspark"), None)
    assert not _names_a_drafter(str(target), None)


@pytest.mark.parametrize(("requests", "room", "fits"), [(8, 56, True), (9, 62, False)])
def test_a_draft_pass_fits_into_a_step(
    configure: Configure, requests: int, room: int, fits: bool
) -> None:
    """vLLM would write past the end of its buffers."""
    limits = {"max_num_seqs": requests, "max_num_batched_tokens": room, "max_model_len": 32}
    if fits:
        configure(speculative_config="dspark", **limits)
        return
    with pytest.raises(
        ValueError, match="--max-num-batched-tokens 63, or --max-num-seqs 8"
    ) as caught:
        configure(speculative_config="dspark", **limits)
    assert "9 requests (max_num_seqs) has 7 tokens for each, 63 in all" in str(caught.value)
    off = {"dspark": {"enabled": False}}
    configure(speculative_config="dspark", additional_config=off, **limits)
