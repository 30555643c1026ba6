"""The fingerprint of a checkpoint: what changes it, what does not, what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from vllm_dspark.calibration.digest import SAMPLE_BYTES, checkpoint_digest

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "checkpoint")


def write(folder: Path) -> Path:
    """Two shards; tensors much larger than a sample, smaller than one, and empty."""
    folder.mkdir()
    random = np.random.default_rng(0)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 64}))
    shards = {
        "model-1.safetensors": {
            "large": random.random((64, 64), dtype=np.float32),
            "other": random.random((64, 64), dtype=np.float32),
        },
        "model-2.safetensors": {"small": np.ones(3, np.float32), "none": np.ones(0, np.float32)},
    }
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    return folder


def index(folder: Path) -> None:
    shards = {"large": "model-1.safetensors", "small": "model-2.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": shards}))


def change(name: str, tensor: str, factor: float = 1.001) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / name)
        tensors[tensor] *= factor
        save_file(tensors, folder / name)

    return apply


def rename(folder: Path) -> None:
    tensors = load_file(folder / "model-1.safetensors")
    tensors["another"] = tensors.pop("large")
    save_file(tensors, folder / "model-1.safetensors")


def swap(folder: Path) -> None:
    """Same numbers, same header: only where they are has changed."""
    tensors = load_file(folder / "model-1.safetensors")
    tensors["large"], tensors["other"] = tensors["other"], tensors["large"]
    save_file(tensors, folder / "model-1.safetensors")


CHANGES = {
    "config": lambda f: (f / "config.json").write_text(json.dumps({"hidden_size": 65})),
    "first_tensor": change("model-1.safetensors", "large"),
    "last_tensor": change("model-2.safetensors", "small"),
    "name": rename,
    "order": swap,
    "file_name": lambda f: (f / "model-2.safetensors").rename(f / "model-3.safetensors"),
    "file_gone": lambda f: (f / "model-2.safetensors").unlink(),
    "file_more": lambda f: save_file({"x": np.ones(3)}, f / "more.safetensors"),
}


@pytest.mark.parametrize("edit", CHANGES.values(), ids=CHANGES.keys())
def test_any_change_of_the_model_changes_it(folder: Path, edit: Callable[[Path], object]) -> None:
    before = checkpoint_digest(folder)
    edit(folder)
    assert checkpoint_digest(folder) != before


def test_same_model_elsewhere_is_the_same(folder: Path, tmp_path: Path) -> None:
    """Not its folder, nor files beside it, the artifact itself among them."""
    before = checkpoint_digest(folder)
    assert len(before) == 64
    assert checkpoint_digest(write(tmp_path / "other")) == before
    (folder / "dspark_calibration.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    assert checkpoint_digest(str(folder)) == before


def test_with_an_index_only_listed_files_count(folder: Path) -> None:
    """Hub snapshots may be fetched with or without a second copy of the weights."""
    index(folder)
    before = checkpoint_digest(folder)
    save_file({"x": np.ones(3)}, folder / "consolidated.safetensors")
    assert checkpoint_digest(folder) == before


def test_a_sample_is_read_not_everything(folder: Path) -> None:
    """What the docstring says about a few numbers: the middle is seen, the ends are not."""
    before = checkpoint_digest(folder)
    file = folder / "model-1.safetensors"
    for place, seen in ((0, False), (64 * 64 // 2, True)):
        tensors = load_file(file)
        assert tensors["large"].nbytes > 2 * SAMPLE_BYTES
        tensors["large"].flat[place] += 1
        save_file(tensors, file)
        assert (checkpoint_digest(folder) != before) == seen


def cut(folder: Path) -> None:
    file = folder / "model-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def header(content: bytes, length: int | None = None) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        size = struct.pack("<Q", len(content) if length is None else length)
        (folder / "model-1.safetensors").write_bytes(size + content)

    return apply


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "empty": lambda f: (f / "model-1.safetensors").write_bytes(b""),
    "endless_header": header(b"{}", 2**63),
    "no_json": header(b"nonsense"),
    "a_list": header(b"[]"),
    "no_offsets": header(b'{"a": {}}'),
    "bad_offsets": header(b'{"a": {"data_offsets": [5, "x"]}}'),
    "backwards": header(b'{"a": {"data_offsets": [0, -5]}}'),
    "index": lambda f: (f / INDEX).write_text('{"weight_map": '),
    "index_list": lambda f: (f / INDEX).write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_named(folder: Path, damage: Callable[[Path], object]) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=r"model(-1)?\.safetensors.*(truncated|damaged)"):
        checkpoint_digest(folder)


@pytest.mark.parametrize("missing", ["config.json", "model-2.safetensors", "*.safetensors"])
def test_what_is_missing_is_named(folder: Path, missing: str) -> None:
    if missing == "model-2.safetensors":
        index(folder)
    for file in list(folder.glob(missing)):
        file.unlink()
    with pytest.raises(FileNotFoundError, match=missing.strip("*.")):
        checkpoint_digest(folder)
