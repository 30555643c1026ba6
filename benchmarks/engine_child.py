"""The child side of `engine_process`: one engine, driven pass by pass over stdin and stdout.

A pass keeps C requests in flight until all prompts are done: a closed loop. The first line of
stdin is the engine's options as JSON, every later line one pass; every answer is one line.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Sequence
from typing import Any

from benchmarks.runners import STEPS
from vllm_dspark.server import summed

MARK = "RESULT "


def closed_loop(llm: Any, prompts: Sequence[Any], params: Sequence[Any], concurrency: int) -> Any:
    """Generate for all prompts, `concurrency` of them at any time.

    Returns:
        Finished outputs in the order of the prompts, and the seconds it took.
    """
    engine = llm.llm_engine
    outputs: list[Any] = [None] * len(prompts)
    following = iter(range(len(prompts)))

    def add_next() -> None:
        i = next(following, None)
        if i is not None:
            engine.add_request(str(i), prompts[i], params[i])

    started = time.perf_counter()
    for _ in range(concurrency):
        add_next()
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                outputs[int(output.request_id)] = output
                add_next()
    return outputs, time.perf_counter() - started


def times_ms(outputs: Sequence[Any]) -> tuple[list[float], list[float]]:
    """Time to the first token and time per further token of each request, ms.

    Taken by the engine: from arrival to the first token, and between first and last token.
    """
    first, each = [], []
    for output in outputs:
        stats, count = output.metrics, len(output.outputs[0].token_ids)
        first.append(1000 * stats.first_token_latency)
        if count > 1:
            each.append(1000 * (stats.last_token_ts - stats.first_token_ts) / (count - 1))
    return first, each


def counters(llm: Any) -> dict[str, float]:
    """vLLM's counters, summed over labels, and those of `instruments.StepCounters`. Entry i of a
    vector goes by `name[i]`, and so do our steps of a depth."""
    from prometheus_client import REGISTRY

    totals: dict[str, float] = {}
    for metric in llm.get_metrics():
        if hasattr(metric, "value"):
            totals[metric.name] = totals.get(metric.name, 0.0) + metric.value
        for i, value in enumerate(getattr(metric, "values", ())):
            totals[f"{metric.name}[{i}]"] = totals.get(f"{metric.name}[{i}]", 0.0) + value
    ours = {name: n for name, n in summed(REGISTRY.collect()).items() if name.startswith(STEPS)}
    return totals | ours | llm.collective_rpc("benchmark_counters")[0]


def one_pass(llm: Any, task: dict[str, Any]) -> dict[str, Any]:
    """What a line of stdin asks for: `prompts` (token ids), `concurrency`, `sampling` (fields of
    SamplingParams), `seed` (of the first request; None leaves it out), and `max_tokens` of each, if
    `sampling` has none."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
    seed, lengths = task.get("seed"), task.get("max_tokens")
    params = [
        SamplingParams(
            **task["sampling"],
            **({} if lengths is None else {"max_tokens": lengths[i]}),
            seed=None if seed is None else seed + i,
            detokenize=False,
        )
        for i in range(len(prompts))
    ]
    before = counters(llm)
    outputs, seconds = closed_loop(llm, prompts, params, task["concurrency"])
    after = counters(llm)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    first, each = times_ms(outputs)
    return {
        "seconds": seconds,
        "tokens": sum(map(len, tokens)),
        "tokens_crc32": zlib.crc32(json.dumps(tokens).encode()),
        "first_token_ms": first,
        "per_token_ms": each,
        "counters": {name: after[name] - before.get(name, 0.0) for name in after},
        "memory_gib": after["memory_gib"],
    }


def main() -> None:
    """Start the engine, say so, then answer until stdin ends."""
    from vllm import LLM

    started = time.perf_counter()
    llm = LLM(**json.loads(sys.stdin.readline()), disable_log_stats=False)
    _answer({"startup_s": time.perf_counter() - started})
    for line in sys.stdin:
        _answer(one_pass(llm, json.loads(line)))


def _answer(result: dict[str, Any]) -> None:
    print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
