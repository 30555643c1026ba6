"""Our proposer against vLLM's built-in one, verifying all of γ, side by side on one machine.

    python -m benchmarks.proposer --target examples/tiny-python --out FILE.json

Both arms have an engine up at the same time, in processes of their own. At each concurrency C they
are timed in turn, pass by pass (ABBA), in a closed loop over the same 6·C prompts, so that a slow
moment of the machine meets both. The figure is the median over passes; the spread between passes
is stated beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import Field
from rich.console import Console
from rich.table import Table
from typing_extensions import NotRequired, TypedDict

from benchmarks.arms import ArmSpec
from benchmarks.engine_options import engine_environment, engine_options
from benchmarks.engine_process import EngineProcess
from benchmarks.engine_settings import EngineSettings, settle
from benchmarks.errors import plain_errors
from benchmarks.options import numbers
from benchmarks.provenance import provenance
from benchmarks.records import read_record, require_same_settings, save_record
from benchmarks.runners import speculation

app = typer.Typer(help=__doc__)

USUAL = EngineSettings(
    loads=(1, 16, 64), max_num_seqs=64, dtype="bfloat16", kv_cache_gib=2.0, graphs="decode"
)


class Pass(TypedDict):
    """One timed pass of one arm."""

    tokens_per_second: float
    tokens_crc32: int  # of all tokens that were emitted
    accepted_length: float


class Record(TypedDict):
    """The JSON: settings of all runs, then passes by concurrency and by arm."""

    settings: dict[str, Any]
    runs: dict[str, dict[Literal["built-in", "ours"], Annotated[list[Pass], Field(min_length=1)]]]
    provenance: NotRequired[dict[str, Any]]


def arms(gamma: int, drafting: str) -> dict[str, ArmSpec]:
    """The two proposers, told apart by nothing but the plugin's switch and its verification."""
    speculative = {
        "method": "dspark",
        "num_speculative_tokens": gamma,
        "draft_sample_method": drafting,
    }
    built_in = {"dspark": {"enabled": False}}
    ours = {"dspark": {"verification": "all", "depth": gamma}}
    return {
        "built-in": ArmSpec("built-in", "fixed", gamma, speculative, built_in),
        "ours": ArmSpec("ours", "fixed", gamma, speculative, ours),
    }


@app.command()
@plain_errors
def compare(
    target: Annotated[Path, typer.Option(help="Target with its drafter beside it.")],
    out: Annotated[Path, typer.Option(help="JSON to write; concurrencies in it are kept.")],
    concurrencies: Annotated[
        str | None, typer.Option(help="Requests in flight; 1,16,64, on a CPU 1,4,8.")
    ] = None,
    passes: Annotated[int, typer.Option(min=1, help="Timed passes of each arm.")] = 8,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    drafting: Annotated[str, typer.Option(help="greedy or probabilistic")] = "greedy",
    max_tokens: Annotated[int, typer.Option(help="Tokens a request.")] = 256,
    dtype: Annotated[
        str | None, typer.Option(help="Of weights and activations; bfloat16, on a CPU float32.")
    ] = None,
    gamma: Annotated[int, typer.Option(help="Drafts a round.")] = 7,
    kv_cache_gib: Annotated[
        float | None, typer.Option(help="KV cache of each engine; 2, on a CPU 0.25.")
    ] = None,
) -> None:
    """Both arms at every concurrency; writes JSON after each, prints a table at the end."""
    console = Console()
    kept = read_record(out, Record, "benchmarks.proposer")
    asked = None if concurrencies is None else numbers("--concurrencies", concurrencies, int, 1)
    engine = _engine(kept, asked, dtype, kv_cache_gib)
    settings = {
        "target": str(target), "temperature": temperature, "drafting": drafting,
        "max_tokens": max_tokens, "dtype": engine.dtype, "gamma": gamma,
        "kv_cache_gib": engine.kv_cache_gib,
    }  # fmt: skip
    if kept is None:
        kept = {"settings": settings, "runs": {}}
    kept["settings"].pop("concurrencies", None)  # once was there; every run says it by itself
    require_same_settings(out, kept["settings"], settings)
    todo = [load for load in engine.loads if str(load) not in kept["runs"]]
    if todo:
        _measure(settings, engine.loads, todo, passes, kept, out, console)
    console.print(_table(kept["runs"]))


