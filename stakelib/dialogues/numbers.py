"""Find every number in a text with its unit, metric and year, and tell which ones a prompt does not hold.

One matcher serves the data gate and the evaluation. It is deliberately strict: a number that it cannot place counts
as not grounded. Idioms (24/7), names (SDG 7, N-1, CO2), list numbering and bare years are no figures.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from importlib.resources import files

import yaml

DATA = yaml.safe_load(files(__package__).joinpath("numbers.yaml").read_text(encoding="utf-8"))
NOT_FIGURES = re.compile(DATA["no_figures"], re.I | re.M)
YEAR = re.compile(
    r"(?i)(?<![\w$.,])(?:19|20)\d\d(?:s\b|(?![\d,]*\d|\.\d|\w|\s*(?:" + DATA["quantity"] + "))"
    r"(?:(?<=\b(?:in|by) \d{4})|(?<=\b(?:since|until|after) \d{4})|(?!\s*(?:" + DATA["counted"] + "))))"
)

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
SMALL = {word: i for i, word in enumerate(_ONES.split())} | {"dozen": 12}
TENS = {word: 10 * i for i, word in enumerate(_TENS.split(), 2)}
SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_WORD = "|".join(sorted({*SMALL, *TENS}, key=len, reverse=True))
WORDS = rf"(?:(?:a|{_WORD})[- ](?:{'|'.join(SCALES)})|{_WORD})(?:(?:[- ]and)?[- ](?:{_WORD}|{'|'.join(SCALES)}))*"
PARTS = re.compile(
    r"\b(?:(?P<many>two|three|four)[- ](?P<parts>thirds|quarters|fifths)"
    r"|(?:an?|one)[- ]?(?P<part>half|third|quarter|fifth|tenth)|(?P<half>half))"
    r"(?=\s+(?:of|the|its|all|our|that)\b|[.,;:]|$)",
    re.I,
)
TIMES = re.compile(
    r"\b(?:(?:doubl|tripl|quadrupl)(?:e|es|ed|ing)(?![- ](?:count|check|dividend|digit))"
    r"|(?:two|three|four|five|ten)-?fold\b|twice(?= (?:as|the)))",
    re.I,
)
SCALE = r"(?:\s*(?P<scale>thousand|million|billion|trillion|bn|mn|[kMB](?![A-Za-z])))?"
UNIT = rf"(?:\s*-?(?P<unit>{DATA['unit']}))?"
NUMBER = re.compile(
    r"(?P<money>\$|US\$|USD ?)?(?P<digits>(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)"
    rf"{SCALE}{UNIT}",
    re.I,
)
SPELLED = re.compile(rf"\b(?P<words>{WORDS})\b{UNIT}", re.I)
RATE = re.compile(
    r"(?:\s*(?:of )?(?:USD|dollars))?\s*"
    r"(?:(?:per|a|each|every) year|annually|per annum|yearly|/ ?(?:yr|year))",
    re.I,
)
TALK = re.compile(DATA["talk"], re.I)
HEDGE = re.compile(
    r"\b(?:about|around|roughly|some|approximately|close to|(?P<under>nearly|almost|just under)"
    r"|(?P<over>over|more than))\s+\$?$",
    re.I,
)
CHANGE = re.compile(DATA["change"], re.I)

_COMPILED = {unit: [(re.compile(rf"\b(?:{p})\b", re.I), m) for p, m in rows] for unit, rows in DATA["keywords"].items()}
ATTACHED = re.compile(
    r"\s*(?:(?:of|in|from|for|as)\s)?"
    r"(?:(?:the|its|our|new|installed|more|extra|firm|cut|less|fewer|lower|total)\s)*"
)
SPAN = re.compile(r"\b(?:between|from|the|both) (\d{4}) (?:and|to) (\d{4})\b", re.I)
STOP = re.compile(r"[,;:()\u2014\u2013.!?]|\b(?:and|but|while|then|with|to|from|against|rising|falling)\b")


@dataclass(frozen=True)
class Mention:
    """A figure in a text: `value` in `unit` (%, MW, GWh, m$, m$/yr, MW/yr, Mt CO2, ha, jobs, ... or "")."""

    value: float
    unit: str
    metric: str | None
    year: int | None
    start: int
    end: int
    text: str
    step: float = 0.0  # half of the last printed digit, in `unit`
    bound: int = 0  # 1 after "more than": no less will do; -1 after "nearly": no more


@dataclass(frozen=True)
class Miss:
    """A mention that the prompt does not hold, the closest figure that it does hold, and what is wrong."""

    mention: Mention
    nearest: Mention | None
    reason: str


def mentions(text: str) -> list[Mention]:
    """Every figure of `text`, digits or words, in order; see the module docstring for what is no figure."""
    return list(_mentions(text))


@functools.lru_cache(2048)
def _mentions(text: str) -> tuple[Mention, ...]:
    masked = NOT_FIGURES.sub(lambda m: "_" * len(m.group()), text)
    years = [(m.start(), m.end(), int(m.group()[:4])) for m in YEAR.finditer(masked)]
    free = YEAR.sub(lambda m: "_" * len(m.group()), masked)
    found = [m for m in map(_digits, NUMBER.finditer(free)) if m]
    found += [m for m in map(_spelled, SPELLED.finditer(free)) if m]
    found += [
        Mention(_fraction(m), "%", None, None, m.start(), m.end(), m.group(), 2.0)
        for m in PARTS.finditer(free)
        if not re.match(r"\s*(?:-|hour|year|day|way|time)", free[m.end() : m.end() + 6])
    ]
    found += [Mention(0.0, "times", None, None, m.start(), m.end(), m.group()) for m in TIMES.finditer(free)]
    found = _inherit(_no_overlap([_rated(m, free) for m in found]), free)
    return tuple(_placed(m, found, years, masked) for m in found)


def _digits(match: re.Match[str]) -> Mention | None:
    digits = match["digits"]
    places = len(digits.partition(".")[2])
    value, scale = float(digits.replace(",", "")), _scale(match["scale"])
    unit, factor = _unit(match["unit"], match["money"])
    step = 0.5 * 10.0**-places
    before = match.string[max(0, match.start() - 16) : match.start()]
    hedge = HEDGE.search(before)
    bound = bool(hedge and hedge["over"]) - bool(hedge and hedge["under"])
    if hedge and not places and value:
        step = 0.5 * 10.0 ** (len(digits.replace(",", "")) - len(digits.replace(",", "").rstrip("0")))
        step = min(step, max(0.5, 0.05 * value))  # "nearly 100" is not 60
    text, factor = match.group().strip(), scale * factor
    end = match.start() + len(text)
    return Mention(value * factor, unit, None, None, match.start(), end, text, step * factor, bound)


def _spelled(match: re.Match[str]) -> Mention | None:
    words = re.split(r"[- ]+", match["words"].lower())
    unit, factor = _unit(match["unit"], None)
    total = part = 0.0
    for word in words:
        if word in SCALES:
            part = (part or 1) * SCALES[word]
            if SCALES[word] >= 1e3:
                total, part = total + part, 0.0
        else:
            part += SMALL.get(word, TENS.get(word, 0))
    value = total + part
    if not unit and (value == 1 or (value < 13 and TALK.match(match.string[match.end() : match.end() + 24]))):
        return None
    if value in (0, 1) and unit in ("", "time", "jobs", "people"):
        return None  # "one day", "one job at a time"
    text = match.group().strip()
    return Mention(value * factor, unit, None, None, match.start(), match.start() + len(text), text, 0.5 * factor)


def _scale(word: str | None) -> float:
    if not word:
        return 1.0
    short = {"k": 1e3, "m": 1e6, "mn": 1e6, "b": 1e9, "bn": 1e9}
    return SCALES.get(word.lower(), 0) or short[word.lower()]


def _unit(word: str | None, money: str | None) -> tuple[str, float]:
    if money:
        return "m$", 1e-6
    for pattern, unit, factor in DATA["units"] if word else []:
        if re.match(pattern, word, 0 if unit in ("MW", "GWh", "Mt CO2") else re.I):
            return unit, factor
    return ("unknown", 1.0) if word else ("", 1.0)


def _fraction(match: re.Match[str]) -> float:
    if match["many"]:
        return DATA["fractions"][f"{match['many']} {match['parts']}".lower()]
    return DATA["fractions"][(match["part"] or match["half"]).lower()]


def _rated(mention: Mention, text: str) -> Mention:
    """ "$533M USD per year" is another unit than "$533M USD"."""
    after = RATE.match(text, mention.end)
    if after and mention.unit in ("m$", "MW", "GWh", "Mt CO2"):
        return replace(mention, unit=f"{mention.unit}/yr", end=after.end(), text=text[mention.start : after.end()])
    if mention.unit == "m$" and (tail := re.match(r"\s*(?:of )?(?:USD|US dollars|dollars)", text[mention.end :])):
        end = mention.end + tail.end()
        return replace(mention, end=end, text=text[mention.start : end])
    return mention


def _no_overlap(found: list[Mention]) -> list[Mention]:
    kept: list[Mention] = []
    for mention in sorted(found, key=lambda m: (m.start, -m.end)):
        if not kept or mention.start >= kept[-1].end:
            kept.append(mention)
    return kept


def _inherit(found: list[Mention], text: str) -> list[Mention]:
    """In "300 to 600 MW" the first number has the second one's unit."""
    out = list(found)
    for i in range(len(out) - 2, -1, -1):
        between = text[out[i].end : out[i + 1].start]
        if not out[i].unit and re.fullmatch(r"\s*(?:to|and|or|-|\u2013)\s*", between):
            out[i] = replace(out[i], unit=out[i + 1].unit)
    return out


