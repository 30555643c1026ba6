"""The `vllm-dspark` command."""

from __future__ import annotations

import enum
import importlib.metadata
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_dspark import __version__, compat, cpu
from vllm_dspark.cpu.becoming import CannotRunError, become

app = typer.Typer(help="DSpark speculative decoding for vLLM.", no_args_is_help=True)


@app.command(
    "cpu",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def run_on_cpu(
    command: Annotated[list[str], typer.Argument(help="Program and arguments, behind --.")],
) -> None:
    """Run COMMAND with vLLM's kernels in Triton's interpreter: no GPU needed, exact, slow."""
    program = shutil.which(command[0])
    if program is None:
        raise typer.BadParameter(f"found no program named {command[0]!r} on PATH")
    try:
        become(program, command)
    except CannotRunError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


class Drafting(str, enum.Enum):
    """How drafts are sampled, in vLLM's words."""

    greedy = "greedy"
    probabilistic = "probabilistic"


@app.command()
def calibrate(
    target: Annotated[Path, typer.Argument(help="Folder of the target.")],
    drafter: Annotated[
        Path | None, typer.Option(help="Folder of the drafter; default: beside the target.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSON lines with prompt or turns, or text, one a line.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Artifact to write; default: beside the drafter.")
    ] = None,
    diagram: Annotated[
        Path | None,
        typer.Option(help="PNG, PDF or SVG to draw; default: the artifact's name with .png."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0)] = 1.0,
    drafting: Annotated[
        Drafting, typer.Option(help="As the server will draft.")
    ] = Drafting.probabilistic,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens a request.")] = 256,
    chat: Annotated[bool, typer.Option(help="Put prompts into the chat template.")] = True,
    dtype: Annotated[str, typer.Option(help="As the server will have it.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(min=2)] = None,
) -> None:
    """Make a drafter's confidences honest: run the pair, fit a temperature for every position."""
    from vllm_dspark import calibrate as calibration  # numpy comes with vLLM, which may be missing
    from vllm_dspark.calibration.artifact import ARTIFACT_NAME
    from vllm_dspark.drafters import find_drafter

    console = Console(highlight=False)
    try:
        folder = Path(find_drafter(str(target), {})) if drafter is None else drafter
        out = folder / ARTIFACT_NAME if out is None else out
        engine: dict[str, Any] = {"dtype": dtype}
        if max_model_len is not None:
            engine["max_model_len"] = max_model_len
        result = calibration.run_command(
            str(target), str(folder), prompts, out, diagram or out.with_suffix(".png"),
            sampling={"temperature": temperature, "top_p": top_p, "drafting": drafting.value},
            max_tokens=max_tokens, chat=chat, engine=engine,
        )  # fmt: skip
    except (ValueError, RuntimeError, OSError) as error:
        line = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            line = f"{error.filename}: {error.strerror}. Needed is a path that can be read, or "
            line += "written if it is --out or --diagram. Fix: correct it"
        console.print(line, style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    console.print(result.table())
    for line in result.notes:
        console.print(line, markup=False, soft_wrap=True)
    raise typer.Exit(not result.written)


@app.command()
def simulate(
    profile: Annotated[
        Path | None, typer.Option(help="Cost profile, as a server caches it.")
    ] = None,
    sweep: Annotated[
        Path | None, typer.Option(help="A sweep's JSON: costs and acceptance are fitted to it.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Of the sweep's runs; default: its highest.")
    ] = None,
    acceptance: Annotated[
        str, typer.Option(help="By position, given acceptance before: 0.8,0.7,…")
    ] = "",
    sharpness: Annotated[float, typer.Option(min=0.0, help="How much drafts differ, logits.")] = 1,
    noise: Annotated[float, typer.Option(min=0.0, help="Of the confidence head, logits.")] = 0.5,
    overconfidence: Annotated[float, typer.Option(help="Of the confidence head, logits.")] = 0.0,
    blocks: Annotated[
        bool | None,
        typer.Option(help="Ours verifies drafts as blocks; default: where the sweep drew them."),
    ] = None,
    concurrency: Annotated[str, typer.Option(help="Requests in flight per GPU, several.")] = "",
    rate: Annotated[str, typer.Option(help="Poisson arrivals per second and GPU, several.")] = "",
    gpus: Annotated[int, typer.Option(min=1, help="Replicas behind a router.")] = 1,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 64,
    output: Annotated[
        int | None, typer.Option(min=1, help="Tokens a request emits; default: the sweep's, or 256")
    ] = None,
    fixed: Annotated[str, typer.Option(help="Depths of fixed arms, several.")] = "",
    floor: Annotated[
        float | None, typer.Option(min=0.0, help="tok/s that ours is to give each user.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="For each one in flight.")] = 8,
    seconds: Annotated[float, typer.Option(min=1.0, help="Of arrivals, with --rate.")] = 60.0,
    max_num_seqs: Annotated[
        int | None,
        typer.Option(min=1, help="Requests that run at once; default: the sweep's, or 256"),
    ] = None,
    launch_ms: Annotated[
        float | None, typer.Option(min=0.0, help="Least ms of a step with a prefill.")
    ] = None,
    validate: Annotated[bool, typer.Option(help="Predict arms of the sweep from others.")] = False,
    json: Annotated[Path | None, typer.Option(help="File to write the figures to.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG to draw.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all chance.")] = 0,
) -> None:
    """Replay the scheduler over modelled costs: throughput, tok/s/user and depth by load."""
    console = Console(highlight=False)
    try:
        from vllm_dspark.simulation import command
        from vllm_dspark.simulation.options import Options, numbers, whole_numbers
    except ModuleNotFoundError as error:
        if error.name != "numpy":  # which comes with vLLM, and that may be missing
            raise
        console.print("simulate needs numpy. Fix: pip install numpy", style="red")
        raise typer.Exit(1) from None
    try:
        options = Options(
            profile, sweep, temperature,
            numbers("--acceptance", acceptance, "0.8,0.7", most=1.0),
            sharpness, noise, overconfidence, blocks,
            whole_numbers("--concurrency", concurrency, "1,16,64"),
            numbers("--rate", rate, "10,40"), gpus, prompt, output,
            whole_numbers("--fixed", fixed, "1,3"), floor, requests, seconds,
            max_num_seqs, launch_ms, validate, seed, json, plot,
        )  # fmt: skip
        for part in command.check(options) if validate else command.plan(options):
            console.print(part, markup=False, soft_wrap=isinstance(part, str))
    except (ValueError, OSError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None


@app.command()
def doctor() -> None:
    """Tell whether the plugin can work here, and list every seam into vLLM it would use."""
    console = Console()
    problems: list[str] = []
    console.print(f"vllm-dspark {__version__}, needs vLLM {compat.supported_range()}")
    try:
        console.print(f"vLLM {compat.require_supported_vllm()}: supported")
    except compat.IncompatibleVllmError as error:
        problems.append(str(error))
    entry_points = importlib.metadata.entry_points(group="vllm.general_plugins")
    if "dspark" not in entry_points.names:
        problems.append("vLLM cannot see the plugin: reinstall vllm-dspark")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "dspark" not in allowed.split(","):
        problems.append(f"VLLM_PLUGINS={allowed} leaves the plugin out")
    if not problems:
        console.print(_device_line())
        console.print(_ledger(problems))
    for problem in problems:
        console.print(f"[red]problem:[/red] {problem}", highlight=False)
    console.print("nothing is wrong" if not problems else f"{len(problems)} problem(s)")
    raise typer.Exit(bool(problems))


def _device_line() -> str:
    import torch

    from vllm_dspark.integration.platform import has_triton

    if torch.cuda.is_available():
        return f"GPU: {torch.cuda.get_device_name()}"
    if has_triton():
        return "no GPU; kernels run in Triton's interpreter"
    return "no GPU; start vLLM with `vllm-dspark cpu -- vllm ...` to run without one"


def _ledger(problems: list[str]) -> Any:
    from vllm_dspark.integration.ledger import (
        ENGINE_SEAMS,
        FRONT_END_SEAMS,
        INTERPRETER_SEAMS,
        REQUEST_SEAMS,
    )

    table = Table(title="Seams into vLLM", show_lines=True)
    for column in ("target", "when", "reason", "goes when vLLM has", "fits"):
        table.add_column(column, overflow="fold")
    groups = [
        ("plugin loads", REQUEST_SEAMS),
        ("DSpark asked for", FRONT_END_SEAMS),
        ("DSpark asked for, in the worker", ENGINE_SEAMS),
    ]
    if cpu.is_active():
        groups.append(("plugin loads under `vllm-dspark cpu`", INTERPRETER_SEAMS))
    for when, patches in groups:
        for patch in patches:
            try:
                patch.check()
                fits = "yes"
            except compat.IncompatibleVllmError as error:
                problems.append(str(error))
                fits = "no"
            table.add_row(patch.target, when, patch.reason, patch.upstream, fits)
    return table


def main() -> None:
    """Entry point of the `vllm-dspark` command."""
    app()


if __name__ == "__main__":
    main()
