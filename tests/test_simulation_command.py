"""`vllm-dspark simulate`, as a person calls it."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.simulations import cost_model
from tests.test_simulation_validation import made_up
from vllm_dspark.cli import app

FEW = ["--acceptance", "0.8,0.7,0.6", "--concurrency", "1,4", "--requests", "2", "--fixed", "2"]
FEW += ["--output", "20"]


def simulate(*arguments: str) -> tuple[int, str]:
    """Exit status and what was printed."""
    result = CliRunner().invoke(app, ["simulate", *arguments], env={"COLUMNS": "100"})
    return result.exit_code, result.output


def test_a_guess_needs_acceptance_only(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    code, text = simulate(*FEW, "--json", str(out))
    assert code == 0
    assert "a guess" in text
    for name in ("no speculation", "fixed 2", "built-in-like", "vllm-dspark"):
        assert text.count(name) == 2
    points = json.loads(out.read_text())["points"]
    assert [(p["policy"], p["concurrency"]) for p in points[3:5]] == [
        ("vllm-dspark", 1), ("no speculation", 4)
    ]  # fmt: skip
    assert all(p["tokens_per_second"] > 0 for p in points)


def test_arrivals_on_a_fleet() -> None:
    code, text = simulate(
        "--acceptance", "0.8,0.7", "--rate", "3", "--gpus", "1000", "--fixed", "1",
        "--output", "20", "--seconds", "5",
    )  # fmt: skip
    assert code == 0
    assert "1000 GPUs: 4 simulated behind a least-loaded router" in text
    assert "requests/s per GPU" in text


def test_a_profile_as_a_server_caches_it(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(cost_model().to_json({"vllm": "0.33.0", "device": "H200", "graphs": "1 2 4"}))
    code, text = simulate(*FEW, "--profile", str(path))
    assert code == 0
    assert "a profile, device H200, vllm 0.33.0" in text
    code, text = simulate("--acceptance", "0.8,0.7,0.6,0.5", "--profile", str(path))
    assert code == 1
    assert "the profile knows up to 3 drafts" in text


def test_a_sweep_is_fitted_or_validated(tmp_path: Path) -> None:
    path, out = tmp_path / "sweep.json", tmp_path / "rows.json"
    path.write_text(made_up())
    sweep = ["--sweep", str(path), "--prompt", "32"]
    few = ["--concurrency", "1", "--requests", "2", "--fixed", "4", "--max-num-seqs", "7"]
    code, text = simulate(*sweep, *few, "--json", str(out))
    assert code == 0
    assert json.loads(out.read_text())["max_num_seqs"] == 7
    assert "fitted to the sweep's no speculation, γ = 1, γ = 2, γ = 3, γ = 4" in text
    code, text = simulate(*sweep, "--validate", "--json", str(out))
    assert code == 0
    assert "predicted within 10%: fixed: 3 of 3. Fitted beyond it: 0" in text
    rows = json.loads(out.read_text())["rows"]
    assert {row["arm"] for row in rows if not row["fitted"]} == {"γ = 2"}


def test_what_a_sweep_lacks_is_said_with_its_name(tmp_path: Path) -> None:
    """No arm without speculation, none of a fixed γ, and one whose lengths contradict another's."""
    path = tmp_path / "sweep.json"

    def said(arms: dict[str, Any]) -> str:
        path.write_text(json.dumps({**json.loads(made_up()), "arms": arms}))
        code, text = simulate("--sweep", str(path), "--validate")
        assert code == 1
        assert text.startswith(f"--sweep {path}: ")
        assert "Fix:" in text
        return text

    arms = json.loads(made_up())["arms"]
    none = arms.pop("γ = 0")
    assert "it has no arm without speculation" in said(arms)
    assert "it has no arm of a fixed γ" in said({"none": none})
    for run in arms["γ = 4"]["runs"]:
        run["accepted_length"] = 1.5
    assert "accepted_lengths goes from 2" in said({"none": none, **arms})


def test_arms_of_a_longer_block_than_the_fixed_ones(tmp_path: Path) -> None:
    """They are predicted all the same, and what that rests on is said."""
    path = tmp_path / "sweep.json"
    data = json.loads(made_up())
    data["arms"]["ours"] = data["arms"].pop("γ = 4") | {"kind": "ours"}
    path.write_text(json.dumps(data))
    sweep = ["--sweep", str(path), "--prompt", "32"]
    for more in (["--validate"], ["--concurrency", "1", "--requests", "2", "--fixed", "4"]):
        code, text = simulate(*sweep, *more)
        assert code == 0, text
        assert "no fixed one beyond 3" in text
    code, text = simulate(*sweep, "--acceptance", "0.7,0.6,0.5", "--concurrency", "1")
    assert code == 0, text
    assert "beyond" not in text


