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

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import results_format
from benchmarks.acceptance import accepted_lengths
from benchmarks.comparison import Comparison, choose_ours
from benchmarks.engine_settings import fixed_settings
from benchmarks.errors import plain_errors
from benchmarks.frontier import curve, match_throughput
from benchmarks.headline_record import digest_of, keep, lacking_drafters, open_record
from benchmarks.headline_table import BATCH, markdown
from benchmarks.options import checkpoint_name, named_folders
from benchmarks.prompts import PYTHON_TEXT, load_prompts
from benchmarks.results_format import Sweep
from benchmarks.sequential import stage_times

app = typer.Typer(help=__doc__)


@app.command()
@plain_errors
def main(
    out: Annotated[Path, typer.Option(help="JSON to write; a .md lies beside it.")],
    target: Annotated[str | None, typer.Option(help="Target of the drafters of (a).")] = None,
    drafters: Annotated[str, typer.Option(help="NAME=FOLDER, comma-separated, for (a).")] = "",
    sweep: Annotated[Path | None, typer.Option(help="A sweep's JSON, for (b), (c), (d).")] = None,
    ours: Annotated[
        str | None, typer.Option(help="Arm of the sweep, if several are of kind ours.")
    ] = None,
    dataset: Annotated[str, typer.Option(help="See benchmarks/prompts.py.")] = PYTHON_TEXT,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts of (a).")] = 48,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens a request of (a).")] = 128,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight of (a).")] = 8,
    gamma: Annotated[int, typer.Option(min=1, help="Drafts a round of (a).")] = 7,
) -> None:
    """Measure what FILE lacks, save it part by part, and write the table."""
    import torch

    named, has_gpu = named_folders("--drafters", drafters), torch.cuda.is_available()
    if bool(named) != (target is not None):
        raise typer.BadParameter("--target and --drafters need each other")
    if ours is not None and sweep is None:
        raise typer.BadParameter("--ours names an arm of a sweep. Fix: --sweep FILE")
    kept = open_record(out)
    read = {} if sweep is None else from_sweep(results_format.load(sweep), ours)
    if target is not None:
        engine = fixed_settings(concurrency, 2.0, has_gpu)
        texts = load_prompts(dataset, target, prompts)
        settings = {
            "target": checkpoint_name("--target", target), "dataset": texts.name,
            "dataset_digest": texts.digest, "prompts": prompts, "max_tokens": max_tokens,
            "concurrency": concurrency, "gamma": gamma, "dtype": engine.dtype,
        }  # fmt: skip
        digests = {name: digest_of(folder) for name, folder in named.items()}
        for name, folder in lacking_drafters(out, kept, settings, named, digests).items():
            found = accepted_lengths(
                target, {name: folder}, texts, gamma=gamma, temperatures=(0.0, 1.0),
                max_tokens=max_tokens, concurrency=concurrency, has_gpu=has_gpu,
            )  # fmt: skip
            part = {"acceptance": kept.get("acceptance", {}) | found}
            part["acceptance_settings"] = settings
            part["drafters"] = kept.get("drafters", {}) | {name: digests[name]}
            keep(out, kept, part)
    if "stage" not in kept and has_gpu:
        keep(out, kept, {"stage": stage_times(BATCH, (1, 2, 3, 4, 5, 7, 8, 16))})
    if read or not out.exists():
        keep(out, kept, read)
    text = markdown(kept)
    out.with_suffix(".md").write_text(text)
    Console().print(text, markup=False, highlight=False)


def from_sweep(sweep: Sweep, wanted: str | None = None) -> dict[str, Any]:
    """What (b), (c) and (d) need, at the highest temperature that was measured.

    Args:
        wanted: arm to compare, see `choose_ours`.

    Raises:
        typer.BadParameter: no arm has any run, `wanted` is no arm of ours, or none is named of
            several.
    """
    if not sweep.temperatures():
        raise typer.BadParameter("no arm of the sweep has any run. Fix: another --sweep")
    try:
        ours = choose_ours(sweep, wanted)
    except ValueError as error:
        raise typer.BadParameter(f"{error}. Fix: --ours NAME") from None
    temperature = max(sweep.temperatures())
    loads = sweep.concurrencies(temperature)
    comparison = Comparison(sweep, temperature, ours)
    rounds = {}
    for name in comparison.of_kind("fixed"):
        length = comparison.value(name, BATCH, "accepted_length")
        per_user = comparison.value(name, BATCH, "tokens_per_second_per_user")
        if length is not None and per_user is not None:
            rounds[str(sweep.arms[name].gamma)] = 1000 * length / per_user
    # All of it, also what this sweep does not have: no figure of an earlier one is to stay.
    result: dict[str, Any] = {"temperature": temperature, "round_ms": rounds, "ours": ours}
    result["matched"] = []
    result["verified"] = {
        name: {str(c): comparison.value(name, c, "verified_per_request") for c in loads}
        for name in comparison.of_kind("built-in adaptive", "ours")
    }
    one = comparison.gamma_one()
    if one is not None and ours is not None:
        matches = match_throughput(
            curve(sweep.arms[one], temperature, loads), curve(sweep.arms[ours], temperature, loads)
        )
        result["matched"] = [
            {"throughput": m.level, "gamma_1": m.reference, "ours": m.ours, "ratio": m.ratio}
            for m in matches
        ]
    return result


if __name__ == "__main__":
    app()
