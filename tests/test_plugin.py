"""The entry point: what loading the plugin does, and what it leaves alone."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.child import ask, clean_environment
from tests.conftest import HAS_GPU
from vllm_dspark import compat
from vllm_dspark.compat import IncompatibleVllmError
from vllm_dspark.integration.ledger import (
    ENGINE_SEAMS,
    FRONT_END_SEAMS,
    INTERPRETER_SEAMS,
    LEDGER,
    REQUEST_SEAMS,
)
from vllm_dspark.plugin import register


@pytest.fixture
def request_seams() -> Iterator[None]:
    """All request seams in place, as in every process that loaded the plugin."""
    register()
    yield
    register()


@pytest.fixture
def untouched_vllm() -> Iterator[None]:
    """No request seam in place; afterwards they are back."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # vLLM does so once a process, at times that vary
    for patch in REQUEST_SEAMS:
        patch.undo()
    yield
    register()


def test_entry_point_is_registered() -> None:
    """vLLM finds the plugin by this name, which is also the one for VLLM_PLUGINS."""
    (found,) = (
        point
        for point in importlib.metadata.entry_points(group="vllm.general_plugins")
        if point.name == "dspark"
    )
    assert found.value == "vllm_dspark.plugin:register"
    assert found.load() is register


@pytest.mark.parametrize("module", ["vllm_dspark", "vllm_dspark.plugin", "vllm_dspark.drafters"])
def test_importing_is_cheap(module: str) -> None:
    """vLLM swallows import errors of a plugin's module, so there must be nothing to go wrong."""
    code = f"""
        import sys
        import {module}
        heavy = ("torch", "vllm", "triton", "transformers")
        answer = [name for name in heavy if name in sys.modules]
    """
    assert ask(code, clean_environment()) == []


def test_registering_twice_is_registering_once(untouched_vllm: None) -> None:
    assert not any(patch.is_applied() for patch in REQUEST_SEAMS)
    register()
    assert all(patch.is_applied() for patch in REQUEST_SEAMS)
    first = [vars(patch._owner()[0])[patch._owner()[1]] for patch in REQUEST_SEAMS]
    register()
    assert [vars(patch._owner()[0])[patch._owner()[1]] for patch in REQUEST_SEAMS] == first


@pytest.mark.skipif(HAS_GPU, reason="about the interpreter; this machine has a GPU")
def test_interpreter_seams_open_where_kernels_are_interpreted() -> None:
    for patch in INTERPRETER_SEAMS:
        patch.undo()
    register()
    assert all(patch.is_applied() for patch in INTERPRETER_SEAMS)


WHAT_IS_PATCHED = """
    import sys
    from vllm.plugins import load_general_plugins
    load_general_plugins()
    before = set(sys.modules)
    from vllm_dspark.integration.ledger import INTERPRETER_SEAMS, REQUEST_SEAMS
    import torch
    answer = {
        "patched": [patch.is_applied() for patch in REQUEST_SEAMS],
        "loaded": sorted(name for name in before if name.startswith("vllm_dspark")),
        "interpreter": [patch.is_applied() for patch in INTERPRETER_SEAMS],
        "runner": "vllm.v1.worker.gpu.model_runner" in before,
        "cuda": torch.cuda.is_initialized(),
    }
"""


def test_plugin_left_out_of_vllm_plugins_patches_nothing() -> None:
    """The documented off switch."""
    seen = ask(WHAT_IS_PATCHED, clean_environment(VLLM_PLUGINS="another"))
    assert not any(seen["patched"])
    assert seen["loaded"] == []


def test_loading_the_plugin_opens_request_seams_only() -> None:
    """Engine seams wait for a request for DSpark: their module is not even imported."""
    seen = ask(WHAT_IS_PATCHED, clean_environment(VLLM_PLUGINS="dspark"))
    assert all(seen["patched"])
    assert not any(seen["interpreter"])
    assert seen["runner"] is False
    assert seen["cuda"] is False
    engine_parts = {f"vllm_dspark.integration.{n}" for n in ("proposer", "models", "worker")}
    assert not engine_parts & set(seen["loaded"])


def test_ledger_is_complete_and_each_patch_has_its_reasons() -> None:
    assert LEDGER == REQUEST_SEAMS + FRONT_END_SEAMS + ENGINE_SEAMS + INTERPRETER_SEAMS
    assert len({patch.target for patch in LEDGER}) == len(LEDGER)
    for patch in LEDGER:
        assert patch.reason
        assert patch.upstream


