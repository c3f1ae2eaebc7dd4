"""The LoRA recipe in one neutral form: the same settings mean the same thing in every back-end."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")  # never lm_head: tied to the embeddings, lost in GGUF


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how fast. Every default carries its reason."""

    name: str = "course"
    rank: int = 16  # width of the adapter: enough for a voice; 8 or 32 changed little in published runs
    alpha: int = 32  # the adapter's output counts alpha/rank = 2 times
    dropout: float = 0.0  # one to three epochs do not need it
    targets: tuple[str, ...] = ALL_LINEAR  # attention alone learns less, even at equal size
    learning_rate: float = 4e-4  # LoRA bears 10x and more of the full fine-tuning rate
    schedule: str = "cosine"
    warmup: float = 0.05  # share of the steps in which the rate climbs: early steps are noisy
    accumulate: int = 1  # rows per optimizer step: after 178 rows, one each stood at a loss of 1.29, two at 1.47
    max_length: int = 1536  # tokens; a longer row is an error, never cut (it would lose its end-of-turn token)
    precision: str = "auto"  # of the frozen base: bfloat16 where this machine multiplies it faster, else float32.
    # int8 and nf4 (4 bits) save memory and never time: each matrix is unpacked again whenever it is used
    checkpointing: str = "auto"  # "on" keeps only what enters each layer and works the rest out again on the way back:
    # about a third more time, so auto means "off" wherever the run then fits
    validate_per_epoch: int = 4  # and a checkpoint each time: the best one is kept, at most a quarter epoch is lost
    seed: int = 7

    @property
    def scale(self) -> float:
        """alpha / rank: MLX's name for the same thing."""
        return self.alpha / self.rank

    def settings(self) -> dict[str, Any]:
        """All values, for the record."""
        return asdict(self)


# The guide's own settings, as far as they run: its 8-bit weights and fp16 do not train on a CPU, and its loss over the
# prompt is dropped. Rate 2e-5 and attention only are kept, to be compared.
RECIPES = {
    r.name: r
    for r in (
        Recipe(),
        Recipe("guide-pc", dropout=0.05, targets=ATTENTION, learning_rate=2e-5, schedule="linear", warmup=0.0,
               accumulate=8),
    )
}  # fmt: skip


def matrices(config: Any) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each matrix of one layer; `config`: a transformers config of the Llama or Gemma family."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    return {
        "q_proj": (hidden, queries), "k_proj": (hidden, keys), "v_proj": (hidden, keys), "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
    }  # fmt: skip


def adapter_parameters(config: Any, recipe: Recipe) -> int:
    """How many numbers the adapter holds: rank x (inputs + outputs) of each target, in every layer.

    Formula: Hu et al. 2021 (arXiv 2106.09685), 4.1.
    """
    return config.num_hidden_layers * recipe.rank * sum(sum(matrices(config)[t]) for t in recipe.targets)
