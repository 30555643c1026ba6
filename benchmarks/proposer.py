"""Our proposer against vLLM's built-in one, verifying all of γ, side by side on one machine.

    python -m benchmarks.proposer --target examples/tiny-python --out FILE.json

Both arms have an engine up at the same time, in processes of their own. At each concurrency C they
are timed in turn, pass by pass (ABBA), in a closed loop over the same 6·C prompts, so that a slow
moment of the machine meets both. The figure is the median over passes; the spread between passes
is stated beside it.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.arms import ArmSpec
from benchmarks.engine_options import engine_environment, engine_options
from benchmarks.engine_process import EngineError, EngineProcess
from benchmarks.provenance import provenance
from benchmarks.runners import speculation

app = typer.Typer(help=__doc__)


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
def compare(
    target: Annotated[Path, typer.Option(help="Target with its drafter beside it.")],
    out: Annotated[Path, typer.Option(help="JSON to write; concurrencies in it are kept.")],
    concurrencies: Annotated[str, typer.Option(help="Requests in flight.")] = "1,16,64",
    passes: Annotated[int, typer.Option(help="Timed passes of each arm.")] = 8,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    drafting: Annotated[str, typer.Option(help="greedy or probabilistic")] = "greedy",
    max_tokens: Annotated[int, typer.Option(help="Tokens a request.")] = 256,
    dtype: Annotated[str, typer.Option(help="Type of weights and activations.")] = "bfloat16",
    gamma: Annotated[int, typer.Option(help="Drafts a round.")] = 7,
    kv_cache_gib: Annotated[float, typer.Option(help="KV cache of each engine.")] = 2.0,
) -> None:
    """Both arms at every concurrency; writes JSON after each, prints a table at the end."""
    console = Console()
    settings = {
        "target": str(target), "temperature": temperature, "drafting": drafting,
        "max_tokens": max_tokens, "dtype": dtype, "gamma": gamma, "kv_cache_gib": kv_cache_gib,
        "concurrencies": concurrencies,
    }  # fmt: skip
    kept: dict[str, Any] = {"settings": settings, "runs": {}}
    if out.is_file():
        kept = json.loads(out.read_text())
    if kept["settings"] != settings:
        raise typer.BadParameter(f"{out} holds other settings: {kept['settings']}")
    loads = [int(word) for word in concurrencies.split(",")]
    todo = [load for load in loads if str(load) not in kept["runs"]]
    if todo:
        _measure(settings, loads, todo, passes, kept, out, console)
    console.print(_table(kept["runs"]))


def _measure(
    settings: dict[str, Any],
    loads: list[int],
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
            out.write_text(json.dumps(kept, indent=1) + "\n")
    except EngineError as error:
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
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
