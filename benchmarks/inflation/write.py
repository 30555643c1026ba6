"""Shards to disk as they are made, and what belongs beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from benchmarks.inflation.checkpoint import INDEX
from benchmarks.inflation.weights import Shard


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    shards: Sequence[Shard],
    *,
    alone: int = 0,
    threads: int,
) -> int:
    """Write `config.json`, a safetensors file per shard, and their index.

    Args:
        folder: made if it is not there.
        shards: in the order of the files.
        alone: the first so many are large and made one at a time.
        threads: of the others, how many are in memory together.

    Returns:
        Bytes of all tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]

    def write(file: str, shard: Shard) -> tuple[list[str], int]:
        tensors = shard()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors writes for the owner alone
        return list(tensors), sum(tensor.nbytes for tensor in tensors.values())

    def results() -> Iterator[tuple[list[str], int]]:
        yield from map(write, files[:alone], shards[:alone])
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(write, files[alone:], shards[alone:])

    weight_map, total = {}, 0
    for file, (names, size) in zip(files, results(), strict=True):
        weight_map.update(dict.fromkeys(names, file))
        total += size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n")
    return total


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copy tokenizer, chat template and generation config; the names of the copied files.

    Left behind are weights, `config.json` and the record of the tiny pair's training.
    """
    copied = []
    for path in sorted(source.iterdir()):
        weights = ".safetensors" in path.name
        if path.is_file() and not weights and path.name not in ("config.json", "training.json"):
            shutil.copyfile(path, folder / path.name)
            copied.append(path.name)
    return copied
