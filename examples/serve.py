"""Serve the shipped pair with DSpark until interrupted: `python -m examples.serve`."""

from __future__ import annotations

import signal
import time
from typing import Annotated

import typer
from rich.console import Console

from examples import shipped
from vllm_dspark.server import ServerError, VllmServer

_TRY = """curl {url}/v1/completions -H 'Content-Type: application/json' -d '{{
  "model": "{model}", "prompt": "import os\\n\\ndef ", "max_tokens": 64, "temperature": 0}}'"""


def main(port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 8000) -> None:
    """Start the server, print how to use it, stop it on Ctrl-C."""
    console = Console(highlight=False)
    device = "GPU" if shipped.has_gpu() else "CPU, through Triton's interpreter: slow but exact"
    arguments = ["--speculative-config", "dspark", *shipped.serve_arguments()]
    server = VllmServer(str(shipped.PAIR), arguments, env=shipped.environment(), port=port)
    # Also where a parent shell had interrupts ignored, and for whoever stops us politely.
    for polite in (signal.SIGINT, signal.SIGTERM):
        signal.signal(polite, signal.default_int_handler)
    console.print(f"starting on {device}: {' '.join(server.command)}", soft_wrap=True)
    console.print(f"log: {server.log}", soft_wrap=True)
    try:
        with server:
            console.print(f"\nready on {server.url}. Try:\n", soft_wrap=True)
            command = _TRY.format(url=server.url, model=shipped.PAIR.name)
            console.print(command, markup=False, soft_wrap=True)
            console.print("\nCtrl-C stops it.")
            while True:
                server.check_alive()
                time.sleep(1.0)
    except KeyboardInterrupt:
        console.print("\nstopped")
    except ServerError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
