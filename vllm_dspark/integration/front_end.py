"""The seams in the process that answers requests: it has to understand our stats, and show them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_dspark.integration.chosen import serves_dspark


def wrap_client_init(original: Callable[..., None]) -> Callable[..., None]:
    """The client of an engine that serves DSpark by us decodes our stats; others are left alone."""

    def init(self: Any, *args: Any, **named: Any) -> None:
        original(self, *args, **named)
        if serves_dspark(self.vllm_config):
            from vllm.v1.serial_utils import MsgpackDecoder

            from vllm_dspark.integration.speculation_stats import outputs_type

            self.decoder = MsgpackDecoder(outputs_type())

    return init


def wrap_stat_loggers_init(original: Callable[..., None]) -> Callable[..., None]:
    """Where stats are logged at all, ours are, of an engine that serves DSpark by us."""

    def init(
        self: Any,
        vllm_config: Any,
        engine_idxs: list[int] | None = None,
        custom_stat_loggers: list[Any] | None = None,
        *args: Any,
        **named: Any,
    ) -> None:
        loggers = list(custom_stat_loggers or [])
        if serves_dspark(vllm_config):
            from vllm_dspark.integration.metrics import DSparkStatLogger

            loggers.append(DSparkStatLogger)
        original(self, vllm_config, engine_idxs, loggers, *args, **named)

    return init
