"""vLLM's DSpark drafter models with our Markov heads and a strict loader.

The backbones are inherited. vLLM's own classes know the vanilla head only, and accept
checkpoints whose heads are not what their config says; these do neither. For Gemma4 they also
leave the soft cap to the base logits: the published model adds the Markov bias after the cap
(DeepSpec, `Gemma4DSparkModel.compute_logits`), vLLM caps the bias too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.gemma4_dspark import Gemma4DSparkForCausalLM
from vllm.model_executor.models.qwen3_dspark import Qwen3DSparkForCausalLM
from vllm.model_executor.models.registry import ModelRegistry

from vllm_dspark.checkpoint import DrafterMismatchError, DrafterSpec
from vllm_dspark.heads import MarkovHead, build_markov_head
from vllm_dspark.integration.drafter_config import read_spec
from vllm_dspark.weights import weight_problems

_HEAD = "markov_head."


class _OurHeads:
    """What both drafter models share: the Markov head and the loader."""

    model: Any
    config: Any
    draft_model_config: Any
    sequential_head: MarkovHead | None
    spec: DrafterSpec

    def install_head(self) -> None:
        """Put our Markov head in the place of vLLM's, unless the checkpoint needs vLLM's own
        (quantized weights, or vLLM's candidate drafting), which knows the vanilla head only.

        Raises:
            DrafterMismatchError: another head is asked for together with one of those.
        """
        name = self.draft_model_config.model
        spec = read_spec(self.draft_model_config)
        assert spec is not None, "our_architecture() and drafter_spec() must agree"
        self.spec = spec
        self.sequential_head = None
        topk = getattr(self.config, "dspark_draft_topk", None)
        if spec.quantized or topk is not None:
            if spec.head_type != "vanilla":
                why = "its weights are quantized" if spec.quantized else "dspark_draft_topk is set"
                raise DrafterMismatchError(
                    name, [f"{why}, which works with the vanilla head only, not {spec.head_type}"]
                )
            return
        del self.model.markov_head  # free its weights before ours are allocated
        self.model.markov_head = self.sequential_head = build_markov_head(
            spec.head_type,
            vocab_size=spec.vocab_size,
            draft_vocab_size=spec.draft_vocab_size,
            rank=spec.rank,
            hidden_size=spec.hidden_size,
        ).requires_grad_(False)

    def load_checked(
        self, weights: Iterable[tuple[str, torch.Tensor]], load: Any
    ) -> set[str] | None:
        """Load our head here, everything else through `load`, and compare what came with what
        the config announces.

        Raises:
            DrafterMismatchError: listing weights that are missing, extra or of another shape.
        """
        seen: dict[str, tuple[int, ...] | None] = {}
        ours: dict[str, torch.Tensor] = {}

        def others() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                seen[name] = tuple(tensor.shape)
                if self.sequential_head is not None and name.startswith(_HEAD):
                    # vLLM's loader would take gate_proj for a part of an MLP.
                    ours[name.removeprefix(_HEAD)] = tensor
                else:
                    yield name, tensor

        loaded = load(others())
        if problems := weight_problems(self.spec, seen):
            raise DrafterMismatchError(self.draft_model_config.model, problems)
        if self.sequential_head is not None:
            self.sequential_head.load_state_dict(ours)
            if loaded is not None:
                loaded |= {f"model.{_HEAD}{name}" for name in ours}
        return loaded


class DSparkQwen3ForCausalLM(_OurHeads, Qwen3DSparkForCausalLM):
    """Qwen3 drafter, DeepSpec or speculators format."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        Qwen3DSparkForCausalLM.__init__(self, vllm_config=vllm_config, prefix=prefix)
        self.install_head()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """See `load_checked`."""
        return self.load_checked(weights, super().load_weights)


class DSparkGemma4ForCausalLM(_OurHeads, Gemma4DSparkForCausalLM):
    """Gemma4 drafter, with its own embedding and LM head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        # vLLM registers attention layers by name, and a text-only Gemma4 target uses these too.
        Gemma4DSparkForCausalLM.__init__(self, vllm_config=vllm_config, prefix=prefix or "dspark")
        self.install_head()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """See `load_checked`."""
        return self.load_checked(weights, super().load_weights)


_OURS: dict[str, str] = {
    "Qwen3DSparkModel": DSparkQwen3ForCausalLM.__name__,
    "Qwen3OmniDSparkModel": DSparkQwen3ForCausalLM.__name__,
    "Gemma4DSparkModel": DSparkGemma4ForCausalLM.__name__,
}


@contextmanager
def our_architecture(draft_model_config: Any) -> Iterator[None]:
    """While active, the drafter's config names our model class, if there is one for it."""
    config = draft_model_config.hf_config
    architectures = config.architectures
    ours = next((_OURS[a] for a in architectures if a in _OURS), None)
    if ours is None:
        yield
        return
    if ours not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ours, f"{__name__}:{ours}")
    config.architectures = [ours]
    try:
        yield
    finally:
        config.architectures = architectures
