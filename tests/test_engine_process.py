"""An engine in a process of its own that does not come up, or does not answer."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from benchmarks.engine_options import capture_sizes
from benchmarks.engine_process import EngineError, EngineProcess
from benchmarks.online import serve_words
from vllm_dspark import cpu


def test_an_engine_that_ends_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    """A target that does not exist; the error names the arm and holds vLLM's reason."""
    missing = str(tmp_path / "nowhere")
    process = EngineProcess("peer", {"model": missing}, cpu.environment())
    with pytest.raises(EngineError, match=r"(?s)arm peer ended.*nowhere"):
        process.ready()
    process.stop()


def test_an_engine_that_hangs_is_ended() -> None:
    """Nothing waits for ever: the limit ends the process and says so."""
    process = EngineProcess("peer", {"model": "x"}, dict(os.environ), limit_s=0.2)
    with pytest.raises(EngineError, match=r"did not answer within 0\.2 s"):
        process.ready()


def test_capture_sizes_pad_little() -> None:
    """Ascending, up to the limit, and no step above 32 tokens grows by more than a quarter."""
    sizes = capture_sizes(2048)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == 2048
    assert all(b <= 1.25 * a for a, b in itertools.pairwise(sizes) if a >= 32)
    assert capture_sizes(12) == [1, 2, 4, 8]


def test_options_of_llm_as_words_of_vllm_serve() -> None:
    """Numbers, switches on and off, and JSON."""
    options = {"max_model_len": 64, "enforce_eager": True, "enable_prefix_caching": False,
               "speculative_config": {"method": "dspark"}}  # fmt: skip
    assert serve_words(options) == [
        "--max-model-len", "64", "--enforce-eager", "--no-enable-prefix-caching",
        "--speculative-config", '{"method": "dspark"}',
    ]  # fmt: skip
