"""What can be checked in an answer without asking anybody: form, figures, echo. One line per row and system."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stakelib.dialogues.numbers import mentions, ungrounded

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Measure:
    """`kind`: yes/no, share (0-1) or number. `direction`: which way is better; "none" is shown but not judged."""

    label: str
    kind: str
    unit: str
    direction: str
    definition: str
    blind_spot: str


MEASURES: dict[str, Measure] = {
    "has_sections": Measure(
        "All five sections", "yes/no", "% of answers", "higher",
        "The five headings of the guide, each once, in order, none empty.",
        "Says nothing about what the sections say."),
    "items_ok": Measure(
        "Right number of points", "yes/no", "% of answers", "higher",
        "Appreciates 2-4, Concerns 2-4, Questions 3-5, Engagement Tips 2-3 bullet points.",
        "Two bullets that say the same count as two."),
    "stopped": Measure(
        "Stopping by itself", "yes/no", "% of answers", "higher",
        "The model ended its turn before the token limit, with some text.", "A one-word answer stops too."),
    "cites_three": Measure(
        "Three or more scenario figures", "yes/no", "% of answers", "higher",
        "At least three different figures that stand in the prompt; all, where it holds fewer.",
        "Figures may be listed without being discussed."),
    "grounded_share": Measure(
        "Correctness of figures", "share", "% of figures, mean over answers", "higher",
        "Share of an answer's figures found in its prompt with value, unit and, where stated, metric and year; "
        "an answer without any figure counts as 0.",
        "A right figure in a wrong argument passes; so do wrong words for it."),
    "copied_prompt": Measure(
        "Copying of the prompt", "yes/no", "% of answers", "lower",
        "Repeats a whole prompt line of 8 or more words, or three lines of 3 or more.",
        "A copy with one changed word is not seen; an empty answer copies nothing."),
    "repeated": Measure(
        "Repetition", "share", "% of 4-word runs", "lower",
        "Share of runs of four words that occurred before in the answer; under four words counts as 100 %.",
        "The same thought in other words is not seen."),
    "words": Measure(
        "Length", "number", "words", "none", "Words in the answer.", "Longer is not better."),
    "new_tokens": Measure(
        "Tokens written", "number", "tokens", "none", "Tokens the model generated.", "Depends on the tokenizer."),
    "tokens_per_second": Measure(
        "Writing speed", "number", "tokens/s per answer", "none", "New tokens divided by the seconds of this answer.",
        "Depends on the machine, on what else it does, and on how many answers were written at once."),
}  # fmt: skip

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
    """True if `text` repeats a whole prompt line of >= 8 words, or three prompt lines of >= 3 words."""
    flat = " ".join(text.lower().split())
    lines = {" ".join(line.lower().split()) for line in prompt.splitlines()}
    lengths = [len(re.findall(r"\w+", line)) for line in lines if line and line in flat]
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
    """All measures of one answer. `invented` lists each figure the prompt does not hold, with the nearest it does."""
    text, prompt = answer["text"], row["prompt"]
    parts, told = sections(text), mentions(text)
    bodies = dict(parts)
    misses = ungrounded(text, prompt)
    wrong = {miss.mention.start for miss in misses}
    right = [m for m in told if m.start not in wrong]
    items = {name: len(_ITEM.findall(bodies.get(name, ""))) for name in ITEMS}
    return {
        "has_sections": [name for name, _ in parts] == HEADINGS and all(bodies.values()),
        "items_ok": all(low <= items[name] <= high for name, (low, high) in ITEMS.items()),
        "stopped": bool(answer["stopped"]) and bool(text.strip()),
        "cites_three": bool(text.strip()) and different(right) >= min(3, different(mentions(prompt))),
        "grounded_share": len(right) / len(told) if told else 0.0,
        "copied_prompt": copied(text, prompt),
        "repeated": repeated(text),
        "words": len(text.split()),
        "new_tokens": answer["new_tokens"],
        "tokens_per_second": answer["new_tokens"] / answer["seconds"] if answer["seconds"] else None,
        "numbers": len(told),
        "grounded": len(right),
        "invented": [
            {"text": m.mention.text, "start": m.mention.start, "end": m.mention.end, "reason": m.reason,
             "nearest": _named(m.nearest)}
            for m in misses
        ],
        "missing": [name for name in HEADINGS if not bodies.get(name)],
        "items": items,
    }  # fmt: skip


def score(rows: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One line per row x system, with every measure; a row that a system did not answer stays in as a failure."""
    import pandas as pd

    given = {(a["row_id"], a["system"]): a for a in answers}
    keep = ("scenario_id", "scenario", "country", "stakeholder_id", "stakeholder")
    lines = []
    for system in sorted({a["system"] for a in answers}):
        for row in rows:
            measured = score_answer(row, given.get((row["id"], system), _FAILED))
            lines.append({"row_id": row["id"], "system": system, **{k: row[k] for k in keep}, **measured})
    return pd.DataFrame(lines)
