"""A cost model as text: it comes back whole, for its own key alone."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests import step_cases
from tests.step_cases import GAMMA, predicted, shape
from vllm_dspark.scheduler.cost_model import CostModel

MODEL = step_cases.model()
KEY = {"model": "qwen3-8b", "gpu": "H200", "vllm": "0.33.0"}


@pytest.mark.parametrize("cost", [MODEL, CostModel.default(GAMMA, (8, 16))], ids=["fit", "guess"])
def test_cache_round_trip(cost: CostModel) -> None:
    loaded = CostModel.from_json(cost.to_json(KEY), dict(reversed(KEY.items())))
    assert loaded.gamma == GAMMA
    for step in (shape(1, 7), shape(100, 4), shape(700, 0, 9000)):
        assert predicted(loaded, step) == predicted(cost, step)
    assert loaded.to_json(KEY) == cost.to_json(KEY)


def test_cache_holds_the_profile_alone() -> None:
    """What was learned from a slow hour is not handed to the next start."""
    cost = step_cases.model()
    before = cost.to_json(KEY)
    for _ in range(50):
        cost.observe(shape(16, 3), 2 * step_cases.step_ms(shape(16, 3)))
    assert cost.to_json(KEY) == before
    assert predicted(cost, shape(16, 3)) > 1.5 * predicted(MODEL, shape(16, 3))


@pytest.mark.parametrize(
    ("key", "named"),
    [(KEY | {"gpu": "H100"}, "gpu"), (KEY | {"tp": "2"}, "tp"), ({"model": "qwen3-8b"}, "gpu")],
)
def test_cache_refuses_another_key(key: dict[str, str], named: str) -> None:
    """A value, a name more, a name less: each says which."""
    with pytest.raises(ValueError, match=f"'{named}'"):
        CostModel.from_json(MODEL.to_json(KEY), key)


def damaged(**changes: Any) -> str:
    data = json.loads(MODEL.to_json(KEY))
    for name, value in changes.items():
        (data if name in data else data["profile"])[name] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    "text",
    [
        "", "no JSON", "[]", "{}", "null", '{"format": 1}', damaged(format=2),
        damaged(profile=None), damaged(profile={}), damaged(verify=[[1, 2], [3]]),
        damaged(verify=[[1, 2], [3, 2]]), damaged(verify=[[2, 1], [2, 3]]), damaged(draft={}),
        damaged(verify=[[1, 2], [1, math.nan]]), damaged(verify=[[1, 2], [-1, 2]]),
        damaged(draft={"0": [[1], [1]]}), damaged(draft={"9": [[1], [1]]}), damaged(gamma=0),
        damaged(rates={"context_ms": -1}), damaged(rates={"unknown": 1}), damaged(captured=[0]),
    ],
)  # fmt: skip
def test_cache_refuses_damage(text: str) -> None:
    with pytest.raises(ValueError):
        CostModel.from_json(text, KEY)
