"""What llama.cpp needs to answer several prompts at once: the keys and values of each, beside the weights."""

from __future__ import annotations

from typing import Any

from stakelib import machine

AT_ONCE, CONTEXT = 8, 4096  # prompts answered together at most, and tokens of the longest kind of them
BATCH = 512  # tokens whose scores llama.cpp holds at a time


def cells_gb(config: Any, context: int) -> float:
    """Memory (GB) of the keys and values of one prompt and its answer, `context` tokens, 16 bits a number."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4 * config.num_hidden_layers * config.num_key_value_heads * head * context / 2**30


def answering_gb(config: Any, weights_gb: float, context: int = CONTEXT, at_once: int = 1) -> float:
    """Memory (GB) of llama.cpp with a file of weights: it is mapped, but read for every token, so it must fit too."""
    return weights_gb + 4 * BATCH * config.vocab_size / 2**30 + at_once * cells_gb(config, context)


def prompts_at_once(config: Any, weights_gb: float, context: int) -> int:
    """How many prompts to answer together: 8, or as many as the free memory bears, at least one."""
    room_gb = machine.describe()["ram_free_gb"] - answering_gb(config, weights_gb, context, at_once=0)
    return max(1, min(AT_ONCE, int(room_gb / cells_gb(config, context))))
