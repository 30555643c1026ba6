"""What lays out a draft pass is compiled at start-up, for every depth and length of prompt."""

from __future__ import annotations

from typing import Any

import pytest
from triton.runtime.interpreter import InterpretedFunction

from tests.conftest import HAS_GPU
from tests.depth_runs import choose_by, random_depths, worker_of
from tests.engine import MICRO, Request, engine, run
from vllm_dspark.integration.input_kernels import inputs_compiled, variants

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(HAS_GPU, reason="launches are watched in the interpreter"),
]

KERNEL = "_prepare_dflash_inputs_kernel"


def signature(arguments: dict[str, Any]) -> tuple[Any, ...]:
    """What Triton compiles anew for: constants, and whole numbers that are 1 or multiples of 16."""
    counts = (arguments["num_query_per_req"], arguments["num_speculative_steps"])
    return arguments["BLOCK_SIZE"], *((n == 1, n % 16 == 0) for n in counts)


def test_no_step_needs_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of all lengths, another depth every step: the first launch brought all others."""
    compiled: set[tuple[Any, ...]] = set()
    launched: set[tuple[Any, ...]] = set()
    original = InterpretedFunction.run

    def watched(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if self.fn.__name__ == KERNEL:
            known = dict(zip(self.arg_names, args, strict=False)) | kwargs
            assert known.keys() == set(self.arg_names)
            (compiled if warmup else launched).add(signature(known))
        return original(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", watched)
    config = {"method": "dspark", "model": str(MICRO / "dspark-vanilla")}
    ours = {"additional_config": {"dspark": {"depth": "auto"}}}
    with engine(MICRO, config, max_num_batched_tokens=512, **ours) as llm:
        speculator = worker_of(llm).model_runner.speculator
        requests = [
            Request([7] * length, {"max_tokens": 12, "ignore_eos": True}, arrives=3 * i)
            for i, length in enumerate((1, 3, 9, 30, 60, 120, 240))
        ]
        run(llm, requests[:1])
        choose_by(llm, random_depths(speculator.plan.gamma, seed=2))
        compiled.clear()
        launched.clear()
        with inputs_compiled(speculator.plan):
            run(llm, requests)
    assert len(launched) > 6
    assert launched <= compiled
    assert len(compiled) == len(variants(speculator.plan)) < 20
