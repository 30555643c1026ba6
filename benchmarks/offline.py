"""An arm driven through `LLM`: no HTTP between the clock and the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.engine_process import EngineProcess
from benchmarks.prompts import PromptSet
from benchmarks.results_format import Run, SweepSettings
from benchmarks.runners import (
    output_lengths_of,
    prompt_count,
    speculation,
    spread,
    steps_by_depth,
    today,
)


class OfflineRunner:
    """An engine in a process of its own, driven by `LLMEngine.step`."""

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        env: Mapping[str, str],
        prompts: PromptSet,
        settings: SweepSettings,
    ) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options["model"])
        self._prompts = [tokenizer(text).input_ids for text in prompts.texts]
        self._settings = settings
        self.memory_gib: float | None = None
        self._process = EngineProcess(name, options, env)

    def wait(self) -> float:
        """See `Runner`; then a short pass at each temperature, which compiles what is left."""
        startup_s = self._process.ready()
        for temperature in (0.0, 1.0):
            most = self._settings.max_num_seqs
            self._pass(most, temperature, most * [8])
        return startup_s

    def run(self, concurrency: int, temperature: float, repeat: int) -> Run:
        """See `Runner`."""
        count = prompt_count(self._settings, concurrency)
        lengths = output_lengths_of(self._settings, count)
        result = self._pass(concurrency, temperature, lengths)
        self.memory_gib = max(self.memory_gib or 0.0, result["memory_gib"]) or None
        each = spread(result["per_token_ms"])
        return Run(
            concurrency=concurrency,
            temperature=temperature,
            repeat=repeat,
            prompts=count,
            output_tokens=result["tokens"],
            seconds=result["seconds"],
            tokens_per_second=result["tokens"] / result["seconds"],
            tokens_per_second_per_user=1000 / each.mean,
            time_per_output_token_ms=each,
            time_to_first_token_ms=spread(result["first_token_ms"]),
            steps_by_depth=steps_by_depth(result["counters"]),
            date=today(),
            **speculation(result["counters"], result["tokens"]),
        )

    def stop(self) -> None:
        """See `Runner`."""
        self._process.stop()

    def _pass(self, concurrency: int, temperature: float, lengths: Sequence[int]) -> dict[str, Any]:
        sampling = {
            "temperature": temperature,
            "ignore_eos": bool(self._settings.extra.get("ignore_eos", True)),
        }
        return self._process.run(
            prompts=self._prompts[: len(lengths)],
            concurrency=concurrency,
            sampling=sampling,
            max_tokens=lengths,
            seed=self._settings.seed,
        )
