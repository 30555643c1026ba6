"""From the bare word `dspark` to a drafter: parsing, look-up order, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_dspark.drafters import (
    DRAFTER_ARCHITECTURES,
    PUBLISHED,
    UnknownDrafterError,
    carries_own_drafter,
    drafters_beside,
    find_drafter,
    is_drafter_config,
    parse_bare_word,
    published_name,
)

PLAIN_TARGET: dict[str, Any] = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
DRAFTER: dict[str, Any] = {"architectures": ["Qwen3DSparkModel"], "model_type": "qwen3"}


def put(folder: Path, config: dict[str, Any] | str) -> Path:
    """A folder with a config.json, from a dict or verbatim."""
    folder.mkdir(parents=True)
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("dspark", None),
        ("  dspark \n", None),
        ("dspark:org/name", "org/name"),
        ("dspark:/a/folder with spaces", "/a/folder with spaces"),
        ("dspark:C:/models/x", "C:/models/x"),  # colons behind the first belong to the name
        ("dspark:host:8000/a:b", "host:8000/a:b"),
        ("dspark:./relative", "./relative"),
        ("dspark:dspark", "dspark"),
    ],
)
def test_bare_word_parses(text: str, model: str | None) -> None:
    expected = {"method": "dspark"} if model is None else {"method": "dspark", "model": model}
    assert parse_bare_word(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        '{"method": "dspark"}',
        '{"method": "ngram", "num_speculative_tokens": 2}',
        "ngram",
        "",
        "DSpark",
        "dsparkx",
        "dspark/x",
        "my:dspark:x",
    ],
)
def test_everything_else_is_left_to_vllm(text: str) -> None:
    """JSON above all; and no near miss is guessed to be the bare word."""
    assert parse_bare_word(text) is None


@pytest.mark.parametrize("text", ["dspark:", " dspark: "])
def test_colon_without_a_name(text: str) -> None:
    with pytest.raises(ValueError, match="names no drafter; needed is dspark or dspark:PATH_OR_ID"):
        parse_bare_word(text)


@pytest.mark.parametrize("target", sorted(PUBLISHED))
@pytest.mark.parametrize("spell", [str, str.lower, str.upper, lambda name: name + "/"])
def test_published_table_is_looked_up_in_any_spelling(target: str, spell: Any) -> None:
    assert find_drafter(spell(target), PLAIN_TARGET) == PUBLISHED[target]


@pytest.mark.parametrize("target", sorted(PUBLISHED))
def test_published_target_in_the_hub_cache(target: str, tmp_path: Path) -> None:
    """A snapshot folder is a local path, its name is in the path above it."""
    owner, name = target.split("/")
    snapshot = put(
        tmp_path / "hub" / f"models--{owner}--{name}" / "snapshots" / "abc", PLAIN_TARGET
    )
    assert published_name(str(snapshot)) == target
    assert find_drafter(str(snapshot), PLAIN_TARGET) == PUBLISHED[target]


def test_published_pairs_are_those_of_the_paper() -> None:
    """A wrong row would serve a drafter of another target."""
    for target, drafter in PUBLISHED.items():
        size = target.split("-")[-1] if "Qwen" in target else "12b"
        family = "qwen3" if "Qwen3" in target else "gemma4"
        assert drafter == f"deepseek-ai/dspark_{family}_{size.lower()}_block7"
    assert len(PUBLISHED) == 4


def test_drafter_subfolder_wins_over_the_table(tmp_path: Path) -> None:
    """Whoever puts a drafter into the target's folder means that one."""
    target = put(tmp_path / "models--Qwen--Qwen3-4B" / "snapshots" / "abc", PLAIN_TARGET)
    drafter = put(target / "dspark", DRAFTER)
    assert find_drafter(str(target), PLAIN_TARGET) == str(drafter)


@pytest.mark.parametrize(
    "other",
    [
        PLAIN_TARGET,  # some other model
        {"architectures": None},
        {},
        "{not json",
        "[1, 2]",  # JSON, but no object
        "",
    ],
    ids=repr,
)
def test_subfolders_that_are_no_drafters_are_passed_over(other: Any, tmp_path: Path) -> None:
    target = put(tmp_path / "target", PLAIN_TARGET)
    put(target / "another", other)
    (target / "no_config").mkdir()
    assert drafters_beside(str(target)) == []
    drafter = put(target / "dspark", DRAFTER)
    assert find_drafter(str(target), PLAIN_TARGET) == str(drafter)


def test_several_drafters_are_listed(tmp_path: Path) -> None:
    """Choosing one of them would be a guess."""
    target = put(tmp_path / "target", PLAIN_TARGET)
    drafters = [put(target / name, DRAFTER) for name in ("b", "a")]
    with pytest.raises(UnknownDrafterError) as caught:
        find_drafter(str(target), PLAIN_TARGET)
    message = str(caught.value)
    assert "found 2 drafters" in message
    for drafter in drafters:
        assert f"dspark:{drafter}" in message


@pytest.mark.parametrize(
    "config",
    [{"dspark_block_size": 5}, {"text_config": {"dspark_block_size": 5}}],
    ids=["flat", "nested"],
)
def test_target_that_carries_its_own_drafter(config: dict[str, Any]) -> None:
    assert carries_own_drafter(config)
    assert find_drafter("deepseek-ai/DeepSeek-V4-Flash-DSpark", config) == (
        "deepseek-ai/DeepSeek-V4-Flash-DSpark"
    )


@pytest.mark.parametrize("config", [PLAIN_TARGET, {"text_config": None}], ids=repr)
def test_target_without_one(config: dict[str, Any]) -> None:
    assert not carries_own_drafter(config)


@pytest.mark.parametrize("target", ["someone/unknown", "Qwen3-4B", "Qwen/Qwen3-4B-Base"])
def test_unknown_target_lists_what_is_known(target: str) -> None:
    """A target that is only called alike must not get another's drafter."""
    with pytest.raises(UnknownDrafterError) as caught:
        find_drafter(target, PLAIN_TARGET)
    message = str(caught.value)
    assert repr(target) in message
    assert "dspark:PATH_OR_ID" in message
    for known, drafter in PUBLISHED.items():
        assert f"{known} -> dspark:{drafter}" in message


def test_hub_id_has_no_subfolders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids are not paths: a target that is not on disk has nothing beside it."""
    monkeypatch.chdir(tmp_path)
    assert drafters_beside("someone/unknown") == []


@pytest.mark.parametrize("architecture", sorted(DRAFTER_ARCHITECTURES))
def test_drafters_are_known_by_architecture(architecture: str) -> None:
    assert is_drafter_config({"architectures": ["Other", architecture]})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"speculators_model_type": "dspark"}, True),
        ({"speculators_model_type": "eagle3"}, False),
        (PLAIN_TARGET, False),
        ({"architectures": ["DFlashDraftModel"]}, False),
        ({"architectures": None}, False),
        ({}, False),
    ],
    ids=repr,
)
def test_drafters_are_known_by_format(config: dict[str, Any], expected: bool) -> None:
    assert is_drafter_config(config) is expected
