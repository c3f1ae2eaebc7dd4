"""From a scenario to one stakeholder's response: choose what applies, then choose the words."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Literal

from pydantic import BaseModel

from stakelib.run import CourseError
from stakelib.scenarios import Metric, Metrics, Scenario, country_profile, derive_metrics, scenario_id
from stakelib.scenarios.metrics import METRICS, ratios
from stakelib.voices import profiles
from stakelib.voices.profiles import CONTEXTS, STAKEHOLDERS, VARIANTS, Bars, ConcernPoint, Point, Profile

EXPECTED = {"no investment", "no re_share"}  # who lacks what every reader looks for asks about it first
MIN_FACTS = 5  # figures that a response cites, where it is told as many: three, and two that a small model leaves out
MAX_WORDS = 200  # without headings: SmolLM2 makes at most 1.7 tokens of a word, and a completion may have 400
# weight of points without a condition: praise and worries last, questions and advice among the others
LAST, BESIDE = -2.0, -0.2
# variant -> how many (appreciations, concerns): the cautious dwell on risks
COUNTS = {"conservative": (2, 3), "pragmatic": (2, 2), "progressive": (3, 2)}


class Fact(BaseModel):
    """A figure that a response used."""

    metric: str
    year: int
    unit: str
    value: float


class Concern(BaseModel):
    text: str
    explanation: str
    metric: str
    severity: Literal["low", "medium", "high"]


class Response(BaseModel):
    """The Scenario Dialogue Tool's fields, and the figures used."""

    initialReaction: str
    appreciation: list[str]
    concerns: list[Concern]
    questions: list[str]
    engagementAdvice: list[str]
    facts: list[Fact]


class _Speaker:
    """One response in the making: the scenario's figures, the bars of this stance, and the dice."""

    def __init__(
        self, scenario: Scenario, metrics: Metrics, profile: Profile, context: str, variant: str, seed: int
    ) -> None:
        self.profile, self.variant, self.context = profile, variant, context
        self.stance = profile.bars.get(variant, Bars())
        self.rng = random.Random(f"{seed}|{scenario_id(scenario)}|{profile.id}|{context}|{variant}")
        shown = metrics.shown()
        place = country_profile(scenario.metadata.country)
        self.values: dict[str, Any] = ratios(metrics)
        self.values |= {f"no {key}": True for key in METRICS if key not in {m.key for m in shown}}
        self.values |= {
            "island": place.get("island"),
            "mainland": place.get("island") is False,
            "pool": bool(place),
            "no pool": not place,
        }
        self.printed: list[Metric] = []
        self.said: set[str] = set()
        self.words = profiles.shared_words() | {
            name: text if isinstance(text, str) else text.get(variant, "") for name, text in profile.words.items()
        }
        names = {"country": scenario.metadata.country, "scenario": scenario.metadata.scenarioName}
        names |= {"pool": place["pool"] if place else "our region"}
        self.known: dict[str, tuple[str, Metric | None]] = {name: (text, None) for name, text in names.items()}
        for m in shown:  # one year may have two names
            texts = (str(m), f"{m} by {m.year}", f"{m} in {m.year}", str(m.year), m.number)
            for slot in (slot for slot, year in metrics.slots.items() if year == m.year):
                self.known |= {
                    f"{m.key}.{slot}{form}": (text, None if form == ".year" else m)
                    for form, text in zip(profiles.FORMS, texts, strict=True)
                }

    def say(self, phrases: Sequence[str], fresh: bool = False) -> str | None:
        """A reading of one of the phrases whose figures are all known, and if `fresh` not yet told, or None."""
        for phrase in self.rng.sample(list(phrases) * 2, 2 * len(phrases)):  # the choice may fall on an unknown figure
            text = profiles.unfold(phrase, self.words, self.rng, self.said)
            names = profiles.PLACE.findall(text)
            figures = [m for name in names if (m := self.known.get(name, ("", None))[1])]
            if {*names} <= {*self.known} and not (fresh and any(m in self.printed for m in figures)):
                self.printed += figures
                return profiles.PLACE.sub(lambda place: self.known[place[1]][0], text)
        return None

    def factor(self, kind: str) -> Callable[[str], float]:
        """The product of stance and context on a metric's bar."""
        bars = [getattr(b, kind) for b in (profiles.context_bars()[self.context], self.stance)]
        return lambda key: math.prod(b.get(key, 1.0) for b in bars)

    def rank(self, points: Iterable[Any], kind: str, avoid: set[str], general: float) -> list[tuple[Any, float]]:
        """Points that apply, strongest first, each with its margin; `general`: weight of those without a condition."""
        found = []
        for point in points:
            if point.only and self.variant not in point.only:
                continue
            margins = [profiles.margin(c, self.values, self.factor(kind)) for c in point.when]
            if None in margins:
                continue
            size = min((m for m in margins if m is not None), default=0.0)
            weight = (min(size, 1.0) if point.when or point.only else general) + self.rng.random()
            weight += 0.4 * (_topic(point) in self.stance.first) - (_topic(point) in avoid)
            weight += 0 if EXPECTED.isdisjoint(point.when) else 2
            found.append((weight, size, point))
        found.sort(key=lambda row: -row[0])
        return [(point, size) for _, size, point in found]

    def pick(self, points: Sequence[Point], kind: str, count: int, general: float) -> tuple[list[str], set[str]]:
        """`count` sentences on different topics, and the topics of which more is said than that there is a figure."""
        texts: list[str] = []
        topics: dict[str, bool] = {}
        for point, _ in self.rank(points, kind, set(), general):
            if len(texts) == count or _topic(point) in topics:
                continue
            if (text := self.say(point.say, fresh=general == LAST)) and text not in texts:
                texts.append(text)
                topics[_topic(point)] = not all(condition.endswith("> 0") for condition in point.when)
        return texts, {topic for topic, judged in topics.items() if judged}

    def worries(self, count: int, avoid: set[str]) -> list[Concern]:
        chosen: list[Concern] = []
        for point, size in self.rank(self.profile.concerns, "concerns", avoid, LAST):
            if len(chosen) == count or (point.when and any(c.metric == point.metric for c in chosen)):
                continue
            mark = len(self.printed)
            text, why = self.say(point.text, fresh=True), self.say(point.why)
            if text is None or why is None:
                del self.printed[mark:]
                continue
            severity = "low" if not point.when else "high" if size > 0.5 else "medium" if size > 0.2 else "low"
            chosen.append(Concern(text=text, explanation=why, metric=point.metric, severity=severity))
        return sorted(chosen, key=lambda c: ("high", "medium", "low").index(c.severity))

    def reaction(self, worries: list[Concern]) -> str:
        """Opening by stance, the balance of the response, and often the country's situation (the cautious first)."""
        weight = sum({"high": 2, "medium": 1, "low": 0}[c.severity] for c in worries)
        balance = "worried" if weight >= 4 else "mixed" if weight >= 1 else "good"
        slots = [self.profile.openers[self.variant], self.profile.verdicts[balance]]
        if self.rng.random() < 0.6:
            slots.insert(1 if self.variant == "conservative" else 2, self.profile.contexts[self.context])
        return " ".join(text for phrases in slots if (text := self.say(phrases)))


