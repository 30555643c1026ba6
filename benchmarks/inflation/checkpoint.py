"""Reading a checkpoint folder tensor by tensor, never more of it than is asked for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.errors import BenchmarkError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class CheckpointError(BenchmarkError, ValueError):
    """A folder is no checkpoint, or a broken one."""


class Checkpoint:
    """A folder with `config.json` and safetensors weights, in one file or in shards.

    Files are opened for each read and closed again: a file that stays mapped counts as memory
    of this process.

    Raises:
        CheckpointError: the folder lacks its config, its weights, or a shard of its index, or one
            of its JSON files is broken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"{folder} is no checkpoint: it has no config.json. Needed is a folder with "
                f"config.json and {SINGLE}. Fix: name such a one"
            )
        self.config = _read_json(folder / "config.json")
        self._file_of: dict[str, str] = {}
        if index.is_file():
            self._file_of = _read_json(index).get("weight_map", {})
        elif (folder / SINGLE).is_file():
            with safe_open(folder / SINGLE, "pt") as file:
                self._file_of = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise CheckpointError(
                f"{folder} has neither {SINGLE} nor {INDEX}, needed is one of them. Fix: name a "
                "folder with weights"
            )
        for name in self.files:
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder / INDEX} names {name}, which is not there. Fix: fetch the checkpoint "
                    "again"
                )

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._file_of)

    @property
    def files(self) -> list[str]:
        """Names of the weight files, sorted."""
        return sorted(set(self._file_of.values()))

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as it is stored, on the CPU."""
        with safe_open(self.folder / self._file_of[name], "pt") as file:
            return file.get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start .. stop - 1 of a matrix, on the CPU."""
        with safe_open(self.folder / self._file_of[name], "pt") as file:
            return file.get_slice(name)[start:stop]

    def below(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors whose names begin with `prefix`, by the rest of their names."""
        names = [name for name in self._file_of if name.startswith(prefix)]
        return {name.removeprefix(prefix): self.tensor(name) for name in names}

    def digests(self) -> dict[str, str]:
        """SHA-256 of config.json and of every weight file, by file name."""
        found = {}
        for name in ["config.json", *self.files]:
            digest = hashlib.sha256()
            with (self.folder / name).open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
            found[name] = digest.hexdigest()
        return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(
            f"{path} is broken JSON ({error}). Fix: fetch the checkpoint again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, needed is a JSON object")
    return content
