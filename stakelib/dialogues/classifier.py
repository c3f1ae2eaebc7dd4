"""Which of the nine is speaking? One classifier, trained on rule texts, deaf to what the prompt gives away."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stakelib.scenarios.metrics import METRICS
from stakelib.voices import CONTEXTS, STAKEHOLDERS, VARIANTS


@functools.cache
def _given() -> re.Pattern[str]:
    """All that begins like a word of the nine names, their priorities, the metrics, stances and contexts; digits.

    Words of under five letters as they are, longer ones by their first five: "secure" goes with "security".
    """
    told = [text for p in STAKEHOLDERS.values() for text in (p.name, *p.priorities)]
    told += [*(label for label, *_ in METRICS.values()), *VARIANTS, *CONTEXTS]
    listed = {word[:5] + r"\w*" if len(word) > 4 else word + "s?" for word in re.findall(r"\w{2,}", " ".join(told))}
    return re.compile(rf"\b(?:{'|'.join(sorted(listed))})\b|\d[\d.,]*", re.I)


def masked(text: str, row: Mapping[str, Any]) -> str:
    """`text` without the row's country and scenario and without all that any prompt gives away of who speaks."""
    for name in (row["scenario"], row["country"]):
        text = text.replace(name, " ")
    return _given().sub(" ", text)


def listener(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A classifier (tf-idf of words and pairs, logistic regression) of the completions of training rows.

    `rows`: the training split alone, so that no country and no scenario of the test is known to it.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), LogisticRegression(C=10))
    return model.fit([masked(r["completion"], r) for r in rows], [r["stakeholder_id"] for r in rows])


def heard(model: Any, texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The stakeholder id that each text sounds like; "" for a text without words."""
    plain = [masked(text, row) for text, row in zip(texts, rows, strict=True)]
    return [who if re.search(r"\w", text) else "" for who, text in zip(model.predict(plain), plain, strict=True)]
