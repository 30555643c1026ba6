"""Files of one sweep as one: nothing lost, nothing counted twice, nothing mixed."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.results_format import Arm, Sweep
from benchmarks.results_merge import machines, merge, provenances
from tests.sweeps import PROVENANCE, arm, run, sweep


def test_arms_and_runs_are_united() -> None:
    """New arms come after, new runs of an old arm join it, an equal run counts once."""
    first = sweep({"a": arm("none", None, run(1, 10)), "b": arm("fixed", 1, run(1, 20))})
    second = sweep(
        {
            "c": arm("ours", 7, run(1, 30)),
            "a": arm("none", None, run(1, 10), run(4, 40), error="stopped", memory_gib=2.0),
        }
    )
    merged = merge([first, second])
    assert list(merged.arms) == ["a", "b", "c"]
    assert [r.tokens_per_second for r in merged.arms["a"].runs] == [10, 40]
    assert (merged.arms["a"].error, merged.arms["a"].memory_gib) == ("stopped", 2.0)
    merged.arms["b"].runs.clear()
    assert len(first.arms["a"].runs) == len(first.arms["b"].runs) == 1, "an input was changed"


def test_runs_differ_by_temperature_and_repeat_too() -> None:
    """Runs at one concurrency are all kept, and a start-up time that only the second file has.
    Catches runs of another temperature or repeat that pass for one and the same."""
    first = sweep({"a": arm("none", None, run(1, 10))})
    others = run(1, 11, temperature=0.0), run(1, 12, repeat=1)
    second = sweep({"a": arm("none", None, *others, startup_s=3.0)})
    merged = merge([first, second]).arms["a"]
    assert [r.tokens_per_second for r in merged.runs] == [10, 11, 12]
    assert merged.startup_s == 3.0


def test_every_provenance_is_kept() -> None:
    """Commands of all files, and of an arm that two files share, once each; merging twice too."""

    def with_command(command: str) -> Sweep:
        own = {**PROVENANCE, "command": f"arm {command}"}
        one = sweep({"a": arm("none", None, provenance=own)})
        one.provenance["command"] = command
        return one

    merged = merge([merge([with_command("x"), with_command("y")]), with_command("z")])
    commands = [one["command"] for one in provenances(merged)]
    assert sorted(commands) == ["arm x", "arm y", "arm z", "x", "y", "z"]
    assert commands[0] == "x"
    assert machines(merged) == ["NVIDIA H200, vLLM 0.33.0"]


def test_one_file_is_itself() -> None:
    """The report always merges; a single file must come out as it went in."""
    one = sweep({"a": arm("none", None, run(1, 10))})
    assert merge([one]) == one


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (sweep({}, max_tokens=64), "max_tokens: 256 and 64"),
        (sweep({"a": arm("fixed", 2)}), "'a' has options"),
        (sweep({"a": arm("fixed", None)}), "'a' has kind"),
        (sweep({"a": arm("none", None, run(1, 11))}), "two different runs at concurrency 1"),
    ],
    ids=["settings", "options", "kind", "run"],
)
def test_what_does_not_fit_is_refused(other: Sweep, complaint: str) -> None:
    """Each would put unlike figures into one column."""
    with pytest.raises(ValueError, match=complaint):
        merge([sweep({"a": arm("none", None, run(1, 10))}), other])


@pytest.mark.parametrize(
    "change", [{"gpu": "NVIDIA H100"}, {"versions": {"vllm": "0.32.0"}}], ids=["device", "vLLM"]
)
@pytest.mark.parametrize("place", ["sweep", "arm"])
def test_other_machine_is_refused(change: dict[str, Any], place: str) -> None:
    """A ratio between two GPUs, or two vLLMs, says nothing about the arms."""
    other = sweep({"b": Arm(options={}, kind="none", provenance={})})
    elsewhere = {**PROVENANCE, **change}
    if place == "sweep":
        other.provenance = elsewhere
    else:
        other.arms["b"].provenance = elsewhere
    with pytest.raises(ValueError, match="different machines"):
        merge([sweep({}), other])


def test_nothing_to_merge_is_refused() -> None:
    with pytest.raises(ValueError, match="no sweeps"):
        merge([])