def _placed(mention: Mention, found: list[Mention], years: list[tuple[int, int, int]], text: str) -> Mention:
    """Add year and metric from the words around, within the sentence."""
    left, right = _sentence(text, mention)
    following = min([m.start for m in found if m.start >= mention.end] + [right])
    unit, metric = mention.unit, _metric(mention, text, left, right, following)
    if not unit and metric is None and re.search(r"\bjobs\b", text[left : mention.start], re.I):
        unit = "jobs"  # "Jobs Created: 10,645 (2030)"
        metric = _metric(replace(mention, unit=unit), text, left, right, following)
    return replace(mention, unit=unit, metric=metric, year=_year(mention, years, text, left, following))


def _sentence(text: str, mention: Mention) -> tuple[int, int]:
    ends = [m.end() for m in re.finditer(r"(?<=[.!?])\s+|\n", text)]
    left = max([e for e in ends if e <= mention.start], default=0)
    return left, min([e for e in ends if e >= mention.end], default=len(text))


def _year(mention: Mention, years: list[tuple[int, int, int]], text: str, left: int, following: int) -> int | None:
    direct = re.match(r"\s*\((?:by |in |for )?", text[mention.end : mention.end + 10])
    reach = mention.end + (direct.end() if direct else 0)
    for start, _, year in years:
        if reach <= start <= following and not STOP.search(text[reach:start]):
            return year
    before = [year for start, end, year in years if left <= start and end <= mention.start]
    if any(m.group(2) == str(before[-1]) for m in SPAN.finditer(text, left, mention.start) if before):
        return None  # either of two years
    return before[-1] if before else None


