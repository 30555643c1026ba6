"""Which steps with a prefill are one CUDA graph, in vLLM's own manager of graphs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config.compilation import CompilationMode, CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager, ModelCudaGraphManager

from vllm_dspark.config import DSparkConfig, DSparkConfigError
from vllm_dspark.integration import prefill_graphs
from vllm_dspark.integration.prefill_graphs import settle_prefill_graphs, wrap_init_candidates

SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
REQUESTS, WIDTH = 16, 8  # decode steps have 128 tokens at most
BOTH = "FULL_AND_PIECEWISE"


def finished(options: Any = None, mode: str = BOTH, **changes: Any) -> Any:
    """A finished VllmConfig, as far as it is read."""
    names = ("tensor_parallel_size", "data_parallel_size", "pipeline_parallel_size",
             "decode_context_parallel_size", "prefill_context_parallel_size")  # fmt: skip
    ranks = {name: changes.get(name, 1) for name in names}
    kinds = ("is_hybrid", "is_encoder_decoder", "is_multimodal_model")
    return SimpleNamespace(
        additional_config={"dspark": options or {}},
        speculative_config=SimpleNamespace(
            method=changes.get("method", "dspark"),
            uses_dynamic_speculative_decoding=lambda: False,
        ),
        compilation_config=SimpleNamespace(
            mode=changes.get("compiled", CompilationMode.NONE),
            cudagraph_mode=CUDAGraphMode[mode],
            cudagraph_capture_sizes=SIZES,
            max_cudagraph_capture_size=SIZES[-1],
            static_forward_context=changes.get("layers", {}),
        ),
        parallel_config=SimpleNamespace(**ranks, use_ubatching=changes.get("ubatching", False)),
        model_config=SimpleNamespace(**{kind: changes.get(kind, False) for kind in kinds}),
        cache_config=SimpleNamespace(
            kv_sharing_fast_prefill=changes.get("sharing", False), use_kda_recoverssm=False
        ),
        lora_config=changes.get("lora"),
        kv_transfer_config=changes.get("transfer"),
        scheduler_config=SimpleNamespace(max_num_seqs=REQUESTS),
    )


def manager(vllm_config: Any, kind: type[Any] = ModelCudaGraphManager, varlen: bool = True) -> Any:
    """vLLM's own, with the patch in place, up to what it captures."""
    made: Any = object.__new__(kind)
    made.vllm_config = vllm_config
    made.compilation_config = vllm_config.compilation_config
    made.cudagraph_mode = vllm_config.compilation_config.cudagraph_mode
    made.max_num_reqs, made.decode_query_len, made.varlen_decode = REQUESTS, WIDTH, varlen
    made.lora_capture_cases, made._lora_dispatch_map, made._max_lora_case = [0], {}, 0
    made.ubatch_runner = None
    made._candidates, made._capture_descs = {}, {}
    made._graphs_captured = True
    wrap_init_candidates(CudaGraphManager._init_candidates)(made)
    return made


def found(made: Any, tokens: int, requests: int, prefill: bool) -> tuple[str, int, int | None]:
    """Mode, tokens and bound of what a step is dispatched to."""
    graph = made.dispatch(requests, tokens, None, 0, max_query_len=None if prefill else WIDTH)
    return graph.cg_mode.name, graph.num_tokens, graph.max_query_len


def test_steps_with_a_prefill_are_one_graph() -> None:
    made = manager(finished())
    assert found(made, 30, 5, prefill=False) == ("FULL", 32, WIDTH)
    assert found(made, 30, 5, prefill=True) == ("FULL", 32, None)
    assert found(made, 300, 16, prefill=True) == ("FULL", 512, None)
    assert found(made, 513, 16, prefill=True) == ("NONE", 513, None)
    assert CUDAGraphMode.PIECEWISE not in made._capture_descs
    captured = made._capture_descs[CUDAGraphMode.FULL]
    assert [g.num_tokens for g in captured] == sorted(
        (g.num_tokens for g in captured), reverse=True
    )
    whole = {g.num_tokens: g.num_reqs for g in captured if g.max_query_len is None}
    assert whole == {size: min(size, REQUESTS) for size in SIZES}
    assert {g for each in made._candidates.values() for g in each} == set(captured)


@pytest.mark.parametrize(
    "case",
    [
        {"options": {"prefill_graphs": "piecewise"}},
        {"options": {"enabled": False}},
        {"method": "eagle3"},
        {"varlen": False},
    ],
    ids=lambda case: "+".join(case),
)
def test_others_keep_what_they_had(case: dict[str, Any]) -> None:
    varlen = case.pop("varlen", True)
    made = manager(finished(**case), varlen=varlen)
    assert found(made, 30, 5, prefill=True) == ("PIECEWISE", 32, None)


