"""Checkpoints in the published format: safetensors in bf16, `config.json`, the tokenizer.

folder/                 the target: Qwen3ForCausalLM, tokenizer, chat template
folder/training.json    how it was made and what it reaches
folder/dspark/          the drafter: Qwen3DSparkModel, without embedding and LM head,
                        which the server shares with the target
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from .drafter import Drafter
from .presets import Preset
from .tokenizer import END_OF_TEXT, MASK, TURN_END, load_tokenizer

RECORD = "training.json"


def export_target(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Write weights in bf16, `config.json` and `generation_config.json` next to the tokenizer."""
    tokenizer = load_tokenizer(folder)
    stop, end = (tokenizer.convert_tokens_to_ids(word) for word in (TURN_END, END_OF_TEXT))
    model.generation_config.eos_token_id = [stop, end]
    model.generation_config.pad_token_id = end
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner alone


def drafter_config(target_folder: Path, preset: Preset, head: str) -> dict[str, Any]:
    """The target's `config.json` with the drafter's fields, as published drafters have it."""
    config = json.loads((target_folder / "config.json").read_text())
    config.update(
        architectures=["Qwen3DSparkModel"],
        model_type="qwen3",
        num_hidden_layers=preset.draft_layers,
        num_target_layers=preset.target_layers,
        intermediate_size=preset.draft_mlp,
        layer_types=["full_attention"] * preset.draft_layers,
        max_window_layers=preset.draft_layers,
        block_size=preset.block_size,
        mask_token_id=load_tokenizer(target_folder).convert_tokens_to_ids(MASK),
        target_layer_ids=list(preset.target_layer_ids),
        num_anchors=preset.anchors,
        enable_confidence_head=True,
        confidence_head_with_markov=True,
        markov_rank=preset.markov_rank,
        markov_head_type=head,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    return config


def build_drafter(config: dict[str, Any]) -> Drafter:
    """A drafter of the shape that a `config.json` describes, weights not initialised."""
    return Drafter(Qwen3Config(**config))


def export_drafter(drafter: Drafter, config: dict[str, Any], folder: Path) -> None:
    """Write `model.safetensors` in bf16 and `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in drafter.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_drafter(folder: Path, device: torch.device) -> Drafter:
    """An exported drafter, its bf16 weights held in fp32, frozen."""
    drafter = build_drafter(json.loads((folder / "config.json").read_text()))
    drafter.load_state_dict(
        {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    )
    return drafter.requires_grad_(False).eval().to(device)


def folder_bytes(folder: Path) -> int:
    """Size of all files below `folder`, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read_record(folder: Path) -> dict[str, Any]:
    """The target folder's `training.json`, empty where there is none."""
    path = folder / RECORD
    return json.loads(path.read_text()) if path.exists() else {}


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write `training.json`. Floats are rounded to five significant digits."""
    text = json.dumps(_rounded(record), indent=2) + "\n"
    (folder / RECORD).write_text(text)


def environment(device: torch.device) -> dict[str, str]:
    """What a training ran on: versions, kind of device, date. No name of a machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "device": name,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
