"""Which configurations verify adaptively, in which mode, and what is refused with what reason."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dspark.config import DSparkConfig, DSparkConfigError
from vllm_dspark.integration.verification import plan as planning
from vllm_dspark.integration.verification.plan import Plan, make_plan, settle

HEAD: Any = SimpleNamespace(has_confidence=True)
NO_HEAD: Any = SimpleNamespace(has_confidence=False)


def engine(options: Any = None, asked: bool = False, **changes: Any) -> Any:
    """A finished VllmConfig of a CUDA engine with full graphs, changed by dotted names."""
    graphs = SimpleNamespace(has_full_cudagraphs=lambda: changes.get("graphs", True))
    return SimpleNamespace(
        additional_config={"dspark": options or {}, "other": 1},
        speculative_config=SimpleNamespace(enable_adaptive_verification=asked),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=changes.get("pipeline", 1),
            prefill_context_parallel_size=changes.get("prefill_context", 1),
            enable_batch_sharded_sampling=changes.get("sharded", False),
        ),
        model_config=SimpleNamespace(
            is_hybrid=changes.get("hybrid", False),
            return_sampling_mask=changes.get("masks", False),
        ),
        cache_config=SimpleNamespace(
            use_replayssm=changes.get("replay", False), use_kda_recoverssm=False
        ),
        aux_output_config=SimpleNamespace(enabled=changes.get("experts", False)),
        lora_config=changes.get("lora"),
        compilation_config=SimpleNamespace(cudagraph_mode=graphs),
        attention_config=SimpleNamespace(backend=changes.get("backend")),
    )


def backend(takes_device_lengths: bool) -> Any:
    cls = SimpleNamespace(supports_device_cpu_query_lens_mismatch=lambda: takes_device_lengths)
    return SimpleNamespace(name="SOME", get_class=lambda: cls)


def platform(monkeypatch: pytest.MonkeyPatch, cpu: bool) -> None:
    # What looks at the platform while it is imported must have been.
    importlib.import_module("vllm.v1.worker.gpu.model_runner")
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: cpu)
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: not cpu)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise every answer here would be that this is a CPU."""
    platform(monkeypatch, cpu=False)


def plan(options: Any = None, spec: Any = HEAD, asked: bool = False, **changes: Any) -> Plan:
    vllm_config = engine(options, asked, **changes)
    config = DSparkConfig.from_additional_config(vllm_config.additional_config)
    return make_plan(vllm_config, config, spec)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("arguments", "adaptive", "mode", "reason"),
    [
        ({}, True, "device", "full CUDA graphs"),
        ({"options": {"verification": "all"}}, False, "host", "asked for"),
        ({"options": {"verification_mode": "host"}}, True, "host", "asked for"),
        ({"options": {"verification_mode": "device"}}, True, "device", "full CUDA graphs"),
        ({"graphs": False}, True, "host", "no full CUDA graphs"),
        ({"lora": object()}, True, "host", "LoRA"),
        ({"backend": backend(False)}, True, "host", "SOME reads query lengths"),
        ({"backend": backend(True)}, True, "device", "full CUDA graphs"),
        ({"spec": NO_HEAD}, False, "host", "no confidence head"),
        ({"spec": None}, False, "host", "no confidence head"),
        ({"options": {"confidence": "never"}}, False, "host", "confidence is"),
        ({"spec": NO_HEAD, "asked": True}, True, "device", "full CUDA graphs"),
        ({"spec": NO_HEAD, "options": {"verification": "adaptive"}}, True, "device", "graphs"),
        ({"pipeline": 2}, False, "host", "pipeline"),
        ({"prefill_context": 2}, False, "host", "context parallelism"),
        ({"sharded": True}, False, "host", "batch-sharded"),
        ({"hybrid": True}, False, "host", 'has to be "adaptive"'),
        ({"hybrid": True, "asked": True}, True, "host", "recurrent layers tell"),
        ({"hybrid": True, "replay": True}, False, "host", "recurrent layers that replay"),
        ({"masks": True}, False, "host", "sampling masks"),
        ({"experts": True}, False, "host", "experts"),
    ],
    ids=lambda case: "+".join(case) or "plain" if isinstance(case, dict) else None,
)
def test_what_is_decided(arguments: Any, adaptive: bool, mode: str, reason: str) -> None:
    decided = plan(**arguments)
    assert (decided.adaptive, decided.mode) == (adaptive, mode)
    assert reason in decided.reason
    assert reason in decided.describe()


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("asked", [{"asked": True}, {"options": {"verification": "adaptive"}}])
@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        ({"pipeline": 2}, "pipeline"),
        ({"hybrid": True, "replay": True}, "recurrent"),
        ({"sharded": True}, "shard"),
    ],
    ids=str,
)
def test_what_was_asked_for_and_cannot_be_is_refused(
    asked: Any, obstacle: Any, reason: str
) -> None:
    """At start-up, with the reason and the way out; not asked for, all drafts are verified."""
    with pytest.raises(DSparkConfigError, match=rf"{reason}.*Fix: .*verification.*all"):
        plan(**asked, **obstacle)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    "changes",
    [{"graphs": False}, {"lora": object()}, {"hybrid": True}],
    ids=["eager", "lora", "hybrid"],
)
def test_device_mode_that_cannot_be_is_refused(changes: Any) -> None:
    with pytest.raises(DSparkConfigError, match=r'"device".*Fix: leave verification_mode out'):
        plan({"verification_mode": "device"}, asked=True, **changes)


