"""A target with recurrent layers: trimmed drafts leave the state of the last accepted token.

The target is Qwen3-Next's architecture with random weights: gated delta nets around one layer of
attention. Recurrent layers keep a state for every draft of a block and go on from the last accepted
one's. On a CPU, vLLM runs them in bfloat16 only, whose logits tie now and then. So outputs are
judged by the target: every token has to be its best one, within what rounding explains.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file

from tests.conftest import HAS_GPU
from tests.engine import Request, engine, observed, run, tokens
from tests.pairs import write_drafter, write_target
from tests.verification_cases import RandomLengths, manager_of, runner_of
from vllm_dspark.integration.verification import plan as planning

GAMMA = 4
ROUNDING = 1.0  # of logits up to about 60, whose bfloat16 are up to 0.25 apart
OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True, "dtype": "bfloat16"}
REQUESTS = [
    Request([1 + i, 2, 3, 4, 5, 6 + i], {"max_tokens": 20, "ignore_eos": True}, arrives=2 * i)
    for i in range(3)
]


def write_hybrid(folder: Path, attention_only: Path) -> Path:
    """A Qwen3-Next checkpoint, random but for the embedding and LM head of a target in
    `attention_only`, whose drafter then knows something of it too."""
    import transformers

    sizes = json.loads((attention_only / "config.json").read_text())
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings",
            "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    config = transformers.Qwen3NextConfig(
        **{name: sizes[name] for name in same},
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=128,  # what vLLM's CPU kernels take
        linear_value_head_dim=128,
        mlp_only_layers=[0, 1],  # vLLM wants one with experts
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )
    model = transformers.Qwen3NextForCausalLM(config)
    weights = model.state_dict()
    generator = torch.Generator().manual_seed(0)
    shared = load_file(attention_only / "model.safetensors")
    for name, weight in sorted(weights.items()):
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            weight.copy_(shared[name])
        elif weight.dim() > 1:
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise / math.sqrt(weight[0].numel()))
            if name.endswith("linear_attn.out_proj.weight"):
                weight *= 2.0  # the next word hangs on the states as much as on the last word
        elif name.endswith("A_log"):
            weight.fill_(math.log(0.05))  # states forget a few percent with every token
        elif name.endswith("dt_bias"):
            weight.zero_()
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The target, and what to ask for to get its drafter."""
    folder = tmp_path_factory.mktemp("hybrid")
    like = write_target(folder / "attention", scale=8.0)
    drafter = write_drafter(folder / "drafter", like, block_size=GAMMA)
    return write_hybrid(folder / "target", like), f"dspark:{drafter}"


def shortfalls(llm: Any, outputs: Sequence[Sequence[int]]) -> list[float]:
    """For each request, the most that one of its tokens is less likely than the target's best
    one, as log probabilities; the target alone reads prompt and output at once."""
    worst = []
    for request, output in zip(REQUESTS, outputs, strict=True):
        text = [*request.prompt, *output]
        read = Request(text, {"max_tokens": 1, "prompt_logprobs": 1})
        (answer,) = run(llm, [read])
        known = list(zip(text, answer.prompt_logprobs, strict=True))[len(request.prompt) :]
        worst.append(max(max(p.logprob for p in at.values()) - at[t].logprob for t, at in known))
    return worst


