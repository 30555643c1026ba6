"""Every drafting kernel compiled for Hopper at the sizes that serve, without a GPU: code that only
the interpreter takes is caught here, and so are registers that spill."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.child import ask, clean_environment

ROOT = Path(__file__).parent.parent
SHARED_LIMIT = 227 * 1024  # bytes, of a Hopper block
REGISTERS = 65_536  # of a multiprocessor


def compiled(*arguments: object) -> dict[str, dict[str, int]]:
    """What `compile_blocks` found, in a process without the interpreter."""
    code = f"""
        from tests.kernel_compile import compile_blocks
        answer = compile_blocks(*{arguments!r})
    """
    return ask(code, clean_environment(PYTHONPATH=str(ROOT)))


@pytest.mark.parametrize(
    ("kind", "requests", "dtype", "vocab", "rank", "count"),
    [
        ("vanilla", 256, "bfloat16", 151_936, 256, 64),  # Qwen3's drafters
        ("rnn", 64, "bfloat16", 151_936, 256, 64),
        ("gated", 1, "float16", 50_257, 96, 16),  # strides that no vector load fits
        ("rnn", 64, "float32", 262_144, 512, 256),  # everything at its largest
    ],
)
def test_kernels_compile_for_hopper(
    kind: str, requests: int, dtype: str, vocab: int, rank: int, count: int
) -> None:
    found = compiled(kind, requests, dtype, vocab, rank, [count])
    names = {"dense_scores", "dense_pick", "group_maxima", "select", "candidate_walk", "confidence"}
    assert {name.split()[-1].rstrip("'") for name in found} == {f"{n}_kernel" for n in names}
    for name, usage in found.items():
        assert usage["shared"] <= SHARED_LIMIT, (name, usage)
        assert usage["stack"] == 0, (name, usage)  # no spills
        assert usage["registers"] * usage["threads"] <= REGISTERS, (name, usage)
        if "dense_scores" in name and dtype != "float32":
            assert usage["matrix"], (name, usage)
            assert 2 * usage["registers"] * usage["threads"] <= REGISTERS, (name, usage)
