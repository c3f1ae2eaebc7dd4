"""Find every figure in a text with its unit, metric and year, and tell which ones a prompt does not hold.

One matcher serves the data gate and the evaluation. It is deliberately strict: a figure that it cannot place counts
as not grounded. Idioms (24/7), names (SDG 7, N-1, CO2), list numbering, dates and bare years are no figures.

A text is read in four passes: mask what is no figure; read every number with its scale and unit; share unit and scale
within a range ("2.5 to 3.0 GW"); place each figure by the words around it (metric, year, bound, direction).
"""

from __future__ import annotations

import functools
import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files

import yaml

from stakelib.scenarios.metrics import METRICS

DATA = yaml.safe_load(files(__package__).joinpath("numbers.yaml").read_text(encoding="utf-8"))
MOST = 1e30  # no figure is larger; a row of a thousand digits is none
REACH = 400  # characters around a figure in which its words are looked for: a longer sentence is no sentence
CHANGES = ("%", "points", "times")  # units of which only the words around say what changes


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text, re.I | re.M)


def _words(name: str) -> str:
    return rf"(?:{DATA[name]})"


# characters that look like others, one for one so that every place stays where it is
_ALIKE = str.maketrans(
    {**dict.fromkeys("\u00a0\u2007\u2009\u202f\u2002\u2003", " "), **dict.fromkeys("\u2212\u2010\u2011", "-")}
    | {"\u2082": "2", "\u2019": "'"}
)

# ---- numbers: digits, words, scale, unit

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
SPELLED = (
    {word: i for i, word in enumerate(_ONES.split())}
    | {word: 10 * i for i, word in enumerate(_TENS.split(), 2)}
    | {"dozen": 12}
)
SCALES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_ONE = "|".join(sorted(SPELLED, key=len, reverse=True))
_SCALE = "|".join(SCALES)
WORDS = (
    rf"(?:(?:half (?:an? )?|an? |(?:{_ONE})[- ])(?:{_SCALE})|(?:{_ONE}))"
    rf"(?: and a half\b|(?:[- ]and)?[- ](?:{_ONE}|{_SCALE})\b){{0,12}}"
)
DIGITS = r"\d{1,3}(?:[ ,']\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+|,\d{1,2}(?!\d))?|\.\d+"
UNITS = [(unit, factor) for _, unit, factor in DATA["units"]]
_UNIT = "|".join(f"(?P<u{i}>{p})" for i, (p, _, _) in enumerate(DATA["units"]))
_UNIT = _UNIT.replace("CO2TAIL", DATA["co2"]).replace("ONE", _ONE)
NUMBER = _pattern(
    rf"(?<!\w)(?<!\d[.,])(?P<sign>(?<![\d%)])[+-](?=[\d.$]))?(?:(?P<other>{DATA['other_money']})\s?|(?P<money>{DATA['money']})\s?)?"
    rf"(?:(?P<digits>{DIGITS})|(?P<words>{WORDS})(?:\b|(?=fold)))"
    rf"(?:\s*-?(?P<scale>{'|'.join(sorted(DATA['scale'], key=len, reverse=True))})(?![A-Za-z0-9\u00b2]))?"
    rf"(?:\s*(?:-|(?P<plus>\+))?\s?(?:{_UNIT}))?"
)
PARTS = _pattern(
    r"\b(?:(?P<many>two|three|four)[- ](?P<parts>third|quarter|fifth|tenth)s\b(?!-)"
    r"|(?:\b(?:an?|one)[- ]?)?(?P<part>half|(?<=an )third|(?<=[ae][- ])(?:third|quarter|fifth|tenth))\b"
    r"(?=\s+(?:of|the|its|all|our|that|by|in|to|from|higher|lower|more|less|fewer)\b|[.,;:)]|\s*$)"
    rf"|(?P<some>{_ONE}|\d\d?) (?:in|out of) (?P<whole>{_ONE}|\d\d?)\b(?!\s*(?:[.,]?\d|%|[kMGT]Wh?\b|year))"
    r"|(?P<over>[1-9])/(?P<under>[2-9])(?![\d/]))|(?P<glyph>[" + "".join(DATA["glyphs"]) + "])"
)
OF_BEFORE = _pattern(  # "half the 2030 level", "a third of today's": a multiple and no share
    r"\s*(?:of|the|its|as)\s(?:(?!in\b|by\b)[\w']+\s){0,3}?(?:levels?|size|value|today(?:'s)?|now|_{4})\b"
    r"|\s*as (?:much|many|high|large)\b"
)
MULTIPLES = _pattern("|".join(rf"(?P<x{i}>\b(?:{p}))" for i, (p, _) in enumerate(DATA["multiples"])))
RATE = _pattern(
    r"(?:\s*(?:of )?(?:USD|dollars))?\s*"
    r"(?:(?:per|an?|each|every) (?:year|annum)|annually|yearly|p\.a\.|/ ?(?:year|yr|annum|a)\b)"
)
RATED_BEFORE = _pattern(r"\b(?:yearly|annual) (?:invest\w*|spending|costs?|outlays?)(?: (?:of|is|at|reach\w*))?\s*$")
DOLLARS = _pattern(r"\s*(?:of )?(?:USD|US dollars|dollars)\b")

