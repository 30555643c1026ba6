"""A fingerprint of a checkpoint folder that is quick to take and changes with its weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

SAMPLE_BYTES = 1024
_INDEX = "model.safetensors.index.json"
# As safetensors has it: more is a damaged length, not a header.
_LONGEST_HEADER = 100_000_000


def checkpoint_digest(folder: str | Path) -> str:
    """sha256 over config.json and, for every safetensors file, its header, size and a sample.

    The sample is the middle `SAMPLE_BYTES` of every tensor: training that goes on, even of a
    single tensor, gives another digest, a few numbers changed elsewhere in a tensor do not.
    Less than a megabyte of an 8B checkpoint is read. The folder's name does not count, nor, if
    there is an index, do files that it does not list.

    Args:
        folder: with config.json and its weights as safetensors.

    Returns:
        64 hexadecimal digits.

    Raises:
        FileNotFoundError: no config.json, no weights, or a listed file is missing.
        ValueError: a file is truncated or no safetensors.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    _add(digest, b"config.json", (folder / "config.json").read_bytes())
    for name in _weight_files(folder):
        file = folder / name
        size = file.stat().st_size
        with file.open("rb") as stream:
            header = _header(stream, file, size)
            _add(digest, name.encode(), size.to_bytes(8, "little"), header)
            for start, end in _tensor_ranges(header, file, size):
                stream.seek(start + max(0, end - start - SAMPLE_BYTES) // 2)
                _add(digest, stream.read(min(SAMPLE_BYTES, end - start)))
    return digest.hexdigest()


def _add(digest: Any, *parts: bytes) -> None:
    """With its length before each part, so that no two lists of parts read alike."""
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def _weight_files(folder: Path) -> list[str]:
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
            return [str(name) for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is truncated or damaged: {error!r}") from None
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no safetensors files")
    return files


def _header(stream: BinaryIO, file: Path, size: int) -> bytes:
    length = int.from_bytes(stream.read(8), "little")
    if not 0 < length <= min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"{file} ({size} bytes) is truncated or no safetensors")
    return stream.read(length)


def _tensor_ranges(header: bytes, file: Path, size: int) -> list[tuple[int, int]]:
    """First byte and the one after the last of every tensor, in the file's order."""
    data = 8 + len(header)
    try:
        tensors = json.loads(header)
        tensors.pop("__metadata__", None)
        offsets = [tensor["data_offsets"] for tensor in tensors.values()]
        ranges = sorted((data + int(start), data + int(end)) for start, end in offsets)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} has a damaged header: {error!r}") from None
    if any(not data <= start <= end <= size for start, end in ranges):
        raise ValueError(f"{file} ({size} bytes) is truncated: its header promises more")
    return ranges
