"""How honest the drafter's confidences are: as they are, with temperatures, and learned online.

    python -m benchmarks.calibration --target FOLDER --out FOLDER

The real engine verifies every draft. Temperatures are fitted on one half of the requests; all kinds
are judged on the other. The online calibrator goes through those rounds in the order in which they
ended, and each round is predicted before it is learned from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from benchmarks.engine_settings import require_dtype
from benchmarks.errors import plain_errors
from benchmarks.prompts import PYTHON_TEXT, load_prompts
from benchmarks.provenance import provenance
from benchmarks.records import write_record
from vllm_dspark import cpu, reliability
from vllm_dspark.calibrate import calibrate
from vllm_dspark.calibration.artifact import Sampling
from vllm_dspark.calibration.fitting import quality
from vllm_dspark.calibration.online import OnlineCalibrator
from vllm_dspark.calibration.sts import apply_temperatures
from vllm_dspark.drafters import find_drafter

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

app = typer.Typer(help=__doc__)


def predict_online(
    confidence: Floats,
    accepted: Ints,
    verified: Ints,
    request: Ints,
    *,
    sampled: bool,
    temperatures: npt.ArrayLike | None = None,
    together: int = 8,
) -> Floats:
    """What the online calibrator made of each round before it knew what became of it.

    Args:
        confidence: [N, γ], raw, in the order in which the rounds ended.
        accepted, verified, request: int [N].
        sampled: the requests had a temperature above 0.
        temperatures: [γ] to start from; None for 1.
        together: rounds of a step, which all end at once.

    Returns:
        float64 [N, γ].
    """
    calibrator = OnlineCalibrator(confidence.shape[1], temperatures)
    found = []
    for start in range(0, len(confidence), together):
        rows = slice(start, start + together)
        regime = np.full(len(confidence[rows]), sampled)
        found.append(calibrator.calibrate(confidence[rows], regime))
        calibrator.observe(
            confidence[rows], accepted[rows], verified[rows], regime, request=request[rows]
        )
    return np.concatenate(found)


def scores(confidence: Floats, accepted: Ints, verified: Ints) -> dict[str, list[float]]:
    """ECE and Brier score of the survival of each prefix, and ROC-AUC of each confidence among the
    rounds that got to it; [γ] each.

    Raises:
        ValueError: one is undefined, for want of rounds that were accepted, or that were not.
    """
    judged = quality(confidence, accepted, verified)
    columns = {
        "ece": judged.survival.ece,
        "brier": judged.survival.brier,
        "roc_auc": judged.confidence.roc_auc,
    }
    found: dict[str, list[float]] = {}
    for name, column in columns.items():
        found[name] = [value for value in column if value is not None]
        if len(found[name]) < len(column):
            raise ValueError(f"{name} is undefined at draft {column.index(None) + 1}")
    return found


def markdown(result: dict[str, Any]) -> str:
    """A row for each kind."""
    lines = [
        f"{result['pair']}, temperature {result['temperature']:g}: {result['rounds']} rounds of "
        f"{result['requests']} requests that were held out",
        "",
        "| confidence | ECE of survival, mean | per position | Brier | ROC-AUC |",
        "|---|---|---|---|---|",
    ]
    for name, kind in result["kinds"].items():
        each = " ".join(f"{value:.3f}" for value in kind["ece"])
        means = [float(np.mean(kind[column])) for column in ("ece", "brier", "roc_auc")]
        lines.append(f"| {name} | {means[0]:.3f} | {each} | {means[1]:.3f} | {means[2]:.3f} |")
    return "\n".join(lines) + "\n"


@app.command()
@plain_errors
def main(
    target: Annotated[Path, typer.Option(help="Folder of the target.")],
    out: Annotated[Path, typer.Option(help="Folder for JSON, table and diagram.")],
    drafter: Annotated[Path | None, typer.Option(help="Default: beside the target.")] = None,
    dataset: Annotated[str, typer.Option(help="See benchmarks/prompts.py.")] = PYTHON_TEXT,
    prompts: Annotated[int, typer.Option(min=2, help="Half of them are held out.")] = 96,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens a request.")] = 96,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 1.0,
    dtype: Annotated[
        str, typer.Option(help="Of weights and activations; on a CPU float32 alone.")
    ] = "float32",
) -> None:
    """Measure, and write `calibration.json`, `.md` and `.png`."""
    import torch

    has_gpu = torch.cuda.is_available()
    require_dtype(dtype, has_gpu)
    folder = Path(find_drafter(str(target), {})) if drafter is None else drafter
    options: dict[str, Any] = {"dtype": dtype, "max_model_len": 1024}
    if not has_gpu:
        cpu.activate()
        options = cpu.ENGINE_OPTIONS | options
    out.mkdir(parents=True, exist_ok=True)
    texts = load_prompts(dataset, str(target), prompts).texts
    sampling = Sampling(
        temperature=temperature, top_p=1.0, drafting="probabilistic" if temperature else "greedy"
    )
    artifact, rounds = calibrate(
        str(target), str(folder), texts, sampling, max_tokens, options, chat=False
    )
    held = rounds.held_out
    raw, accepted, verified = rounds.confidence[held], rounds.accepted[held], rounds.verified[held]
    request = rounds.request[held]
    kinds = {"raw": raw, "temperatures": apply_temperatures(raw, artifact.temperatures)}
    for name, start in (("online", None), ("temperatures, then online", artifact.temperatures)):
        kinds[name] = predict_online(
            raw, accepted, verified, request, sampled=temperature > 0, temperatures=start
        )
    try:
        judged = {name: scores(kind, accepted, verified) for name, kind in kinds.items()}
    except ValueError as error:
        raise typer.BadParameter(f"too few rounds to judge: {error}. Fix: --prompts") from None
    result = {
        "provenance": provenance(),
        "pair": target.name,
        "temperature": temperature,
        "dtype": artifact.dtype,
        "rounds": int(held.sum()),
        "requests": len(set(request.tolist())),
        "temperatures": list(artifact.temperatures),
        "kinds": judged,
    }
    write_record(out, "calibration", result, markdown(result))
    reliability.draw(kinds, accepted, verified, out / "calibration.png")


if __name__ == "__main__":
    app()
