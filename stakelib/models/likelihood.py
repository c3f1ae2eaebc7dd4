"""Negative log-likelihood: how surprised a model is by the answers it should give."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any

from stakelib.models.chat import Rendered
from stakelib.models.engines import load_weights


def nll(source: Path, rows: Sequence[Rendered], adapter: Path | None = None) -> float:
    """Mean negative log-likelihood in nats per learned token (prompt tokens do not count), in float32.

    `source`: a model folder or a GGUF, which is loaded de-quantised. Mean over all learned tokens of all rows.
    """
    model = load_weights(source, adapter, dtype="float32")
    return sum(row_nll(model, r) for r in rows) / sum(sum(r.mask) for r in rows)


def bits_per_byte(nats: float, rows: Sequence[Rendered], tokenizer: Any) -> float:
    """Nats per learned token of `rows` as bits per UTF-8 byte of their answers: comparable between tokenizers."""
    learned = [[i for i, m in zip(r.ids, r.mask, strict=True) if m] for r in rows]
    size = sum(len(tokenizer.decode(ids, skip_special_tokens=True).encode()) for ids in learned)
    return nats * sum(map(len, learned)) / log(2) / size


def row_nll(model: Any, row: Rendered) -> float:
    """Sum over the learned tokens of one row of -ln p(token | all before); logits are made at those places only."""
    import torch

    ids = torch.tensor(row.ids)
    places = torch.tensor(row.mask).nonzero()[:, 0]
    with torch.inference_mode():
        logits = model(input_ids=ids[None], logits_to_keep=places - 1).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), ids[places], reduction="sum").item()
