"""A measurement as a JSON record with its table beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer


def write_record(folder: Path, name: str, result: Mapping[str, Any], table: str) -> None:
    """Write `name`.json and `name`.md into a folder, which is made if need be, and print the
    table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}.md").write_text(table)
    typer.echo(table)
