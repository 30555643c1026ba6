"""What a record says of the command that made it."""

from __future__ import annotations

import pytest

from benchmarks import provenance


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("/mnt/models/pair-8b", "pair-8b"),
        ("custom:/mnt/x.jsonl", "custom:x.jsonl"),
        ("http://host/x", "http://host/x"),
        ("A 1=/mnt/a/one,B=/mnt/two", "A 1=one,B=two"),
        ("--out=/mnt/out.json", "--out=out.json"),
        ("examples/tiny-python", "examples/tiny-python"),
        ("no speculation,fixed 3", "no speculation,fixed 3"),
    ],
)
def test_folders_of_a_machine_are_left_out(word: str, kept: str) -> None:
    """Absolute paths alone, and wherever a word has them."""
    assert provenance._without_folder(word) == kept
