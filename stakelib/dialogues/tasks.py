"""The Scenario Dialogue Tool's own two requests: a thin response made natural (JSON), and a voice of 2-3 sentences.

The thin response holds some points of a stakeholder's full answer; the target repeats those points and adds none.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from stakelib.dialogues.numbers import mentions
from stakelib.run import CourseError
from stakelib.scenarios import Scenario, country_profile, derive_metrics, sample, scenario_id
from stakelib.voices import STAKEHOLDERS, Concern, Fact, Response, respond

Situation = tuple[Scenario, str, str, str]  # scenario, stakeholder id, context, variant
Told = tuple[str, str, list[Fact]]  # prompt, completion, and the facts that the completion states
Reply = Literal["short", "full"]
KEYS = ("initialReaction", "appreciation", "concerns", "questions", "engagementAdvice")
BASE, END = "BASE RESPONSE TO ENHANCE:", "---END OF EXAMPLES---"
TURNS = 40  # tries at an opening that cites a figure
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")


@functools.cache
def texts() -> dict[str, Any]:
    """The wording of prompts and small phrases (tasks.yaml)."""
    return yaml.safe_load(files(__package__).joinpath("tasks.yaml").read_text(encoding="utf-8"))


def enhance_template(tool: Path | None = None) -> str:
    """The enhance prompt with {fields}: the course's wording, or the tool's own from the checkout `tool`.

    Raises CourseError unless exactly one template of that checkout's TypeScript has the known labels.
    """
    if tool is None:
        return texts()["enhance"].strip()
    sources = [p.read_text(encoding="utf-8") for p in sorted(Path(tool).rglob("*.ts")) if "node_modules" not in p.parts]
    literals = [
        t
        for s in sources
        for t in re.findall(r"`((?:[^`\\]|\\.)*)`", s)
        if BASE in t and all(f"- {label}:" in t for label in texts()["tool_fields"])
    ]
    if len(literals) != 1:
        raise CourseError(
            f"{tool}: {len(literals)} enhance prompts found in its *.ts files, one is needed",
            "name the folder of a Scenario Dialogue Tool checkout, or leave the tool out.",
        )
    lines, after = [], False
    for line in literals[0].strip().split("\n"):
        label = (re.match(r"\s*- ([^:]+):", line) or [None, ""])[1]
        field = texts()["tool_fields"].get(label, "base" if after else "name")
        parts = re.split(r"\$\{(?:[^{}]|\{[^{}]*\})*\}", line)
        lines.append(f"{{{field}}}".join(part.replace("{", "{{").replace("}", "}}") for part in parts))
        after = after or BASE in line
    return "\n".join(lines)


def question_text(situation: Situation, keys: Collection[str], seed: int) -> str:
    """The guide's free-form question, with every figure that an answer may use in the sentence."""
    scenario, stakeholder, context, variant = situation
    place = country_profile(scenario.metadata.country)
    island = ", isolated island grid" if place.get("island") else ""
    where = scenario.metadata.country + (f" ({place['pool']}{island})" if place else "")
    figures = [
        f"{m} {m.label} in {m.year}" if m.unit == "jobs" else f"{m.label} of {m} in {m.year}"
        for m in derive_metrics(scenario).only(keys).shown()
    ]
    return (
        random.Random(f"asked-{seed}-{situation[1:]}")
        .choice(texts()["ask"])
        .format(
            name=STAKEHOLDERS[stakeholder].name,
            place=where,
            scenario=scenario.metadata.scenarioName,
            context=context,
            variant=variant,
            figures=", ".join(figures) or "no figures yet",
        )
    )


