"""vLLM's real scheduler with ours mixed in, and no engine: a test says what the worker sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from tests.pairs import write_drafter, write_target
from vllm_dspark import cpu
from vllm_dspark.integration.scheduler import DSparkScheduler, DSparkSyncScheduler
from vllm_dspark.integration.step_report import Startup, StepReport, attach_report

BLOCK = 16  # tokens


def pair(folder: Path) -> Path:
    """A target and its drafter, to configure an engine for; no weight of theirs is ever loaded."""
    write_target(folder, seed=5)
    write_drafter(folder / "dspark", folder, seed=6)
    return folder


class Scheduling:
    """A scheduler, and the worker that it believes in.

    Args:
        folder: see `pair`.
        blocks: of the K/V cache.
        asynchronous: as vLLM schedules on a GPU.
        dspark: additional_config of ours.
        options: engine arguments.
    """

    def __init__(
        self,
        folder: Path,
        blocks: int = 64,
        asynchronous: bool = True,
        dspark: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        load_general_plugins()
        sizes = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 256}
        config = EngineArgs(
            model=str(folder),
            speculative_config="dspark",
            additional_config={"dspark": dict(dspark or {})},
            **{**cpu.ENGINE_OPTIONS, "dtype": "float32", "skip_tokenizer_init": True, **sizes,
               "kv_cache_memory_bytes": 1 << 26, **options},
        ).create_engine_config()  # fmt: skip
        config.cache_config.num_gpu_blocks, config.cache_config.block_size = blocks, BLOCK
        config.scheduler_config.async_scheduling = asynchronous
        spec = FullAttentionSpec(
            block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32
        )
        kind = DSparkScheduler if asynchronous else DSparkSyncScheduler
        self.scheduler: Any = kind(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
            log_stats=True,
        )
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self._startup: Startup | None = None

    def starts(self, depths: tuple[int, ...] = (0, 1, 2, 3, 5, 7), **said: Any) -> None:
        """The next output brings what workers say once they are ready."""
        self._startup = Startup(depths, None, **said)

    def add(self, name: str, prompt: Sequence[int], most: int = 32, **params: Any) -> Request:
        """A greedy request of up to `most` tokens."""
        sampling = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True, **params)
        request = Request(
            request_id=name,
            prompt_token_ids=list(prompt),
            sampling_params=sampling,
            pooling_params=None,
            block_hasher=self._hasher,
        )
        self.scheduler.add_request(request)
        return request

    def output(
        self,
        step: Any,
        tokens: Mapping[str, list[int]] | None = None,
        void: Mapping[str, int] | None = None,
        **said: Any,
    ) -> ModelRunnerOutput:
        """What the worker says of a step.

        Args:
            step: of the scheduler.
            tokens: sampled, by request; one for those that are not named, or none in the middle
                of a prefill.
            void: broken ones among them, by request.
            said: fields of the output.
        """
        names = list(step.num_scheduled_tokens)
        made = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=[list((tokens or {}).get(name, self._one(name))) for name in names],
            num_nans_in_logits={name: (void or {}).get(name, 0) for name in names},
            **said,
        )
        if self._startup is not None:
            attach_report(made, StepReport(startup=self._startup))
            self._startup = None
        return made

    def step(self, **said: Any) -> tuple[Any, Any]:
        """Schedule, and take in what `output` makes of it: the step, and vLLM's outputs."""
        step = self.scheduler.schedule()
        return step, self.scheduler.update_from_output(step, self.output(step, **said))

    def held(self, name: str) -> list[int]:
        """Blocks of a request."""
        return list(self.scheduler.kv_cache_manager.get_block_ids(name)[0])

    def _one(self, name: str) -> list[int]:
        request = self.scheduler.requests.get(name)
        return [] if request is not None and request.is_prefill_chunk else [5]
