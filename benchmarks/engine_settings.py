"""Settings of an engine that depend on the machine, settled before they are put on record.

Without a GPU vLLM's kernels run in Triton's interpreter (`vllm_dspark.cpu`): in float32, with few
requests in a step and without CUDA graphs. What was asked for and cannot be kept is refused, so
that no record says anything else than what ran.
"""

from __future__ import annotations

from dataclasses import dataclass

import typer

GRAPHS = ("decode", "breakable", "vllm")
NO_GRAPHS = "none"


@dataclass(frozen=True)
class EngineSettings:
    """What a benchmark asks of every engine.

    Attributes:
        loads: requests in flight of the passes.
        max_num_seqs: most requests in a step.
        dtype: of weights and activations.
        kv_cache_gib: size of the KV cache.
        graphs: see `engine_options`; "none" without a GPU.
    """

    loads: tuple[int, ...]
    max_num_seqs: int
    dtype: str
    kv_cache_gib: float
    graphs: str


ON_A_CPU = EngineSettings(
    loads=(1, 4, 8), max_num_seqs=8, dtype="float32", kv_cache_gib=0.25, graphs=NO_GRAPHS
)


def settle(
    usual: EngineSettings,
    has_gpu: bool,
    *,
    loads: list[int] | None = None,
    max_num_seqs: int | None = None,
    dtype: str | None = None,
    kv_cache_gib: float | None = None,
    graphs: str | None = None,
) -> EngineSettings:
    """What runs: what was asked for, and for the rest (None) `usual`, or `ON_A_CPU` without a GPU.
    Loads that nobody asked for are those that fit into `max_num_seqs`.

    Raises:
        typer.BadParameter: something that was asked for cannot be kept; names every such thing.
    """
    here = usual if has_gpu else ON_A_CPU
    most = here.max_num_seqs if max_num_seqs is None else max_num_seqs
    settled = EngineSettings(
        loads=tuple(load for load in here.loads if load <= most) if loads is None else tuple(loads),
        max_num_seqs=most,
        dtype=here.dtype if dtype is None else dtype,
        kv_cache_gib=here.kv_cache_gib if kv_cache_gib is None else kv_cache_gib,
        graphs=here.graphs if graphs is None else graphs,
    )
    require_kept(settled, has_gpu)
    return settled


def require_kept(settings: EngineSettings, has_gpu: bool) -> None:
    """Refuse settings that an engine on this machine would not have.

    Raises:
        typer.BadParameter: names each, and what is needed.
    """
    problems = [] if has_gpu else not_on_a_cpu(settings.dtype, settings.max_num_seqs)
    kinds = GRAPHS if has_gpu else (NO_GRAPHS,)
    if settings.graphs not in kinds:
        problems.append(f"found graphs {settings.graphs!r}, needed is {' or '.join(kinds)}")
    highest = max(settings.loads, default=0)
    if highest > settings.max_num_seqs:
        more = f"--max-num-seqs {highest} or " if has_gpu else ""
        problems.append(
            f"found concurrency {highest}, needed is {more}{settings.max_num_seqs} at most"
        )
    _refuse(problems, has_gpu)


def require_dtype(dtype: str, has_gpu: bool) -> None:
    """Refuse a type that an engine on this machine would not have.

    Raises:
        typer.BadParameter: names it, and what is needed.
    """
    _refuse([] if has_gpu else not_on_a_cpu(dtype, 1), has_gpu)


def not_on_a_cpu(dtype: str, max_num_seqs: int) -> list[str]:
    """Why an engine without a GPU cannot have these; empty if it can."""
    problems = []
    if dtype != ON_A_CPU.dtype:
        problems.append(f"found dtype {dtype}, needed is {ON_A_CPU.dtype}")
    if max_num_seqs > ON_A_CPU.max_num_seqs:
        problems.append(
            f"found {max_num_seqs} requests in a step, needed are {ON_A_CPU.max_num_seqs} at most"
        )
    return problems


def _refuse(problems: list[str], has_gpu: bool) -> None:
    if problems:
        here = "" if has_gpu else ". There is no GPU here. Fix: leave out what cannot be kept"
        raise typer.BadParameter("; ".join(problems) + here)


def fixed_settings(requests: int, gib: float, has_gpu: bool) -> EngineSettings:
    """Those of a benchmark that runs in float32 wherever it is, at one load.

    Args:
        requests: in flight, and most in a step.
        gib: KV cache on a GPU.

    Raises:
        typer.BadParameter: `requests` is more than an engine without a GPU takes.
    """
    usual = EngineSettings((requests,), requests, "float32", gib, "decode")
    return settle(usual, has_gpu, loads=[requests], max_num_seqs=requests)
