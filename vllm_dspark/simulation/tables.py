"""Plans and validations as tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vllm_dspark.simulation.planning import LoadKind, Point
from vllm_dspark.simulation.validation import BAR, GIVEN, Row, misses

LOADS: dict[LoadKind, str] = {
    "concurrency": "in flight per GPU",
    "rate": "requests/s per GPU",
}
BEHIND = "*"  # the mark of those that do not keep up
_COLUMNS = ("tok/s", "/user", "first ms", "emitted", "verified", "drafted")


def plan_table(points: Sequence[Point]) -> Table:
    """Loads and policies downwards, figures across: tok/s of all and of one user, ms to the first
    token, tokens emitted a round, drafts. The fastest of each load is bold; * is a policy that does
    not keep up.

    Args:
        points: by load, at least one.
    """
    gpus = points[0].result.gpus
    of = "one GPU" if gpus == 1 else f"all {gpus} GPUs"
    title = f"Simulated, tok/s of {of}; load is {LOADS[points[0].kind]}"
    table = _table(title)
    table.add_column("load", justify="right", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    best = {p.load: 0.0 for p in points}
    for p in points:
        best[p.load] = max(best[p.load], p.result.tokens_per_second)
    for p, following in zip(points, [*points[1:], None], strict=True):
        result = p.result
        figures = (
            (result.tokens_per_second * gpus, 0),
            (result.tokens_per_second_per_user, 1),
            (result.first_token_ms, 0),
            (result.accepted_length, 2),
            (result.verified_per_request, 2),
            (result.drafted_per_request, 2),
        )
        mark = "" if result.keeps_up else f" {BEHIND}"
        table.add_row(
            f"{p.load:g}", p.policy + mark, *(_number(*figure) for figure in figures),
            style="bold" if result.tokens_per_second == best[p.load] else "",
            end_section=following is not None and following.load != p.load,
        )  # fmt: skip
    return table


def plan_notes(points: Sequence[Point], most_requests: int) -> Iterator[str]:
    """What the table's figures do not mean: loads that policies do not keep up with, and more in
    flight than an engine runs at once.

    Args:
        points: by load, at least one.
        most_requests: that an engine runs at once.
    """
    behind: dict[float, list[str]] = {}
    for p in points:
        if not p.result.keeps_up:
            left = f"{p.result.waiting:.0f} waiting, {p.result.running:.0f} running"
            behind.setdefault(p.load, []).append(f"{p.policy} ({left})")
    for load, policies in behind.items():
        yield (
            f"{BEHIND} does not keep up with {load:g} requests/s per GPU, so that its figures tell "
            f"of --seconds too, above all first ms; per GPU at the end: {', '.join(policies)}. "
            f"Fix: a lower --rate, or more --seconds where nothing waits"
        )
    crowded = [p.load for p in points if p.kind == "concurrency" and p.load > most_requests]
    if crowded:
        loads = ", ".join(f"{load:g}" for load in dict.fromkeys(crowded))
        yield (
            f"at {loads} in flight no more than {most_requests} run at once, the others wait, and "
            f"first ms holds their wait. Fix: --max-num-seqs, if the engine has room for more"
        )


def validation_table(rows: Sequence[Row]) -> Table:
    """Arms and concurrencies downwards; what lies beyond the bar in bold."""
    title = "Simulated against measured tok/s; drafts verified per request and step"
    table = _table(title)
    table.add_column("arm")
    for column in ("load", "measured", "simulated", "ratio", "verified", "simulated"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    beyond = misses(rows)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        verified = row.measured_verified
        table.add_row(
            row.arm, str(row.concurrency), f"{row.measured:.0f}", f"{row.simulated:.0f}",
            f"{row.ratio:.3f}", _number(math.nan if verified is None else verified, 2),
            _number(row.simulated_verified if verified is not None else math.nan, 2),
            "fitted" if row.fitted else "predicted",
            style="bold" if row in beyond else "",
            end_section=following is not None and following.concurrency < row.concurrency,
        )  # fmt: skip
    return table


def validation_line(rows: Sequence[Row]) -> str:
    """How many predictions of each kind of arm lie within the bar."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if not row.fitted and row.kind != "ours":
            given = GIVEN if row.arm.endswith(GIVEN) else ""
            groups.setdefault(row.kind + given, []).append(row)
    counts = [
        f"{name}: {len(group) - len(misses(group))} of {len(group)}"
        for name, group in groups.items()
    ]
    fitted = len(misses([row for row in rows if row.fitted]))
    return f"predicted within {BAR:.0%}: {'; '.join(counts)}. Fitted beyond it: {fitted}"


def _table(title: str) -> Table:
    """Narrow enough for 80 columns."""
    return Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"
