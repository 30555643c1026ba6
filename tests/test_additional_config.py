"""vLLM's `additional_config` around our own entry: no object at all, or our name misspelt."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from vllm_dspark import config as config_module
from vllm_dspark.config import DSparkConfig, DSparkConfigError


@contextlib.contextmanager
def vllm_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """`caplog` sees our logger: vLLM, where it is imported, keeps its records from the root."""
    logger = logging.getLogger("vllm.dspark")
    logger.addHandler(caplog.handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.propagate = propagate
        logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("given", ["x", "", ["dspark"], 3, False], ids=repr)
def test_what_is_no_object_is_refused(given: Any) -> None:
    """A string would lose every option in silence."""
    with pytest.raises(DSparkConfigError, match="needed is an object") as caught:
        DSparkConfig.from_additional_config(given)
    assert f"additional_config is {given!r};" in str(caught.value)


@pytest.mark.parametrize("key", ["dpsark", "DSpark", "d-spark", "vllm_dspark", "dsparks"])
def test_a_key_close_to_ours_is_warned_of_once(key: str, caplog: pytest.LogCaptureFixture) -> None:
    """The engine reads its options a dozen times; the operator reads one line."""
    config_module._warn_of.cache_clear()
    with vllm_log(caplog):
        for _ in range(3):
            assert DSparkConfig.from_additional_config({key: {"depth": 2}, "a": 1}).depth == "auto"
    (line,) = caplog.messages
    assert f"has {key!r} and no 'dspark'" in line


@pytest.mark.parametrize(
    "given",
    [
        {"dspark": {}, "dpsark": {}},
        {"ascend_scheduler_config": {}, "gdn_prefill_backend": "x", "depth": 2, 7: 1},
    ],
    ids=str,
)
def test_other_keys_stay_unmentioned(given: Any, caplog: pytest.LogCaptureFixture) -> None:
    """They belong to other plugins, and beside our own key nothing was lost."""
    config_module._warn_of.cache_clear()
    with vllm_log(caplog):
        DSparkConfig.from_additional_config(given)
    assert caplog.messages == []
