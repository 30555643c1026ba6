"""The entry point that vLLM calls in every process: front end, engine core, workers."""

from __future__ import annotations


def register() -> None:
    """Open the request seams. Cheap, re-entrant, imports no CUDA.

    On a vLLM out of the supported range nothing is touched but the one seam that lets a
    request for DSpark fail with the reason; every other use of that vLLM goes on as before.
    """
    from vllm_dspark import compat, cpu
    from vllm_dspark.integration import seams

    try:
        compat.require_supported_vllm()
    except compat.IncompatibleVllmError as error:
        seams.refuse_requests(error)
        return
    seams.open_request_seams()
    if cpu.is_active():
        from vllm_dspark.cpu.repairs import repair_interpreter

        repair_interpreter()
        seams.open_interpreter_seams()
