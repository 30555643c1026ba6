"""Cost profiles on disk, so that an engine which was profiled once starts without.

One JSON file per engine, as `CostModel.to_json` writes it, in $DSPARK_CACHE_DIR, or else
$XDG_CACHE_HOME/vllm-dspark, or else ~/.cache/vllm-dspark. What the file must hold for is in its
name and, in full, inside; one that cannot be read, or holds for something else, counts as none.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from vllm_dspark.outputs import replacing
from vllm_dspark.scheduler.cost_model import CostModel

FOLDER = "costs"
_NOWHERE = "there is no home folder, and DSPARK_CACHE_DIR is not set"


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Where profiles are kept; it need not exist. None for a user without a home folder, such as
    a number that no account of a container has, where no variable names another."""
    named = environment.get("DSPARK_CACHE_DIR")
    if named:
        return Path(named) / FOLDER
    cache = environment.get("XDG_CACHE_HOME")
    try:
        return (Path(cache) if cache else Path.home() / ".cache") / "vllm-dspark" / FOLDER
    except RuntimeError:
        return None


class CostCache:
    """The profile of one engine.

    Args:
        folder: of profiles; None keeps nothing.
        key: what the profile holds for.

    Attributes:
        path: of its file; None without a folder.
    """

    def __init__(self, folder: Path | None, key: Mapping[str, str]) -> None:
        self._key = dict(key)
        text = json.dumps(self._key, sort_keys=True)
        name = f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
        self.path = None if folder is None else folder / name

    def read(self) -> tuple[str | None, str]:
        """The text of the profile, checked, and why there is none."""
        if self.path is None:
            return None, _NOWHERE
        try:
            text = self.path.read_text(encoding="utf-8")
            CostModel.from_json(text, self._key)
        except FileNotFoundError:
            return None, "none was kept"
        except (OSError, ValueError) as error:
            return None, f"{self.path} cannot be used: {error}"
        return text, ""

    def write(self, model: CostModel) -> str:
        """Keep the profile: a reader sees the old file or the new one, never a part.

        Returns:
            Why it could not be kept, or nothing.
        """
        if self.path is None:
            return _NOWHERE
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as partial:
                partial.write_text(model.to_json(self._key) + "\n", encoding="utf-8")
        except OSError as error:
            return f"{self.path} cannot be written: {error}"
        return ""

    def model(self, text: str) -> CostModel:
        """Of a text that `read` gave, here or on another rank.

        Raises:
            ValueError: it is none.
        """
        return CostModel.from_json(text, self._key)
