"""When the drafter runs in FP8, and what is refused with what reason."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from vllm.config import CompilationMode
from vllm.platforms import current_platform

from tests.child import ask, clean_environment
from tests.engine import MICRO
from vllm_dspark.config import DSparkConfig, DSparkConfigError
from vllm_dspark.integration import draft_quantization
from vllm_dspark.integration.draft_quantization import settle_quantization

ROOT = Path(__file__).parent.parent
QWEN: Any = SimpleNamespace(family="qwen3", quantized=False)
GEMMA: Any = SimpleNamespace(family="gemma4", quantized=False)
QUANTIZED: Any = SimpleNamespace(family="qwen3", quantized=True)


def engine(options: Any = None, **changes: Any) -> Any:
    """A finished VllmConfig, as far as it is read."""
    draft = {"quantization": None, "dtype": torch.bfloat16, "head_dtype": torch.bfloat16}
    draft |= {name: value for name, value in changes.items() if name in draft}
    return SimpleNamespace(
        additional_config=changes.get("additional", {"dspark": options or {}, "other": 1}),
        speculative_config=SimpleNamespace(draft_model_config=SimpleNamespace(**draft)),
        parallel_config=SimpleNamespace(tensor_parallel_size=changes.get("ranks", 1)),
        compilation_config=SimpleNamespace(mode=changes.get("compiled", CompilationMode.NONE)),
    )


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine of a compute capability, 9.0 if not told otherwise, with vLLM 0.33."""

    def becomes(capability: tuple[int, int] = (9, 0), version: str = "0.33.0") -> None:
        kind = type(current_platform)
        found = SimpleNamespace(major=capability[0], minor=capability[1])
        monkeypatch.setattr(kind, "is_cuda", lambda self: True)
        monkeypatch.setattr(kind, "get_device_capability", lambda *_: found)
        monkeypatch.setattr(kind, "has_device_capability", lambda _, least: capability >= least)
        monkeypatch.setattr(draft_quantization, "require_supported_vllm", lambda: Version(version))

    becomes()
    return becomes


def settled(vllm_config: Any, spec: Any = QWEN) -> str:
    config = DSparkConfig.from_additional_config(vllm_config.additional_config)
    chosen = settle_quantization(vllm_config, config, spec)
    recorded = vllm_config.additional_config
    assert recorded["dspark"]["draft_quantization"] == chosen
    assert recorded["other"] == 1
    return chosen


@pytest.mark.parametrize(
    ("asked", "capability", "ranks", "chosen"),
    [
        ("auto", (9, 0), 1, "fp8"),
        ("auto", (9, 0), 2, "none"),  # it can, and nobody measured it; likewise the next two
        ("auto", (8, 9), 1, "none"),
        ("auto", (10, 0), 1, "none"),
        ("auto", (8, 0), 1, "none"),
        ("fp8", (8, 9), 1, "fp8"),
        ("fp8", (10, 0), 2, "fp8"),
        ("none", (9, 0), 1, "none"),
    ],
)
def test_what_is_chosen_travels(
    hopper: Any, asked: str, capability: tuple[int, int], ranks: int, chosen: str
) -> None:
    hopper(capability)
    assert settled(engine({"draft_quantization": asked}, ranks=ranks)) == chosen


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": "0.32.0"}, "vLLM 0.32.0 has no FP8 copies of an LM head, needed is 0.33"),
        ({"capability": (8, 0)}, "needed is CUDA's compute capability 8.9"),
        ({"spec": None}, "vLLM's own code runs this drafter"),
        ({"spec": GEMMA}, "it is a gemma4 one"),
        ({"spec": QUANTIZED}, "quantized already"),
        ({"quantization": "fp8"}, "quantized already"),
        ({"dtype": torch.float32, "head_dtype": torch.float32}, "computes in torch.float32"),
        ({"head_dtype": torch.float32}, "its LM head torch.float32"),
        ({"invariant": True}, "batch invariance"),
    ],
    ids=lambda case: "+".join(case) if isinstance(case, dict) else None,
)
def test_what_cannot_be_is_refused_where_it_was_asked_for(
    hopper: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str
) -> None:
    hopper(changes.get("capability", (9, 0)), changes.get("version", "0.33.0"))
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1" if "invariant" in changes else "0")
    spec = changes.get("spec", QWEN)
    assert settled(engine(**changes), spec) == "none"
    with pytest.raises(DSparkConfigError, match="Fix: leave it out") as caught:
        settled(engine({"draft_quantization": "fp8"}, **changes), spec)
    assert 'draft_quantization is "fp8", but ' in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize("asked", ["auto", "fp8"])
@pytest.mark.parametrize("mode", list(CompilationMode), ids=lambda mode: mode.name)
def test_ways_to_compile_that_nobody_measured_have_to_be_asked_for(
    hopper: Any, asked: str, mode: CompilationMode
) -> None:
    usual = mode in (CompilationMode.NONE, CompilationMode.VLLM_COMPILE)
    compiled = engine({"draft_quantization": asked}, compiled=mode)
    assert settled(compiled) == ("fp8" if usual or asked == "fp8" else "none")


def test_what_cannot_carry_the_choice_stays_as_it_is(hopper: Any) -> None:
    """Another plugin's object in the place of ours."""
    other = SimpleNamespace(compute_hash=lambda: "x")
    vllm_config = engine(additional=other)
    assert settle_quantization(vllm_config, DSparkConfig(), QWEN) == "none"
    assert vllm_config.additional_config is other


def test_a_machine_without_fp8_says_so_before_anything_loads() -> None:
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=str(MICRO),
        speculative_config={"method": "dspark", "model": str(MICRO / "dspark-vanilla")},
        additional_config={"dspark": {"draft_quantization": "fp8"}},
    )
    with pytest.raises(ValueError, match='draft_quantization is "fp8", but'):
        arguments.create_engine_config()


def test_layers_quantized_in_place_compute_what_they_did() -> None:
    """Each kind of a drafter's, within FP8's own error; by themselves and traced by Dynamo, as a
    compiled drafter is."""
    code = f"""
        import tests.conftest
        from tests.fp8_layers import errors
        answer = errors({str(MICRO)!r})
    """
    found = ask(code, clean_environment(PYTHONPATH=str(ROOT)))
    assert set(found) == {"QKVParallelLinear", "MergedColumnParallelLinear", "RowParallelLinear"}
    for name, (dtype, plain, traced) in found.items():
        assert dtype == "torch.float8_e4m3fn", name
        assert 0.01 < plain < 0.08, name
        assert traced == pytest.approx(plain, rel=0.1), name
