"""Command line: `python -m examples.training train|evaluate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers.utils.logging import disable_progress_bar

from vllm_dspark.heads import HEADS

from .corpus import Split, load_corpus
from .distill import GENERATED_SHARE
from .evaluate import chat_prompts, evaluate, greedy, text_prompts
from .export import folder_bytes, load_drafter, read_record, write_record
from .pipeline import (
    WITHOUT_MARKOV,
    Limits,
    make_drafters,
    make_streams,
    make_target,
    make_tokenizer,
)
from .placing import PlaceError, placed, require_place
from .presets import PRESETS
from .stream import documents, token_stream
from .target import load_target
from .tokenizer import load_tokenizer

disable_progress_bar()
PLACE = ("out", "overwrite")  # options that say where, not what
app = typer.Typer(add_completion=False, no_args_is_help=True)


def pick_device(name: str) -> torch.device:
    """`auto` takes the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # cuDNN's attention is the one backend that has been picky about broadcast masks.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name)


def command_line(context: typer.Context) -> str:
    """The command that was given, without folders: a record names no path of a machine."""
    words = ["python -m examples.training train"]
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if name == "text" and value is not None:
            words.append("--text DIR")
        elif name not in PLACE and source is not None and source.name == "COMMANDLINE":
            option = "--" + name.replace("_", "-").removesuffix("-after")
            if isinstance(value, bool):
                words.append(option if value else "--no-" + option[2:])
            else:
                words.append(f"{option} {value}")
    return " ".join(words)


@app.command()
def train(
    context: typer.Context,
    preset: Annotated[str, typer.Option(help=" or ".join(PRESETS))] = "tiny-python",
    out: Annotated[Path | None, typer.Option(help="default: examples/<preset>")] = None,
    steps_target: Annotated[int | None, typer.Option(min=1)] = None,
    steps_drafter: Annotated[int | None, typer.Option(min=1)] = None,
    max_seconds_target: Annotated[float, typer.Option(min=0.1)] = 150.0,
    max_seconds_drafter: Annotated[
        float, typer.Option(min=0.1, help="per drafter, generated text included")
    ] = 120.0,
    heads: Annotated[
        str | None, typer.Option(help="comma-separated Markov heads; none: no Markov bias")
    ] = None,
    draft_layers: Annotated[int | None, typer.Option(min=1, help="default: the preset's")] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="windows per target step")] = None,
    draft_batch_size: Annotated[
        int | None, typer.Option(min=2, help="windows per drafter step")
    ] = None,
    generated_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="of the drafter's windows")
    ] = GENERATED_SHARE,
    corpus_mb: Annotated[float | None, typer.Option(help="at most this much source")] = None,
    text: Annotated[
        Path | None, typer.Option(help="folder of Python source; default: this Python's library")
    ] = None,
    seed: int = 0,
    device: str = "auto",
    overwrite: Annotated[bool, typer.Option(help="replace the pair in OUT, at the end")] = False,
    reuse_target: Annotated[bool, typer.Option(help="train drafters for OUT's target")] = False,
    compile_target: Annotated[bool, typer.Option(help="torch.compile the target")] = False,
    evaluate_after: Annotated[bool, typer.Option("--evaluate/--no-evaluate")] = True,
) -> None:
    """Make a target and its drafters from nothing, and measure them.

    OUT stays as it is until all of them are trained.
    """
    if preset not in PRESETS:
        raise typer.BadParameter(f"{preset!r} is none of {', '.join(PRESETS)}")
    chosen = PRESETS[preset]
    if draft_layers is not None:
        chosen = replace(chosen, draft_layers=draft_layers)
    names = tuple(heads.split(",")) if heads else chosen.heads
    if unknown := [name for name in names if name not in (*HEADS, WITHOUT_MARKOV)]:
        known = ", ".join((*HEADS, WITHOUT_MARKOV))
        raise typer.BadParameter(f"--heads {','.join(unknown)}: known are {known}")
    folder = Path("examples") / preset if out is None else out
    try:
        require_place(folder, overwrite=overwrite, reuse_target=reuse_target)
    except PlaceError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    where = pick_device(device)
    corpus = load_corpus(chosen.corpus_megabytes if corpus_mb is None else corpus_mb, text)
    print(f"corpus: {corpus.num_files} files, {corpus.num_bytes / 1e6:.1f} MB", flush=True)
    limits = Limits(
        steps_target=steps_target or chosen.steps_target,
        steps_drafter=steps_drafter or chosen.steps_drafter,
        seconds_target=max_seconds_target,
        seconds_drafter=max_seconds_drafter,
        batch_size=batch_size or chosen.batch_size,
        draft_batch_size=draft_batch_size or chosen.draft_batch_size,
        command=command_line(context),
    )
    with placed(folder, keep_drafters=reuse_target) as work:
        if not reuse_target:
            make_tokenizer(chosen, corpus, work)
        streams = make_streams(corpus, work, where, seed)
        if not reuse_target:
            make_target(chosen, corpus, streams, work, limits, seed, compile_target)
        make_drafters(chosen, streams, work, names, limits, seed, generated_share)
    if evaluate_after:
        measure(folder, corpus.held_out, text=24, chat=8, tokens=128)
    size = folder_bytes(folder)
    print(f"{folder.name}: {size / 1e6:.2f} MB, limit {chosen.max_megabytes} MB", flush=True)
    if size > chosen.max_megabytes * 1e6:
        raise typer.Exit(code=1)


