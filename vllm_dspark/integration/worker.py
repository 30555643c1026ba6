"""vLLM's GPU worker with the engine seams in place."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from vllm_dspark.integration.broken_logits import BrokenHooks
from vllm_dspark.integration.depth_hooks import DepthHooks
from vllm_dspark.integration.rejection import RejectionHooks
from vllm_dspark.integration.seams import open_engine_seams
from vllm_dspark.integration.verification.hooks import VerificationHooks


class DSparkWorker(DepthHooks, VerificationHooks, RejectionHooks, BrokenHooks, Worker):
    """Chosen through `parallel_config.worker_cls`, only where DSpark was asked for."""

    def init_device(self) -> None:
        """Patch the model runner's module, then build the runner from it."""
        open_engine_seams()
        super().init_device()
