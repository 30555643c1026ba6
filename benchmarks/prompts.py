"""Prompts of a sweep: any dataset that `vllm bench` reads, and two more.

    python-text          held-out pieces of Python's standard library, for the shipped pairs
    deepspec:FILE.jsonl  DeepSpec's `turns`, the first turn of each
    custom:FILE.jsonl    `prompt` and, if wanted, `output_tokens`
    sharegpt:FILE.json   ShareGPT conversations
    speed_bench:PATH     and every other dataset name of `vllm bench serve`

All of them end up as the same thing, texts in a fixed order, which both the online and the offline
sweep send as they are. So every arm sees the same prompts, and a digest says which.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError

PYTHON_TEXT = "python-text"
PIECE_TOKENS = 64


class PromptsError(BenchmarkError, ValueError):
    """A dataset cannot be read as what it was said to be."""


@dataclass(frozen=True)
class PromptSet:
    """Texts in the order in which they are sent."""

    name: str
    texts: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the texts, each on a line as JSON."""
        lines = "".join(json.dumps({"prompt": text}) + "\n" for text in self.texts)
        return hashlib.sha256(lines.encode()).hexdigest()

    def write(self, path: Path, output_tokens: Sequence[int]) -> None:
        """As a file that `vllm bench serve --dataset-name custom` reads, with tokens to emit."""
        lines = [
            json.dumps({"prompt": text, "output_tokens": count})
            for text, count in zip(self.texts, output_tokens, strict=True)
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_prompts(
    dataset: str, target: str, count: int, *, seed: int = 0, chat: bool = True
) -> PromptSet:
    """`count` prompts; a dataset with fewer starts again from its first.

    Args:
        dataset: NAME or NAME:PATH, see the module.
        target: folder or hub id whose tokenizer and chat template are used.
        seed: fixes the order of datasets that are shuffled.
        chat: put the target's chat template around prompts that are questions.

    Raises:
        PromptsError: the name is unknown, or the file is not there or not of that format.
    """
    name, _, path = dataset.partition(":")
    try:
        if name == PYTHON_TEXT:
            texts = _python_text(Path(target), count, seed)
        elif name == "deepspec":
            texts = _deepspec(Path(path), target, chat)
        else:
            texts = _from_vllm(name, path, target, count, seed, chat)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise PromptsError(
            f"dataset {dataset!r} gave no prompts ({type(error).__name__}: {error}). Needed is "
            f"{PYTHON_TEXT}, deepspec:FILE, custom:FILE, sharegpt:FILE, or NAME:PATH of a dataset "
            "that `vllm bench serve --dataset-name` knows."
        ) from error
    if not texts:
        raise PromptsError(f"dataset {dataset!r} is empty")
    stem = Path(path).name
    repeated = (texts * (count // len(texts) + 1))[:count]
    return PromptSet(f"{name} {stem}".strip(), tuple(repeated))


def _python_text(target: Path, count: int, seed: int) -> list[str]:
    """Pieces from all over the held-out side of the training's split, shuffled."""
    import torch

    from examples.training.corpus import Split, held_out_texts
    from examples.training.evaluate import text_prompts
    from examples.training.stream import documents, token_stream
    from examples.training.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(target)
    texts = documents(tokenizer, Split(held_out_texts()), 0)
    stream = token_stream(tokenizer, texts, torch.device("cpu"))
    pieces = text_prompts(stream, count, PIECE_TOKENS)
    random.Random(seed).shuffle(pieces)
    return [tokenizer.decode(piece) for piece in pieces]


def _deepspec(path: Path, target: str, chat: bool) -> list[str]:
    from transformers import AutoTokenizer

    turns = [json.loads(line)["turns"][0] for line in path.read_text("utf-8").splitlines() if line]
    if not chat:
        return turns
    tokenizer = AutoTokenizer.from_pretrained(target)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": turn}], add_generation_prompt=True, tokenize=False
        )
        for turn in turns
    ]


def _from_vllm(name: str, path: str, target: str, count: int, seed: int, chat: bool) -> list[str]:
    """Through vLLM's own readers, with the command line that `vllm bench` has for them."""
    from vllm.benchmarks.datasets import add_dataset_parser, get_samples
    from vllm.tokenizers import get_tokenizer
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_dataset_parser(parser)
    known = next(a for a in parser._actions if "--dataset-name" in a.option_strings).choices
    if name not in (known or ()):
        raise ValueError(f"unknown name {name!r}")
    words = ["--dataset-name", name, "--num-prompts", str(count), "--seed", str(seed)]
    words += ["--dataset-path", path] if path else []
    words += [] if chat else ["--skip-chat-template"]
    args: Any = parser.parse_args(words)
    return [str(sample.prompt) for sample in get_samples(args, get_tokenizer(target))]