def test_the_drafters_graphs_are_not_touched() -> None:
    made = manager(finished(), kind=CudaGraphManager)
    assert found(made, 30, 5, prefill=True) == ("PIECEWISE", 32, None)


def layer(monkeypatch: pytest.MonkeyPatch, support: AttentionCGSupport) -> dict[str, Any]:
    from vllm.model_executor.layers import attention_layer_base

    class Layer:
        def get_kv_cache_spec(self, vllm_config: Any) -> str:
            return "spec"

        def get_attn_backend(self) -> Any:
            builder = SimpleNamespace(get_cudagraph_support=lambda config, spec: support)
            return SimpleNamespace(get_builder_cls=lambda: builder, get_name=lambda: "SOME")

    monkeypatch.setattr(attention_layer_base, "AttentionLayerBase", Layer)
    return {"attn": Layer(), "experts": object()}


@pytest.mark.parametrize("support", list(AttentionCGSupport), ids=lambda support: support.name)
def test_attention_has_the_last_word(
    monkeypatch: pytest.MonkeyPatch, support: AttentionCGSupport
) -> None:
    """auto leaves what it cannot do; what was asked for is refused by name."""
    layers = layer(monkeypatch, support)
    able = support == AttentionCGSupport.ALWAYS
    made = manager(finished(layers=layers))
    assert found(made, 30, 5, prefill=True)[0] == ("FULL" if able else "PIECEWISE")
    asked = finished({"prefill_graphs": "full"}, layers=layers)
    if able:
        manager(asked)
        return
    with pytest.raises(DSparkConfigError, match="SOME cannot replay batches with a prefill"):
        manager(asked)


def settled(vllm_config: Any) -> str:
    config = DSparkConfig.from_additional_config(vllm_config.additional_config)
    settle_prefill_graphs(vllm_config, config)
    return DSparkConfig.from_additional_config(vllm_config.additional_config).prefill_graphs


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mode": "FULL_DECODE_ONLY"}, "cudagraph_mode is FULL_DECODE_ONLY"),
        ({"mode": "NONE"}, "cudagraph_mode is NONE"),
        ({"is_hybrid": True}, "other layers than attention"),
        ({"is_multimodal_model": True}, "more than text"),
        ({"data_parallel_size": 2}, "data_parallel_size is 2, needed is 1"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size is 2"),
        ({"prefill_context_parallel_size": 4}, "prefill_context_parallel_size is 4"),
        ({"lora": object()}, "LoRA"),
        ({"transfer": object()}, "K/V connectors"),
        ({"sharing": True}, "kv_sharing_fast_prefill"),
        ({"ubatching": True}, "microbatches"),
    ],
    ids=lambda case: "+".join(case) if isinstance(case, dict) else None,
)
def test_what_an_engine_cannot_have_is_refused_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(prefill_graphs, "like_measured", lambda vllm_config: True)
    assert settled(finished(**changes)) == "piecewise"
    with pytest.raises(DSparkConfigError, match="Fix: leave it out") as caught:
        settled(finished({"prefill_graphs": "full"}, **changes))
    assert 'prefill_graphs is "full", but' in str(caught.value)
    assert reason in str(caught.value)


def test_refused_where_all_drafts_are_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM then has graphs of one length of block alone, beside which these are not made. Catches a
    server that was asked for full graphs and has them in pieces without a word."""
    monkeypatch.setattr(prefill_graphs, "like_measured", lambda vllm_config: True)
    assert settled(finished({"verification": "all"})) == "piecewise"
    with pytest.raises(DSparkConfigError, match="all drafts are verified, needed is adaptive"):
        settled(finished({"verification": "all", "prefill_graphs": "full"}))
    assert settled(finished({"verification": "adaptive", "prefill_graphs": "full"})) == "full"


@pytest.mark.parametrize(
    ("asked", "major", "ranks", "chosen"),
    [
        ("auto", 9, 1, "auto"),
        ("auto", 9, 2, "piecewise"),
        ("auto", 8, 1, "piecewise"),
        ("full", 8, 2, "full"),
        ("piecewise", 9, 1, "piecewise"),
    ],
)
def test_auto_is_for_engines_that_were_measured(
    monkeypatch: pytest.MonkeyPatch, asked: str, major: int, ranks: int, chosen: str
) -> None:
    capability = SimpleNamespace(major=major, minor=0)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    monkeypatch.setattr(type(current_platform), "get_device_capability", lambda *_: capability)
    assert settled(finished({"prefill_graphs": asked}, tensor_parallel_size=ranks)) == chosen
    compiled = finished(
        {"prefill_graphs": asked},
        tensor_parallel_size=ranks,
        compiled=CompilationMode.VLLM_COMPILE,
    )
    assert settled(compiled) == chosen
