"""The three pictures of a comparison, drawn without a display."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.comparison import Comparison
from benchmarks.frontier import curve
from benchmarks.results_merge import machines

DPI = 150
WIDE = (9.2, 5.6)  # inches
NARROW = (7.6, 5.6)
LEGEND_COLUMNS = 3

# Colours of Okabe and Ito, which stay apart for colour-blind eyes. Fixed γ share one hue, darker
# the longer the draft; markers and dashes tell all arms apart in grey.
_OURS = ("#d55e00", "#e69f00")
_BUILT_IN = ("#009e73", "#cc79a7", "#f0e442")
_NONE = ("#000000", "#777777")
_MARKERS = "sD^vPXph<>d"

Pairs = Sequence[tuple[float, float]]


def draw(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Write `throughput.png`, `frontier.png` and `verified.png`, by stem. A picture that there is
    no data for is left out, and one of an earlier report removed."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    makers = {"throughput": _throughput, "frontier": _frontier, "verified": _verified}
    for stem, make in makers.items():
        path = folder / f"{stem}.png"
        with matplotlib.rc_context():
            matplotlib.rcdefaults()  # a person's own matplotlibrc would change the picture
            matplotlib.rcParams.update({"font.size": 10, "axes.axisbelow": True})
            figure = make(comparison)
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            # Without the name of the software, the same data gives the same bytes.
            figure.savefig(path, dpi=DPI, metadata={"Software": None})
        written[stem] = path
    return written


def _throughput(comparison: Comparison) -> Figure | None:
    """tok/s, and beside it the same as a multiple of no speculation, which a logarithm hides."""
    base = next(iter(comparison.of_kind("none")), None)
    figure = _figure(WIDE if base else NARROW)
    left, *right = figure.subplots(1, 2 if base else 1, squeeze=False)[0]
    _lines(left, comparison, lambda arm, c: comparison.value(arm, c))
    _rate_axis(left)
    for axes in right:
        _lines(axes, comparison, lambda arm, c: _over(comparison, arm, base or "", c))
        axes.set_ylabel(f"throughput / {base}")
        axes.set_ylim(bottom=0)
    for axes in (left, *right):
        _concurrency_axis(axes, comparison)
    return _finish(figure, comparison, "Throughput")


def _over(comparison: Comparison, arm: str, base: str, concurrency: int) -> float | None:
    rate, unit = comparison.value(arm, concurrency), comparison.value(base, concurrency)
    return None if rate is None or unit is None else rate / unit


def _verified(comparison: Comparison) -> Figure | None:
    def value(arm: str, concurrency: int) -> float | None:
        return comparison.value(arm, concurrency, "verified_per_request")

    figure = _figure(NARROW)
    axes = figure.subplots()
    if not _lines(axes, comparison, value):
        return None
    axes.set_ylabel("verified drafts per request and step")
    axes.set_ylim(bottom=0)
    _concurrency_axis(axes, comparison)
    return _finish(figure, comparison, "Verified drafts")


def _frontier(comparison: Comparison) -> Figure | None:
    figure = _figure(NARROW)
    axes = figure.subplots()
    for name, look in _looks(comparison).items():
        pieces = curve(comparison.arms[name], comparison.temperature, comparison.concurrencies)
        _broken_line(axes, name, look, [[(p.per_user, p.throughput) for p in q] for q in pieces])
        if name == comparison.ours:
            for point in (point for piece in pieces for point in piece):
                axes.annotate(
                    _starred(comparison, point.concurrency), point[1:], xytext=(7, 6),
                    textcoords="offset points", color=look["color"], weight="bold", zorder=11,
                )  # fmt: skip
    _rate_axis(axes)
    axes.set_xlim(left=0)
    axes.set_xlabel("interactivity, tok/s/user" + _numbers_mean(comparison))
    return _finish(figure, comparison, "Throughput against interactivity")


def _numbers_mean(comparison: Comparison) -> str:
    return f"   (numbers: concurrency of {comparison.ours})" if comparison.ours else ""


def _looks(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """How each arm is drawn, by name; ours is thickest and on top."""
    blues = matplotlib.colormaps["Blues"]
    fixed = sorted(comparison.of_kind("fixed"), key=lambda name: comparison.arms[name].gamma or 0)
    shades = {name: blues(0.3 + 0.7 * (i + 1) / len(fixed)) for i, name in enumerate(fixed)}
    looks: dict[str, dict[str, Any]] = {}
    seen: dict[str, int] = {}
    for i, (name, arm) in enumerate(comparison.arms.items()):
        nth = seen[arm.kind] = seen.get(arm.kind, -1) + 1
        look = {"marker": _MARKERS[i % len(_MARKERS)], "markersize": 6, "linewidth": 1.4}
        look |= {"linestyle": "-", "zorder": 3, "markeredgecolor": "white", "markeredgewidth": 0.5}
        if arm.kind == "fixed":
            look |= {"color": shades[name]}
        elif arm.kind == "none":
            look |= {"color": _NONE[nth % len(_NONE)], "linestyle": ":"}
        elif arm.kind == "built-in adaptive":
            look |= {"color": _BUILT_IN[nth % len(_BUILT_IN)], "linestyle": "--", "zorder": 4}
        else:
            look |= {"color": _OURS[(nth + 1) % len(_OURS)], "linestyle": "-.", "zorder": 5}
        if name == comparison.ours:
            look |= {"color": _OURS[0], "linestyle": "-", "linewidth": 3, "zorder": 10}
            look |= {"marker": "o", "markersize": 8}
        looks[name] = look
    return looks


def _lines(axes: Axes, comparison: Comparison, value: Callable[[str, int], float | None]) -> bool:
    """Draw `value` of every arm against concurrency; whether there was any."""
    drawn = False
    for name, look in _looks(comparison).items():
        pieces: list[list[tuple[float, float]]] = [[]]
        for concurrency in comparison.concurrencies:
            found = value(name, concurrency)
            if found is None:
                pieces.append([])
            else:
                pieces[-1].append((concurrency, found))
        drawn |= _broken_line(axes, name, look, pieces)
    return drawn


def _broken_line(axes: Axes, name: str, look: dict[str, Any], pieces: Sequence[Pairs]) -> bool:
    """One arm, with a gap wherever it was not measured; whether anything was drawn."""
    gap = (float("nan"), float("nan"))
    points = [pair for piece in pieces if piece for pair in (*piece, gap)]
    if points:
        axes.plot(*zip(*points, strict=True), label=name, **look)
    return bool(points)


def _figure(size: tuple[float, float]) -> Figure:
    figure = Figure(figsize=size, dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def _concurrency_axis(axes: Axes, comparison: Comparison) -> None:
    """Ticks at the measured values, starred where some arm is missing."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(comparison.concurrencies))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([_starred(comparison, c) for c in comparison.concurrencies])
    axes.set_xlabel("concurrency, requests in flight")