# ---- what is no figure, and years

_QUANTITY = rf"(?![\d,]*\d|\.\d|\s*(?:{DATA['quantity']}))"
NOT_FIGURES = _pattern("|".join(DATA["no_figures"]).replace("NO_UNIT", _QUANTITY).replace("MONTH", DATA["month"]))
YEAR = _pattern(
    r"(?<![\w$])(?<!\d[.,])(?:(?P<part>early|mid|late)[- ])?(?:FY ?|CY ?)?(?P<year>(?:19|20)\d\d)"
    r"(?:s\b|\s?[-/\u2013]\s?(?P<until>(?:(?:19|20)\d\d|\d\d)\b(?![.,]?\d|\s*(?:" + DATA["quantity"] + ")))"
    r"|(?![\d,]*\d|\.\d|\w|\s*(?:" + DATA["quantity"] + "))"
    r"(?:(?<=\b(?:in|by) \d{4})|(?<=\b(?:since|until|after) \d{4})|(?!\s*" + _words("counted") + ")))"
)
SPAN = _pattern(r"\b(?:between|from|the|both) (\d{4}) (?:and|to) (\d{4})\b")

# ---- the words around a figure

TALK, BY = _pattern(DATA["talk"]), _pattern(r"\bby\s*$")
_QUALIFIED = "|".join(rf"(?P<{name}>{DATA[name]})" for name in ("at_least", "at_most", "nearly", "about"))
QUALIFIED = _pattern(rf"(?<!\w)(?:{_QUALIFIED})\s*(?:US ?)?\$?$")
AFTERWARDS = _pattern(
    rf"\s*(?:(?P<at_least>{DATA['or_more']})|(?P<at_most>{DATA['or_less']})|(?P<about>{DATA['or_so']}))"
)
_VERB = rf"\b(?:(?P<up>{DATA['up']})|(?P<down>{DATA['down']}))\b"
MOVED = _pattern(_VERB)
MOVED_BY = _pattern(r"(?: by|(?: [\w-]+){1,6}(?<!ed) by| in (?:the )?[\w-]+(?: [\w-]+){0,2} of| of|)\s*(?:US ?)?\$?")
LEVEL_HEDGE = _pattern(r"above|below|beyond|under|over|exceed")  # "falls below 40%" is no fall by 40%
MORE = _pattern(
    rf"\s*(?:{_words('changed')}\s){{0,3}}(?:(?P<up>{DATA['more']})|(?P<down>{DATA['less']}))\b"
    r"(?! (?:to|from|by|off|short)\b| than (?:half|an?\b|\d|\$))"
)
EITHER = _pattern(rf"\b{_words('either')}\b")
LEVEL = _pattern(r"\bto\s*(?:US ?)?\$?$")
LINK = _pattern(
    r"(?P<year>(?: of(?: [a-z]+){1,2})?(?:,? \(?(?:in|by) _{4}\)?| \(_{4}\)))?"
    r"\s*(?:to|and|or|-|\u2013|(?P<listed>,(?: and| then| to)?))\s*"
)
OPEN_RANGE = _pattern(r"\b(?:between|from)\s*(?:US ?)?\$?$")
RANGE_ENDS = _pattern(r"\s*(?:$|[.,;:)]|(?:in|by) _{4})")
ATTACHED = _pattern(
    r"\s*(?:(?:of|in|from|for|as)\s)?"
    r"(?:(?:the|its|our|new|installed|more|extra|firm|cut|less|fewer|lower|total)\s)*"
)
CHANGE_OF = _pattern(
    rf"\s*(?:(?:{DATA['more']}|{DATA['less']}|as much|as many)\s)?(?:(?:of|in|from|for|as)\s)?"
    r"(?:(?:the|its|our|new|total)\s)*"
)
QUOTES = tuple("\"'\u201c\u201d\u2018\u2019\u00ab\u00bb\u201e*")
AFTER_SCENARIO = _pattern(r"\b(?:scenario|plan|pathway)(?: called| named|:)?\s*$")
STOP = _pattern(r"[,;:()\u2014\u2013.!?]|\b(?:and|but|while|then|with|to|from|against|rising|falling)\b")
SENTENCE_END = _pattern(r"(?<=[.!?])\s+|\n")
KEYWORDS = {unit: [(_pattern(rf"\b(?:{p})\b"), m) for p, m in rows] for unit, rows in DATA["keywords"].items()}
ANY = "any unit"
KEYWORDS[ANY] = [row for rows in KEYWORDS.values() for row in rows]


