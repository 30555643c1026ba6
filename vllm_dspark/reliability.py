"""The reliability diagram of a calibration: what was predicted against what happened."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_dspark.outputs import replacing
from vllm_dspark.scheduler.survival import prefix_survival

BINS = 10
SUFFIXES = (".png", ".pdf", ".svg")  # what matplotlib draws without help
_STYLES = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "v"))


def points(
    predicted: npt.NDArray[np.float64], observed: npt.NDArray[np.bool_], bins: int = BINS
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean prediction and share that came true, in `bins` groups of as many rounds each, or in
    fewer where there are few rounds, from the lowest prediction to the highest.

    Args:
        predicted: [n], probabilities.
        observed: bool [n].
    """
    order = np.argsort(predicted, kind="stable")
    groups = [group for group in np.array_split(order, bins) if group.size]
    mean = np.array([predicted[group].mean() for group in groups])
    share = np.array([observed[group].mean() for group in groups])
    return mean, share


def draw(
    confidence: Mapping[str, npt.NDArray[np.float64]],
    accepted: npt.NDArray[np.int64],
    verified: npt.NDArray[np.int64],
    path: Path,
) -> None:
    """One panel a position: survival of the prefix up to it, against the share that survived.

    Args:
        confidence: up to four kinds by name, [N, γ] each, of rounds that were not fitted on.
        accepted, verified: int [N].
        path: file to write, of a suffix in `SUFFIXES`; it is there whole or not at all.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = {name: prefix_survival(values) for name, values in confidence.items()}
    gamma = next(iter(kinds.values())).shape[1]
    columns = min(gamma, 4)
    rows = -(-gamma // columns)
    figure = Figure(figsize=(2.7 * columns, 2.9 * rows + 0.4), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes: Any = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for k, axis in enumerate(axes):
        if k >= gamma:
            axis.axis("off")
            continue
        seen = verified > k
        axis.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=":")
        highest = 0.1
        for (label, survival), (color, marker) in zip(kinds.items(), _STYLES, strict=False):
            mean, share = points(survival[seen, k], accepted[seen] > k)
            axis.plot(mean, share, color=color, marker=marker, markersize=4, label=label)
            highest = max(highest, mean.max(initial=0.0), share.max(initial=0.0))
        limit = min(1.0, 1.05 * highest)  # deep drafts rarely survive: their panels are closer up
        axis.set(xlim=(0, limit), ylim=(0, limit), aspect="equal")
        axis.set_title(f"draft {k + 1}, {int(seen.sum())} rounds", fontsize=9)
        axis.tick_params(labelsize=8)
    figure.supxlabel("predicted survival", fontsize=10)
    figure.supylabel("share accepted", fontsize=10)
    axes[0].legend(fontsize=8, loc="upper left")
    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix[1:].lower())
