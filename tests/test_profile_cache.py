"""Cost profiles on disk: an engine that was profiled once starts without."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.test_seams import GPU
from tests.test_seams import vllm as vllm
from tests.test_verification_costs import CAPTURED, GAMMA, costs, profiled, timed
from tests.vllm_sources import Sources
from vllm_dspark.config import DSparkConfig
from vllm_dspark.integration.cost_cache import CostCache, cache_folder
from vllm_dspark.integration.verification.costs import StepCosts
from vllm_dspark.integration.verification.manager import VerificationManager
from vllm_dspark.integration.verification.profile import ProfileSource, profile_key
from vllm_dspark.kernels.dispatch import VARIABLE

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


@pytest.mark.parametrize("reason", ["always", "graphs", "key", "shorter key", "data parallel"])
def test_what_was_kept_is_not_taken(group: Group, reason: str) -> None:
    start(ProfileSource("auto", KEY))
    group.become(0)
    source = {
        "always": ProfileSource("always", KEY),
        "graphs": ProfileSource("auto", KEY),
        "key": ProfileSource("auto", KEY | {"device": "H100"}),
        "shorter key": ProfileSource("auto", KEY | {"drawing": "triton"}),  # a newer version
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
    assert one.path is not None
    assert other.path is not None
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


def test_user_without_a_home_keeps_nothing(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that runs under a number which no account has. The engine starts all the same."""

    def unknown(number: int) -> Any:
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "DSPARK_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() is None
    cache = CostCache(None, KEY)
    assert cache.read() == (None, cache.write(profiled().model))
    assert "no home" in cache.read()[1]
    made, ran = start(ProfileSource("auto", KEY))
    assert made.profiled
    assert ran > 0


def runner(**changes: Any) -> Any:
    """A model runner, as far as the key reads it."""

    def shape(**more: Any) -> Any:
        return SimpleNamespace(to_dict=lambda: {"hidden_size": 64, "_name_or_path": "x"} | more)

    options = SimpleNamespace

    def groups(name: str) -> Any:
        backend = options(get_name=lambda: changes.get(name, "FLASH_ATTN"))
        return [[options(backend=backend)]]

    config = options(
        model_config=options(
            hf_config=shape(**changes.get("target", {})), dtype=changes.get("dtype", "bfloat16"),
            quantization=None, max_model_len=changes.get("max_model_len", 1024),
        ),
        speculative_config=options(
            draft_model_config=options(
                hf_config=shape(**changes.get("drafter", {})), dtype="bfloat16",
                quantization=changes.get("draft_quantization"),
            ),
            num_speculative_tokens=GAMMA, draft_sample_method="greedy",
            draft_tensor_parallel_size=changes.get("draft_tp", 1),
        ),
        parallel_config=options(
            tensor_parallel_size=changes.get("tp", 1), pipeline_parallel_size=1,
            data_parallel_size=1, prefill_context_parallel_size=1, decode_context_parallel_size=1,
            enable_expert_parallel=changes.get("experts", False),
        ),
        cache_config=options(cache_dtype=changes.get("kv", "auto"), block_size=16),
        scheduler_config=options(max_num_seqs=8, max_num_batched_tokens=100),
        compilation_config=options(mode=0, cudagraph_mode="FULL"),
        lora_config=changes.get("lora"),
    )  # fmt: skip
    return options(
        vllm_config=config,
        device=options(type="cpu"),
        attn_groups=groups("attention"),
        speculator=options(
            kernels=changes.get("kernels"),
            use_confidence_head=changes.get("confidence", True),
            peak_confidence=False,
            attn_groups=groups("draft_attention"),
            plan=options(varies=changes.get("varies", True), depths=(1, 2, 3)),
        ),
    )


def key(mode: str = "device", config: dict[str, Any] | None = None, **changes: Any) -> Any:
    return profile_key(runner(**changes), DSparkConfig(**config or {}), mode)


def test_key_tells_engines_apart() -> None:
    plain = key()
    assert key(target={"_name_or_path": "moved"}) == plain
    different = [
        key(target={"hidden_size": 128}), key(drafter={"layers": 5}), key(dtype="float16"),
        key(tp=2), key(kv="fp8"), key(attention="TRITON_ATTN"), key(max_model_len=2048),
        key(mode="host"), key(config={"profile_context": 4096}), key(config={"depth": 2}),
        key(draft_tp=2), key(draft_quantization="fp8"), key(draft_attention="FLEX"),
        key(experts=True), key(varies=False), key(confidence=False),
        *(key(lora=SimpleNamespace(max_loras=n, max_lora_rank=16)) for n in (1, 4)),
    ]  # fmt: skip
    assert len({json.dumps(other) for other in (plain, *different)}) == 1 + len(different)
    assert all(isinstance(value, str) for value in plain.values())
    assert "profile" not in plain  # how it came about says nothing of what it holds for


def test_key_tells_what_draws_verifies_and_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was chosen, by the configuration or by the environment."""
    monkeypatch.delenv(VARIABLE, raising=False)
    triton: dict[str, Any] = {"kernels": object()}
    found = [
        key(), key(**triton), key(config={"kernels": "reference"}),
        key(config={"kernels": "triton"}, **triton),
        *(key(config={"draft_candidates": count}, **triton) for count in (64, 256)),
    ]  # fmt: skip
    assert len({json.dumps(one) for one in found}) == len(found)
    # The variable is another way to ask for the same.
    monkeypatch.setenv(VARIABLE, "reference")
    assert key() == found[2]
    monkeypatch.setenv(VARIABLE, "triton")
    assert key(**triton) == found[3]


def test_key_tells_what_vllm_is_told_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernels it runs, not where it writes its log."""
    plain = key()
    monkeypatch.setenv("VLLM_LOGGING_PREFIX", "engine 3: ")
    assert key() == plain
    monkeypatch.setenv("VLLM_USE_DEEP_GEMM", "0")
    assert key() != plain


def test_what_the_key_reads_of_vllm(vllm: Sources) -> None:
    for target, names in (
        (
            "vllm.config.parallel:ParallelConfig",
            "prefill_context_parallel_size decode_context_parallel_size enable_expert_parallel",
        ),
        ("vllm.config.speculative:SpeculativeConfig", "draft_tensor_parallel_size"),
        ("vllm.config.lora:LoRAConfig", "max_loras max_lora_rank"),
        (f"{GPU}.spec_decode.dspark.speculator:DSparkSpeculator", "attn_groups"),
    ):
        assert set(names.split()) <= vllm.assigned(target)
    assert vllm.function("vllm.envs:compile_factors") is not None
