"""From `--speculative-config dspark` to the drafter it means.

The bare word names no drafter. It is looked up, in this order: next to the target, as a
subfolder of its checkpoint folder; inside the target, where the checkpoint carries its own
DSpark stages; in the table of published drafters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Target → drafter, as published (arXiv 2607.05147 and the checkpoints' own pages).
PUBLISHED: dict[str, str] = {
    "Qwen/Qwen3-4B": "deepseek-ai/dspark_qwen3_4b_block7",
    "Qwen/Qwen3-8B": "deepseek-ai/dspark_qwen3_8b_block7",
    "Qwen/Qwen3-14B": "deepseek-ai/dspark_qwen3_14b_block7",
    "google/gemma-4-12B-it": "deepseek-ai/dspark_gemma4_12b_block7",
}

# Architectures by which a config.json declares itself a DSpark drafter.
DRAFTER_ARCHITECTURES = frozenset(
    {
        "Qwen3DSparkModel",
        "Qwen3OmniDSparkModel",
        "Gemma4DSparkModel",
        "DSparkDraftModel",
        "DSparkSpeculator",
        "K3DSparkModel",
        "MuseSparkDSparkModel",
    }
)

_BARE_WORD = re.compile(r"dspark(?::(?P<model>.+))?", re.DOTALL)
_CACHE_FOLDER = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)")


class UnknownDrafterError(ValueError):
    """No drafter was named and none is known for the target."""


def parse_bare_word(text: str) -> dict[str, Any] | None:
    """`dspark` → {"method": "dspark"}, `dspark:X` → the same with "model": X, else None.

    Raises:
        ValueError: `dspark:` with nothing behind the colon.
    """
    match = _BARE_WORD.fullmatch(text.strip())
    if match is None:
        if text.strip() == "dspark:":
            raise ValueError("'dspark:' names no drafter; needed is dspark or dspark:PATH_OR_ID")
        return None
    model = match["model"]
    return {"method": "dspark"} | ({"model": model} if model else {})


def is_drafter_config(config: Mapping[str, Any]) -> bool:
    """Whether a config.json's contents declare a DSpark drafter."""
    architectures = set(config.get("architectures") or ())
    return bool(DRAFTER_ARCHITECTURES & architectures) or (
        config.get("speculators_model_type") == "dspark"
    )


def carries_own_drafter(config: Mapping[str, Any]) -> bool:
    """Whether a target's config.json says that its checkpoint holds DSpark stages too."""
    text = config.get("text_config") or {}
    return any("dspark_block_size" in part for part in (config, text))


def drafters_beside(target: str) -> list[Path]:
    """Subfolders of a local target's checkpoint folder that are DSpark drafters, by name."""
    folder = Path(target)
    if not folder.is_dir():
        return []
    return [
        path.parent
        for path in sorted(folder.glob("*/config.json"))
        if is_drafter_config(_read_json(path))
    ]


def published_name(target: str) -> str:
    """Hub id of a target given as an id or as a snapshot folder of the hub's cache."""
    match = _CACHE_FOLDER.search(target)
    return f"{match['owner']}/{match['name']}" if match else target.rstrip("/")


def find_drafter(target: str, target_config: Mapping[str, Any]) -> str:
    """The drafter that the bare word means for `target`.

    Args:
        target: path or hub id of the target.
        target_config: contents of the target's config.json.

    Returns:
        Path or hub id of the drafter; the target's own if it carries its drafter inside.

    Raises:
        UnknownDrafterError: none is known, or there are several beside the target. The
            message lists what could have been given.
    """
    beside = drafters_beside(target)
    if len(beside) == 1:
        return str(beside[0])
    if beside:
        listed = ", ".join(f"dspark:{path}" for path in beside)
        raise UnknownDrafterError(
            f"--speculative-config dspark: found {len(beside)} drafters beside the target "
            f"{target!r} and needed one. Name it: {listed}."
        )
    if carries_own_drafter(target_config):
        return target
    by_lowercase_name = {name.lower(): drafter for name, drafter in PUBLISHED.items()}
    drafter = by_lowercase_name.get(published_name(target).lower())
    if drafter is not None:
        return drafter
    table = "\n".join(f"  {name} -> dspark:{known}" for name, known in PUBLISHED.items())
    raise UnknownDrafterError(
        f"--speculative-config dspark: no drafter is known for the target {target!r}. Give one as "
        "dspark:PATH_OR_ID, or put its folder into the target's checkpoint folder. Published "
        f"drafters:\n{table}"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
