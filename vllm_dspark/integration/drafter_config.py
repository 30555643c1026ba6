"""Reading a drafter's own config.json, wherever vLLM would find it.

vLLM's reading of it will not do: transformers fold and rename fields on the way.
"""

from __future__ import annotations

from typing import Any

from vllm_dspark.checkpoint import DrafterMismatchError, DrafterSpec, drafter_spec


def read_config(model: str, revision: str | None) -> dict[str, Any]:
    """Contents of config.json in a folder or on the hub.

    Raises:
        DrafterMismatchError: there is none, the name is neither a folder nor a hub id, the hub
            does not answer, or the file is not JSON.
    """
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    try:
        config = get_hf_file_to_dict("config.json", model, revision or "main")
    except (OSError, ValueError) as error:  # the hub's own errors derive from these
        raise DrafterMismatchError(
            model, [f"no config.json could be read from it ({error})"]
        ) from None
    if config is None:
        raise DrafterMismatchError(model, ["no config.json could be read from it"])
    return config


def read_spec(draft_model_config: Any) -> DrafterSpec | None:
    """What the checkpoint behind vLLM's `draft_model_config` is; see `drafter_spec`.

    Raises:
        DrafterMismatchError: no config.json, or one that makes no sense.
    """
    name = draft_model_config.model
    return drafter_spec(name, read_config(name, draft_model_config.revision))
