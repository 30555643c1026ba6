"""A plan as a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_dspark.simulation.planning import BUILT_IN, NONE, OURS, Point
from vllm_dspark.simulation.tables import LOADS

# Colours of Okabe and Ito, which stay apart for colour-blind eyes.
_LOOKS: dict[str, dict[str, Any]] = {
    NONE: {"color": "#000000", "linestyle": ":"},
    BUILT_IN: {"color": "#009e73", "linestyle": "--"},
    OURS: {"color": "#d55e00", "linewidth": 2.5, "zorder": 10},
}


def draw(points: Sequence[Point], path: Path) -> None:
    """Throughput, speed for a user, verified drafts and depth against load.

    Args:
        points: of one kind of load, at least one.
        path: PNG to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 7.2), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    gpus = points[0].result.gpus
    panels: list[tuple[str, Callable[[Point], float]]] = [
        ("throughput, tok/s", lambda p: p.result.tokens_per_second * gpus),
        ("tok/s/user", lambda p: p.result.tokens_per_second_per_user),
        ("verified drafts per request and step", lambda p: p.result.verified_per_request),
        ("drafts per request and step", lambda p: p.result.drafted_per_request),
    ]
    names = list(dict.fromkeys(point.policy for point in points))
    loads = sorted({point.load for point in points})
    fixed = [name for name in names if name not in _LOOKS]
    shades = {n: colormaps["Blues"](0.35 + 0.6 * (i + 1) / len(fixed)) for i, n in enumerate(fixed)}
    axes: Any = figure.subplots(2, 2).ravel()
    for axis, (label, value) in zip(axes, panels, strict=True):
        for name in names:
            pairs = [(p.load, value(p)) for p in points if p.policy == name]
            known = [pair for pair in pairs if not math.isnan(pair[1])]
            look = _LOOKS.get(name) or {"color": shades[name]}
            if known:
                x, y = zip(*known, strict=True)
                axis.plot(x, y, label=name, marker="o", markersize=4, **look)
        axis.set(xlabel=LOADS[points[0].kind], ylabel=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(loads, [f"{load:g}" for load in loads])
        axis.set_ylim(bottom=0)
        axis.grid(color="#dddddd", linewidth=0.6)
    figure.suptitle(f"Simulated, {gpus} GPU{'s' if gpus > 1 else ''}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, metadata={"Software": None})
