"""Prompts of a sweep: every format that users have gives the same kind of texts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from benchmarks.prompts import PromptsError, load_prompts
from tests.engine import MICRO

TARGET = str(MICRO)


def test_python_text_is_held_out_and_repeatable() -> None:
    """The same pieces every time, none twice, none that the pair was trained on."""
    from examples.training.corpus import held_out_texts

    first, again = (load_prompts("python-text", TARGET, 5) for _ in range(2))
    assert first == again
    assert len(set(first.texts)) == 5
    held_out = "".join(held_out_texts())
    assert sum(text in held_out for text in first.texts) >= 4  # one may span two files


def test_deepspec_takes_the_first_turn_into_the_chat_template(tmp_path: Path) -> None:
    """`turns`, as DeepSpec's files have them; and bare where that is wanted."""
    file = tmp_path / "gsm.jsonl"
    file.write_text("".join(json.dumps({"turns": [f"question {i}", "more"]}) + "\n" for i in "ab"))
    prompts = load_prompts(f"deepspec:{file}", TARGET, 3)
    assert prompts.name == "deepspec gsm.jsonl"
    assert [t.count("question a") for t in prompts.texts] == [1, 0, 1]  # starts again
    assert "more" not in prompts.texts[0]
    assert prompts.texts[0] != "question a"
    assert load_prompts(f"deepspec:{file}", TARGET, 1, chat=False).texts == ("question a",)


def test_custom_and_sharegpt_go_through_vllm(tmp_path: Path) -> None:
    """vLLM's own readers of its own formats."""
    custom = tmp_path / "custom.jsonl"
    custom.write_text("".join(json.dumps({"prompt": f"word {i}"}) + "\n" for i in range(4)))
    found = load_prompts(f"custom:{custom}", TARGET, 4, chat=False)
    assert sorted(found.texts) == [f"word {i}" for i in range(4)]
    question = "what is " + "it " * 20
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "x " * 30}]
    sharegpt = tmp_path / "share.json"
    sharegpt.write_text(json.dumps([{"conversations": turns}] * 3))
    found = load_prompts(f"sharegpt:{sharegpt}", TARGET, 2)
    assert found.texts == (question,) * 2


@pytest.mark.parametrize(
    ("dataset", "reason"),
    [("nonsense:x", "unknown name"), ("deepspec:nowhere.jsonl", "No such file"),
     ("custom:nowhere.jsonl", "nowhere")],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_the_formats(dataset: str, reason: str) -> None:
    """Before any engine starts, naming what was given and what would do."""
    with pytest.raises(PromptsError, match=f"(?s){reason}.*Needed is python-text"):
        load_prompts(dataset, TARGET, 1)


def test_wrong_field_is_refused(tmp_path: Path) -> None:
    """A DeepSpec file without `turns`."""
    file = tmp_path / "wrong.jsonl"
    file.write_text('{"prompt": "x"}\n')
    with pytest.raises(PromptsError, match="turns"):
        load_prompts(f"deepspec:{file}", TARGET, 1)


def test_digest_is_of_the_texts_that_are_sent(tmp_path: Path) -> None:
    """Another text, another digest; the file holds the texts that were digested, and lengths."""
    prompts = load_prompts("python-text", TARGET, 2)
    prompts.write(tmp_path / "sent.jsonl", [5, 9])
    sent = [json.loads(line) for line in (tmp_path / "sent.jsonl").read_text().splitlines()]
    assert [line.pop("output_tokens") for line in sent] == [5, 9]
    text = "".join(json.dumps(line) + "\n" for line in sent)
    assert hashlib.sha256(text.encode()).hexdigest() == prompts.digest
    assert prompts.digest != load_prompts("python-text", TARGET, 3).digest
