"""A request's own options over HTTP, as `vllm_xargs`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError

from tests.engine import MICRO
from tests.test_http import GREEDY, client, server
from vllm_dspark.server import VllmServer

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def speculating() -> Iterator[VllmServer]:
    one = server("--speculative-config", f"dspark:{MICRO / 'dspark-vanilla'}")
    try:
        one.start()
        one.wait_until_healthy()
        yield one
    finally:
        one.stop()


def ask(one: VllmServer, options: dict[str, Any]) -> list[int]:
    body = GREEDY["extra_body"] | {"vllm_xargs": options}
    created = client(one).completions.create(
        prompt="def main(self", **(GREEDY | {"extra_body": body})
    )
    return (created.choices[0].model_extra or {})["token_ids"]


def test_limit_changes_no_token(speculating: VllmServer) -> None:
    assert ask(speculating, {"dspark_max_verified": 0}) == ask(speculating, {})
    assert ask(speculating, {"dspark_max_verified": 2}) == ask(speculating, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dspark_max_verified": 8}, "whole number from 0 to 7"),
        ({"dspark_max_verified": -1}, "whole number from 0 to 7"),
        ({"dspark_max_verified": "3"}, "whole number from 0 to 7"),
        ({"dspark_most_verified": 3}, "nearest is 'dspark_max_verified'"),
    ],
    ids=str,
)
def test_nonsense_is_a_400(speculating: VllmServer, options: Any, message: str) -> None:
    """For its sender, and the server goes on."""
    with pytest.raises(BadRequestError) as caught:
        ask(speculating, options)
    assert caught.value.status_code == 400
    assert message in str(caught.value)
    speculating.check_alive()


def test_mode_is_logged_with_its_reason(speculating: VllmServer) -> None:
    log = speculating.log.read_text()
    reason = "verification adaptive, host mode: the CPU backend reads query lengths on the host"
    assert reason in log or "verification adaptive, device mode" in log
