"""Negative log-likelihood: how surprised a model is by the answers it should give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

from stakelib.models.chat import Rendered
from stakelib.models.engines import load_weights


def nll(source: Path, rows: Sequence[Rendered], adapter: Path | None = None) -> float:
    """Mean negative log-likelihood in nats per learned token (prompt tokens do not count), in float32.

    `source`: a model folder or a GGUF, which is loaded de-quantised. Mean over all learned tokens of all rows.
    """
    return read(load_weights(source, adapter, dtype="float32"), rows).nll


def bits_per_byte(nats: float, rows: Sequence[Rendered], tokenizer: Any) -> float:
    """Nats per learned token of `rows` as bits per UTF-8 byte of their answers: comparable between tokenizers."""
    learned = [[i for i, m in zip(r.ids, r.mask, strict=True) if m] for r in rows]
    size = sum(len(tokenizer.decode(ids, skip_special_tokens=True).encode()) for ids in learned)
    return nats * sum(map(len, learned)) / log(2) / size


def row_nll(model: Any, row: Rendered) -> float:
    """Sum over the learned tokens of one row of -ln p(token | all before); logits are made at those places only."""
    return _score(row, _logits(model, row))[0]


@dataclass
class Reading:
    """What one form of the model says of the same rows.

    `nll`: nats per learned token; `kl`: KL(reference | this) in nats per learned token, None without a reference;
    `top`: the likeliest token at each learned place, given the right tokens before it.
    """

    nll: float
    kl: float | None
    top: list[int]


@dataclass
class Reference:
    """A model's whole distribution at every learned place, exactly, in little memory.

    Log-probabilities of 50 rows are 50 x 300 x 262,144 numbers for Gemma 3; the last hidden states are 50 x 300 x 640,
    and the output layer, kept once, makes the former of the latter, one row at a time.
    """

    states: list[Any]
    head: Any
    cap: float | None  # Gemma 2 bends its logits: cap * tanh(logits / cap)

    def logits(self, index: int) -> Any:
        """[learned places, words] of row `index`."""
        import torch

        with torch.inference_mode():
            logits = self.head(self.states[index]).float()
            return torch.tanh(logits / self.cap) * self.cap if self.cap else logits


def reference(model: Any, rows: Sequence[Rendered]) -> Reference:
    """Keep what `model` (of `load_weights`, without an adapter) says of `rows`; the rest of it may then be dropped."""
    import torch

    states = []
    with torch.inference_mode():
        for row in rows:
            ids, places = torch.tensor(row.ids), torch.tensor(row.mask).nonzero()[:, 0]
            states.append(model.get_decoder()(input_ids=ids[None]).last_hidden_state[0, places - 1].clone())
    return Reference(states, model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None))


def read(model: Any, rows: Sequence[Rendered], against: Reference | None = None) -> Reading:
    """Measure `model` on `rows`, one row at a time, and where `against` is given how far it is from that one."""
    total, apart, top = 0.0, 0.0, []
    for i, row in enumerate(rows):
        nll_sum, kl_sum, best = _score(row, _logits(model, row), against and against.logits(i))
        total, apart, top = total + nll_sum, apart + kl_sum, top + best
    return Reading(total / len(top), apart / len(top) if against else None, top)


def _logits(model: Any, row: Rendered) -> Any:
    import torch

    ids, places = torch.tensor(row.ids), torch.tensor(row.mask).nonzero()[:, 0]
    with torch.inference_mode():
        return model(input_ids=ids[None], logits_to_keep=places - 1).logits[0].float()


def _score(row: Rendered, logits: Any, wanted: Any = None) -> tuple[float, float, list[int]]:
    """(sum of -ln p of the learned tokens, sum of KL(wanted | logits), likeliest tokens)."""
    import torch
    from torch.nn.functional import cross_entropy, kl_div

    learned = torch.tensor(row.ids)[torch.tensor(row.mask).bool()]
    nll_sum = cross_entropy(logits, learned, reduction="sum").item()
    both = zip(logits.split(32), wanted.split(32), strict=True) if wanted is not None else ()  # whole copies: 1 GB more
    kl_sum = sum(kl_div(p.log_softmax(-1), q.log_softmax(-1), reduction="sum", log_target=True).item() for p, q in both)
    return nll_sum, kl_sum, logits.argmax(-1).tolist()
