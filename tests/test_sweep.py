"""The sweep, run for real on the micro pair: two arms, two loads, JSON and pictures. No figure of
these runs means anything; what they check is the way from a command to a report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import typer

from benchmarks import measuring, sweep
from benchmarks.arms import (
    BUILT_IN,
    INTERVAL,
    NO_SPECULATION,
    NO_SPECULATION_INTERVAL,
    OURS,
    standard_arms,
)
from benchmarks.engine_options import engine_environment, engine_options
from benchmarks.engine_settings import GRAPHS
from benchmarks.lengths import output_lengths
from benchmarks.measuring import interleaved
from benchmarks.results_format import Cell, Sweep, SweepSettings, load
from benchmarks.runners import prompt_count, speculation, spread
from tests.engine import MICRO

LOADS, TOKENS = (1, 2), 12
COMMON = [
    "--target", str(MICRO), "--drafter", str(MICRO / "dspark-vanilla"), "--temperatures", "1",
    "--max-tokens", str(TOKENS), "--prompts-per-slot", "2", "--min-prompts", "3",
    "--max-num-seqs", "2", "--max-model-len", "256", "--dtype", "float32",
]  # fmt: skip


def command(out: Path, *words: str) -> list[str]:
    """A sweep's command line."""
    return [sys.executable, "-m", "benchmarks.sweep", "--out", str(out), *COMMON, *words]


