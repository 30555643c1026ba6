"""Drafting from candidates: what it needs of an engine, and what it spares it.

Proposals are kept as K words with their log-probabilities by request and position, which only our
kernels write and read. So both stages need them, or the engine does not start.
"""

from __future__ import annotations

import copy
import os
from typing import Any

from vllm_dspark.checkpoint import DrafterSpec
from vllm_dspark.config import DSparkConfig, DSparkConfigError
from vllm_dspark.kernels.dispatch import Choice, choose, wanted

_FIX = "Fix: leave draft_candidates out, or remove what stands in the way."


def needed_for(config: DSparkConfig) -> str | None:
    """Why our kernels must serve, in words; None if they need not."""
    count = config.draft_candidates
    return None if count is None else f"draft_candidates is {count}"


def ours_are_wanted(config: DSparkConfig, faster: bool = False) -> bool:
    """Whether our kernels are to verify, if they can; `faster` as `choose` has it."""
    word = wanted(config.kernels, os.environ, needed_for(config))[0]
    return word == "triton" or (word == "auto" and faster)


def refuse_candidates(config: DSparkConfig, spec: DrafterSpec | None) -> None:
    """At the start: drafting from candidates that cannot be.

    Args:
        spec: of the drafter; None for one that vLLM draws from with code of its own.

    Raises:
        DSparkConfigError: with the reason.
    """
    asked, count = needed_for(config), config.draft_candidates
    if asked is None or count is None:
        return
    word, source = wanted(config.kernels, os.environ, asked)
    if word == "reference":
        raise DSparkConfigError(f"{asked}, which needs our Triton kernels, but {source}. {_FIX}")
    if spec is None:
        raise DSparkConfigError(f"{asked}, but vLLM's own head draws this drafter's tokens. {_FIX}")
    if count > spec.draft_vocab_size:
        words = f"the drafter has only {spec.draft_vocab_size} words"
        raise DSparkConfigError(f"{asked}, but {words}. {_FIX}")


def choose_kernels(
    config: DSparkConfig, stage: str, obstacle: str | None, faster: bool = False
) -> Choice:
    """Whether our kernels serve a stage.

    Args:
        stage: what is done to the drafts, "drawn" or "verified".
        obstacle: why our kernels cannot; None if they can.
        faster: see `choose`.

    Raises:
        DSparkConfigError: drafting from candidates needs them, and they do not.
        ValueError: DSPARK_KERNELS holds an unknown word.
    """
    asked = needed_for(config)
    choice = choose(config.kernels, os.environ, obstacle, asked, faster)
    if asked is not None and not choice.triton:
        raise DSparkConfigError(
            f"{asked}, so drafts must be {stage} by our Triton kernels, but they are not: "
            f"{choice.why}. {_FIX}"
        )
    return choice


def without_draft_logits(vllm_config: Any) -> Any:
    """A copy from which vLLM's speculator makes no cache of draft logits, [slots, γ, V].

    It makes one where drafting is probabilistic, and asks for nothing else by that name while it is
    made; the configuration's own word has to be put back in its place then.
    """
    changed, speculative = copy.copy(vllm_config), copy.copy(vllm_config.speculative_config)
    speculative.draft_sample_method = "greedy"
    changed.speculative_config = speculative
    return changed
