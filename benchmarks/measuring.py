"""The middle of a sweep: arms started, driven in turn, ended for certain."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks import results_format
from benchmarks.arms import ArmSpec
from benchmarks.engine_options import engine_environment, engine_options
from benchmarks.offline import OfflineRunner
from benchmarks.online import OnlineRunner
from benchmarks.prompts import PromptSet
from benchmarks.results_format import Cell, Sweep, SweepSettings
from benchmarks.runners import Runner

console = Console()


@dataclass(frozen=True)
class Plan:
    """What is still to be done, and how."""

    target: str
    prompts: PromptSet
    arms: dict[str, ArmSpec]
    cells: list[Cell]
    together: int
    port: int | None
    has_gpu: bool


def start(plan: Plan, arm: ArmSpec, settings: SweepSettings) -> Runner:
    """The arm's process, not waited for."""
    graphs = str(settings.extra.get("graphs", "decode"))
    options = engine_options(
        plan.target,
        arm,
        has_gpu=plan.has_gpu,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        graph_tokens=int(str(settings.extra["graph_tokens"])),
        graphs=graphs,
        kv_cache_gib=float(str(settings.extra["kv_cache_gib"])),
        gpu_share=0.9 / plan.together,
        seed=settings.seed,
    )
    env = engine_environment(arm, plan.has_gpu, graphs)
    if settings.mode == "online":
        return OnlineRunner(arm.name, options, env, plan.prompts, settings, plan.port)
    return OfflineRunner(arm.name, options, env, plan.prompts, settings)


@contextlib.contextmanager
def running(
    plan: Plan, names: Sequence[str], sweep: Sweep, out: Path
) -> Iterator[dict[str, Runner]]:
    """The arms `names`, up at the same time; those that do not start are left out, with the
    reason on record. Arms that profile no costs start together, the others one after the other once
    those are there: whoever profiles is to find the device idle. Whatever happens inside, none of
    them outlives it."""
    runners: dict[str, Runner] = {}
    together = [name for name in names if plan.arms[name].kind in ("none", "fixed")]
    others = [[name] for name in names if name not in together]
    try:
        for several in (together, *others):
            for name in several:
                with on_record(sweep, name, out, runners):
                    runners[name] = start(plan, plan.arms[name], sweep.settings)
            for name in [name for name in several if name in runners]:
                with on_record(sweep, name, out, runners):
                    sweep.arms[name].startup_s = runners[name].wait()
        yield runners
    finally:
        for runner in runners.values():
            runner.stop()


@contextlib.contextmanager
def on_record(sweep: Sweep, name: str, out: Path, runners: dict[str, Runner]) -> Iterator[None]:
    """An error inside ends this arm alone: it is said, kept in the file, and the arm stopped."""
    try:
        yield
    except Exception as error:
        sweep.arms[name].error = str(error)
        results_format.save(sweep, out)
        console.print(f"[red]{name}:[/red] {error}", markup=True, highlight=False, soft_wrap=True)
        runner = runners.pop(name, None)
        if runner is not None:
            runner.stop()


def measure(plan: Plan, sweep: Sweep, out: Path) -> None:
    """Make the runs of `plan`, saving after each."""
    names = [name for name in plan.arms if any(cell.arm == name for cell in plan.cells)]
    with Progress(console=console) as progress:
        bar = progress.add_task("sweep", total=len(plan.cells))
        for first in range(0, len(names), plan.together):
            group = names[first : first + plan.together]
            progress.update(bar, description=f"starting {', '.join(group)}")
            with running(plan, group, sweep, out) as runners:
                for cell in interleaved([c for c in plan.cells if c.arm in runners]):
                    if cell.arm not in runners:
                        continue  # it failed since
                    progress.update(bar, description=describe(cell))
                    with on_record(sweep, cell.arm, out, runners):
                        run = runners[cell.arm].run(*cell[1:])
                        arm = sweep.arms[cell.arm]
                        arm.runs.append(run)
                        arm.memory_gib = runners[cell.arm].memory_gib
                        results_format.save(sweep, out)
                        progress.console.print(
                            f"{describe(cell)}: {run.tokens_per_second:.0f} tok/s", highlight=False
                        )
                    progress.advance(bar)


def interleaved(cells: Sequence[Cell]) -> list[Cell]:
    """All arms at one load before the next, in turn forwards and backwards, so that a slow
    moment of the machine does not meet one arm alone."""
    loads: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        loads.setdefault(cell[1:], []).append(cell)
    return [
        cell
        for i, group in enumerate(loads.values())
        for cell in (reversed(group) if i % 2 else group)
    ]


def describe(cell: Cell) -> str:
    """One phrase for progress and errors."""
    return f"{cell.arm}, {cell.concurrency} at temperature {cell.temperature:g} (#{cell.repeat})"