@app.command("evaluate")
def evaluate_command(
    folder: Annotated[Path, typer.Argument(help="a target's folder with its drafters")],
    corpus_mb: Annotated[float, typer.Option(help="at most this much source")] = 40.0,
    text: Annotated[int, typer.Option(min=1, help="pieces of held-out text")] = 24,
    chat: Annotated[int, typer.Option(min=1, help="held-out questions")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="per continuation")] = 128,
    write: Annotated[
        bool, typer.Option("--write/--no-write", help="the figures into FOLDER's training.json")
    ] = True,
) -> None:
    """Measure exported drafters on the CPU and enter the figures into `training.json`."""
    held_out = load_corpus(corpus_mb).held_out
    measure(folder, held_out, text=text, chat=chat, tokens=tokens, write=write)


def measure(
    folder: Path, held_out: Split, *, text: int, chat: int, tokens: int, write: bool = True
) -> None:
    """Evaluate every drafter in `folder` and print the figures; with `write` they are kept in its
    `training.json`."""
    cpu = torch.device("cpu")
    torch.set_num_threads(min(4, torch.get_num_threads()))  # more only wait for each other here
    tokenizer = load_tokenizer(folder)
    target = load_target(folder, cpu)
    stream = token_stream(tokenizer, documents(tokenizer, Split(texts=held_out.texts), 0), cpu)
    prompts = {
        "text": text_prompts(stream, text),
        "chat": chat_prompts(tokenizer, held_out, chat),
    }
    references = {
        kind: [greedy(target, prompt, tokens) for prompt in group]
        for kind, group in prompts.items()
    }
    record = read_record(folder)
    for path in sorted(folder.glob("dspark*/config.json")):
        name = path.parent.name
        drafter = load_drafter(path.parent, cpu)
        figures: dict[str, Any] = {"tokens": tokens, "temperature": 0}
        for kind, group in prompts.items():
            figures[kind] = evaluate(target, drafter, group, references[kind])
            show(f"{name} {kind}", figures[kind])
        record.setdefault("drafters", {}).setdefault(name, {})["speculative_decoding"] = figures
    if write:
        write_record(folder, record)


def show(label: str, figures: dict[str, Any]) -> None:
    """Print one evaluation."""
    print(
        f"{label}: accepted length {figures['accepted_length']:.2f} over {figures['rounds']} "
        f"rounds, {figures['ties']} ties, otherwise equal to greedy decoding"
    )
    for name in ("acceptance", "confidence"):
        row = " ".join("  -- " if v is None else f"{v:.3f}" for v in figures[name])
        print(f"  {name:10s} per position {row}", flush=True)


if __name__ == "__main__":
    app()