def parser_of(kind: str) -> argparse.ArgumentParser:
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = {"EngineArgs": EngineArgs, "AsyncEngineArgs": AsyncEngineArgs}[kind]
    return args.add_cli_args(FlexibleArgumentParser())


KINDS = pytest.mark.parametrize("kind", ["EngineArgs", "AsyncEngineArgs"])


@KINDS
@pytest.mark.parametrize("flag", ["--speculative-config", "--speculative_config", "-sc"])
@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("dspark", {"method": "dspark"}),
        ("dspark:/a b/c:d", {"method": "dspark", "model": "/a b/c:d"}),
    ],
)
def test_bare_word_through_vllms_own_parser(
    request_seams: None, kind: str, flag: str, word: str, expected: dict[str, str]
) -> None:
    assert parser_of(kind).parse_args([flag, word]).speculative_config == expected


@KINDS
def test_colon_without_a_name_on_the_command_line(
    request_seams: None, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser_of(kind).parse_args(["--speculative-config", "dspark:"])
    assert "needed is dspark or dspark:PATH_OR_ID" in capsys.readouterr().err


def test_help_tells_of_the_bare_word(request_seams: None) -> None:
    (action,) = (
        action
        for action in parser_of("EngineArgs")._actions
        if "--speculative-config" in action.option_strings
    )
    assert "dspark:PATH_OR_ID" in (action.help or "")


NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


@KINDS
@pytest.mark.parametrize(
    "line",
    [
        [],
        ["--speculative-config", json.dumps(NGRAM)],
        ["--speculative-config", json.dumps({"method": "dspark", "model": "x"})],
        ["--speculative-config.method", "ngram", "--speculative-config.num_speculative_tokens=2"],
        ["--speculative-config", "null"],
        ["--spec-method", "ngram", "--spec-tokens", "2"],
    ],
    ids=str,
)
def test_everything_else_parses_as_without_us(
    untouched_vllm: None, kind: str, line: list[str]
) -> None:
    """All arguments are compared, with and without the seams."""
    without = vars(parser_of(kind).parse_args(line))
    assert not any(patch.is_applied() for patch in REQUEST_SEAMS)
    register()
    assert vars(parser_of(kind).parse_args(line)) == without


def test_what_vllm_refuses_stays_refused(
    request_seams: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser_of("EngineArgs").parse_args(["--speculative-config", "{broken"])
    assert "{broken" in capsys.readouterr().err


@pytest.fixture
def unsupported(
    untouched_vllm: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Any], Any]]:
    """register() on a vLLM we do not know; gives the call that makes a speculative config."""
    from vllm.engine.arg_utils import EngineArgs

    def require() -> None:
        raise IncompatibleVllmError("found vLLM 9.9")

    # What vLLM's own method would return, so that being handed on can be seen.
    monkeypatch.setattr(EngineArgs, "create_speculative_config", lambda self, *args: ("own", args))
    with monkeypatch.context() as patch:
        patch.setattr(compat, "require_supported_vllm", require)
        register()
        yield lambda fields: EngineArgs(model="m", **fields).create_speculative_config(1, 2)


@pytest.mark.parametrize(
    "fields",
    [
        {"speculative_config": {"method": "dspark", "model": "x"}},
        {"speculative_config": "dspark"},
        {"speculative_config": "dspark:x"},
        {"spec_method": "dspark"},
    ],
    ids=str,
)
def test_unsupported_vllm_fails_requests_for_dspark(
    unsupported: Callable[[Any], Any], fields: dict[str, Any]
) -> None:
    with pytest.raises(IncompatibleVllmError, match=r"found vLLM 9\.9"):
        unsupported(fields)


@pytest.mark.parametrize(
    "fields",
    [{}, {"speculative_config": NGRAM}, {"spec_method": "ngram"}, {"speculative_config": {}}],
    ids=str,
)
def test_unsupported_vllm_goes_on_with_everything_else(
    unsupported: Callable[[Any], Any], fields: dict[str, Any]
) -> None:
    assert unsupported(fields) == ("own", (1, 2))
    assert not any(patch.is_applied() for patch in REQUEST_SEAMS)


def test_unsupported_vllm_is_guarded_once(unsupported: Callable[[Any], Any]) -> None:
    """register() is re-entrant there too."""
    from vllm.engine.arg_utils import EngineArgs

    guard = EngineArgs.create_speculative_config
    register()
    assert EngineArgs.create_speculative_config is guard
