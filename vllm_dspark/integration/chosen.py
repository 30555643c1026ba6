"""What was chosen where the configuration left it open, for every process of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def record(vllm_config: Any, **chosen: Any) -> None:
    """Write options of `DSparkConfig` into the configuration that travels; compiled code is kept
    apart by them, too. An `additional_config` that is no object carries nothing: all defaults."""
    additional = vllm_config.additional_config
    if isinstance(additional, Mapping):
        options = {**additional.get("dspark", {}), **chosen}
        vllm_config.additional_config = {**additional, "dspark": options}
