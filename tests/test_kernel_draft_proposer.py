"""The proposer with our kernels: which draw when, and the same drafts as without."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.kernel_cases import NAN
from tests.test_proposer import VOCAB, make_model, make_proposer
from vllm_dspark.config import DSparkConfig
from vllm_dspark.integration import draft_kernels as module
from vllm_dspark.integration.draft_kernels import draft_kernels
from vllm_dspark.kernels import dispatch
from vllm_dspark.kernels.dispatch import choose

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the proposer here is on the CPU")


def prepared(head_type: str, option: Any = "triton", **options: Any) -> tuple[Any, torch.Tensor]:
    """A bare proposer in float32 with all that choosing the kernels reads."""
    proposer, hidden = make_proposer(make_model(head_type, **options).float(), 3, 4, 4)
    proposer.dspark_config = DSparkConfig(kernels=option)
    proposer.max_num_reqs = 10
    proposer.draft_watermarker = None
    proposer.use_fp64_gumbel = False
    proposer.speculative_config = SimpleNamespace(rejection_sample_method="standard")
    proposer.temperature = torch.ones(10)
    proposer.seeds = torch.arange(10)
    return proposer, hidden.float()


@pytest.mark.parametrize("probabilistic", [False, True])
@pytest.mark.parametrize("words", [VOCAB, 9])
@pytest.mark.parametrize("head_type", ["vanilla", "gated", "rnn"])
def test_drafts_are_the_references(head_type: str, words: int, probabilistic: bool) -> None:
    """Tokens, confidences and cached logits, with the whole vocabulary and a reduced one."""
    results = []
    for option in ("reference", "triton"):
        proposer, hidden = prepared(head_type, option, words=words)
        if probabilistic:
            proposer.draft_logits = torch.full((10, 4, VOCAB), NAN)
            proposer._d2t_scatter_index = None
            if words < VOCAB:
                proposer._d2t_scatter_index = 2 * torch.arange(words)
                proposer._draft_scatter_buf = torch.full((10, VOCAB), -torch.inf)
        proposer.kernels = draft_kernels(proposer)
        assert (proposer.kernels is not None) == (option == "triton")
        proposer._sample_sequential(3, hidden)
        assert bool(proposer.seen) == (option == "reference")  # which of the two really ran
        logits = None if proposer.draft_logits is None else proposer.draft_logits[:3]
        results.append((proposer.draft_tokens, proposer.draft_token_confidence_probs, logits))
    (tokens, confidences, logits), (ours, our_confidences, our_logits) = results
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(our_confidences, confidences)
    if logits is not None:
        assert our_logits is not None
        torch.testing.assert_close(our_logits, logits)


def test_depth_below_gamma() -> None:
    """Two of four drafts: the other columns are left alone."""
    proposer, hidden = prepared("rnn")
    proposer.kernels = draft_kernels(proposer)
    proposer.drawn = 2
    untouched = proposer.draft_tokens.clone()
    proposer._sample_sequential(3, hidden)
    assert torch.equal(proposer.draft_tokens[:, 2:], untouched[:, 2:])
    assert (proposer.draft_tokens[:3, :2] != untouched[:3, :2]).all()


@pytest.mark.parametrize("option", ["reference", "triton"])
def test_two_blocks_share_no_noise(option: str) -> None:
    """Two blocks of a request, the second one token further, at a temperature where noise alone
    decides. On vLLM 0.32 the second draft of one and the first of the next, at the same position,
    were the same word: what is drafted was known to the confidences of the block before, which say
    how much of it is verified."""
    alike = []
    for first in range(0, 200, 10):
        blocks = []
        for further in (0, 1):
            proposer, hidden = prepared("vanilla", option)
            proposer.draft_logits = torch.full((10, 4, VOCAB), NAN)
            proposer._d2t_scatter_index = None
            proposer.kernels = draft_kernels(proposer)
            proposer.temperature = torch.full((10,), 1e6)
            proposer.seeds = torch.arange(first, first + 10)
            proposer.sample_pos = proposer.sample_pos + further
            proposer._sample_sequential(3, hidden)
            blocks.append(proposer.draft_tokens[:3].clone())
        alike.append(blocks[0][:, 1:] == blocks[1][:, :-1])
    share = torch.stack(alike).double().mean()  # of 180
    assert abs(share - 1 / VOCAB) < 5 * (1 / VOCAB / 180) ** 0.5


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"peak_confidence": True}, "no confidence head"),
        ({"draft_watermarker": object()}, "watermarked"),
        ({"draft_logits": torch.empty(0), "use_fp64_gumbel": True}, "float64"),
    ],
    ids=["peak", "watermark", "fp64"],
)
def test_what_the_kernels_cannot_do_is_left_to_the_reference(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], why: str
) -> None:
    said: list[Any] = []
    monkeypatch.setattr(module, "_log", said.append)
    proposer, _ = prepared("vanilla")
    proposer.__dict__.update(changes)
    assert draft_kernels(proposer) is None
    assert why in said[0].why


def test_weights_that_the_kernels_do_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr(module, "_log", said.append)
    proposer, _ = prepared("vanilla")
    proposer.model.double()
    assert draft_kernels(proposer) is None
    proposer.model.float().sequential_head.markov_w1.double()
    assert draft_kernels(proposer) is None
    proposer.model.sequential_head = None
    assert draft_kernels(proposer) is None
    reasons = [choice.why.split("but ")[1] for choice in said]
    assert reasons[0] == "weights are torch.float64"
    assert reasons[1] == "the Markov head's tables are torch.float64 and torch.float32"
    assert reasons[2] == "vLLM's own head draws this drafter's tokens"


@pytest.mark.parametrize(
    ("option", "variable", "obstacle", "triton"),
    [
        ("auto", "", None, False),
        ("triton", "", None, True),
        ("reference", "", None, False),
        ("triton", "", "an obstacle", False),
        ("triton", "reference", None, False),
        ("reference", "triton", None, True),
        ("triton", "auto", None, False),
    ],
)
def test_choice(option: str, variable: str, obstacle: str | None, triton: bool) -> None:
    """The variable wins over the option; the reason names which of them, or the obstacle."""
    choice = choose(option, {"DSPARK_KERNELS": variable}, obstacle)
    assert choice.triton is triton
    assert (f"DSPARK_KERNELS is {variable}" if variable else f'kernels is "{option}"') in choice.why
    if obstacle:
        assert obstacle in choice.why


@pytest.mark.parametrize(
    ("option", "obstacle", "triton"),
    [("auto", None, True), ("auto", "an obstacle", False), ("reference", None, False)],
)
def test_choice_where_ours_are_faster(option: str, obstacle: str | None, triton: bool) -> None:
    assert choose(option, {}, obstacle, faster=True).triton is triton


def test_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="DSPARK_KERNELS is 'cuda', known are 'auto'"):
        choose("auto", {"DSPARK_KERNELS": "cuda"}, None)


def test_rocm_is_none_of_the_devices_that_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch calls it cuda, and some of its GPUs have a capability of 9 too."""
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    assert dispatch.is_measured(device)
    assert dispatch.device_obstacle(device, torch.bfloat16) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not dispatch.is_measured(device)
    assert "ROCm" in str(dispatch.device_obstacle(device, torch.bfloat16))
