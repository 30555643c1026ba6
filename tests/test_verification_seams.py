"""How vLLM's runner goes about a step, in the sources of every supported version: the order of its
calls to the verification manager, and what it makes of the answers."""

from __future__ import annotations

import ast

from tests.test_seams import RUNNER
from tests.test_seams import vllm as vllm
from tests.vllm_sources import Sources, calls


def lines_of(function: ast.AST, *names: str) -> list[int]:
    """Where each of these is first called, in the given order."""
    return [calls(function, name)[0] for name in names]


def test_runner_calls_the_manager_in_the_order_of_a_step(vllm: Sources) -> None:
    """Lengths are decided before they are laid out; outcomes are told before confidences."""
    prepare = vllm.function(f"{RUNNER}.prepare_inputs")
    sample = vllm.function(f"{RUNNER}.sample_tokens")
    assert prepare is not None
    assert sample is not None
    layout = lines_of(prepare, "compact_batch", "reallocate_drafts", "expand_idx_mapping")
    assert layout == sorted(layout)
    told = lines_of(sample, "observe_verification", "propose", "record_confidences")
    assert told == sorted(told)


def test_upper_bound_is_the_array_that_the_manager_gets(vllm: Sources) -> None:
    """Host mode writes true lengths into it, from which LoRA's mapping and bounds are made."""
    function = vllm.function(f"{RUNNER}.prepare_inputs")
    assert function is not None
    text = ast.unparse(function)
    kept = text.index("num_scheduled_tokens_upper_bound = num_scheduled_tokens_np")
    assert kept < text.index(".compact_batch(")
    assert "num_scheduled_tokens=num_scheduled_tokens_upper_bound" in text


def test_values_that_reallocate_drafts_returns(vllm: Sources) -> None:
    """Three or four, which the manager goes by the version for."""
    function = vllm.function(f"{RUNNER}.prepare_inputs")
    assert function is not None
    (targets,) = (
        node.targets[0]
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and calls(node.value, "reallocate_drafts")
    )
    assert isinstance(targets, ast.Tuple)
    assert len(targets.elts) == {"0.32.0": 3, "0.33.0": 4}[str(vllm.version)]
