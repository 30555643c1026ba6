"""The code that trains the shipped pairs: a handful of steps on the CPU, and its parts."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.training.corpus import chat_samples, is_held_out, load_corpus
from examples.training.distill import random_anchors, teacher_forced_hidden
from examples.training.drafter import block_mask
from examples.training.evaluate import ContextCache, Trace, evaluate, greedy, is_tie, summarise
from examples.training.export import folder_bytes, load_drafter, read_record
from examples.training.loss import draft_loss
from examples.training.optimise import fit, learning_rate_scale
from examples.training.pipeline import (
    Limits,
    make_drafters,
    make_streams,
    make_target,
    make_tokenizer,
)
from examples.training.presets import PRESETS
from examples.training.target import dead_word_bias, load_target, target_features
from examples.training.tokenizer import DEAD, MASK, SPECIAL_WORDS, TURN_END, format_chat

CPU = torch.device("cpu")
MICRO = dataclasses.replace(PRESETS["micro-python"], context=96, anchors=8, generated_rows=8)
HEADS = ("vanilla", "gated", "rnn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target and its three drafters, hardly trained."""
    path = tmp_path_factory.mktemp("pair") / "micro-python"
    corpus = load_corpus(2.0)
    for side in (corpus.train, corpus.held_out):
        side.texts, side.chats = side.texts[:30], side.chats[:100]
    limits = Limits(
        steps_target=12,
        steps_drafter=4,
        seconds_target=6.0,
        seconds_drafter=3.0,
        batch_size=4,
        draft_batch_size=2,
        command="python -m examples.training train --preset micro-python",
    )
    make_tokenizer(MICRO, corpus, path)
    streams = make_streams(corpus, path, CPU, seed=0)
    make_target(MICRO, corpus, streams, path, limits, seed=0)
    make_drafters(MICRO, streams, path, HEADS, limits, seed=0, generated_share=0.5)
    return path


