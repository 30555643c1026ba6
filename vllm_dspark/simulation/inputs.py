"""Files that a simulation starts from, refused with what they hold and what was needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_dspark.scheduler.cost_model import CostModel
from vllm_dspark.simulation.measured import Measured, held, read_sweep
from vllm_dspark.simulation.options import SimulationError

_SWEEP = "Fix: the JSON that `python -m benchmarks.sweep` writes"
_PROFILE = (
    "Fix: a cost profile, as a server keeps them in its cache (DSPARK_CACHE_DIR, or "
    "~/.cache/vllm-dspark/costs)"
)


def sweep(path: Path, prompt: int, temperature: float | None = None) -> Measured:
    """Measurements of a sweep; see `read_sweep`.

    Raises:
        SimulationError: it cannot be read, or is no sweep.
    """
    text = _text("--sweep", path, _SWEEP)
    with blaming(f"--sweep {path}", _SWEEP):
        return read_sweep(text, prompt, temperature)


def profile(path: Path) -> tuple[CostModel, dict[str, Any]]:
    """Costs, and what they hold for.

    Raises:
        SimulationError: it cannot be read, or is no cost profile.
    """
    text = _text("--profile", path, _PROFILE)
    with blaming(f"--profile {path}", _PROFILE):
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ValueError(f"it is no JSON: {error}") from None
        if not isinstance(data, dict) or not {"format", "key", "profile"} <= data.keys():
            raise ValueError(
                f"a cost profile is an object of format, key and profile, this is {held(data)}"
            )
        return CostModel.from_json(text, data["key"]), data["key"]


@contextmanager
def blaming(what: str, fix: str) -> Iterator[None]:
    """Errors of what is done meanwhile begin with `what` and end with `fix`.

    Raises:
        SimulationError: in the place of a ValueError.
    """
    try:
        yield
    except ValueError as error:
        raise SimulationError(f"{what}: {error}. {fix}") from None


def _text(option: str, path: Path, fix: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SimulationError(f"{option}: cannot read {path}: {error.strerror}. {fix}") from None
    except UnicodeDecodeError:
        raise SimulationError(f"{option} {path}: it is no text. {fix}") from None
