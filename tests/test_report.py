"""The report: ratios by hand, what it says about missing runs, and pictures that are pictures."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from benchmarks.comparison import Comparison, choose_ours, geometric_mean
from benchmarks.figures import DPI, NARROW, WIDE, draw, footnote
from benchmarks.report import app, write_report
from benchmarks.results_format import Sweep, save
from tests.sweeps import PROVENANCE, arm, run, sweep, tiny

COMMAND = "python -m benchmarks.report sweep.json --out report"


def report(some: Sweep, folder: Path, ours: str | None = "vllm-dspark") -> str:
    return write_report(some, folder, ours, COMMAND).read_text(encoding="utf-8")


def cells(text: str, heading: str, row: str) -> list[str]:
    """The cells of one row of the table under a heading, its first cell left out."""
    lines = text.split(heading, 1)[1].splitlines()
    line = next(line for line in lines if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def incomplete() -> Sweep:
    """`tiny` without fixed 7 at 4, which would not have been the best, and one repeat short."""
    some = tiny()
    some.arms["fixed 7"].runs.pop()
    some.arms["fixed 7"].error = "out of memory"
    some.arms["fixed 1"].runs.append(run(1, 150, repeat=1))
    return some


def test_ratios_by_hand(tmp_path: Path) -> None:
    """330 / 300, 500 / 450 and so on; ours stands last, the best of a row is bold, the other is
    named where it is one of several."""
    text = report(tiny(), tmp_path)
    assert cells(text, "### Throughput", "concurrency") == [
        "no speculation", "fixed 1", "fixed 7", "built-in adaptive", "vllm-dspark",
        "vllm-dspark / best other", "vllm-dspark / no speculation",
        "vllm-dspark / best built-in adaptive",
    ]  # fmt: skip
    assert cells(text, "### Throughput", "1") == [
        "100", "150", "300", "280", "**330**", "1.100 (fixed 7)", "3.300", "1.179",
    ]  # fmt: skip
    assert cells(text, "### Throughput", "4") == [
        "400", "450", "420", "360", "**500**", "1.111 (fixed 1)", "1.250", "1.389",
    ]  # fmt: skip
    assert cells(text, "### Throughput", "geometric mean") == [
        "200", "260", "355", "317", "406", "1.106", "2.031", "1.279",
    ]  # fmt: skip
    assert "Missing" not in text
    assert r"\*" not in text


def test_bold_is_the_best_and_not_ours(tmp_path: Path) -> None:
    """A report that always favours our arm."""
    some = tiny()
    some.arms["fixed 1"].runs[1].tokens_per_second = 625.0
    row = cells(report(some, tmp_path), "### Throughput", "4")
    assert row[1] == "**625**"
    assert row[4:6] == ["500", "0.800 (fixed 1)"]


def test_incomplete_data_says_what_is_missing(tmp_path: Path) -> None:
    """A dash in the cell, a star at every ratio to the "best" of that row and at their mean, no
    bold, and a list with the reason. The ratio to no speculation lacks nothing."""
    text = report(incomplete(), tmp_path)
    assert cells(text, "### Throughput", "4") == [
        "400", "450", "–", "360", "500", r"1.111\* (fixed 1)", "1.250", "1.389",
    ]  # fmt: skip
    assert cells(text, "### Throughput", "geometric mean")[2:] == [
        "–", "317", "406", r"1.106\*", "2.031", "1.279",
    ]  # fmt: skip
    assert cells(text, "### Throughput", "1")[4:6] == ["**330**", "1.100 (fixed 7)"]
    listed = text.split("Missing:\n\n")[1].split("\n\n")[0].splitlines()
    assert "- fixed 7: concurrency 1 (repeat 1), 4; out of memory" in listed
    assert "- fixed 1: concurrency 4 (repeat 1)" in listed
    assert len(listed) == len(incomplete().arms)


def test_our_own_gap(tmp_path: Path) -> None:
    """Where ours was not measured there is no ratio, and the mean is over fewer, so starred."""
    some = tiny()
    some.arms["vllm-dspark"].runs.pop()
    text = report(some, tmp_path)
    assert cells(text, "### Throughput", "4")[4:] == ["–", "–", "–", "–"]
    assert cells(text, "### Throughput", "geometric mean")[5:] == [
        r"1.100\*", r"3.300\*", r"1.179\*"
    ]  # fmt: skip


def test_matched_tables(tmp_path: Path) -> None:
    """Fixed 1 goes from 150 to 112.5 tok/s/user, ours from 330 to 125. At 330 tok/s, ours at 1,
    fixed 1 is at 150 - 37.5 · 180 / 300 = 127.5; at 450, fixed 1 at 4, ours is at
    330 - 205 · 120 / 170 = 185.3."""
    text = report(tiny(), tmp_path)
    heading = "### tok/s/user at matched throughput"
    assert cells(text, heading, "330") == ["1 of vllm-dspark", "128", "330", "2.588"]
    assert cells(text, heading, "450") == ["4 of fixed 1", "112", "185", "1.647"]
    heading = "### Throughput at matched tok/s/user"
    assert cells(text, heading, "125") == ["4 of vllm-dspark", "350", "500", "1.429"]


def test_without_our_arm_or_without_gamma_one(tmp_path: Path) -> None:
    """A sweep of the others alone is reported, with no ratios instead of made-up ones."""
    some = tiny()
    del some.arms["vllm-dspark"], some.arms["fixed 1"]
    text = report(some, tmp_path, ours=None)
    assert cells(text, "### Throughput", "1") == ["100", "**300**", "280"]
    assert "so no ratios" in text
    assert "It takes our arm and one with a fixed γ of 1." in text
    assert "at matched tok/s/user" not in text


def test_text_and_pictures_are_deterministic(tmp_path: Path) -> None:
    """The same data gives the same bytes, so that a diff of results shows results."""
    for name in ("a", "b"):
        report(incomplete(), tmp_path / name)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 4
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("some", [tiny(), incomplete()], ids=["complete", "incomplete"])
def test_pictures(tmp_path: Path, some: Sweep) -> None:
    """PNGs of the stated size, linked from the text, in which every arm's colour is to be seen and
    ours covers most: an empty canvas, or ours thin or underneath, would not pass."""
    text = report(some, tmp_path)
    for stem, (width, height) in {
        "throughput": WIDE,
        "frontier": NARROW,
        "verified": NARROW,
    }.items():
        path = tmp_path / "temperature-1" / f"{stem}.png"
        assert f"](temperature-1/{stem}.png)" in text
        head = path.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", head[16:]) == (round(width * DPI), round(height * DPI))
        pixels = np.rint(imread(path)[..., :3] * 255).astype(int)
        ours = (pixels == (0xD5, 0x5E, 0x00)).all(axis=-1).sum()
        built_in = (pixels == (0x00, 0x9E, 0x73)).all(axis=-1).sum()
        assert ours > built_in > 0, stem


def test_picture_without_data_is_left_out(tmp_path: Path) -> None:
    """No arm says what it verified: no empty picture, no link, and no old picture either."""
    some = sweep({"no speculation": arm("none", None, run(1, 100))})
    old = tmp_path / "temperature-1" / "verified.png"
    report(tiny(), tmp_path)
    assert old.exists()
    text = report(some, tmp_path, ours=None)
    assert not old.exists()
    assert "verified.png" not in text
    assert set(draw(Comparison(some, 1.0, None), tmp_path)) == {"throughput", "frontier"}


def test_footnote_says_what_it_ran_on_and_what_is_missing() -> None:
    """Device, vLLM, shape, date; and which concurrencies must not be read as complete."""
    line = footnote(Comparison(tiny(), 1.0, "vllm-dspark"))
    for word in ("NVIDIA H200", "vLLM 0.33.0", "Qwen/Qwen3-8B", "bfloat16", "2025-11-20"):
        assert word in line
    assert "*" not in line
    starred = footnote(Comparison(incomplete(), 1.0, "vllm-dspark"))
    assert "* concurrency 4: not every arm was measured" in starred


def test_temperatures_are_kept_apart(tmp_path: Path) -> None:
    """One section and folder each; a run of one temperature is not missing from the other."""
    some = tiny()
    some.arms["fixed 1"].runs.append(run(16, 700, temperature=0.0))
    text = report(some, tmp_path)
    greedy, sampled = text.split("## Temperature 0\n")[1].split("## Temperature 1\n")
    assert cells(greedy, "### Throughput", "16")[:2] == ["–", "700"]
    assert "| 16 |" not in sampled
    assert "Missing" not in sampled
    assert (tmp_path / "temperature-0" / "throughput.png").exists()


def test_different_machines_are_called_out(tmp_path: Path) -> None:
    """One file may hold arms of two GPUs; their ratios must not pass as results."""
    some = tiny()
    assert "different machines" not in report(some, tmp_path)
    some.arms["fixed 1"].provenance = {**PROVENANCE, "gpu": "NVIDIA H100"}
    assert "**The arms ran on different machines" in report(some, tmp_path)


def test_command(tmp_path: Path) -> None:
    """Several files become one report, which holds the commands without folders of this machine."""
    whole = tiny()
    parts = []
    for i, names in enumerate((["no speculation", "fixed 1"], ["vllm-dspark"])):
        parts.append(tmp_path / f"part-{i}.json")
        save(whole.model_copy(update={"arms": {n: whole.arms[n] for n in names}}), parts[-1])
    out = tmp_path / "report"
    done = CliRunner().invoke(app, [*map(str, parts), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "0 runs missing" in done.output
    text = (out / "report.md").read_text(encoding="utf-8")
    assert cells(text, "### Throughput", "1")[:3] == ["100", "150", "**330**"]
    assert "python -m benchmarks.sweep --out sweep.json\n" in text
    assert "python -m benchmarks.report part-0.json part-1.json --out report\n" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("{}", "is no sweep"), (sweep({}).model_dump_json(), "no arm has any run"), (None, "No such")],
)
def test_command_refuses(tmp_path: Path, content: str | None, complaint: str) -> None:
    """A wrong file ends with one line, not with a trace and half a report."""
    path = tmp_path / "sweep.json"
    if content is not None:
        path.write_text(content)
    done = CliRunner().invoke(app, [str(path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert complaint in " ".join(done.output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_which_arm_is_ours() -> None:
    """Several arms of ours are never mixed silently, and none of them is another's rival."""
    some = tiny()
    assert choose_ours(some, None) == "vllm-dspark"
    some.arms["vllm-dspark, host"] = arm("ours", 7, run(1, 1000))
    with pytest.raises(ValueError, match="several arms"):
        choose_ours(some, None)
    with pytest.raises(ValueError, match="no arm 'fixed 1'"):
        choose_ours(some, "fixed 1")
    comparison = Comparison(some, 1.0, choose_ours(some, "vllm-dspark"))
    assert "vllm-dspark, host" not in comparison.rivals()
    assert list(comparison.arms)[-1] == "vllm-dspark"


def test_built_in_speculation_is_a_rival() -> None:
    """Ours is compared with the best of all others, vLLM's own adaptive one included. Catches
    rivals that are fixed arms alone, over which ours looks better than it is."""
    some = tiny()
    some.arms["built-in adaptive"].runs[0].tokens_per_second = 400.0
    comparison = Comparison(some, 1.0, "vllm-dspark")
    found = comparison.ratio(1, comparison.rivals())
    assert found is not None
    assert (found.value, found.other) == (pytest.approx(330 / 400), "built-in adaptive")


def test_geometric_mean() -> None:
    """2 and 8 make 4, not 5; nothing makes nothing."""
    assert geometric_mean([2, 8]) == pytest.approx(4)
    with pytest.raises(ValueError, match="no values"):
        geometric_mean([])
