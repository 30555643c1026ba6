"""The request seams on vLLM's command line and engine arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_dspark import drafters
from vllm_dspark.checkpoint import (
    DrafterMismatchError,
    DrafterSpec,
    TargetShape,
    drafter_spec,
    pair_problems,
)
from vllm_dspark.compat import require_supported_vllm
from vllm_dspark.config import DSparkConfig, DSparkConfigError
from vllm_dspark.integration.drafter_config import read_config
from vllm_dspark.integration.platform import has_triton
from vllm_dspark.integration.rejection_method import with_method
from vllm_dspark.weights import read_headers, weight_problems

_HELP = (
    " vllm-dspark: the bare word dspark finds the drafter for the model; dspark:PATH_OR_ID "
    "names it."
)


def wrap_add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """--speculative-config accepts the bare word besides JSON."""

    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        for action in parser._actions:
            if "--speculative-config" in action.option_strings:
                action.type = _bare_word_or(action.type)
                action.help = (action.help or "") + _HELP
        return parser

    return add_cli_args


def _bare_word_or(parse_json: Callable[[str], Any]) -> Callable[[str], Any]:
    def speculative_config(text: str) -> Any:
        try:
            bare_word = drafters.parse_bare_word(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return parse_json(text) if bare_word is None else bare_word

    return speculative_config


def wrap_create_speculative_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Complete and check a request for DSpark before vLLM builds its config from it."""

    def create_speculative_config(
        self: Any, target_model_config: Any, target_parallel_config: Any
    ) -> Any:
        asked = _requested_config(self)
        if asked is not None:
            require_supported_vllm()
            config = DSparkConfig.from_additional_config(self.additional_config)
            config.check_against(
                adaptive_verification=bool(asked.get("enable_adaptive_verification"))
            )
            if config.enabled:
                _require_v2_runner()
            if asked.get("enable_adaptive_verification") is False and config.verification == "auto":
                # Said, not left out, which the finished config no longer tells apart.
                given = dict(self.additional_config or {})
                given["dspark"] = {**given.get("dspark", {}), "verification": "all"}
                self.additional_config = given
            complete = _complete(asked, target_model_config, config)
            watermarked = self.watermark_config is not None
            self.speculative_config = with_method(complete, config, watermarked)
            self.spec_method = self.spec_model = self.spec_tokens = None
        return original(self, target_model_config, target_parallel_config)

    return create_speculative_config


def _requested_config(engine_args: Any) -> dict[str, Any] | None:
    """The speculative config that was asked for, if it asks for DSpark.

    vLLM also has one flag a field (--spec-method and so on) and finds the method by the
    drafter's name; both are followed here.
    """
    given = engine_args.speculative_config
    if isinstance(given, str):
        given = drafters.parse_bare_word(given)
        if given is None:
            raise DSparkConfigError(
                f"speculative_config is {engine_args.speculative_config!r}; needed is an object, "
                "'dspark' or 'dspark:PATH_OR_ID'."
            )
    asked = {key.replace("-", "_"): value for key, value in (given or {}).items()}
    for key, value in (
        ("method", engine_args.spec_method),
        ("model", engine_args.spec_model),
        ("num_speculative_tokens", engine_args.spec_tokens),
    ):
        if value is not None:
            if key in asked:
                return None  # vLLM's own error names the two flags
            asked[key] = value
    if asked.get("method") == "dspark":
        return asked
    if "method" not in asked and _names_a_drafter(asked.get("model"), asked.get("revision")):
        return asked | {"method": "dspark"}
    return None


def _names_a_drafter(model: Any, revision: str | None) -> bool:
    """Whether a model that was given without a method is a DSpark drafter. A name that cannot
    be read is none; whatever is wrong with it is vLLM's to say."""
    if not isinstance(model, str) or "/" not in model:
        return False  # ngram and other words that are no checkpoints
    try:
        return drafters.is_drafter_config(read_config(model, revision))
    except DrafterMismatchError:
        return False


def _complete(asked: dict[str, Any], target: Any, config: DSparkConfig) -> dict[str, Any]:
    """Fill in drafter and γ, and refuse a drafter that does not fit.

    Args:
        asked: speculative config with method dspark.
        target: vLLM's ModelConfig of the target.

    Raises:
        UnknownDrafterError, DrafterMismatchError, DSparkConfigError.
    """
    if not asked.get("model"):
        target_config = target.hf_config.to_dict()
        asked = asked | {"model": drafters.find_drafter(target.model, target_config)}
    drafter = asked["model"]
    found = read_config(drafter, asked.get("revision"))
    if not drafters.is_drafter_config(found) and not drafters.carries_own_drafter(found):
        architectures = found.get("architectures")
        raise DrafterMismatchError(
            drafter, [f"its config.json names architectures {architectures}, none is DSpark's"]
        )
    spec = drafter_spec(drafter, found)
    if spec is None:
        return asked
    tokens = asked.get("num_speculative_tokens")
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int)):
        raise DSparkConfigError(
            f"num_speculative_tokens is {tokens!r}; needed is a whole number from 1 to "
            f"{spec.depth}, or nothing for the drafter's own {spec.depth}."
        )
    _check_pair(drafter, spec, target, tokens, config)
    return asked if tokens is not None else asked | {"num_speculative_tokens": spec.depth}


def _check_pair(
    drafter: str, spec: DrafterSpec, target: Any, tokens: int | None, config: DSparkConfig
) -> None:
    shape = TargetShape(
        hidden_size=target.get_hidden_size(),
        vocab_size=target.get_vocab_size(),
        num_layers=target.get_total_num_hidden_layers(),
    )
    problems = pair_problems(spec, shape, tokens)
    if config.check_weights and Path(drafter).is_dir():
        headers = read_headers(Path(drafter))
        problems += [] if headers is None else weight_problems(spec, headers)
    if problems:
        raise DrafterMismatchError(drafter, problems)


def _require_v2_runner() -> None:
    """DSpark lives in vLLM's V2 model runner, which needs Triton."""
    if not has_triton():
        raise DSparkConfigError(
            "DSpark needs vLLM's V2 model runner, which needs Triton, and vLLM found no Triton "
            "backend for this machine. Fix: on a machine without a GPU start the same command "
            "through Triton's interpreter, `vllm-dspark cpu -- vllm serve ...` (slow, for "
            "trials), or in Python call vllm_dspark.cpu.activate() before importing vllm."
        )
