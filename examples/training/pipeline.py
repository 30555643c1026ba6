"""From nothing to a folder of checkpoints: the order of the steps, and the record of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import set_seed

from .corpus import Corpus
from .distill import TrainingText, held_out_acceptance, train_drafter
from .drafter import initialise
from .export import (
    build_drafter,
    drafter_config,
    environment,
    export_drafter,
    export_target,
    read_record,
    write_record,
)
from .generate import generate_rows
from .presets import Preset
from .stream import documents, token_stream
from .target import build_target, held_out_loss, load_target, target_config, train_target
from .tokenizer import END_OF_TEXT, TURN_END, load_tokenizer, save_tokenizer, train_tokenizer

GENERATION_SHARE = 0.25  # of a drafter's seconds may go into generated text
# "Head" of the ablation: the same drafter whose Markov bias stays zero, which is DFlash's sampling.
WITHOUT_MARKOV = "none"


@dataclass(frozen=True)
class Limits:
    """What a run may spend. A training ends at its steps or its seconds, whichever is first."""

    steps_target: int
    steps_drafter: int
    seconds_target: float
    seconds_drafter: float  # per drafter, generated text included
    batch_size: int  # windows of `Preset.context` tokens in a target step
    draft_batch_size: int  # the same in a drafter step
    command: str = ""  # how the run was started, for the record


@dataclass(frozen=True)
class Streams:
    """Both sides of the corpus in tokens, on the device that trains: int32 [tokens] each."""

    train: torch.Tensor
    held_out: torch.Tensor


def make_tokenizer(preset: Preset, corpus: Corpus, folder: Path) -> None:
    """Train the tokenizer and write it to `folder`."""
    tokenizer = train_tokenizer(corpus.train.texts, preset.vocab_size)
    save_tokenizer(tokenizer, folder, preset.max_positions)


def make_streams(corpus: Corpus, folder: Path, device: torch.device, seed: int) -> Streams:
    """The corpus by the tokenizer in `folder`."""
    tokenizer = load_tokenizer(folder)
    train, held_out = (
        token_stream(tokenizer, documents(tokenizer, side, seed), device)
        for side in (corpus.train, corpus.held_out)
    )
    print(f"tokens: {train.numel()} for training, {held_out.numel()} held out", flush=True)
    return Streams(train, held_out)


def make_target(
    preset: Preset,
    corpus: Corpus,
    streams: Streams,
    folder: Path,
    limits: Limits,
    seed: int,
    compile_model: bool = False,
) -> None:
    """Train the target and write it next to the tokenizer in `folder`."""
    set_seed(seed)
    device, tokenizer = streams.train.device, load_tokenizer(folder)
    config = target_config(
        preset,
        eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
    )
    model = build_target(config).to(device)
    progress = train_target(
        model,
        streams.train,
        preset,
        steps=limits.steps_target,
        max_seconds=limits.seconds_target,
        batch_size=limits.batch_size,
        generator=torch.Generator(device).manual_seed(seed),
        compile_model=compile_model,
    )
    export_target(model, folder)
    exported = load_target(folder, device)
    losses = {
        f"nats_per_token_at_{length}": held_out_loss(exported, streams.held_out, length)
        for length in (preset.context, 2 * preset.context)
    }
    print(f"target held out: {losses}", flush=True)
    write_record(
        folder,
        {
            "preset": preset.name,
            "command": limits.command,
            "seed": seed,
            "corpus": {
                "text": "Python standard library",
                "files": corpus.num_files,
                "bytes": corpus.num_bytes,
                "train_tokens": streams.train.numel(),
                "held_out_tokens": streams.held_out.numel(),
                "chat_samples": len(corpus.train.chats) + len(corpus.held_out.chats),
            },
            "target": {
                "parameters": sum(p.numel() for p in exported.parameters()),
                "steps": progress.steps,
                "seconds": progress.seconds,
                "batch_size": limits.batch_size,
                "train_loss": progress.metrics["loss"],
                "held_out_loss": losses,
                **environment(device),
            },
        },
    )


def make_drafters(
    preset: Preset,
    streams: Streams,
    folder: Path,
    heads: Sequence[str],
    limits: Limits,
    seed: int,
    generated_share: float,
) -> None:
    """Train one drafter per Markov head for the target in `folder`, and write each.

    The head `none` trains a vanilla head whose W2 is frozen at its initial zeros: the same
    drafter, loss and text without a Markov bias, in a checkpoint that serves like any other.
    """
    set_seed(seed)
    device = streams.train.device
    generator = torch.Generator(device).manual_seed(seed)
    target = load_target(folder, device)
    text, started = TrainingText(streams.train, None, generated_share), time.monotonic()
    if generated_share > 0:
        text.generated = generate_rows(
            target,
            streams.train,
            rows=preset.generated_rows,
            length=preset.context,
            max_seconds=GENERATION_SHARE * limits.seconds_drafter * len(heads),
            generator=generator,
        )
    generation_seconds = (time.monotonic() - started) / len(heads)
    for head in heads:
        set_seed(seed)
        config = drafter_config(folder, preset, "vanilla" if head == WITHOUT_MARKOV else head)
        drafter = initialise(build_drafter(config)).to(device)
        if head == WITHOUT_MARKOV:
            drafter.markov_head.markov_w2.requires_grad_(False)
        progress = train_drafter(
            drafter,
            target,
            text,
            preset,
            steps=limits.steps_drafter,
            max_seconds=max(1.0, limits.seconds_drafter - generation_seconds),
            batch_size=limits.draft_batch_size,
            generator=generator,
        )
        loss, acceptance = held_out_acceptance(drafter, target, streams.held_out, preset, generator)
        print(f"{head} held out: loss {loss:.4f}", flush=True)
        print(f"  1 - TV     per position {' '.join(f'{a:.3f}' for a in acceptance)}", flush=True)
        name = preset.drafter_folder(head)
        export_drafter(drafter, config, folder / name)
        record = read_record(folder)
        record.setdefault("drafters", {})[name] = {
            "markov_head": head,
            "command": limits.command,
            "parameters": sum(p.numel() for p in drafter.parameters()),
            "seed": seed,
            "steps": progress.steps,
            "seconds": progress.seconds,
            "batch_size": limits.draft_batch_size,
            "generated_rows": 0 if text.generated is None else len(text.generated),
            "generated_share": generated_share,
            "train": progress.metrics,
            "held_out_loss": loss,
            "held_out_acceptance": acceptance,
            **environment(device),
        }
        write_record(folder, record)
