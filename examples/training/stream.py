"""Token ids as one long tensor on the device, and random windows of it.

Documents are joined by the end-of-text word. Windows start anywhere, so nothing is read
from the host while training.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from .corpus import Split
from .tokenizer import END_OF_TEXT, format_chat


def documents(tokenizer: PreTrainedTokenizerBase, split: Split, seed: int) -> list[str]:
    """Plain files, then the chat samples in a random order fixed by `seed`."""
    chats = [format_chat(tokenizer, question, answer) for question, answer in split.chats]
    random.Random(seed).shuffle(chats)
    return [*split.texts, *chats]


def token_stream(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], device: torch.device
) -> torch.Tensor:
    """All texts as one int32 tensor [tokens] on `device`."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch_fast(
        list(texts), add_special_tokens=False
    ):
        ids.extend(encoding.ids)
        ids.append(end)
    return torch.tensor(ids, dtype=torch.int32, device=device)


def random_windows(
    stream: torch.Tensor, count: int, length: int, generator: torch.Generator
) -> torch.Tensor:
    """`count` windows at uniformly random places of `stream`: int64 [count, length].

    Raises:
        ValueError: the stream is shorter than one window.
    """
    if stream.numel() < length:
        raise ValueError(f"stream has {stream.numel()} tokens, a window needs {length}")
    starts = torch.randint(
        stream.numel() - length + 1, (count, 1), generator=generator, device=stream.device
    )
    return stream[starts + torch.arange(length, device=stream.device)].long()


def even_windows(stream: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """`count` windows spread evenly over `stream`, for measuring: int64 [count, length]."""
    starts = torch.linspace(0, stream.numel() - length, count, device=stream.device).long()
    return stream[starts[:, None] + torch.arange(length, device=stream.device)].long()
