"""Base models, chat rendering, engines that answer, and negative log-likelihood."""

from stakelib.models.catalog import (
    MODELS,
    BaseModel,
    base_model,
    check_same_base,
    config_of,
    find_model,
    gguf_base,
    preflight,
)
from stakelib.models.chat import Rendered, render, stop_ids, template
from stakelib.models.engines import Answer, engine, load_config, load_tokenizer, load_weights
from stakelib.models.likelihood import bits_per_byte, nll, row_nll

__all__ = [
    "MODELS",
    "Answer",
    "BaseModel",
    "Rendered",
    "base_model",
    "bits_per_byte",
    "check_same_base",
    "config_of",
    "engine",
    "find_model",
    "gguf_base",
    "load_config",
    "load_tokenizer",
    "load_weights",
    "nll",
    "preflight",
    "render",
    "row_nll",
    "stop_ids",
    "template",
]
