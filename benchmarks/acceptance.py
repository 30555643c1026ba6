"""Accepted length of several drafters of one target, in vLLM's engine, all of γ verified."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.arms import ArmSpec
from benchmarks.engine_options import engine_environment, engine_options
from benchmarks.engine_process import EngineProcess
from benchmarks.engine_settings import fixed_settings
from benchmarks.prompts import PromptSet
from benchmarks.runners import speculation

_PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos[{}]"


def accepted_lengths(
    target: str,
    drafters: Mapping[str, Path],
    prompts: PromptSet,
    *,
    gamma: int,
    temperatures: Sequence[float],
    max_tokens: int,
    concurrency: int,
    has_gpu: bool,
) -> dict[str, dict[str, Any]]:
    """By drafter and by temperature (as text): `accepted_length`, tokens per round with the
    target's own, and `conditional`, the share of rounds that accepted draft k among those that
    accepted all before it, for k = 1..γ (None: no round got there). fp32, seeded requests.

    Raises:
        EngineError: an engine ended.
        typer.BadParameter: `concurrency` is more than an engine without a GPU takes.
    """
    settings = fixed_settings(concurrency, 2.0, has_gpu)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = [tokenizer(text).input_ids for text in prompts.texts]
    found: dict[str, dict[str, Any]] = {}
    for name, drafter in drafters.items():
        config = {
            "method": "dspark", "model": os.fspath(drafter), "num_speculative_tokens": gamma,
            "draft_sample_method": "probabilistic",
        }  # fmt: skip
        arm = ArmSpec(name, "fixed", gamma, config, {"dspark": {"enabled": False}})
        options = engine_options(
            target, arm, has_gpu=has_gpu, dtype=settings.dtype, max_model_len=1024,
            max_num_seqs=concurrency, graph_tokens=concurrency * (gamma + 1),
            kv_cache_gib=settings.kv_cache_gib, gpu_share=0.5, seed=0,
        )  # fmt: skip
        engine = EngineProcess(name, options, engine_environment(arm, has_gpu))
        try:
            engine.ready()
            for temperature in temperatures:
                sampling = {
                    "temperature": temperature, "max_tokens": max_tokens, "ignore_eos": True
                }  # fmt: skip
                result = engine.run(prompts=ids, concurrency=concurrency, sampling=sampling, seed=0)
                found.setdefault(name, {})[f"{temperature:g}"] = _figures(result, gamma)
        finally:
            engine.stop()
    return found


def _figures(result: Mapping[str, Any], gamma: int) -> dict[str, Any]:
    counters = result["counters"]
    reached = counters["vllm:spec_decode_num_drafts"]
    conditional: list[float | None] = []
    for position in range(gamma):
        accepted = counters[_PER_POSITION.format(position)]
        conditional.append(accepted / reached if reached else None)
        reached = accepted
    return {
        "accepted_length": speculation(counters, result["tokens"])["accepted_length"],
        "conditional": conditional,
        "rounds": counters["vllm:spec_decode_num_drafts"],
    }