def enhance_pair(
    situation: Situation, keys: Collection[str], seed: int, reply: Reply = "short", template: str = ""
) -> Told:
    """The answer is one JSON object. `reply`: "short" is the first reaction only, "full" all that the tool shows.

    `template`: of `enhance_template`, the course's own where it is empty.
    """
    scenario, stakeholder, context, variant = situation
    rng = random.Random(f"enhance-{seed}-{scenario_id(scenario)}-{stakeholder}-{context}-{variant}")
    answer, praise, worries = _thin(situation, keys, seed, rng)
    if rng.random() < 0.25:
        worries = [*worries[:1], Concern(**rng.choice(texts()["coal"]), severity="medium")]
    head = {
        "initialReaction": _flat(situation, praise, worries, rng),
        "appreciation": praise,
        "concerns": [c.model_dump() for c in worries],
        "questions": answer.questions,
        "engagementAdvice": answer.engagementAdvice,
    }
    name, shares = STAKEHOLDERS[stakeholder].name, _shares(scenario)
    base = {
        "stakeholderId": stakeholder,
        "stakeholderName": name,
        **head,
        "generatedAt": "2026-01-15T09:30:00.000Z",
        "generationType": "rule-based",
        "metadata": {"context": context, "variant": variant, "interactionTriggersCount": len(worries)},
    }
    prompt = (template or enhance_template()).format(
        name=name,
        priorities=", ".join(STAKEHOLDERS[stakeholder].priorities),
        questions="; ".join(answer.questions),
        country=scenario.metadata.country,
        scenario=scenario.metadata.scenarioName,
        jobs="N/A",
        cut="N/A",
        share_2030=f"{shares.get(2030, 0):.1f}",
        share_2040=f"{shares.get(2040, 0):.1f}",
        task=rng.choice(texts()["tasks"]),
        base=json.dumps(base, indent=2, ensure_ascii=False),
    )
    first, facts = _reaction(situation, shares, praise, worries, seed, rng)
    wanted = (
        {"initialReaction": first}
        if reply == "short"
        else {**head, "initialReaction": first, "concerns": [_reworded(c, situation, keys, seed) for c in worries]}
    )
    return _used(prompt, json.dumps(wanted, ensure_ascii=False), answer.facts + facts)


def voice_pair(situation: Situation, keys: Collection[str], seed: int) -> Told:
    """The answer is 2-3 sentences. The prompt names no stance: it is always the tool's default, pragmatic."""
    scenario, stakeholder, context, _ = situation
    rng = random.Random(f"voice-{seed}-{scenario_id(scenario)}-{stakeholder}-{context}")
    answer, praise, worries = _thin(situation, keys, seed, rng)
    shares, name = _shares(scenario), STAKEHOLDERS[stakeholder].name
    lines = [f"Positive aspects: {'; '.join(praise)}"] if praise else []
    lines += [f"Their concerns: {'; '.join(c.text for c in worries)}"] if worries else []
    prompt = (
        texts()["voice"]
        .strip()
        .format(
            name=name,
            country=scenario.metadata.country,
            scenario=scenario.metadata.scenarioName,
            context=context,
            shares="\n".join(f"- {value:.1f}% renewable energy by {year}" for year, value in shares.items()),
            priorities=", ".join(STAKEHOLDERS[stakeholder].priorities[:2]),
            points="\n".join(lines),
            examples=_examples(stakeholder, context) if rng.random() < 0.5 else "",
        )
    )
    first, facts = _reaction(situation, shares, praise, worries, seed, rng)
    return _used(re.sub(r"\n{2,}", "\n\n", prompt), first, answer.facts + facts)


def _used(prompt: str, completion: str, facts: list[Fact]) -> Told:
    """Only those facts that the completion states, each once."""
    said = {(m.unit, round(m.value, 6)) for m in mentions(completion)}
    kept = {(f.metric, f.year): f for f in facts if (f.unit, round(f.value, 6)) in said}
    return prompt, completion, list(kept.values())


def _thin(
    situation: Situation, keys: Collection[str], seed: int, rng: random.Random
) -> tuple[Response, list[str], list[Concern]]:
    """A full answer, and the few points of it (0-1 praise, 0-2 concerns) that a rule engine would have found."""
    answer = respond(*situation, seed=seed, keys=keys)
    return answer, answer.appreciation[: rng.choice((0, 1, 1))], answer.concerns[: rng.choice((0, 1, 1, 2))]


