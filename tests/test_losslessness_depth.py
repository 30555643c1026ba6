"""Sampled output follows the target's own distribution while the draft depth changes at random.

As `tests.test_losslessness`, on the real engine: a random target over five words, all 125
continuations written down, chi-square at 1e-3. Requests arrive while others run, so that each sees
another sequence of depths.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.depth_runs import asynchronous_on_cpu, choose_by, random_depths, scheduled
from tests.engine import Request, engine, observed, run
from tests.test_losslessness import (
    GAMMA,
    POSITIONS,
    PROMPT,
    REGIMES,
    SIGNIFICANCE,
    exact_joint,
    p_value,
    sample,
)
from tests.test_losslessness import pair as pair

pytestmark = pytest.mark.engine


def test_sampled_output_follows_the_target(pair: Path) -> None:
    """Catches cached draft distributions of a step with another depth, a residual at the wrong
    place, and seeds that are used twice. Drafting is probabilistic: greedy drafting keeps less from
    step to step, and nothing else."""
    config = {
        "method": "dspark",
        "draft_sample_method": "probabilistic",
        "num_speculative_tokens": GAMMA,
    }
    options: dict[str, Any] = {
        "additional_config": {"dspark": {"verification": "all", "depth": "auto"}}
    }
    options |= {"skip_tokenizer_init": True, "max_num_seqs": 16}
    with asynchronous_on_cpu(), engine(pair, config, **options) as llm:
        run(llm, [Request(PROMPT, {"max_tokens": 4, "detokenize": False})])
        choose_by(llm, random_depths(GAMMA, seed=7))
        with observed(llm) as seen, scheduled(llm) as steps:
            samples = sample(llm, REGIMES["temperature 1"])
    depths = {step.num_spec_tokens_to_schedule for step in steps}
    assert depths == set(range(GAMMA + 1))
    assert 0.05 < seen[0].accepted / seen[0].drafted < 0.95
    joint = exact_joint(pair, REGIMES["temperature 1"])
    assert p_value(samples, joint) > SIGNIFICANCE
    for position in range(POSITIONS):
        others = tuple(i for i in range(POSITIONS) if i != position)
        assert p_value(samples[:, [position]], np.asarray(joint.sum(others))) > SIGNIFICANCE
