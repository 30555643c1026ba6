"""Every peer under the same load: throughput, latency and acceptance, arm by arm.

    python -m benchmarks.sweep --target FOLDER --out FILE.json

A closed loop: C requests are in flight at any time, and 6·C prompts are sent, so that the batch
is full but for the last requests. All arms get the same prompts, sampling parameters, seeds,
`max_num_seqs`, CUDA graph sizes and KV cache. Online, each arm is a `vllm serve` loaded by
`vllm bench serve`; offline it is `LLM` in a process of its own. The file is written after every
pass: a sweep that was interrupted, or whose arm failed, goes on where it stopped when the same
command is given again.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks import results_format
from benchmarks.arms import ArmSpec, standard_arms
from benchmarks.engine_options import engine_environment, engine_options
from benchmarks.offline import OfflineRunner
from benchmarks.online import OnlineRunner
from benchmarks.prompts import PYTHON_TEXT, PromptsError, PromptSet, load_prompts
from benchmarks.provenance import provenance
from benchmarks.results_format import Arm, Cell, Sweep, SweepSettings
from benchmarks.runners import Runner, prompt_count
from vllm_dspark.drafters import drafters_beside

app = typer.Typer(help=__doc__)
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
    options = engine_options(
        plan.target,
        arm,
        has_gpu=plan.has_gpu,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        graph_tokens=int(str(settings.extra["graph_tokens"])),
        kv_cache_gib=float(str(settings.extra["kv_cache_gib"])),
        gpu_share=0.9 / plan.together,
        seed=settings.seed,
    )
    env = engine_environment(arm, plan.has_gpu)
    if settings.mode == "online":
        return OnlineRunner(arm.name, options, env, plan.prompts, settings, plan.port)
    return OfflineRunner(arm.name, options, env, plan.prompts, settings)


@contextlib.contextmanager
def running(
    plan: Plan, names: Sequence[str], sweep: Sweep, out: Path
) -> Iterator[dict[str, Runner]]:
    """The arms `names`, up at the same time; those that do not start are left out, with the
    reason on record. Whatever happens inside, none of them outlives it."""
    runners: dict[str, Runner] = {}
    try:
        for name in names:
            with on_record(sweep, name, out, runners):
                runners[name] = start(plan, plan.arms[name], sweep.settings)
        for name in list(runners):
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


def open_sweep(
    out: Path, settings: SweepSettings, arms: dict[str, ArmSpec], together: int
) -> Sweep:
    """What `out` has already, with an entry for every arm.

    Raises:
        typer.BadParameter: it was made with other settings, or another arm of the same name.
    """
    if out.is_file():
        sweep = results_format.load(out)
        if sweep.settings != settings:
            old, new = sweep.settings.model_dump(), settings.model_dump()
            differ = ", ".join(f"{k} {old[k]!r} → {new[k]!r}" for k in new if old[k] != new[k])
            raise typer.BadParameter(f"{out} holds a sweep with other settings: {differ}")
    else:
        sweep = Sweep(version=1, settings=settings, provenance=provenance())
    for name, spec in arms.items():
        if name not in sweep.arms:
            sweep.arms[name] = Arm(
                options=spec.options(),
                gamma=spec.gamma,
                kind=spec.kind,
                provenance=provenance() | {"arms_up_together": together},
            )
        elif sweep.arms[name].options != spec.options():
            raise typer.BadParameter(f"{out} holds an arm {name!r} with other options")
        sweep.arms[name].error = None
    return sweep


@app.command()
def main(
    target: Annotated[str, typer.Option(help="Folder or hub id of the target.")],
    out: Annotated[Path, typer.Option(help="JSON to write; what it has already is kept.")],
    mode: Annotated[str, typer.Option(help="offline (LLM) or online (vllm serve)")] = "offline",
    drafter: Annotated[str | None, typer.Option(help="Default: beside the target.")] = None,
    dataset: Annotated[str, typer.Option(help="See benchmarks/prompts.py.")] = PYTHON_TEXT,
    chat: Annotated[bool, typer.Option(help="Put questions into the chat template.")] = True,
    arms: Annotated[str, typer.Option(help="Names, comma-separated; all if empty.")] = "",
    concurrencies: Annotated[str, typer.Option(help="Requests in flight.")] = "1,4,16,64,128,256",
    temperatures: Annotated[str, typer.Option(help="0 is greedy.")] = "0,1",
    repeats: Annotated[int, typer.Option(min=1, help="Passes of each.")] = 1,
    prompts_per_slot: Annotated[int, typer.Option(min=1, help="Prompts / C.")] = 6,
    min_prompts: Annotated[int, typer.Option(min=1, help="Prompts at least.")] = 12,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens a request.")] = 256,
    ignore_eos: Annotated[bool, typer.Option(help="All requests to the same length.")] = True,
    max_model_len: Annotated[int, typer.Option(help="Prompt and output, tokens.")] = 1024,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Of every engine.")] = 256,
    dtype: Annotated[str, typer.Option(help="Type of weights and activations.")] = "bfloat16",
    drafting: Annotated[str, typer.Option(help="greedy or probabilistic")] = "probabilistic",
    near_context: Annotated[int, typer.Option(help="See arms.standard_arms.")] = 256,
    kv_cache_gib: Annotated[float, typer.Option(help="KV cache of each arm.")] = 16.0,
    together: Annotated[int, typer.Option(min=1, help="Arms up at a time, driven in turn.")] = 1,
    port: Annotated[int | None, typer.Option(help="Online: default is a free one.")] = None,
    seed: Annotated[int, typer.Option(help="Of engines, prompts and requests.")] = 0,
) -> None:
    """Run what FILE lacks; exit code 1 if something is still missing at the end."""
    import torch

    if mode not in ("offline", "online") or (port is not None and together > 1):
        raise typer.BadParameter("mode is offline or online; --port needs --together 1")
    loads = [int(word) for word in concurrencies.split(",")]
    if max(loads) > max_num_seqs:
        raise typer.BadParameter(f"concurrency {max(loads)} needs --max-num-seqs {max(loads)}")
    beside = drafters_beside(target)
    if drafter is None and len(beside) != 1:
        found = f"{len(beside)} drafters beside {target}"
        raise typer.BadParameter(f"found {found}, needed one: name it with --drafter")
    drafter = str(beside[0]) if drafter is None else drafter
    heats = [float(word) for word in temperatures.split(",")]
    every = standard_arms(drafter, drafting, near_context=near_context)
    names = [name.strip() for name in arms.split(",") if name.strip()]
    if unknown := [name for name in names if name not in every]:
        raise typer.BadParameter(f"unknown arms {unknown}; known are {list(every)}")
    chosen = {name: spec for name, spec in every.items() if not names or name in names}
    settings = SweepSettings(
        mode=_mode(mode), target=Path(target).name if Path(target).is_dir() else target,
        drafter=Path(drafter).name if Path(drafter).is_dir() else drafter, dataset=dataset,
        dataset_digest="0" * 64, prompts_per_slot=prompts_per_slot, min_prompts=min_prompts,
        max_tokens=max_tokens, max_model_len=max_model_len, max_num_seqs=max_num_seqs, dtype=dtype,
        drafting=drafting, seed=seed,
        extra={
            "chat": chat, "ignore_eos": ignore_eos, "near_context": near_context,
            "kv_cache_gib": kv_cache_gib, "graph_tokens": max_num_seqs * 8,
        },
    )  # fmt: skip
    try:
        # As many as the largest load could need, so that a load added later sees the same ones.
        count = prompt_count(settings, max_num_seqs)
        prompts = load_prompts(dataset, target, count, seed=seed, chat=chat)
    except PromptsError as error:
        raise typer.BadParameter(str(error)) from None
    settings.dataset, settings.dataset_digest = prompts.name, prompts.digest
    sweep = open_sweep(out, settings, chosen, together)
    cells = sweep.missing(chosen, loads, heats, repeats)
    plan = Plan(target, prompts, chosen, cells, together, port, torch.cuda.is_available())
    for polite in (signal.SIGINT, signal.SIGTERM):
        signal.signal(polite, signal.default_int_handler)
    try:
        measure(plan, sweep, out)
    except KeyboardInterrupt:
        console.print("interrupted; what was measured is kept")
    lacking = sweep.missing(chosen, loads, heats, repeats)
    for cell in lacking:
        console.print(f"missing: {describe(cell)}", highlight=False)
    console.print(f"{len(cells) - len(lacking)} of {len(cells)} runs made; python -m "
                  f"benchmarks.report {out} draws and tabulates them", soft_wrap=True)  # fmt: skip
    raise typer.Exit(bool(lacking))


def _mode(word: str) -> Literal["offline", "online"]:
    return "online" if word == "online" else "offline"


if __name__ == "__main__":
    app()
