"""Verification kernels are compiled at start-up: by whom, when, and without a trace.

That nothing is left to compile is in `test_kernel_verify_compile`.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import verify_cases
from tests.child import ask
from tests.kernel_cases import DEVICE
from tests.test_kernel_verify_processing import runner
from vllm_dspark.integration import verify_kernels
from vllm_dspark.integration.depth_hooks import DepthHooks
from vllm_dspark.integration.rejection import KernelRejectionSampler
from vllm_dspark.integration.verify_kernels import stand_ins, verification_compiled
from vllm_dspark.kernels import block_verify, residual, verify_accept, verify_min_p, verify_stats
from vllm_dspark.kernels.verify import Method, Verifier
from vllm_dspark.kernels.verify_batch import Batch

LENGTHS = (2, 0, 1)
MODULES = (block_verify, residual, verify_accept, verify_min_p, verify_stats)
OURS = {name for module in MODULES for name in dir(module) if name.endswith("_kernel")}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """As where kernels are compiled: the batches that were verified, and how."""
    monkeypatch.setattr(verify_kernels, "_interpreted", lambda: False)
    seen: list[Any] = []
    verify = Verifier.verify

    def watched(self: Verifier, batch: Batch, method: Method = "standard") -> Any:
        seen.append((batch, method))
        return verify(self, batch, method)

    monkeypatch.setattr(Verifier, "verify", watched)
    return seen


@pytest.mark.parametrize(
    ("kind", "method"),
    [*((kind, "standard") for kind in verify_cases.KINDS), ("dense", "block")],
)
def test_first_batch_alone_has_others_verified(
    kind: str, method: Method, compiled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every combination once by every method, and what the batch is told is what it would have been
    told: the launches' notes are blank again."""
    for module in (verify_stats, verify_kernels):
        monkeypatch.setattr(module, "AT_ONCE", 3)
    case = verify_cases.batch(LENGTHS, 33, kind, gamma=2)
    expected = Verifier(4, case.gamma, DEVICE).verify(case, method)
    verifier = Verifier(4, case.gamma, DEVICE)
    compiled.clear()
    methods: tuple[Method, ...] = ("block", "standard") if method == "block" else (method,)
    with verification_compiled(verifier, methods):
        found = [verifier.verify(case, method) for _ in range(2)]
    *others, first, second = compiled
    assert first == second == (case, method)
    kinds = {
        (batch.requests, batch.min_p is not None, batch.processed is not None, how)
        for batch, how in others
    }
    assert len(kinds) == len(others) == 8 * len(methods)
    assert {requests for requests, *_ in kinds} == {1, 2}
    assert {how for *_, how in kinds} == set(methods)
    for verdict in found:
        assert torch.equal(verdict.tokens, expected.tokens)
        assert torch.equal(verdict.counts, expected.counts)
    compiled.clear()
    verifier.verify(case, method)
    assert len(compiled) == 1
    assert "verify" not in vars(verifier)


def test_batches_that_are_too_large_to_come_are_left_out() -> None:
    """As many requests as it takes to have more programs than run at once, but not more than the
    engine has slots for."""
    case = verify_cases.batch((1,) * 7, 33)
    assert {batch.requests for batch in stand_ins(case)} == {1}


def test_stand_ins_take_the_strides_of_the_engine() -> None:
    """Logits of a padded LM head, and of another dtype than what is processed."""
    case = verify_cases.batch(LENGTHS, 33, dtype=torch.bfloat16)
    padded = case.logits.new_zeros(len(case.logits), 48)[:, :33]
    for batch in stand_ins(verify_cases.replace(case, logits=padded)):
        assert batch.logits.dtype == torch.bfloat16
        assert batch.logits.stride() == padded.stride()
        assert batch.processed is None or batch.processed.dtype == torch.float32


class Worker:
    """What the hooks are mixed into; warms up by verifying some batches."""

    model_runner: Any

    def compile_or_warm_up_model(self) -> str:
        sampler = self.model_runner.rejection_sampler
        if isinstance(sampler, KernelRejectionSampler):
            for _ in range(2):
                sampler.verifier.verify(verify_cases.batch((1, 3), 33, gamma=3))
        return "times"


class HookedWorker(DepthHooks, Worker):
    """As our workers are made."""


def test_start_up_compiles_them(compiled: list[Any]) -> None:
    worker = HookedWorker()
    worker.model_runner = made = runner("triton")
    worker.compile_or_warm_up_model()
    assert compiled == []  # vLLM's own kernels verify
    made.speculator = SimpleNamespace(proposal=None)
    made.rejection_sampler = KernelRejectionSampler(made)
    assert worker.compile_or_warm_up_model() == "times"
    assert len(compiled) > 2


def test_the_interpreter_has_nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine on a CPU would interpret them for seconds."""
    monkeypatch.setattr(verify_kernels, "_interpreted", lambda: True)
    verifier = Verifier(2, 3, DEVICE)
    with verification_compiled(verifier, ["standard"]):
        assert "verify" not in vars(verifier)


@pytest.mark.gpu
@pytest.mark.engine
@pytest.mark.parametrize("drafting", ["greedy", "probabilistic"])
def test_first_request_of_its_kind_waits_for_none_of_our_kernels(drafting: str) -> None:
    """In a process of its own, which has none yet. vLLM's own for top-k and top-p do not count."""
    pytest.importorskip("vllm.utils.jit_monitor", reason="vLLM tells from 0.33 on")
    code = f"""
        from tests.engine import TINY, Request, engine, run
        from tests.test_depth_gpu import options, speculation
        from vllm.utils import jit_monitor

        compiled = []
        jit_monitor._handle_jit_event = lambda **event: compiled.append(event["fn_name"])
        plain = {{"max_tokens": 24, "ignore_eos": True, "temperature": 0.8}}
        ways = (
            {{"top_p": 0.95, "top_k": 20}}, {{"min_p": 0.1}}, {{"presence_penalty": 1.0}},
            {{"top_p": 0.95, "min_p": 0.1}}, {{}},
        )
        ours = options("bfloat16", kernels="triton")
        with engine(TINY, speculation({drafting!r}), **ours) as llm:
            compiled.clear()
            for way in ways:
                run(llm, [Request("import os", plain | way)])
        assert jit_monitor.is_active()
        answer = sorted(set(compiled))
    """
    paths = (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", ""))
    found = ask(code, os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
    assert not [name for name in found if name.rpartition(".")[2] in OURS]
