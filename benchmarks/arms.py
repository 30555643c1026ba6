"""The arms of a sweep: what each one asks of the engine, and nothing else that differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.results_format import Kind

GAMMAS = (1, 2, 3, 5, 7)
NO_SPECULATION = "no speculation"
INTERVAL = 4  # steps, of which one may prefill
NO_SPECULATION_INTERVAL = f"no speculation (prefills every {INTERVAL}th step)"
BUILT_IN = "built-in adaptive"
BUILT_IN_NEAR = "built-in adaptive (near context)"
OURS = "vllm-dspark"

_PLUGIN_OFF = {"dspark": {"enabled": False}}


@dataclass(frozen=True)
class ArmSpec:
    """One configuration of the engine.

    Attributes:
        kind: who decides how many drafts are verified.
        gamma: drafts a round at most, None without a drafter.
        speculative: fields of the speculative config, None for no speculation.
        additional: `additional_config`.
        env: environment variables that only this arm has.
        engine: arguments of the engine that only this arm has.
    """

    name: str
    kind: Kind
    gamma: int | None = None
    speculative: dict[str, Any] | None = None
    additional: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)

    def options(self) -> dict[str, Any]:
        """What defines the arm, for the record, which names no folder of a machine."""
        speculative = dict(self.speculative) if self.speculative is not None else None
        if speculative and Path(speculative.get("model", "")).is_dir():
            speculative["model"] = Path(speculative["model"]).name
        engine = {"engine": self.engine} if self.engine else {}
        return {
            "speculative_config": speculative,
            "additional_config": self.additional,
            "env": self.env,
        } | engine


def standard_arms(
    drafter: str | None,
    drafting: str,
    gammas: Sequence[int] = GAMMAS,
    block: int | None = None,
    near_context: int = 256,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, ArmSpec]:
    """All peers by name: no speculation twice, fixed γ, vLLM's adaptive mode twice, ours, and
    variants of ours.

    The second without speculation leaves most steps without a prefill, by an option of vLLM's.

    Fixed γ and both adaptive arms are vLLM's built-in DSpark with the plugin turned off.

    Args:
        drafter: path or hub id; None lets the plugin find it, which only our arm can do.
        drafting: `draft_sample_method`.
        gammas: fixed settings.
        block: γ of the adaptive arms and of ours, the largest of `gammas` if None.
        near_context: context length, in tokens, at which the second adaptive arm profiles its
            costs; the first one profiles where vLLM does by default.
        variants: name → `additional_config["dspark"]` of further arms of ours, and with it
            `speculative_config`, where theirs differs from that of ours.
    """
    block = max(gammas) if block is None else block
    model = {} if drafter is None else {"model": drafter}

    def built_in(gamma: int, **changes: Any) -> dict[str, Any]:
        config = {"method": "dspark", "num_speculative_tokens": gamma}
        return config | {"draft_sample_method": drafting} | model | changes

    adaptive = built_in(block, enable_adaptive_verification=True)
    near = {"VLLM_ADAPTIVE_VERIFICATION_PROFILE_CONTEXT_LEN": str(near_context)}
    interval = {"prefill_schedule_interval": INTERVAL}
    arms = [
        ArmSpec(NO_SPECULATION, "none"),
        ArmSpec(NO_SPECULATION_INTERVAL, "none", engine=interval),
    ]
    arms += [
        ArmSpec(f"fixed {gamma}", "fixed", gamma, built_in(gamma), _PLUGIN_OFF) for gamma in gammas
    ]
    arms += [
        ArmSpec(BUILT_IN, "built-in adaptive", block, adaptive, _PLUGIN_OFF),
        ArmSpec(BUILT_IN_NEAR, "built-in adaptive", block, adaptive, _PLUGIN_OFF, near),
        ArmSpec(OURS, "ours", block, built_in(block)),
    ]
    for name, given in (variants or {}).items():
        options = dict(given)
        speculative = built_in(block) | options.pop("speculative_config", {})
        arms.append(ArmSpec(name, "ours", block, speculative, {"dspark": options}))
    return {arm.name: arm for arm in arms}
