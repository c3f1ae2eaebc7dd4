"""What would stop a run that begins with somebody's own model folder: all of it is found before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stakelib.models.adapters import MATRICES, packed_by_mlx, shapes
from stakelib.models.chat import template
from stakelib.models.engines import load_config, load_tokenizer, quiet
from stakelib.run import CourseError

# llama.cpp's converter reads these families from sentencepiece's own file only
SENTENCEPIECE = ("gemma", "gemma2")
SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def check_base_folder(folder: Path) -> None:
    """Raise CourseError listing everything that training, merging or conversion would stumble over in `folder`.

    Reads config, headers, tokenizer and chat template, then all weights once, for numbers that are not finite.
    """
    try:
        headers, unread = shapes(folder), ""
    except Exception as problem:  # safetensors has errors of its own
        headers, unread = {}, f"{_unreadable(folder)} ({problem})"
    problems = [unread] if unread else _weights(folder, headers)
    config, wrong = _config(folder)
    problems += wrong + ([] if unread or config is None else _misfits(config, headers))
    problems += _tokenizer(folder, config)
    problems += [] if problems else not_finite(folder)
    if problems:
        raise CourseError(
            [f"{folder}: {p}" for p in problems],
            "copy the whole model once more from where it came, or choose a model of the list with --model",
        )


def no_tokenizer(folder: Path) -> str:
    """What to say of a model folder without a tokenizer; else ""."""
    found = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    return "" if found else "no tokenizer: neither tokenizer.json nor tokenizer.model is there"


def embedding_rows(headers: dict[str, list[int]]) -> int | None:
    """Rows of the embedding matrix, one for each token; None where there is none."""
    return next((size[0] for name, size in headers.items() if name.endswith("embed_tokens.weight")), None)


def not_finite(folder: Path) -> list[str]:
    """The weights of a folder that hold a number which is not finite, one tensor in memory at a time."""
    from safetensors import safe_open

    found = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                parts = tensors.get_tensor(name).flatten().split(1 << 24)  # 16 million numbers at a time
                if not all(part.isfinite().all() for part in parts):
                    found.append(f"{file.name}: {name} holds a number that is not finite")
    return _first(found)


def _unreadable(folder: Path) -> str:
    """The first safetensors file that cannot be opened, named."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            shapes(file)
        except Exception:
            return f"{file.name} is cut short or damaged"
    return "the safetensors files cannot be read"


def _weights(folder: Path, headers: dict[str, list[int]]) -> list[str]:
    """Wrong with the files of weights: packed ones, and parts that the index names and that are not there."""
    if packed := packed_by_mlx(folder):
        return [packed]
    problems = [] if headers else ["the safetensors files hold no weights"]
    if (index := folder / "model.safetensors.index.json").exists():
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            missing = sorted({file for file in places.values() if not (folder / file).exists()})
        except (ValueError, KeyError, TypeError, AttributeError):
            return [f"{index.name} cannot be read"]
        problems += [f"{file} is missing, {index.name} names it" for file in missing]
    return problems


def _config(folder: Path) -> tuple[Any, list[str]]:
    """The transformers config, None where it says nothing about the weights, and what is wrong with config.json."""
    try:
        plain = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = (plain.get("architectures") or [""])[0]
    except (ValueError, TypeError, AttributeError, OSError) as problem:
        return None, [f"config.json cannot be read ({problem})"]
    problems = [] if architecture else ["config.json names no architectures: llama.cpp's converter needs them"]
    if plain.get("quantization_config"):
        problems.append("config.json has a quantization_config: the weights are packed, whole ones are needed")
        return None, problems
    if plain.get("auto_map"):
        problems.append("config.json has an auto_map: this model needs code of its own, which the course never runs")
        return None, problems
    try:
        config = load_config(folder)
    except Exception as problem:  # transformers has many errors of its own
        return None, [*problems, f"config.json: transformers cannot read it ({str(problem).splitlines()[0]})"]
    lost = [f"config.json: {key} is missing" for key in SHAPE if not isinstance(getattr(config, key, None), int)]
    return (None if lost else config), problems + lost


def _misfits(config: Any, headers: dict[str, list[int]]) -> list[str]:
    """Weights that the config asks for and that are not there, or have another shape: they would be random numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    quiet()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as problem:
        return [f"config.json: transformers cannot build the model ({str(problem).splitlines()[0]})"]
    wanted = {name: list(p.shape) for name, p in model.named_parameters()}  # a tied output layer stands there once
    problems = [f"the weight {name} is missing" for name in wanted if name not in headers]
    problems += [
        f"{name} is {headers[name]}, config.json says {size}"
        for name, size in wanted.items()
        if name in headers and headers[name] != size
    ]
    ends = {name.split(".")[-2] for name in wanted if "layers." in name}
    problems += [f"no matrix {name} in its layers: LoRA has nothing to hold on to" for name in sorted(MATRICES - ends)]
    if embedding_rows(headers) not in (None, config.vocab_size):
        problems.insert(0, f"{embedding_rows(headers)} embedding rows, config.json says {config.vocab_size}")
    return _first(problems)


def _tokenizer(folder: Path, config: Any) -> list[str]:
    """What is wrong with tokenizer and chat template."""
    if without := no_tokenizer(folder):
        return [without]
    kind = getattr(config, "model_type", "")
    problems = []
    if kind in SENTENCEPIECE and not (folder / "tokenizer.model").exists():
        problems.append(f"tokenizer.model is missing: llama.cpp's converter needs it for a {kind}")
    try:
        tokenizer = load_tokenizer(folder)
    except Exception as problem:
        return [*problems, f"the tokenizer cannot be read ({str(problem).splitlines()[0]})"]
    if config is not None and len(tokenizer) > config.vocab_size:
        problems.append(f"{len(tokenizer)} tokens in the tokenizer, but vocab_size is {config.vocab_size}")
    if not tokenizer.chat_template:
        return [*problems, "no chat template: take the instruction-tuned form of this model (often called -it)"]
    try:
        template(tokenizer)
    except CourseError as problem:
        problems += problem.problems
    return problems


def _first(problems: list[str], count: int = 5) -> list[str]:
    return problems[:count] + ([f"and {len(problems) - count} more like these"] if len(problems) > count else [])
