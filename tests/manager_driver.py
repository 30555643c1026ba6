"""Calls a verification manager as vLLM's runner does, and checks the layout that it gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_dspark.integration.verification.batch import Layout
from vllm_dspark.integration.verification.host import HostVerification
from vllm_dspark.integration.verification.manager import VerificationManager

GAMMA, SLOTS = 3, 8


@dataclass
class Step:
    """What the runner ends up with."""

    order: list[str]
    host: list[int]  # query lengths
    device: list[int]
    host_rows: list[int]  # logits rows
    device_rows: list[int]
    verified: int
    tokens: int
    result: tuple[Any, ...]
    padding: list[int] = field(default_factory=list)


class States:
    """What the manager reads of vLLM's RequestState."""

    def __init__(self) -> None:
        self.req_id_to_index: dict[str, int] = {}
        self.index_to_req_id: dict[int, str] = {}
        self.num_computed_tokens_np = np.full(SLOTS, 20, dtype=np.int32)
        self.prefill_len = SimpleNamespace(np=np.full(SLOTS, 5, dtype=np.int32))

    def add(self, name: str) -> int:
        """A slot for a request; the last one that became free."""
        slot = max(set(range(SLOTS)) - set(self.index_to_req_id))
        self.req_id_to_index[name], self.index_to_req_id[slot] = slot, name
        return slot

    def clear(self) -> None:
        self.req_id_to_index.clear()
        self.index_to_req_id.clear()


def layout(returns_admitted: bool = True, limit: int = 1 << 20) -> Layout:
    starts = torch.zeros(SLOTS + 1, dtype=torch.int32)
    return Layout(States(), starts, 1, limit, returns_admitted)


def begin(
    manager: VerificationManager, new: dict[str, Any], depth: int = GAMMA, **more: Any
) -> None:
    """A step with new requests: parameters by name, None for the defaults."""
    requests = [
        SimpleNamespace(
            req_id=name,
            sampling_params=SimpleNamespace(
                **{"temperature": 0.0, "structured_outputs": None, "extra_args": None}
                | (params or {})
            ),
        )
        for name, params in new.items()
    ]
    asked = SimpleNamespace(scheduled_new_reqs=requests, num_spec_tokens_to_schedule=depth, **more)
    manager.begin_step(asked)
    for name in new:
        manager.add_request(manager.layout.req_states.add(name))


def step(manager: VerificationManager, tokens: dict[str, int], drafts: dict[str, int]) -> Step:
    """Lay a step out as `GPUModelRunner.prepare_inputs` does."""
    from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids

    placeholders = {name: [-1] * n for name, n in drafts.items() if n}
    total = manager.get_num_tokens(tokens, placeholders)
    order = sort_batch_req_ids(tokens, placeholders, GAMMA + 1)
    scheduled = np.array([tokens[name] for name in order], dtype=np.int32)
    drafted = np.array([drafts.get(name, 0) for name in order], dtype=np.int32)
    rows = np.concatenate([[0], np.cumsum(drafted + 1)]).astype(np.int32)
    upper = scheduled
    lengths, rows = manager.compact_batch(drafted, scheduled, rows)
    starts = np.zeros(SLOTS + 1, dtype=np.int32)
    np.cumsum(lengths, out=starts[1 : len(order) + 1])
    starts[len(order) + 1 :] = total
    manager.layout.query_start_loc.copy_(torch.from_numpy(starts))
    slots = [manager.layout.req_states.req_id_to_index[name] for name in order]
    device = manager.layout.query_start_loc.device
    result = manager.reallocate_drafts(order, torch.tensor(slots, device=device))
    device_rows, device_starts, verified = result[:3]
    assert drafted.tolist() == [drafts.get(name, 0) for name in order]  # grammar masks need it
    count = len(order)
    assert device_rows.shape == (count + 1,)
    assert device_rows.dtype == device_starts.dtype == torch.int32
    assert device_rows[0] == device_starts[0] == 0
    if isinstance(manager, HostVerification):
        assert upper is lengths  # what the runner makes of it is exact
    return Step(
        order,
        lengths.tolist(),
        device_starts[: count + 1].diff().tolist(),
        np.diff(rows).tolist(),
        device_rows.diff().tolist(),
        verified,
        total,
        result,
        device_starts[count + 1 :].tolist(),
    )


def end(
    manager: VerificationManager,
    order: list[str],
    emitted: list[int],
    rejected: list[int],
    confidence: Any,
) -> None:
    """The target speaks, the next block is drawn."""
    index = manager.layout.req_states.req_id_to_index
    slots = np.array([index[name] for name in order], dtype=np.intp)
    manager.observe(torch.tensor(emitted), torch.tensor(rejected))
    batch = SimpleNamespace(idx_mapping_np=slots, idx_mapping=torch.from_numpy(slots))
    padded = torch.zeros(SLOTS, GAMMA)
    padded[: len(order)] = torch.tensor(confidence)
    manager.record_confidences(padded, batch)


def check(laid_out: Step, tokens: dict[str, int], drafts: dict[str, int], exact: bool) -> None:
    """One layout throughout: the device's, and on the host the same or a stand-in for it."""
    others = [tokens[name] - drafts.get(name, 0) for name in laid_out.order]
    lengths = [n - other for n, other in zip(laid_out.device, others, strict=True)]
    assert laid_out.device_rows == [n + 1 for n in lengths]
    limits = [drafts.get(name, 0) for name in laid_out.order]
    assert all(0 <= n <= most for n, most in zip(lengths, limits, strict=True))
    assert sum(lengths) == laid_out.verified
    assert sum(laid_out.device) == sum(laid_out.host) == laid_out.tokens
    assert set(laid_out.padding) <= {laid_out.tokens}
    if exact:
        assert laid_out.host == laid_out.device
        assert laid_out.host_rows == laid_out.device_rows
    else:  # no longer than the bound that the runner keeps, and prefills as they are
        scheduled = [n + 1 for n in limits]
        assert all(n <= most for n, most in zip(laid_out.device_rows, scheduled, strict=True))
        for host_length, other, most in zip(laid_out.host, others, limits, strict=True):
            assert host_length >= other
            assert most or host_length == other
