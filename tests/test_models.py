"""Our drafter models and the seams around them, as far as they go without an engine."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.pairs import write_drafter, write_target
from vllm_dspark.checkpoint import DrafterMismatchError, drafter_spec
from vllm_dspark.heads import HEADS
from vllm_dspark.integration import models, proposer
from vllm_dspark.integration.drafter_config import read_spec
from vllm_dspark.integration.ledger import ENGINE_SEAMS
from vllm_dspark.integration.models import _OURS, _OurHeads, our_architecture
from vllm_dspark.integration.runner import wrap_init_speculator

Tensors = dict[str, torch.Tensor]
HEAD_TYPES = pytest.mark.parametrize("head_type", ["vanilla", "gated", "rnn"])


class Drafter(_OurHeads):
    """The shared part alone, for a checkpoint folder; vLLM's backbone and loader are stubs."""

    def __init__(self, folder: Path) -> None:
        self.config = SimpleNamespace(**json.loads((folder / "config.json").read_text()))
        self.draft_model_config = SimpleNamespace(model=str(folder), revision=None)
        self.model = nn.Module()
        self.model.markov_head = self.vllms_head = nn.Linear(1, 1)
        self.seen: list[str] = []

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        self.seen = [name for name, _ in weights]
        return {f"model.{name}" for name in self.seen}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("models") / "target")


def write(target: Path, folder: Path, changes: dict[str, Any], **options: Any) -> Path:
    """A drafter's checkpoint, with changes to its config.json."""
    folder = write_drafter(folder / "drafter", target, rank=5, **options)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def drafter(
    target: Path, folder: Path, changes: dict[str, Any] | None = None, **options: Any
) -> tuple[Drafter, Tensors]:
    """A drafter with our head installed, and the weights of its checkpoint."""
    folder = write(target, folder, changes or {}, **options)
    made = Drafter(folder)
    made.install_head()
    return made, load_file(folder / "model.safetensors")


@HEAD_TYPES
def test_checkpoint_loads(target: Path, tmp_path: Path, head_type: str) -> None:
    """Head weights reach our head with their values, all others vLLM's loader, in order."""
    made, weights = drafter(target, tmp_path, head_type=head_type)
    assert type(made.sequential_head) is HEADS[head_type]
    assert made.model.markov_head is made.sequential_head
    loaded = made.load_checked(iter(weights.items()), made.load)
    ours = {k.removeprefix("markov_head."): v for k, v in weights.items() if "markov_head" in k}
    state = made.sequential_head.state_dict()
    assert state.keys() == ours.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=0)
    assert made.seen == [name for name in weights if "markov_head" not in name]
    assert loaded == {f"model.{name}" for name in weights}
    assert not any(parameter.requires_grad for parameter in made.sequential_head.parameters())


def test_gate_of_the_head_is_kept_from_vllms_loader(target: Path, tmp_path: Path) -> None:
    """vLLM would stack markov_head.gate_proj into an MLP's gate_up_proj."""
    made, weights = drafter(target, tmp_path, head_type="gated")
    made.load_checked(weights.items(), made.load)
    assert "layers.0.mlp.gate_proj.weight" in made.seen
    assert not [name for name in made.seen if name.startswith("markov_head")]


@pytest.mark.parametrize(
    ("head_type", "change", "named"),
    [
        ("vanilla", {"markov_head.markov_w1.weight": None}, "missing: markov_head.markov_w1"),
        ("gated", {"markov_head.gate_proj.bias": None}, "missing: markov_head.gate_proj.bias"),
        ("rnn", {"layers.0.mlp.up_proj.weight": None}, "missing: layers.0.mlp.up_proj.weight"),
        ("vanilla", {"markov_head.gate_proj.bias": (5,)}, "not announce: markov_head.gate_proj"),
        ("rnn", {"markov_head.joint_proj.bias": (14,)}, "shape [14], its config says [15]"),
        ("gated", {"fc.weight": (32, 32)}, "fc.weight has shape [32, 32]"),
    ],
    ids=str,
)
def test_weights_unlike_the_config_are_refused(
    target: Path, tmp_path: Path, head_type: str, change: dict[str, Any], named: str
) -> None:
    """The last line: also for checkpoints that no file check has seen. Our head stays as it
    was, so nothing half loaded can serve."""
    made, weights = drafter(target, tmp_path, head_type=head_type)
    assert made.sequential_head is not None
    before = {k: v.clone() for k, v in made.sequential_head.state_dict().items()}
    for name, shape in change.items():
        weights.pop(name, None)
        if shape is not None:
            weights[name] = torch.zeros(shape)
    with pytest.raises(DrafterMismatchError) as caught:
        made.load_checked(weights.items(), made.load)
    assert named in str(caught.value)
    for name, tensor in made.sequential_head.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_loader_that_reports_nothing(target: Path, tmp_path: Path) -> None:
    """vLLM lets load_weights return None: nothing is tracked then."""
    made, weights = drafter(target, tmp_path)
    assert made.load_checked(weights.items(), lambda given: list(given) and None) is None


KEEPS_VLLMS: dict[str, dict[str, Any]] = {
    "quantized": {"quantization_config": {"quant_method": "fp8"}},
    "dspark_draft_topk": {"dspark_draft_topk": 4},
}


