"""The real server over HTTP: `vllm serve MODEL --speculative-config dspark:DRAFTER`.

Two servers, one without speculation, answer the same requests of the real `openai` client. Ours
drafts the whole block in every step, so that what is tested does not hang on whether drafts pay on
this machine.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI

from tests.conftest import HAS_GPU
from tests.engine import MICRO
from vllm_dspark import cpu
from vllm_dspark.server import ServerError, VllmServer

pytestmark = pytest.mark.engine

PROMPTS = ("import os\n", "def main(self", "class A(object):\n", "for i in ")
GREEDY: dict[str, Any] = {
    "model": "micro",
    "temperature": 0,
    "max_tokens": 24,
    "extra_body": {"ignore_eos": True, "return_token_ids": True},
}


def server(*arguments: str) -> VllmServer:
    """A server of the micro pair's target, with the arguments that every test shares."""
    shared = ["--served-model-name", "micro", "--dtype", "float32", "--max-model-len", "256"]
    shared += [] if HAS_GPU else cpu.SERVE_ARGUMENTS
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    return VllmServer(str(MICRO), [*shared, *arguments], env=env)


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, VllmServer]]:
    """Both servers, started side by side."""
    drafter = f"dspark:{MICRO / 'dspark-vanilla'}"
    whole_block = '{"dspark": {"goal": "latency"}}'
    pair = {
        "target": server(),
        "dspark": server("--speculative-config", drafter, "--additional-config", whole_block),
    }
    try:
        for one in pair.values():
            one.start()
        for one in pair.values():
            one.wait_until_healthy()
        yield pair
    finally:
        for one in pair.values():
            one.stop()


def client(one: VllmServer) -> OpenAI:
    """The real client."""
    return OpenAI(base_url=f"{one.url}/v1", api_key="none", max_retries=0)


def completion(one: VllmServer, prompt: str) -> tuple[str, Any]:
    """Text and token ids of a plain completion."""
    choice = client(one).completions.create(prompt=prompt, **GREEDY).choices[0]
    return choice.text, (choice.model_extra or {})["token_ids"]


def streamed_completion(one: VllmServer, prompt: str) -> tuple[str, Any]:
    """The same in pieces."""
    text = ""
    ids: list[int] = []
    for chunk in client(one).completions.create(prompt=prompt, stream=True, **GREEDY):
        text += chunk.choices[0].text
        ids += (chunk.choices[0].model_extra or {}).get("token_ids") or []
    return text, ids


def chat(one: VllmServer, prompt: str) -> tuple[str, Any]:
    """Text and token ids of a chat completion."""
    messages: Any = [{"role": "user", "content": prompt}]
    choice = client(one).chat.completions.create(messages=messages, **GREEDY).choices[0]
    return choice.message.content or "", (choice.model_extra or {})["token_ids"]


def streamed_chat(one: VllmServer, prompt: str) -> tuple[str, Any]:
    """The same in pieces."""
    messages: Any = [{"role": "user", "content": prompt}]
    text = ""
    ids: list[int] = []
    for chunk in client(one).chat.completions.create(messages=messages, stream=True, **GREEDY):
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
            ids += (chunk.choices[0].model_extra or {}).get("token_ids") or []
    return text, ids


@pytest.mark.parametrize("ask", [completion, streamed_completion, chat, streamed_chat])
def test_answers_equal(servers: dict[str, VllmServer], ask: Any) -> None:
    """Every way to ask gives the target's own tokens, with drafts accepted on the way."""
    before = servers["dspark"].counters()
    for prompt in PROMPTS[:2]:
        text, ids = ask(servers["dspark"], prompt)
        assert (text, ids) == ask(servers["target"], prompt)
        assert len(ids) == 24
    after = servers["dspark"].counters()
    name = "vllm:spec_decode_num_accepted_tokens_total"
    assert after[name] > before.get(name, 0.0)


async def test_concurrent_answers_equal(servers: dict[str, VllmServer]) -> None:
    """Requests that share a batch do not touch each other."""

    async def all_of(one: VllmServer) -> list[Any]:
        async with AsyncOpenAI(base_url=f"{one.url}/v1", api_key="none") as asynchronous:
            answers = await asyncio.gather(
                *(asynchronous.completions.create(prompt=p, **GREEDY) for p in PROMPTS)
            )
        return [(a.choices[0].model_extra or {})["token_ids"] for a in answers]

    assert await all_of(servers["dspark"]) == await all_of(servers["target"])


