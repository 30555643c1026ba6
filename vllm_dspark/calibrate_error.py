"""The one error of `vllm-dspark calibrate` itself."""

from __future__ import annotations


class CalibrationError(ValueError):
    """There is nothing to calibrate with; the message says what was found and what is needed."""
