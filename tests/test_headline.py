"""The paper's headline figures: read off a sweep by hand, and acceptance in the real engine."""

from __future__ import annotations

from itertools import accumulate
from operator import mul

import pytest
import torch

from benchmarks.acceptance import accepted_lengths
from benchmarks.headline import BATCH, from_sweep, markdown
from benchmarks.prompts import load_prompts
from benchmarks.sequential import stage_times
from tests.engine import MICRO
from tests.sweeps import arm, run, sweep


def test_from_a_sweep_by_hand() -> None:
    """Round latency is accepted length over tok/s/user; ratios are at the same throughput."""
    measured = sweep(
        {
            "fixed 1": arm("fixed", 1, run(64, 6400, 100.0, accepted_length=1.5),
                           run(BATCH, 9600, 75.0, accepted_length=1.5)),
            "vllm-dspark": arm("ours", 7, run(64, 8000, 125.0, verified_per_request=3.0),
                               run(BATCH, 12800, 100.0, verified_per_request=1.5)),
        }
    )  # fmt: skip
    found = from_sweep(measured)
    assert found["round_ms"] == {"1": pytest.approx(20.0)}  # 1.5 tokens at 75 a second
    assert found["verified"]["vllm-dspark"] == {"64": 3.0, "128": 1.5}
    levels = {m["throughput"]: m["ratio"] for m in found["matched"]}
    # At 8000 tok/s γ=1 stands halfway between its points: 87.5 tok/s/user against 125.
    assert levels[8000] == pytest.approx(125 / 87.5)
    stage = [{"requests": BATCH, "gamma": 1, "parallel_ms": 1.0, "sequential_ms": 1.2}]
    text = markdown(found | {"stage": stage})
    assert "γ=1 | 0.20 ms, 1.0% of 20.0 ms" in text
    assert "8000 tok/s | 125.0 against 87.5 with γ=1: +43%" in text
    assert "64: 3.00, 128: 1.50" in text


def test_what_was_not_measured_is_said() -> None:
    """Nothing at hand: three reasons, no figure of ours."""
    text = markdown({})
    assert text.count("not measured") == 3


def test_gain_is_over_each_other_drafter() -> None:
    """The first named drafter leads; the others say by how much."""
    figures = {name: {"0": {"accepted_length": length, "conditional": [0.5, None]}}
               for name, length in (("DSpark", 3.0), ("DFlash", 2.5))}  # fmt: skip
    text = markdown({"acceptance": figures})
    assert "DFlash | 2.50 (0.50 –); DSpark is +20.0%" in text


@pytest.mark.engine
def test_acceptance_in_the_engine() -> None:
    """Per-position shares multiply up to the accepted length, at both temperatures."""
    found = accepted_lengths(
        str(MICRO), {"one": MICRO / "dspark-vanilla"}, load_prompts("python-text", str(MICRO), 2),
        gamma=3, temperatures=(0.0, 1.0), max_tokens=16, concurrency=2,
        has_gpu=torch.cuda.is_available(),
    )  # fmt: skip
    for figures in found["one"].values():
        assert figures["rounds"] > 0
        survival = accumulate((c or 0.0 for c in figures["conditional"]), mul)
        assert figures["accepted_length"] == pytest.approx(1 + sum(survival))


@pytest.mark.gpu
def test_sequential_stage_costs_more_than_drawing_at_once() -> None:
    """Both times are of real work, at a size that fills the chip."""
    (row,) = stage_times(64, (4,))
    assert 0.05 < row["parallel_ms"] < row["sequential_ms"]
