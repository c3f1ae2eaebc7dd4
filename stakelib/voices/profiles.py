"""The stakeholders' data files (data/*.yaml): their schema, their conditions, and reading them."""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from typing import Annotated, Any, Literal

import jinja2
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from stakelib.run import CourseError
from stakelib.scenarios.metrics import METRICS, RATIOS

VARIANTS = ("conservative", "pragmatic", "progressive")
CONTEXTS = ("least-developed", "emerging", "developed")
IDS = ("policy-makers", "grid-operators", "industry", "public", "csos-ngos", "scientific", "finance",
       "regional-bodies", "development-partners")
FLAGS = ("island", "mainland", "pool", "no pool")
Variant = Literal["conservative", "pragmatic", "progressive"]
Context = Literal["least-developed", "emerging", "developed"]

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_CONDITION = re.compile(r"([a-z_]+)\.(near|far|end|change|growth|rise) (>=|<=|>|<) (-?\d+(?:\.\d+)?)")
# single braces keep the files readable: "{re_share.near} by {re_share.near.year}"
TEMPLATES = jinja2.Environment(variable_start_string="{", variable_end_string="}", undefined=jinja2.StrictUndefined,
                               autoescape=False)


def _known_condition(text: str) -> str:
    match = _CONDITION.fullmatch(text)
    if text in FLAGS or (text.startswith("no ") and text[3:] in METRICS):
        return text
    if not match or match[1] not in {*METRICS, *RATIOS}:
        raise ValueError(f"{text!r} is no condition; write e.g. 're_share.near >= 50', 'no peak' or one of {FLAGS}")
    return text


def _parses(text: str) -> str:
    try:
        TEMPLATES.parse(text)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"{text!r}: {error.message}") from error
    return text


Condition = Annotated[str, AfterValidator(_known_condition)]
Template = Annotated[str, Field(min_length=10), AfterValidator(_parses)]
Phrases = Annotated[list[Template], Field(min_length=1)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Point(_Entry):
    """Something to praise, ask or advise: applies when every condition holds and the variant is listed (if any is)."""

    when: list[Condition] = []
    only: list[Variant] = []
    say: Phrases


class ConcernPoint(_Entry):
    """A worry: what (`text`), why it matters (`why`), and the key of the metric that it is about."""

    when: list[Condition] = []
    metric: str
    text: Phrases
    why: Phrases


class Bars(_Entry):
    """Factors on the thresholds of a metric, apart for concerns and praise: caution leans the two ways differently."""

    concerns: dict[str, float] = {}
    praise: dict[str, float] = {}


class Profile(_Entry):
    """One stakeholder group: who it is, what it watches, how it speaks."""

    id: str
    name: str
    priorities: Annotated[list[str], Field(min_length=3)]
    bars: dict[Variant, Bars] = {}
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


def parse_profile(name: str, text: str) -> Profile:
    """A profile from the YAML `text` of file `name`; CourseError lists every problem with file and field."""
    try:
        return Profile.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise CourseError(f"{name}: {' '.join(str(error).split())}", "mend the YAML near that line.") from error
    except ValidationError as error:
        rows = [f"{name}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
        raise CourseError(rows, "mend the fields named above.") from error


@functools.cache
def read_profiles() -> dict[str, Profile]:
    """All nine profiles, checked."""
    folder = files(__package__).joinpath("data")
    return {i: parse_profile(f"{i}.yaml", folder.joinpath(f"{i}.yaml").read_text(encoding="utf-8")) for i in IDS}


@functools.cache
def context_bars() -> dict[str, Bars]:
    """Threshold factors per development context."""
    text = files(__package__).joinpath("data").joinpath("contexts.yaml").read_text(encoding="utf-8")
    return {name: Bars.model_validate(row) for name, row in yaml.safe_load(text).items()}


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
