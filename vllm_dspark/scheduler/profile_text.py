"""A profile as text, for a cache, with what it holds for."""

from __future__ import annotations

import json
from collections.abc import Mapping

from vllm_dspark.scheduler.step_times import StepTimes

FORMAT = 1


def to_text(profile: StepTimes, key: Mapping[str, str]) -> str:
    """JSON.

    Args:
        key: what the profile holds for: model, GPU, vLLM, configuration.
    """
    return json.dumps({"format": FORMAT, "key": dict(key), "profile": profile.to_dict()})


def from_text(text: str, key: Mapping[str, str]) -> StepTimes:
    """What `to_text` gave for the same key.

    Raises:
        ValueError: it is no such text, or of another format or key; it says which.
    """
    try:
        data = json.loads(text)
        found, found_key = data["format"], dict(data["key"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"text is no cost model: {error!r}") from None
    if found != FORMAT:
        raise ValueError(f"text has format {found!r}, needed is {FORMAT}: profile again")
    for name in sorted({*found_key, *key}):
        if found_key.get(name) != key.get(name):
            raise ValueError(
                f"text has {name!r} {found_key.get(name)!r} in its key, needed is "
                f"{key.get(name)!r}: profile again"
            )
    return StepTimes.from_dict(data.get("profile"))
