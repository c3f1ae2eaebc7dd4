"""Adapter + base -> one checked folder of safetensors."""

from __future__ import annotations

import shutil
from pathlib import Path

from stakelib.models import BaseModel, load_tokenizer, load_weights
from stakelib.models.adapters import packed_by_mlx, shapes
from stakelib.models.base_folder import embedding_rows, no_tokenizer
from stakelib.run import CourseError, writing

# Copied from the base, byte for byte: tokenizers that are saved again lose files that the converter needs.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def merge(base: BaseModel, adapter: Path, folder: Path) -> None:
    """Write base + adapter as float16 safetensors with the base's own tokenizer files into `folder`.

    The sum W + alpha/rank * B A is made in float32. Raises CourseError if no weight changed (an adapter that does
    nothing) or the result does not fit its tokenizer.
    """
    import torch

    model = load_weights(base.folder, adapter, dtype="float32")
    moved = [n for n, p in model.named_parameters() if "lora_B" in n and p.abs().sum() > 0]
    if not moved:
        raise CourseError(f"{adapter.name}: every lora_B is zero, the merged model would equal its base", "train first")
    merged = model.merge_and_unload()
    with writing(folder) as part:
        merged.to(torch.float16).save_pretrained(part)
        for name in TOKENIZER_FILES:
            if (base.folder / name).exists():
                shutil.copyfile(base.folder / name, part / name)
        check_folder(part, base)


def check_folder(folder: Path, base: BaseModel) -> None:
    """Raise CourseError listing everything about a model folder that would break the conversion."""
    import json

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    original = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    problems = [
        f"{name} of the base is missing"
        for name in TOKENIZER_FILES
        if (base.folder / name).exists() and not (folder / name).exists()
    ]
    problems += [
        f"config.json: {key} is {config.get(key)}, the base has {original.get(key)}"
        for key in ("architectures", "vocab_size")
        if config.get(key) != original.get(key)
    ]
    without = no_tokenizer(folder)
    problems += [without] if without else []
    if packed := packed_by_mlx(folder):
        problems.append(packed)
    if not any(folder.glob("*.safetensors")):
        problems.append("no safetensors file")
    elif not without and not packed and (shape := embedding_rows(shapes(folder))):
        words = len(load_tokenizer(folder))
        if not shape == config["vocab_size"] >= words:
            problems.append(
                f"{shape} embedding rows, vocab_size {config['vocab_size']}, {words} tokens in the tokenizer"
            )
    if problems:
        raise CourseError(
            [f"{folder.name}: {p}" for p in problems], "run notebook 05 again; if it happens twice, report it"
        )
