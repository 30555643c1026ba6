"""A request whose logits are NaN, over HTTP: an error for its client, and nothing for the others.

The server is real, and so is what breaks it: the checkpoint's embedding of one word is NaN.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from openai import APIError, InternalServerError, OpenAI
from safetensors.torch import load_file, save_file

from tests.conftest import HAS_GPU
from tests.engine import MICRO
from vllm_dspark import cpu
from vllm_dspark.server import VllmServer

pytestmark = pytest.mark.engine

BROKEN_WORD = 316
BROKEN = [5, 9, 2, BROKEN_WORD, 11, 4]
HEALTHY = [[5, 9, 2, 8], [40, 41, 42]]
GREEDY: dict[str, Any] = {
    "model": "micro",
    "temperature": 0,
    "max_tokens": 16,
    "extra_body": {"ignore_eos": True, "return_token_ids": True},
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """Of a server of the micro pair, whose target has a head of its own and breaks at one word."""
    folder = tmp_path_factory.mktemp("pair") / "broken"
    shutil.copytree(MICRO, folder, ignore=shutil.ignore_patterns("dspark-rnn", "dspark-gated"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding.clone()
    embedding[BROKEN_WORD] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    arguments = ["--served-model-name", "micro", "--dtype", "float32", "--max-model-len", "256"]
    arguments += [] if HAS_GPU else cpu.SERVE_ARGUMENTS
    arguments += ["--speculative-config", f"dspark:{folder / 'dspark-vanilla'}"]
    ours = {"dspark": {"kernels": "triton", "verification": "all"}}
    arguments += ["--additional-config", json.dumps(ours)]
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    server = VllmServer(str(folder), arguments, env=env)
    try:
        server.start()
        server.wait_until_healthy()
        yield OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    finally:
        server.stop()


def words(client: OpenAI, prompt: list[int]) -> Any:
    """Token ids of a completion."""
    choice = client.completions.create(prompt=prompt, **GREEDY).choices[0]
    return (choice.model_extra or {})["token_ids"]


def test_broken_request_is_a_500_and_others_are_answered(client: OpenAI) -> None:
    alone = [words(client, prompt) for prompt in HEALTHY]
    assert all(len(found) == GREEDY["max_tokens"] for found in alone)
    with ThreadPoolExecutor() as pool:
        broken = pool.submit(words, client, BROKEN)
        beside = [pool.submit(words, client, prompt) for prompt in HEALTHY]
        assert [answer.result() for answer in beside] == alone
        with pytest.raises(InternalServerError) as caught:
            broken.result()
    assert caught.value.status_code == 500
    assert [words(client, prompt) for prompt in HEALTHY] == alone


def test_broken_stream_ends_with_an_error(client: OpenAI) -> None:
    """Its status was sent before anything broke."""
    with pytest.raises(APIError):
        for _ in client.completions.create(prompt=BROKEN, stream=True, **GREEDY):
            pass
