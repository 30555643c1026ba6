"""Plans and validations as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from vllm_dspark.simulation.planning import LoadKind, Point
from vllm_dspark.simulation.validation import BAR, GIVEN, Row, misses

LOADS: dict[LoadKind, str] = {
    "concurrency": "in flight per GPU",
    "rate": "requests/s per GPU",
}
_COLUMNS = ("tok/s", "/user", "first ms", "emitted", "verified", "drafted")


def plan_table(points: Sequence[Point]) -> Table:
    """Loads and policies downwards, figures across: tok/s of all and of one user, ms to the first
    token, tokens emitted a round, drafts. The fastest of each load is bold.

    Args:
        points: by load, at least one.
    """
    gpus = points[0].result.gpus
    of = "one GPU" if gpus == 1 else f"all {gpus} GPUs"
    title = f"Simulated, tok/s of {of}; load is {LOADS[points[0].kind]}"
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("load", justify="right")
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
        table.add_row(
            f"{p.load:g}", p.policy, *(_number(*figure) for figure in figures),
            style="bold" if result.tokens_per_second == best[p.load] else "",
            end_section=following is not None and following.load != p.load,
        )  # fmt: skip
    return table


def validation_table(rows: Sequence[Row]) -> Table:
    """Arms and concurrencies downwards; what lies beyond the bar in bold."""
    title = "Simulated against measured tok/s; drafts verified per request and step"
    table = Table(title=title, box=SIMPLE_HEAD)
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


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"