def swept(out: Path, *words: str) -> str:
    """Run a sweep to its end, and return what it printed."""
    done = subprocess.run(command(out, *words), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(found: Sweep, names: tuple[str, ...], drafted: tuple[str, ...]) -> None:
    """Every run is there, is complete, and says of drafts what its arm can say."""
    assert not found.missing(names, LOADS, (1.0,), 1)
    for name in names:
        for run in found.arms[name].runs:
            assert run.prompts == max(3, 2 * run.concurrency)
            lengths = output_lengths(run.prompts, TOKENS, 0.5, 0)
            assert run.output_tokens == sum(lengths) < run.prompts * TOKENS
            assert run.tokens_per_second == pytest.approx(run.output_tokens / run.seconds, rel=0.01)
            assert run.time_per_output_token_ms.p50 <= run.time_per_output_token_ms.p99
            # On this machine it may be that no draft pays, or hardly any, at a load of ours.
            if name != OURS:
                assert (run.accepted_length is not None) == (name in drafted)
            assert (run.steps_by_depth is not None) == (name == OURS)
            if run.steps_by_depth is not None:
                assert {int(depth) for depth in run.steps_by_depth} <= set(range(8))
                assert sum(run.steps_by_depth.values()) >= max(lengths) / 8
            if run.accepted_length is not None:
                least = 0 if name == OURS else 1e-3
                assert 1 + least <= run.accepted_length <= 8
                assert run.verified_per_request is not None
                assert least <= run.verified_per_request <= 7


@pytest.mark.engine
def test_online_sweep_and_report(tmp_path: Path) -> None:
    """`vllm serve` under `vllm bench serve`, twice, then the pictures and the table."""
    out, names = tmp_path / "sweep.json", (NO_SPECULATION, OURS)
    loads = ",".join(map(str, LOADS))
    swept(out, "--mode", "online", "--arms", ",".join(names), "--concurrencies", loads)
    check(load(out), names, drafted=(OURS,))
    text = out.read_text()
    assert str(MICRO.parent) not in text
    assert str(tmp_path) not in text

    report = [sys.executable, "-m", "benchmarks.report", str(out), "--out", str(tmp_path / "r")]
    subprocess.run(report, check=True, capture_output=True, timeout=120)
    assert "vllm-dspark" in (tmp_path / "r" / "report.md").read_text()
    for picture in ("throughput", "frontier", "verified"):
        assert (tmp_path / "r" / "temperature-1" / f"{picture}.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.engine
def test_offline_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """The second command keeps what the first measured, starts nothing for it, and adds the rest;
    two arms are up at the same time. A third command has nothing left to do."""
    out, names = tmp_path / "sweep.json", ("fixed 2", OURS)
    arms = ("--arms", ",".join(names), "--together", "2")
    swept(out, *arms, "--concurrencies", "1")
    before = {name: arm.runs for name, arm in load(out).arms.items()}
    assert [len(runs) for runs in before.values()] == [1, 1]
    swept(out, *arms, "--concurrencies", "1,2")
    found = load(out)
    check(found, names, drafted=names)
    for name, runs in before.items():
        assert found.arms[name].runs[:1] == runs
    assert max(run.drafted_per_request or 0 for run in found.arms["fixed 2"].runs) <= 2
    assert "0 of 0 runs made" in swept(out, *arms, "--concurrencies", "1,2")
    assert load(out) == found


def words_of(process: psutil.Process) -> list[str]:
    """Its command line; none of one that has ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


@pytest.mark.engine
def test_interrupted_leaves_no_process_behind(tmp_path: Path) -> None:
    """Ctrl-C while an engine starts: exit code 1, what is missing is said, nothing lives on."""
    out = tmp_path / "sweep.json"
    words = ("--arms", NO_SPECULATION, "--concurrencies", "1")
    with subprocess.Popen(command(out, *words), stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        children: list[psutil.Process] = []
        # Not the short-lived ones of imports, which come before the sweep has begun.
        while not any("benchmarks.engine_child" in words_of(child) for child in children):
            assert time.monotonic() < deadline, "no engine was started"
            time.sleep(0.5)
            children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
        assert process.returncode == 1, printed
    assert f"missing: {NO_SPECULATION}, 1 at temperature 1 (#0)" in printed
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


@pytest.mark.engine
def test_a_failing_arm_is_on_record_and_the_others_go_on(tmp_path: Path) -> None:
    """A drafter of more tokens than the checkpoint has ends its arm with the engine's own words;
    a port in use ends it before anything starts."""
    out = tmp_path / "sweep.json"
    (tmp_path / "empty").mkdir()
    words = ["--arms", "fixed 3", "--concurrencies", "1", "--drafter", str(tmp_path / "empty")]
    done = subprocess.run(command(out, *words), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "missing: fixed 3" in done.stdout
    error = load(out).arms["fixed 3"].error
    assert error is not None
    assert "config.json" in error


def test_port_in_use_is_said(tmp_path: Path) -> None:
    """Before a server is started."""
    import socket

    out = tmp_path / "sweep.json"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        words = ["--mode", "online", "--arms", NO_SPECULATION, "--concurrencies", "1"]
        words += ["--port", port]
        done = subprocess.run(command(out, *words), capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert f"port {port} is in use" in (load(out).arms[NO_SPECULATION].error or "")


def settings(**changes: object) -> SweepSettings:
    """Some settings."""
    fields = {
        "mode": "offline", "target": "t", "drafter": "d", "dataset": "x", "drafting": "greedy",
        "dataset_digest": "0" * 64, "prompts_per_slot": 6, "min_prompts": 12, "max_tokens": 8,
        "max_model_len": 64, "max_num_seqs": 4, "dtype": "float32", "seed": 0,
    }  # fmt: skip
    return SweepSettings.model_validate(fields | changes)


def test_another_sweep_is_not_mixed_in(tmp_path: Path) -> None:
    """Other settings, and an arm that means something else by the same name."""
    out, arms = tmp_path / "sweep.json", standard_arms("d", "greedy")
    first = sweep.open_sweep(out, settings(), arms, 1)
    sweep.results_format.save(first, out)
    assert sweep.open_sweep(out, settings(), arms, 1) == first
    with pytest.raises(typer.BadParameter, match="max_tokens 8 → 9"):
        sweep.open_sweep(out, settings(max_tokens=9), arms, 1)
    with pytest.raises(typer.BadParameter, match="other options"):
        sweep.open_sweep(out, settings(), standard_arms("d", "probabilistic"), 1)


def test_arms_take_turns() -> None:
    """All arms meet a load one after another, forwards, then backwards."""
    cells = [Cell(arm, load, 0.0, 0) for arm in "ab" for load in (1, 2, 3)]
    order = [(cell.arm, cell.concurrency) for cell in interleaved(cells)]
    assert order == [("a", 1), ("b", 1), ("b", 2), ("a", 2), ("a", 3), ("b", 3)]


@pytest.mark.parametrize("failing", [None, "fixed 1"])
def test_arms_that_profile_costs_start_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: str | None
) -> None:
    """The others together, before them. One that does not start leaves the rest as they are."""
    happened: list[str] = []

    class Started:
        memory_gib = None

        def __init__(self, name: str) -> None:
            self.name = name
            happened.append(f"start {name}")

        def wait(self) -> float:
            if self.name == failing:
                raise RuntimeError("no memory")
            happened.append(f"up {self.name}")
            return 1.0

        def stop(self) -> None:
            happened.append(f"stop {self.name}")

    monkeypatch.setattr(measuring, "start", lambda plan, arm, settings: Started(arm.name))
    names = ["no speculation", OURS, "fixed 1", BUILT_IN]
    every = standard_arms("d", "greedy")
    arms = {name: every[name] for name in names}
    found = sweep.open_sweep(tmp_path / "s.json", settings(), arms, 4)
    plan: Any = SimpleNamespace(arms=arms)
    with measuring.running(plan, names, found, tmp_path / "s.json") as runners:
        happened.append("run")
        assert set(runners) == {name for name in names if name != failing}
    early = ["start no speculation", "start fixed 1", "up no speculation"]
    early.append("up fixed 1" if failing is None else "stop fixed 1")
    late = [f"{what} {name}" for name in (OURS, BUILT_IN) for what in ("start", "up")]
    assert happened[: happened.index("run")] == early + late
    assert {f"stop {name}" for name in names} <= set(happened)
    assert found.arms["fixed 1"].error == (None if failing is None else "no memory")


def test_counters_to_figures() -> None:
    """Per step of a request, steps without drafts among them: 45 tokens of which 25 were accepted
    drafts are 20 steps, 10 of which had drafts. Trimmed arms go by what the manager verified."""
    vllm = {f"vllm:spec_decode_num_{n}": v for n, v in
            (("drafts", 10.0), ("draft_tokens", 70.0), ("accepted_tokens", 25.0))}  # fmt: skip
    fixed = speculation(vllm, 45)
    assert fixed == {"accepted_length": 3.5, "verified_per_request": 3.5,
                     "drafted_per_request": 3.5, "skipped_per_request": 0.0}  # fmt: skip
    trimmed = speculation(vllm | {"rounds": 10.0, "verified": 24.0}, 45)
    assert trimmed["verified_per_request"] == 1.2
    assert trimmed["skipped_per_request"] == 2.3
    assert speculation({"vllm:spec_decode_num_drafts": 0.0}, 45) == {}


def test_spread_of_times() -> None:
    """Mean, median and 99th percentile, of times that set the three apart. Catches a column that
    shows another one's figure."""
    times = spread([float(ms) for ms in range(100)] + [1110.0])
    assert (times.mean, times.p50, times.p99) == (60.0, 50.0, 99.0)


def test_every_arm_but_ours_has_the_plugin_off() -> None:
    """A peer that our plugin serves would be no peer."""
    arms = standard_arms("d", "greedy")
    assert [a.name for a in arms.values() if a.speculative and not a.additional] == [OURS]
    assert arms[NO_SPECULATION].speculative is None
    assert len({json.dumps(arm.options()) for arm in arms.values()}) == len(arms) == 10


def test_the_interval_of_prefills_is_that_arms_own() -> None:
    """It reaches the engine of the one, the record of the one, and none of the others."""
    for arm in standard_arms("d", "greedy").values():
        given = engine_options(
            "t", arm, has_gpu=True, dtype="bfloat16", max_model_len=64, max_num_seqs=4,
            graph_tokens=32, kv_cache_gib=1.0, gpu_share=0.5, seed=0,
        ).get("prefill_schedule_interval")  # fmt: skip
        expected = INTERVAL if arm.name == NO_SPECULATION_INTERVAL else None
        assert given == expected == arm.options().get("engine", {}).get("prefill_schedule_interval")


def test_variants_of_ours_are_checked_and_told_apart() -> None:
    """Options that the engine would refuse are refused before one starts."""
    variants = sweep._variants(['host={"verification_mode": "host"}'])
    arm = standard_arms("d", "greedy", variants=variants)["host"]
    assert arm.kind == "ours"
    assert arm.additional == {"dspark": {"verification_mode": "host"}}
    for wrong in ("host", "host={", "host=[1]", 'host={"verification_mod": "host"}'):
        with pytest.raises(typer.BadParameter, match="is no NAME=JSON"):
            sweep._variants([wrong])


def test_prompt_count() -> None:
    """Six a slot, but never fewer than the least."""
    assert [prompt_count(settings(), c) for c in (1, 2, 256)] == [12, 12, 1536]


def test_environment_has_no_secret_of_this_process() -> None:
    """Options on record hold what the arm sets, not the environment."""
    assert "PATH" in os.environ
    assert standard_arms("d", "greedy")[OURS].options()["env"] == {}


def test_published_targets_find_their_drafter_and_others_say_what_is_missing(
    tmp_path: Path,
) -> None:
    """The hub's names work without --drafter; a target without a known drafter ends before an
    engine starts, and before prompts are made."""
    words = ["--target", "somebody/model", "--out", str(tmp_path / "x.json")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sweep", *words], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "no drafter is known" in done.stderr
    assert sweep.find_drafter("Qwen/Qwen3-8B", {}) == "deepseek-ai/dspark_qwen3_8b_block7"


def test_graphs_are_left_to_vllm_where_that_is_asked_for() -> None:
    """Sizes are the same; the rest is vLLM's."""
    arm = standard_arms("d", "greedy")[OURS]
    fields: dict[str, Any] = {
        "has_gpu": True,
        "dtype": "bfloat16",
        "max_model_len": 64,
        "max_num_seqs": 4,
    }
    fields |= {"graph_tokens": 32, "kv_cache_gib": 1.0, "gpu_share": 0.5, "seed": 0}
    found = {
        graphs: engine_options("t", arm, **fields, graphs=graphs)["compilation_config"]
        for graphs in GRAPHS
    }
    assert found["decode"]["mode"] == found["breakable"]["mode"] == 0
    assert set(found["vllm"]) == {"cudagraph_capture_sizes"}
    assert len({tuple(options["cudagraph_capture_sizes"]) for options in found.values()}) == 1
    breakable = [
        graphs
        for graphs in GRAPHS
        if "VLLM_USE_BREAKABLE_CUDAGRAPH" in engine_environment(arm, True, graphs)
    ]
    assert breakable == ["breakable"]
