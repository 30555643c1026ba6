"""The prompts that a pair is calibrated on."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from vllm_dspark.calibrate_error import CalibrationError


def read_prompts(path: Path | None) -> list[str]:
    """Prompts from a file: JSON lines with `prompt` or `turns`, or plain text, one a line; the
    ones that come with the package if there is no file. Of `turns` the first is taken, and blank
    lines are skipped.

    Raises:
        CalibrationError: the file cannot be read, or a line of JSON has neither key or something
            else than words under it.
    """
    if path is None:
        text = resources.files("vllm_dspark.calibration").joinpath("prompts.txt").read_text("utf-8")
        return [line for line in text.splitlines() if line]
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"prompts {str(path)!r} cannot be read: {error}") from None
    if path.suffix not in (".jsonl", ".json"):
        return [line for line in text.splitlines() if line.strip()]
    return [
        _prompt(line, f"line {number} of {str(path)!r}")
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def _prompt(line: str, where: str) -> str:
    """The prompt in a line of JSON; `where` is for the error."""
    try:
        entry: Any = json.loads(line)
    except ValueError as error:
        raise _no_prompt(where, f"it is no JSON: {error}") from None
    if not isinstance(entry, dict) or not entry.keys() & {"prompt", "turns"}:
        raise _no_prompt(where, f"it is {_short(entry)}")
    key = "prompt" if "prompt" in entry else "turns"
    prompt = entry[key]
    if key == "turns":
        prompt = prompt[0] if isinstance(prompt, list) and prompt else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise _no_prompt(where, f"its {key} is {_short(entry[key])}")
    return prompt


def _no_prompt(where: str, found: str) -> CalibrationError:
    return CalibrationError(
        f"{where} is no prompt: {found}. Needed is an object with prompt or turns, such as "
        '{"prompt": "words"} or {"turns": ["words"]}'
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
