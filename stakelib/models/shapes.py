"""The shape of a model without its weights: enough to say what it needs before anything is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from stakelib.models.catalog import MODELS, base_model

SHAPES = yaml.safe_load(Path(__file__).with_name("shapes.yaml").read_text(encoding="utf-8"))


def config_of(name: str) -> Any:
    """The transformers config of a model by its name, with or without "-it", or of a local folder; no download.

    `dtype` is that of the weights as they lie on disk: bfloat16 from the hub, float32 as unpacked from a package.
    """
    from transformers import AutoConfig

    shape = SHAPES.get(name.removesuffix("-it"))
    if shape is None:  # the tiny model, or somebody's own folder
        return AutoConfig.from_pretrained(base_model(name).folder, local_files_only=True)
    unpacked = name in MODELS and MODELS[name].source == "package"
    return AutoConfig.for_model(**shape, dtype="float32" if unpacked else "bfloat16")
