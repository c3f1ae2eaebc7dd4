"""What an answer's words say beyond its figures: claims, directions, topics, and how plainly it reads."""

from __future__ import annotations

import functools
import re
from importlib.resources import files
from math import exp
from typing import Any

import yaml

from stakelib.dialogues.check import absent
from stakelib.dialogues.numbers import Mention, mentions, without_names
from stakelib.voices import STAKEHOLDERS

TIPS = re.compile(r"^\W*Engagement Tips\b.*\n*(?:[ \t]*(?:[-*•]|\d+[.)]).*\n?)*", re.M)  # heading and list


@functools.cache
def words() -> dict[str, Any]:
    """The word lists of words.yaml."""
    return yaml.safe_load(files(__package__).joinpath("words.yaml").read_text(encoding="utf-8"))


@functools.cache
def _any(name: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{words()[name]})\b", re.I)


@functools.cache
def _moving(metric: str, way: str) -> re.Pattern[str]:
    """A metric's name with a verb of that way: "coal of 40 MW falls" (not short), "the growth of peak demand"."""
    name, verb = (rf"\b(?:{part})\b" for part in (words()["names"][metric], words()[way]))
    gap, link, no_move = words()["gap"], words()["link"], r"of|in(?! \d{4})|short|behind|below"
    return re.compile(
        rf"{name}(?:[ (]+(?:{gap})\)?){{0,8}} (?!(?:lower|reduce|cut)s ){verb}(?! (?:{no_move}) )"
        rf"|{verb}(?: (?:{link})){{0,4}} {name}",
        re.I,
    )


def statements(text: str) -> list[str]:
    """The sentences of `text` that state something: no question, no tip."""
    return [s for s in re.split(r"(?<=[.!?])\s+|\n", TIPS.sub("", text)) if s.strip() and not s.rstrip().endswith("?")]


def unfounded(text: str, prompt: str) -> list[str]:
    """Technologies and metrics of which `text` makes a claim though `prompt` holds no data on them.

    A word that the prompt itself uses, as a priority say, is free as long as no figure stands beside it.
    """
    said = [s for s in statements(without_names(text, prompt)) if not _any("lacking").search(s)]
    own = without_names(prompt, prompt)
    loose = [w for w in absent("\n".join(said), own) if not re.search(rf"\b{w}\b", own, re.I)]
    firm = [w for s in said for w in absent(s, own) if mentions(s)]
    return list(dict.fromkeys(loose + firm))


def _ways(prompt: str) -> dict[str, str]:
    """Metric -> "up" or "down", from its first to its last year in the prompt, where it never turns round."""
    found: dict[str, dict[int, float]] = {}
    for m in mentions(without_names(prompt, prompt)):
        if m.metric in words()["names"] and m.year:
            found.setdefault(m.metric, {})[m.year] = m.value
    ways = {"emissions": "down"} if found.get("emission_cut") else {}
    for metric, by_year in found.items():
        series = [by_year[year] for year in sorted(by_year)]
        if len(series) > 1 and series in (sorted(set(series)), sorted(set(series), reverse=True)):
            ways[metric] = "up" if series[-1] > series[0] else "down"
    return ways


def wrong_way(text: str, prompt: str) -> list[str]:
    """Phrases of `text` that call a rise a fall, or a fall a rise, against `prompt` or against their own figures."""
    ways, out = _ways(prompt), []
    for sentence in statements(without_names(text, prompt)):
        wrong = [m for k, way in ways.items() for m in _moving(k, "down" if way == "up" else "up").finditer(sentence)]
        out += [m.group() for m in wrong if _stated(sentence, m.start(), m.end())]
        out += _against_itself(sentence)
    return out


def _stated(sentence: str, start: int, end: int) -> bool:
    """True unless the clause up to just behind the phrase is a wish, a condition, a doubt or a denial."""
    clause = max(sentence.rfind(mark, 0, start) for mark in ",;:") + 1
    return not _any("unstated").search(sentence, clause, end + 12)


