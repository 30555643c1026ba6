"""Accepted length of drafting from K candidates and of a drafter in FP8, in expectation, against
drafting from all words.

    python -m benchmarks.candidate_overlap --target FOLDER --out FOLDER

Speculation leaves the target's distribution as it is, so the words that are emitted can be drawn
from the target alone. Given them, x_1 x_2 ... behind an anchor, a round that starts there accepts

    P(a ≥ k | x) = Π_(i ≤ k) min(1, q_i(x_i) / p_i(x_i))

drafts or more, since P(a ≥ k and x_1..x_k) = Π min(p_i, q_i). A round that accepts a ends a + 1
words further on, which makes the rounds along a text a Markov chain, and their expected number a
sum. No draft is drawn, and every K is judged on the same words: differences between them are known
far better than from as many rounds of an engine (`benchmarks.candidates`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import typer

from benchmarks.candidates import REGIMES
from benchmarks.errors import plain_errors
from benchmarks.inflation.forward import Probe, in_fp8, run_pair
from benchmarks.inflation.pair import Pair, open_pair
from benchmarks.prompts import PYTHON_TEXT, PromptsError, load_prompts
from benchmarks.provenance import provenance
from benchmarks.records import write_record
from vllm_dspark.config import CANDIDATES
from vllm_dspark.kernels.candidate_walk_reference import passes_filters_reference

PROMPT_TOKENS = 48
DENSE = "all words"
Floats = npt.NDArray[np.float64]

app = typer.Typer(help=__doc__)


class Source(NamedTuple):
    """What a draft is drawn from."""

    candidates: int  # K, 0 for all words
    filtered: bool = True  # by the request's top-p
    fp8: bool = False  # of a drafter in FP8


def sources_of(vocabulary: int) -> dict[str, Source]:
    """By the name of their row. The engine's dense drafting is unfiltered."""
    few = {f"{count} candidates": Source(count) for count in CANDIDATES if count <= vocabulary}
    return {
        DENSE: Source(0, filtered=False),
        f"{DENSE}, drafter in FP8": Source(0, filtered=False, fp8=True),
        f"{DENSE}, filtered": Source(0),
        **few,
    }


def target_probabilities(logits: torch.Tensor, regime: Mapping[str, float]) -> torch.Tensor:
    """Logits [..., V] → what the target emits at them, float64 [..., V]."""
    logits = logits.double()
    if regime["temperature"] == 0:
        likeliest = logits.argmax(-1)
        return torch.nn.functional.one_hot(likeliest, logits.shape[-1]).double()
    probabilities = torch.softmax(logits / regime["temperature"], -1)
    ordered, place = probabilities.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(before >= regime.get("top_p", 1.0), 0.0)
    kept = torch.zeros_like(probabilities).scatter(-1, place, ordered)
    return kept / kept.sum(-1, keepdim=True)


def draft_probability(
    base: torch.Tensor,  # [N, V], base logits
    logits: torch.Tensor,  # [N, V], with the Markov bias
    words: torch.Tensor,  # int64 [N]
    regime: Mapping[str, float],
    source: Source,
) -> torch.Tensor:
    """q of given words, float64 [N]."""
    among = torch.arange(base.shape[1]).expand(base.shape)
    if source.candidates:
        among = base.topk(source.candidates, dim=-1).indices
    few = logits.gather(1, among).double()
    hit = among == words[:, None]
    if regime["temperature"] == 0:
        return hit.gather(1, few.argmax(-1, keepdim=True))[:, 0].double()
    few = few / regime["temperature"]
    if source.filtered and "top_p" in regime:
        every = torch.full((len(few),), few.shape[1])
        top_p = torch.full((len(few),), regime["top_p"])
        few = few.masked_fill(~passes_filters_reference(few, every, top_p), -torch.inf)
    return (few.softmax(-1) * hit).sum(-1)


def expected_rounds(reached: Floats) -> float:
    """Rounds that start within a text, the first one at its first anchor.

    Args:
        reached: [A, γ], P(a ≥ k) of a round that starts at each anchor in turn.
    """
    anchors, gamma = reached.shape
    exactly = np.concatenate([np.ones((anchors, 1)), reached], axis=1)
    exactly[:, :-1] -= reached  # P(a = 0..γ)
    starts = np.zeros(anchors + gamma + 1)
    starts[0] = 1.0
    for anchor in range(anchors):
        starts[anchor + 1 : anchor + gamma + 2] += starts[anchor] * exactly[anchor]
    return math.fsum(starts[:anchors])