def _engine(
    kept: dict[str, Any] | None,
    loads: list[int] | None,
    dtype: str | None,
    kv_cache_gib: float | None,
) -> EngineSettings:
    """What both engines have; what was not asked for (None) is as it is in the file where nothing
    is left to be run, so that any machine can show it."""
    import torch

    if kept is not None and loads is not None and {*map(str, loads)} <= kept["runs"].keys():
        old = kept["settings"]
        return EngineSettings(
            loads=tuple(loads),
            max_num_seqs=max(loads),
            dtype=old.get("dtype", USUAL.dtype) if dtype is None else dtype,
            kv_cache_gib=old.get("kv_cache_gib", USUAL.kv_cache_gib)
            if kv_cache_gib is None
            else kv_cache_gib,
            graphs=USUAL.graphs,
        )
    return settle(
        USUAL, torch.cuda.is_available(), loads=loads, dtype=dtype, kv_cache_gib=kv_cache_gib,
        max_num_seqs=None if loads is None else max(loads),
    )  # fmt: skip


def _measure(
    settings: dict[str, Any],
    loads: Sequence[int],
    todo: list[int],
    passes: int,
    kept: dict[str, Any],
    out: Path,
    console: Console,
) -> None:
    import torch
    from transformers import AutoTokenizer

    has_gpu, most = torch.cuda.is_available(), max(loads)
    texts = [f"import os\n\n# {i}\ndef function_{i}(" for i in range(6 * most)]
    engines: dict[str, EngineProcess] = {}
    try:
        for name, arm in arms(settings["gamma"], settings["drafting"]).items():
            options = engine_options(
                settings["target"], arm, has_gpu=has_gpu, dtype=settings["dtype"],
                max_model_len=1024, max_num_seqs=most, seed=0, gpu_share=0.4,
                graph_tokens=most * (settings["gamma"] + 1), kv_cache_gib=settings["kv_cache_gib"],
            )  # fmt: skip
            engines[name] = EngineProcess(name, options, engine_environment(arm, has_gpu))
        for engine in engines.values():
            engine.ready()
        tokenizer = AutoTokenizer.from_pretrained(settings["target"])
        prompts = [tokenizer(text).input_ids for text in texts]

        def timed(name: str, load: int) -> dict[str, Any]:
            result = engines[name].run(
                prompts=prompts[: 6 * load],
                concurrency=load,
                sampling={
                    "temperature": settings["temperature"],
                    "max_tokens": settings["max_tokens"],
                    "ignore_eos": True,
                },
                seed=0,
            )
            return {
                "tokens_per_second": result["tokens"] / result["seconds"],
                "tokens_crc32": result["tokens_crc32"],
                "accepted_length": speculation(result["counters"], result["tokens"])[
                    "accepted_length"
                ],
            }

        for load in todo:
            console.print(f"concurrency {load}")
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
            for name in engines:
                timed(name, load)  # warms up
            for turn in range(passes):
                for name in sorted(engines, reverse=bool(turn % 2)):
                    runs[name].append(timed(name, load))
            kept["runs"][str(load)] = runs
            kept["provenance"] = provenance()
            save_record(out, kept)
    finally:
        for engine in engines.values():
            engine.stop()


def _table(all_runs: dict[str, dict[str, list[dict[str, Any]]]]) -> Table:
    table = Table(
        "concurrency", "built-in tok/s", "ours tok/s", "ours / built-in", "spread", "same"
    )
    for concurrency, runs in all_runs.items():
        rates = {name: [r["tokens_per_second"] for r in passes] for name, passes in runs.items()}
        median = {name: statistics.median(values) for name, values in rates.items()}
        spread = max((max(v) - min(v)) / median[name] for name, v in rates.items())
        tokens = {r["tokens_crc32"] for passes in runs.values() for r in passes}
        table.add_row(
            concurrency,
            f"{median['built-in']:.0f}",
            f"{median['ours']:.0f}",
            f"{median['ours'] / median['built-in']:.3f}",
            f"{spread:.1%}",
            "yes" if len(tokens) == 1 else "no",
        )
    return table


if __name__ == "__main__":
    app()
