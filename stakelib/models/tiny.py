"""A random two-layer model in Gemma's shape, made on the spot without a network. It proves plumbing, never quality."""

from __future__ import annotations

import io
import json
from pathlib import Path

from stakelib.run import atomic_write_json

# Gemma's published turn format; also given to a base model that comes without a chat template (Gemma 3 270M).
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' "
    "+ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
# Gemma's ids 0-107: llama.cpp's converter expects <end_of_turn> at 107.
FIRST_TOKENS = ["<mask>", "\n", *(f"<unused{i}>" for i in range(100)), "<start_of_turn>", "<end_of_turn>"]
WORDS = Path(__file__).resolve().parents[1] / "voices" / "data"  # read as plain text, so that rows are not all bytes


def make_tiny(folder: Path, seed: int = 0) -> None:
    """Write a GemmaForCausalLM (2 layers, width 64, about 0.3 M parameters) with its own tokenizer into `folder`."""
    import torch
    from transformers import GemmaConfig, GemmaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    tokens = _write_tokenizer(folder)
    config = GemmaConfig(
        vocab_size=tokens, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=4096, bos_token_id=2, eos_token_id=1,
        pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GemmaForCausalLM(config)
    model.generation_config.eos_token_id = [1, 107]
    model.save_pretrained(folder)


def _write_tokenizer(folder: Path) -> int:
    """Train a sentencepiece BPE tokenizer with byte fallback; write tokenizer.model and the files made from it."""
    import sentencepiece
    from transformers import GemmaTokenizer

    model = io.BytesIO()
    lines = [
        x.strip() for f in sorted(WORDS.glob("*.yaml")) for x in f.read_text(encoding="utf-8").splitlines() if x.strip()
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=3000, hard_vocab_limit=False,
        byte_fallback=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3, bos_piece="<bos>", eos_piece="<eos>",
        user_defined_symbols=FIRST_TOKENS,
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity",
        split_digits=True, num_threads=1, minloglevel=2)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = GemmaTokenizer.from_pretrained(
        folder, extra_special_tokens=["<start_of_turn>", "<end_of_turn>"], chat_template=GEMMA_TEMPLATE)
    tokenizer.save_pretrained(folder)
    file = (
        folder / "tokenizer_config.json"
    )  # llama.cpp's converter learns from this table which tokens are control tokens
    config = json.loads(file.read_text(encoding="utf-8"))
    special = {i: t for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    config.pop("vocab_file", None)  # a path of this machine
    config["added_tokens_decoder"] = {str(i): {"content": t.content, "special": True} for i, t in special.items()}
    atomic_write_json(file, config)
    return len(tokenizer)
