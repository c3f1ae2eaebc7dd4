"""The Modelfile: how Ollama must wrap a prompt, when it stops, how much it remembers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stakelib.models import template
from stakelib.run import atomic_write_text


def modelfile(tokenizer: Any, gguf: Path, target: Path, context: int = 2048) -> str:
    """Write a Modelfile beside the GGUF's run and return its text.

    TEMPLATE is the training template itself, taken from the tokenizer, so that a prompt reaches the model exactly as
    in training; the BOS is left to llama.cpp. There is no SYSTEM line: the model was trained without one, and an
    unseen line in front of every prompt would only move it away from what it learned. ADAPTER is never used.
    """
    around = template(tokenizer)
    before = around.before.removeprefix(tokenizer.bos_token or "") if _adds_bos(tokenizer, around) else around.before
    system = "{{ if .System }}{{ .System }}\n\n{{ end }}"  # if somebody sets one, it opens the user's turn
    lines = [
        f"# ollama create {gguf.stem.rpartition('-')[0]} -f {target.name}",
        f"FROM ./{gguf.relative_to(target.parent).as_posix()}",
        f'TEMPLATE """{before}{system}{{{{ .Prompt }}}}{around.between}"""',
        f'PARAMETER stop "{around.end}"',
        f"PARAMETER num_ctx {context}",
        "PARAMETER num_predict 400",
        "PARAMETER temperature 0.7",
        "PARAMETER top_p 0.9",
    ]
    text = "\n".join(lines) + "\n"
    atomic_write_text(target, text)
    return text


def _adds_bos(tokenizer: Any, around: Any) -> bool:
    """True for Gemma, whose template opens with a BOS that llama.cpp adds by itself; SmolLM2's opens each turn."""
    return bool(tokenizer.bos_token) and around.before.count(tokenizer.bos_token) == 1
