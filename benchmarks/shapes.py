"""A model of a published shape with random weights on disk: what it costs to train one, without any download."""

from __future__ import annotations

import json
from pathlib import Path

from stakelib.models import Rendered, config_of


def random_model(name: str, folder: Path, dtype: str | None = None) -> Path:
    """Write config and safetensors, one file a layer, of a model shaped like `name`; kept if it is there already.

    `dtype` of the file, by default that of the real one. Normal numbers of spread 0.02, norms that change nothing.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    config = config_of(name)
    config.dtype = getattr(torch, dtype) if dtype else config.dtype
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    # the converter reads model*.safetensors only, whatever the index says
    one = 0.0 if config.model_type.startswith("gemma") else 1.0  # Gemma multiplies by 1 + weight
    files: dict[str, dict[str, torch.Size]] = {}
    for key, tensor in model.named_parameters():  # tied ones come once
        files.setdefault("model-" + (key.split(".")[2] if ".layers." in key else "rest"), {})[key] = tensor.shape
    for file, shapes in files.items():
        tensors = {
            key: torch.full(shape, one, dtype=config.dtype)
            if len(shape) == 1
            else torch.empty(shape, dtype=config.dtype).normal_(0, 0.02)
            for key, shape in shapes.items()
        }
        save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    where = {key: f"{file}.safetensors" for file, shapes in files.items() for key in shapes}
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def random_rows(tokens: int, learned: int, vocabulary: int, count: int = 4) -> list[Rendered]:
    """Rows of random ids: the first of exactly `tokens`, the last `learned` of them learned; each next one shorter.

    Three ids fewer, one of them learned: real rows differ too, and what a library keeps for each new size then shows.
    """
    import random

    ids, rows = random.Random(0), []
    for row in range(count):
        mask = [0] * (tokens - learned - 2 * row) + [1] * (learned - row)
        rows.append(Rendered([ids.randrange(10, vocabulary) for _ in mask], mask))
    return rows
