"""What an engine has on a machine with a GPU and without: the record says what runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import calibration, candidates, measuring, sweep
from benchmarks.arms import ArmSpec
from benchmarks.engine_options import engine_options
from benchmarks.engine_settings import ON_A_CPU, EngineSettings, fixed_settings, settle
from benchmarks.prompts import PromptSet
from benchmarks.results_format import Sweep, load
from tests.commands import refused
from tests.engine import MICRO
from vllm_dspark import cpu

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
USUAL = EngineSettings((1, 64), 64, "bfloat16", 16.0, "vllm")
PAIR = ["--target", str(MICRO), "--drafter", str(MICRO / "dspark-vanilla")]


def test_what_nobody_asked_for_is_the_machines() -> None:
    """And what was asked for stays; loads that do not fit are not among the defaults."""
    assert settle(USUAL, True) == USUAL
    assert settle(USUAL, False) == ON_A_CPU
    assert settle(USUAL, False, max_num_seqs=4).loads == (1, 4)
    asked = {"loads": [2], "max_num_seqs": 2, "kv_cache_gib": 0.5, "dtype": "float32"}
    for has_gpu, graphs in ((True, "vllm"), (False, "none")):
        settled = settle(USUAL, has_gpu, **asked)  # type: ignore[arg-type]  # mixed values
        assert settled == EngineSettings((2,), 2, "float32", 0.5, graphs)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"dtype": "bfloat16"}, "found dtype bfloat16, needed is float32"),
        ({"max_num_seqs": 9}, "found 9 requests in a step, needed are 8 at most"),
        ({"loads": [1, 16]}, "found concurrency 16, needed is 8 at most"),
        ({"graphs": "vllm"}, "found graphs 'vllm', needed is none"),
    ],
)
def test_what_a_cpu_cannot_keep_is_refused(asked: dict[str, Any], complaint: str) -> None:
    """With a GPU each of them is kept."""
    with pytest.raises(typer.BadParameter, match=complaint):
        settle(USUAL, False, **asked)
    settle(USUAL, True, **asked)


def test_all_that_cannot_be_kept_is_one_error() -> None:
    with pytest.raises(typer.BadParameter, match=r"bfloat16.*; .*16 requests.*no GPU here"):
        settle(USUAL, False, dtype="bfloat16", max_num_seqs=16)
    with pytest.raises(typer.BadParameter, match="needed is --max-num-seqs 128 or 64 at most"):
        settle(USUAL, True, loads=[128])
    with pytest.raises(typer.BadParameter, match="decode or breakable or vllm"):
        settle(USUAL, True, graphs="none")


def test_limits_are_those_of_the_engine_on_a_cpu() -> None:
    """Two tables of the same numbers."""
    engine = cpu.ENGINE_OPTIONS
    assert (ON_A_CPU.dtype, ON_A_CPU.max_num_seqs) == (engine["dtype"], engine["max_num_seqs"])


@pytest.mark.parametrize("wrong", [{"dtype": "bfloat16"}, {"max_num_seqs": 256}])
def test_options_replace_nothing(wrong: dict[str, Any]) -> None:
    """Whoever did not settle first is told so."""
    fields: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 8, "kv_cache_gib": 0.125}
    fields |= {"max_model_len": 64, "graph_tokens": 0, "gpu_share": 0.5, "seed": 0}
    arm = ArmSpec("none", "none")
    options = engine_options("t", arm, has_gpu=False, **fields)
    assert options["kv_cache_memory_bytes"] == 1 << 27
    with pytest.raises(ValueError, match="needed"):
        engine_options("t", arm, has_gpu=False, **fields | wrong)


class Captured:
    """In place of `OfflineRunner`: keeps the options and starts nothing."""

    def __init__(self, name: str, options: Any, *_: Any) -> None:
        self.options = options


def planned(
    monkeypatch: pytest.MonkeyPatch, words: list[str], has_gpu: bool, prompts: Any = None
) -> tuple[Sweep, dict[str, Any]]:
    """A sweep's record, and the options that its first arm would start with."""
    found: list[Any] = []

    def measure(plan: measuring.Plan, record: Sweep, out: Path) -> None:
        runner: Any = measuring.start(plan, next(iter(plan.arms.values())), record.settings)
        found.append((record, runner.options))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr("signal.signal", lambda *_: None)  # this process keeps its own
    monkeypatch.setattr(measuring, "OfflineRunner", Captured)
    monkeypatch.setattr(sweep, "measure", measure)
    made = PromptSet("python-text", ("a",)) if prompts is None else prompts
    monkeypatch.setattr(sweep, "load_prompts", lambda *_, **__: made)
    done = CliRunner().invoke(sweep.app, words)
    assert isinstance(done.exception, SystemExit | None), repr(done.exception)
    assert found, done.output
    return found[0]


