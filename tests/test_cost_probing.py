"""Cost probes: of what is in doubt and could pay; soon where something changed, else rarely."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import step_cases
from tests.depth_cases import NO_PROBES, choose
from tests.step_cases import DEPTHS, GAMMA, SURVIVAL, shape
from vllm_dspark.scheduler.cost_model import CostModel
from vllm_dspark.scheduler.depth import CostProbeSettings, DepthPolicy

OFTEN = CostProbeSettings(share=0.5, interval=40, longest=160)


def policy(settings: CostProbeSettings = OFTEN, **options: Any) -> DepthPolicy:
    return DepthPolicy(GAMMA, DEPTHS, probes=NO_PROBES, cost_probes=settings, **options)


class Run:
    """A policy whose steps are timed at once, as the model has it but for a factor by depth."""

    def __init__(self, settings: CostProbeSettings = OFTEN, timed: bool = True) -> None:
        self.policy, self.cost = policy(settings), step_cases.model()
        self.timed, self.factors = timed, dict.fromkeys(DEPTHS, 1.0)

    def show(
        self, steps: int, requests: int, survival: Any = SURVIVAL, **options: Any
    ) -> list[int]:
        """The probed depth of each step, -1 for none."""
        probed = []
        for _ in range(steps):
            depth = choose(self.policy, requests, survival, cost=self.cost, **options)
            probed.append(depth if self.policy.probing else -1)
            step = shape(requests, depth)
            if self.timed:
                self.cost.observe(step, self.factors[depth] * step_cases.step_ms(step))
        return probed


def starts(probed: list[int]) -> list[int]:
    """Steps at which a probe starts."""
    return [i for i, depth in enumerate(probed) if depth >= 0 and (i == 0 or probed[i - 1] < 0)]


def test_a_depth_that_cannot_pay_is_never_probed() -> None:
    """One request: no drafts at all would take 2.3 times as long for a token, one draft 1.6 times.
    What is nearly as good may be: 3 and 5 drafts."""
    probed = set(Run().show(1000, 1))
    assert {-1} < probed <= {-1, 3, 5}


def test_the_first_look_comes_soon_and_intervals_double() -> None:
    run = Run(CostProbeSettings(share=0.9, interval=40, longest=160, settle=8))
    found = starts(run.show(1200, 64))
    assert found[0] == OFTEN.settle
    gaps = np.diff(found)
    assert (np.diff(gaps) >= -32).all()  # of a look
    assert 40 <= gaps[0] <= 80 + 32  # in doubt after the interval that comes next
    assert gaps[-1] >= 160
    assert run.policy.cost_probes.interval == 160


@pytest.mark.parametrize("requests", [32, 128])
def test_another_load_starts_over(requests: int) -> None:
    run = Run(CostProbeSettings(share=0.9, interval=500, longest=500))
    assert len(starts(run.show(400, 64))) >= 1
    assert not starts(run.show(20, 80))
    assert starts(run.show(12, requests))


def test_a_new_regime_starts_over() -> None:
    """Steps take half as long again from now on: once that is believed, all that was learned is in
    doubt."""
    run = Run(CostProbeSettings(share=0.9, interval=1000, longest=1000))
    run.show(100, 64)
    run.factors = dict.fromkeys(DEPTHS, 1.5)
    assert starts(run.show(60, 64))
    assert run.cost.regimes >= 1


def test_a_probe_lasts_until_times_arrived() -> None:
    """Three; or eight steps, where none come."""
    assert len([d for d in Run().show(40, 64) if d >= 0]) == OFTEN.times
    assert len([d for d in Run(timed=False).show(40, 64) if d >= 0]) == OFTEN.most_steps


def test_another_load_ends_a_probe() -> None:
    """Its times would be of no use. Catches a probe that is carried over to a load it was not begun
    for."""
    run = Run(timed=False)
    assert min(run.show(10, 64)[-2:]) >= 0
    assert run.show(1, 200) == [-1]


def test_depth_0_comes_first_and_is_learned() -> None:
    """At 256 requests with one draft that pays by 5 %. Without drafts a step takes 30 % less than
    anyone knew: it is found out, and the choice follows."""
    run = Run()
    run.factors[0] = 0.7
    first = [depth for depth in run.show(60, 256) if depth >= 0]
    assert first[: OFTEN.times] == [0] * OFTEN.times
    run.show(200, 256)
    assert run.policy.depth == 0


@pytest.mark.parametrize(("factor", "interval"), [(1.0, 1000), (0.7, 500)])
def test_what_nobody_predicted_starts_over(factor: float, interval: int) -> None:
    """Depth 0 takes what was predicted, and the interval doubles, or 30 % less, and it stays the
    shortest. Catches a surprise that is not noticed, and one that is seen in every probe."""
    run = Run(CostProbeSettings(share=0.9, interval=500, longest=4000))
    run.factors[0] = factor
    assert run.show(14, 256)[8:11] == [0, 0, 0]
    assert run.policy.cost_probes.interval == interval


def test_depth_0_in_doubt_waits_for_no_interval() -> None:
    """Another depth was probed just now, and the next is due in 1000 steps. Catches depth 0 held
    back with the others."""
    run = Run(CostProbeSettings(share=0.9, interval=1000, longest=1000))
    assert max(run.show(20, 128)) > 0
    assert 0 in run.show(60, 128, np.cumprod(np.full(GAMMA, 0.35)))


@pytest.mark.parametrize("share", [0.002, 0.01])
def test_probes_keep_to_their_share(share: float) -> None:
    """Load that jumps to and fro, no times, and doubt forever: of steps no more than the share,
    but for what there was at the start."""
    run = Run(CostProbeSettings(share=share, interval=1, longest=1, saved=16), timed=False)
    probes = 0
    for _ in range(150):
        for requests in (64, 200):
            probes += sum(depth >= 0 for depth in run.show(20, requests))
    assert 0 < probes <= 16 + share * 6000


def test_share_0_is_never() -> None:
    assert set(Run(CostProbeSettings(share=0.0)).show(300, 64)) == {-1}


def test_no_probe_beyond_memory() -> None:
    """Short K/V memory leaves nothing deeper to look at; a probe that runs when it gets short
    ends."""
    survival = np.cumprod(np.full(GAMMA, 0.6))
    run = Run(timed=False)
    deep = [d for d in run.show(300, 16, survival) if d >= 0]
    assert max(deep) > 1
    short = Run(timed=False)
    assert max(short.show(300, 16, survival, free_kv_fraction=0.035)) <= 1
    ended = Run(timed=False)
    for _ in range(300):
        ended.show(1, 16, survival)
        if ended.policy.probing and choose(ended.policy, 16, survival, cost=ended.cost) > 0:
            break
    assert ended.policy.probing
    assert set(ended.show(1, 16, survival, free_kv_fraction=0.0)) == {-1}


def test_hope_is_bounded_and_says_what_is_in_doubt() -> None:
    """Less than predicted by a part; of depth 0 what was profiled, but no less than a third."""
    depths = np.array(DEPTHS)
    for factor, expected in ((1.0, 0.85), (2.0, 0.5), (10.0, 1 / 3)):
        cost = step_cases.model()
        for _ in range(300):
            for depth in (0, 3):
                step = shape(16, depth)
                cost.observe(step, factor * step_cases.step_ms(step))
        hoped = cost.hoped_ms(16, 4800, depths, 3)
        ratio = hoped / cost.steady_ms(np.array(16), np.array(4800), depths)
        assert ratio[0] == pytest.approx(expected, rel=0.05)
        np.testing.assert_allclose(ratio[1:], 0.85, rtol=0.01)


def test_hope_is_as_large_as_doubt() -> None:
    """Of a guess that saw one depth alone much stays open, and less of what was measured; of the
    depth that was seen nothing but the usual part."""
    open_: dict[str, np.ndarray] = {}
    depths = np.array(DEPTHS)
    for name, cost in {"guess": CostModel.default(GAMMA), "profile": step_cases.model()}.items():
        step = shape(64, 1)
        for _ in range(300):
            cost.observe(step, step_cases.step_ms(step))
        predicted = cost.steady_ms(np.array(64), np.array(64 * step_cases.CONTEXT), depths)
        open_[name] = cost.hoped_ms(64, 64 * step_cases.CONTEXT, depths, 1) / predicted
    assert (open_["guess"][[0, 2, 3, 4, 5]] < 0.8).all()
    assert (open_["guess"] >= 1 / 3).all()
    np.testing.assert_allclose(open_["profile"], 0.85, atol=0.03)
    assert open_["guess"][1] == pytest.approx(0.85)


@pytest.mark.parametrize(
    ("name", "value"),
    [("share", 1.0), ("share", -0.1), ("settle", 0), ("interval", 0), ("longest", 9), ("times", 0),
     ("most_steps", 0), ("saved", 7)],
)  # fmt: skip
def test_bad_settings_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} "):
        CostProbeSettings(**({"interval": 256} | {name: value}))
