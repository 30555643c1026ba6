"""Prompts for `vllm-dspark calibrate`: every kind of file, and what is no prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_dspark.calibrate_error import CalibrationError
from vllm_dspark.calibrate_prompts import read_prompts


def test_prompts_of_all_kinds(tmp_path: Path) -> None:
    """JSON lines with either key, text, and those that come with the package."""
    lines = tmp_path / "p.jsonl"
    lines.write_text(json.dumps({"prompt": "a"}) + "\n\n" + json.dumps({"turns": ["b", "c"]}))
    assert read_prompts(lines) == ["a", "b"]
    text = tmp_path / "p.txt"
    text.write_text("one\ntwo\n")
    assert read_prompts(text) == ["one", "two"]
    shipped = read_prompts(None)
    assert len(shipped) == len(set(shipped)) >= 40


def test_a_line_of_json_ends_where_the_line_ends(tmp_path: Path) -> None:
    """Not at the other characters that end lines for Python, which JSON has bare in strings."""
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False), "utf-8")
    assert read_prompts(path) == ["a\u2028b\x85c"]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"text": "a"}', 'it is {"text": "a"}'),
        ("[1]", r"it is \[1\]"),
        ("null", "it is null"),
        ("{", "it is no JSON"),
        ('{"turns": []}', r"its turns is \[\]"),
        ('{"turns": "abc"}', 'its turns is "abc"'),  # whose first is a letter
        ('{"turns": [null, "a"]}', r"its turns is \[null"),
        ('{"turns": {"0": "a"}}', 'its turns is {"0"'),
        ('{"prompt": null}', "its prompt is null"),
        ('{"prompt": ["a"]}', r'its prompt is \["a"\]'),
        ('{"prompt": 7}', "its prompt is 7"),
        ('{"prompt": " "}', 'its prompt is " "'),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_file_and_line(
    tmp_path: Path, line: str, found: str
) -> None:
    """And what was needed. Blank lines count, as they do in an editor."""
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n\n' + line)
    with pytest.raises(
        CalibrationError, match=rf"line 3 of .*p\.jsonl' is no prompt: {found}.*"
    ) as e:
        read_prompts(path)
    assert "Needed is an object with prompt or turns" in str(e.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"prompts '.*nowhere\.txt' cannot be read"):
        read_prompts(tmp_path / "nowhere.txt")
