"""The JSON of a sweep: what it refuses, what it answers, and how it gets to disk."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from benchmarks.results_format import Cell, Run, load, save
from tests.sweeps import arm, run, sweep, tiny


def test_round_trip(tmp_path: Path) -> None:
    """What is saved is what is loaded, optional fields present and absent, over an old file."""
    path = tmp_path / "sweep.json"
    path.write_text("old")
    before = tiny()
    before.settings.extra = {"nested": [1, None, {"a": 0.5}]}
    before.arms["fixed 1"].error = "out of memory"
    save(before, path)
    assert load(path) == before
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def _first_run(data: Any) -> Any:
    return data["arms"]["fixed 1"]["runs"][0]


PLACES: dict[str, Callable[[Any], Any]] = {
    "sweep": lambda data: data,
    "settings": lambda data: data["settings"],
    "arm": lambda data: data["arms"]["fixed 1"],
    "run": _first_run,
    "spread": lambda data: _first_run(data)["time_to_first_token_ms"],
}


@pytest.mark.parametrize("place", PLACES)
def test_unknown_key_is_refused(tmp_path: Path, place: str) -> None:
    """At every depth; the message names file and key. A model that lost `extra="forbid"`."""
    data = json.loads(tiny().model_dump_json())
    PLACES[place](data)["tokens_per_secnd"] = 1.0
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"sweep\.json.*tokens_per_secnd"):
        load(path)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ("sweep", "version", 2),  # a later format is not guessed at
        ("run", "tokens_per_second", "165.0"),  # strict: no number from text
        ("run", "tokens_per_second", 0.0),  # would divide a ratio
        ("run", "seconds", math.nan),  # JSON's NaN, which poisons every median
        ("run", "concurrency", 1.0),
        ("run", "accepted_length", 0.9),  # the target's own token always counts
        ("settings", "dataset_digest", "12ab"),
        ("settings", "target", "/home/someone/model"),
        ("settings", "drafter", "../model"),
        ("arm", "kind", "adaptive"),
    ],
)
def test_wrong_value_is_refused(tmp_path: Path, place: str, key: str, value: Any) -> None:
    """Each would end as a wrong figure, or a path of a machine, in a report."""
    data = json.loads(tiny().model_dump_json())
    PLACES[place](data)[key] = value
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=key):
        load(path)


def test_two_runs_of_one_cell_are_refused() -> None:
    """A run made twice would count twice in a median; another repeat or temperature is none."""
    arm("none", None, run(1, 10), run(1, 11, repeat=1), run(1, 12, temperature=0.0))
    with pytest.raises(ValidationError, match="two runs at concurrency 1"):
        arm("none", None, run(1, 10), run(1, 11))


def test_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    """A sweep that became invalid while it was filled must not replace a good file."""
    path = tmp_path / "sweep.json"
    good = tiny()
    save(good, path)
    bad = good.model_copy(deep=True)
    bad.arms["fixed 1"].runs.append(run(1, 999))
    with pytest.raises(ValidationError, match="two runs"):
        save(bad, path)
    assert load(path) == good


def test_crash_while_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old file stays whole and no temporary file is left beside it."""
    path = tmp_path / "sweep.json"
    save(tiny(), path)
    old = path.read_bytes()

    def full(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        save(sweep({}), path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.json"]


def test_missing() -> None:
    """Single repeats, other temperatures, and arms that are not there at all."""
    some = sweep({"a": arm("none", None, run(1, 10), run(1, 10, repeat=1), run(4, 30))})
    assert some.missing(["a"], [1], [1.0], 2) == []
    assert some.missing(["b", "a"], [1, 4], [1.0], 2) == [
        Cell("b", 1, 1.0, 0),
        Cell("b", 1, 1.0, 1),
        Cell("b", 4, 1.0, 0),
        Cell("b", 4, 1.0, 1),
        Cell("a", 4, 1.0, 1),
    ]
    assert some.missing(["a"], [1], [0.0, 1.0], 1) == [Cell("a", 1, 0.0, 0)]


def test_median_and_spread_over_repeats() -> None:
    """Of one cell alone, by hand: median of 10, 12, 20 is 12, spread (20 - 10) / 12."""
    one = arm(
        "fixed", 1,
        run(4, 20, repeat=2, accepted_length=1.5), run(4, 10), run(4, 12, repeat=1),
        run(4, 99, temperature=0.0), run(1, 99),
    )  # fmt: skip
    assert [r.repeat for r in one.repeats(4, 1.0)] == [0, 1, 2]
    assert one.median(4, 1.0, "tokens_per_second") == 12
    assert one.relative_spread(4, 1.0, "tokens_per_second") == pytest.approx(10 / 12)
    # 12 tok/s at 4 in flight is 3 tok/s/user, whose 99th percentile the helper puts at 3000 / 3.
    assert one.median(4, 1.0, "time_per_output_token_ms.p99") == pytest.approx(1000)
    assert one.median(4, 1.0, "accepted_length") == 1.5  # of the repeat that has it
    assert one.relative_spread(4, 1.0, "accepted_length") is None  # one value says nothing
    assert one.median(16, 1.0, "tokens_per_second") is None


@pytest.mark.parametrize(
    "field", ["tokens", "date", "time_per_output_token_ms", "seconds.p50", "accepted_length.p50"]
)
def test_median_of_no_number_is_refused(field: str) -> None:
    """A misspelt name must not look like a figure that was not measured."""
    with pytest.raises(ValueError, match=field):
        arm("none", None, run(1, 10)).median(1, 1.0, field)


def test_every_field_says_what_it_is() -> None:
    """The format is documented in place: no field without a description."""
    bare = [name for name, field in Run.model_fields.items() if not field.description]
    assert bare == []
