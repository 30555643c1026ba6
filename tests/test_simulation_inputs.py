"""Files to start from: an error says which file, what it holds and what was needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.simulations import cost_model
from tests.test_simulation_validation import made_up
from vllm_dspark.simulation import inputs
from vllm_dspark.simulation.options import SimulationError

WRITES = "Fix: the JSON that `python -m benchmarks.sweep` writes"
CACHED = "Fix: a cost profile, as a server keeps them in its cache"
NO_RUNS: dict[str, Any] = {"settings": {}, "arms": {"a": {"runs": []}}}
LACKING = {"settings": {}, "arms": {"a": {"runs": [{"temperature": 1.0}]}}}
FORMAT_2 = {"format": 2, "key": {}, "profile": {}}


def test_both_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(made_up(), encoding="utf-8")
    assert inputs.sweep(path, 32).lengths.prompt == 32
    path.write_text(cost_model().to_json({"device": "H200"}), encoding="utf-8")
    cost, key = inputs.profile(path)
    assert (cost.gamma, key) == (cost_model().gamma, {"device": "H200"})


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (b"", "it is no JSON"),
        (b"{", "it is no JSON"),
        (b"\xff\xfe\x00", "it is no text"),
        (b"[]", "an object of settings and arms, this is a list"),
        (b"{}", "this is an empty one"),
        (json.dumps(FORMAT_2).encode(), "this is one of format, key, profile"),
        (b'{"settings": {}, "arms": {"a": 1}}', "are not those of a sweep"),
        (json.dumps(NO_RUNS).encode(), "it has no runs at temperature 0"),
        (json.dumps(LACKING).encode(), "lack 'max_num_seqs'|lack 'max_tokens'"),
    ],
)
def test_what_is_no_sweep(tmp_path: Path, held: bytes, said: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(held)
    with pytest.raises(SimulationError, match=f"^--sweep {path}: .*({said}).*{WRITES}"):
        inputs.sweep(path, 32)


@pytest.mark.parametrize("name", ["seconds", "tokens_per_second"])
def test_a_sweep_without_times(tmp_path: Path, name: str) -> None:
    path = tmp_path / "file.json"
    data = json.loads(made_up())
    for run in data["arms"]["γ = 1"]["runs"]:
        del run[name]
    path.write_text(json.dumps(data))
    with pytest.raises(SimulationError, match=f"{path}: .* concurrency 1 lack {name}"):
        inputs.sweep(path, 32)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (b"not JSON", "it is no JSON"),
        (b"\xff\xfe\x00", "it is no text"),
        (b"[]", "an object of format, key and profile, this is a list"),
        (b'{"settings": 1, "arms": 2}', "this is one of settings, arms"),
        (json.dumps(FORMAT_2).encode(), "format 2, needed is 1"),
        (b'{"format": 1, "key": 3, "profile": {}}', "no cost model"),
        (b'{"format": 1, "key": {}, "profile": {}}', "not a step-time profile"),
    ],
)
def test_what_is_no_profile(tmp_path: Path, held: bytes, said: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(held)
    with pytest.raises(SimulationError, match=f"^--profile {path}: .*{said}.*{CACHED}"):
        inputs.profile(path)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no.json"):
        with pytest.raises(SimulationError, match=f"^--sweep: cannot read {path}: .*{WRITES}"):
            inputs.sweep(path, 32)
        with pytest.raises(SimulationError, match=f"^--profile: cannot read {path}: .*{CACHED}"):
            inputs.profile(path)


def test_blame_goes_to_the_file() -> None:
    with pytest.raises(SimulationError, match=r"^--sweep a: it has no arm\. Fix: arms$"):
        with inputs.blaming("--sweep a", "Fix: arms"):
            raise ValueError("it has no arm")
