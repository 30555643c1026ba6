"""Our proposer against vLLM's built-in one, verifying all of γ, side by side on one machine.

    python -m benchmarks.proposer compare --target examples/tiny-python --out FILE.json

At each concurrency C both arms have an engine up at the same time, in processes of their own,
with max_num_seqs=C. They are timed in turn, pass by pass (ABBA), on the same 6·C prompts, so the
batch is full but for the last few requests and a slow moment of the machine meets both. The
figure is the median over passes; the spread between passes is stated beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import provenance

ARMS = {"built-in": False, "ours": True}

app = typer.Typer(help=__doc__)


@app.command(hidden=True)
def arm(options: Annotated[str, typer.Argument(help="JSON, see `compare`")]) -> None:
    """One engine. Prints a line of JSON when ready, then one for every line it reads."""
    from vllm import LLM, SamplingParams

    o = json.loads(options)
    concurrency, gamma = o["concurrency"], o["gamma"]
    llm = LLM(
        o["target"],
        dtype=o["dtype"],
        max_model_len=1024,
        max_num_seqs=concurrency,
        max_num_batched_tokens=8192,
        # Two engines start at the same time: neither may size itself by what is free just then.
        gpu_memory_utilization=0.2,
        kv_cache_memory_bytes=o["kv_cache_gib"] << 30,
        enable_prefix_caching=False,
        disable_log_stats=False,
        seed=0,
        compilation_config={
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": _capture_sizes(concurrency * (gamma + 1)),
        },
        speculative_config={
            "method": "dspark",
            "num_speculative_tokens": gamma,
            "draft_sample_method": o["drafting"],
        },
        additional_config={"dspark": {"enabled": o["enabled"]}},
    )
    prompts = [f"import os\n\n# {i}\ndef function_{i}(" for i in range(6 * concurrency)]
    params = [
        SamplingParams(
            temperature=o["temperature"], max_tokens=o["max_tokens"], ignore_eos=True, seed=i
        )
        for i in range(len(prompts))
    ]

    def timed_pass() -> dict[str, Any]:
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        return {
            "tokens_per_second": sum(map(len, tokens)) / seconds,
            "tokens_crc32": zlib.crc32(json.dumps(tokens).encode()),
            "accepted_length": _accepted_length(llm),
        }

    _answer(timed_pass())  # warm-up
    for _ in sys.stdin:
        _answer(timed_pass())


def _answer(result: dict[str, Any]) -> None:
    print("RESULT " + json.dumps(result), flush=True)


def _capture_sizes(limit: int) -> list[int]:
    sizes = [1, 2, 4, *range(8, 65, 8), *range(96, 257, 32), *range(320, 2049, 64)]
    return [size for size in sizes if size <= limit]


def _accepted_length(llm: Any) -> float:
    """Tokens emitted per round since the engine started, the target's own included."""
    totals: dict[str, float] = {}
    for metric in llm.get_metrics():
        if hasattr(metric, "value"):
            totals[metric.name] = totals.get(metric.name, 0.0) + metric.value
    accepted = totals["vllm:spec_decode_num_accepted_tokens"]
    return 1 + accepted / totals["vllm:spec_decode_num_drafts"]


class Arm:
    """A running `arm` process, in a process group of its own."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.proposer", "arm",
             json.dumps(options | {"enabled": ARMS[name]})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            start_new_session=True,
        )  # fmt: skip

    def result(self) -> dict[str, Any]:
        """The next answer. Raises RuntimeError with the process's last lines if it ended."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()[-40:]
        raise RuntimeError(
            f"arm {self.name} ended with {self._process.wait()}:\n" + "\n".join(lines)
        )

    def run(self) -> dict[str, Any]:
        """One timed pass."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.result()

    def stop(self) -> None:
        """End the process and its engine."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def both_arms(options: dict[str, Any]) -> Iterator[dict[str, Arm]]:
    """Both arms, started at the same time and warmed up; nothing is left behind."""
    arms = {name: Arm(name, options) for name in ARMS}
    try:
        for one in arms.values():
            one.result()
        yield arms
    finally:
        for one in arms.values():
            one.stop()


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
    kv_cache_gib: Annotated[int, typer.Option(help="KV cache of each engine, GiB.")] = 2,
) -> None:
    """Both arms at every concurrency; writes JSON after each, prints a table at the end."""
    console = Console()
    settings = {
        "target": str(target), "temperature": temperature, "drafting": drafting,
        "max_tokens": max_tokens, "dtype": dtype, "gamma": gamma, "kv_cache_gib": kv_cache_gib,
    }  # fmt: skip
    kept: dict[str, Any] = {"settings": settings, "runs": {}}
    if out.is_file():
        kept = json.loads(out.read_text())
    if kept["settings"] != settings:
        raise typer.BadParameter(f"{out} holds other settings: {kept['settings']}")
    for concurrency in map(int, concurrencies.split(",")):
        if str(concurrency) in kept["runs"]:
            continue
        console.print(f"concurrency {concurrency}: starting both engines")
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ARMS}
        with both_arms(settings | {"concurrency": concurrency}) as arms:
            for turn in range(passes):
                for name in sorted(ARMS, reverse=bool(turn % 2)):
                    runs[name].append(arms[name].run())
        kept["runs"][str(concurrency)] = runs
        kept["provenance"] = provenance()
        out.write_text(json.dumps(kept, indent=1) + "\n")
    console.print(_table(kept["runs"]))


def _table(all_runs: dict[str, dict[str, list[dict[str, Any]]]]) -> Table:
    table = Table(
        "concurrency", "built-in tok/s", "ours tok/s", "ours / built-in", "spread", "same"
    )
    for concurrency, runs in all_runs.items():
        rates = {name: [r["tokens_per_second"] for r in runs[name]] for name in ARMS}
        median = {name: statistics.median(values) for name, values in rates.items()}
        spread = max((max(v) - min(v)) / median[name] for name, v in rates.items())
        tokens = {r["tokens_crc32"] for name in ARMS for r in runs[name]}
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