@dataclass(frozen=True)
class Mention:
    """A figure in a text: `value` in `unit` (%, points, times, MW, GWh, m$, m$/yr, MW/yr, Mt CO2, ha, jobs or "")."""

    value: float
    unit: str
    metric: str | None
    year: int | None
    start: int
    end: int
    text: str
    step: float = 0.0  # how far off a held figure may be, in `unit`: half of the last printed digit, more if rounded
    bound: int = 0  # 1 after "more than": no less will do; -1 after "nearly": no more
    way: int = 0  # 1: a rise by this much, -1: a fall by this much, 0: a level, or it is not said
    about: frozenset[str] = frozenset()  # the metrics that the words name, where the unit leaves it open


@dataclass(frozen=True)
class Miss:
    """A mention that the prompt does not hold, the closest figure that it does hold, and what is wrong."""

    mention: Mention
    nearest: Mention | None
    reason: str


@dataclass
class _Read:
    """A number as it is written."""

    start: int
    end: int
    number: float
    exact: float = 0.5  # how far off a held figure may be: half of the last digit printed
    round_to: float = 1.0  # what it may be rounded to where the text says "about": 10 in "60", 5 in "65"
    unit: str | None = None
    factor: float = 1.0
    scale: float | None = None
    sign: int = 0
    plus: bool = False  # "240+ MW"
    coarse: bool = False  # "half", "doubled": a word instead of a number


def mentions(text: str) -> list[Mention]:
    """Every figure of `text`, digits or words, in order; see the module docstring for what is no figure."""
    return list(_mentions(text))


def years(text: str) -> set[int]:
    """Every year that `text` names: 2030 and 2040 in "2030-40", 2030 in "mid-2030s"."""
    masked = NOT_FIGURES.sub(_mask, text.translate(_ALIKE))
    return {year for m in YEAR.finditer(masked) for year in (int(m["year"]), _until(m)) if year}


@functools.lru_cache(2048)
def _mentions(text: str) -> tuple[Mention, ...]:
    masked = NOT_FIGURES.sub(_mask, text.translate(_ALIKE))
    free = YEAR.sub(_blot, masked)
    read = [r for m in NUMBER.finditer(free) if (r := _number(m))]
    read += [
        _part(m)
        for m in PARTS.finditer(free)
        if not re.match(r"\s*(?:-|hour|year|day|way|time)", free[m.end() : m.end() + 6])
    ]
    read += [_multiple(m) for m in MULTIPLES.finditer(free)]
    read = _shared([_rated(r, free) for r in _no_overlap(read)], free)
    return tuple(_Placing(masked, free, read).mentions())