def _flat(situation: Situation, praise: list[str], worries: list[Concern], rng: random.Random) -> str:
    kind = "both" if praise and worries else "praise" if praise else "concern" if worries else "none"
    return rng.choice(texts()["thin"][kind]).format(
        name=STAKEHOLDERS[situation[1]].name, scenario=situation[0].metadata.scenarioName
    )


def _shares(scenario: Scenario) -> dict[int, float]:
    """Renewable shares (%) of 2030 and 2040 as the tool prints them, where the scenario has these years."""
    figures = derive_metrics(scenario).figures
    return {year: figures["re_share", year].value for year in (2030, 2040) if ("re_share", year) in figures}


def _reaction(
    situation: Situation,
    shares: dict[int, float],
    praise: list[str],
    worries: list[Concern],
    seed: int,
    rng: random.Random,
) -> tuple[str, list[Fact]]:
    """Two or three sentences: the stakeholder's own opening, then the first praise and the first concern."""
    scenario, *speaker = situation
    # told no year that the prompt lacks
    known = scenario.model_copy(update={"milestones": [m for m in scenario.milestones if m.year in shares]})
    for turn in range(TURNS):
        said = respond(known if shares else scenario, *speaker, seed + 7919 * turn, ("re_share",) if shares else ())
        opening = _first_sentence(said.initialReaction, scenario)
        # a name may hold a number, which is no figure
        bare = opening.replace(scenario.metadata.scenarioName, "").replace(scenario.metadata.country, "")
        if not shares or mentions(bare):
            break
    if pool := country_profile(scenario.metadata.country).get("pool"):  # the tool's prompts do not name it
        opening = opening.replace(pool, "our region")
        opening = opening[:1].upper() + opening[1:]
    points = praise[:1] + [rng.choice(texts()["worry"][situation[3]]).format(c.text) for c in worries[:1]]
    return " ".join([opening, *(points or [rng.choice(texts()["closing"])])]), said.facts


def _first_sentence(text: str, scenario: Scenario) -> str:
    """Up to the first full stop that does not belong to a name such as "Congo, Dem. Rep."."""
    names = (scenario.metadata.scenarioName, scenario.metadata.country)
    for number, name in enumerate(names):
        text = text.replace(name, f"\0{number}")
    first = SENTENCE.split(text)[0]
    for number, name in enumerate(names):
        first = first.replace(f"\0{number}", name)
    return first


def _reworded(concern: Concern, situation: Situation, keys: Collection[str], seed: int) -> dict[str, Any]:
    """The same concern in other words of the same stakeholder: same metric, same figures; else as it is."""

    def figures(c: Concern) -> list[Any]:
        return [c.metric, *((m.value, m.unit, m.year) for m in mentions(c.text))]

    others = (c for turn in (1, 2, 3) for c in respond(*situation, seed=seed + 7919 * turn, keys=keys).concerns)
    found = (c.text for c in others if c.text != concern.text and figures(c) == figures(concern))
    return {**concern.model_dump(), "text": next(found, concern.text)}


@functools.cache
def _examples(stakeholder: str, context: str) -> str:
    """Voice line and two worked examples of other scenarios, in the two stances that the target does not have."""
    pairs = []
    for scenario, variant in zip(sample(2, seed=2030), ("conservative", "progressive"), strict=True):
        share = derive_metrics(scenario).get("re_share", "near")
        said = respond(scenario, stakeholder, context, variant, keys=("re_share",)).initialReaction
        pairs.append(
            f'{len(pairs) + 1}. Scenario: {scenario.metadata.country}, {share} renewable energy\nResponse: "{said}"'
        )
    return texts()["examples"].format(voice=texts()["voices"][stakeholder], pairs="\n".join(pairs)).strip()
