"""Weight files on disk against what the drafter's config announces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.pairs import write_drafter, write_target
from vllm_dspark.checkpoint import DrafterMismatchError, DrafterSpec, drafter_spec
from vllm_dspark.weights import expected_weights, read_headers, weight_problems

Tensors = dict[str, torch.Tensor]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """One target a family, written when first asked for."""
    root = tmp_path_factory.mktemp("targets")

    def target(family: str) -> Path:
        folder = root / family
        return folder if folder.is_dir() else write_target(folder, family=family)

    return target


@pytest.fixture
def drafter(targets: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes a Qwen3 drafter."""
    return lambda **options: write_drafter(tmp_path / "drafter", targets("qwen3"), **options)


def spec_of(folder: Path) -> DrafterSpec:
    spec = drafter_spec(str(folder), json.loads((folder / "config.json").read_text()))
    assert spec is not None
    return spec


def problems_of(folder: Path) -> list[str]:
    headers = read_headers(folder)
    assert headers is not None
    return weight_problems(spec_of(folder), headers)


def edit(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("confidence", ["none", "plain", "markov"])
@pytest.mark.parametrize("head_type", ["vanilla", "gated", "rnn"])
@pytest.mark.parametrize(
    ("family", "layout"),
    [("qwen3", "deepspec"), ("qwen3", "speculators"), ("gemma4", "deepspec")],
)
def test_whole_checkpoints_are_accepted(
    targets: Callable[[str], Path],
    tmp_path: Path,
    family: str,
    layout: str,
    head_type: str,
    confidence: str,
) -> None:
    folder = write_drafter(
        tmp_path / "drafter",
        targets(family),
        head_type=head_type,
        layout=layout,
        num_layers=2,
        rank=5,
        confidence=confidence != "none",
        with_markov=confidence == "markov",
    )
    assert spec_of(folder).head_type == head_type
    assert problems_of(folder) == []


@pytest.mark.parametrize(
    ("head_type", "extra"),
    [
        ("gated", {"gate_proj.weight": (8, 40), "gate_proj.bias": (8,)}),
        ("rnn", {"joint_proj.weight": (24, 48), "joint_proj.bias": (24,)}),
        ("vanilla", {}),
    ],
)
def test_head_weights_are_those_of_the_formulas(
    drafter: Callable[..., Path], head_type: str, extra: dict[str, tuple[int, ...]]
) -> None:
    """Shapes written out by hand for V=64, D=32, r=8; the rest of the suite derives them."""
    expected = expected_weights(spec_of(drafter(head_type=head_type)))
    head = {k.removeprefix("markov_head."): v for k, v in expected.items() if "markov" in k}
    assert head == {"markov_w1.weight": (64, 8), "markov_w2.weight": (64, 8)} | extra
    assert expected["confidence_head.proj.weight"] == (1, 40)
    assert expected["fc.weight"] == (32, 64)


@pytest.mark.parametrize("head_type", ["vanilla", "gated", "rnn"])
def test_every_single_weight_is_needed(drafter: Callable[..., Path], head_type: str) -> None:
    """Whatever is left out, its name is in the message and nothing else is complained about."""
    folder = drafter(head_type=head_type)
    spec, headers = spec_of(folder), read_headers(folder)
    assert headers is not None
    for name in expected_weights(spec):
        rest = {k: v for k, v in headers.items() if k != name}
        assert weight_problems(spec, rest) == [f"weights are missing: {name}"]


@pytest.mark.parametrize("name", ["embed_tokens.weight", "lm_head.weight"])
def test_gemma4_brings_its_own_vocabulary(
    targets: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """It scales its embedding itself, so unlike Qwen3's it cannot share the target's."""
    folder = write_drafter(tmp_path / "drafter", targets("gemma4"))
    edit(folder, lambda tensors: tensors.pop(name))
    assert problems_of(folder) == [f"weights are missing: {name}"]


@pytest.mark.parametrize(
    ("written", "claimed", "extra"),
    [
        ({"head_type": "gated"}, {"markov_head_type": "vanilla"}, "gate_proj"),
        ({"head_type": "rnn"}, {"markov_head_type": "vanilla"}, "joint_proj"),
        ({"confidence": True}, {"enable_confidence_head": False}, "confidence_head.proj.weight"),
        ({"num_layers": 2}, {"num_hidden_layers": 1}, "layers.1."),
    ],
    ids=str,
)
def test_weights_that_the_config_does_not_announce(
    drafter: Callable[..., Path], written: dict[str, Any], claimed: dict[str, Any], extra: str
) -> None:
    """Such a checkpoint would load, and draft with half of what it was trained with."""
    folder = drafter(**written)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | claimed))
    (problem,) = problems_of(folder)
    assert "does not announce" in problem
    assert extra in problem


