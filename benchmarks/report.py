"""Pictures and a Markdown report from the JSON of a sweep.

    python -m benchmarks.report FILE.json... --out DIR

Writes DIR/report.md and, for each temperature T, throughput.png, frontier.png and verified.png in
DIR/temperature-T/. Several files of the same settings are one sweep. Figures are medians over
repeats; what was not measured is shown as missing, and listed.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import tables
from benchmarks.comparison import Comparison, choose_ours
from benchmarks.figures import draw
from benchmarks.results_format import Cell, Sweep, load
from benchmarks.results_merge import machines, merge, provenances

app = typer.Typer(help=__doc__)


@app.command()
def main(
    files: Annotated[list[Path], typer.Argument(help="JSON of a sweep, or of its parts.")],
    out: Annotated[Path, typer.Option(help="Folder to write to; made if it is not there.")],
    ours: Annotated[
        str | None, typer.Option(help="Arm to compare, if several are of kind ours.")
    ] = None,
) -> None:
    """Draw and tabulate every temperature of a sweep."""
    try:
        sweep = merge([load(file) for file in files])
        chosen = choose_ours(sweep, ours)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    if not sweep.temperatures():
        raise typer.BadParameter("no arm has any run")
    text = write_report(sweep, out, chosen, _command(files, out, ours))
    lacking = sum(len(missing(sweep, temperature)) for temperature in sweep.temperatures())
    Console().print(f"{text}: {lacking} runs missing", soft_wrap=True)


def _command(files: list[Path], out: Path, ours: str | None) -> str:
    """The command to repeat, without folders of this machine."""
    shown = [path.name if path.is_absolute() else str(path) for path in (*files, out)]
    chosen = ["--ours", ours] if ours is not None else []
    return shlex.join(
        ["python", "-m", "benchmarks.report", *shown[:-1], "--out", shown[-1], *chosen]
    )


def write_report(sweep: Sweep, out: Path, ours: str | None, command: str) -> Path:
    """Write pictures and text; returns the text's path. The same arguments give the same bytes.

    Args:
        ours: arm to compare with the others, see `choose_ours`.
        command: how to repeat this, put into the text.
    """
    parts = [_head(sweep)]
    for temperature in sweep.temperatures():
        comparison = Comparison(sweep, temperature, ours)
        folder = f"temperature-{temperature:g}"
        pictures = draw(comparison, out / folder)
        parts += section(comparison, {stem: f"{folder}/{p.name}" for stem, p in pictures.items()})
    parts += _provenance(sweep, command)
    path = out / "report.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _head(sweep: Sweep) -> str:
    found = machines(sweep)
    settings = sweep.settings
    lines = [
        f"# Sweep of {settings.target}",
        f"{'; '.join(found) or 'Device and versions not recorded'}. Mode {settings.mode}, prompts "
        f"{settings.dataset}, at most {settings.max_tokens} tokens a request, {settings.dtype}, "
        f"{settings.drafting} drafting. Every figure is the median over repeats.",
    ]
    if len(found) > 1:
        lines.append("**The arms ran on different machines: their ratios say nothing.**")
    return "\n\n".join(lines)


def section(comparison: Comparison, pictures: dict[str, str]) -> list[str]:
    """Paragraphs about one temperature. `pictures` gives links by stem, see `draw`."""
    arms = ", ".join(comparison.arms)
    parts = [f"## Temperature {comparison.temperature:g}", "### Throughput, tok/s"]
    parts += _picture(pictures, "throughput", f"Throughput in tok/s against concurrency: {arms}")
    parts += [tables.throughput(comparison), _reading(comparison), *_missing_text(comparison)]
    parts += ["### tok/s/user"]
    parts += _picture(pictures, "frontier", f"Throughput in tok/s against tok/s/user: {arms}")
    parts += _table(tables.by_arm(comparison, "tokens_per_second_per_user"))
    parts += _matched(comparison)
    parts += ["### Accepted length: tokens emitted per round, the target's own included"]
    parts += _table(tables.by_arm(comparison, "accepted_length"))
    parts += ["### Verified drafts per request and step"]
    parts += _picture(pictures, "verified", f"Verified drafts against concurrency: {arms}")
    parts += _table(tables.by_arm(comparison, "verified_per_request"))
    parts += ["### Drafts per request and step, verified or not"]
    parts += _table(tables.by_arm(comparison, "drafted_per_request"))
    skipped = tables.by_arm(comparison, "skipped_per_request")
    if skipped is not None:
        parts += ["### Drafts per request and step that were not verified", skipped]
    parts += ["### Spread of tok/s over repeats, (largest - smallest) / median"]
    return parts + _table(tables.spread(comparison))


def _picture(pictures: dict[str, str], stem: str, alt: str) -> list[str]:
    return [f"![{alt}]({pictures[stem]})"] if stem in pictures else []


def _table(text: str | None) -> list[str]:
    return [text if text is not None else "Not measured."]


def _reading(comparison: Comparison) -> str:
    """How to read the first table, as far as it needs saying."""
    lines = ["Bold: the highest of a row, where every arm was measured."]
    if comparison.ours is None:
        lines.append('No arm of kind "ours", so no ratios.')
    if not all(map(comparison.complete, comparison.concurrencies)):
        lines.append(
            f"{tables.DASH}: not measured. {tables.STAR}: some arm in question was not measured, "
            "so the best of those that were need not be the best of all."
        )
    return " ".join(lines)


def _matched(comparison: Comparison) -> list[str]:
    reference = comparison.gamma_one()
    parts = ["### tok/s/user at matched throughput, against γ=1"]
    if reference is None or comparison.ours is None:
        return [*parts, "It takes our arm and one with a fixed γ of 1."]
    at_throughput, at_per_user = tables.matched(comparison)
    nothing = "No level that both reach."
    return [
        *parts,
        f"{reference} stands in for MTP-1, against which the paper reports 1.60 to 1.85 in "
        "production (DeepSeek-V4-Flash, γ=5). Between neighbouring concurrencies a straight line "
        "is drawn. Levels that only one of the two reaches are left out: nothing is extrapolated.",
        at_throughput or nothing,
        "### Throughput at matched tok/s/user, against γ=1",
        at_per_user or nothing,
    ]


def missing(sweep: Sweep, temperature: float) -> list[Cell]:
    """Runs that some arm or repeat has at this temperature and others lack."""
    runs = [run for arm in sweep.arms.values() for run in arm.runs]
    repeats = max(run.repeat + 1 for run in runs if run.temperature == temperature)
    return sweep.missing(sweep.arms, sweep.concurrencies(temperature), [temperature], repeats)


def _missing_text(comparison: Comparison) -> list[str]:
    """A list of what is missing, arm by arm, with the reason if the sweep gave one."""
    cells = missing(comparison.sweep, comparison.temperature)
    lines = []
    for name, arm in comparison.arms.items():
        places = []
        for concurrency in comparison.concurrencies:
            lacking = [c.repeat for c in cells if (c.arm, c.concurrency) == (name, concurrency)]
            if not lacking:
                continue
            some = arm.repeats(concurrency, comparison.temperature)
            which = f" (repeat {', '.join(map(str, lacking))})" if some else ""
            places.append(f"{concurrency}{which}")
        if places or arm.error:
            what = f"concurrency {', '.join(places)}" if places else "nothing here"
            lines.append(f"- {name}: {what}{f'; {arm.error}' if arm.error else ''}")
    return ["Missing:", "\n".join(lines)] if lines else []


def _provenance(sweep: Sweep, command: str) -> list[str]:
    found = provenances(sweep)
    commands = dict.fromkeys(str(one["command"]) for one in found if "command" in one)
    return [
        "## Arms",
        tables.arms(sweep),
        "## How this was made",
        "```bash\n" + "\n".join([*commands, command]) + "\n```",
        "Settings of all arms, then what they ran on:",
        *(f"```json\n{json.dumps(block, indent=1, ensure_ascii=False)}\n```"
          for block in (sweep.settings.model_dump(), *found)),
    ]  # fmt: skip


if __name__ == "__main__":
    app()
