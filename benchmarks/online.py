"""An arm driven over HTTP: `vllm serve`, loaded by `vllm bench serve`."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from benchmarks.engine_process import with_root_on_path
from benchmarks.prompts import PromptSet
from benchmarks.results_format import Run, Spread, SweepSettings
from benchmarks.runners import (
    output_lengths_of,
    prompt_count,
    speculation,
    steps_by_depth,
    today,
)
from vllm_dspark.server import VllmServer


class OnlineRunner:
    """`vllm serve`, driven by `vllm bench serve`."""

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        env: Mapping[str, str],
        prompts: PromptSet,
        settings: SweepSettings,
        port: int | None = None,
    ) -> None:
        self._name, self._target, self._settings = name, str(options["model"]), settings
        self.memory_gib: float | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="sweep-")
        self._dataset = Path(self._folder.name) / "prompts.jsonl"
        prompts.write(self._dataset, output_lengths_of(settings, len(prompts.texts)))
        words = serve_words({k: v for k, v in options.items() if k != "model"})
        # The development mode is what has /collective_rpc, by which the instruments are read.
        env = with_root_on_path(env) | {"VLLM_SERVER_DEV_MODE": "1"}
        self._started = time.monotonic()
        self._server = VllmServer(self._target, words, env=env, port=port)
        self._server.start()

    def wait(self) -> float:
        """See `Runner`; then a short pass at each temperature, which compiles what is left."""
        self._server.wait_until_healthy()
        startup_s = time.monotonic() - self._started
        self._counters()
        for temperature in (0.0, 1.0):
            self._bench(self._settings.max_num_seqs, temperature, self._settings.max_num_seqs, 8)
        return startup_s

    def run(self, concurrency: int, temperature: float, repeat: int) -> Run:
        """See `Runner`."""
        count = prompt_count(self._settings, concurrency)
        before = self._counters()
        result = self._bench(concurrency, temperature, count)
        self._server.check_alive()
        after = self._counters()
        grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
        self.memory_gib = after["memory_gib"] or None
        if result["completed"] != count:
            raise RuntimeError(
                f"arm {self._name}: {count - result['completed']} of {count} requests failed; "
                f"last lines of the server:\n{self._server.tail()}"
            )
        each, first = (
            Spread(
                mean=result[f"mean_{name}_ms"],
                p50=result[f"p50_{name}_ms"],
                p99=result[f"p99_{name}_ms"],
            )
            for name in ("tpot", "ttft")
        )
        return Run(
            concurrency=concurrency,
            temperature=temperature,
            repeat=repeat,
            prompts=count,
            output_tokens=result["total_output_tokens"],
            seconds=result["duration"],
            tokens_per_second=result["output_throughput"],
            tokens_per_second_per_user=1000 / each.mean,
            time_per_output_token_ms=each,
            time_to_first_token_ms=first,
            steps_by_depth=steps_by_depth(grown),
            date=today(),
            **speculation(grown, result["total_output_tokens"]),
        )

    def stop(self) -> None:
        """See `Runner`."""
        self._server.stop()
        self._folder.cleanup()

    def _bench(
        self, concurrency: int, temperature: float, count: int, limit: int = -1
    ) -> dict[str, Any]:
        """`vllm bench serve` with its own command line, in this process: it takes a while to
        import. A `limit` takes the place of the dataset's lengths."""
        from vllm.benchmarks import serve
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        serve.add_cli_args(parser)
        words = ["--base-url", self._server.url, "--model", self._target]
        words += ["--dataset-name", "custom", "--dataset-path", str(self._dataset)]
        words += ["--skip-chat-template", "--disable-shuffle", "--num-prompts", str(count)]
        words += ["--custom-output-len", str(limit), "--max-concurrency", str(concurrency)]
        words += ["--temperature", str(temperature), "--seed", str(self._settings.seed)]
        words += ["--percentile-metrics", "ttft,tpot", "--metric-percentiles", "50,99"]
        words += ["--disable-tqdm"]
        if self._settings.extra.get("ignore_eos", True):
            words += ["--ignore-eos"]
        with contextlib.redirect_stdout(io.StringIO()):
            return asyncio.run(serve.main_async(parser.parse_args(words)))

    def _counters(self) -> dict[str, float]:
        totals = {
            name.removesuffix("_total"): value for name, value in self._server.counters().items()
        }
        answer = httpx.post(
            f"{self._server.url}/collective_rpc",
            json={"method": "benchmark_counters"},
            timeout=60.0,
        )
        answer.raise_for_status()
        return totals | answer.json()["results"][0]


def serve_words(options: Mapping[str, Any]) -> list[str]:
    """Arguments of `LLM` as words of `vllm serve`."""
    words: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag.removeprefix("--"))
        else:
            words += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return words
