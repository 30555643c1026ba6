"""Compiler half of the backend: there is nothing to compile under the interpreter."""

from typing import Any

from triton.backends.compiler import BaseBackend

_MESSAGE = "the interpreter backend compiles nothing: set TRITON_INTERPRET=1 before triton loads"


class InterpreterBackend(BaseBackend):
    """Refuses every target, so Triton never tries to compile for it."""

    @staticmethod
    def supports_target(target: Any) -> bool:
        return False

    def hash(self) -> str:
        return "dspark-interpreter-1"

    def parse_options(self, options: dict) -> object:
        raise NotImplementedError(_MESSAGE)

    def add_stages(self, stages: dict, options: object, language: Any = None) -> None:
        raise NotImplementedError(_MESSAGE)

    def load_dialects(self, context: Any) -> None:
        raise NotImplementedError(_MESSAGE)

    def get_module_map(self) -> dict:
        return {}