def _metric(mention: Mention, text: str, left: int, right: int, following: int) -> str | None:
    table = _COMPILED.get(mention.unit, [])
    own = [m for p, m in table if mention.unit == "jobs" and p.search(mention.text)]
    if own:
        return own[0]
    attached = ATTACHED.match(text, mention.end, following)
    at = attached.end() if attached else mention.end
    for pattern, metric in table:
        if pattern.match(text, at, following):
            return metric
    before = [(m.end(), -i, name) for i, (p, name) in enumerate(table) for m in p.finditer(text, left, mention.start)]
    if before:
        return max(before)[2]
    after = [(m.start(), i, name) for i, (p, name) in enumerate(table) for m in p.finditer(text, mention.end, right)]
    return min(after)[2] if after else DATA["only"].get(mention.unit)


def without_names(text: str, prompt: str) -> str:
    """`text` with the prompt's country and scenario names blotted out: "50% Solar Now" is a name, not a claim."""
    names = [a or b for a, b in re.findall(r'^- (?:Country|Scenario): (.+)$|scenario "(.+?)" ', prompt, re.M)]
    for name in sorted(names, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "_" * len(name), text)
    return text


def ungrounded(text: str, prompt: str, derived: bool = False) -> list[Miss]:
    """The mentions of `text` that `prompt` does not hold with the same value (rounding as printed allowed), unit,
    and, where both state them, metric and year. `derived`: after a word of change, the difference, or change in
    percent, of this metric's figures in two years counts as held too; training rows do no sums, so the gate is strict.
    """
    held = mentions(without_names(prompt, prompt))
    plain = without_names(text, prompt)
    misses = [miss for m in mentions(plain) if (miss := _miss(m, held))]
    sums = _changes(held) if derived and misses else []
    return [
        m
        for m in misses
        if not (
            CHANGE.search(plain, max(0, m.mention.start - 40), m.mention.end + 12)
            and not re.search(r"\bto \$?$", plain[: m.mention.start])  # a level, no change
            and any(_is_change(m.mention, s) for s in sums)
        )
    ]


def _is_change(said: Mention, change: Mention) -> bool:
    """Is it this change? In percent the words name another metric (a share, a cut), so only the value can tell."""
    same = said.unit == change.unit and (said.unit == "%" or said.metric in (None, change.metric))
    return same and abs(change.value - said.value) <= max(said.step, change.step) * 1.000001


def _changes(held: list[Mention]) -> list[Mention]:
    """Difference and change in percent between two years of the same metric."""
    pairs = [
        (a, b)
        for a in held
        for b in held
        if a.metric and (a.metric, a.unit) == (b.metric, b.unit) and None not in (a.year, b.year) and a.year < b.year
    ]
    differences = [replace(b, value=abs(b.value - a.value)) for a, b in pairs]
    return differences + [
        replace(b, value=abs(100 * (b.value / a.value - 1)), unit="%", step=0.05) for a, b in pairs if a.value
    ]


def _miss(mention: Mention, held: list[Mention]) -> Miss | None:
    near = sorted(held, key=lambda h: (h.unit != mention.unit, abs(h.value - mention.value)))
    same = [
        h
        for h in held
        if abs(h.value - mention.value) <= max(mention.step, h.step * 1e-6) * 1.000001
        and (h.value - mention.value) * mention.bound >= 0
    ]
    unit = [h for h in same if h.unit == mention.unit]
    metric = [h for h in unit if None in (h.metric, mention.metric) or h.metric == mention.metric]
    year = [h for h in metric if None in (h.year, mention.year) or h.year == mention.year]
    if year:
        return None
    if metric:
        return Miss(mention, metric[0], "wrong year")
    if unit:
        return Miss(mention, unit[0], "wrong metric")
    return Miss(mention, (same or near or [None])[0], "wrong unit" if same else "not in the prompt")
