"""First-generation Gemma from a GGUF: the one architecture of our list that transformers cannot read back itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def architecture(gguf: Path) -> str:
    """The name in the file's header: "gemma", "gemma3", "llama"."""
    from gguf import GGUFReader

    return GGUFReader(gguf).get_field("general.architecture").contents()


def load_gemma(gguf: Path, dtype: Any) -> Any:
    """GemmaForCausalLM with the de-quantised weights of `gguf`. llama.cpp stores each norm weight plus one."""
    import numpy
    import torch
    from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map
    from gguf.quants import dequantize
    from transformers import GemmaConfig, GemmaForCausalLM

    reader = GGUFReader(gguf)

    def field(name: str) -> Any:
        return reader.get_field(f"gemma.{name}").contents()

    tensors = {t.name: t for t in reader.tensors}
    layers = field("block_count")
    config = GemmaConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=layers,
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        head_dim=field("attention.key_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=field("context_length"),
    )
    names = get_tensor_name_map(MODEL_ARCH.GEMMA, layers)
    model = GemmaForCausalLM(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # the output layer is tied to the embeddings: one name
            tensor = tensors[names.get_name(name, try_suffixes=(".weight",))]
            values = torch.from_numpy(numpy.array(dequantize(tensor.data, tensor.tensor_type), dtype="float32"))
            parameter.copy_(values - 1.0 if name.endswith("norm.weight") else values)
    return model