def test_tokenizer_and_target_load_with_the_auto_classes(folder: Path) -> None:
    """Catches a tokenizer class that rebuilds its own pre-tokenizer, and misplaced specials."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def f(x):\n    return x ** 2  # naïve\n\n\nclass A:\n        pass\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    raw = tokenizer.backend_tokenizer.encode(text).ids
    assert tokenizer(text).input_ids == raw
    assert len(raw) < len(text.encode())
    assert len(tokenizer) == MICRO.vocab_size
    specials = tokenizer.convert_tokens_to_ids(list(SPECIAL_WORDS))
    assert specials == list(range(MICRO.vocab_size - len(SPECIAL_WORDS), MICRO.vocab_size))
    assert tokenizer.convert_tokens_to_ids(DEAD) == MICRO.vocab_size - 1
    assert tokenizer.eos_token == TURN_END
    assert format_chat(tokenizer, "Hi", None) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.dtype == torch.bfloat16
    assert model.config.head_dim == MICRO.head_dim
    assert model.generation_config.eos_token_id == [specials[2], specials[0]]


@pytest.mark.parametrize("head", HEADS)
def test_drafter_has_the_published_names_shapes_and_fields(folder: Path, head: str) -> None:
    """vLLM's loader takes exactly these; embedding and LM head must be missing."""
    weights = load_file(folder / f"dspark-{head}" / "model.safetensors")
    width, rank, mlp = MICRO.hidden_size, MICRO.markov_rank, MICRO.draft_mlp
    queries, kv = MICRO.num_heads * MICRO.head_dim, MICRO.num_kv_heads * MICRO.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (width, len(MICRO.target_layer_ids) * width),
        "hidden_norm.weight": (width,),
        "norm.weight": (width,),
        "markov_head.markov_w1.weight": (MICRO.vocab_size, rank),
        "markov_head.markov_w2.weight": (MICRO.vocab_size, rank),
        "confidence_head.proj.weight": (1, width + rank),
        "confidence_head.proj.bias": (1,),
    }
    for i in range(MICRO.draft_layers):
        for name, shape in {
            "self_attn.q_proj": (queries, width),
            "self_attn.k_proj": (kv, width),
            "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, queries),
            "self_attn.q_norm": (MICRO.head_dim,),
            "self_attn.k_norm": (MICRO.head_dim,),
            "mlp.gate_proj": (mlp, width),
            "mlp.up_proj": (mlp, width),
            "mlp.down_proj": (width, mlp),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }.items():
            shapes[f"layers.{i}.{name}.weight"] = shape
    if head == "gated":
        shapes["markov_head.gate_proj.weight"] = (rank, width + rank)
        shapes["markov_head.gate_proj.bias"] = (rank,)
    if head == "rnn":
        shapes["markov_head.joint_proj.weight"] = (3 * rank, 2 * rank + width)
        shapes["markov_head.joint_proj.bias"] = (3 * rank,)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == shapes
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}

    config = json.loads((folder / f"dspark-{head}" / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "num_hidden_layers": MICRO.draft_layers,
        "num_target_layers": MICRO.target_layers,
        "layer_types": ["full_attention"] * MICRO.draft_layers,
        "block_size": 7,
        "mask_token_id": tokenizer.convert_tokens_to_ids(MASK),
        "target_layer_ids": list(MICRO.target_layer_ids),
        "num_anchors": MICRO.anchors,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "markov_rank": rank,
        "markov_head_type": head,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "vocab_size": MICRO.vocab_size,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    assert {name: config[name] for name in expected} == expected


def test_without_markov_the_bias_stays_zero(folder: Path, tmp_path: Path) -> None:
    """The ablation trains, serves as a vanilla head, and its W2 never leaves zero."""
    copy = shutil.copytree(folder, tmp_path / "pair")
    streams = make_streams(load_corpus(2.0), copy, CPU, seed=0)
    limits = Limits(12, 4, 6.0, 3.0, batch_size=4, draft_batch_size=2)
    make_drafters(MICRO, streams, copy, ("none",), limits, seed=0, generated_share=0.0)
    config = json.loads((copy / "dspark-none" / "config.json").read_text())
    assert config["markov_head_type"] == "vanilla"
    weights = load_file(copy / "dspark-none" / "model.safetensors")
    assert not weights["markov_head.markov_w2.weight"].any()
    assert weights["markov_head.markov_w1.weight"].any()
    trained = load_file(folder / "dspark-vanilla" / "model.safetensors")
    assert trained["markov_head.markov_w2.weight"].any()


def test_record_and_size(folder: Path) -> None:
    """The record is complete and names no path; three drafters fit the limit."""
    record = read_record(folder)
    assert record["command"].startswith("python -m examples.training train")
    assert record["corpus"]["bytes"] > 0
    assert record["target"]["steps"] > 0
    assert math.isfinite(record["target"]["held_out_loss"]["nats_per_token_at_96"])
    assert set(record["drafters"]) == {f"dspark-{head}" for head in HEADS}
    for drafter in record["drafters"].values():
        assert len(drafter["held_out_acceptance"]) == MICRO.block_size
        assert all(0.0 <= share <= 1.0 for share in drafter["held_out_acceptance"])
        assert drafter["generated_rows"] == MICRO.generated_rows
    assert str(folder.parent) not in json.dumps(record)
    assert folder_bytes(folder) <= MICRO.max_megabytes * 1e6


@pytest.mark.parametrize("head", HEADS)
def test_cached_drafting_equals_the_training_forward(folder: Path, head: str) -> None:
    """The block mask, the positions and the context's end, against drafting from a cache."""
    target = load_target(folder, CPU)
    drafter = load_drafter(folder / f"dspark-{head}", CPU)
    torch.manual_seed(0)
    tokens = torch.randint(0, 300, (1, 40))
    hidden_states = target.model(tokens, output_hidden_states=True).hidden_states
    features = target_features(hidden_states, drafter.target_layer_ids)
    anchors = torch.tensor([[1, 5, 6, 17, 31]])  # the first, overlapping blocks, the last
    trained = teacher_forced_hidden(drafter, target, tokens, features, anchors)[0]
    assert trained.shape == (5, 7, MICRO.hidden_size)

    context = ContextCache(drafter)
    for block, position in zip(trained, anchors[0].tolist(), strict=True):
        context.extend(features[:, context.length : position])
        query_ids = drafter.query_ids(tokens[:, position])
        positions = torch.arange(position, position + 7)[None]
        cached = drafter.backbone(
            target.model.embed_tokens(query_ids), positions, context.layers, mask=None
        )[0]
        # Both are fp32; only the order of summation differs.
        torch.testing.assert_close(cached, block, atol=2e-5, rtol=1e-5)

        # Greedy drafting, step by step, against the block form of the head on the same tokens.
        drafts, confidences = drafter.draft(
            target, int(tokens[0, position]), position, context.layers
        )
        previous = torch.tensor([int(tokens[0, position]), *drafts[:-1]])
        bias = drafter.markov_head.block_bias(previous, block)
        logits = target.lm_head(block) + bias
        assert logits.argmax(-1).tolist() == drafts
        logit = drafter.confidence_head(block, drafter.markov_head.embed(previous))
        np.testing.assert_allclose(confidences, logit.sigmoid().numpy(), atol=1e-5)


def test_block_mask_by_hand() -> None:
    """Two blocks of two queries in a row of four tokens."""
    mask = block_mask(torch.tensor([[1, 3]]), num_tokens=4, block_size=2)
    expected = [
        [1, 0, 0, 0, 1, 1, 0, 0],
        [1, 0, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 1],
        [1, 1, 1, 0, 0, 0, 1, 1],
    ]
    assert mask[0, 0].int().tolist() == expected


def test_features_are_the_bare_outputs_of_the_chosen_layers(folder: Path) -> None:
    """transformers shifts by one and norms the last entry: hooks say what a layer returned."""
    target = load_target(folder, CPU)
    outputs: dict[int, torch.Tensor] = {}
    for i, layer in enumerate(target.model.layers):
        layer.register_forward_hook(lambda _m, _a, out, i=i: outputs.__setitem__(i, out))
    states = target.model(torch.arange(20)[None], output_hidden_states=True).hidden_states
    features = target_features(states, [0, 1])
    torch.testing.assert_close(features, torch.cat([outputs[0], outputs[1]], dim=-1))
    with pytest.raises(ValueError, match="layer 2 is the last"):
        target_features(states, [0, 2])


@pytest.mark.parametrize("head", HEADS)
def test_speculative_tokens_equal_greedy_tokens(folder: Path, head: str) -> None:
    """Rounds that reject (barely trained drafters do) must not change a token."""
    target = load_target(folder, CPU)
    drafter = load_drafter(folder / f"dspark-{head}", CPU)
    prompts = [[40, 50, 60], list(range(70, 100))]
    references = [greedy(target, prompt, 24) for prompt in prompts]
    figures = evaluate(target, drafter, prompts, references)
    assert figures["prompts"] == 2
    assert 1.0 <= figures["accepted_length"] <= MICRO.block_size + 1


def test_a_different_token_is_an_error_unless_it_is_a_tie() -> None:
    """The comparison itself can fail."""
    reference = Trace(tokens=[1, 2, 3], margins=[5.0, 1e-6, 5.0])
    assert not is_tie(reference, Trace(tokens=[1, 2, 3, 9]))
    assert is_tie(reference, Trace(tokens=[1, 7, 7]))
    with pytest.raises(AssertionError, match="token 0 is 4, greedy decoding gives 1"):
        is_tie(reference, Trace(tokens=[4, 2, 3]))


def test_summary_by_hand() -> None:
    """Four rounds of gamma = 2: acceptance is conditional on having got there."""
    trace = Trace(accepted=[0, 1, 2, 2], confidences=[[0.4, 1.0], [0.6, 0.2], [0.8, 0.4], [1, 0.6]])
    figures = summarise([trace], 2)
    assert figures["accepted_length"] == 2.25
    assert figures["rounds_reaching"] == [4, 3]
    assert figures["acceptance"] == pytest.approx([3 / 4, 2 / 3])
    assert figures["confidence"] == pytest.approx([0.7, 0.4])


@pytest.mark.parametrize(("blocks", "gamma", "vocab"), [(1, 1, 2), (5, 7, 13)])
def test_loss_against_numpy_in_fp64(blocks: int, gamma: int, vocab: int) -> None:
    """An independent computation of every part, from the formula."""
    random = np.random.default_rng(gamma)
    draft, target = random.normal(size=(2, blocks, gamma, vocab)) * 2
    labels = random.integers(vocab, size=(blocks, gamma))
    confidence = random.normal(size=(blocks, gamma))

    q = np.exp(draft) / np.exp(draft).sum(-1, keepdims=True)
    p = np.exp(target) / np.exp(target).sum(-1, keepdims=True)
    tv = 0.5 * np.abs(q - p).sum(-1)
    ce = -np.log(np.take_along_axis(q, labels[..., None], -1)[..., 0])
    c = 1 / (1 + np.exp(-confidence))
    bce = -((1 - tv) * np.log(c) + tv * np.log(1 - c))
    weights = np.exp(-np.arange(gamma) / gamma)

    def mean(part: np.ndarray) -> float:
        return float((part * weights).sum() / (weights.sum() * blocks))

    draft_logits = torch.tensor(draft, requires_grad=True)
    confidence_logits = torch.tensor(confidence, requires_grad=True)
    loss = draft_loss(draft_logits, torch.tensor(target), torch.tensor(labels), confidence_logits)
    # The position weights are computed in fp32.
    assert loss.cross_entropy.item() == pytest.approx(mean(ce), rel=1e-6)
    assert loss.total_variation.item() == pytest.approx(mean(tv), rel=1e-6)
    assert loss.confidence.item() == pytest.approx(mean(bce), rel=1e-6)
    total = 0.1 * mean(ce) + 0.9 * mean(tv) + mean(bce)
    assert loss.total.item() == pytest.approx(total, rel=1e-6)
    np.testing.assert_allclose(loss.acceptance.numpy(), (1 - tv).mean(0), rtol=1e-6)

    loss.confidence.backward(retain_graph=True)
    assert draft_logits.grad is None or not draft_logits.grad.any()  # the label is detached
    assert confidence_logits.grad is not None
    assert confidence_logits.grad.any()


def test_dead_word_stands_for_its_copies() -> None:
    """Softmax with the bias equals softmax over the inflated vocabulary."""
    torch.manual_seed(0)
    logits = torch.randn(3, 10)
    inflated = torch.cat([logits, logits[:, -1:].expand(-1, 40)], dim=-1)
    biased = (logits + dead_word_bias(10, CPU, inflated=50)).softmax(-1)
    torch.testing.assert_close(biased[:, :9], inflated.softmax(-1)[:, :9])


def test_anchors_are_distinct_and_leave_room() -> None:
    """Every anchor has context before it and gamma labels after it; all places are used."""
    generator = torch.Generator().manual_seed(0)
    anchors = random_anchors(50, 4, 20, 7, generator)
    assert anchors.shape == (50, 4)
    assert all(len(set(row)) == 4 for row in anchors.tolist())
    assert set(anchors.flatten().tolist()) == set(range(1, 13))
    assert random_anchors(1, 99, 10, 7, generator).shape == (1, 2)  # fewer than asked


def test_fit_stops_at_the_clock_with_an_annealed_learning_rate() -> None:
    """Seconds run out long before steps; the schedule must have followed the clock."""
    layer = torch.nn.Linear(2, 1)
    progress = fit(
        lambda _step: (layer(torch.ones(1, 2)).square().sum(), {}),
        layer,
        label="test",
        steps=10**9,
        max_seconds=0.3,
        learning_rate=1e-3,
        weight_decay=0.0,
    )
    assert 1 < progress.steps < 10**9
    assert 0.3 <= progress.seconds < 2.0
    assert learning_rate_scale(1.0) == pytest.approx(0.0)
    assert learning_rate_scale(0.03) == pytest.approx(1.0)
    with pytest.raises(FloatingPointError, match="not finite at step 1"):
        fit(
            lambda _step: (layer.weight.sum() * math.nan, {}),
            layer,
            label="test",
            steps=1,
            max_seconds=9.0,
            learning_rate=1e-3,
            weight_decay=0.0,
        )


def test_corpus_is_split_by_file_and_chats_hold_whole_functions() -> None:
    """The split depends on the path alone; an answer is source that parses."""
    assert is_held_out("a.py") == is_held_out("a.py")
    held_out = [is_held_out(f"package/module_{i}.py") for i in range(2000)]
    assert 0.03 < sum(held_out) / 2000 < 0.07
    source = 'class A:\n    def f(self, x=1):\n        """Double\n        x.\n\n        More."""\n'
    source += "        return 2 * x\n\ndef undocumented():\n    pass\n"
    ((question, answer),) = chat_samples(source)
    assert question == "Write `def f(self, x=1)`: Double x."
    assert answer.startswith("def f(self, x=1):")
    compile(answer, "answer", "exec")
    assert list(chat_samples("def broken(:")) == []
