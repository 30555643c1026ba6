"""Markdown tables of a comparison. A cell that was not measured is an en dash.

A star stands where not every arm in question was measured: the best of those that were is not
called the best of all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence

from benchmarks.comparison import Comparison, Ratio, geometric_mean
from benchmarks.frontier import Match, curve, match_per_user, match_throughput
from benchmarks.results_format import Sweep

DASH = "–"
STAR = r"\*"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> str:
    """A table. The first `words` columns are left-aligned, figures after them right-aligned."""
    lines = [header, ["---"] * words + ["---:"] * (len(header) - words), *rows]
    return "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines)


def _escaped(cell: str) -> str:
    return cell.replace("|", r"\|")


def number(value: float | None) -> str:
    """Three digits at least; a dash for None."""
    if value is None:
        return DASH
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def throughput(comparison: Comparison) -> str:
    """tok/s of every arm at every concurrency, our ratios to the others, geometric means."""
    columns = ratio_columns(comparison)
    rows = []
    for concurrency in comparison.concurrencies:
        ratios = [
            _ratio(comparison.ratio(concurrency, others), len(others) > 1)
            for others in columns.values()
        ]
        rows.append([str(concurrency), *_rates(comparison, concurrency), *ratios])
    header = ["concurrency", *comparison.arms, *columns]
    means = [_mean_rate(comparison, name) for name in comparison.arms]
    ratio_means = [_mean_ratio(comparison, others) for others in columns.values()]
    return markdown(header, [*rows, ["geometric mean", *means, *ratio_means]])


def ratio_columns(comparison: Comparison) -> dict[str, list[str]]:
    """Header of each ratio column, and the arms that ours is compared with in it."""
    columns = {
        "best other": comparison.rivals(),
        "no speculation": comparison.of_kind("none"),
        "best built-in adaptive": comparison.of_kind("built-in adaptive"),
    }
    return {
        f"{comparison.ours} / {name}": others
        for name, others in columns.items()
        if others and comparison.ours is not None
    }


def _rates(comparison: Comparison, concurrency: int) -> list[str]:
    """tok/s of each arm, the highest in bold if all are there."""
    rates = [comparison.value(name, concurrency) for name in comparison.arms]
    best = max((rate for rate in rates if rate is not None), default=None)
    bold = comparison.complete(concurrency) and len(rates) > 1
    return [f"**{number(rate)}**" if bold and rate == best else number(rate) for rate in rates]


def _ratio(ratio: Ratio | None, named: bool) -> str:
    if ratio is None:
        return DASH
    star = "" if ratio.complete else STAR
    return f"{ratio.value:.3f}{star}" + (f" ({ratio.other})" if named else "")


def _mean_rate(comparison: Comparison, name: str) -> str:
    rates = [comparison.value(name, concurrency) for concurrency in comparison.concurrencies]
    known = [rate for rate in rates if rate is not None]
    return number(geometric_mean(known)) if known and len(known) == len(rates) else DASH


def _mean_ratio(comparison: Comparison, others: Sequence[str]) -> str:
    """Over the concurrencies that have the ratio; starred if that is not all, or any is."""
    ratios = [comparison.ratio(c, others) for c in comparison.concurrencies]
    known = [ratio for ratio in ratios if ratio is not None]
    if not known:
        return DASH
    complete = len(known) == len(ratios) and all(ratio.complete for ratio in known)
    return f"{geometric_mean([r.value for r in known]):.3f}" + ("" if complete else STAR)


def by_arm(
    comparison: Comparison, field: str, form: Callable[[float | None], str] = number
) -> str | None:
    """Median of `field`, arm by concurrency; arms without any value are left out, None if all
    are."""
    return _arms_by_concurrency(comparison, lambda arm, c: comparison.value(arm, c, field), form)


def spread(comparison: Comparison) -> str | None:
    """(Largest - smallest) / median of tok/s over repeats; None if nothing was repeated."""
    return _arms_by_concurrency(
        comparison,
        lambda arm, c: comparison.arms[arm].relative_spread(
            c, comparison.temperature, "tokens_per_second"
        ),
        lambda value: DASH if value is None else f"{value:.1%}",
    )


def _arms_by_concurrency(
    comparison: Comparison,
    value: Callable[[str, int], float | None],
    form: Callable[[float | None], str],
) -> str | None:
    cells = {arm: [value(arm, c) for c in comparison.concurrencies] for arm in comparison.arms}
    shown = [arm for arm in cells if any(cell is not None for cell in cells[arm])]
    if not shown:
        return None
    rows = [
        [str(concurrency), *(form(cells[arm][i]) for arm in shown)]
        for i, concurrency in enumerate(comparison.concurrencies)
    ]
    return markdown(["concurrency", *shown], rows)


def arms(sweep: Sweep) -> str:
    """What each arm is, how long it took to start, and the memory it took."""
    header = ["arm", "kind", "options", "γ", "start-up, s", "memory, GiB"]
    rows = [
        [
            name,
            arm.kind,
            f"`{json.dumps(arm.options, sort_keys=True)}`",
            DASH if arm.gamma is None else str(arm.gamma),
            number(arm.startup_s),
            number(arm.memory_gib),
        ]
        for name, arm in sweep.arms.items()
    ]
    return markdown(header, rows, words=3)


def matched(comparison: Comparison) -> tuple[str | None, str | None]:
    """Ours against γ=1: tok/s/user at the same tok/s, and tok/s at the same tok/s/user. None in
    place of a table that has no level which both arms reach."""
    reference = comparison.gamma_one()
    if reference is None or comparison.ours is None:
        return None, None
    theirs, own = (
        curve(comparison.arms[name], comparison.temperature, comparison.concurrencies)
        for name in (reference, comparison.ours)
    )
    names = reference, comparison.ours
    return (
        _matches(match_throughput(theirs, own), names, "tok/s", "tok/s/user"),
        _matches(match_per_user(theirs, own), names, "tok/s/user", "tok/s"),
    )


def _matches(matches: list[Match], names: tuple[str, str], level: str, value: str) -> str | None:
    header = [
        f"both at {level}",
        "measured at concurrency",
        *(f"{name}, {value}" for name in names),
        f"{names[1]} / {names[0]}",
    ]
    rows = [
        [
            number(match.level),
            ", ".join(f"{c} of {n}" for c, n in zip(match.concurrencies, names, strict=True) if c),
            number(match.reference),
            number(match.ours),
            f"{match.ratio:.3f}",
        ]
        for match in matches
    ]
    return markdown(header, rows, words=2) if rows else None
