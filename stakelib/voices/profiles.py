"""The stakeholders' data files (data/*.yaml, see data/README.md): schema, conditions, phrases, and reading them."""

from __future__ import annotations

import functools
import operator
import random
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo

from stakelib.run import CourseError
from stakelib.scenarios.metrics import METRICS, RATIOS

VARIANTS = ("conservative", "pragmatic", "progressive")
CONTEXTS = ("least-developed", "emerging", "developed")
IDS = (
    "policy-makers",
    "grid-operators",
    "industry",
    "public",
    "csos-ngos",
    "scientific",
    "finance",
    "regional-bodies",
    "development-partners",
)
FLAGS = ("island", "mainland", "pool", "no pool")
Variant = Literal["conservative", "pragmatic", "progressive"]
Context = Literal["least-developed", "emerging", "developed"]

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"([a-z_]+)\.(near|far|end|change|growth|rise) (>=|<=|>|<) (-?\d+(?:\.\d+)?)")
PLACE = re.compile(r"\{([^{}]*)\}")
_CHOICE = re.compile(r"\[([^\[\]]*)\]")
NAMES = ("country", "scenario", "pool")
FORMS = ("", ".by", ".at", ".year", ".number")
FIGURES = {f"{key}.{slot}{form}" for key, (_, _, slots) in METRICS.items() for slot in slots.split() for form in FORMS}


def _known_condition(text: str) -> str:
    match = _CONDITION.fullmatch(text)
    if text in FLAGS or (text.startswith("no ") and text[3:] in METRICS):
        return text
    if not match or match[1] not in {*METRICS, *RATIOS}:
        raise ValueError(f"{text!r} is no condition; write e.g. 're_share.near >= 50', 'no peak' or one of {FLAGS}")
    return text


def _known_phrase(text: str, info: ValidationInfo) -> str:
    words = (info.context or {}).get("words", ())
    if odd := [n for n in PLACE.findall(text) if n not in FIGURES and n not in NAMES and n not in words]:
        raise ValueError(f"{{{odd[0]}}} is unknown; write e.g. {{re_share.near.by}}, {{country}} or a name under words")
    rest = PLACE.sub("", text)
    while (smaller := _CHOICE.sub("", rest)) != rest:
        rest = smaller
    if re.search(r"[][{}|]", rest):
        raise ValueError(f"{text!r}: a bracket is open or a bar stands outside; write [this|that] and {{name}}")
    return text


def unfold(phrase: str, words: Mapping[str, str], rng: random.Random, said: set[str]) -> str:
    """One reading of a phrase: named words put in, one of every [this|that] chosen, first letter upper case.

    Choices of several words go into `said`, and another phrase takes them only when no other is left.
    """
    new: list[str] = []

    def choose(match: re.Match[str]) -> str:
        options = match[1].split("|")
        new.append(rng.choice([o for o in options if o not in said] or options))
        return new[-1]

    for _ in range(3):  # words may hold words: a group's own, the shared ones, those of figures
        phrase = PLACE.sub(lambda m: words.get(m[1], m[0]), phrase)
    while (chosen := _CHOICE.sub(choose, phrase)) != phrase:
        phrase = chosen
    said.update(text for text in new if " " in text)
    return phrase[:1].upper() + phrase[1:]


def _known_measure(name: str) -> str:
    if name not in METRICS and name not in RATIOS:
        raise ValueError(f"{name!r} is no measure; write one of {', '.join([*METRICS, *RATIOS])}")
    return name


