"""A random two-layer model in Gemma's shape, made on the spot without a network. It proves plumbing, never quality."""

from __future__ import annotations

import io
import json
from pathlib import Path

import yaml

from stakelib.run import atomic_write_json

_DATA = yaml.safe_load(Path(__file__).with_name("tiny.yaml").read_text(encoding="utf-8"))
GEMMA_TEMPLATE = _DATA["template"]
# Gemma's ids 0-107: llama.cpp's converter expects <end_of_turn> at 107.
FIRST_TOKENS = ["<mask>", "\n", *(f"<unused{i}>" for i in range(100)), "<start_of_turn>", "<end_of_turn>"]
WORDS = Path(__file__).resolve().parents[1] / "voices" / "data"  # read as plain text, so that rows are not all bytes


def make_tiny(folder: Path, seed: int = 0) -> None:
    """Write a GemmaForCausalLM (2 layers, width 64, about 0.3 M parameters) with its own tokenizer into `folder`."""
    import torch
    from transformers import GemmaConfig, GemmaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    tokens = _write_tokenizer(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GemmaForCausalLM(GemmaConfig(vocab_size=tokens, **_DATA["model"]))
    model.generation_config.eos_token_id = [1, 107]
    model.save_pretrained(folder)


def _write_tokenizer(folder: Path) -> int:
    """Train a sentencepiece BPE tokenizer with byte fallback; write tokenizer.model and the files made from it."""
    import sentencepiece
    from transformers import GemmaTokenizer

    model = io.BytesIO()
    lines = (x.strip() for f in sorted(WORDS.glob("*.yaml")) for x in f.read_text(encoding="utf-8").splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=filter(None, lines), model_writer=model, user_defined_symbols=FIRST_TOKENS, **_DATA["words"]
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = GemmaTokenizer.from_pretrained(
        folder, extra_special_tokens=["<start_of_turn>", "<end_of_turn>"], chat_template=GEMMA_TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"  # llama.cpp's converter learns from it which tokens are control tokens
    config = json.loads(file.read_text(encoding="utf-8"))
    special = {i: t for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    config.pop("vocab_file", None)  # a path of this machine
    config["added_tokens_decoder"] = {str(i): {"content": t.content, "special": True} for i, t in special.items()}
    atomic_write_json(file, config)
    return len(tokenizer)
