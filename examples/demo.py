"""The shipped pair with and without speculation over HTTP: `python -m examples.demo`.

Starts two real servers one after the other, sends both the same prompts with the `openai`
client at temperature 0, and compares what came back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer
from openai import OpenAI
from rich.console import Console
from rich.table import Table

from examples import shipped
from vllm_dspark.server import VllmServer

PROMPTS = (
    "import os\nimport sys\n\ndef main(",
    "class Node:\n    def __init__(self, ",
    'def read_file(path):\n    """Return the',
    "    for key, value in self.",
)


@dataclass(frozen=True)
class Answer:
    """One completion, and what the server counted while it made it."""

    tokens: list[int]
    text: str
    rounds: float  # target passes that verified drafts
    accepted: float  # drafts that were accepted in them


def ask(server: VllmServer, prompts: tuple[str, ...], max_tokens: int) -> list[Answer]:
    """Send the prompts one by one, so that the counters belong to one prompt each."""
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    answers = []
    for prompt in prompts:
        before = server.counters()
        completion = client.completions.create(
            model=shipped.PAIR.name,
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        after = server.counters()
        choice = completion.choices[0]
        tokens = (choice.model_extra or {})["token_ids"]
        rounds, accepted = (
            after.get(name, 0.0) - before.get(name, 0.0)
            for name in (
                "vllm:spec_decode_num_drafts_total",
                "vllm:spec_decode_num_accepted_tokens_total",
            )
        )
        answers.append(Answer(tokens, choice.text, rounds, accepted))
    return answers


def main(
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 48,
) -> None:
    """Print the comparison; exit code 1 if any token differs."""
    console = Console()
    answers = {}
    for name, extra in (("no speculation", []), ("DSpark", ["--speculative-config", "dspark"])):
        console.print(f"starting a server: {name} ...")
        # fp32: the one type in which equal means equal, whatever the batch shape
        arguments = [*extra, *shipped.serve_arguments(), "--dtype", "float32"]
        with VllmServer(str(shipped.PAIR), arguments, env=shipped.environment()) as server:
            answers[name] = ask(server, PROMPTS, max_tokens)

    table = Table("prompt", "tokens equal", "accepted length", "target steps", "steps saved")
    all_equal = True
    for prompt, plain, ours in zip(
        PROMPTS, answers["no speculation"], answers["DSpark"], strict=True
    ):
        equal = plain.tokens == ours.tokens
        all_equal &= equal
        length = 1 + ours.accepted / ours.rounds if ours.rounds else 1.0
        # The prompt's own pass gives the first token, in both.
        steps, without = 1 + ours.rounds, len(plain.tokens)
        table.add_row(
            repr(prompt),
            "yes" if equal else "NO",
            f"{length:.2f}",
            f"{steps:.0f} of {without}",
            f"{1 - steps / without:.0%}",
        )
    console.print(table)
    raise typer.Exit(not all_equal)


if __name__ == "__main__":
    typer.run(main)
