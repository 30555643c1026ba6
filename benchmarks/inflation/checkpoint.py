"""Reading a checkpoint folder tensor by tensor, never more of it than is asked for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    """A folder with `config.json` and safetensors weights, in one file or in shards.

    Files are opened for each read and closed again: a file that stays mapped counts as memory
    of this process.

    Raises:
        FileNotFoundError: the folder lacks its config, its weights, or a shard of its index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} is no checkpoint: it has no config.json")
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self._file_of: dict[str, str] = {}
        if index.is_file():
            self._file_of = json.loads(index.read_text())["weight_map"]
        elif (folder / SINGLE).is_file():
            with safe_open(folder / SINGLE, "pt") as file:
                self._file_of = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}")
        for name in self.files:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / INDEX} names {name}, which is not there")

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
