"""Which manager an engine gets, once its attention backends are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.test_verification_plan import cuda as cuda
from tests.test_verification_plan import engine
from vllm_dspark.config import DSparkConfigError
from vllm_dspark.integration.depth_plan import SCHEDULERS
from vllm_dspark.integration.verification import create
from vllm_dspark.integration.verification.create import create_for_graphs, create_for_host
from vllm_dspark.integration.verification.device import DeviceVerification
from vllm_dspark.integration.verification.host import HostVerification
from vllm_dspark.scheduler.fixed import FixedPolicy
from vllm_dspark.scheduler.verification import VerificationPolicy

ADAPTIVE = {"verification": "adaptive"}


def states() -> Any:
    return SimpleNamespace(
        max_num_reqs=4, num_speculative_steps=3, max_num_batched_tokens=64, max_model_len=100
    )


def config(options: dict[str, Any], **changes: Any) -> Any:
    made = engine(options, asked=changes.pop("flag", False), **changes)
    made.parallel_config.tensor_parallel_size = 1
    speculative = {
        "num_speculative_tokens": 3,
        "num_speculative_tokens_per_batch_size": None,
        "draft_model_config": SimpleNamespace(model="a drafter"),
    }
    vars(made.speculative_config).update(speculative)
    vars(made.model_config).update(model="a target", dtype="float32")
    made.scheduler_config = SimpleNamespace(scheduler_cls=changes.get("scheduler"))
    made.num_lookahead_tokens = 3
    return made


def ask(vllm_config: Any, **changes: Any) -> Any:
    """As vLLM's runner asks, while it decides on graphs. No attention group at all supports
    everything."""
    arguments: dict[str, Any] = {
        "enable_adaptive_verification": True,
        "attn_groups": [],
        "req_states": states(),
        "query_start_loc": torch.zeros(5, dtype=torch.int32),
        "num_bonus_tokens": 1,
        "max_total_logits": 10,
        "vllm_config": vllm_config,
        "copy_admitted_drafts_to_host": False,
    }
    return create_for_graphs(**(arguments | changes))


def runner(vllm_config: Any) -> Any:
    return SimpleNamespace(
        vllm_config=vllm_config,
        model_state=SimpleNamespace(num_new_sampled_tokens_per_step=1),
        vocab_size=1000,
        req_states=states(),
        input_buffers=SimpleNamespace(query_start_loc=torch.zeros(5, dtype=torch.int32)),
    )


def needs_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend like FlashAttention 2, whose graphs want equal lengths."""
    import vllm.v1.worker.gpu.attn_utils as attention

    monkeypatch.setattr(
        attention, "get_varlen_cudagraph_unsupported_backend", lambda *a, **k: ("FA2", None)
    )


@pytest.mark.usefixtures("cuda")
def test_device_mode_where_everything_allows_it() -> None:
    manager = ask(config(ADAPTIVE, flag=True))
    assert type(manager) is DeviceVerification
    assert manager.samples
    assert type(manager.policy) is VerificationPolicy
    assert manager.layout.max_total_logits == 10  # vLLM's sampler takes one chunk


@pytest.mark.usefixtures("cuda")
def test_host_mode_with_graphs_of_mixed_lengths() -> None:
    """Asked for on a device that could do without: vLLM still captures for mixed lengths."""
    manager = ask(config(ADAPTIVE | {"verification_mode": "host"}))
    assert type(manager) is HostVerification
    assert not manager.samples  # the host ranks by what arrives
    assert manager.layout.max_total_logits > 1 << 30


@pytest.mark.usefixtures("cuda")
def test_backend_whose_graphs_want_equal_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM must not hear of a manager, or it would capture graphs that cannot be replayed. The one
    that is made afterwards knows that a trimmed batch leaves its graph."""
    needs_whole_batches(monkeypatch)
    vllm_config = config(ADAPTIVE, flag=True)
    assert ask(vllm_config) is None
    manager = create_for_host(runner(vllm_config))
    assert type(manager) is HostVerification
    assert manager.costs is not None
    assert manager.costs._penalty > 1
    assert manager.layout.max_total_logits < 1 << 30
    with pytest.raises(DSparkConfigError, match=r"FA2 cannot replay.*Fix"):
        ask(config(ADAPTIVE | {"verification_mode": "device"}, flag=True))


@pytest.mark.usefixtures("cuda")
def test_blocks_that_are_profiled_are_as_wide_as_the_runners(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three drafts, and as many other tokens as the model samples at once."""
    needs_whole_batches(monkeypatch)
    asking = runner(config(ADAPTIVE, flag=True))
    asking.model_state.num_new_sampled_tokens_per_step = 2
    manager = create_for_host(asking)
    assert manager is not None
    batches = list(manager.batches_to_profile([4, 5, 8, 10]))
    assert {b["num_tokens"] for b in batches if "uniform_decode" in b} == {5, 10}