@pytest.mark.parametrize("has_gpu", [False, True])
def test_a_sweep_records_what_runs(
    has_gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a command that asks for nothing."""
    record, options = planned(monkeypatch, [*PAIR, "--out", str(tmp_path / "x.json")], has_gpu)
    settings, extra = record.settings, record.settings.extra
    assert (settings.dtype, settings.max_num_seqs) == (options["dtype"], options["max_num_seqs"])
    assert float(str(extra["kv_cache_gib"])) * 2**30 == options["kv_cache_memory_bytes"]
    assert (extra["graphs"], extra["graph_tokens"]) == (("vllm", 2048) if has_gpu else ("none", 0))
    assert ("compilation_config" in options) == has_gpu
    assert settings.dtype == ("bfloat16" if has_gpu else "float32")


def test_a_sweep_refuses_what_it_would_not_run_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by itself; nothing is started or written."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sweep, "measure", pytest.fail)
    command = [*PAIR, "--out", tmp_path / "x.json"]
    for words in (["--dtype", "bfloat16"], ["--concurrencies", "16"], ["--max-num-seqs", "256"]):
        assert "There is no GPU here" in refused(sweep.app, [*command, *words], 2)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "graphs", "words"),
    [
        ("h200-8b", "decode", ["--kv-cache-gib", "10", "--length-spread", "0"]),
        ("h200-8b-mixed", "breakable", ["--kv-cache-gib", "8", "--min-prompts", "24"]),
    ],
)
def test_sweeps_of_old_go_on(
    name: str, graphs: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU, by the command on record; without one it is refused, and nothing is mixed in."""
    out = tmp_path / "sweep.json"
    shutil.copy(RESULTS / name / "sweep.json", out)
    before = load(out)
    prompts = SimpleNamespace(
        name="python-text", digest=before.settings.dataset_digest, texts=("a",)
    )
    command = ["--target", "tiny-python-8b", "--drafter", "dspark", "--out", str(out), *words]
    command += ["--arms", "no speculation", "--temperatures", "1", "--max-tokens", "128"]
    record, options = planned(monkeypatch, [*command, "--graphs", graphs], True, prompts)
    assert record.settings == before.settings
    assert options["max_num_seqs"] == 256
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needed is none" in refused(sweep.app, [*command, "--graphs", graphs], 2)
    assert "max_num_seqs 256 → 8" in refused(sweep.app, command, 2)
    assert load(out) == before


def test_benchmarks_of_one_load_refuse_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accepted lengths, and candidates: at more requests than were in a step."""
    assert fixed_settings(16, 2.0, True).kv_cache_gib == 2.0
    assert fixed_settings(8, 2.0, False).kv_cache_gib == ON_A_CPU.kv_cache_gib
    with pytest.raises(typer.BadParameter, match="found 16 requests in a step"):
        fixed_settings(16, 2.0, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = [*PAIR, "--out", tmp_path / "out"]
    assert "found 16 requests" in refused(candidates.app, [*command, "--concurrency", "16"], 2)
    assert "found dtype bfloat16" in refused(calibration.app, [*command, "--dtype", "bfloat16"], 2)
    assert not list(tmp_path.iterdir())


def test_files_of_a_sweep_are_compared_by_every_setting(tmp_path: Path) -> None:
    """Those of `extra` one by one, whether or not both files have them."""
    old = load(RESULTS / "h200-8b" / "sweep.json").settings
    new = load(RESULTS / "h200-8b-mixed" / "sweep.json").settings
    with pytest.raises(typer.BadParameter, match=r"spread None → 0\.5, graphs None → 'break"):
        sweep.require_same_settings(tmp_path, old.flat(), new.flat())