def _topic(point: Any) -> str:
    """What a point is about: the metric of its first condition."""
    if isinstance(point, ConcernPoint):
        return point.metric
    return point.when[0].split(".")[0] if point.when else point.say[0]


def respond(
    scenario: Scenario,
    stakeholder: str,
    context: str = "emerging",
    variant: str = "pragmatic",
    seed: int = 0,
    keys: Collection[str] = tuple(METRICS),
) -> Response:
    """What `stakeholder` (an id such as "finance") says about `scenario`; the same for the same arguments.

    `context`: least-developed, emerging or developed; `variant`: conservative, pragmatic or progressive; `keys`: the
    metrics it is told, all if not given. States only what these figures hold, and asks about what is missing. Raises
    CourseError for unknown names.
    """
    known = {
        "stakeholder": (stakeholder, tuple(STAKEHOLDERS)),
        "context": (context, CONTEXTS),
        "variant": (variant, VARIANTS),
    }
    if bad := [
        f"{what} {name!r} is not one of {', '.join(names)}"
        for what, (name, names) in known.items()
        if name not in names
    ]:
        raise CourseError(bad, "use one of the names above.")
    told, profile = derive_metrics(scenario).only(keys), STAKEHOLDERS[stakeholder]
    turns = [_once(scenario, told, profile, context, variant, seed)]
    least = 1000 * max(0, MIN_FACTS - len(told.shown()))  # no choice of words cites more figures than there are
    # vague or long words came up: choose others, and for the first three figures longer
    while _misses(turns[-1]) > least and len(turns) < (16 if any(len(turn.facts) > 2 for turn in turns) else 64):
        turns.append(_once(scenario, told, profile, context, variant, seed + 7919 * len(turns)))
    return min(turns, key=_misses)


def _misses(response: Response) -> int:
    """Figures too few, and words too many."""
    texts = [
        response.initialReaction,
        *response.appreciation,
        *response.questions,
        *response.engagementAdvice,
        *(f"{c.text} {c.explanation}" for c in response.concerns),
    ]
    words = sum(len(text.split()) for text in texts)
    return 1000 * max(0, MIN_FACTS - len(response.facts)) + max(0, words - MAX_WORDS)


def _once(scenario: Scenario, told: Metrics, profile: Profile, context: str, variant: str, seed: int) -> Response:
    speaker = _Speaker(scenario, told, profile, context, variant, seed)
    good, bad = COUNTS[variant]
    praise, topics = speaker.pick(profile.appreciation, "praise", good, LAST)
    worries = speaker.worries(bad, topics)
    reaction = speaker.reaction(worries)
    questions, _ = speaker.pick(profile.questions, "concerns", 3, BESIDE)
    advice, _ = speaker.pick(profile.advice, "praise", 2, BESIDE)
    facts = {(m.key, m.year): Fact(metric=m.label, year=m.year, unit=m.unit, value=m.value) for m in speaker.printed}
    return Response(
        initialReaction=reaction,
        appreciation=praise,
        concerns=worries,
        questions=questions,
        engagementAdvice=advice,
        facts=list(facts.values()),
    )
