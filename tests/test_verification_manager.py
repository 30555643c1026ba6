"""Both managers, called as vLLM's runner calls them, on CPU tensors.

What is checked is the layout that the runner gets: query lengths and logits rows, on the host and
on the device, in every step of random traffic.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.manager_driver import GAMMA, SLOTS, begin, check, end, layout, step
from tests.verification_cases import PlainCalibrator, Prices, RandomLengths
from vllm_dspark.calibration.online import OnlineCalibrator
from vllm_dspark.integration.verification.allocation_kernel import KernelAllocation
from vllm_dspark.integration.verification.arrivals import Arrivals
from vllm_dspark.integration.verification.batch import Layout
from vllm_dspark.integration.verification.device import DeviceVerification
from vllm_dspark.integration.verification.host import HostVerification
from vllm_dspark.scheduler.fixed import FixedPolicy
from vllm_dspark.scheduler.verification import VerificationPolicy

RISING = tuple(1 + 0.08 * k for k in range(13))  # four requests: a draft pays above a third
NAMES = ["a", "b", "c", "d"]
FULL = dict.fromkeys(NAMES, GAMMA)


def host(policy: Any = None, **changes: Any) -> Any:
    policy = policy or VerificationPolicy(SLOTS, GAMMA, PlainCalibrator(), Prices(*RISING))
    return HostVerification(layout(**changes), policy, None, Arrivals())


def device(allocation: Any = None, **changes: Any) -> Any:
    calibrator = OnlineCalibrator(GAMMA)
    policy = VerificationPolicy(SLOTS, GAMMA, calibrator, Prices(*RISING))
    rest = layout(**changes), policy, None, Arrivals()
    return DeviceVerification(calibrator, *rest, allocation=allocation)


def kernel(**changes: Any) -> Any:
    """Device mode whose drafts are ranked by our kernel, in Triton's interpreter."""
    return device(KernelAllocation(SLOTS, GAMMA, 1, torch.device("cpu")), **changes)


@pytest.mark.parametrize("make", [host, device, kernel])
def test_layouts_of_random_traffic(make: Any) -> None:
    """Prefills among decodes, blocks of any length, budgets from nothing to all. Requests come
    and go, confidences are random."""
    manager = make()
    random = np.random.default_rng(0)
    states = manager.layout.req_states
    budgets = set()
    for number in range(120):
        names = [f"{number // 20}{name}" for name in NAMES]
        if number % 20 == 0:
            states.clear()
            begin(manager, {name: {"temperature": float(random.integers(2))} for name in names})
        else:
            begin(manager, {})
        drafts = {name: int(random.integers(GAMMA + 1)) for name in names}
        if number % 3 == 0:
            drafts = dict.fromkeys(names, GAMMA)
        tokens = {name: drafts[name] + 1 for name in names}
        if number % 4 == 0:
            drafts[names[1]], tokens[names[1]] = 0, 7  # a prefill
        laid_out = step(manager, tokens, drafts)
        check(laid_out, tokens, drafts, exact=make is host)
        budgets.add(laid_out.verified)
        confidence = random.choice([0.05, 0.5, 0.95], (4, GAMMA))
        emitted = [1 + int(random.integers(n)) for n in laid_out.device_rows]
        rejected = [n - e for n, e in zip(laid_out.device_rows, emitted, strict=True)]
        end(manager, laid_out.order, emitted, rejected, confidence)
    counters = manager.snapshot()
    assert len(budgets) > 5
    assert counters["mode"] == manager.mode
    assert 0 < counters["whole"] < counters["rounds"] == 120
    assert 0 < counters["verified"] == counters["budget"] < counters["scheduled"]
    assert make is host or manager.policy.calibrator.version > 0


