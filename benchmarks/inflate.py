"""A tiny pair, written at a large model's shape, computing the same function at its real cost.

    python -m benchmarks.inflate examples/tiny-python OUT --shape qwen3-8b
    vllm serve OUT --speculative-config dspark

`benchmarks/inflation` says how. The large pair is made and written shard by shard, then read back
layer by layer and run in fp32 beside the tiny one on two prompts. Only if logits, draft logits and
confidences agree to 1e-3 does the command succeed and write `inflation.json` into OUT: what went
in, what was found, how long it took and the most memory it held. There is no way to skip that.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.errors import in_words
from benchmarks.inflation.check import (
    TOLERANCE,
    InflationMismatchError,
    as_record,
    check_pair,
    pick_device,
)
from benchmarks.inflation.configs import drafter_config, target_config
from benchmarks.inflation.pair import CannotInflateError, open_pair, require_inflatable
from benchmarks.inflation.shapes import SHAPES, Shape, find_shape
from benchmarks.inflation.weights import Inflation
from benchmarks.inflation.write import copy_companions, write_checkpoint
from benchmarks.provenance import provenance

RECORD = "inflation.json"
DRAFTER = "dspark"  # subfolder of the target's, where `--speculative-config dspark` finds it

app = typer.Typer(help=__doc__)


def inflate(
    source: Path,
    out: Path,
    shape: Shape,
    *,
    drafter: Path | None = None,
    threads: int = 4,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Write the inflated pair to `out`, check it, and record both in `inflation.json`.

    Args:
        source: the tiny target's folder.
        out: a folder that is empty or not there.
        drafter: its drafter's, by default the only one inside `source`.
        threads: layers that are made and written together. Each is in memory.
        seed: of all random weights.
        device: where the check runs, see `pick_device`.

    Returns:
        What was written to `inflation.json`.

    Raises:
        CannotInflateError: the pair cannot become this shape, or `out` is not empty.
        InflationMismatchError: what was written does not agree with the tiny pair.
        ValueError: there is no such device.
    """
    check_device = pick_device(device)
    pair = open_pair(source, drafter)
    require_inflatable(pair, shape)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CannotInflateError(
            f"{out} is not empty, needed is a new or empty folder. Fix: name another."
        )
    started = time.perf_counter()
    inflation = Inflation(pair, shape, seed)
    words, layers = inflation.word_shards(), inflation.layer_shards()
    target_bytes = write_checkpoint(
        out, target_config(inflation), [*words, *layers], alone=len(words), threads=threads
    )
    drafter_bytes = write_checkpoint(
        out / DRAFTER, drafter_config(inflation), inflation.drafter_shards(), threads=threads
    )
    companions = copy_companions(source, out)
    written = time.perf_counter()
    differences = check_pair(pair, open_pair(out, out / DRAFTER), check_device)
    record = {
        "shape": dataclasses.asdict(shape),
        "settings": {"threads": threads, "seed": seed, "device": check_device.type},
        "source": {
            "target": pair.target.digests(),
            "drafter": pair.drafter.digests(),
        },
        "layers": inflation.real_layers,
        "draft_layers": inflation.real_draft_layers,
        "target_layer_ids": inflation.target_layer_ids,
        "copied": companions,
        "target_bytes": target_bytes,
        "drafter_bytes": drafter_bytes,
        "write_seconds": written - started,
        "check_seconds": time.perf_counter() - written,
        "peak_memory_bytes": peak_memory_bytes(),
        "tolerance": TOLERANCE,
        "largest_differences": as_record(differences),
        "provenance": provenance(),
    }
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return record


def peak_memory_bytes() -> int:
    """The most physical memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


@app.command()
def main(
    source: Annotated[Path, typer.Argument(help="Folder of the tiny target.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, new or empty.")],
    shape: Annotated[
        str, typer.Option(help=f"{', '.join(SHAPES)}, or a JSON file with a shape's fields.")
    ],
    drafter: Annotated[
        Path | None, typer.Option(help="Folder of its drafter, if SOURCE holds several.")
    ] = None,
    threads: Annotated[
        int, typer.Option(min=1, help="Layers made and written together, each in memory.")
    ] = 4,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
    device: Annotated[
        str, typer.Option(help="Where the check runs: cpu, cuda, or auto, a GPU if there is one.")
    ] = "auto",
) -> None:
    """Inflate, check, and say what it took."""
    try:
        record = inflate(
            source,
            out,
            find_shape(shape),
            drafter=drafter,
            threads=threads,
            seed=seed,
            device=device,
        )
    except (ValueError, OSError, InflationMismatchError) as error:
        typer.echo(f"inflate: {in_words(error)}", err=True)
        raise typer.Exit(1) from None
    Console().print(_table(record))


def _table(record: dict[str, Any]) -> Table:
    total = record["target_bytes"] + record["drafter_bytes"]
    rate = total / record["write_seconds"]
    table = Table("what", "value")
    table.add_row("target", f"{record['target_bytes'] / 1e9:.2f} GB")
    table.add_row("drafter", f"{record['drafter_bytes'] / 1e9:.2f} GB")
    table.add_row("written in", f"{record['write_seconds']:.1f} s ({rate / 1e9:.2f} GB/s)")
    table.add_row(
        "checked in", f"{record['check_seconds']:.1f} s on {record['settings']['device']}"
    )
    table.add_row("peak memory", f"{record['peak_memory_bytes'] / 1e9:.2f} GB")
    for quantity, difference in record["largest_differences"].items():
        table.add_row(f"largest difference of {quantity}", f"{difference['largest']:.1e}")
    return table


if __name__ == "__main__":
    app()
