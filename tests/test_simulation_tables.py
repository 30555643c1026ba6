"""Plans as tables: nothing is cut off, and what figures do not mean is said."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from vllm_dspark.simulation.loads import Result
from vllm_dspark.simulation.planning import Point
from vllm_dspark.simulation.tables import plan_notes, plan_table

RESULT = Result(
    gpus=1000, requests=9, seconds=1.0, tokens_per_second=15000.0, tokens_per_second_per_user=300.0,
    first_token_ms=12345.0, accepted_length=2.0, verified_per_request=3.0, drafted_per_request=3.0,
    depth_shares={3: 1.0}, waiting=41.6, running=256.0,
)  # fmt: skip
BEHIND = replace(RESULT, keeps_up=False)


def test_a_plan_fits_into_80_columns() -> None:
    points = [
        Point("no speculation", "concurrency", 4096, BEHIND),
        Point("vllm-dspark", "concurrency", 4096, RESULT),
    ]
    out = io.StringIO()
    Console(file=out, width=80).print(plan_table(points))
    text = out.getvalue()
    assert "…" not in text
    assert text.count("4096") == 2
    assert text.count("15000000") == 2
    assert text.count("*") == 1


def test_policies_that_do_not_keep_up_are_named_by_load() -> None:
    points = [
        Point("fixed 1", "rate", 10, RESULT), Point("fixed 3", "rate", 10, BEHIND),
        Point("fixed 1", "rate", 40.5, BEHIND), Point("fixed 3", "rate", 40.5, BEHIND),
    ]  # fmt: skip
    ten, forty = plan_notes(points, 256)
    assert ten.startswith("* does not keep up with 10 requests/s per GPU")
    assert "fixed 3 (42 waiting, 256 running)" in ten
    assert "fixed 1" not in ten
    assert "40.5 requests/s" in forty
    assert "fixed 1 (42 waiting" in forty
    assert "first ms" in forty


def test_more_in_flight_than_run_at_once() -> None:
    points = [Point("fixed 1", "concurrency", load, RESULT) for load in (256, 512, 512, 1024)]
    (note,) = plan_notes(points, 256)
    assert note.startswith("at 512, 1024 in flight no more than 256 run at once")
    assert "--max-num-seqs" in note
    assert not list(plan_notes(points, 1024))
    assert not list(plan_notes([Point("fixed 1", "rate", 512, RESULT)], 256))
