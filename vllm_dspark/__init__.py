"""DSpark speculative decoding for vLLM, as a plugin.

Importing this package touches neither vLLM nor CUDA. The pieces:

    plugin        entry point that vLLM calls in every process
    config        `additional_config["dspark"]`, one pydantic model
    drafters      from `--speculative-config dspark` to a drafter checkpoint
    checkpoint    what a drafter is and whether it fits its target
    weights       which weights it must hold
    heads         Markov and confidence heads
    scheduler     how many drafts to verify, and whose (pure)
    calibration   making confidences honest (pure)
    server        one `vllm serve` process, from start to certain end
    integration   the only place that knows vLLM's internals
    cpu           running without a GPU, opt-in
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vllm-dspark")
except PackageNotFoundError:  # a source tree that was put on the path, not installed
    __version__ = "0+uninstalled"
