"""Cost profiles on disk: an engine that was profiled once starts without."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.test_verification_costs import CAPTURED, GAMMA, costs, profiled, timed
from vllm_dspark.config import DSparkConfig
from vllm_dspark.integration.cost_cache import CostCache, cache_folder
from vllm_dspark.integration.verification.costs import StepCosts
from vllm_dspark.integration.verification.manager import VerificationManager
from vllm_dspark.integration.verification.profile import ProfileSource, profile_key

KEY = {"target": "abc", "device": "H200"}


class Group:
    """Tensor-parallel ranks that run one after the other: the first one's word is kept."""

    def __init__(self) -> None:
        self.rank_in_group = 0
        self.told: list[Any] = []
        self._heard = 0

    def become(self, rank: int) -> None:
        """What follows is done by this rank; a new start, if it is the first."""
        self.rank_in_group, self._heard = rank, 0
        if rank == 0:
            self.told.clear()

    def broadcast_object(self, told: Any, src: int) -> Any:
        assert src == 0
        if self.rank_in_group == 0:
            self.told.append(told)
        self._heard += 1
        return self.told[self._heard - 1]


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Group:
    """The ranks, and a cache of their own."""
    made = Group()
    monkeypatch.setattr("vllm.distributed.parallel_state.get_tp_group", lambda: made)
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(tmp_path))
    return made


class Manager(VerificationManager):
    """As far as a start-up goes."""

    def __init__(self, made: StepCosts, source: ProfileSource | None) -> None:
        self.costs, self.source = made, source
        self.head_line = lambda: (0.0, 0.0)
        self.draw_at = lambda depth: None
        self._profiles = True

    compact_batch = reallocate_drafts = _decide = _drawn = None  # type: ignore[assignment]  # no step is run


def start(source: ProfileSource | None) -> tuple[StepCosts, int]:
    """Costs of an engine that has started, and how many steps it had to run for them."""
    manager = Manager(costs(), source)
    batches = list(manager.batches_to_profile(CAPTURED))
    manager.set_initial_cost_curves([timed(batch) for batch in batches])
    assert manager.costs is not None
    return manager.costs, len(batches)


def curve(made: StepCosts) -> list[float]:
    return made.budget_curve(4, 4, 400, 4, 2, 20).tolist()


def test_second_start_runs_nothing(group: Group) -> None:
    first, ran = start(ProfileSource("auto", KEY))
    assert ran > 10
    group.become(0)
    second, ran_again = start(ProfileSource("auto", KEY))
    assert ran_again == 0
    assert second.profiled
    assert curve(second) == curve(first)


def test_ranks_go_by_what_the_first_one_found(group: Group, tmp_path: Path) -> None:
    """Also where a rank on another machine has a cache of its own, or none."""
    start(ProfileSource("auto", KEY))
    group.become(0)
    first, _ = start(ProfileSource("auto", KEY))
    group.become(1)
    os.environ["DSPARK_CACHE_DIR"] = str(tmp_path / "elsewhere")
    second, ran = start(ProfileSource("auto", KEY))
    assert ran == 0
    assert curve(second) == curve(first)
    assert not (tmp_path / "elsewhere").exists()


