"""The verification benchmark: its arithmetic, and that its arms agree; no figure is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.spec_decode import adaptive_verification

from benchmarks.kernels_verify import allocation_table, allocations, app, arms, table, timed
from benchmarks.verify_step import REGIMES, Step, sampling
from benchmarks.verify_traffic import ACCEPTANCE, Shape, floor_bytes, ragged_lengths, rows_needed
from tests.kernel_cases import DEVICE
from vllm_dspark.integration.ledger import INTERPRETER_SEAMS


def test_rows_of_small_steps_counted_by_hand() -> None:
    """Of 3 drafts 1 accepted: 2 rows tested, 1 replaced. Of 2 both: 2 tested. Of none: none."""
    assert rows_needed([1, 2, 0], [3, 2, 0]) == (4, 1)
    shape = Shape(3, 3, vocab=10, itemsize=2)
    everyone, first = [False] * 3, [True, False, False]
    assert floor_bytes(shape, [1, 2, 0], [3, 2, 0], everyone) == (4 + 2 + 4) * 20
    assert floor_bytes(shape, [1, 2, 0], [3, 2, 0], first) == (4 + 2 + 2) * 20
    one_hot = Shape(3, 3, vocab=10, itemsize=2, dense=False)
    assert floor_bytes(one_hot, [1, 2, 0], [3, 2, 0], everyone) == (4 + 2) * 20


def test_lengths_follow_the_acceptance() -> None:
    lengths = ragged_lengths(20_000, 9, np.random.default_rng(0))
    assert lengths.min() == 1
    assert lengths.max() == 9
    survival = np.cumprod([*ACCEPTANCE, ACCEPTANCE[-1]])
    for step in (1, 2, 7, 8):
        assert (lengths > step).mean() == pytest.approx(survival[step - 1], abs=0.01)


def test_time_against_the_floor() -> None:
    """A millisecond's worth of bytes in two milliseconds is half."""
    found = timed(2.0, 10**9, 1e12)
    assert found == pytest.approx({"ms": 2.0, "floor_ms": 1.0, "share_of_floor": 0.5})
    names = {"requests": 1, "drafts": "dense", "regime": "mixed", "peak_bytes": 10}
    rows = [
        names | found | {"arm": arm, "ms": ms} for arm, ms in (("built-in", 4.0), ("ours", 2.0))
    ]
    cells = "| dense | mixed | 1 | 4.000 | 2.000 | 2.00 | 50% | 0.0 | 0.0 |"
    assert table(rows).splitlines()[-1] == cells
    times = {"built-in": 6.0, "torch": 4.0, "ours": 1.0}
    shares = [{"requests": 1, "arm": arm, "ms": ms} for arm, ms in times.items()]
    assert allocation_table(shares).splitlines()[-1] == "| 1 | 6000.0 | 4000.0 | 1000.0 | 6.00 |"


def test_regimes() -> None:
    assert [sampling("mixed", i)["temperature"] for i in range(3)] == [0.0, 0.7, 1.0]
    assert sampling("temperature 0.7", 3) == {"temperature": 0.7}
    with_top_p = [i for i in range(30) if "top_p" in sampling("top-p for a tenth", i)]
    assert with_top_p == [0, 10, 20]
    assert len(REGIMES) == 5


@pytest.fixture
def vllm_runs_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without a GPU: no memory that host and device share, and top-p in torch."""
    applied = []
    if DEVICE.type == "cpu":
        monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)
        applied = [patch for patch in INTERPRETER_SEAMS if patch.apply()]
    yield
    for patch in applied:
        patch.undo()


@pytest.mark.usefixtures("vllm_runs_here")
@pytest.mark.parametrize("regime", ["mixed", "top-p for a tenth"])
@pytest.mark.parametrize("dense", [True, False])
def test_arms_agree(regime: str, dense: bool) -> None:
    """vLLM's sampler and ours on the benchmark's own inputs, at a small size in float32."""
    step = Step(Shape(4, 3, vocab=90, itemsize=4, dense=dense), regime, str(DEVICE))
    theirs, ours = (call() for call in arms(step).values())
    assert torch.equal(ours.num_sampled, theirs.num_sampled)
    assert torch.equal(ours.num_rejected, theirs.num_rejected)
    for row, (tokens, expected) in enumerate(
        zip(ours.sampled_token_ids, theirs.sampled_token_ids, strict=True)
    ):
        count = int(theirs.num_sampled[row])
        assert tokens[:count].tolist() == expected[:count].tolist()


@pytest.fixture
def ranked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU vLLM's ranking is not compiled, which takes long."""
    if DEVICE.type == "cpu":
        plain = adaptive_verification._assign_draft_token_budget
        monkeypatch.setattr(adaptive_verification, "_assign_draft_token_budget_compiled", plain)


@pytest.mark.usefixtures("ranked_here")
@pytest.mark.parametrize("requests", [1, 5, 16])
def test_allocations_agree(requests: int) -> None:
    """All arms share the same budget out alike, also when they are called again."""
    calls = allocations(requests, 7, str(DEVICE))
    assert list(calls) == ["built-in", "torch", "ours"]
    expected = calls["ours"]().tolist()
    lengths = np.diff(expected) - 1
    assert lengths.sum() == 7 * requests // 2
    assert requests == 1 or len(set(lengths)) > 1
    for call in (*calls.values(), *calls.values()):
        boundaries = call()
        assert boundaries.tolist() == expected
        boundaries[1:] = -1  # the next call is to write them; the first is 0 already


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_command_says_that_it_needs_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "verify"
    done = CliRunner().invoke(app, ["--out", str(out)])
    assert done.exit_code != 0
    assert "NVIDIA GPU" in done.output
    assert not out.exists()