def test_cpu_means_host(monkeypatch: pytest.MonkeyPatch) -> None:
    platform(monkeypatch, cpu=True)
    decided = plan()
    assert (decided.adaptive, decided.mode) == (True, "host")
    assert decided.reason == "the CPU backend reads query lengths on the host"


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    ("options", "changes", "flag", "written"),
    [
        ({}, {}, True, {"verification": "adaptive"}),
        (
            {"confidence": "always"},
            {"graphs": False},
            False,
            {"confidence": "always", "verification": "adaptive", "verification_mode": "host"},
        ),
        ({}, {"pipeline": 2}, False, {"verification": "all"}),
        (
            {"verification_mode": "device"},
            {},
            True,
            {"verification": "adaptive", "verification_mode": "device"},
        ),
    ],
    ids=str,
)
def test_decision_travels_with_the_config(
    options: Any, changes: Any, flag: bool, written: dict[str, Any]
) -> None:
    """Workers read it from there. Another plugin's entry and the user's own object are left."""
    vllm_config = engine(options, asked=bool(options.get("verification_mode")), **changes)
    given = vllm_config.additional_config
    config = DSparkConfig.from_additional_config(given)
    settle(vllm_config, make_plan(vllm_config, config, HEAD))
    assert vllm_config.speculative_config.enable_adaptive_verification is flag
    assert vllm_config.additional_config == {"dspark": written, "other": 1}
    assert given == {"dspark": options, "other": 1}
    # Decided again from what was written, the answer is the same.
    again = DSparkConfig.from_additional_config(vllm_config.additional_config)
    assert make_plan(vllm_config, again, HEAD).adaptive is (written["verification"] == "adaptive")


@pytest.mark.usefixtures("cuda")
def test_decision_that_cannot_travel_is_not_made() -> None:
    """vLLM lets additional_config be any object that has a hash."""
    theirs = SimpleNamespace(compute_hash=lambda: "something else")
    vllm_config = engine()
    vllm_config.additional_config = theirs
    decided = make_plan(vllm_config, DSparkConfig(), HEAD)
    assert not decided.adaptive
    settle(vllm_config, decided)
    assert vllm_config.additional_config is theirs
    assert DSparkConfig.from_additional_config(theirs).verification != "adaptive"


def test_every_obstacle_is_reported_once() -> None:
    """The order matters to nobody, but each must be reachable."""
    obstacles: list[dict[str, Any]] = [
        {"pipeline": 2},
        {"prefill_context": 2},
        {"sharded": True},
        {"hybrid": True, "replay": True},
        {"masks": True},
        {"experts": True},
    ]
    reasons = [planning.unsupported(engine(**obstacle)) for obstacle in obstacles]
    assert len(set(reasons)) == len(reasons)
    assert planning.unsupported(engine()) is None
