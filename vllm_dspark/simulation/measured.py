"""Measurements of a sweep (`python -m benchmarks.sweep`), as far as simulations need them."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_dspark.simulation.workload import Lengths

KINDS = ("none", "fixed", "built-in adaptive", "ours")
_NEAR_CONTEXT = "VLLM_ADAPTIVE_VERIFICATION_PROFILE_CONTEXT_LEN"


@dataclass(frozen=True)
class Cell:
    """One arm at one concurrency; means over repeats."""

    concurrency: int
    requests: int
    seconds: float
    tokens_per_second: float
    accepted_length: float | None  # None without speculation
    verified_per_request: float | None


@dataclass(frozen=True)
class MeasuredArm:
    """One configuration."""

    name: str
    kind: str  # one of KINDS
    gamma: int  # 0 without speculation
    profile_context: int | None  # tokens; None for what vLLM profiles at by itself
    cells: tuple[Cell, ...]  # by concurrency


@dataclass(frozen=True)
class Measured:
    """Arms of a sweep at one temperature, and what all ran with."""

    temperature: float
    drawn: bool  # drafts are, from the drafter's distribution
    lengths: Lengths
    most_requests: int
    most_context: int  # tokens of a request
    arms: tuple[MeasuredArm, ...]

    @property
    def gamma(self) -> int:
        """The largest γ of an arm, 0 if none speculates."""
        return max(arm.gamma for arm in self.arms)

    def accepted_lengths(self, gammas: Iterable[int]) -> dict[int, float]:
        """By γ, of fixed arms: tokens emitted per round, over all concurrencies by the number of
        requests."""
        lengths = {}
        for arm in self.arms:
            known = [cell for cell in arm.cells if cell.accepted_length is not None]
            if arm.kind == "fixed" and arm.gamma in gammas and known:
                weight = sum(cell.requests for cell in known)
                total = sum(cell.requests * (cell.accepted_length or 0.0) for cell in known)
                lengths[arm.gamma] = total / weight
        return lengths


def read_sweep(text: str, prompt: int, temperature: float | None = None) -> Measured:
    """From a sweep's JSON.

    Args:
        text: of the file.
        prompt: tokens of its prompts, which it does not say.
        temperature: one of the sweep's; the highest if None.

    Raises:
        ValueError: it is no sweep, and what it is, or has no runs at that temperature.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"it is no JSON: {error}") from None
    if not isinstance(data, dict) or not {"settings", "arms"} <= data.keys():
        raise ValueError(f"a sweep is an object of settings and arms, this is {held(data)}")
    try:
        settings, arms = data["settings"], data["arms"]
        runs = {name: arm["runs"] for name, arm in arms.items()}
        found = {run["temperature"] for several in runs.values() for run in several}
        wanted = max(found, default=0.0) if temperature is None else temperature
        if wanted not in found:
            others = ", ".join(f"{heat:g}" for heat in sorted(found)) or "none"
            raise ValueError(f"it has no runs at temperature {wanted:g}; it has some at: {others}")
        kept = {n: [r for r in rs if r["temperature"] == wanted] for n, rs in runs.items()}
        return Measured(
            temperature=float(wanted),
            drawn=wanted > 0 and settings.get("drafting") == "probabilistic",
            lengths=_lengths(prompt, settings),
            most_requests=int(settings["max_num_seqs"]),
            most_context=int(settings["max_model_len"]),
            # What an arm's engine has of its own is not simulated.
            arms=tuple(
                _arm(name, arms[name], rs)
                for name, rs in kept.items()
                if rs and not arms[name]["options"].get("engine")
            ),
        )
    except KeyError as error:
        raise ValueError(f"its settings, an arm or a run lack {error}") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"its settings or arms are not those of a sweep: {error}") from None


def held(data: Any) -> str:
    """What a JSON has at the top, for errors."""
    if not isinstance(data, dict):
        return f"a {type(data).__name__}"
    return f"one of {', '.join(list(data)[:6])}" if data else "an empty one"


def _lengths(prompt: int, settings: Mapping[str, Any]) -> Lengths:
    """Lengths are uniform in (1 − s) · most to most, with s the sweep's spread."""
    most = int(settings["max_tokens"])
    spread = float(settings["extra"].get("length_spread", 0.0))
    return Lengths(prompt, max(round(most * (1 - spread / 2)), 1), spread / (2 - spread))


def _arm(name: str, arm: Mapping[str, Any], runs: Iterable[Mapping[str, Any]]) -> MeasuredArm:
    by_concurrency = defaultdict(list)
    for run in runs:
        by_concurrency[run["concurrency"]].append(run)
    context = (arm["options"].get("env") or {}).get(_NEAR_CONTEXT)
    cells = (_cell(c, several) for c, several in sorted(by_concurrency.items()))
    return MeasuredArm(
        name=name,
        kind=arm["kind"],
        gamma=arm["gamma"] or 0,
        profile_context=None if context is None else int(context),
        cells=tuple(cells),
    )


def _cell(concurrency: int, runs: list[Mapping[str, Any]]) -> Cell:
    def mean(name: str) -> float | None:
        values = [run[name] for run in runs if run.get(name) is not None]
        return sum(values) / len(values) if values else None

    def known(name: str) -> float:
        value = mean(name)
        if not value:
            raise ValueError(f"its runs at concurrency {concurrency} lack {name}")
        return value

    return Cell(
        concurrency=concurrency,
        requests=runs[0]["prompts"],
        seconds=known("seconds"),
        tokens_per_second=known("tokens_per_second"),
        accepted_length=mean("accepted_length"),
        verified_per_request=mean("verified_per_request"),
    )
