"""Every peer under the same load: throughput, latency and acceptance, arm by arm.

    python -m benchmarks.sweep --target FOLDER --out FILE.json

A closed loop: C requests are in flight at any time, and 6·C prompts are sent, so that the batch
is full but for the last requests. All arms get the same prompts, output lengths, sampling
parameters, seeds, `max_num_seqs`, CUDA graph sizes and KV cache. Online, each arm is a `vllm
serve` loaded by `vllm bench serve`; offline it is `LLM` in a process of its own. The file is
written after every pass: a sweep that was interrupted, or whose arm failed, goes on where it
stopped when the same command is given again.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from benchmarks import results_format
from benchmarks.arms import ArmSpec, standard_arms
from benchmarks.engine_settings import GRAPHS, EngineSettings, settle
from benchmarks.errors import plain_errors
from benchmarks.measuring import Plan, console, describe, measure
from benchmarks.options import checkpoint_name, numbers
from benchmarks.prompts import PYTHON_TEXT, load_prompts
from benchmarks.provenance import provenance
from benchmarks.records import require_same_settings
from benchmarks.results_format import Arm, Sweep, SweepSettings
from benchmarks.runners import prompt_count
from vllm_dspark.config import DSparkConfig
from vllm_dspark.drafters import find_drafter

app = typer.Typer(help=__doc__)

USUAL = EngineSettings(
    loads=(1, 4, 16, 64, 128, 256),
    max_num_seqs=256,
    dtype="bfloat16",
    kv_cache_gib=16.0,
    graphs="vllm",
)


def open_sweep(
    out: Path, settings: SweepSettings, arms: dict[str, ArmSpec], together: int
) -> Sweep:
    """What `out` has already, with an entry for every arm.

    Raises:
        OSError: it cannot be read, or its folder cannot be made.
        RecordError: it is no sweep.
        typer.BadParameter: it was made with other settings, or another arm of the same name.
    """
    if out.exists():
        sweep = results_format.load(out)
        require_same_settings(out, sweep.settings.flat(), settings.flat())
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
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
@plain_errors
def main(
    target: Annotated[str, typer.Option(help="Folder or hub id of the target.")],
    out: Annotated[Path, typer.Option(help="JSON to write; what it has already is kept.")],
    mode: Annotated[str, typer.Option(help="offline (LLM) or online (vllm serve)")] = "offline",
    drafter: Annotated[
        str | None, typer.Option(help="Default: beside the target, or the published one.")
    ] = None,
    dataset: Annotated[str, typer.Option(help="See benchmarks/prompts.py.")] = PYTHON_TEXT,
    chat: Annotated[bool, typer.Option(help="Put questions into the chat template.")] = True,
    arms: Annotated[str, typer.Option(help="Names, comma-separated; all if empty.")] = "",
    variant: Annotated[
        list[str] | None, typer.Option(help="NAME=JSON: an arm of ours; see arms.py.")
    ] = None,
    concurrencies: Annotated[
        str | None, typer.Option(help="Requests in flight; 1,4,16,64,128,256, on a CPU 1,4,8.")
    ] = None,
    temperatures: Annotated[str, typer.Option(help="0 is greedy.")] = "0,1",
    repeats: Annotated[int, typer.Option(min=1, help="Passes of each.")] = 1,
    prompts_per_slot: Annotated[int, typer.Option(min=1, help="Prompts / C.")] = 6,
    min_prompts: Annotated[int, typer.Option(min=1, help="Prompts at least.")] = 12,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens a request, at most.")] = 256,
    length_spread: Annotated[
        float, typer.Option(min=0, max=1, help="The shortest has this share less.")
    ] = 0.5,
    ignore_eos: Annotated[bool, typer.Option(help="Each request to its full length.")] = True,
    max_model_len: Annotated[int, typer.Option(help="Prompt and output, tokens.")] = 1024,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, help="Of every engine; 256, on a CPU 8.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of weights and activations; bfloat16, on a CPU float32.")
    ] = None,
    drafting: Annotated[str, typer.Option(help="greedy or probabilistic")] = "probabilistic",
    graphs: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(GRAPHS)}, see engine_options; vllm, on a CPU none."),
    ] = None,
    near_context: Annotated[int, typer.Option(help="See arms.standard_arms.")] = 256,
    kv_cache_gib: Annotated[
        float | None, typer.Option(help="KV cache of each arm; 16, on a CPU 0.25.")
    ] = None,
    together: Annotated[int, typer.Option(min=1, help="Arms up at a time, driven in turn.")] = 1,
    port: Annotated[int | None, typer.Option(help="Online: default is a free one.")] = None,
    seed: Annotated[int, typer.Option(help="Of engines, prompts and requests.")] = 0,
) -> None:
    """Run what FILE lacks; exit code 1 if something is still missing at the end."""
    import torch

    if mode not in ("offline", "online"):
        raise typer.BadParameter("mode is offline or online")
    if port is not None and together > 1:
        raise typer.BadParameter("--port needs --together 1")
    has_gpu = torch.cuda.is_available()
    engine = settle(
        USUAL, has_gpu, max_num_seqs=max_num_seqs, dtype=dtype, kv_cache_gib=kv_cache_gib,
        graphs=graphs,
        loads=None if concurrencies is None else numbers("--concurrencies", concurrencies, int, 1),
    )  # fmt: skip
    heats = numbers("--temperatures", temperatures, float, 0.0)
    drafter = find_drafter(target, {}) if drafter is None else drafter
    every = standard_arms(
        drafter, drafting, near_context=near_context, variants=_variants(variant or [])
    )
    names = [name.strip() for name in arms.split(",") if name.strip()]
    if unknown := [name for name in names if name not in every]:
        raise typer.BadParameter(f"unknown arms {unknown}; known are {list(every)}")
    chosen = {name: spec for name, spec in every.items() if not names or name in names}
    settings = SweepSettings(
        mode=_mode(mode), target=checkpoint_name("--target", target),
        drafter=checkpoint_name("--drafter", drafter), dataset="", dataset_digest="0" * 64,
        prompts_per_slot=prompts_per_slot, min_prompts=min_prompts,
        max_tokens=max_tokens, max_model_len=max_model_len, max_num_seqs=engine.max_num_seqs,
        dtype=engine.dtype, drafting=drafting, seed=seed,
        extra={
            "chat": chat, "ignore_eos": ignore_eos, "near_context": near_context,
            "kv_cache_gib": engine.kv_cache_gib,
            "graph_tokens": engine.max_num_seqs * 8 if has_gpu else 0,
        }
        | ({"length_spread": length_spread} if length_spread else {})
        | ({} if engine.graphs == "decode" else {"graphs": engine.graphs}),
    )  # fmt: skip
    # As many as the largest load could need, so that a load added later sees the same ones.
    count = prompt_count(settings, engine.max_num_seqs)
    prompts = load_prompts(dataset, target, count, seed=seed, chat=chat)
    settings.dataset, settings.dataset_digest = prompts.name, prompts.digest
    sweep = open_sweep(out, settings, chosen, together)
    cells = sweep.missing(chosen, engine.loads, heats, repeats)
    plan = Plan(target, prompts, chosen, cells, together, port, has_gpu)
    for polite in (signal.SIGINT, signal.SIGTERM):
        signal.signal(polite, signal.default_int_handler)
    try:
        measure(plan, sweep, out)
    except KeyboardInterrupt:
        console.print("interrupted; what was measured is kept")
    lacking = sweep.missing(chosen, engine.loads, heats, repeats)
    for cell in lacking:
        console.print(f"missing: {describe(cell)}", highlight=False)
    console.print(f"{len(cells) - len(lacking)} of {len(cells)} runs made; python -m "
                  f"benchmarks.report {out} draws and tabulates them", soft_wrap=True)  # fmt: skip
    raise typer.Exit(bool(lacking))


def _variants(words: list[str]) -> dict[str, Any]:
    variants = {}
    for word in words:
        name, _, options = word.partition("=")
        try:
            variants[name] = json.loads(options)
            ours = {k: v for k, v in variants[name].items() if k != "speculative_config"}
            DSparkConfig.from_additional_config({"dspark": ours})
        except (ValueError, AttributeError) as error:  # no JSON, or none of an object
            raise typer.BadParameter(f"--variant {word!r} is no NAME=JSON: {error}") from None
    return variants


def _mode(word: str) -> Literal["offline", "online"]:
    return "online" if word == "online" else "offline"


if __name__ == "__main__":
    app()
