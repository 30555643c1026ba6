"""The drafter in FP8, while its target stays as it is.

At few requests a drafter costs what it takes to read its weights, at many what its products take;
FP8 halves both. The block pass and a copy of the LM head that drafts alone are drawn from run in
it, by vLLM's own online quantization: weights with a scale per output channel, activations with one
per token. So does the Markov head's larger table where our kernels draw from all words. Context K/V
and the confidence head keep the checkpoint's numbers.

Drafts are drawn from slightly other distributions then. Verification goes by those, so what is
emitted is the target's own as before.
"""

from __future__ import annotations

from typing import Any

import torch
from packaging.version import Version

from vllm_dspark.checkpoint import DrafterSpec
from vllm_dspark.compat import require_supported_vllm
from vllm_dspark.config import DSparkConfig
from vllm_dspark.integration.chosen import like_measured, no_carrier, record, refusal

_SINCE = Version("0.33")  # of vLLM, which quantizes copies of an LM head
_FP8 = (8, 9)  # compute capability of the first CUDA devices with FP8 products


def settle_quantization(vllm_config: Any, config: DSparkConfig, spec: DrafterSpec | None) -> str:
    """Write what was chosen into the configuration that travels to every process.

    Args:
        spec: of the drafter; None for one that vLLM runs with code of its own.

    Returns:
        The choice, "fp8" or "none".

    Raises:
        DSparkConfigError: FP8 was asked for and cannot be.
    """
    asked = config.draft_quantization
    problem = None if asked == "none" else obstacle(vllm_config, spec)
    if asked == "fp8" and problem is not None:
        raise refusal("draft_quantization", asked, problem)
    wanted = asked == "fp8" or (asked == "auto" and problem is None and like_measured(vllm_config))
    chosen = "fp8" if wanted else "none"
    record(vllm_config, draft_quantization=chosen)
    return chosen


def obstacle(vllm_config: Any, spec: DrafterSpec | None) -> str | None:
    """Why a drafter cannot run in FP8; None if it can."""
    import vllm.envs as envs
    from vllm.platforms import current_platform

    found = require_supported_vllm()
    if found < _SINCE:
        return f"vLLM {found} has no FP8 copies of an LM head, needed is {_SINCE}"
    if not (current_platform.is_cuda() and current_platform.has_device_capability(_FP8)):
        return "the device has no FP8 products, needed is CUDA's compute capability 8.9 or more"
    if spec is None or spec.family != "qwen3":
        kind = "vLLM's own code runs this drafter" if spec is None else f"it is a {spec.family} one"
        return f"{kind}, needed is a qwen3 drafter"
    draft = vllm_config.speculative_config.draft_model_config
    if spec.quantized or draft.quantization is not None:
        return "the drafter's weights are quantized already"
    if draft.dtype not in (torch.bfloat16, torch.float16) or draft.head_dtype != draft.dtype:
        dtypes = f"{draft.dtype} and its LM head {draft.head_dtype}"
        return f"the drafter computes in {dtypes}, needed is bfloat16 or float16 for both"
    if envs.VLLM_BATCH_INVARIANT:
        return "batch invariance was asked for, which FP8 products do not keep"
    return no_carrier(vllm_config)


@torch.no_grad()
def quantize_drafter(model: Any) -> None:
    """Turn a loaded drafter's block pass and its LM head into FP8.

    An LM head that is the target's stays the target's; the drafter gets a copy, unless the target's
    is quantized already.

    Args:
        model: one of our model classes, with unquantized weights. Its `fc`, and the K/V projections
            that it keeps apart for context, stay as they are.
    """
    from vllm.logger import init_logger
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization.online.lm_head import quantized_lm_head_copy
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.utils.torch_utils import set_default_torch_dtype

    products = [
        layer
        for layer in model.model.layers.modules()
        if isinstance(layer, LinearBase) and isinstance(layer.quant_method, UnquantizedLinearMethod)
    ]
    dtype, before = products[0].weight.dtype, sum(layer.weight.nbytes for layer in products)
    with set_default_torch_dtype(dtype):  # in which FP8 products end
        for layer in products:
            _quantize(layer)
    saved = before - sum(layer.weight.nbytes for layer in products)
    plain = isinstance(model.lm_head.quant_method, UnquantizedEmbeddingMethod)
    copied = 0
    if plain and model.lm_head.weight.dtype == dtype:
        head = quantized_lm_head_copy(model.lm_head, "fp8")
        del model.lm_head
        model.lm_head = head
        copied = head.weight.nbytes
    init_logger("vllm.dspark").info(
        "vllm-dspark: %d products of the drafter run in FP8, which takes %.0f MiB less, and a copy "
        "of the LM head, %.0f MiB",
        len(products),
        saved / (1 << 20),
        copied / (1 << 20),
    )


def _quantize(layer: Any) -> None:
    """What vLLM does with a layer that it quantizes while it loads it."""
    from vllm.model_executor.layers.quantization.online.fp8 import Fp8PtpcOnlineLinearMethod
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    weight = layer.weight
    outputs, inputs = weight.shape
    method = Fp8PtpcOnlineLinearMethod()
    method.create_weights(
        layer,
        inputs,
        [outputs],
        layer.input_size,
        layer.output_size,
        weight.dtype,
        weight_loader=weight.weight_loader,
    )
    layer.weight = torch.nn.Parameter(weight.data, requires_grad=False)
    layer.quant_method = method
    method.process_weights_after_loading(layer)
    get_layerwise_info(layer).reset()  # it is not waiting for weights
