"""A request's own options: which are taken, and how others are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_dspark.integration.requests import RequestFacts, RequestOptionError, check_options
from vllm_dspark.plugin import register

GAMMA = 5
WRONG: list[Any] = [-1, 6, 2.0, "2", True, False, None, [3]]


@pytest.mark.parametrize("value", range(GAMMA + 1))
def test_whole_numbers_up_to_gamma_pass(value: int) -> None:
    check_options({"dspark_max_verified": value}, GAMMA)


@pytest.mark.parametrize("extra_args", [None, {}, {"other": "x", "kv_transfer_params": {}}])
def test_options_of_others_are_left_alone(extra_args: Any) -> None:
    check_options(extra_args, GAMMA)


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_everything_else_is_refused(value: Any) -> None:
    with pytest.raises(RequestOptionError) as caught:
        check_options({"other": 1, "dspark_max_verified": value}, GAMMA)
    assert str(caught.value).startswith(f"dspark_max_verified is {value!r}; needed is a whole")
    assert "0 to 5" in str(caught.value)
    assert (caught.value.option, caught.value.value) == ("dspark_max_verified", value)


@pytest.mark.parametrize("name", ["dspark_max_verify", "dspark-max-verified", "dspark", "dspark_x"])
def test_unknown_option_names_the_nearest(name: str) -> None:
    """Ignored, a typo would do nothing and nobody would know."""
    with pytest.raises(RequestOptionError, match=rf"{name!r}.*nearest is 'dspark_max_verified'"):
        check_options({name: 1}, GAMMA)


def params(**changes: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(**changes)


@pytest.mark.parametrize(
    ("sampling_params", "facts"),
    [
        (params(temperature=0.0), RequestFacts()),
        (params(temperature=0.3), RequestFacts(sampled=True)),
        (
            params(temperature=0.0, extra_args={"dspark_max_verified": 0, "other": 4}),
            RequestFacts(max_verified=0),
        ),
        (None, RequestFacts()),
    ],
)
def test_facts(sampling_params: Any, facts: RequestFacts) -> None:
    """0 is a limit, not the absence of one."""
    assert RequestFacts.of(sampling_params) == facts


def test_grammar_is_a_fact() -> None:
    from vllm.sampling_params import StructuredOutputsParams

    constrained = params(temperature=0.0, structured_outputs=StructuredOutputsParams(regex="a+"))
    assert RequestFacts.of(constrained) == RequestFacts(constrained=True)


def validate(extra_args: Any, method: str | None) -> None:
    """vLLM's own check of a request against the engine's speculation."""
    register()
    config = None
    if method is not None:
        config = SimpleNamespace(method=method, num_speculative_tokens=GAMMA)
    params(extra_args=extra_args)._validate_spec_decode(config)


def test_vllm_refuses_in_the_front_end() -> None:
    """As an error of the client's, which the server answers with 400."""
    from vllm.exceptions import VLLMClientError

    with pytest.raises(VLLMClientError, match="needed is a whole number from 0 to 5"):
        validate({"dspark_max_verified": 6}, "dspark")
    validate({"dspark_max_verified": 5}, "dspark")


@pytest.mark.parametrize("method", ["ngram", None])
def test_without_dspark_nobody_looks(method: str | None) -> None:
    validate({"dspark_max_verified": "whatever"}, method)
