"""Driving vLLM's real engine from tests: start it, feed it over time, take it down."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import HAS_GPU
from vllm_dspark import cpu

MICRO = Path(__file__).parent.parent / "examples" / "micro-python"
TINY = Path(__file__).parent.parent / "examples" / "tiny-python"


# Every draft of the block is verified, whatever its confidence: acceptance is the drafter's own.
WHOLE: dict[str, Any] = {"additional_config": {"dspark": {"verification": "all"}}}


def options(**changes: Any) -> dict[str, Any]:
    """Options of `LLM` for exact comparisons on this machine, changed as given."""
    base: dict[str, Any] = {
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "seed": 0,
        "disable_log_stats": False,
        "kv_cache_memory_bytes": 1 << 26,
        "dtype": "float32",
    }
    # Several test processes share a GPU: none may ask for most of it to be free.
    here = {"gpu_memory_utilization": 0.4} if HAS_GPU else cpu.ENGINE_OPTIONS
    return (here | base) | changes


@contextmanager
def engine(
    target: Path, speculative_config: dict[str, Any] | str | None = None, **changes: Any
) -> Iterator[Any]:
    """vLLM's `LLM` on `target`, shut down completely at the end.

    It drafts γ tokens in every step unless a depth or goal is given: what follows the load on a
    CPU follows the machine's own load too.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    additional = dict(changes.pop("additional_config", {}))
    ours = additional.get("dspark", {})
    if not {"depth", "goal", "target_tokens_per_second_per_user"} & ours.keys():
        additional["dspark"] = {"goal": "latency", **ours}
    changes["additional_config"] = additional
    llm = LLM(str(target), speculative_config=speculative_config, **options(**changes))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


@dataclass(frozen=True)
class Request:
    """One request: a prompt (text or token ids), sampling parameters, and when it arrives."""

    prompt: str | Sequence[int]
    params: dict[str, Any] = field(default_factory=dict)
    arrives: int = 0  # engine steps after the start
    aborted_after: int | None = None  # output tokens after which it is aborted


def run(llm: Any, requests: Sequence[Request]) -> list[Any]:
    """Feed requests at their arrival steps; the last output of each, in the given order."""
    from vllm import SamplingParams

    core = llm.llm_engine
    outputs: list[Any] = [None] * len(requests)
    waiting = set(range(len(requests)))
    live: set[int] = set()
    step = 0
    while waiting or live:
        for i in sorted(waiting):
            request = requests[i]
            if request.arrives <= step or not live:
                params = SamplingParams(**({"temperature": 0.0} | request.params))
                prompt = request.prompt
                if not isinstance(prompt, str):
                    prompt = {"prompt_token_ids": list(prompt)}  # type: ignore[assignment]
                core.add_request(_name(llm, i), prompt, params)
                waiting.discard(i)
                live.add(i)
        for output in core.step():
            i = int(output.request_id.rsplit("-", 1)[1])
            outputs[i] = output
            limit = requests[i].aborted_after
            if limit is not None and i in live and len(output.outputs[0].token_ids) >= limit:
                core.abort_request([output.request_id])
                live.discard(i)
            if output.finished:
                live.discard(i)
        step += 1
        assert step < 20_000, "the engine makes no progress"
    while core.has_unfinished_requests():
        core.step()
    return outputs


def _name(llm: Any, i: int) -> str:
    run_number = getattr(llm, "dspark_test_runs", 0)
    if i == 0:
        llm.dspark_test_runs = run_number = run_number + 1
    return f"run{run_number}-{i}"


def tokens(outputs: Sequence[Any]) -> list[list[int]]:
    """Output token ids of each request."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def counters(llm: Any) -> dict[str, float]:
    """vLLM's counters, summed over labels."""
    totals: dict[str, float] = {}
    for metric in llm.get_metrics():
        if hasattr(metric, "value"):
            totals[metric.name] = totals.get(metric.name, 0.0) + metric.value
    return totals


@dataclass(frozen=True)
class Speculation:
    """What speculation did between two readings of the counters."""

    rounds: float
    drafted: float
    accepted: float

    @property
    def accepted_length(self) -> float:
        """Tokens emitted per round, the target's own included."""
        return 1 + self.accepted / self.rounds


@contextmanager
def observed(llm: Any) -> Iterator[list[Speculation]]:
    """Collects one `Speculation` for what runs inside."""
    names = [f"vllm:spec_decode_num_{n}" for n in ("drafts", "draft_tokens", "accepted_tokens")]
    before = counters(llm)
    seen: list[Speculation] = []
    yield seen
    after = counters(llm)
    seen.append(Speculation(*(after.get(n, 0.0) - before.get(n, 0.0) for n in names)))
