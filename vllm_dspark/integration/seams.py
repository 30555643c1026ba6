"""Putting the patches of the ledger in place."""

from __future__ import annotations

from typing import Any


def open_request_seams() -> None:
    """When the plugin loads: let requests for DSpark reach us. Idempotent."""
    from vllm_dspark.integration.ledger import REQUEST_SEAMS

    for patch in REQUEST_SEAMS:
        patch.apply()


def open_front_end_seams() -> None:
    """Where a configuration that asks for DSpark is finished, before the engine's client is made.
    Idempotent."""
    from vllm_dspark.integration.ledger import FRONT_END_SEAMS

    for patch in FRONT_END_SEAMS:
        patch.apply()


def open_engine_seams() -> None:
    """In a worker whose engine was asked for DSpark: put our parts in. Idempotent."""
    from vllm_dspark.integration.ledger import ENGINE_SEAMS

    for patch in ENGINE_SEAMS:
        patch.apply()


def open_interpreter_seams() -> None:
    """When the plugin loads in a process that runs kernels in Triton's interpreter. Idempotent."""
    from vllm_dspark.integration.ledger import INTERPRETER_SEAMS

    for patch in INTERPRETER_SEAMS:
        patch.apply()


def refuse_requests(error: Exception) -> None:
    """On a vLLM we do not know: fail requests for DSpark, leave all others alone. Idempotent.

    Args:
        error: what a request for DSpark shall raise.

    Raises:
        Exception: `error` itself, if even this seam is not where it was.
    """
    try:
        from vllm.engine.arg_utils import EngineArgs

        original = EngineArgs.create_speculative_config
    except (ImportError, AttributeError):
        raise error from None

    if hasattr(original, "__dspark_guard__"):
        return

    def create_speculative_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = getattr(self, "speculative_config", None)
        method = given.get("method") if isinstance(given, dict) else given
        asked = (method, getattr(self, "spec_method", None))
        if any(isinstance(word, str) and word.partition(":")[0] == "dspark" for word in asked):
            raise error
        return original(self, *args, **kwargs)

    from vllm_dspark.integration.arguments import wrap_add_cli_args

    EngineArgs.add_cli_args = staticmethod(wrap_add_cli_args(EngineArgs.add_cli_args))
    create_speculative_config.__dspark_guard__ = True  # type: ignore[attr-defined]
    EngineArgs.create_speculative_config = create_speculative_config