def test_how_many_run_at_once(tmp_path: Path) -> None:
    """Given, or the sweep's, or 256; loads beyond it are told of."""
    path, costs, out = (tmp_path / f"{name}.json" for name in ("sweep", "costs", "plan"))
    data = json.loads(made_up())
    data["settings"]["max_num_seqs"] = 3
    path.write_text(json.dumps(data))
    costs.write_text(cost_model().to_json({}))
    sweep = ["--sweep", str(path), "--profile", str(costs)]
    given = ["--max-num-seqs", "2"]
    for more, most in (([], 256), (given, 2), (sweep, 3), ([*sweep, *given], 2)):
        code, text = simulate(*FEW, *more, "--json", str(out))
        assert code == 0, text
        kept = json.loads(out.read_text())
        assert kept["max_num_seqs"] == most
        waited = [p["first_token_ms"] for p in kept["points"] if p["policy"] == "no speculation"]
        assert (waited[1] > 2 * waited[0]) == (most < 4)
        assert (f"at 4 in flight no more than {most} run at once" in text) == (most < 4)


def test_loads_that_are_too_much_are_told() -> None:
    few = ["--acceptance", "0.8,0.7", "--fixed", "1", "--output", "20", "--seconds", "2"]
    code, text = simulate(*few, "--rate", "3,400", "--max-num-seqs", "4")
    assert code == 0
    assert "vllm-dspark *" in text
    assert "* does not keep up with 400 requests/s per GPU" in text
    assert "waiting, 4 running" in text
    assert "keep up with 3 " not in text


def test_outputs_are_refused_before_any_work(tmp_path: Path) -> None:
    """Nothing is simulated, not even the line about costs is printed."""
    (tmp_path / "file").touch()
    nowhere = str(tmp_path / "file" / "plan.png")
    for option, path in (("--json", nowhere), ("--json", str(tmp_path)), ("--plot", nowhere)):
        code, text = simulate(*FEW, option, path)
        assert code == 1
        assert text.startswith(f"{option} {path!r} cannot be written")
        assert "costs:" not in text


def test_a_seed_below_0_is_named() -> None:
    code, text = simulate(*FEW, "--seed", "-1")
    assert code == 2
    assert "--seed" in text


def test_without_numpy_it_says_what_to_install() -> None:
    """The package alone does not bring it: vLLM does."""
    program = (
        "import sys; sys.modules['numpy'] = None\n"
        "from vllm_dspark.cli import app; app(['simulate', '--acceptance', '0.8'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Fix: pip install numpy" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the bench extra")
    path = tmp_path / "plan.png"
    code, _ = simulate(*FEW, "--plot", str(path))
    assert code == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures come all the same, and the error says what to install."""
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    code, text = simulate(*FEW, "--plot", str(tmp_path / "plan.png"))
    assert code == 1
    assert "vllm-dspark" in text
    assert 'pip install "vllm-dspark[bench]"' in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing says what is accepted"),
        (["--acceptance", "0.8,high"], "no list of numbers"),
        (["--acceptance", "0.8", "--rate", "1", "--concurrency", "1"], "not both"),
        (["--acceptance", "0.8", "--validate"], "needs a sweep"),
        (["--acceptance", "1.5"], "--acceptance must lie above 0 and below 1, got 1.5"),
        (["--acceptance", "0.8", "--fixed", "2"], "--fixed must lie in 1..1, got 2"),
        (["--acceptance", "0.8", "--rate", "inf"], "--rate must lie above 0 and be finite"),
        (["--acceptance", "0.8", "--concurrency", "1.5"], "--concurrency must be whole, got 1.5"),
        (["--acceptance", "0.8", "--floor", "0"], "--floor must be above 0"),
        (["--acceptance", "0.8", "--overconfidence", "inf"], "--overconfidence must be a finite"),
        (["--sweep", "any.json", "--launch-ms", "5"], "--launch-ms would do nothing"),
        (["--sweep", "any.json", "--validate", "--rate", "5"], "has no use for --rate. Fix"),
        (["--acceptance", "0.8", "--profile", "nowhere.json"], "cannot read nowhere.json"),
        (["--sweep", "nowhere.json"], "cannot read nowhere.json"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: list[str], said: str) -> None:
    code, text = simulate(*arguments)
    assert code == 1
    assert said in text


def test_a_temperature_of_the_sweep_is_chosen(tmp_path: Path) -> None:
    """Greedy runs beside the others, in which every draft is accepted."""
    data = json.loads(made_up())
    for arm in data["arms"].values():
        length = 1.0 + (arm["gamma"] or 0)
        arm["runs"] += [r | {"temperature": 0.0, "accepted_length": length} for r in arm["runs"]]
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(data))
    few = ["--sweep", str(path), "--fixed", "1", "--concurrency", "1", "--requests", "1"]
    assert "acceptance: 1.00" not in simulate(*few)[1]
    assert "acceptance: 1.00 1.00" in simulate(*few, "--temperature", "0")[1]
    code, text = simulate(*few, "--temperature", "0.5")
    assert code == 1
    assert "no runs at temperature 0.5; it has some at: 0, 1" in text
