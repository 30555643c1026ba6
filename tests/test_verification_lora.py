"""LoRA with adaptive verification, which the built-in refuses: every token gets its own adapter.

vLLM maps tokens to adapters by the query lengths that the host knows, so these must be the true
ones. Adapters are on the attention projections only: on a CPU, vLLM 0.32 has one LM-head row per
request in mind and fails with speculation of any kind.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.engine import MICRO, engine, observed
from tests.verification_cases import RandomLengths, manager_of

pytestmark = pytest.mark.engine

RANK = 4
STRENGTH = 0.7  # enough to change what is said, not so much that no draft survives
OPTIONS: dict[str, Any] = {
    "enable_lora": True,
    "max_loras": 2,
    "max_lora_rank": 8,
    "lora_target_modules": ["qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj"],
}
PROMPTS = ("import os\n", "def main(self", "import os\n", "class Node(object):\n")


def write_adapter(folder: Path, seed: int) -> Path:
    """A random adapter for the micro target, in PEFT's format."""
    config = json.loads((MICRO / "config.json").read_text())
    width, head_dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {
        "q_proj": (heads * head_dim, width),
        "v_proj": (kv_heads * head_dim, width),
        "o_proj": (width, heads * head_dim),
    }
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (rows, columns) in shapes.items():
            path = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            down = torch.randn(RANK, columns, generator=generator) / columns**0.5
            up = torch.randn(rows, RANK, generator=generator) * STRENGTH / RANK**0.5
            weights |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": RANK,
        "bias": "none",
        "target_modules": list(shapes),
        "base_model_name_or_path": str(MICRO),
    }
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


def run(llm: Any, adapters: list[Path], first: int = 0) -> list[list[int]]:
    """Greedy tokens of all prompts, together, with the adapters in turn, from the first one."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    number = getattr(llm, "dspark_lora_runs", 0)
    llm.dspark_lora_runs = number + 1
    params = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
    for i, prompt in enumerate(PROMPTS):
        which = (first + i) % len(adapters)
        adapter = LoRARequest(f"adapter {which}", which + 1, str(adapters[which]))
        llm.llm_engine.add_request(f"{number}-{i}", prompt, params, lora_request=adapter)
    said: dict[str, list[int]] = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            said[output.request_id] = list(output.outputs[0].token_ids)
    return [said[f"{number}-{i}"] for i in range(len(PROMPTS))]


def test_greedy_equals_target_with_two_adapters(tmp_path: Path) -> None:
    """Catches a token that is run with its neighbour's adapter."""
    adapters = [write_adapter(tmp_path / name, seed) for seed, name in enumerate("ab")]
    with engine(MICRO, **OPTIONS) as llm:
        expected = run(llm, adapters)
        swapped = run(llm, adapters, first=1)
    assert all(a != b for a, b in zip(expected, swapped, strict=True))
    with engine(MICRO, f"dspark:{MICRO / 'dspark-vanilla'}", **OPTIONS) as llm:
        manager = manager_of(llm)
        assert manager.mode == "host"
        assert run(llm, adapters) == expected
        manager.policy = RandomLengths(8, 7)
        before = manager.snapshot()
        with observed(llm) as seen:
            assert run(llm, adapters) == expected
        after = manager.snapshot()
    assert 0 < after["verified"] - before["verified"] < after["scheduled"] - before["scheduled"]
    assert seen[0].accepted > 0
