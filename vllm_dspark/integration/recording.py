"""Recording verified rounds inside a worker, for offline calibration.

`RoundRecorder` is mixed into the worker through vLLM's `worker_extension_cls`; its methods are
called by `collective_rpc`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_dspark.calibration.artifact import Sampling
from vllm_dspark.scheduler.verification import VerificationPolicy


class NotRecordableError(RuntimeError):
    """The engine does not verify adaptively, so it has no confidences to record."""


class _Recording:
    """Stands in for the calibrator: changes nothing and writes down what it is taught."""

    def __init__(self) -> None:
        self.rounds: list[tuple[npt.NDArray[Any], ...]] = []

    def observe(
        self,
        confidence: Any,
        accepted: Any,
        verified: Any,
        sampled: Any,
        learn: Any = None,
        request: Any = None,
    ) -> None:
        """Keep the rounds that may teach."""
        kept = np.flatnonzero(learn)
        columns = (confidence, accepted, verified, request)
        self.rounds.append(tuple(np.asarray(column)[kept] for column in columns))

    def calibrate(self, confidence: Any, sampled: Any) -> npt.NDArray[np.float64]:
        """As they are; a half for what is not known."""
        return np.nan_to_num(np.asarray(confidence, dtype=np.float64), nan=0.5).clip(1e-5, 1)


class _NoCosts:
    """Drafts are free, so all of them are verified."""

    def budget_curve(self, *shape: int) -> npt.NDArray[np.float64]:
        """[drafts + 1] ones; `drafts` comes last."""
        return np.ones(shape[-1] + 1)


class RoundRecorder:
    """Worker extension."""

    model_runner: Any

    def record_rounds(self) -> None:
        """From now on verify every draft, and write down what became of it.

        Raises:
            NotRecordableError: see there.
        """
        manager = self.model_runner.adaptive_verification
        policy = getattr(manager, "policy", None)
        if not isinstance(policy, VerificationPolicy):
            raise NotRecordableError(
                "this engine verifies a fixed number of drafts, so there are no confidences to "
                "record. Needed is a drafter with a confidence head and an engine on which "
                "vllm-dspark verifies adaptively; its start-up line says why it does not."
            )
        self._recording = policy.calibrator = _Recording()
        policy.costs = _NoCosts()

    def recorded_rounds(self) -> dict[str, list[Any]]:
        """What was recorded so far, as lists that travel between processes.

        Returns:
            confidence [N][γ], accepted [N], verified [N], request [N] (a number of its own for
            each request).
        """
        names = ("confidence", "accepted", "verified", "request")
        rounds = self._recording.rounds
        return {
            name: np.concatenate([r[i] for r in rounds]).tolist() if rounds else []
            for i, name in enumerate(names)
        }


def record(
    target: str,
    drafter: str,
    prompts: Sequence[str],
    sampling: Sampling,
    max_tokens: int,
    engine: Mapping[str, Any] | None,
    chat: bool,
) -> tuple[dict[str, list[Any]], str]:
    """Generate for all prompts in an engine of its own, and take down every round.

    Args:
        target, drafter: folders.
        max_tokens: of each request.
        engine: further arguments of `LLM`.
        chat: put the target's chat template, if it has one, around the prompts.

    Returns:
        What `RoundRecorder.recorded_rounds` returns, and the engine's dtype, such as "bfloat16".

    Raises:
        NotRecordableError: see there.
        ValueError: whatever vLLM or the drafter's checks refuse.
    """
    from vllm import LLM, SamplingParams

    llm = LLM(
        target,
        speculative_config={
            "method": "dspark",
            "model": drafter,
            "draft_sample_method": sampling.drafting,
        },
        additional_config={
            "dspark": {"verification": "adaptive", "goal": "latency", "calibration": "off"}
        },
        worker_extension_cls=f"{__name__}.{RoundRecorder.__name__}",
        **(engine or {}),
    )
    try:
        llm.collective_rpc("record_rounds")
        params = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=max_tokens,
                seed=i,
            )
            for i in range(len(prompts))
        ]
        llm.generate(_texts(llm.get_tokenizer(), prompts, chat), params)
        dtype = str(llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch.")
        return llm.collective_rpc("recorded_rounds")[0], dtype
    finally:
        llm.llm_engine.engine_core.shutdown()


def _texts(tokenizer: Any, prompts: Sequence[str], chat: bool) -> list[str]:
    if not chat or not getattr(tokenizer, "chat_template", None):
        return list(prompts)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        for text in prompts
    ]
