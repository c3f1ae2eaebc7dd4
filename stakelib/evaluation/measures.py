"""What can be checked in an answer without asking anybody: form, figures, echo. One line per row and system."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import yaml

from stakelib.dialogues.check import ECHO
from stakelib.dialogues.classifier import heard
from stakelib.dialogues.numbers import mentions, ungrounded, without_names
from stakelib.evaluation.words import (
    agreement,
    distinct_pairs,
    perplexity,
    priorities,
    reading_ease,
    unfounded,
    wrong_way,
)
from stakelib.run import CourseError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Measure:
    """`kind`: yes/no, share (0-1) or number. `direction`: which way is better; "none" is shown but not judged.

    `source`: where the measure, or what it looks for, comes from.
    """

    label: str
    kind: str
    unit: str
    direction: str
    definition: str
    source: str
    blind_spot: str


def _read() -> dict[str, Measure]:
    text = files(__package__).joinpath("measures.yaml").read_text(encoding="utf-8")
    return {name: Measure(**about) for name, about in yaml.safe_load(text).items()}


MEASURES = _read()  # measures.yaml: each with its unit, direction, source and blind spot
ITEMS = {"Appreciates": (2, 4), "Concerns": (2, 4), "Questions": (3, 5), "Engagement Tips": (2, 3)}
HEADINGS = ["Initial Reaction", *ITEMS]
_NAMES = "|".join(HEADINGS)
_HEADING = re.compile(rf"^[ \t]*(?:\*\*({_NAMES}):?\*\*:?|#{{1,6}}[ \t]*({_NAMES}):?|({_NAMES}):)", re.MULTILINE)
_ITEM = re.compile(r"^[ \t]*(?:[-*•]|\d{1,2}[.)])[ \t]+\S", re.MULTILINE)
_FAILED = {"text": "", "stopped": False, "new_tokens": 0, "prompt_tokens": 0, "seconds": 0.0}


def sections(text: str) -> list[tuple[str, str]]:
    """(heading, body) pairs in the order of the text; headings as **Name**:, # Name or Name:."""
    found = list(_HEADING.finditer(text))
    ends = [*(m.start() for m in found), len(text)][1:]
    return [(m[1] or m[2] or m[3], text[m.end() : end].strip()) for m, end in zip(found, ends, strict=True)]


def copied(text: str, prompt: str) -> bool:
    """True if `text` repeats a whole prompt line of >= 8 words, or three of >= 3 words, whatever bullets they have."""
    flat, *lines = (" ".join(re.findall(r"[\w%$.,]+", part.lower())) for part in (text, *prompt.splitlines()))
    lengths = [len(re.findall(r"\w+", line)) for line in set(lines) if line and line in flat]
    return any(n >= 8 for n in lengths) or sum(n >= 3 for n in lengths) >= 3


def repeated(text: str) -> float:
    """Share (0-1) of four-word runs that occurred before; 1.0 for a text of under four words."""
    words = re.findall(r"[\w%$.,-]+", text.lower())
    runs = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 1.0


def different(figures: Sequence[Any]) -> int:
    """How many of these mentions differ in value, unit or year."""
    return len({(m.value, m.unit, m.year) for m in figures})


def _named(mention: Any) -> str | None:
    """A source figure as a reader needs it: its text, and its year where it has one."""
    return mention and mention.text + (f" ({mention.year})" if mention.year else "")


def score_answer(row: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
    """All measures of one answer; None for those that need more than it (`score` fills them in, where it can).

    `invented`: each figure the prompt does not hold, with the nearest it does; `claims`: words on what it has no data
    on; `wrong_way`: phrases that call a rise a fall or the other way round.
    """
    text, prompt = answer["text"], row["prompt"]
    told, held = (mentions(without_names(part, prompt)) for part in (text, prompt))
    parts, some = sections(text), bool(text.strip())
    bodies = dict(parts)
    misses = ungrounded(text, prompt, derived=True)
    wrong = {miss.mention.start for miss in misses}
    right = [m for m in told if m.start not in wrong]
    items = {name: len(_ITEM.findall(bodies.get(name, ""))) for name in ITEMS}
    claims, turned = unfounded(text, prompt), wrong_way(text, prompt)
    facts = different(right) + sum(row[name] in text for name in ("country", "scenario"))
    return {
        **dict.fromkeys(MEASURES),
        "has_sections": [name for name, _ in parts] == HEADINGS and all(bodies.values()),
        "items_ok": all(low <= items[name] <= high for name, (low, high) in ITEMS.items()),
        "stopped": bool(answer["stopped"]) and some,
        "cites_three": some and different(right) >= min(3, different(held)),
        "grounded_share": len(right) / len(told) if told else 0.0,
        "keeps_to_data": some and not claims,
        "right_direction": some and not turned,
        "echo_free": some and not ECHO.search(text),
        "copied_prompt": not some or copied(text, prompt),
        "repeated": repeated(text),
        "priorities": priorities(text, row["stakeholder_id"]),
        "specificity": 100 * facts / max(1, len(text.split())),
        "distinct_2": distinct_pairs(text),
        "readability": reading_ease(text),
        "words": len(text.split()),
        "new_tokens": answer["new_tokens"],
        "seconds": answer["seconds"] or None,
        "tokens_per_second": answer["new_tokens"] / answer["seconds"] if answer["seconds"] else None,
        "numbers": len(told),
        "grounded": len(right),
        "invented": [
            {
                "text": m.mention.text,
                "start": m.mention.start,
                "end": m.mention.end,
                "reason": m.reason,
                "nearest": _named(m.nearest),
            }
            for m in misses
        ],
        "claims": claims,
        "wrong_way": turned,
        "missing": [name for name in HEADINGS if not bodies.get(name)],
        "items": items,
    }


def score(
    rows: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
    *,
    listener: Any = None,
    again: Sequence[Mapping[str, Any]] = (),
    surprise: bool = False,
) -> pd.DataFrame:
    """One line per row x system, with every measure; a row that a system did not answer stays in as a failure.

    `listener` (dialogues.classifier) adds "identity" and "heard"; `again`, second answers of the same systems to the
    same rows, adds "consistency"; `surprise` adds "perplexity" where that model is on disk. Else these are None.
    Raises CourseError without rows or answers.
    """
    import pandas as pd

    if not rows or not answers:
        raise CourseError("there are no answers to measure", "ask both systems about held-out rows first")
    given, second = ({(a["row_id"], a["system"]): a for a in some} for some in (answers, again))
    keep = ("scenario_id", "scenario", "country", "stakeholder_id", "stakeholder")
    asked = [(row, system) for system in sorted({a["system"] for a in answers}) for row in rows]
    texts, lines = [], []
    for row, system in asked:
        answer = given.get((row["id"], system), _FAILED)
        line = {"row_id": row["id"], "system": system, **{k: row[k] for k in keep}, **score_answer(row, answer)}
        if system in {name for _, name in second}:
            line["consistency"] = agreement(answer["text"], second.get((row["id"], system), _FAILED)["text"])
        texts.append(answer["text"])
        lines.append(line)
    table = pd.DataFrame(lines)
    if listener is not None:
        table["heard"] = heard(listener, texts, [row for row, _ in asked])
        table["identity"] = table["heard"] == table["stakeholder_id"]
    if surprise:
        table["perplexity"] = perplexity(texts)
    return table


def confusion(scores: pd.DataFrame) -> pd.DataFrame:
    """Counts: the stakeholder asked (down) by the one that the classifier heard (across); needs score's `listener`."""
    import pandas as pd

    return pd.crosstab(scores["stakeholder_id"], scores["heard"])
