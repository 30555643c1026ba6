"""What an operator can set: `additional_config["dspark"]`."""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError


class DSparkConfigError(ValueError):
    """`additional_config["dspark"]` cannot be used as it stands."""


def _depth(value: Any) -> Any:
    """One error for all that it may be, not one for each."""
    number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if value != "auto" and not number:
        raise PydanticCustomError("depth", 'needed is "auto" or a whole number from 0 to γ')
    return value


CANDIDATES = (16, 32, 64, 128, 256)  # what the kernels take
DEFAULT_CANDIDATES = 256  # no fewer lose less accepted length (benchmarks/candidate_overlap.py)


def _candidates(value: Any) -> Any:
    if value == "auto":
        return DEFAULT_CANDIDATES
    if value is None or (type(value) is int and value in (0, *CANDIDATES)):
        return value or None
    known = ", ".join(map(str, CANDIDATES))
    raise PydanticCustomError("candidates", f'needed is one of {known}, "auto", or 0 for none')


class DSparkConfig(BaseModel):
    """Options of the plugin. γ, the drafter and the drafting mode are vLLM's own options and
    stay in `--speculative-config`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    enabled: bool = Field(
        default=True,
        description="False leaves DSpark to vLLM's built-in implementation.",
    )
    confidence: Literal["auto", "always", "never"] = Field(
        default="auto",
        description=(
            "When the drafter's confidence head is evaluated. auto: when adaptive verification "
            "reads it. always: on every draft. never: not at all."
        ),
    )
    verification: Literal["auto", "adaptive", "all"] = Field(
        default="auto",
        description=(
            "How many drafts are verified. adaptive: those that pay, by confidence and load. all: "
            "every one, γ per request. auto: adaptive where the drafter has a confidence head and "
            "the engine allows it."
        ),
    )
    verification_mode: Literal["auto", "device", "host"] = Field(
        default="auto",
        description=(
            "Where adaptive verification decides whose drafts are verified. device: on the GPU, by "
            "current confidences. host: before the step is launched, works everywhere. auto: "
            "device where it works."
        ),
    )
    profile_context: int = Field(
        default=512,
        ge=1,
        description="Tokens of context per request at which step costs are profiled at start-up.",
    )
    profile: Literal["auto", "always", "skip"] = Field(
        default="auto",
        description=(
            "Whether step costs are profiled at start-up. auto: where an engine like this one was "
            "not profiled before; profiles are kept in a cache. always: anew, and kept. skip: not "
            "at all, costs are guessed and corrected by measured steps."
        ),
    )
    depth: Annotated[Literal["auto"] | int, BeforeValidator(_depth)] = Field(
        default="auto",
        description=(
            "Tokens drafted per request in a step. auto: as many as pay at the load, down to none. "
            "A number, 0 to γ: always that many."
        ),
    )
    draft_block: Literal["depth", "full"] = Field(
        default="depth",
        description=(
            "Positions that the drafter's backbone runs on where fewer than γ tokens are drafted. "
            "depth: those that are drafted. full: all γ."
        ),
    )
    draft_candidates: Annotated[int | None, BeforeValidator(_candidates)] = Field(
        default=None,
        description=(
            "Words that each draft is drawn from: so many with the largest base logits. 16, 32, "
            "64, 128 or 256; auto: 256. Needs our kernels, which then serve unless they are turned "
            "off. None or 0: all words."
        ),
    )
    draft_quantization: Literal["auto", "fp8", "none"] = Field(
        default="auto",
        description=(
            "Numbers that the drafter's block pass and its LM head are computed in. fp8: FP8, from "
            "weights that are quantized while they load. none: the checkpoint's. auto: fp8 where "
            "it was measured to be faster (compute capability 9, one rank) and can be."
        ),
    )
    goal: Literal["throughput", "latency"] = Field(
        default="throughput",
        description=(
            "What the depth is chosen for. throughput: most tokens per second in all. latency: "
            "always γ, as far as there is K/V memory."
        ),
    )
    target_tokens_per_second_per_user: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description=(
            "Tokens per second that each request is to get at least; throughput comes second."
        ),
    )
    calibration: str = Field(
        default="auto",
        min_length=1,
        description=(
            "Temperatures from `vllm-dspark calibrate`. auto: dspark_calibration.json beside the "
            "drafter, if it fits. off: none. Otherwise the path of such a file, which has to fit."
        ),
    )
    kernels: Literal["auto", "reference", "triton"] = Field(
        default="auto",
        description=(
            "What draws and verifies drafts. reference: torch and vLLM's own kernels. triton: our "
            "kernels, where they can. auto: ours where they were measured to be faster, on compute "
            "capability 9, and with draft_candidates. DSPARK_KERNELS overrides it."
        ),
    )
    prefill_graphs: Literal["auto", "full", "piecewise"] = Field(
        default="auto",
        description=(
            "CUDA graphs of steps with a prefill, where decode steps have full ones. full: one for "
            "the whole step. piecewise: vLLM's, with attention launched layer by layer between "
            "them. auto: full where it was measured to be faster (compute capability 9, one rank) "
            "and attention can replay them."
        ),
    )
    check_weights: bool = Field(
        default=True,
        description="Compare a local drafter's weight files with its config before loading.",
    )

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> DSparkConfig:
        """Read the `dspark` entry of vLLM's `additional_config`; absent means all defaults.

        Where it is absent and another entry's name is close to `dspark`, a warning is logged. None
        is an empty object, and an object of another plugin's that has a hash, which vLLM takes
        too, has no entries.

        Raises:
            DSparkConfigError: `additional_config` or its entry is no object, an unknown key (the
                nearest valid one is named) or a value of the wrong type.
        """
        if not isinstance(additional_config, Mapping):
            if additional_config is None or hasattr(additional_config, "compute_hash"):
                return cls()
            raise DSparkConfigError(
                f"additional_config is {additional_config!r}; needed is an object, such as "
                '{"dspark": {"depth": 2}}.'
            )
        if "dspark" not in additional_config:
            near = misspelt(additional_config)
            if near is not None:
                _warn_of(near)
            return cls()
        options = additional_config["dspark"]
        if not isinstance(options, Mapping):
            raise DSparkConfigError(
                f'additional_config["dspark"] is {options!r}; needed is an object with any of '
                f"the keys {_names(cls.model_fields)}."
            )
        try:
            return cls(**options)
        except ValidationError as error:
            problems = "; ".join(_problem(e, cls.model_fields) for e in error.errors())
            raise DSparkConfigError(f'additional_config["dspark"]: {problems}.') from None

    def check_against(self, *, adaptive_verification: bool) -> None:
        """Refuse options that contradict each other.

        Args:
            adaptive_verification: `enable_adaptive_verification` of the speculative config.

        Raises:
            DSparkConfigError: naming both sides.
        """
        flag = "enable_adaptive_verification is true"
        asked = [flag] if adaptive_verification else []
        if self.verification == "adaptive":
            asked.append('verification is "adaptive"')
        elif self.verification == "all":
            if asked:
                raise _contradiction('verification is "all"', flag)
            if self.verification_mode != "auto":
                mode = f'verification_mode is "{self.verification_mode}"'
                raise _contradiction('verification is "all"', f"{mode}, which says how it varies")
        self._check_goals()
        if self.confidence == "never" and asked:
            needs = f"{asked[0]}, which needs the confidence head"
            raise _contradiction('confidence is "never"', needs)

    def _check_goals(self) -> None:
        goals = []
        if self.goal == "latency":
            goals.append('goal is "latency"')
        if self.target_tokens_per_second_per_user is not None:
            goals.append("target_tokens_per_second_per_user is given")
        if len(goals) == 2:
            raise _contradiction(*goals)
        if self.depth != "auto" and goals:
            raise _contradiction(f"depth is {self.depth}", f"{goals[0]}, which chooses it")


def misspelt(keys: Iterable[Any]) -> str | None:
    """The key that was probably meant to be `dspark`, None if none is close to it.

    Keys like no such word are other plugins'.
    """
    folded = {key.lower(): key for key in keys if isinstance(key, str)}
    near = difflib.get_close_matches("dspark", folded, n=1)
    return folded[near[0]] if near else None


@functools.cache  # the options are read in many places of a process
def _warn_of(key: str) -> None:
    logging.getLogger("vllm.dspark").warning(
        "vllm-dspark: additional_config has %r and no 'dspark', so all options are at their "
        "defaults. Fix: 'dspark', if that is what was meant.",
        key,
    )


def _contradiction(one: str, other: str) -> DSparkConfigError:
    return DSparkConfigError(
        f'additional_config["dspark"]: {one}, but {other}. Fix: drop one of the two.'
    )


def _names(keys: Any) -> str:
    return ", ".join(map(repr, keys))


def _problem(error: Any, fields: Mapping[str, Any]) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] != "extra_forbidden":
        return f"{key!r} is {error['input']!r}: {error['msg']}"
    near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
    return f"unknown key {key!r}; nearest is {near[0]!r}, known are {_names(fields)}"