def _mask(match: re.Match[str]) -> str:
    return "\u00b7" * len(match.group())  # no word: what stands beside it is read as it is


def _blot(match: re.Match[str]) -> str:
    return "_" * len(match.group())


def _until(year: re.Match[str]) -> int | None:
    """The last year of "2030-40", None where there is one year only."""
    until = year["until"]
    return int(until if len(until) == 4 else year["year"][:2] + until) if until else None


# ---------------------------------------------------------------------------------------------- numbers and their units


def _number(match: re.Match[str]) -> _Read | None:
    found = next((i for i in range(len(UNITS)) if match[f"u{i}"]), None)
    unit, factor = (None, 1.0) if found is None else UNITS[found]
    if match["money"]:
        unit, factor = ("m$", 1e-6) if unit in (None, "m$") else (unit, factor)
    if match["other"]:
        unit, factor = "other money", 1.0
    scale = DATA["scale"][match["scale"].lower()] if match["scale"] else None
    end = match.start() + len(match.group().rstrip())
    sign = {"+": 1, "-": -1}.get(match["sign"], 0)
    read = _Read(match.start(), end, 0.0, unit=unit, factor=factor, scale=scale, sign=sign, plus=bool(match["plus"]))
    if match["words"]:
        read.number = _spelled(match["words"])
        read.round_to, read.exact = _round_to(f"{read.number:.0f}"), 0.5 if read.number == int(read.number) else 0.05
        return None if _only_counts(read, match) else read
    digits = re.sub(r"[ ']", "", match["digits"])
    digits = digits.replace(",", ".") if re.fullmatch(r"\d+,\d{1,2}", digits) else digits.replace(",", "")
    places = len(digits.partition(".")[2])
    read.number, read.exact = min(float(digits), MOST), 0.5 * 10.0**-places
    read.round_to = _round_to(digits) if not places else 10.0**-places * (5 if digits.endswith("5") else 1)
    return read


def _round_to(digits: str) -> float:
    """10 for "60", 5 for "65", 50 for "350", 1 for "64" and for one digit alone."""
    zeros = len(digits) - len(digits.rstrip("0"))
    return (5.0 if len(digits) > 1 and digits.rstrip("0").endswith("5") else 1.0) * 10.0 ** min(zeros, len(digits) - 1)


def _spelled(words: str) -> float:
    """ "sixty-four", "two and a half million", "half a million" as a number."""
    total = part = 0.0
    for word in re.split(r"[- ]+", words.lower()):
        if word in SCALES:
            part = (part or 1) * SCALES[word]
            if SCALES[word] >= 1e3:
                total, part = total + part, 0.0
        else:
            part += 0.5 if word == "half" else SPELLED.get(word, 0)
    return min(total + part, MOST)


def _only_counts(read: _Read, match: re.Match[str]) -> bool:
    """ "one day", "two key questions": a number in words that is no figure."""
    if read.number in (0, 1) and read.unit in (None, "time", "jobs", "people") and not read.scale:
        return True
    if (
        read.unit == "points"
        and match["words"]
        and not BY.search(match.string, max(0, match.start() - 4), match.start())
    ):
        return read.number < 13 and "percent" not in match.group()  # "two points that we want to make"
    talk = TALK.match(match.string, match.end(), match.end() + 24)
    return read.unit is None and read.scale is None and read.number < 13 and bool(talk)


def _part(match: re.Match[str]) -> _Read:
    """ "two thirds", "half", "one in three", "2/3" in percent, within two points; "half the 2030 level": a multiple."""
    if match["glyph"]:
        value = DATA["glyphs"][match["glyph"]]
    elif match["over"]:
        value = 100 * int(match["over"]) / int(match["under"])
    elif match["some"]:
        some, whole = (SPELLED[n.lower()] if n.lower() in SPELLED else int(n) for n in (match["some"], match["whole"]))
        value = 100 * some / (whole or 1)
    else:
        many = SPELLED[match["many"].lower()] if match["many"] else 1
        value = many * DATA["parts"][(match["parts"] or match["part"]).lower()]
    if OF_BEFORE.match(match.string, match.end()):
        return _Read(
            match.start(), match.end(), value / 100, 0.05 * value / 100, 0.25 * value / 100, "times", coarse=True
        )
    return _Read(match.start(), match.end(), value, 2.0, 10.0, "%", coarse=True)


