"""Models small enough to make in a test, whose answers are known or at least lively."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

# The chain model says: after "\n" (where an answer begins) " energy", then " grid", then the end of turn.
CHAIN = ("\n", "▁energy", "▁grid", "<end_of_turn>")


def chain_model(tiny: Path, folder: Path) -> Path:
    """A Gemma whose next token depends on the last one only: its layers add nothing, its embeddings are a chain."""
    import torch

    model, tokenizer = _load(tiny)
    ids = tokenizer.convert_tokens_to_ids(list(CHAIN))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        words = model.get_input_embeddings().weight
        words.mul_(1e-3)
        # each row's product with the one before is its largest: 2 > 1, then 10 > 5, then 200 > 101
        for i, row in zip(ids, ([1, 0, 0], [2, 1, 0], [0, 10, 1], [0, 0, 200]), strict=True):
            words[i] = 0.0
            words[i, :3] = torch.tensor(row, dtype=words.dtype)
    return _save(model, tiny, folder)


def lively_model(tiny: Path, folder: Path, seed: int) -> Path:
    """Random weights large enough that every token of the prompt moves the answer."""
    import torch

    model, _ = _load(tiny)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.model.layers.named_parameters():
            if weight.ndim == 2:
                spread = 1.5 if "self_attn" in name else 1.0
                weight.copy_(torch.randn(weight.shape, generator=random) * spread / weight.shape[1] ** 0.5)
        words = model.get_input_embeddings().weight
        words.copy_(torch.randn(words.shape, generator=random) * 0.125)
    return _save(model, tiny, folder)


def shaped_model(tiny: Path, folder: Path, kind: str, seed: int = 0) -> Path:
    """A small model of the family `kind` with the tiny model's tokenizer, lively weights and no default of its own.

    Rotary bases differ from every library's default, so that one who does not read them is found out.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    words = AutoConfig.from_pretrained(tiny).vocab_size
    rope = {"rope_type": "default", "rope_theta": 250.0}
    own = {
        "llama": {"rope_parameters": rope, "tie_word_embeddings": True, "head_dim": 16},
        "gemma": {"head_dim": 32},  # no rotary base of its own: llama.cpp's converter writes none for it
        "gemma2": {"rope_parameters": rope, "head_dim": 32, "query_pre_attn_scalar": 32},
        "gemma3_text": {
            "rope_parameters": {"full_attention": rope, "sliding_attention": rope | {"rope_theta": 90.0}},
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    }[kind]
    config = AutoConfig.for_model(kind, vocab_size=words, num_key_value_heads=2, **shape, **ids, **own)
    random = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                spread = 0.2 if "embed" in name else 1.2 / weight.shape[1] ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=random) * spread)
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors", "source.json", "config.json"))
    model.save_pretrained(folder)
    shutil.copyfile(tiny / "generation_config.json", folder / "generation_config.json")
    file = folder / "tokenizer_config.json"  # a Llama's sentencepiece writes a space first unless it is told not to
    settings = json.loads(file.read_text(encoding="utf-8")) | {"add_prefix_space": False}
    file.write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _load(tiny: Path):  # noqa: ANN202
    from stakelib.models import load_tokenizer, load_weights

    return load_weights(tiny, dtype="float32"), load_tokenizer(tiny)


def _save(model, tiny: Path, folder: Path) -> Path:  # noqa: ANN001
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors", "source.json"))
    model.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(tiny / name, folder / name)
    return folder