def run_ragged_blocks_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put vLLM's convolution for GPUs into the recurrent layers' speculative step, through Triton's
    interpreter. vLLM 0.32's own for CPUs takes whole blocks only; the recurrence takes any."""
    import vllm._custom_ops as ops
    from vllm.model_executor.layers.mamba.ops import causal_conv1d
    from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
    from vllm.platforms import current_platform

    spec = importlib.util.spec_from_file_location("convolution_for_gpus", causal_conv1d.__file__)
    assert spec is not None
    assert spec.loader is not None
    convolution = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.setattr(type(current_platform), "is_cpu", lambda self: False)
        spec.loader.exec_module(convolution)

    def forward(layer: Any, step: Any, mixed: torch.Tensor, b: torch.Tensor, a: torch.Tensor,
                history: torch.Tensor, states: torch.Tensor, *_: int) -> Any:  # fmt: skip
        count = step.num_spec_decodes
        starts = step.spec_query_start_loc[: count + 1].int()
        slots = step.spec_state_indices_tensor[:count].int().contiguous()
        accepted = step.num_accepted_tokens[:count].int().contiguous()
        wide = history.float()  # the interpreter has no bfloat16 arithmetic
        mixed = convolution.causal_conv1d_update(
            mixed.float(), wide, gdn_attention._unpacked_conv_weight(layer).float(),
            layer.conv1d.bias, layer.activation, conv_state_indices=slots[:, 0].contiguous(),
            num_accepted_tokens=accepted, query_start_loc=starts, max_query_len=slots.shape[1],
        ).to(mixed.dtype)  # fmt: skip
        history.copy_(wide)
        q, k, v = (part.squeeze(0) for part in layer.rearrange_mixed_qkv(mixed))
        return ops.fused_sigmoid_gating_delta_rule_update_spec_cpu(
            A_log=layer.A_log, dt_bias=layer.dt_bias, q=q, k=k, v=v, a=a, b=b,
            initial_state_source=states, spec_state_indices=slots, num_accepted_tokens=accepted,
            cu_seqlens=starts, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip

    monkeypatch.setattr(gdn_attention, "_spec_forward", forward)
    monkeypatch.setattr(planning, "recurrent_obstacle", lambda cache_config: None)


@pytest.mark.engine
@pytest.mark.skipif(HAS_GPU, reason="vLLM's layers for CPUs are put together anew")
def test_trimmed_drafts_leave_the_right_state(pair: tuple[Path, str]) -> None:
    """Random lengths every step, and whole blocks. Catches a state or convolution history that is
    taken from where a whole block would have left it."""
    target, drafter = pair
    outputs = {}
    with pytest.MonkeyPatch.context() as patch:
        run_ragged_blocks_on_cpu(patch)
        asked = {"additional_config": {"dspark": {"verification": "adaptive"}}}
        with engine(target, drafter, **OPTIONS, **asked) as llm:
            manager = manager_of(llm)
            assert manager.mode == "host"
            manager.policy = RandomLengths(8, GAMMA)
            with observed(llm) as seen:
                outputs["random"] = tokens(run(llm, REQUESTS))
            counted = manager.snapshot()
    assert seen[0].accepted > 0
    assert 0 < counted["verified"] < counted["scheduled"]
    with engine(target, drafter, **OPTIONS) as llm:  # as it is served where drafts are not trimmed
        assert runner_of(llm).adaptive_verification is None
        with observed(llm) as seen:
            outputs["whole"] = tokens(run(llm, REQUESTS))
    assert 0 < seen[0].accepted < seen[0].drafted
    with engine(target, **OPTIONS) as llm:
        for name, said in outputs.items():
            assert max(shortfalls(llm, said)) < ROUNDING, name
        backwards = [said[::-1] for said in outputs["whole"]]
        assert min(shortfalls(llm, backwards)) > 10 * ROUNDING  # it can tell


@pytest.mark.parametrize(
    ("cpu", "version", "option", "reason"),
    [
        (True, "0.32.0+cpu", None, "whole blocks only before vLLM 0.33"),
        (True, "0.33.0", None, None),
        (False, "0.32.0", None, None),
        (False, "0.33.0", "use_replayssm", "replay or recover"),
        (False, "0.33.0", "use_kda_recoverssm", "replay or recover"),
    ],
)
def test_where_recurrent_layers_take_whole_blocks_only(
    monkeypatch: pytest.MonkeyPatch, cpu: bool, version: str, option: str | None, reason: str | None
) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: cpu)
    monkeypatch.setattr(planning, "require_supported_vllm", lambda: Version(version))
    cache = SimpleNamespace(use_replayssm=False, use_kda_recoverssm=False)
    if option is not None:
        setattr(cache, option, True)
    found = planning.recurrent_obstacle(cache)
    assert (found is None) if reason is None else (found is not None and reason in found)