@pytest.mark.parametrize("why", KEEPS_VLLMS)
def test_vllms_vanilla_head_stays_where_it_is_needed(
    target: Path, tmp_path: Path, why: str
) -> None:
    made, weights = drafter(target, tmp_path, KEEPS_VLLMS[why])
    assert made.sequential_head is None
    assert made.model.markov_head is made.vllms_head
    made.load_checked(weights.items(), made.load)
    assert made.seen == list(weights)  # its own loader gets everything


@pytest.mark.parametrize("why", KEEPS_VLLMS)
@pytest.mark.parametrize("head_type", ["gated", "rnn"])
def test_other_heads_are_refused_there(
    target: Path, tmp_path: Path, head_type: str, why: str
) -> None:
    folder = write(target, tmp_path, KEEPS_VLLMS[why], head_type=head_type)
    with pytest.raises(DrafterMismatchError, match=f"{why}.* vanilla head only, not {head_type}"):
        Drafter(folder).install_head()


@pytest.mark.parametrize(
    ("family", "layout"),
    [("qwen3", "deepspec"), ("qwen3", "speculators"), ("gemma4", "deepspec")],
)
def test_spec_behind_vllms_model_config(tmp_path: Path, family: str, layout: str) -> None:
    """vLLM's own reading renames and folds fields; the spec is the file's all the same."""
    from vllm.transformers_utils.config import get_config

    folder = write_target(tmp_path / "target", family=family)
    written = write_drafter(tmp_path / "d", folder, layout=layout, head_type="rnn")
    hf_config = get_config(written, trust_remote_code=False)
    read = read_spec(SimpleNamespace(model=str(written), revision=None, hf_config=hf_config))
    assert read == drafter_spec("d", json.loads((written / "config.json").read_text()))
    assert read is not None
    assert (read.family, read.layout, read.head_type) == (family, layout, "rnn")


def test_spec_of_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(DrafterMismatchError, match=r"no config\.json could be read"):
        read_spec(SimpleNamespace(model=str(tmp_path), revision=None))


@pytest.mark.parametrize("architecture", _OURS)
def test_our_class_is_named_while_the_drafter_loads(architecture: str) -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    hf_config = SimpleNamespace(architectures=[architecture])
    with our_architecture(SimpleNamespace(hf_config=hf_config)):
        (name,) = hf_config.architectures
        assert name in ModelRegistry.get_supported_archs()
        assert name == getattr(models, name).__name__
    assert hf_config.architectures == [architecture]


def test_name_comes_back_after_an_error() -> None:
    hf_config = SimpleNamespace(architectures=["Gemma4DSparkModel"])
    seen = []

    def load() -> None:
        with our_architecture(SimpleNamespace(hf_config=hf_config)):
            seen.extend(hf_config.architectures)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        load()
    assert seen == ["DSparkGemma4ForCausalLM"]
    assert hf_config.architectures == ["Gemma4DSparkModel"]


@pytest.mark.parametrize("architectures", [["DSparkDraftModel"], ["K3DSparkModel"], []], ids=str)
def test_other_drafters_keep_their_class(architectures: list[str]) -> None:
    hf_config = SimpleNamespace(architectures=architectures)
    with our_architecture(SimpleNamespace(hf_config=hf_config)):
        assert hf_config.architectures is architectures


@pytest.mark.parametrize(
    ("method", "options", "ours"),
    [
        ("dspark", {}, True),
        ("dspark", {"dspark": {"enabled": False}}, False),  # an engine that turned us off
        ("dflash", {}, False),
        ("eagle3", {"dspark": {"enabled": True}}, False),
    ],
)
def test_only_dspark_gets_our_proposer(
    monkeypatch: pytest.MonkeyPatch, method: str, options: dict[str, Any], ours: bool
) -> None:
    monkeypatch.setattr(proposer, "DSparkProposer", lambda *args: ("ours", args))
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(method=method), additional_config=options
    )
    made = wrap_init_speculator(lambda *args: ("vLLM's", args))(config, "device", "states")
    assert made == (
        ("ours", (config, "device")) if ours else ("vLLM's", (config, "device", "states"))
    )


@pytest.mark.parametrize(
    ("ours", "base"),
    [
        ("worker:DSparkWorker", "vllm.v1.worker.gpu_worker:Worker"),
        ("cpu_worker:DSparkCpuWorker", "vllm.v1.worker.cpu_worker:CPUWorker"),
    ],
)
def test_worker_opens_engine_seams_before_its_device(
    monkeypatch: pytest.MonkeyPatch, ours: str, base: str
) -> None:
    """vLLM builds the model runner in init_device, through the names that we patch."""
    import importlib

    def load(path: str) -> Any:
        module, _, name = path.partition(":")
        return getattr(importlib.import_module(module), name)

    opened: list[bool] = []
    monkeypatch.setattr(
        load(base),
        "init_device",
        lambda self: opened.extend(patch.is_applied() for patch in ENGINE_SEAMS),
    )
    worker = object.__new__(load(f"vllm_dspark.integration.{ours}"))
    before = [patch for patch in ENGINE_SEAMS if patch.is_applied()]
    try:
        worker.init_device()
    finally:
        for patch in ENGINE_SEAMS:
            if patch not in before:
                patch.undo()
    assert opened == [True] * len(ENGINE_SEAMS)
