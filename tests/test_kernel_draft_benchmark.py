"""The drafting benchmark: its arithmetic, and that its arms draw the same; no figure is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.draft_traffic import Shape, built_in_bytes, candidate_bytes, dense_bytes
from benchmarks.kernels_draft import Inputs, app, built_in, ours, row, table
from tests.kernel_cases import DEVICE
from vllm_dspark.kernels.dense_scores import BLOCK_V


def test_bytes_of_small_blocks_counted_by_hand() -> None:
    """V = 2 tiles, r = 16, bf16, R = 3, γ = 2: every term by itself."""
    vocab = 2 * BLOCK_V
    greedy, drawn = (Shape(3, 2, vocab, 16, 2, drawn) for drawn in (False, True))
    w2, logits = vocab * 16 * 2, 3 * vocab * 2
    assert built_in_bytes(greedy) == 2 * (w2 + 5 * logits)
    assert built_in_bytes(drawn) == 2 * (w2 + 6 * logits)
    tiles = 2 * 3 * 2 * 8
    assert dense_bytes(greedy) == 2 * (w2 + logits + tiles)
    assert dense_bytes(drawn) == 2 * (w2 + 2 * logits + tiles)
    # 16 candidates in 4 groups of 64: base, maxima twice, all words again, W2 rows, ids and values
    each = 2 * (vocab + 2 * 4 + vocab + 16 * 16) + 2 * 16 * 8
    assert candidate_bytes(greedy, 16) == 6 * each
    assert candidate_bytes(drawn, 16) == 6 * (each + 16 * 8)


def test_bytes_at_serving_size() -> None:
    """256 requests, γ = 7, V = 151,936, r = 256: the figures that the method was designed by."""
    greedy, drawn = (Shape(256, 7, drawn=drawn) for drawn in (False, True))
    assert built_in_bytes(greedy) / 1e9 == pytest.approx(3.3, abs=0.05)
    assert built_in_bytes(drawn) / 1e9 == pytest.approx(3.8, abs=0.05)
    assert dense_bytes(greedy) / 1e9 == pytest.approx(1.1, abs=0.1)
    assert dense_bytes(drawn) / 1e9 == pytest.approx(1.7, abs=0.1)
    assert candidate_bytes(drawn, 64) < dense_bytes(drawn) / 2


def test_row_states_the_share_of_the_floor() -> None:
    """A millisecond's worth of bytes in two milliseconds is half."""
    found = row("dense", Shape(1, 1), 10**9, 2.0, 1e12)
    assert found["floor_ms"] == pytest.approx(1.0)
    assert found["share_of_floor"] == pytest.approx(0.5)
    rows = [row("built-in", Shape(1, 1), 10**9, 3.0, 1e12), found]
    assert table(rows).splitlines()[-1] == "| 1 | 1 | greedy | 3.000 | 2.000 | 1.50 | 50% |"


@pytest.mark.parametrize("drawn", [False, True])
def test_arms_draw_the_same(drawn: bool) -> None:
    """vLLM's loop and our dense mode on the benchmark's own inputs, at a small size in float32."""
    inputs = Inputs(Shape(3, 2, 200, 16, 4, drawn), str(DEVICE))
    expected = built_in(inputs)().clone()
    confidences = inputs.confidences.clone()
    assert torch.equal(ours(inputs, None)(), expected)
    torch.testing.assert_close(inputs.confidences, confidences)
    inputs.tokens.zero_()
    assert (ours(inputs, 16)() >= 0).all()
    assert inputs.tokens.any()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_command_says_that_it_needs_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "draft"
    done = CliRunner().invoke(app, ["--out", str(out)])
    assert done.exit_code != 0
    assert "NVIDIA GPU" in done.output
    assert not out.exists()