def _against_itself(sentence: str) -> list[str]:
    """ "falls from 60% to 80%", "goes from 60% to 80%, a clear fall": a verb that its two figures of one unit deny."""
    told = mentions(sentence) if " from " in sentence else []
    after = {way: rf"(?:,? (?:in|by) \d{{4}})?, an? (?:\w+ )?(?:{words()[way]})\b" for way in ("up", "down")}

    def wrong(a: Mention, b: Mention) -> bool:
        verbs = [(m.end(), way) for way in after for m in _any(way).finditer(sentence, 0, a.start)]
        said = [way for end, way in sorted(verbs)[-1:] if re.fullmatch(r"(?: \w+){0,5} from ", sentence[end : a.start])]
        said += [way for way in after if re.match(after[way], sentence[b.end :], re.I)]
        linked = re.fullmatch(r"(?:,? (?:in|by) \d{4})?(?: up| down)? to ", sentence[a.end : b.start])
        denied = linked and a.unit == b.unit and ("up", "down")[b.value > a.value] in said
        return bool(denied and _stated(sentence, a.start, b.end))

    return [
        sentence[a.start : b.end] for a, b in zip(told, told[1:], strict=False) if a.value != b.value and wrong(a, b)
    ]


def priorities(text: str, stakeholder: str) -> float:
    """Share (0-1) of the stakeholder's priorities of which a word of five letters or more begins alike in `text`."""
    stems = [[word[:5] for word in re.findall(r"\w{5,}", p.lower())] for p in STAKEHOLDERS[stakeholder].priorities]
    return sum(any(re.search(rf"\b{s}", text.lower()) for s in some) for some in stems) / len(stems)


def agreement(first: str, second: str) -> float:
    """Mean (0-1) of the Jaccard indices of cited figures and of topics under Concerns; 0 where neither has any."""

    def common(a: set, b: set) -> float:
        return len(a & b) / len(a | b) if a | b else 0.0

    def topics(text: str) -> set[str]:
        body = text.partition("Concerns")[2].partition("Questions")[0] or text
        return {name for name, pattern in words()["names"].items() if re.search(rf"\b(?:{pattern})\b", body, re.I)}

    figures = [{(round(m.value, 6), m.unit, m.year) for m in mentions(text)} for text in (first, second)]
    return (common(*figures) + common(topics(first), topics(second))) / 2


def distinct_pairs(text: str) -> float | None:
    """Share of different two-word runs (distinct-2, Li et al. 2016); None under two words."""
    said = re.findall(r"[\w%$.,-]+", text.lower())
    pairs = list(zip(said, said[1:], strict=False))
    return len(set(pairs)) / len(pairs) if pairs else None


def reading_ease(text: str) -> float | None:
    """Flesch reading ease (1948), syllables counted as groups of vowels; None without a word."""
    said = re.findall(r"[A-Za-z]+", text)
    sentences = max(1, len(re.findall(r"[.!?:](?:\s|$)", text)))
    syllables = sum(max(1, len(re.findall(r"[aeiouy]+", re.sub(r"e$", "", w.lower())))) for w in said)
    return 206.835 - 1.015 * len(said) / sentences - 84.6 * syllables / len(said) if said else None


def perplexity(texts: list[str], name: str = "gemma-3-270m") -> list[float | None]:
    """Perplexity per token of each text under a model that took no part; None for all where it is not on disk."""
    from stakelib.models import Rendered, load_tokenizer, load_weights, row_nll
    from stakelib.models.catalog import cache_folder

    folder = cache_folder() / "models" / name
    if not (folder / "source.json").exists():
        return [None] * len(texts)
    tokenizer, model = load_tokenizer(folder), load_weights(folder)
    return [
        exp(row_nll(model, Rendered(ids, [0] + [1] * (len(ids) - 1))) / (len(ids) - 1)) if len(ids) > 1 else None
        for ids in (tokenizer(text)["input_ids"] for text in texts)
    ]