def _multiple(match: re.Match[str]) -> _Read:
    """ "doubled", "twice as", "halved": held within five percent."""
    value = next(v for i, (_, v) in enumerate(DATA["multiples"]) if match[f"x{i}"])
    return _Read(match.start(), match.end(), value, 0.05 * value, 0.25 * value, "times", coarse=True)


def _no_overlap(found: list[_Read]) -> list[_Read]:
    kept: list[_Read] = []
    for read in sorted(found, key=lambda r: (r.start, -r.end)):
        if not kept or read.start >= kept[-1].end:
            kept.append(read)
    return kept


def _rated(read: _Read, text: str) -> _Read:
    """ "$533M USD per year" and "a yearly investment of $533M" have another unit than "$533M USD"."""
    after = RATE.match(text, read.end)
    if read.unit in ("m$", "MW", "GWh", "Mt CO2") and after:
        read.unit, read.end = f"{read.unit}/yr", after.end()
    elif read.unit == "m$":
        tail = DOLLARS.match(text, read.end)
        read.end = tail.end() if tail else read.end
        if RATED_BEFORE.search(text, max(0, read.start - 50), read.start):
            read.unit = "m$/yr"
    return read


def _shared(found: list[_Read], text: str) -> list[_Read]:
    """In "2.5 to 3.0 GW" and "$1.2 to 3.4 billion" both numbers have one unit and one scale."""
    for left, right in reversed(list(zip(found, found[1:], strict=False))):
        link = LINK.fullmatch(text, left.end, right.start)
        if not link or (link["listed"] and not link["year"]):
            continue
        opened = link["year"] or left.factor == 1e-6 or OPEN_RANGE.search(text, max(0, left.start - 16), left.start)
        if left.unit and not right.unit and opened and (right.scale or RANGE_ENDS.match(text, right.end)):
            right.unit, right.factor, right.scale = left.unit, left.factor, right.scale or left.scale
        if left.unit in (None, right.unit, (right.unit or "").removesuffix("/yr")):
            alike = left.unit is None or left.factor == right.factor == 1e-6
            left.scale = left.scale or (right.scale if alike else None)
            left.factor = left.factor if left.unit else right.factor
            left.unit = right.unit
    return found


# ------------------------------------------------------------------------------------ metric, year, bound and direction


