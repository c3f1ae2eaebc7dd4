"""The LoRA recipe in one neutral form: the same settings mean the same thing in every back-end."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")  # never lm_head: tied to the embeddings, lost in GGUF


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how fast. Every default carries its reason."""

    name: str = "course"
    rank: int = 32  # width of the adapter; half of the layers at 32 are as many numbers as all at 16
    alpha: int = 128  # counts alpha/rank = 4 times; loss after an epoch of 427 rows 0.905, at 64 1.006, at 256 0.882
    dropout: float = 0.0  # one to three epochs do not need it
    targets: tuple[str, ...] = ALL_LINEAR  # attention alone, as many numbers: 1.30 after that epoch, all 1.01 at 64
    layers: float | None = 0.5  # the last layers that learn: a number, or below 1 a share; None = all
    learning_rate: float = 2e-3  # LoRA bears 10x and more of the full fine-tuning rate; of a model `tuned_width` wide
    tuned_width: int | None = 576  # SmolLM2, where the rate was measured; see `rate_for`. None: the rate as it stands
    schedule: str = "cosine"
    warmup: float = 0.05  # share of the steps in which the rate climbs: early steps are noisy
    accumulate: int = 1  # rows per optimizer step: after 178 rows, one each stood at a loss of 1.29, two at 1.47
    max_length: int = 1536  # tokens; a longer row is an error, never cut (it would lose its end-of-turn token)
    precision: str = "auto"  # of the frozen base: bfloat16 where this machine multiplies it faster, else float32.
    # int8 and nf4 (4 bits) save memory and never time: each matrix is unpacked again whenever it is used
    checkpointing: str = "auto"  # "on" keeps only what enters each layer and works the rest out again on the way back:
    # about a third more time, so auto means "off" wherever the run then fits
    validate_per_epoch: int = 4  # and a checkpoint each time: the best one is kept, at most a quarter epoch is lost
    patience: int = 4  # validations without a better loss, then it stops: an epoch over known rows that taught nothing
    seed: int = 7

    @property
    def scale(self) -> float:
        """alpha / rank: MLX's name for the same thing."""
        return self.alpha / self.rank

    def settings(self) -> dict[str, Any]:
        """All values, for the record."""
        return asdict(self)


def as_recipe(values: dict[str, Any]) -> Recipe:
    """The recipe of settings that went through YAML or JSON, where a tuple becomes a list."""
    return Recipe(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


_GUIDE = yaml.safe_load(Path(__file__).with_name("recipes.yaml").read_text(encoding="utf-8"))
RECIPES = {"course": Recipe(), **{name: as_recipe({"name": name, **row}) for name, row in _GUIDE.items()}}


def rate_for(config: Any, recipe: Recipe) -> float:
    """The learning rate for a model with this transformers config: a wider one bears less.

    In proportion to width^-0.781, fitted on Llama models by Thinking Machines (tinker-cookbook, transfer_lr).
    """
    return recipe.learning_rate * ((recipe.tuned_width or config.hidden_size) / config.hidden_size) ** 0.781


def layer_numbers(config: Any, recipe: Recipe) -> list[int]:
    """Which layers learn, counted from 0 at the input: the last `recipe.layers`, or all."""
    every, wanted = config.num_hidden_layers, recipe.layers or config.num_hidden_layers
    count = max(1, round(wanted * every)) if wanted < 1 else int(wanted)
    return list(range(every))[-count:]


def matrices(config: Any) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each matrix of one layer; `config`: a transformers config of the Llama or Gemma family."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def adapter_parameters(config: Any, recipe: Recipe) -> int:
    """How many numbers the adapter holds: rank x (inputs + outputs) of each target, in every layer that learns.

    Formula: Hu et al. 2021 (arXiv 2106.09685), 4.1.
    """
    return len(layer_numbers(config, recipe)) * recipe.rank * sum(sum(matrices(config)[t]) for t in recipe.targets)
