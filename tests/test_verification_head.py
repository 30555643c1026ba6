"""What the LM head takes, and with LoRA: that its kernels are told how many rows there are.

No GPU: the clock is made up, and vLLM's tables for the kernels are built on the CPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from tests.test_seams import RUNNER
from tests.test_seams import vllm as vllm
from tests.vllm_sources import Sources, calls, parameters
from vllm_dspark.integration.verification import head
from vllm_dspark.integration.verification.head import head_line

WIDTH, WORDS, ADAPTERS = 4, 10, 2


class Adapters:
    """vLLM's adapter manager, as far as dummy runs go, with its tables of rows.

    Attributes:
        rows: that the kernels would write.
    """

    def __init__(self) -> None:
        self.table = LoRAKernelMeta.make(ADAPTERS, 1024, "cpu")
        self._loaded: set[int] = set()

    @property
    def rows(self) -> int:
        return int(self.table.num_tokens_per_lora.sum())

    def dummy_lora_cache(self) -> Any:
        return nullcontext()

    def get_dummy_lora_warmup_rank(self, rank: int) -> int:
        return rank

    def add_dummy_lora(self, request: Any, rank: int) -> None:
        self._loaded.add(request.lora_int_id)

    def remove_all_adapters(self) -> None:
        """As vLLM's, leaves the tables as they are."""
        self._loaded.clear()

    def set_active_adapters(self, requests: set[Any], mapping: Any) -> None:
        assert {request.lora_int_id for request in requests} <= self._loaded  # nothing on disk
        self.table.prepare_tensors(torch.tensor(mapping.prompt_mapping) - 1)


class Model:
    """A head of 2 ms and 0.1 a row."""

    def __init__(self, adapters: Adapters | None) -> None:
        self._adapters = adapters
        self.rows: list[int] = []
        self.now = 0.0

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        rows, width = hidden.shape
        assert width == WIDTH
        assert self._adapters is None or self._adapters.rows == rows
        self.rows.append(rows)
        self.now += 2 + 0.1 * rows
        return torch.zeros(rows, WORDS)


class Runner(LoRAModelRunnerMixin):
    def __init__(self, requests: int, lora: bool, device: str = "cuda") -> None:
        self.lora_config: Any = None
        if lora:
            self.lora_config = SimpleNamespace(max_loras=ADAPTERS, max_lora_rank=8)
            self.lora_manager: Any = Adapters()
        self.model = Model(self.lora_manager if lora else None)
        starts = SimpleNamespace(device=SimpleNamespace(type=device))
        self.input_buffers = SimpleNamespace(query_start_loc=starts)
        sizes = SimpleNamespace(get_hidden_size=lambda: WIDTH, dtype=torch.float32)
        self.model_config, self.max_num_reqs = sizes, requests


def timed(monkeypatch: pytest.MonkeyPatch, runner: Runner) -> tuple[float, float]:
    """The line, on a device whose clock is the model's."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = runner.model.now

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return other.at - self.at

    device = SimpleNamespace(
        zeros=lambda shape, dtype, device: torch.zeros(shape, dtype=dtype),
        cuda=SimpleNamespace(Event=Event),
    )
    monkeypatch.setattr(head, "torch", device)
    return head_line(runner)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("requests", "most"), [(1, 2), (8, 8), (1000, 256)])
def test_line(monkeypatch: pytest.MonkeyPatch, requests: int, most: int, lora: bool) -> None:
    """Of one row and of as many as there is room for. The last dummy run before had others, with
    adapters, and so have vLLM's tables until they are told of these."""
    runner = Runner(requests, lora)
    if lora:
        before = np.ones(5, dtype=np.int32)
        with runner.maybe_dummy_run_with_lora(
            runner.lora_config, before, num_sampled_tokens=before, num_active_loras=ADAPTERS
        ):
            pass
        assert runner.lora_manager.rows == 5
    without, each = timed(monkeypatch, runner)
    assert (without, each) == (pytest.approx(2.0), pytest.approx(0.1))
    assert set(runner.model.rows) == {1, most}


def test_adapters_are_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the dummy runs that the line is added to: rows of both."""
    runner = Runner(8, lora=True)
    timed(monkeypatch, runner)
    table = runner.lora_manager.table
    assert not table.no_lora_flag_cpu.item()
    assert table.num_tokens_per_lora.tolist() == [4, 4, 0]


def test_nothing_is_timed_without_a_gpu() -> None:
    runner = Runner(8, lora=False, device="cpu")
    assert head_line(runner) == (0.0, 0.0)
    assert runner.model.rows == []


def test_dummy_runs_set_adapters_so(vllm: Sources) -> None:
    """The line leans on what vLLM's own dummy runs do."""
    name = "maybe_dummy_run_with_lora"
    function = vllm.function(f"{RUNNER}.{name}")
    assert function is not None
    assert " ".join(parameters(function)) == (
        "self lora_config num_scheduled_tokens num_sampled_tokens remove_lora num_active_loras "
        "mapping_type"
    )
    run = vllm.function(f"{RUNNER}._dummy_run")
    assert run is not None
    assert calls(run, name)