class _Placing:
    """Adds to the numbers of one text what the words of their sentence say."""

    def __init__(self, masked: str, free: str, found: list[_Read]) -> None:
        self.text, self.free, self.found = masked, free, found
        self.ends = [0, *(m.end() for m in SENTENCE_END.finditer(masked)), len(masked)]
        self.years = [(m.start(), m.end(), _year_of(m), _until(m)) for m in YEAR.finditer(masked)]
        self.year_starts = [y[0] for y in self.years]
        self.keywords: dict[str, list[tuple[int, int, int, str]]] = {}

    def mentions(self) -> list[Mention]:
        starts = [r.start for r in self.found] + [len(self.text)]
        return [self.placed(read, starts[i + 1]) for i, read in enumerate(self.found)]

    def placed(self, read: _Read, following: int) -> Mention:
        """`following`: where the next figure begins."""
        left = max(self.ends[bisect_right(self.ends, read.start) - 1], read.start - REACH)
        right = min(self.ends[min(bisect_left(self.ends, read.end), len(self.ends) - 1)], read.end + REACH)
        following = min(following, right)
        size = (read.scale or 1.0) * read.factor
        step, bound = self.qualified(read)
        unit, way = read.unit or "", read.sign or self.way(read, left)
        if not unit and re.search(r"\bjobs\b", self.text[left : read.start], re.I):
            unit = "jobs"  # "Jobs Created: 10,645 (2030)"
        return Mention(
            read.number * size,
            unit,
            self.metric(unit, read, left, right, following),
            self.year(read, left, following),
            read.start,
            read.end,
            self.free[read.start : read.end].strip(),
            step * size,
            bound,
            way,
            self.subjects(read, left, right, following) if unit in CHANGES else frozenset(),
        )

    def qualified(self, read: _Read) -> tuple[float, int]:
        """(how far off the held figure may be, bound).

        "About 65" stands for 62.5 to 67.5, by at most 5 %; "over 60" for 60 to 66, by at most 10 % and on that side
        only; a word such as "half" or "double" for 2.5 times as much.
        """
        before = QUALIFIED.search(self.free, max(0, read.start - 24), read.start)
        after = AFTERWARDS.match(self.free, read.end)
        kind = (before or after).lastgroup if before or after else "at_least" if read.plus else None
        some = (0.25 if read.coarse else 0.1) * read.number
        if kind in ("at_least", "at_most"):
            return max(read.exact, min(read.round_to, some)), 1 if kind == "at_least" else -1
        if kind in ("nearly", "about"):
            return max(read.exact, min(read.round_to, some) / 2), -1 if kind == "nearly" else 0
        return read.exact, 0

    def way(self, read: _Read, left: int) -> int:
        """1 in "rises by 40%", "40% higher", "up 40%"; -1 in "a cut of 40%"; 0 where nothing is said."""
        if after := MORE.match(self.free, read.end, read.end + 60):
            return 1 if after["up"] else -1
        hedge = QUALIFIED.search(self.free, max(left, read.start - 24), read.start)
        end = hedge.start() if hedge and not LEVEL_HEDGE.match(hedge.group()) else read.start
        near = MOVED.finditer(self.free, max(left, end - 90), end)
        moved = [m for m in near if MOVED_BY.fullmatch(self.free, m.end(), end)]
        return (1 if moved[-1]["up"] else -1) if moved else 0

    def year(self, read: _Read, left: int, following: int) -> int | None:
        direct = re.compile(r"\s*\((?:by |in |for )?").match(self.text, read.end)
        reach = direct.end() if direct else read.end
        first, last = bisect_left(self.year_starts, reach), bisect_right(self.year_starts, following)
        for start, _, year, until in self.years[first : min(last, first + 1)]:
            if not STOP.search(self.text, reach, start):
                return None if until else year
        before = self.years[bisect_left(self.year_starts, left) : bisect_left(self.year_starts, read.start)]
        if not before or before[-1][3]:
            return None
        if any(m.group(2) == str(before[-1][2]) for m in SPAN.finditer(self.text, left, read.start)):
            return None  # either of two years
        return before[-1][2]

    def metric(self, unit: str, read: _Read, left: int, right: int, following: int) -> str | None:
        table = KEYWORDS.get(unit, [])
        if unit == "jobs":
            for pattern, metric in table:
                if pattern.search(self.text, read.start, read.end):
                    return metric
        at = self.attached(ATTACHED, read, following)
        for pattern, metric in table:
            if pattern.match(self.text, at, following):
                return metric
        if before := self.named(unit, left, read.start):
            return max((min(end, read.start), -i, name) for _, end, i, name in before)[2]
        after = self.named(unit, read.end, right)
        return min((start, i, name) for start, _, i, name in after)[2] if after else DATA["only"].get(unit)

    def named(self, unit: str, left: int, right: int) -> list[tuple[int, int, int, str]]:
        """(start, end, row, metric) of the unit's keywords that begin in this part of the text."""
        if unit not in self.keywords:  # the whole text is read once
            rows = enumerate(KEYWORDS.get(unit, []))
            found = ((m.start(), m.end(), i, name) for i, (p, name) in rows for m in p.finditer(self.text))
            self.keywords[unit] = sorted(found)
        known = self.keywords[unit]
        return known[bisect_left(known, (left,)) : bisect_left(known, (right,))]

    def attached(self, pattern: re.Pattern[str], read: _Read, following: int) -> int:
        found = pattern.match(self.text, read.end, following)
        return found.end() if found else read.end

    def subjects(self, read: _Read, left: int, right: int, following: int) -> frozenset[str]:
        """The metrics that the word nearest to a change may stand for: "solar" for a capacity or a share."""
        at = self.attached(CHANGE_OF, read, following)
        if direct := {name for p, name in KEYWORDS[ANY] if p.match(self.text, at, following)}:
            return frozenset(direct)
        if before := self.named(ANY, left, read.start):
            last = max(min(end, read.start) for _, end, _, _ in before)
            return frozenset(name for _, end, _, name in before if min(end, read.start) == last)
        after = self.named(ANY, read.end, right)
        return frozenset(name for start, _, _, name in after if start == after[0][0])