@pytest.mark.usefixtures("cuda")
def test_backend_that_reads_lengths_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """But replays batches of mixed lengths: host mode, in graphs."""
    import vllm.v1.worker.gpu.attn_utils as attention

    name = "get_query_lens_mismatch_unsupported_backend"
    monkeypatch.setattr(attention, name, lambda *a, **k: "Planner")
    assert type(ask(config(ADAPTIVE, flag=True))) is HostVerification


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("level", ["ALWAYS", "UNIFORM_BATCH"])
def test_groups_that_only_report_a_level(level: str) -> None:
    from vllm.v1.attention.backend import AttentionCGSupport

    support = AttentionCGSupport[level], "Other"
    manager = ask(config(ADAPTIVE, flag=True), additional_attn_cg_support=support)
    assert (manager is None) is (level != "ALWAYS")


@pytest.mark.usefixtures("cuda")
def test_eager() -> None:
    vllm_config = config(ADAPTIVE | {"verification_mode": "host"}, graphs=False)
    assert ask(vllm_config) is None
    manager = create_for_host(runner(vllm_config))
    assert manager is not None
    assert manager.costs is not None
    assert manager.costs._penalty == 1  # no graph to leave


@pytest.mark.usefixtures("cuda")
def test_fixed_gamma_leaves_graphs_as_they_are() -> None:
    """A manager comes afterwards all the same, for requests that ask for less."""
    vllm_config = config({"verification": "all"})
    assert ask(vllm_config) is None
    manager = create_for_host(runner(vllm_config))
    assert manager is not None
    assert type(manager.policy) is FixedPolicy
    assert manager.costs is manager.arrivals is None


@pytest.mark.usefixtures("cuda")
def test_depth_that_follows_the_load_needs_graphs_of_mixed_lengths() -> None:
    """Even where all drafts are verified: how many there are changes. Prices come with it, since
    the scheduler chooses by them."""
    vllm_config = config({"verification": "all"}, scheduler=SCHEDULERS[True])
    manager = ask(vllm_config)
    assert type(manager) is HostVerification
    assert type(manager.policy) is FixedPolicy
    assert manager.costs is not None
    assert not manager.costs.learns  # from what the scheduler says alone
    assert ask(config({"verification": "all", "depth": 2}, scheduler=SCHEDULERS[True])) is None


@pytest.mark.usefixtures("cuda")
def test_depth_where_graphs_want_equal_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs stay what they would be without us."""
    needs_whole_batches(monkeypatch)
    assert ask(config({"verification": "all"}, scheduler=SCHEDULERS[True])) is None


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("scheduler", [None, SCHEDULERS[True]])
def test_times_are_taken_where_they_are_used(scheduler: str | None) -> None:
    """Without our scheduler a rank alone learns from its own clock; with it, from the plan."""
    manager = ask(config(ADAPTIVE, flag=True, scheduler=scheduler))
    assert manager is not None
    assert manager.costs is not None
    assert manager.costs.learns == (scheduler is None)


@pytest.mark.usefixtures("cuda")
def test_no_manager_where_nothing_can_be_trimmed() -> None:
    assert create_for_host(runner(config({"verification": "all"}, pipeline=2))) is None


@pytest.mark.usefixtures("cuda")
def test_reason_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[str, str]] = []
    monkeypatch.setattr(create, "_log", lambda *line: logged.append(line))
    ask(config(ADAPTIVE, flag=True))
    ask(config(ADAPTIVE | {"verification_mode": "host"}))
    ask(config(ADAPTIVE | {"verification_mode": "host"}, lora=object()))
    needs_whole_batches(monkeypatch)
    ask(config(ADAPTIVE, flag=True))
    assert logged == [
        ("device", "the attention backends take query lengths from the device"),
        ("host", "asked for"),
        ("host", "tokens are mapped to LoRA adapters on the host"),
        ("host", "FA2 cannot replay batches of mixed lengths"),
    ]
