"""Our proposer against vLLM's built-in one, fixed γ, in turn on one machine.

    python -m benchmarks.proposer --target examples/tiny-python --out FILE.json

Each arm and concurrency C gets an engine of its own, in a process of its own, with
max_num_seqs=C, and 6·C prompts, so that the batch is full but for the last few requests. The
arms take turns; the figure is the median over all repeats, the spread is stated beside it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import provenance

ARMS = {"built-in": False, "ours": True}
CAPTURE_SIZES = [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512]

app = typer.Typer(help=__doc__)


@app.command()
def measure(
    arm: Annotated[str, typer.Option(help="built-in or ours")],
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")],
    target: Annotated[Path, typer.Option(help="Target with its drafter beside it.")],
    repeats: Annotated[int, typer.Option(help="Timed passes after a warm-up pass.")] = 3,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    drafting: Annotated[str, typer.Option(help="greedy or probabilistic")] = "greedy",
    max_tokens: Annotated[int, typer.Option(help="Tokens a request.")] = 256,
    dtype: Annotated[str, typer.Option(help="Type of weights and activations.")] = "bfloat16",
    gamma: Annotated[int, typer.Option(help="Drafts a round.")] = 7,
) -> None:
    """One arm at one concurrency; prints one line of JSON. Started by `compare`."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(target),
        dtype=dtype,
        max_model_len=1024,
        max_num_seqs=concurrency,
        max_num_batched_tokens=8192,
        gpu_memory_utilization=0.5,
        enable_prefix_caching=False,
        disable_log_stats=False,
        seed=0,
        compilation_config={
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [s for s in CAPTURE_SIZES if s <= concurrency * (gamma + 1)],
        },
        speculative_config={
            "method": "dspark",
            "num_speculative_tokens": gamma,
            "draft_sample_method": drafting,
        },
        additional_config={"dspark": {"enabled": ARMS[arm]}},
    )
    prompts = [f"import os\n\n# {i}\ndef function_{i}(" for i in range(6 * concurrency)]
    params = [
        SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True, seed=i)
        for i in range(len(prompts))
    ]
    rates, tokens = [], []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        elapsed = time.perf_counter() - started
        tokens = [list(o.outputs[0].token_ids) for o in outputs]
        rates.append(sum(map(len, tokens)) / elapsed)
    totals: dict[str, float] = {}
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:spec_decode") and hasattr(metric, "value"):
            totals[metric.name] = totals.get(metric.name, 0.0) + metric.value
    accepted = totals["vllm:spec_decode_num_accepted_tokens"]
    length = 1 + accepted / totals["vllm:spec_decode_num_drafts"]
    print("RESULT " + json.dumps({
        "arm": arm, "concurrency": concurrency, "tokens_per_second": rates[1:],
        "accepted_length": length, "tokens_digest": zlib.crc32(json.dumps(tokens).encode()),
    }))  # fmt: skip


@app.command()
def compare(
    target: Annotated[Path, typer.Option(help="Target with its drafter beside it.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    concurrencies: Annotated[str, typer.Option(help="Requests in flight.")] = "1,16,64",
    rounds: Annotated[int, typer.Option(help="Turns of both arms.")] = 2,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    drafting: Annotated[str, typer.Option(help="greedy or probabilistic")] = "greedy",
) -> None:
    """Both arms in turn at every concurrency; writes JSON, prints a table."""
    console = Console()
    runs: list[dict[str, Any]] = []
    for concurrency in map(int, concurrencies.split(",")):
        for turn in range(rounds):
            # The order alternates, so that neither arm always meets the warmer machine.
            for arm in sorted(ARMS, reverse=bool(turn % 2)):
                runs.append(_run(arm, concurrency, target, temperature, drafting))
                rate = statistics.median(runs[-1]["tokens_per_second"])
                console.print(f"{arm} at {concurrency}: {rate:.0f} tok/s")
    summary = _summary(runs)
    settings = {"temperature": temperature, "drafting": drafting, "target": target.name}
    out.write_text(
        json.dumps(
            {"provenance": provenance(), "settings": settings, "runs": runs, "summary": summary},
            indent=1,
        )
    )
    table = Table("concurrency", "built-in tok/s", "ours tok/s", "ours / built-in", "spread")
    for row in summary:
        table.add_row(
            str(row["concurrency"]),
            f"{row['built-in']:.0f}",
            f"{row['ours']:.0f}",
            f"{row['ratio']:.3f}",
            f"{row['spread']:.1%}",
        )
    console.print(table)


def _run(
    arm: str, concurrency: int, target: Path, temperature: float, drafting: str
) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.proposer", "measure", "--arm", arm]
    command += ["--concurrency", str(concurrency), "--target", str(target)]
    command += ["--temperature", str(temperature), "--drafting", drafting]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise RuntimeError(
        f"arm {arm} at {concurrency} gave no result (exit code {done.returncode}):\n"
        + "\n".join((done.stdout + done.stderr).splitlines()[-40:])
    )


def _summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over all turns; spread is (max − min) / median of the worse arm."""
    rows = []
    for concurrency in sorted({r["concurrency"] for r in runs}):
        rates = {
            arm: [
                rate
                for r in runs
                if r["arm"] == arm and r["concurrency"] == concurrency
                for rate in r["tokens_per_second"]
            ]
            for arm in ARMS
        }
        medians = {arm: statistics.median(values) for arm, values in rates.items()}
        rows.append(
            {"concurrency": concurrency}
            | medians
            | {
                "ratio": medians["ours"] / medians["built-in"],
                "spread": max((max(v) - min(v)) / medians[a] for a, v in rates.items()),
            }
        )
    return rows


if __name__ == "__main__":
    app()