def _year_of(match: re.Match[str]) -> int:
    return int(match["year"]) + {"mid": 5, "late": 9}.get((match["part"] or "").lower(), 0)


# ------------------------------------------------------------------------------------------------------ names of places


NAMES, CLAIMED = _pattern(DATA["names"]), _pattern(rf"\b(?:{DATA['claimed']})\s*$")
_LABELS = "|".join(sorted((label for label, _, _ in METRICS.values()), key=len, reverse=True))
LABELS = _pattern(
    rf"^- (?:{_LABELS})(?: \d{{4}})?:.*$|\b(?:{_LABELS})\b"
)  # a prompt's line of figures, whole, or a label alone
MEASURED = _pattern(
    DATA["measured"] + rf"\s*(?:(?:{DATA['about']}|{DATA['at_least']}|{DATA['nearly']})\s*)?(?:US ?)?\$?\d"
)


def without_names(text: str, prompt: str) -> str:
    """`text` with the prompt's country and scenario names blotted out: "50% Solar Now" is a name, not a claim.

    Not within a metric's label or before its figure (scenario "Solar": "Solar PV Capacity: 40 MW", "Solar of 40 MW"),
    nor as a claim ("we reach 80% RE"). A name that is a bare year stays.
    """
    names = tuple(
        sorted({n for m in NAMES.finditer(prompt) for n in m.groups() if n and not re.fullmatch(r"\d{4}", n)})
    )
    return _blotted(text, names) if names else text


@functools.lru_cache(2048)
def _blotted(text: str, names: tuple[str, ...]) -> str:
    known = "|".join(
        f"[{re.escape(n[0])}{re.escape(n[0].upper())}]{re.escape(n[1:])}" for n in sorted(names, key=len, reverse=True)
    )
    stated = {m.start(i) for m in NAMES.finditer(text) for i in range(1, NAMES.groups + 1) if m[i]}
    labels = {at: m.group() for m in LABELS.finditer(text) for at in range(m.start(), m.end())}

    def blot(match: re.Match[str]) -> str:
        start, end, name = match.start(), match.end(), match.group()
        quoted = text[start - 1 : start] in QUOTES and text[end : end + 1] in QUOTES
        if start in stated or quoted or AFTER_SCENARIO.search(text, max(0, start - 12), start):
            return "_" * len(name)
        in_label = len(labels.get(start, "")) > len(name)
        said = CLAIMED.search(text, max(0, start - 24), start) or any(p.match(text, end + 1) for p, _ in KEYWORDS[ANY])
        claim = said and re.search(r"\d", name)
        return name if in_label or claim or MEASURED.match(text, end, end + 80) else "_" * len(name)

    return re.sub(rf"(?<!\w)(?:{known})(?!\w)", blot, text)


# -------------------------------------------------------------------------------------------------- what a prompt holds


def ungrounded(text: str, prompt: str, derived: bool = False) -> list[Miss]:
    """The mentions of `text` that `prompt` does not hold with the same value (rounding as printed allowed), unit,
    direction, and, where both state them, metric and year.

    `derived`: after a word of change, the difference (of shares: in points), the change in percent and the ratio of
    this metric's figures in two years count as held too; training rows do no sums, so the gate is strict.
    """
    held = mentions(without_names(prompt, prompt))
    known = _Held(held)
    plain = without_names(text, prompt)
    misses = [miss for m in mentions(plain) if (miss := known.miss(m))]
    changes = _changes(held) if derived and misses else []
    return [
        miss
        for miss in misses
        if not (_tells_change(miss.mention, plain) and any(_is_change(miss.mention, change) for change in changes))
    ]