Measure = Annotated[str, AfterValidator(_known_measure)]
Condition = Annotated[str, AfterValidator(_known_condition)]
Words = Annotated[str, AfterValidator(_known_phrase)]
Template = Annotated[str, Field(min_length=10), AfterValidator(_known_phrase)]
Phrases = Annotated[list[Template], Field(min_length=1)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Applies(_Entry):
    """Applies when every condition holds and the variant is listed (if any is)."""

    when: list[Condition] = []
    only: list[Variant] = []


class Point(_Applies):
    """Something to praise, ask or advise."""

    say: Phrases


class ConcernPoint(_Applies):
    """A worry: what (`text`), why it matters (`why`), and the key of the metric that it is about."""

    metric: str
    text: Phrases
    why: Phrases


class Bars(_Entry):
    """Factors on the thresholds of a measure, apart for concerns and praise: caution leans the two ways differently.

    `first`: topics that this stance raises before others.
    """

    concerns: dict[Measure, float] = {}
    praise: dict[Measure, float] = {}
    first: list[str] = []


class Profile(_Entry):
    """One stakeholder group: who it is, what it watches, how it speaks."""

    id: str
    name: str
    priorities: Annotated[list[str], Field(min_length=3)]
    bars: dict[Variant, Bars] = {}
    words: dict[str, Words | dict[Variant, Words]] = {}
    openers: dict[Variant, Phrases]
    verdicts: dict[Literal["good", "mixed", "worried"], Phrases]
    contexts: dict[Context, Phrases]
    appreciation: list[Point]
    concerns: list[ConcernPoint]
    questions: list[Point]
    advice: list[Point]


class _Library(Mapping[str, Profile]):
    """The nine profiles in the tool's order, read when first needed."""

    def __getitem__(self, key: str) -> Profile:
        return read_profiles()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(IDS)

    def __len__(self) -> int:
        return len(IDS)


STAKEHOLDERS: Mapping[str, Profile] = _Library()


def _line(node: yaml.Node | None, path: tuple[int | str, ...]) -> int:
    """The line of the field at `path`, or of the nearest part of it that the file has."""
    line = 1
    for part in path:
        line = node.start_mark.line + 1 if node else line
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
        elif isinstance(node, yaml.MappingNode):
            node = next((value for key, value in node.value if key.value == part), None)
    return node.start_mark.line + 1 if node else line


def _parse(kind: Any, name: str, text: str, words: Mapping[str, Any] | None = None) -> Any:
    try:
        data = yaml.safe_load(text)
        own = data.get("words") if isinstance(data, dict) else None
        known = {*(words or ()), *(own if isinstance(own, dict) else ())}
        return TypeAdapter(kind).validate_python(data, context={"words": known})
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise CourseError(f"{where}: {' '.join(str(error).split())}", "mend the YAML near that line.") from error
    except ValidationError as error:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        rows = [
            f"{name}:{_line(tree, e['loc'])}: {'.'.join(map(str, e['loc']))}: {e['msg']}"
            for e in error.errors(include_url=False)
        ]
        raise CourseError(rows, "mend the lines named above; stakelib/voices/data/README.md shows the form.") from error


def parse_profile(name: str, text: str) -> Profile:
    """A profile from the YAML `text` of file `name`; CourseError lists every problem with file, line and field."""
    return _parse(Profile, name, text, shared_words())


def _text(name: str) -> str:
    return files(__package__).joinpath("data").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def shared_words() -> dict[str, str]:
    """Ways to name a figure, for all groups: name -> words."""
    return _parse(dict[Literal["words"], dict[str, Words]], "figures.yaml", _text("figures.yaml"))["words"]


@functools.cache
def read_profiles() -> dict[str, Profile]:
    """All nine profiles, checked."""
    return {i: parse_profile(f"{i}.yaml", _text(f"{i}.yaml")) for i in IDS}


@functools.cache
def context_bars() -> dict[str, Bars]:
    """Threshold factors per development context."""
    return _parse(dict[Context, Bars], "contexts.yaml", _text("contexts.yaml"))


def margin(condition: str, values: Mapping[str, Any], factor: Callable[[str], float]) -> float | None:
    """How far a condition holds beyond its bar, relative to it (0 = just); None when it fails or is unknown."""
    match = _CONDITION.fullmatch(condition)
    if not match:
        return 0.0 if values.get(condition) else None
    key, slot, sign, bar = match[1], match[2], match[3], float(match[4])
    value = values.get(f"{key}.{slot}")
    if value is None:
        return None
    bar *= factor(key)
    percent = key in METRICS and METRICS[key][1] == "%" and slot in ("near", "far", "end")
    bar = min(bar, 95.0) if percent else bar
    if not _OPERATORS[sign](value, bar):
        return None
    room = (100 - bar if sign.startswith(">") else bar) if percent else abs(bar)
    size = abs(value - bar) / room if room else 0.5
    # an absolute bar in MW only says "there is some": how far beyond it says little about a country
    return min(size, 0.4) if key in METRICS and not percent and slot in ("near", "far", "end") else size