def test_ranks_profile_together_where_the_first_one_found_nothing(
    group: Group, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    os.environ["DSPARK_CACHE_DIR"] = str(other)
    start(ProfileSource("auto", KEY))
    os.environ["DSPARK_CACHE_DIR"] = str(tmp_path)
    group.become(0)
    _, ran = start(ProfileSource("auto", KEY))
    group.become(1)
    os.environ["DSPARK_CACHE_DIR"] = str(other)
    assert start(ProfileSource("auto", KEY))[1] == ran > 0


@pytest.mark.parametrize("reason", ["always", "graphs", "key", "data parallel"])
def test_what_was_kept_is_not_taken(group: Group, reason: str) -> None:
    start(ProfileSource("auto", KEY))
    group.become(0)
    source = {
        "always": ProfileSource("always", KEY),
        "graphs": ProfileSource("auto", KEY),
        "key": ProfileSource("auto", KEY | {"device": "H100"}),
        "data parallel": ProfileSource("auto", KEY, engines=2),
    }[reason]
    captured = CAPTURED[:-1] if reason == "graphs" else CAPTURED
    assert not source.settle(costs(), captured)


def test_skipping_is_a_guess(group: Group, tmp_path: Path) -> None:
    made, ran = start(ProfileSource("skip", KEY))
    assert ran == 0
    assert not made.profiled
    assert curve(made) == curve(costs())
    assert not list(tmp_path.rglob("*.json"))


def test_a_manager_without_a_source_profiles(group: Group, tmp_path: Path) -> None:
    made, ran = start(None)
    assert ran > 10
    assert made.profiled
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("text", ["", "{}", "null", "\x00\xff"])
def test_damage_counts_as_none_and_is_repaired(group: Group, tmp_path: Path, text: str) -> None:
    start(ProfileSource("auto", KEY))
    (path,) = tmp_path.rglob("*.json")
    path.write_text(text, encoding="latin-1")
    group.become(0)
    assert start(ProfileSource("auto", KEY))[1] > 0
    assert json.loads(path.read_text())["key"]["target"] == "abc"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # no part is left behind


def test_another_key_in_the_file_is_named(tmp_path: Path) -> None:
    """A file that was copied under another's name."""
    one, other = CostCache(tmp_path, KEY), CostCache(tmp_path, KEY | {"device": "H100"})
    assert one.write(profiled().model) == ""
    other.path.write_text(one.path.read_text())
    text, why = other.read()
    assert text is None
    assert "'device'" in why
    assert str(other.path) in why


def test_a_folder_that_cannot_be_written_is_no_error(group: Group, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    os.environ["DSPARK_CACHE_DIR"] = str(blocked)
    assert "cannot be written" in CostCache(cache_folder(), KEY).write(profiled().model)
    assert start(ProfileSource("auto", KEY))[0].profiled


def test_where_profiles_are_kept() -> None:
    home = Path.home() / ".cache" / "vllm-dspark" / "costs"
    assert cache_folder({}) == home
    assert cache_folder({"XDG_CACHE_HOME": "/x"}) == Path("/x/vllm-dspark/costs")
    assert cache_folder({"XDG_CACHE_HOME": "/x", "DSPARK_CACHE_DIR": "/d"}) == Path("/d/costs")
    assert cache_folder({"XDG_CACHE_HOME": "", "DSPARK_CACHE_DIR": ""}) == home


def runner(**changes: Any) -> Any:
    """A model runner, as far as the key reads it."""

    def shape(**more: Any) -> Any:
        return SimpleNamespace(to_dict=lambda: {"hidden_size": 64, "_name_or_path": "x"} | more)

    options = SimpleNamespace
    backend = SimpleNamespace(get_name=lambda: changes.get("attention", "FLASH_ATTN"))
    config = options(
        model_config=options(
            hf_config=shape(**changes.get("target", {})), dtype=changes.get("dtype", "bfloat16"),
            quantization=None, max_model_len=changes.get("max_model_len", 1024),
        ),
        speculative_config=options(
            draft_model_config=options(hf_config=shape(**changes.get("drafter", {}))),
            num_speculative_tokens=GAMMA, draft_sample_method="greedy",
        ),
        parallel_config=options(
            tensor_parallel_size=changes.get("tp", 1), pipeline_parallel_size=1,
            data_parallel_size=1,
        ),
        cache_config=options(cache_dtype=changes.get("kv", "auto"), block_size=16),
        scheduler_config=options(max_num_seqs=8, max_num_batched_tokens=100),
        compilation_config=options(mode=0, cudagraph_mode="FULL"), lora_config=None,
    )  # fmt: skip
    return options(
        vllm_config=config,
        device=options(type="cpu"),
        attn_groups=[[options(backend=backend)]],
    )


def test_key_tells_engines_apart() -> None:
    def key(mode: str = "device", config: dict[str, Any] | None = None, **changes: Any) -> Any:
        return profile_key(runner(**changes), DSparkConfig(**config or {}), mode)

    plain = key()
    assert key(target={"_name_or_path": "moved"}) == plain
    different = [
        key(target={"hidden_size": 128}), key(drafter={"layers": 5}), key(dtype="float16"),
        key(tp=2), key(kv="fp8"), key(attention="TRITON_ATTN"), key(max_model_len=2048),
        key(mode="host"), key(config={"profile_context": 4096}), key(config={"depth": 2}),
    ]  # fmt: skip
    assert all(other != plain for other in different)
    assert all(isinstance(value, str) for value in plain.values())
    assert "profile" not in plain  # how it came about says nothing of what it holds for