@pytest.mark.parametrize(
    ("written", "claimed", "missing"),
    [
        ("vanilla", "gated", "markov_head.gate_proj.bias, markov_head.gate_proj.weight"),
        ("vanilla", "rnn", "markov_head.joint_proj.bias, markov_head.joint_proj.weight"),
    ],
)
def test_weights_that_the_config_announces_in_vain(
    drafter: Callable[..., Path], written: str, claimed: str, missing: str
) -> None:
    folder = drafter(head_type=written)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"markov_head_type": claimed}))
    assert problems_of(folder) == [f"weights are missing: {missing}"]


@pytest.mark.parametrize(
    "name",
    ["fc.weight", "norm.weight", "markov_head.markov_w2.weight", "layers.0.mlp.up_proj.weight"],
)
def test_wrong_shape_is_named_with_both_shapes(drafter: Callable[..., Path], name: str) -> None:
    folder = drafter()
    expected = list(expected_weights(spec_of(folder))[name])
    wrong = [expected[0] + 1, *expected[1:]]
    edit(folder, lambda tensors: tensors.update({name: torch.zeros(wrong)}))
    assert problems_of(folder) == [f"{name} has shape {wrong}, its config says {expected}"]


def test_several_problems_are_all_listed(drafter: Callable[..., Path]) -> None:
    folder = drafter()

    def spoil(tensors: Tensors) -> None:
        del tensors["norm.weight"]
        tensors["fc.weight"] = torch.zeros(3, 3)
        tensors["markov_head.gate_proj.bias"] = torch.zeros(8)

    edit(folder, spoil)
    assert len(problems_of(folder)) == 3


@pytest.mark.parametrize(
    "kept",
    ["nothing", "half a length", "the length alone", "half the header", "the header", "all but 1"],
)
def test_truncated_file(drafter: Callable[..., Path], kept: str) -> None:
    """A download that broke off, wherever it did."""
    folder = drafter()
    content = (folder / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    cut = {
        "nothing": 0,
        "half a length": 4,
        "the length alone": 8,
        "half the header": header // 2,
        "the header": header,
        "all but 1": len(content) - 1,
    }[kept]
    (folder / WEIGHTS).write_bytes(content[:cut])
    with pytest.raises(DrafterMismatchError, match=rf"{WEIGHTS} \({cut} bytes\) is truncated"):
        read_headers(folder)


def shard(folder: Path) -> dict[str, str]:
    """Split the weights over two files with an index; the index's weight map."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return weight_map


def test_shards_are_read_through_the_index(drafter: Callable[..., Path]) -> None:
    folder = drafter()
    shard(folder)
    assert problems_of(folder) == []


def test_missing_shard_is_named(drafter: Callable[..., Path]) -> None:
    folder = drafter()
    missing = sorted(set(shard(folder).values()))[1]
    (folder / missing).unlink()
    with pytest.raises(DrafterMismatchError, match=rf"its index names {missing}, not there"):
        read_headers(folder)


@pytest.mark.parametrize("text", ['{"weight_map": {"fc.wei', "{}", '{"weight_map": []}', ""])
def test_damaged_index_is_named(drafter: Callable[..., Path], text: str) -> None:
    """An index breaks off like any other file."""
    folder = drafter()
    (folder / f"{WEIGHTS}.index.json").write_text(text)
    with pytest.raises(DrafterMismatchError, match=r"model\.safetensors\.index\.json"):
        read_headers(folder)


def test_reduced_vocabulary_needs_its_own_head_and_map(drafter: Callable[..., Path]) -> None:
    """Without the map from draft words to target words every draft would be another word."""
    folder = drafter(layout="speculators")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"draft_vocab_size": 40}))

    def reduce(tensors: Tensors) -> None:
        tensors["markov_head.markov_w2.weight"] = torch.zeros(40, 8)
        tensors["lm_head.weight"] = torch.zeros(40, 32)

    edit(folder, reduce)
    (problem,) = problems_of(folder)
    assert "draft_vocab_size 40 is below vocab_size 64, which needs d2t" in problem
    edit(folder, lambda tensors: tensors.update(d2t=torch.zeros(40, dtype=torch.int64)))
    assert problems_of(folder) == []


def test_folder_without_safetensors_is_left_to_vllm(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert read_headers(tmp_path) is None