def test_closing_a_stream_leaves_the_server_well(servers: dict[str, VllmServer]) -> None:
    """A client that goes away mid-answer is an aborted request; the next one is served."""
    stream = client(servers["dspark"]).completions.create(
        prompt=PROMPTS[0], stream=True, **(GREEDY | {"max_tokens": 100})
    )
    next(iter(stream))
    stream.close()
    assert completion(servers["dspark"], PROMPTS[1]) == completion(servers["target"], PROMPTS[1])


def test_bad_request_is_a_400(servers: dict[str, VllmServer]) -> None:
    """Nonsense is refused for its sender and harms nobody else."""
    with pytest.raises(BadRequestError):
        client(servers["dspark"]).completions.create(
            model="micro", prompt=PROMPTS[0], temperature=-3.0
        )
    servers["dspark"].check_alive()


def ours(one: VllmServer) -> dict[str, float]:
    """The plugin's metrics on /metrics, by what follows its name, summed over labels."""
    prefix = "vllm_dspark_"
    return {
        name.removeprefix(prefix): value
        for name, value in one.counters().items()
        if name.startswith(prefix) and not name.endswith("_created")
    }


def settled_counters(one: VllmServer) -> dict[str, float]:
    """The counters of an idle server. They travel behind the tokens that they are of, so this
    waits until two readings in a row are equal."""

    def read() -> dict[str, float]:
        time.sleep(1)
        counted = one.counters()
        return {name: counted[name] for name in counted if name.startswith(("vllm:spec", "vllm_"))}

    before, now = read(), read()
    for _ in range(30):
        if before == now:
            return now
        before, now = now, read()
    raise AssertionError("the counters of an idle server go on changing")


def test_metrics(servers: dict[str, VllmServer]) -> None:
    """What the engine's process decided is told by the one that answers HTTP, and agrees with
    what vLLM counts of the same requests."""
    one = servers["dspark"]
    before = settled_counters(one)
    for prompt in PROMPTS[:2]:
        completion(one, prompt)
    now = settled_counters(one)
    new = {name: value - before.get(name, 0.0) for name, value in now.items()}
    drafted, verified, accepted = (
        new[f"vllm_dspark_{word}_drafts_total"] for word in ("scheduled", "verified", "accepted")
    )
    assert drafted == new["vllm:spec_decode_num_draft_tokens_total"]
    assert accepted == new["vllm:spec_decode_num_accepted_tokens_total"]
    assert 0 < accepted <= verified <= drafted
    assert new["vllm_dspark_drafting_requests_total"] == new["vllm:spec_decode_num_drafts_total"]
    assert new["vllm_dspark_steps_total"] >= 8
    assert 0 <= now["vllm_dspark_depth"] <= 7
    assert now["vllm_dspark_cost_error_percent"] > 0
    assert now["vllm_dspark_ignored_reports_total"] == 0
    assert not ours(servers["target"])


def test_start_up_line(servers: dict[str, VllmServer]) -> None:
    """One line says that the plugin is active, what it took over and every mode."""
    lines = [
        line
        for line in servers["dspark"].log.read_text().splitlines()
        if "vllm-dspark" in line and "active" in line
    ]
    assert len(lines) == 1
    for word in ("proposer", "vanilla Markov head", "confidence head", "γ=7", "drafting greedy"):
        assert word in lines[0]
    assert "vllm-dspark" not in servers["target"].log.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--speculative-config", "dspark"], "Name it: dspark:"),
        (["--speculative-config", "dspark:/nowhere"], "no config.json"),
        (
            [
                "--speculative-config",
                f"dspark:{MICRO / 'dspark-rnn'}",
                "--additional-config",
                '{"dspark": {"confidense": "always"}}',
            ],
            "'confidence'",
        ),
    ],
)
def test_bad_arguments_end_the_server_with_one_reason(arguments: list[str], message: str) -> None:
    """Refused before the model loads: several drafters, no such drafter, unknown option."""
    with pytest.raises(ServerError, match="exit code") as caught, server(*arguments):
        pass
    assert message in str(caught.value)
    assert "Loading" not in str(caught.value)


def test_port_in_use(servers: dict[str, VllmServer]) -> None:
    """A second server on the port is refused by name before anything starts."""
    with pytest.raises(ServerError, match="in use"):
        VllmServer(str(MICRO), port=servers["target"].port).start()
