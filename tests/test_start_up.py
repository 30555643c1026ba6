"""What a manager has timed at start-up, and what it does where there is nothing to time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.test_profile_cache import KEY, Group, Manager
from tests.test_profile_cache import group as group
from tests.test_verification_costs import CAPTURED, costs, timed
from vllm_dspark.integration.verification import start_up
from vllm_dspark.integration.verification.profile import ProfileSource


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One for each time that prices were said to be a guess."""
    lines: list[None] = []
    monkeypatch.setattr(start_up, "_log_guess", lambda: lines.append(None))
    return lines


def start(manager: Manager, captured: list[int]) -> int:
    """As vLLM's runner starts; how many dummy runs that took."""
    batches = list(manager.batches_to_profile(captured))
    manager.set_initial_cost_curves([timed(batch) for batch in batches])
    return len(batches)


@pytest.mark.parametrize("choice", [None, "auto", "always", "skip"])
def test_no_full_graph_means_a_guess(
    group: Group, logged: list[None], tmp_path: Path, choice: str | None
) -> None:
    """Piecewise graphs alone, or no full one that fits: the engine starts, and again with what the
    first start left, which is nothing."""
    for _ in range(2):
        group.become(0)
        manager = Manager(costs(), None if choice is None else ProfileSource(choice, KEY))
        assert start(manager, []) == 0
        assert not costs_of(manager).profiled
    assert len(logged) == (0 if choice == "skip" else 2)  # which says so itself
    assert not list(tmp_path.rglob("*.json"))


def test_graphs_for_shorter_blocks_alone_mean_a_guess(group: Group, logged: list[None]) -> None:
    """vLLM's own schedule never drafts γ, and no step is larger than the graphs."""
    manager = Manager(costs(gamma=7, trims_replay=False, most_tokens=12), None)
    assert start(manager, [3, 6, 9, 12]) == 0
    assert not costs_of(manager).profiled
    assert logged == [None]


def test_dummy_runs_without_times_are_an_error(group: Group, logged: list[None]) -> None:
    manager = Manager(costs(), None)
    assert list(manager.batches_to_profile(CAPTURED))
    with pytest.raises(RuntimeError, match="timed none"):
        manager.set_initial_cost_curves([])
    assert not logged


def test_head_is_asked_only_for_a_profile(group: Group, logged: list[None]) -> None:
    """Its memory is spent, and ranks meet for it, only where something comes of it."""
    asked = 0

    def line() -> tuple[float, float]:
        nonlocal asked
        asked += 1
        return 0.5, 0.0

    manager = Manager(costs(), None)
    manager.head_line = line
    start(manager, [])
    assert asked == 0
    assert start(manager, CAPTURED) > 0
    assert asked == 1
    assert costs_of(manager).profiled


def costs_of(manager: Manager) -> Any:
    assert manager.costs is not None
    return manager.costs
