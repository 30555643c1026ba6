"""What drafting from K candidates costs in accepted length, against drafting from all words.

    python -m benchmarks.candidates --target FOLDER --out FOLDER

The real engine drafts γ tokens in every step and verifies all of them; every arm has the same
prompts and seeds. Where there is no GPU, the kernels' references draw and verify
(`reference_kernels`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.arms import ArmSpec
from benchmarks.engine_options import engine_environment, engine_options
from benchmarks.engine_process import EngineProcess
from benchmarks.engine_settings import EngineSettings, fixed_settings
from benchmarks.errors import plain_errors
from benchmarks.options import numbers
from benchmarks.prompts import PYTHON_TEXT, load_prompts
from benchmarks.provenance import provenance
from benchmarks.records import write_record
from vllm_dspark.config import CANDIDATES
from vllm_dspark.drafters import find_drafter

_ROUNDS = "vllm:spec_decode_num_drafts"
_PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos[{}]"
REGIMES: dict[str, dict[str, Any]] = {
    "temperature 0": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "temperature 1, top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
}

app = typer.Typer(help=__doc__)


def figures(counters: Mapping[str, float], gamma: int) -> dict[str, Any]:
    """`accepted_length`, tokens a round with the target's own; its standard error, of rounds taken
    as independent; and their number.

    With a the accepted drafts of a round, E[a] = Σ_k P(a ≥ k) and E[a²] = Σ_k (2k - 1) P(a ≥ k).
    """
    rounds = counters[_ROUNDS]
    reached = [counters[_PER_POSITION.format(k)] / rounds for k in range(gamma)]
    mean = math.fsum(reached)
    square = math.fsum((2 * k + 1) * share for k, share in enumerate(reached))
    error = math.sqrt(max(square - mean**2, 0.0) / rounds)
    return {"accepted_length": 1 + mean, "standard_error": error, "rounds": int(rounds)}


def arm_of(drafter: Path, gamma: int, count: int) -> ArmSpec:
    """Our engine with K candidates, 0 for all words."""
    speculative = {
        "method": "dspark", "model": str(drafter), "num_speculative_tokens": gamma,
        "draft_sample_method": "probabilistic",
    }  # fmt: skip
    ours = {
        "draft_candidates": count, "kernels": "triton", "verification": "all", "depth": gamma,
    }  # fmt: skip
    name = f"{count} candidates" if count else "all words"
    return ArmSpec(name, "ours", gamma, speculative, {"dspark": ours})


def measure(
    target: str,
    arm: ArmSpec,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    settings: EngineSettings,
    has_gpu: bool,
) -> dict[str, Any]:
    """`figures` by regime.

    Args:
        prompts: token ids.
        settings: see `fixed_settings`.

    Raises:
        EngineError: the engine ended.
    """
    assert arm.gamma is not None
    concurrency = settings.max_num_seqs
    options = engine_options(
        target, arm, has_gpu=has_gpu, dtype=settings.dtype, max_model_len=1024,
        max_num_seqs=concurrency, graph_tokens=concurrency * (arm.gamma + 1),
        kv_cache_gib=settings.kv_cache_gib, gpu_share=0.5, seed=0,
    )  # fmt: skip
    env = engine_environment(arm, has_gpu)
    module = "benchmarks.engine_child"
    if not has_gpu:
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        module = "benchmarks.reference_kernels"
    engine = EngineProcess(arm.name, options, env, module=module)
    found = {}
    try:
        engine.ready()
        for name, regime in REGIMES.items():
            sampling = regime | {"max_tokens": max_tokens, "ignore_eos": True}
            result = engine.run(prompts=prompts, concurrency=concurrency, sampling=sampling, seed=0)
            found[name] = figures(result["counters"], arm.gamma)
    finally:
        engine.stop()
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """A row for each number of candidates."""
    lines = [
        f"{result['pair']}, γ={result['gamma']}, accepted length ± standard error, by "
        f"{result['kernels']}; rounds of one request count as independent",
        "",
        f"| drafted from | {' | '.join(REGIMES)} |",
        "|---|" + "---|" * len(REGIMES),
    ]
    for name, arm in result["arms"].items():
        cells = [
            f"{one['accepted_length']:.3f} ± {one['standard_error']:.3f} ({one['rounds']} rounds)"
            for one in (arm[regime] for regime in REGIMES)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@app.command()
@plain_errors
def main(
    target: Annotated[Path, typer.Option(help="Folder of the target.")],
    out: Annotated[Path, typer.Option(help="Folder for candidates.json and candidates.md.")],
    drafter: Annotated[Path | None, typer.Option(help="Default: beside the target.")] = None,
    counts: Annotated[str, typer.Option(help="Numbers of candidates, comma-separated.")] = (
        ",".join(map(str, CANDIDATES))
    ),
    dataset: Annotated[str, typer.Option(help="See benchmarks/prompts.py.")] = PYTHON_TEXT,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of each regime.")] = 24,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens a request.")] = 64,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 8,
    gamma: Annotated[int, typer.Option(min=1, help="Drafts a round.")] = 7,
) -> None:
    """Measure, and write the table."""
    import torch
    from transformers import AutoTokenizer

    chosen = numbers("--counts", counts, int, 1)
    has_gpu = torch.cuda.is_available()
    settings = fixed_settings(concurrency, 2.0, has_gpu)
    folder = Path(find_drafter(str(target), {})) if drafter is None else drafter
    texts = load_prompts(dataset, str(target), prompts).texts
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = [tokenizer(text).input_ids for text in texts]
    out.mkdir(parents=True, exist_ok=True)
    arms = {}
    for count in (0, *chosen):
        arm = arm_of(folder, gamma, count)
        arms[arm.name] = measure(str(target), arm, ids, max_tokens, settings, has_gpu)
    result = {
        "provenance": provenance(),
        "pair": target.name,
        "gamma": gamma,
        "kernels": "our Triton kernels" if has_gpu else "their references on a CPU, fp32",
        "arms": arms,
    }
    write_record(out, "candidates", result, markdown(result))


if __name__ == "__main__":
    app()