@pytest.mark.parametrize("make", [device, kernel])
def test_device_and_host_rank_alike(make: Any) -> None:
    """The same confidences give the same lengths, on the host and on tensors. Every fourth request
    lets less be verified, half of them are sampled."""
    ours, theirs = (
        make(),
        host(VerificationPolicy(SLOTS, GAMMA, OnlineCalibrator(GAMMA), Prices(*RISING))),
    )
    random = np.random.default_rng(1)
    asked = {"extra_args": {"dspark_max_verified": 1}, "temperature": 1.0}
    for manager in (ours, theirs):
        begin(manager, {"a": None, "b": {"temperature": 0.7}, "c": asked, "d": None})
    tokens = dict.fromkeys(NAMES, GAMMA + 1)
    seen = set()
    for _ in range(80):
        confidence = random.uniform(0.02, 0.98, (4, GAMMA))
        laid_out = [step(manager, tokens, FULL) for manager in (ours, theirs)]
        assert laid_out[0].device == laid_out[1].device
        assert laid_out[0].device[2] <= 2
        seen.add(tuple(laid_out[0].device))
        emitted = [1 + n // 2 for n in laid_out[0].device_rows]
        rejected = [max(n - e, 0) for n, e in zip(laid_out[0].device_rows, emitted, strict=True)]
        for manager in (ours, theirs):
            end(manager, NAMES, emitted, rejected, confidence)
    assert len(seen) > 10


@pytest.mark.parametrize("make", [host, device, kernel])
def test_whole_blocks_take_the_runners_layout(make: Any) -> None:
    """Nothing is computed, copied or launched: rows are a slice of what is at hand."""
    manager = make()
    manager.policy.costs = Prices(1.0)
    begin(manager, {name: None for name in NAMES})
    tokens = dict.fromkeys(NAMES, GAMMA + 1)
    laid_out = step(manager, tokens, FULL)
    check(laid_out, tokens, FULL, exact=True)
    rows, starts, verified, admitted = laid_out.result
    assert rows.data_ptr() == manager._full_cu.data_ptr()
    assert starts is manager.layout.query_start_loc
    assert (verified, admitted) == (12, None)
    assert manager.snapshot()["whole"] == 1


@pytest.mark.parametrize("make", [host, device])
def test_whole_shorter_blocks_are_copied_once(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a depth below γ the boundaries go to the device with the first step of these rows, also
    where another step comes between, and anew with other rows."""
    copied: list[list[int]] = []
    copy = Layout.boundaries

    def copying(self: Layout, lengths: Any) -> torch.Tensor:
        copied.append(lengths.tolist())
        return copy(self, lengths)

    monkeypatch.setattr(Layout, "boundaries", copying)
    manager = make()
    prices, trims = Prices(1.0), Prices(1.0, 9.0)
    begin(manager, {name: None for name in NAMES})

    def run(names: list[str], drafts: int, prices: Prices = prices) -> Any:
        manager.policy.costs = prices
        begin(manager, {}, depth=2)
        asked = dict.fromkeys(names, 1 + drafts), dict.fromkeys(names, drafts)
        laid_out = step(manager, *asked)
        check(laid_out, *asked, exact=True)
        return laid_out.result[0]

    first = run(NAMES, 2)
    for _ in range(3):
        assert run(NAMES, 2) is first
    run(NAMES, 2, trims)
    assert run(NAMES, 2) is first
    assert first.tolist() == [0, 3, 6, 9, 12]
    assert copied.count([3, 3, 3, 3]) == 1
    run(NAMES[:3], 2)
    run(NAMES, 1)
    assert copied[-2:] == [[3, 3, 3], [2, 2, 2, 2]]


@pytest.mark.parametrize("make", [host, device, kernel])
def test_no_draft_pays(make: Any) -> None:
    """A batch of single tokens, whose host layout is exact in both modes."""
    manager = make()
    manager.policy.costs = Prices(1.0, 9.0)
    begin(manager, {name: None for name in NAMES})
    tokens = dict.fromkeys(NAMES, GAMMA + 1)
    laid_out = step(manager, tokens, FULL)
    check(laid_out, tokens, FULL, exact=True)
    assert laid_out.verified == 0


@pytest.mark.parametrize("make", [host, device, kernel])
def test_rows_that_the_sampler_takes_bound_the_budget(make: Any) -> None:
    """With vLLM's flag set its rejection sampler takes one chunk of rows."""
    manager = make(limit=9)
    manager.policy.costs = Prices(1.0)
    begin(manager, {name: None for name in NAMES})
    tokens = dict.fromkeys(NAMES, GAMMA + 1)
    laid_out = step(manager, tokens, FULL)
    check(laid_out, tokens, FULL, exact=make is host)
    assert laid_out.verified == 5
    assert sum(laid_out.device_rows) == 9


@pytest.mark.parametrize(("returns_admitted", "values"), [(False, 3), (True, 4)])
def test_return_values_by_version(returns_admitted: bool, values: int) -> None:
    """0.32 unpacks three, 0.33 four."""
    for prices in (Prices(1.0), Prices(*RISING)):
        manager = host(returns_admitted=returns_admitted)
        manager.policy.costs = prices
        begin(manager, {"a": None})
        assert len(step(manager, {"a": 4}, {"a": 3}).result) == values


def test_limit_of_a_request_holds_without_a_scheduler() -> None:
    """All of γ is verified, but for the one that asked for less."""
    manager = HostVerification(layout(), FixedPolicy(SLOTS, GAMMA), None, None)
    asked = {"extra_args": {"dspark_max_verified": 0, "other": 3}}
    begin(manager, {"a": None, "b": asked, "c": None})
    tokens = {name: GAMMA + 1 for name in "abc"}
    drafts = {name: GAMMA for name in "abc"}
    laid_out = step(manager, tokens, drafts)
    check(laid_out, tokens, drafts, exact=True)
    assert laid_out.device == [4, 1, 4]


def test_random_policy_through_the_manager() -> None:
    """The policy of the engine's adversarial tests lays out what it drew."""
    policy = RandomLengths(SLOTS, GAMMA)
    manager = host(policy)
    begin(manager, {name: None for name in NAMES})
    tokens = dict.fromkeys(NAMES, GAMMA + 1)
    for _ in range(50):
        laid_out = step(manager, tokens, FULL)
        check(laid_out, tokens, FULL, exact=True)
        assert [n - 1 for n in laid_out.device] == policy.lengths[-1].tolist()


def test_outcomes_reach_the_calibrator() -> None:
    """Verified are accepted and rejected drafts; trimmed ones are neither. A request in the middle
    of its prefill emits nothing, and its block will not be verified."""
    manager = host()
    begin(manager, {"a": None, "b": {"temperature": 1.0}})
    end(manager, ["a", "b"], [1, 0], [0, 0], [[0.9, 0.8, 0.7], [0.1, 0.1, 0.1]])
    begin(manager, {})
    laid_out = step(manager, {"a": 4, "b": 2}, {"a": 3})
    end(manager, laid_out.order, [2, 1], [1, 0], [[0.6] * 3, [0.5] * 3])
    begin(manager, {})
    step(manager, {"a": 4, "b": 4}, {"a": 3, "b": 3})
    ((confidence, accepted, verified, sampled, *_),) = manager.policy.calibrator.observed
    np.testing.assert_allclose(confidence, [[0.9, 0.8, 0.7]], rtol=1e-6)
    assert (accepted.tolist(), verified.tolist(), sampled.tolist()) == ([1], [2], [False])
    policy, index = manager.policy, manager.layout.req_states.req_id_to_index
    assert policy._current[[index["a"], index["b"]]].tolist() == [1, 1]  # drawn by step 1
    assert policy._block[:, index["a"]].tolist() == [1, 0]
    assert policy._block[:, index["b"]].tolist() == [1, -1]


def test_kernels_know_what_could_not_be_judged() -> None:
    """Where they verified, their table counts; of a step that they did not verify they know
    nothing. To vLLM whatever was not accepted is rejected."""
    manager = host()
    # In the last step the second draft's row is no distribution.
    tables = iter([None, None, None, torch.tensor([[2], [0]])])
    manager.outcomes_of = lambda emitted: next(tables)
    begin(manager, {"a": None})
    end(manager, ["a"], [1], [0], [[0.9, 0.8, 0.7]])
    for _ in range(3):
        begin(manager, {})
        laid_out = step(manager, {"a": 4}, {"a": 3})
        end(manager, ["a"], [2], [laid_out.verified - 1], [[0.9, 0.8, 0.7]])
    begin(manager, {})
    step(manager, {"a": 4}, {"a": 3})
    outcomes = [(int(o[1][0]), int(o[2][0])) for o in manager.policy.calibrator.observed]
    assert outcomes == [(1, 3), (1, 3), (1, 1)]


def test_block_that_was_not_drawn() -> None:
    """The engine may skip drafting, or draft less. What the drafter's buffer holds then is old."""
    manager = host()
    begin(manager, {"a": None})
    end(manager, ["a"], [1], [0], [[0.9, 0.9, 0.9]])
    begin(manager, {}, depth=0)
    end(manager, ["a"], [1], [0], [[0.1, 0.1, 0.1]])
    begin(manager, {}, skip_drafts=True)  # as 0.33 says it
    end(manager, ["a"], [1], [0], [[0.2, 0.2, 0.2]])
    begin(manager, {}, depth=2)
    end(manager, ["a"], [1], [0], [[0.7, 0.7, 0.1]])
    begin(manager, {})
    step(manager, {"a": 3}, {"a": 2})
    known = manager.policy._confidence[:, manager.layout.req_states.req_id_to_index["a"]]
    np.testing.assert_allclose(known, [[0.7, 0.7, np.nan], [0.9, 0.9, 0.9]], rtol=1e-6)


def test_block_without_any_confidence() -> None:
    """A drafter that computes NaN. What becomes of the block must not be taken for the outcome of
    the one before it, and the prior decides about the next."""
    manager = host()
    begin(manager, {"a": None})
    nothing = [[float("nan")] * GAMMA]
    end(manager, ["a"], [1], [0], [[0.9] * GAMMA])
    for _ in range(2):
        begin(manager, {})
        laid_out = step(manager, {"a": 4}, {"a": 3})
        end(manager, ["a"], [1], [laid_out.verified], nothing)
    begin(manager, {})
    step(manager, {"a": 4}, {"a": 3})
    first, *others = [seen[0] for seen in manager.policy.calibrator.observed]
    np.testing.assert_allclose(first, [[0.9] * GAMMA], rtol=1e-6)
    assert len(others) > 0
    assert np.isnan(others).all()


@pytest.mark.parametrize("make", [host, device], ids=["host", "device"])
def test_rows_are_made_anew_when_something_changes(make: Any) -> None:
    """As long as nothing does they are one object, which a standing choice goes by. A request that
    comes again under its name has another slot."""
    manager = make()
    begin(manager, {"a": None, "b": None})
    tokens, drafts = {"a": 4, "b": 4}, {"a": 3, "b": 3}
    seen = []

    def rows(tokens: dict[str, int], drafts: dict[str, int]) -> Any:
        laid_out = step(manager, tokens, drafts)
        check(laid_out, tokens, drafts, exact=make is host)
        seen.append(manager._rows._rows)
        return seen[-1]

    first = rows(tokens, drafts)
    assert rows(dict(tokens), dict(drafts)) is first
    changes = [(tokens, {"a": 3, "b": 2}), ({"a": 4}, {"a": 3}), ({"b": 4, "a": 4}, drafts)]
    for changed in changes:
        assert rows(*changed) is not first
    before = rows(tokens, drafts)
    index = manager.layout.req_states.req_id_to_index
    del manager.layout.req_states.index_to_req_id[index["b"]]
    manager.layout.req_states.index_to_req_id[0] = "taken"
    begin(manager, {"b": None})
    after = rows(tokens, drafts)
    assert after is not before
    assert after.slots.tolist() == [index["a"], index["b"]]


@pytest.mark.parametrize("make", [device, kernel])
def test_device_ranks_by_what_the_drafter_overwrote(make: Any) -> None:
    """One buffer holds the confidences of the last block pass. A request that sits out, and one
    whose row moves, are ranked by their own all the same."""
    manager = make()
    begin(manager, {name: None for name in NAMES})
    index = manager.layout.req_states.req_id_to_index
    buffer, sure = torch.zeros(SLOTS, GAMMA), {"a": 0.9, "b": 0.1, "c": 0.95, "d": 0.6}
    ones = torch.ones(4, dtype=torch.int32)

    def draws(names: list[str]) -> None:
        slots = np.array([index[name] for name in names])
        manager.observe(ones[: len(names)], ones[: len(names)])
        buffer.fill_(0.5)
        buffer[: len(names)] = torch.tensor([[sure[name]] * GAMMA for name in names])
        batch = SimpleNamespace(idx_mapping_np=slots, idx_mapping=torch.from_numpy(slots))
        manager.record_confidences(buffer, batch)

    def lengths(names: list[str]) -> dict[str, int]:
        manager.policy.costs = Prices(1.0, *[1.0 + 0.01 * k for k in range(3)], 9.0)
        begin(manager, {})
        laid_out = step(manager, dict.fromkeys(names, 4), dict.fromkeys(names, 3))
        assert laid_out.verified == 3
        return dict(zip(names, [n - 1 for n in laid_out.device], strict=True))

    draws(NAMES)
    assert lengths(NAMES) == {"a": 1, "b": 0, "c": 2, "d": 0}  # the buffer's own rows
    draws(NAMES)
    assert lengths(["b", "d"]) == {"b": 0, "d": 3}  # a and c sit out
    draws(["b", "d"])
    assert lengths(["c", "b", "a", "d"]) == {"c": 2, "b": 0, "a": 1, "d": 0}
    draws(["c", "b", "a", "d"])
    begin(manager, {})  # a prefill alone: nothing is verified, but something is drawn
    draws(["b"])
    assert lengths(NAMES) == {"a": 1, "b": 0, "c": 2, "d": 0}


def test_another_order_than_the_runners_is_noticed() -> None:
    """Lengths are by row; a vLLM that sorts in another way must not get the wrong ones."""
    manager = host()
    begin(manager, {"a": None, "b": None})
    manager.get_num_tokens({"a": 4, "b": 4}, {"a": [-1] * 3, "b": [-1] * 3})
    with pytest.raises(AssertionError, match="order"):
        manager.reallocate_drafts(["b", "a"], torch.tensor([0, 1]))


@pytest.mark.parametrize("samples", [True, False])
def test_steps_that_are_sent(samples: bool) -> None:
    """Of four steps of a depth the first two; a probe of one step, and what became of its block.
    Nothing that is skipped is taken for what it is not: every outcome meets its own block."""
    manager = device()
    manager.samples = samples
    sent: list[int] = []
    told: list[list[float]] = []
    send, observe = manager.arrivals.send, manager.policy.calibrator.observe

    def sending(number: int, *rest: Any) -> None:
        sent.append(number)
        send(number, *rest)

    def observing(confidence: Any, *rest: Any, **more: Any) -> None:
        told.append(confidence[:, 0].tolist())
        observe(confidence, *rest, **more)

    manager.arrivals.send, manager.policy.calibrator.observe = sending, observing
    depths = [GAMMA] * 8 + [2] + [GAMMA] * 3 + [0, 0, GAMMA, 0, 0]
    before = 0
    for number, depth in enumerate(depths):
        begin(manager, {"a": None} if number == 0 else {}, depth)
        if before:
            step(manager, {"a": 1 + before}, {"a": before})
        end(manager, ["a"], [1], [before], [[0.5 + number / 100] * GAMMA])
        before = depth
    manager.begin_step(SimpleNamespace(scheduled_new_reqs=[], num_spec_tokens_to_schedule=0))
    manager._collect()
    everything = [n for n in range(len(depths)) if depths[n] or (n and depths[n - 1])]
    assert sent == ([0, 3, 4, 7, 8, 9, 10, 12, 14, 15] if samples else everything)
    pairs = [n for n in sent if n and n - 1 in sent and depths[n - 1]]
    assert told == [[pytest.approx(0.5 + (n - 1) / 100, abs=1e-6)] for n in pairs]
