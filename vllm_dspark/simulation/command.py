"""`vllm-dspark simulate`: from options and files to tables, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_dspark import __version__
from vllm_dspark.scheduler.cost_model import CostModel
from vllm_dspark.scheduler.depth import Goal
from vllm_dspark.simulation import planning, tables
from vllm_dspark.simulation.acceptance import Drafter, conditional_acceptance
from vllm_dspark.simulation.engine import LAUNCH_MS, Engine
from vllm_dspark.simulation.fitting import Fit, fit_engine
from vllm_dspark.simulation.loads import MOST_REPLICAS
from vllm_dspark.simulation.measured import Measured, read_sweep
from vllm_dspark.simulation.validation import validate
from vllm_dspark.simulation.workload import Lengths

Printable = Table | str
_NAMED = ("device", "vllm", "dtype", "ranks")  # of a profile's key, in the line about it
DEFAULT_CONCURRENCIES = (1, 4, 16, 64, 128, 256)


class SimulationError(ValueError):
    """What was asked for cannot be simulated; the message says why and what to do."""


@dataclass(frozen=True)
class Options:
    """What the command line gave; None is not given."""

    profile: Path | None = None
    sweep: Path | None = None
    acceptance: Sequence[float] = ()
    sharpness: float = 1.0
    noise: float = 0.5
    overconfidence: float = 0.0
    concurrency: Sequence[float] = ()
    rate: Sequence[float] = ()
    gpus: int = 1
    prompt: int = 64
    output: int | None = None
    fixed: Sequence[int] = ()
    floor: float | None = None  # tok/s per user
    requests: int = 8
    seconds: float = 60.0
    most_requests: int = 256
    launch_ms: float | None = None
    seed: int = 0
    json: Path | None = None
    plot: Path | None = None


def plan(options: Options) -> Iterator[Printable]:
    """Every policy at every load.

    Yields:
        Lines and tables to print.

    Raises:
        SimulationError: see there.
    """
    kind: planning.LoadKind = "rate" if options.rate else "concurrency"
    if options.rate and options.concurrency:
        raise SimulationError("give a concurrency or a rate, not both")
    measured = _measured(options)
    drafter = _drafter(options, measured, None)
    engine, source = _engine(options, measured, drafter)
    lengths = measured.lengths if measured and options.output is None else None
    floor = options.floor
    task = planning.Plan(
        engine, drafter,
        lengths or Lengths(options.prompt, options.output or 256),
        gpus=options.gpus,
        fixed=options.fixed or tuple(d for d in (1, 2, 3, 5, 7) if d <= drafter.gamma),
        goal=Goal() if floor is None else Goal("floor", floor),
        requests=options.requests, seconds=options.seconds, seed=options.seed,
        **({"most_context": measured.most_context} if measured else {}),
    )  # fmt: skip
    yield source
    if measured and not options.acceptance:
        yield from _extrapolated(measured)
    yield f"conditional acceptance: {' '.join(f'{c:.2f}' for c in drafter.conditional)}"
    if options.gpus > 1:
        yield _fleet_line(kind, options.gpus)
    loads = options.rate or options.concurrency or DEFAULT_CONCURRENCIES
    points = list(planning.sweep(task, kind, loads))
    yield tables.plan_table(points)
    _write(options.json, {"engine": source, "points": [point.to_dict() for point in points]})
    if options.plot is not None:
        yield _draw(points, options.plot)


def check(options: Options) -> Iterator[Printable]:
    """Fit on every other fixed arm of a sweep and the longest, predict the rest.

    Yields:
        Lines and tables to print.

    Raises:
        SimulationError: see there.
    """
    measured = _measured(options)
    if measured is None:
        raise SimulationError("validation needs a sweep. Fix: --sweep FILE")
    gammas = _gammas(measured)
    fitted = (0, *sorted({*gammas[::2], gammas[-1]}))
    drafter = _drafter(options, measured, fitted)
    fit = fit_engine(measured, fitted, drafter, options.seed)
    yield _fit_line(fit, fitted)
    yield from _extrapolated(measured)
    rows = validate(measured, fit, drafter, fitted, options.seed + 1)
    yield tables.validation_table(rows)
    yield tables.validation_line(rows)
    figures = {"engine": _fit_line(fit, fitted), "rows": [row.to_dict() for row in rows]}
    _write(options.json, figures)


def _measured(options: Options) -> Measured | None:
    if options.sweep is None:
        return None
    return read_sweep(_read(options.sweep), options.prompt)


def _gammas(measured: Measured) -> list[int]:
    gammas = sorted({arm.gamma for arm in measured.arms if arm.kind == "fixed"})
    if not gammas:
        raise SimulationError("the sweep has no arm of a fixed γ")
    return gammas


def _extrapolated(measured: Measured) -> Iterator[str]:
    """A line about what no fixed arm of the sweep tells of, if there is anything."""
    longest = _gammas(measured)[-1]
    if longest < measured.gamma:
        yield (
            f"the sweep has arms of γ = {measured.gamma}, but no fixed one beyond {longest}: later "
            f"drafts are taken to be accepted as the last known one, at costs that rise on"
        )


def _drafter(options: Options, measured: Measured | None, gammas: Sequence[int] | None) -> Drafter:
    """As given, or from these arms of the sweep, all if None."""
    conditional: Any = list(options.acceptance)
    if not conditional:
        if measured is None:
            raise SimulationError(
                "nothing says what is accepted. Fix: --acceptance 0.8,0.7,… or --sweep FILE"
            )
        lengths = measured.accepted_lengths(_gammas(measured) if gammas is None else gammas)
        conditional = conditional_acceptance(lengths, measured.gamma)
    return Drafter(conditional, options.sharpness, options.noise, options.overconfidence)


def _engine(options: Options, measured: Measured | None, drafter: Drafter) -> tuple[Engine, str]:
    """And where its costs come from."""
    given_ms = LAUNCH_MS if options.launch_ms is None else options.launch_ms
    if options.profile is not None:
        text = _read(options.profile)
        try:
            key = dict(json.loads(text)["key"])
        except (ValueError, KeyError, TypeError) as error:
            raise SimulationError(f"{options.profile} holds no cost profile: {error!r}") from None
        cost = CostModel.from_json(text, key)
        if cost.gamma < drafter.gamma:
            raise SimulationError(
                f"the profile knows up to {cost.gamma} drafts, acceptance was given of "
                f"{drafter.gamma}"
            )
        named = ", ".join(f"{name} {key[name]}" for name in _NAMED if name in key)
        return Engine(cost, given_ms, options.most_requests), f"costs: a profile, {named or key}"
    if measured is not None:
        gammas = (0, *_gammas(measured))
        fit = fit_engine(measured, gammas, drafter, options.seed)
        return fit.engine, _fit_line(fit, gammas)
    cost = CostModel.default(drafter.gamma)
    return Engine(cost, given_ms, options.most_requests), "costs: a guess, an 8B model on one H200"


def _fit_line(fit: Fit, gammas: Sequence[int]) -> str:
    arms = ", ".join("no speculation" if gamma == 0 else f"γ = {gamma}" for gamma in gammas)
    return (
        f"costs: fitted to the sweep's {arms}, {fit.error:.1%} off (root mean square); steps with "
        f"a prefill take {fit.engine.launch_ms:g} ms at least"
    )


def _fleet_line(kind: planning.LoadKind, gpus: int) -> str:
    if kind == "concurrency":
        return f"{gpus} GPUs: the router gives all the same number of requests, one is simulated"
    few = min(gpus, MOST_REPLICAS)
    return f"{gpus} GPUs: {few} simulated behind a least-loaded router, their sum scaled up"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise SimulationError(f"cannot read {path}: {error.strerror}") from None


def _write(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        kept = {"vllm_dspark": __version__, **figures}
        path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def _draw(points: Sequence[planning.Point], path: Path) -> str:
    from vllm_dspark.simulation.plots import draw

    try:
        draw(points, path)
    except ImportError:
        raise SimulationError(
            'a picture needs matplotlib. Fix: pip install "vllm-dspark[bench]"'
        ) from None
    return f"picture: {path}"
