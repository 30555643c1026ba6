"""Sampled output follows the target's own distribution while verification adapts.

As `tests.test_losslessness`, on the real engine in host mode: a random target over five words, all
125 continuations written down, chi-square at 1e-3. Sixteen requests compete for a budget that
jumps over stairs of prices, so whose drafts are verified hangs on what everybody drew.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engine import engine, observed
from tests.test_losslessness import (
    GAMMA,
    POSITIONS,
    REGIMES,
    SIGNIFICANCE,
    exact_joint,
    p_value,
    sample,
)
from tests.test_losslessness import pair as pair
from tests.verification_cases import Prices, manager_of

pytestmark = pytest.mark.engine

REQUESTS = 16
SAMPLES = 200
# A stair after every fifth of the at most 32 drafts: just below it is a good place to stop.
STAIRS = [1 + 0.03 * k + 0.35 * (k // 5) for k in range(REQUESTS * GAMMA + 1)]


@pytest.mark.parametrize("drafting", ["greedy", "probabilistic"])
def test_sampled_output_follows_the_target(pair: Path, drafting: str) -> None:
    """Catches a budget or a ranking that looks at the draft it decides on, and trimmed rows that
    are sampled by another rule."""
    config = {
        "method": "dspark",
        "draft_sample_method": drafting,
        "num_speculative_tokens": GAMMA,
    }
    regime: dict[str, Any] = REGIMES["temperature 1"]
    options: dict[str, Any] = {"skip_tokenizer_init": True, "max_num_seqs": REQUESTS}
    options["additional_config"] = {"dspark": {"verification_mode": "host"}}
    with engine(pair, config, **options) as llm:
        manager = manager_of(llm)
        manager.policy.costs = Prices(*STAIRS)
        with observed(llm) as seen:
            samples = sample(llm, regime, SAMPLES)
        counted = manager.snapshot()
    assert 0.1 < counted["verified"] / counted["scheduled"] < 0.9
    assert 0.05 < seen[0].accepted / counted["verified"] < 0.95
    joint = exact_joint(pair, regime)
    assert p_value(samples, joint) > SIGNIFICANCE
    for position in range(POSITIONS):
        others = tuple(i for i in range(POSITIONS) if i != position)
        assert p_value(samples[:, [position]], np.asarray(joint.sum(others))) > SIGNIFICANCE