@torch.no_grad()
def continued(
    target: Path, prompts: torch.Tensor, count: int, regime: Mapping[str, float]
) -> torch.Tensor:
    """Prompts int64 [P, S], and `count` words that the target says to each: [P, S + count]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    said, new, past = prompts, prompts, None
    for _ in range(count):
        output = model(new, past_key_values=past, use_cache=True)
        past = output.past_key_values
        probabilities = target_probabilities(output.logits[:, -1], regime)
        new = torch.multinomial(probabilities, 1, generator=generator)
        said = torch.cat([said, new], dim=1)
    return said


def rounds_of(
    pair: Pair,
    tokens: torch.Tensor,
    emitted: int,
    regime: Mapping[str, float],
    sources: Mapping[str, Source],
) -> dict[str, float]:
    """Expected rounds for `emitted` words of one text by the name of the source.

    Args:
        tokens: int64 [S], γ words longer than what counts.
    """
    gamma = pair.spec.block_size
    first = len(tokens) - emitted - gamma
    anchors = torch.arange(first, first + emitted)
    probe, device = Probe(tokens[None], anchors[None]), torch.device("cpu")
    outputs = run_pair(pair, probe, device)
    in_eight_bits = run_pair(pair, probe, device, in_fp8).draft_logits[0].flatten(0, 1)
    places = anchors[:, None] + torch.arange(gamma)  # of the token before each draft
    w1, w2 = (pair.drafter.tensor(f"markov_head.markov_w{i}.weight").float() for i in (1, 2))
    latent = w1[tokens[places]]
    logits = outputs.draft_logits[0].flatten(0, 1)
    base = logits - (latent @ w2.T).flatten(0, 1)
    words = tokens[places + 1].flatten()
    p = target_probabilities(outputs.logits[0], regime)[places.flatten(), words]
    found = {}
    for name, source in sources.items():
        q = draft_probability(base, in_eight_bits if source.fp8 else logits, words, regime, source)
        ratio = (q / p.clamp_min(1e-12)).clamp_max(1.0).view(emitted, gamma)
        found[name] = expected_rounds(ratio.cumprod(dim=1).numpy())
    return found


def compare(rounds: Floats, dense: Floats, emitted: int) -> dict[str, float]:
    """Accepted length over texts, and its change against dense drafting, in %, each with a standard
    error: the jackknife's, texts left out one by one.

    Args:
        rounds, dense: [P], expected rounds of each text, which has `emitted` words.
    """
    count = len(rounds)
    lengths = emitted * (count - 1) / (rounds.sum() - rounds)
    changes = 100 * ((dense.sum() - dense) / (rounds.sum() - rounds) - 1)
    spread = math.sqrt(count - 1)
    return {
        "accepted_length": float(emitted * count / rounds.sum()),
        "standard_error": float(spread * lengths.std()),
        "change_percent": float(100 * (dense.sum() / rounds.sum() - 1)),
        "change_standard_error": float(spread * changes.std()),
    }


def markdown(result: Mapping[str, Any]) -> str:
    """A row for each source of drafts."""
    lines = [
        f"{result['pair']}, γ={result['gamma']}, fp32: expected accepted length over "
        f"{result['texts']} texts of {result['emitted']} words, ± standard error; change against "
        f"{DENSE}",
        "",
        f"| drafted from | {' | '.join(REGIMES)} |",
        "|---|" + "---|" * len(REGIMES),
    ]
    for name, arm in result["arms"].items():
        cells = []
        for one in (arm[regime] for regime in REGIMES):
            change = f", {one['change_percent']:+.2f} ± {one['change_standard_error']:.2f} %"
            length = f"{one['accepted_length']:.3f} ± {one['standard_error']:.3f}"
            cells.append(length + ("" if name == DENSE else change))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@app.command()
@plain_errors
def main(
    target: Annotated[Path, typer.Option(help="Folder of a pair whose head is vanilla.")],
    out: Annotated[Path, typer.Option(help="Folder for overlap.json and overlap.md.")],
    drafter: Annotated[Path | None, typer.Option(help="Default: beside the target.")] = None,
    dataset: Annotated[str, typer.Option(help="See benchmarks/prompts.py.")] = PYTHON_TEXT,
    texts: Annotated[int, typer.Option(min=2, help="Texts of each regime.")] = 64,
    emitted: Annotated[int, typer.Option(min=1, help="Words of each text.")] = 128,
) -> None:
    """Compute, and write the table."""
    from transformers import AutoTokenizer

    pair = open_pair(target, drafter)
    if pair.spec.head_type != "vanilla":
        raise typer.BadParameter(f"the drafter's head is {pair.spec.head_type}, needed is vanilla")
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = [tokenizer(text).input_ids for text in load_prompts(dataset, str(target), texts).texts]
    long = [row[:PROMPT_TOKENS] for row in ids if len(row) >= PROMPT_TOKENS]
    if len(long) < 2:
        raise PromptsError(
            f"found {len(long)} prompts of {PROMPT_TOKENS} tokens or more, needed are two. Fix: "
            "another --dataset, or more --texts"
        )
    prompts = torch.tensor(long)
    out.mkdir(parents=True, exist_ok=True)
    sources = sources_of(pair.spec.draft_vocab_size)
    arms: dict[str, Any] = {name: {} for name in sources}
    for kind, regime in REGIMES.items():
        said = continued(target, prompts, emitted + pair.spec.block_size + 1, regime)
        each = [rounds_of(pair, row, emitted, regime, sources) for row in said]
        dense = np.array([found[DENSE] for found in each])
        for name, arm in arms.items():
            rounds = np.array([found[name] for found in each])
            arm[kind] = compare(rounds, dense, emitted)
    result = {
        "provenance": provenance(),
        "pair": target.name,
        "gamma": pair.spec.block_size,
        "texts": len(prompts),
        "emitted": emitted,
        "arms": arms,
    }
    write_record(out, "overlap", result, markdown(result))


if __name__ == "__main__":
    app()