class _Held:
    """The figures of a prompt, by value, so that a long text is compared in one look-up for each of its figures."""

    def __init__(self, held: Sequence[Mention]) -> None:
        self.figures = sorted(held, key=lambda h: h.value)
        self.values = [h.value for h in self.figures]
        self.of_unit: dict[str, list[Mention]] = defaultdict(list)
        for figure in self.figures:
            self.of_unit[figure.unit].append(figure)

    def miss(self, said: Mention) -> Miss | None:
        off = max(said.step, 1e-9 * abs(said.value)) * 1.000001
        low, high = bisect_left(self.values, said.value - off), bisect_right(self.values, said.value + off)
        fits = [h for h in self.figures[low:high] if (h.value - said.value) * said.bound >= 0]
        if not fits:
            return Miss(said, self.nearest(said), "not in the prompt")
        for reason, right in (
            ("wrong unit", lambda h: h.unit == said.unit),
            ("wrong metric", lambda h: None in (h.metric, said.metric) or h.metric == said.metric),
            ("wrong metric", lambda h: not (h.about and said.about) or bool(h.about & said.about)),
            ("wrong direction", lambda h: _same_way(said, h)),
            ("wrong year", lambda h: None in (h.year, said.year) or h.year == said.year),
        ):
            left = [h for h in fits if right(h)]
            if not left:
                return Miss(said, fits[0], reason)
            fits = left
        return None

    def nearest(self, said: Mention) -> Mention | None:
        some = self.of_unit.get(said.unit) or self.figures
        at = bisect_left([h.value for h in some], said.value)
        return min(some[max(0, at - 1) : at + 1], key=lambda h: abs(h.value - said.value), default=None)


def _same_way(said: Mention, held: Mention) -> bool:
    """A level is no change, and a cut is no rise: "falls by 64%" is not held by a share of 64%."""
    if not said.way or held.metric is None:
        return True
    return said.way == (held.way or DATA["ways"].get(held.metric))


def _tells_change(said: Mention, text: str) -> bool:
    if said.way or said.unit in ("points", "times"):
        return True
    return bool(EITHER.search(text, max(0, said.start - 40), said.end + 12)) and not LEVEL.search(text, 0, said.start)


def _is_change(said: Mention, change: tuple[Mention, set[int]]) -> bool:
    figure, between = change
    if said.unit != figure.unit or (said.year or min(between)) not in between:
        return False
    if said.way and figure.way and said.way != figure.way:
        return False
    if said.unit in CHANGES:  # "a share", "a cut": only the words can tell of what
        if said.about and figure.metric not in said.about:
            return False
    elif said.metric not in (None, figure.metric):
        return False
    off = figure.value - said.value
    return off * said.bound >= 0 and abs(off) <= max(said.step, figure.step) * 1.000001


def _changes(held: Sequence[Mention]) -> list[tuple[Mention, set[int]]]:
    """(difference, change in percent or ratio; its two years) between any two years of the same metric."""
    series: dict[tuple[str, str], dict[int, Mention]] = defaultdict(dict)
    for figure in held:
        if figure.metric and figure.year:
            series[figure.metric, figure.unit].setdefault(figure.year, figure)
    out = []
    for known in series.values():
        for a, b in ((known[i], known[j]) for i in known for j in known if i < j):
            way, unit = (b.value > a.value) - (b.value < a.value), "points" if b.unit == "%" else b.unit
            told = [replace(b, value=abs(b.value - a.value), unit=unit, way=way)]
            if a.value and b.value:
                told += [replace(b, value=b.value / a.value, unit="times", step=0.0, way=max(way, 0))]
                told += [replace(b, value=a.value / b.value, unit="times", step=0.0, way=-1)] if way < 0 else []
            if a.value:
                told += [replace(b, value=abs(100 * (b.value / a.value - 1)), unit="%", step=0.05, way=way)]
            out += [(figure, {a.year, b.year}) for figure in told]
    return out
