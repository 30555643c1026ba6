"""What the inflation refuses: pairs that cannot become a shape, and weights that are wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from benchmarks.inflate import app, inflate
from benchmarks.inflation.check import InflationMismatchError, check_pair, make_probe, pick_device
from benchmarks.inflation.checkpoint import INDEX, Checkpoint, CheckpointError
from benchmarks.inflation.pair import CannotInflateError, open_pair, require_inflatable
from benchmarks.inflation.shapes import SHAPES
from tests.test_inflate import MICRO, TINY, UNTIED

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small matrices on a busy machine: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-python at a small shape, written by the command."""
    out = tmp_path_factory.mktemp("inflated")
    shape = out.parent / f"{out.name}.json"
    shape.write_text(json.dumps(dataclasses.asdict(UNTIED)))
    done = CliRunner().invoke(app, [str(TINY), str(out), "--shape", str(shape), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "peak memory" in done.output
    return out


def test_the_record_says_what_went_in_and_what_came_out(written: Path) -> None:
    """Digests are of the source's files, sizes of the written ones, differences are not all zero
    (a comparison of a pair with itself would give that)."""
    record = json.loads((written / "inflation.json").read_text())
    assert record["shape"] == dataclasses.asdict(UNTIED)
    assert record["settings"] == {"threads": 4, "seed": 0, "device": "cpu"}
    assert record["source"]["target"] == Checkpoint(TINY).digests()
    assert record["source"]["drafter"] == Checkpoint(TINY / "dspark").digests()
    assert record["layers"] == [0, 1, 3, 5, 7]
    on_disk = sum(path.stat().st_size for path in written.rglob("*.safetensors"))
    assert 0 < on_disk - record["target_bytes"] - record["drafter_bytes"] < 1e5  # the headers
    assert 1e8 < record["peak_memory_bytes"] < 1e11
    found = record["largest_differences"]
    assert found.keys() == {"logits", "draft logits", "confidences"}
    assert all(0 < each["largest"] < record["tolerance"] == 1e-3 for each in found.values())
    assert {"versions", "commit"} <= record["provenance"].keys()


@pytest.mark.parametrize(
    ("part", "name", "row", "quantity"),
    [
        (".", "model.layers.3.mlp.down_proj.weight", 5, "logits"),
        (".", "model.layers.0.self_attn.q_proj.weight", 3, "logits"),
        (".", "model.norm.weight", 200, "logits"),  # in the second copy: the low part
        (".", "lm_head.weight", 2300, "logits by"),  # a copy of the dead word
        (".", "model.layers.2.mlp.down_proj.weight", 440, "logits"),  # padding of a faint matrix
        ("dspark", "layers.2.self_attn.o_proj.weight", 7, "draft logits"),
        ("dspark", "fc.weight", 11, "draft logits"),
        ("dspark", "markov_head.markov_w2.weight", 1000, "draft logits"),
        ("dspark", "confidence_head.proj.weight", 0, "confidences"),
    ],
)
def test_a_wrong_weight_is_found(
    written: Path, tmp_path: Path, part: str, name: str, row: int, quantity: str
) -> None:
    """One row is off in one file, and the check names what it did to which output. Nothing is
    deleted."""
    out = tmp_path / "broken"
    shutil.copytree(written, out)
    file = out / part / json.loads((out / part / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][row] += 0.25
    save_file(tensors, file)
    before = sorted(out.rglob("*"))
    with pytest.raises(InflationMismatchError, match=quantity) as raised:
        check_pair(open_pair(TINY), open_pair(out), CPU)
    assert "Needed: at most 0.001" in str(raised.value)
    assert sorted(out.rglob("*")) == before


@pytest.mark.gpu
def test_the_check_runs_on_a_gpu(written: Path) -> None:
    """Whole layers on the device, in fp32: a GPU's TF32 would be off by more than the bound."""
    for difference in check_pair(open_pair(TINY), open_pair(written), pick_device("cuda")):
        assert 0 < difference.largest < 1e-3, str(difference)


def test_a_weight_that_is_not_a_number_is_found(written: Path, tmp_path: Path) -> None:
    """Every comparison with NaN is false, which must not read as agreement."""
    out = tmp_path / "broken"
    shutil.copytree(written, out)
    name = "confidence_head.proj.bias"
    file = out / "dspark" / json.loads((out / "dspark" / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name][0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(InflationMismatchError, match="confidences by inf"):
        check_pair(open_pair(TINY), open_pair(out), CPU)


def test_a_failed_check_leaves_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command fails, keeps the files, and does not write the record that says all is well."""
    monkeypatch.setattr("benchmarks.inflation.check.TOLERANCE", 1e-12)
    shape = tmp_path / "shape.json"
    shape.write_text(json.dumps(dataclasses.asdict(UNTIED)))
    out = tmp_path / "out"
    done = CliRunner().invoke(app, [str(TINY), str(out), "--shape", str(shape), "--device", "cpu"])
    assert done.exit_code == 1
    assert "does not compute what" in done.output
    assert (out / INDEX).exists()
    assert not (out / "inflation.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 383}, "target: hidden_size of the shape is 383, needed is at least 384"),
        ({"num_attention_heads": 2}, "query heads per KV head of the shape is 1, needed is at le"),
        ({"intermediate_size": 500}, "drafter: intermediate_size of the shape is 500, needed is"),
        ({"num_hidden_layers": 6}, "num_hidden_layers of the shape is 6, needed is at least 7"),
        ({"draft_target_layers": 2}, "draft_target_layers of the shape is 2, needed is at least 3"),
        ({"vocab_size": 2047}, "vocab_size of the shape is 2047, needed is at least 2048"),
        ({"draft_layers": 1}, "draft_layers of the shape is 1, needed is at least 2"),
        ({"markov_rank": 63}, "markov_rank of the shape is 63, needed is at least 64"),
    ],
)
def test_shapes_that_are_too_small(change: dict[str, Any], message: str) -> None:
    """One field below its limit, the others well above: only the limit named can be at work."""
    shape = dataclasses.replace(UNTIED, **change)
    with pytest.raises(CannotInflateError, match=message):
        require_inflatable(open_pair(TINY), shape)


def test_another_head_dim_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """micro-python cannot become a Qwen3: one error with found, needed and fix, and no file."""
    arguments = [str(MICRO), str(tmp_path / "out"), "--shape", "qwen3-8b"]
    done = CliRunner().invoke(app, [*arguments, "--drafter", str(MICRO / "dspark-rnn")])
    assert done.exit_code == 1
    assert "head_dim is 32, needed is the shape's 128" in done.output
    assert "Fix: " in done.output
    assert not (tmp_path / "out").exists()


def test_several_drafters_need_a_name() -> None:
    """micro-python has three; taking any of them would inflate a pair nobody asked for."""
    with pytest.raises(CannotInflateError, match=r"found .*dspark-gated.*--drafter"):
        open_pair(MICRO)


def test_a_folder_in_use_is_left_alone(written: Path, tmp_path: Path) -> None:
    """A second run must not mix its shards into the first one's."""
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    with pytest.raises(CannotInflateError, match="is not empty"):
        inflate(TINY, written, UNTIED)
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


def test_pairs_of_another_kind_are_refused(tmp_path: Path) -> None:
    """Each change alone makes the pair one that the construction does not cover."""
    for part, change, message in (
        (".", {"architectures": ["LlamaForCausalLM"]}, "needed is Qwen3ForCausalLM"),
        (".", {"attention_bias": True}, "attention_bias, needed is none"),
        (".", {"layer_types": ["sliding_attention"] * 5}, "needed is full_attention"),
        ("dspark", {"sample_from_anchor": False}, "predicting anchor"),
        ("dspark", {"enable_confidence_head": False}, "lacks a confidence head"),
        ("dspark", {"hidden_size": 64}, "hidden states of width 64"),
    ):
        folder = tmp_path / next(iter(change))
        shutil.copytree(TINY, folder)
        config = json.loads((folder / part / "config.json").read_text())
        (folder / part / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CannotInflateError, match=message):
            require_inflatable(open_pair(folder), UNTIED)


def test_an_untied_pair_cannot_be_tied(tmp_path: Path) -> None:
    """One table cannot hold two; and weights in another dtype would be rounded unseen."""
    folder = tmp_path / "untied"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors")
    require_inflatable(open_pair(folder), SHAPES["qwen3-8b"])
    with pytest.raises(CannotInflateError, match="ties LM head and embedding"):
        require_inflatable(open_pair(folder), SHAPES["qwen3-4b"])
    tensors["lm_head.weight"] = tensors["lm_head.weight"].float()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CannotInflateError, match=r"torch\.float32, needed is torch\.bfloat16"):
        require_inflatable(open_pair(folder), SHAPES["qwen3-8b"])


def test_qwen3_shapes_suit_the_shipped_pair() -> None:
    """All four published sizes, without writing them."""
    for shape in SHAPES.values():
        require_inflatable(open_pair(TINY), shape)


def test_a_missing_shard_is_named(written: Path, tmp_path: Path) -> None:
    """A copy that broke off is told before anything is computed."""
    out = tmp_path / "broken"
    shutil.copytree(written, out)
    next(out.glob("model-00003*")).unlink()
    with pytest.raises(CheckpointError, match="names model-00003"):
        open_pair(out)


def test_probe_and_device_are_validated() -> None:
    """A block without context, and devices that are not there."""
    pair = open_pair(TINY)
    probe = make_probe(pair)
    assert probe.tokens.shape == (2, 24)
    assert int(probe.anchors.max()) + pair.spec.block_size == 24  # the text reaches its end
    with pytest.raises(ValueError, match="length is 8, needed is 9 to"):
        make_probe(pair, length=8)
    with pytest.raises(ValueError, match="needed is auto, cpu or cuda"):
        pick_device("tpu")