def _starred(comparison: Comparison, concurrency: int) -> str:
    return f"{concurrency}" if comparison.complete(concurrency) else f"{concurrency}*"


def _rate_axis(axes: Axes) -> None:
    """tok/s upwards: logarithmic, unless that would leave hardly a tick."""
    axes.set_ylabel("throughput, tok/s")
    low, high = axes.dataLim.intervaly
    if high < 10 * low:
        axes.set_ylim(bottom=0)
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _finish(figure: Figure, comparison: Comparison, title: str) -> Figure:
    """Title, grid, legend under the axes, and the footnote that says what this ran on."""
    figure.suptitle(f"{title}, temperature {comparison.temperature:g}", weight="bold")
    for axes in figure.axes:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    # Legend and footnote are no part of the layout; their lines' heights, in inches, are.
    letters = int(16 * figure.get_figwidth())  # that fit into the footnote's line
    lines = footnote(comparison).splitlines()
    note = "\n".join(textwrap.fill(line, letters) for line in lines)
    handles, names = figure.axes[0].get_legend_handles_labels()
    below = 0.12 + 0.14 * len(note.splitlines())
    legend = 0.1 + 0.21 * -(-len(names) // LEGEND_COLUMNS)
    height = figure.get_figheight()
    bottom = (below + legend) / height
    figure.set_layout_engine("constrained", rect=(0, bottom, 1, 1 - bottom))
    figure.text(0.5, 0.06 / height, note, ha="center", va="bottom", fontsize=7.5, color="#555555")
    figure.legend(
        handles, names, loc="lower center", bbox_to_anchor=(0.5, below / height),
        ncols=LEGEND_COLUMNS, frameon=False, borderaxespad=0,
    )  # fmt: skip
    return figure


def footnote(comparison: Comparison) -> str:
    """Device, vLLM, shape and date of the runs; what a star means, if there is one."""
    settings = comparison.sweep.settings
    runs = [run for arm in comparison.arms.values() for run in arm.runs]
    dates = sorted({run.date for run in runs if run.temperature == comparison.temperature})
    words = [
        *machines(comparison.sweep),
        f"{settings.target}, {settings.dtype}",
        f"{settings.dataset}, at most {settings.max_tokens} tokens a request",
        " to ".join(dict.fromkeys((dates[0], dates[-1]))),
    ]
    line = " · ".join(words)
    partly = [f"{c}" for c in comparison.concurrencies if not comparison.complete(c)]
    if partly:
        line += (
            f"\n* concurrency {', '.join(partly)}: not every arm was measured, none is called best"
        )
    return line
