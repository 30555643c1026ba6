"""Inflated pairs against the tiny ones, by forward passes that share nothing with the check.

The large target is loaded by transformers from its shards, the large drafter by the module that
it was trained with; speculation is `examples.training.evaluate`'s. A pair is inflated to two
small shapes that differ from it in every size: nothing here is published.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from benchmarks.inflate import inflate
from benchmarks.inflation.checkpoint import INDEX
from benchmarks.inflation.noise import FAINT
from benchmarks.inflation.shapes import Shape
from examples.training.distill import teacher_forced_hidden
from examples.training.drafter import Drafter
from examples.training.evaluate import speculate
from examples.training.export import build_drafter, load_drafter
from examples.training.target import dead_word_bias, load_target, target_features
from vllm_dspark.checkpoint import TargetShape, drafter_spec, pair_problems
from vllm_dspark.drafters import drafters_beside
from vllm_dspark.weights import read_headers, weight_problems

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TINY, MICRO = EXAMPLES / "tiny-python", EXAMPLES / "micro-python"
CPU = torch.device("cpu")

UNTIED = Shape(
    hidden_size=448,  # 2d is 384: the width is no multiple of d, nor of a power of two
    num_hidden_layers=8,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=128,
    intermediate_size=640,
    vocab_size=2304,
    tie_word_embeddings=False,
    draft_layers=3,
    markov_rank=96,
)
TIED = dataclasses.replace(
    UNTIED, hidden_size=1000, num_hidden_layers=7, tie_word_embeddings=True, vocab_size=2049
)
FOR_MICRO = dataclasses.replace(
    UNTIED, hidden_size=160, head_dim=32, vocab_size=397, markov_rank=24, draft_target_layers=3
)
PROMPTS = (
    "import os\n\n\ndef walk(path):\n    for name in os.listdir(path):\n",
    "class Queue:\n    def __init__(self, size):\n        self.size = size\n",
)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A pair in fp32, loaded whole."""

    target: Qwen3ForCausalLM
    drafter: Drafter


def _load_tiny(folder: Path, drafter: str = "dspark") -> Loaded:
    return Loaded(load_target(folder, CPU), load_drafter(folder / drafter, CPU))


def _load_large(folder: Path) -> Loaded:
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    drafter = build_drafter(json.loads((folder / "dspark" / "config.json").read_text()))
    shards = [load_file(path) for path in sorted((folder / "dspark").glob("*.safetensors"))]
    weights = {name: tensor.float() for shard in shards for name, tensor in shard.items()}
    assert len(weights) == sum(map(len, shards)), "a tensor is in two shards"
    drafter.load_state_dict(weights)
    return Loaded(target.eval(), drafter.requires_grad_(False).eval())


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small matrices on a busy machine: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[UNTIED, TIED], ids=["untied", "tied"])
def shape(request: pytest.FixtureRequest) -> Shape:
    """Both ways to hold the LM head."""
    return request.param


