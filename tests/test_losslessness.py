"""Sampled output follows the target's own distribution.

A random target over five words is small enough to write down the probability of every
continuation of three tokens: 125 of them. Hundreds of seeded requests are sampled through the
engine with DSpark and compared with those probabilities by chi-square: at each position, and
jointly over all three, so that a bias that depends on earlier tokens shows too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from tests.engine import Request, engine, observed, run, tokens
from tests.pairs import write_drafter, write_target

pytestmark = pytest.mark.engine

WORDS = 5
POSITIONS = 3
GAMMA = 2  # block after the first token: two drafts and the bonus token cover POSITIONS
SAMPLES = 300  # the interpreter needs about 0.2 s for each
PROMPT = [1, 2, 3]
SIGNIFICANCE = 1e-3  # of one test; there are 6, and seeds are fixed

REGIMES: dict[str, dict[str, Any]] = {
    "temperature 1": {"temperature": 1.0},
    "temperature 0.7, top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "temperature 1, min-p and bias": {
        "temperature": 1.0,
        "min_p": 0.05,
        "logit_bias": {0: -1.0, 3: 1.0},
    },
}


def write_pair(folder: Path) -> Path:
    """Make the random pair in a folder, and return that."""
    write_target(folder, vocab_size=WORDS, seed=3)
    write_drafter(folder / "dspark", folder, rank=4, seed=4)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pair whose distributions overlap without being equal."""
    return write_pair(tmp_path_factory.mktemp("pair"))


def word_probabilities(logits: torch.Tensor, regime: dict[str, Any]) -> np.ndarray:
    """Sampling distribution [V] of fp64 logits [V], written after vLLM's documentation: bias,
    then temperature, then min-p relative to the likeliest word, then top-p."""
    logits = logits.clone()
    for word, bias in regime.get("logit_bias", {}).items():
        logits[word] += bias
    probabilities = torch.softmax(logits / regime["temperature"], -1)
    probabilities[probabilities < regime.get("min_p", 0.0) * probabilities.max()] = 0.0
    order = torch.argsort(probabilities, descending=True)
    before = torch.cumsum(probabilities[order], 0) - probabilities[order]
    probabilities[order[before >= regime.get("top_p", 1.0)]] = 0.0
    return (probabilities / probabilities.sum()).numpy()


def exact_joint(target: Path, regime: dict[str, Any], words: int = WORDS) -> np.ndarray:
    """Probability of every continuation, float64 [V, V, V], from transformers' own model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float64).eval()
    joint = np.ones((words,) * POSITIONS)
    with torch.no_grad():
        for length in range(POSITIONS):
            prefixes = np.indices((words,) * length).reshape(length, words**length).T
            ids = torch.tensor([PROMPT + list(map(int, p)) for p in prefixes])
            logits = model(ids).logits[:, -1]
            each = np.stack([word_probabilities(row, regime) for row in logits])
            shape = (words,) * (length + 1) + (1,) * (POSITIONS - length - 1)
            joint *= each.reshape(shape)
    return joint


def p_value(samples: np.ndarray, joint: np.ndarray) -> float:
    """Chi-square p-value of continuations [N, P] against their exact joint distribution over P
    positions; cells with few expected counts are pooled. Impossible continuations that
    occurred give 0."""
    counts = np.zeros_like(joint)
    np.add.at(counts, tuple(samples.T), 1)
    if counts[joint == 0].any():
        return 0.0
    expected = joint * len(samples)
    small = expected < 5
    observed_bins = np.append(counts[~small], counts[small].sum())
    expected_bins = np.append(expected[~small], expected[small].sum())
    keep = expected_bins > 0
    if keep.sum() < 2:
        return 1.0  # one possible outcome, and it is what came
    return float(chisquare(observed_bins[keep], expected_bins[keep]).pvalue)


def sample(llm: Any, regime: dict[str, Any], count: int = SAMPLES) -> np.ndarray:
    """Continuations [count, POSITIONS], one seeded request each."""
    fixed = {"max_tokens": POSITIONS, "ignore_eos": True, "detokenize": False}
    requests = [Request(PROMPT, regime | fixed | {"seed": i}) for i in range(count)]
    return np.array(tokens(run(llm, requests)))


@pytest.fixture(scope="module", params=["greedy", "probabilistic"])
def speculating(request: pytest.FixtureRequest, pair: Path) -> Any:
    """One engine per drafting mode."""
    config = {
        "method": "dspark",
        "draft_sample_method": request.param,
        "num_speculative_tokens": GAMMA,
    }
    with engine(pair, config, skip_tokenizer_init=True, max_num_seqs=16) as llm:
        yield llm


@pytest.mark.parametrize("name", REGIMES)
def test_sampled_output_follows_the_target(speculating: Any, pair: Path, name: str) -> None:
    """Catches a residual, bonus or acceptance rule that favours what was drafted."""
    regime = REGIMES[name]
    with observed(speculating) as seen:
        samples = sample(speculating, regime)
    joint = exact_joint(pair, regime)
    assert 0.05 < seen[0].accepted / seen[0].drafted < 0.95
    assert p_value(samples, joint) > SIGNIFICANCE
    for position in range(POSITIONS):
        others = tuple(i for i in range(POSITIONS) if i != position)
        assert p_value(samples[:, [position]], joint.sum(others)) > SIGNIFICANCE


def test_the_test_can_fail(pair: Path) -> None:
    """Samples that favour one word as a wrong acceptance rule does are found out at this size."""
    regime = REGIMES["temperature 1"]
    joint = exact_joint(pair, regime)
    generator = np.random.default_rng(0)

    def draw(probabilities: np.ndarray) -> np.ndarray:
        flat = generator.choice(probabilities.size, SAMPLES, p=probabilities.ravel())
        return np.stack(np.unravel_index(flat, joint.shape), 1)

    assert p_value(draw(joint), joint) > SIGNIFICANCE
    skewed = joint * np.where(np.arange(WORDS) == 0, 1.8, 1.0)
    assert p_value(draw(skewed / skewed.sum()), joint) < SIGNIFICANCE
