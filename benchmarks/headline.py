"""The paper's headline figures, in our terms: `python -m benchmarks.headline --help`.

    (a) accepted length with the Markov head, without it, and of a shallower DSpark against a
        deeper drafter without one (DFlash)
    (b) the sequential stage's share of a round
    (c) tok/s/user at matched throughput against γ = 1, the stand-in for MTP-1
    (d) verified drafts per request against concurrency

(a) and (b) are measured here and kept in the JSON; (c) and (d) are read from a sweep. What needs a
GPU, or a sweep, that is not there is left out and said to be.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import results_format
from benchmarks.acceptance import accepted_lengths
from benchmarks.comparison import Comparison, choose_ours
from benchmarks.engine_process import EngineError
from benchmarks.frontier import curve, match_throughput
from benchmarks.prompts import PYTHON_TEXT, PromptsError, load_prompts
from benchmarks.provenance import provenance
from benchmarks.results_format import Sweep
from benchmarks.sequential import stage_times

BATCH = 128  # requests at which the paper states the stage's share

app = typer.Typer(help=__doc__)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="JSON to write; a .md lies beside it.")],
    target: Annotated[str | None, typer.Option(help="Target of the drafters of (a).")] = None,
    drafters: Annotated[str, typer.Option(help="NAME=FOLDER, comma-separated, for (a).")] = "",
    sweep: Annotated[Path | None, typer.Option(help="A sweep's JSON, for (b), (c), (d).")] = None,
    dataset: Annotated[str, typer.Option(help="See benchmarks/prompts.py.")] = PYTHON_TEXT,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of (a).")] = 48,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens a request of (a).")] = 128,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight of (a).")] = 8,
    gamma: Annotated[int, typer.Option(min=1, help="Drafts a round of (a).")] = 7,
) -> None:
    """Measure what FILE lacks, and write the table."""
    import torch

    console = Console()
    kept: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    named = dict(pair.split("=", 1) for pair in drafters.split(",") if pair)
    lacking = {n: Path(f) for n, f in named.items() if n not in kept.get("acceptance", {})}
    try:
        if lacking and target is not None:
            found = accepted_lengths(
                target, lacking, load_prompts(dataset, target, prompts), gamma=gamma,
                temperatures=(0.0, 1.0), max_tokens=max_tokens, concurrency=concurrency,
                has_gpu=torch.cuda.is_available(),
            )  # fmt: skip
            kept["acceptance"] = kept.get("acceptance", {}) | found
    except (EngineError, PromptsError) as error:
        console.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    if "stage" not in kept and torch.cuda.is_available():
        kept["stage"] = stage_times(BATCH, (1, 2, 3, 4, 5, 7, 8, 16))
    if sweep is not None:
        kept |= from_sweep(results_format.load(sweep))
    kept.setdefault("provenance", []).append(provenance())
    out.write_text(json.dumps(kept, indent=1) + "\n")
    text = markdown(kept)
    out.with_suffix(".md").write_text(text)
    console.print(text, markup=False, highlight=False)


def from_sweep(sweep: Sweep) -> dict[str, Any]:
    """What (b), (c) and (d) need, at the highest temperature that was measured."""
    temperature = max(sweep.temperatures())
    loads = sweep.concurrencies(temperature)
    comparison = Comparison(sweep, temperature, choose_ours(sweep, None))
    rounds = {}
    for name in comparison.of_kind("fixed"):
        length = comparison.value(name, BATCH, "accepted_length")
        per_user = comparison.value(name, BATCH, "tokens_per_second_per_user")
        if length is not None and per_user is not None:
            rounds[str(sweep.arms[name].gamma)] = 1000 * length / per_user
    result: dict[str, Any] = {"temperature": temperature, "round_ms": rounds}
    result["verified"] = {
        name: {str(c): comparison.value(name, c, "verified_per_request") for c in loads}
        for name in comparison.of_kind("built-in adaptive", "ours")
    }
    one, ours = comparison.gamma_one(), comparison.ours
    if one is not None and ours is not None:
        matches = match_throughput(
            curve(sweep.arms[one], temperature, loads), curve(sweep.arms[ours], temperature, loads)
        )
        result["matched"] = [
            {"throughput": m.level, "gamma_1": m.reference, "ours": m.ours, "ratio": m.ratio}
            for m in matches
        ]
    return result


def markdown(kept: dict[str, Any]) -> str:
    """Our figures beside the paper's."""
    lines = ["| figure | ours | paper |", "|---|---|---|"]
    lines += _acceptance_rows(kept.get("acceptance"))
    lines += _stage_rows(kept.get("stage"), kept.get("round_ms"))
    lines += _sweep_rows(kept)
    return "\n".join(lines) + "\n"


def _acceptance_rows(acceptance: dict[str, Any] | None) -> list[str]:
    if not acceptance:
        return ["| (a) accepted length | not measured: no drafters were named | +16 to +18 % |"]
    rows = []
    first = next(iter(acceptance))
    for temperature in acceptance[first]:
        best = acceptance[first][temperature]["accepted_length"]
        for name, figures in acceptance.items():
            one = figures[temperature]
            each = " ".join("–" if c is None else f"{c:.2f}" for c in one["conditional"])
            lead = "" if name == first else f"; {first} is {best / one['accepted_length'] - 1:+.1%}"
            rows.append(
                f"| (a) accepted length at temperature {temperature}, {name} | "
                f"{one['accepted_length']:.2f} ({each}){lead} | "
                "+16 to +18 % over the same without the head; 2 layers beat 5 |"
            )
    return rows


def _stage_rows(stage: Any, round_ms: dict[str, float] | None) -> list[str]:
    title = f"(b) share of a round at batch {BATCH}"
    if not stage:
        return [f"| {title} | not measured: needs a GPU | 0.2 to 1.3 % |"]
    rows = []
    for row in stage:
        extra = row["sequential_ms"] - row["parallel_ms"]
        of = (round_ms or {}).get(str(row["gamma"]))
        share = "no such arm in the sweep" if of is None else f"{extra / of:.1%} of {of:.1f} ms"
        rows.append(f"| {title}, γ={row['gamma']} | {extra:.2f} ms, {share} | 0.2 to 1.3 % |")
    return rows


def _sweep_rows(kept: dict[str, Any]) -> list[str]:
    if "verified" not in kept:
        return ["| (c), (d) | not measured: no sweep was given | +60 to +85 %; 4 to 6, falling |"]
    rows = [
        f"| (c) tok/s/user at {m['throughput']:.0f} tok/s | {m['ours']:.1f} against "
        f"{m['gamma_1']:.1f} with γ=1: {m['ratio'] - 1:+.0%} | +60 to +85 % over MTP-1 |"
        for m in kept.get("matched", ())
    ]
    for name, verified in kept["verified"].items():
        each = ", ".join(f"{c}: {v:.2f}" for c, v in verified.items() if v is not None)
        rows.append(
            f"| (d) verified drafts per request, {name} | {each or 'not measured'} | "
            "4 to 6 below 200 requests, falling above |"
        )
    return rows


if __name__ == "__main__":
    app()
