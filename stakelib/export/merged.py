"""Adapter + base -> one checked folder of safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stakelib.models import BaseModel, load_config, load_tokenizer
from stakelib.models.adapters import PEFT_FILES, check_adapter, packed_by_mlx, shapes
from stakelib.models.base_folder import embedding_rows, no_tokenizer
from stakelib.run import CourseError, atomic_write_json, writing

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


SHARD_BYTES = 2**28  # a file of the merged folder; the embeddings alone may be larger


def merge(base: BaseModel, adapter: Path, folder: Path) -> None:
    """Write base + adapter as float16 safetensors with the base's own tokenizer files into `folder`.

    The sum W + alpha/rank * B A is made in float32, one tensor at a time: memory holds the largest one, not the model.
    Raises CourseError if no weight changed (an adapter that does nothing), the adapter is of another base or says what
    only PEFT can, or the result does not fit its tokenizer.
    """
    from safetensors.torch import load_file

    check_adapter(adapter, base.folder)
    settings = json.loads((adapter / PEFT_FILES[0]).read_text(encoding="utf-8"))
    thin = {n.removeprefix("base_model.model."): t.float() for n, t in load_file(adapter / PEFT_FILES[1]).items()}
    if not any(t.abs().sum() > 0 for name, t in thin.items() if "lora_B" in name):
        raise CourseError(f"{adapter.name}: every lora_B is zero, the merged model would equal its base", "train first")
    with writing(folder) as part:
        part.mkdir(parents=True)
        _save(_sums(base.folder, thin, settings["lora_alpha"] / settings["r"]), part)
        copy_texts(base, part)
        check_folder(part, base)


def _sums(base: Path, thin: dict[str, Any], scale: float) -> Iterator[tuple[str, Any]]:
    """Name and float16 values of each weight, the adapter added, as they are asked for."""
    import torch
    from safetensors import safe_open

    tied = load_config(base).tie_word_embeddings
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if tied and name == "lm_head.weight" and "model.embed_tokens.weight" in shapes(base):
                    continue  # the embeddings once more
                tensor, module = tensors.get_tensor(name), name.removesuffix(".weight")
                if f"{module}.lora_A.weight" in thin:
                    a, b = thin[f"{module}.lora_A.weight"], thin[f"{module}.lora_B.weight"]  # [rank, in], [out, rank]
                    tensor = tensor.float() + scale * (b @ a)
                yield name, tensor.to(torch.float16) if tensor.is_floating_point() else tensor


def _save(tensors: Iterator[tuple[str, Any]], folder: Path) -> None:
    """Write tensors into model.safetensors, or into several files and their index where they are many."""
    from safetensors.torch import save_file

    places: dict[str, str] = {}
    files: list[Path] = []
    shard: dict[str, Any] = {}

    def flush() -> None:
        files.append(folder / f"model-{len(files) + 1:05d}.safetensors")
        save_file(shard, files[-1], {"format": "pt"})
        places.update(dict.fromkeys(shard, files[-1].name))
        shard.clear()

    for name, tensor in tensors:
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor.contiguous()
    flush()
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
    else:
        atomic_write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def copy_texts(base: BaseModel, folder: Path) -> None:
    """The base's config, in float16, and its tokenizer files, byte for byte."""
    config = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    atomic_write_json(folder / "config.json", config | {"dtype": "float16"})
    for name in TOKENIZER_FILES:
        if (base.folder / name).exists():
            shutil.copyfile(base.folder / name, folder / name)


def check_folder(folder: Path, base: BaseModel) -> None:
    """Raise CourseError listing everything about a model folder that would break the conversion."""
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
