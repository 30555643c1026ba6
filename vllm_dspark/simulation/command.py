"""`vllm-dspark simulate`: from options and files to tables, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from vllm_dspark import __version__
from vllm_dspark.outputs import make_ready, replacing
from vllm_dspark.scheduler.cost_model import CostModel
from vllm_dspark.scheduler.depth import Goal
from vllm_dspark.simulation import inputs, planning, tables
from vllm_dspark.simulation.acceptance import Drafter, conditional_acceptance
from vllm_dspark.simulation.engine import LAUNCH_MS, Engine
from vllm_dspark.simulation.fitting import Fit, fit_engine
from vllm_dspark.simulation.loads import MOST_REPLICAS
from vllm_dspark.simulation.measured import Measured
from vllm_dspark.simulation.options import Options, SimulationError
from vllm_dspark.simulation.validation import validate
from vllm_dspark.simulation.workload import Lengths

Printable = Table | str
_NAMED = ("device", "vllm", "dtype", "ranks")  # of a profile's key, in the line about it
_ACCEPTANCE = "Fix: --acceptance 0.8,0.7,…, or a sweep with arms of fixed γ"
_FITTED = "Fix: a sweep with an arm without speculation and arms of fixed γ"
DEFAULT_CONCURRENCIES = (1, 4, 16, 64, 128, 256)
DEFAULT_MAX_NUM_SEQS = 256


def plan(options: Options) -> Iterator[Printable]:
    """Every policy at every load.

    Yields:
        Lines and tables to print.

    Raises:
        SimulationError, OutputError: see there.
    """
    _check_outputs(options)
    kind: planning.LoadKind = "rate" if options.rate else "concurrency"
    measured = _measured(options)
    drafter = _drafter(options, measured, None)
    if options.fixed and max(options.fixed) > drafter.gamma:
        raise SimulationError(
            f"--fixed must lie in 1..{drafter.gamma}, got {max(options.fixed)}. Fix: at most as "
            f"many as acceptance is known of"
        )
    engine, source = _engine(options, measured, drafter)
    lengths = measured.lengths if measured and options.output is None else None
    floor = options.floor
    task = planning.Plan(
        engine, drafter,
        lengths or Lengths(options.prompt, options.output or 256),
        gpus=options.gpus,
        fixed=options.fixed or tuple(d for d in (1, 2, 3, 5, 7) if d <= drafter.gamma),
        goal=Goal() if floor is None else Goal("floor", floor),
        by_block=verifies_by_block(options, measured),
        requests=options.requests, seconds=options.seconds, seed=options.seed,
        **({"most_context": measured.most_context} if measured else {}),
    )  # fmt: skip
    yield source
    if measured and not options.acceptance:
        yield from _extrapolated(options, measured)
    yield f"conditional acceptance: {' '.join(f'{c:.2f}' for c in drafter.conditional)}"
    if options.gpus > 1:
        yield _fleet_line(kind, options.gpus)
    loads = options.rate or options.concurrency or DEFAULT_CONCURRENCIES
    points = list(planning.sweep(task, kind, loads))
    yield tables.plan_table(points)
    yield from tables.plan_notes(points, engine.most_requests)
    kept = {"engine": source, "max_num_seqs": engine.most_requests}
    _write(options.json, {**kept, "points": [point.to_dict() for point in points]})
    if options.plot is not None:
        yield _draw(points, options.plot)


def check(options: Options) -> Iterator[Printable]:
    """Fit on every other fixed arm of a sweep and the longest, predict the rest.

    Yields:
        Lines and tables to print.

    Raises:
        SimulationError, OutputError: see there.
    """
    _check_outputs(options)
    measured = _measured(options)
    if measured is None:
        raise SimulationError("validation needs a sweep. Fix: --sweep FILE")
    gammas = _gammas(options, measured)
    fitted = (0, *sorted({*gammas[::2], gammas[-1]}))
    drafter = _drafter(options, measured, fitted)
    fit = _fit(options, measured, fitted, drafter)
    yield _fit_line(fit, fitted)
    yield from _extrapolated(options, measured)
    by_block = verifies_by_block(options, measured)
    rows = validate(measured, fit, drafter, fitted, options.seed + 1, by_block)
    yield tables.validation_table(rows)
    yield tables.validation_line(rows)
    figures = {"engine": _fit_line(fit, fitted), "rows": [row.to_dict() for row in rows]}
    _write(options.json, figures)


def _check_outputs(options: Options) -> None:
    if options.json is not None:
        make_ready("--json", options.json)
    if options.plot is not None:
        make_ready("--plot", options.plot, (".png",))


def _measured(options: Options) -> Measured | None:
    if options.sweep is None:
        return None
    return inputs.sweep(options.sweep, options.prompt, options.temperature)


def verifies_by_block(options: Options, measured: Measured | None) -> bool:
    """Whether ours verifies drafts as blocks: by default where they were drawn."""
    if options.blocks is not None:
        return options.blocks
    return measured is not None and measured.drawn


def _gammas(options: Options, measured: Measured) -> list[int]:
    gammas = sorted({arm.gamma for arm in measured.arms if arm.kind == "fixed"})
    if not gammas:
        raise SimulationError(f"--sweep {options.sweep}: it has no arm of a fixed γ. {_FITTED}")
    return gammas


def _extrapolated(options: Options, measured: Measured) -> Iterator[str]:
    """A line about what no fixed arm of the sweep tells of, if there is anything."""
    longest = _gammas(options, measured)[-1]
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
        known = _gammas(options, measured) if gammas is None else gammas
        lengths = measured.accepted_lengths(known)
        with inputs.blaming(f"--sweep {options.sweep}", _ACCEPTANCE):
            conditional = conditional_acceptance(lengths, measured.gamma)
    return Drafter(conditional, options.sharpness, options.noise, options.overconfidence)


def _engine(options: Options, measured: Measured | None, drafter: Drafter) -> tuple[Engine, str]:
    """And where its costs come from."""
    given_ms = LAUNCH_MS if options.launch_ms is None else options.launch_ms
    slots = options.max_num_seqs
    if slots is None:
        slots = measured.most_requests if measured else DEFAULT_MAX_NUM_SEQS
    if options.profile is not None:
        cost, key = inputs.profile(options.profile)
        if cost.gamma < drafter.gamma:
            raise SimulationError(
                f"--profile {options.profile}: the profile knows up to {cost.gamma} drafts, "
                f"acceptance was given of {drafter.gamma}. Fix: --acceptance of {cost.gamma}"
            )
        named = ", ".join(f"{name} {key[name]}" for name in _NAMED if name in key)
        return Engine(cost, given_ms, slots), f"costs: a profile, {named or key}"
    if measured is not None:
        gammas = (0, *_gammas(options, measured))
        fit = _fit(options, measured, gammas, drafter)
        return Engine(fit.engine.cost, fit.engine.launch_ms, slots), _fit_line(fit, gammas)
    cost = CostModel.default(drafter.gamma)
    return Engine(cost, given_ms, slots), "costs: a guess, an 8B model on one H200"


def _fit(options: Options, measured: Measured, gammas: Sequence[int], drafter: Drafter) -> Fit:
    with inputs.blaming(f"--sweep {options.sweep}", _FITTED):
        return fit_engine(measured, gammas, drafter, options.seed)


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


def _write(path: Path | None, figures: dict[str, Any]) -> None:
    if path is not None:
        kept = {"vllm_dspark": __version__, **figures}
        text = json.dumps(kept, indent=1, ensure_ascii=False) + "\n"
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")


def _draw(points: Sequence[planning.Point], path: Path) -> str:
    from vllm_dspark.simulation.plots import draw

    try:
        with replacing(path) as partial:
            draw(points, partial)
    except ImportError:
        raise SimulationError(
            'a picture needs matplotlib. Fix: pip install "vllm-dspark[bench]"'
        ) from None
    return f"picture: {path}"