@pytest.fixture(scope="module")
def folder(shape: Shape, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-python at that shape."""
    out = tmp_path_factory.mktemp("inflated") / "pair"
    inflate(TINY, out, shape, threads=2, device="cpu")
    return out


@pytest.fixture(scope="module")
def tiny() -> Loaded:
    """tiny-python itself."""
    return _load_tiny(TINY)


@pytest.fixture(scope="module")
def large(folder: Path) -> Loaded:
    """The inflated pair."""
    return _load_large(folder)


def _prompts(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text).input_ids for text in PROMPTS]


@torch.no_grad()
def _outputs(pair: Loaded, tokens: torch.Tensor, anchors: torch.Tensor) -> list[torch.Tensor]:
    """Logits [1, S, V], draft logits [A, γ, V] and confidences [A, γ]."""
    read = pair.target(tokens, output_hidden_states=True, use_cache=False)
    features = target_features(read.hidden_states, pair.drafter.target_layer_ids)
    hidden = teacher_forced_hidden(pair.drafter, pair.target, tokens, features, anchors)[0]
    slots = anchors[0][:, None] + torch.arange(pair.drafter.block_size)
    previous = tokens[0][slots]
    head = pair.drafter.markov_head
    draft_logits = pair.target.lm_head(hidden) + head.block_bias(previous, hidden)
    confidences = pair.drafter.confidence_head(hidden, head.embed(previous)).sigmoid()
    return [read.logits, draft_logits, confidences]


def _assert_same_function(tiny: Loaded, large: Loaded, prompt: list[int]) -> None:
    tokens, anchors = torch.tensor([prompt]), torch.tensor([[1, 9, len(prompt) - 7]])
    for want, got in zip(
        _outputs(tiny, tokens, anchors), _outputs(large, tokens, anchors), strict=True
    ):
        if want.dim() == got.dim() and want.shape != got.shape:
            words = torch.arange(got.shape[-1]).clamp(max=want.shape[-1] - 1)
            want = want[..., words]
        assert float((want - got).abs().max()) < 1e-3


def test_logits_drafts_and_confidences_are_the_tiny_pairs(
    tiny: Loaded, large: Loaded, folder: Path
) -> None:
    """Every number the pair computes, by modules that know nothing of the inflation. Copies of
    the dead word are held against the dead word."""
    for prompt in _prompts(folder):
        _assert_same_function(tiny, large, prompt)


def test_speculation_is_the_tiny_pairs(tiny: Loaded, large: Loaded, folder: Path) -> None:
    """Same tokens and same accepted drafts in every round: what a benchmark would measure."""
    accepted, rounds = 0, 0
    for prompt in _prompts(folder):
        want = speculate(tiny.target, tiny.drafter, prompt, 24)
        got = speculate(large.target, large.drafter, prompt, 24)
        assert (got.tokens, got.accepted) == (want.tokens, want.accepted)
        accepted, rounds = accepted + sum(want.accepted), rounds + len(want.accepted)
    assert 0 < accepted < 7 * rounds, "nothing was accepted, or everything"


@torch.no_grad()
def test_copies_of_the_dead_word_weigh_what_they_were_trained_to(
    tiny: Loaded, large: Loaded, folder: Path, shape: Shape
) -> None:
    """The softmax over the large vocabulary is the tiny one with log n on the dead word, as in
    training. Too few or too many copies, or none in the LM head, change the sum."""
    tokens = torch.tensor([_prompts(folder)[0]])
    small, grown = tiny.target(tokens).logits, large.target(tokens).logits
    bias = dead_word_bias(small.shape[-1], CPU, inflated=shape.vocab_size)
    # Beside the trained words the dead one is negligible: look at a mix in which it is not.
    for temperature in (1.0, 20.0):
        want = ((small / temperature) + bias).logsumexp(-1)
        assert torch.allclose((grown / temperature).logsumexp(-1), want, atol=1e-3)
    assert float(bias.max()) == pytest.approx(math.log(shape.vocab_size - 2047))


def test_files_are_what_a_server_looks_for(folder: Path, shape: Shape) -> None:
    """Index and shards agree, the drafter is found beside the target and fits it, its weights are
    those its config announces, the tokenizer is the tiny one's."""
    for part in (folder, folder / "dspark"):
        index = json.loads((part / INDEX).read_text())
        held = {path.name: load_file(path) for path in part.glob("*.safetensors")}
        assert index["weight_map"] == {name: f for f, tensors in held.items() for name in tensors}
        tensors = [tensor for shard in held.values() for tensor in shard.values()]
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)
        assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert drafters_beside(str(folder)) == [folder / "dspark"]
    spec = drafter_spec("dspark", json.loads((folder / "dspark" / "config.json").read_text()))
    assert spec is not None
    assert (
        pair_problems(
            spec, TargetShape(shape.hidden_size, shape.vocab_size, shape.num_hidden_layers)
        )
        == []
    )
    assert weight_problems(spec, read_headers(folder / "dspark") or {}) == []
    assert len(spec.target_layer_ids) == 5
    assert spec.mask_token_id == 2046
    assert _prompts(folder) == _prompts(TINY)
    assert AutoTokenizer.from_pretrained(folder).chat_template is not None


def test_no_matrix_holds_zeros(folder: Path) -> None:
    """Zeros run faster than weights. A faint place is never zero, and the padding of what writes
    to the residual stream is faint: were it loud, the norms would see it."""
    real = {
        f"model.layers.{i}." for i in json.loads((folder / "inflation.json").read_text())["layers"]
    }
    inserted = 0
    for path in [*folder.glob("*.safetensors"), *(folder / "dspark").glob("*.safetensors")]:
        for name, tensor in load_file(path).items():
            if tensor.dim() == 2:
                assert float((tensor == 0).float().mean()) < 1e-3, name
            if name.endswith(("o_proj.weight", "down_proj.weight")) and "model." in name:
                loudest = float(tensor.abs().max())
                is_real = any(name.startswith(prefix) for prefix in real)
                assert is_real == (loudest > FAINT), name
                inserted += not is_real
    assert inserted > 0


def test_the_seed_alone_decides(folder: Path, shape: Shape, tmp_path: Path) -> None:
    """Bytes do not depend on the number of threads; they do on the seed."""
    inflate(TINY, tmp_path / "again", shape, threads=3, device="cpu")
    inflate(TINY, tmp_path / "other", shape, seed=1, device="cpu")
    files = [path.relative_to(folder) for path in folder.rglob("*.safetensors")]
    assert len(files) > shape.num_hidden_layers + shape.draft_layers
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()
        assert (tmp_path / "other" / file).read_bytes() != (folder / file).read_bytes()


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_other_markov_heads(head: str, tmp_path: Path) -> None:
    """micro-python has head_dim 32, and so do the shapes it can become. Padding of a gate or of a
    recurrent state that is not silent changes the draft logits."""
    drafter = MICRO / f"dspark-{head}"
    inflate(MICRO, tmp_path / "out", FOR_MICRO, drafter=drafter, device="cpu")
    large = _load_large(tmp_path / "out")
    assert large.drafter.markov_head.head_type == head
    _assert_same_function(_load_tiny(MICRO, drafter.name), large, _prompts(MICRO)[0])
