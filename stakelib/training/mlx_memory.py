"""What an MLX training needs, before it starts: the Mac's graphics cores may use two thirds of its memory, no more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stakelib import machine
from stakelib.run import CourseError
from stakelib.training.plan import Rows, kept_bytes
from stakelib.training.recipe import Recipe, adapter_parameters, layer_numbers, matrices

M1_LIMIT_GB = 5461 / 1024  # what an M1 of 8 GB gives its graphics cores (recommendedMaxWorkingSetSize, llamafile#42)
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / 64, "nf4": 0.5 + 4 / 64}  # packed: two bf16 for each 64


def mlx_memory(config: Any, recipe: Recipe, tokens: int, learned: int, rows: int = 1) -> dict[str, float]:
    """Peak memory (GB, by part) of an MLX training step on `rows` rows of `tokens` ids, `learned` of each learned.

    weights: embeddings too are packed. learning: as in `memory`. activations: what the way back needs, and for each
    low-rank matrix the float32 copy of what enters it; with checkpointing the input of each layer, and one whole layer.
    logits: bf16, float32, their logarithm and its gradient. The program itself does not count against the limit.
    """
    size = 4 if recipe.precision == "float32" else 2
    places, learned = rows * -(-tokens // 64) * 64, rows * -(-learned // 64) * 64
    sizes, layers = matrices(config), len(layer_numbers(config, recipe))
    numbers = config.num_hidden_layers * sum(a * b for a, b in sizes.values()) + config.vocab_size * config.hidden_size
    copies = 4 * sum(sizes[t][0] + recipe.rank for t in recipe.targets)
    scores = rows * config.num_attention_heads * (places // rows) ** 2 * 2 * size
    layer = kept_bytes(config, recipe, places, size) + places * copies + scores
    kept = places * size * config.hidden_size if recipe.checkpointing == "on" else layer
    inside = layer + 5 * places * size * config.intermediate_size if recipe.checkpointing == "on" else 0
    parts = {
        "weights": BYTES[recipe.precision] * numbers,
        "learning": 16 * adapter_parameters(config, recipe),
        "activations": layers * kept + inside,
        "logits": (12 + size) * config.vocab_size * learned,
    }
    return {name: amount / 2**30 for name, amount in parts.items()}


def limit_gb() -> tuple[float, str]:
    """(memory that a training may use, GB; what sets that limit)."""
    if not machine.metal()[0]:
        return machine.describe()["ram_free_gb"], "free memory; MLX runs on the processor here"
    import mlx.core as mx

    return mx.device_info()["max_recommended_working_set_size"] / 2**30, "what this Mac gives its graphics cores"


def settle_mlx(name: str, config: Any, recipe: Recipe, data: Rows, limit: tuple[float, str]) -> tuple[Recipe, str]:
    """The recipe with precision and checkpointing decided, and why. Raises CourseError if it cannot fit.

    Whole bf16 weights where the training then takes half of the limit, for the other half is the browser's; else 4 bits
    and gradient checkpointing. On a processor without Metal float32, which MLX multiplies there no slower.
    """
    allowed_gb, whose = limit
    tokens, learned = max(len(r.ids) for r in data), max(sum(r.mask) for r in data)
    whole = "bfloat16" if machine.metal()[0] else "float32"
    ways = [(whole, "off", 0.5), (whole, "on", 0.5), ("nf4", "on", 1.0), ("nf4", "off", 1.0), (whole, "off", 1.0)]
    if recipe.precision != "auto":
        ways = [(recipe.precision, c, 1.0) for c in ("off", "on")]
    tried = []
    for kind, checkpointing, share in ways:
        if recipe.checkpointing in ("auto", checkpointing):
            way = replace(recipe, precision=kind, checkpointing=checkpointing)
            parts = mlx_memory(config, way, tokens, learned)
            if sum(parts.values()) <= share * allowed_gb:
                return way, f"{told(parts)}, of {allowed_gb:.1f} GB: {whose}"
            tried.append((way, parts))
    way, parts = min(tried, key=lambda pair: sum(pair[1].values()))
    raise CourseError(
        f"memory: {name} in {way.precision}, checkpointing {way.checkpointing}: {told(parts)}, but {allowed_gb:.1f} GB "
        f"is all: {whose}",
        "set precision='nf4' and checkpointing='on' in the recipe, shorten the longest rows, or choose a smaller model",
    )


def told(parts: dict[str, float]) -> str:
    """The estimate in words: its sum, then its parts."""
    return f"{sum(parts.values()):.1f} GB (" + ", ".join(f"{k} {v:.1f}" for k, v in parts.items()) + ")"
