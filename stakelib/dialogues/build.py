"""Training rows from scenarios: which stakeholder speaks about which scenario, in which context and stance."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from stakelib.dialogues.formats import completion_text, prompt_text
from stakelib.dialogues.tasks import Reply, Situation, Told, enhance_pair, enhance_template, question_text, voice_pair
from stakelib.run import CourseError
from stakelib.scenarios import Scenario, country_profile, derive_metrics, scenario_id
from stakelib.scenarios.metrics import METRICS
from stakelib.voices import CONTEXTS, STAKEHOLDERS, VARIANTS, Fact, respond

# the fine-tuning guide's 500 rows
GUIDE_MIX = {
    "policy-makers": 60,
    "grid-operators": 60,
    "industry": 55,
    "public": 55,
    "csos-ngos": 55,
    "scientific": 55,
    "finance": 55,
    "regional-bodies": 55,
    "development-partners": 50,
}


GUIDE = ("re_share", "investment")  # metrics of the guide's prompts: the first in every prompt, both in some half
BRIEF = (3, 6)  # and how many of those that the stakeholder would speak about
ALIKE = ("jobs", "permanent_jobs")  # told apart only by a model that has often seen each without the other
THIN = {"": 6, "asked": 2}  # kind -> one in so many rows has one or two figures alone, as the guide's own prompts do


class Dialogue(BaseModel):
    """One training row; the fields are the columns of the JSONL files, in this order."""

    id: str
    prompt: str
    completion: str
    stakeholder: str
    stakeholder_id: str
    scenario: str
    scenario_id: str
    country: str
    context: str
    variant: str
    task: Literal["dialogue", "enhance", "voice"] = "dialogue"
    facts: list[Fact]
    source: Literal["rules", "edited", "imported"] = "rules"
    split: str = ""


def mix_for(total: int) -> dict[str, int]:
    """The guide's distribution scaled to `total` rows (largest remainders)."""
    exact = {name: total * rows / sum(GUIDE_MIX.values()) for name, rows in GUIDE_MIX.items()}
    mix = {name: int(rows) for name, rows in exact.items()}
    for name in sorted(exact, key=lambda n: mix[n] - exact[n])[: total - sum(mix.values())]:
        mix[name] += 1
    return mix


def brief(scenario: Scenario, stakeholder: str, context: str, variant: str, seed: int) -> list[str]:
    """The metrics to lay before a stakeholder: the guide's first or both, and some of those that it would speak about.

    A page of 30 figures makes a small model mix them up, and no two users give the same ones; so each row has its own
    choice, made before the stakeholder speaks, and says nothing that goes beyond it. A metric that never lacks would
    be spoken about where it does.
    """
    labels = {fact.metric for fact in respond(scenario, stakeholder, context=context, variant=variant, seed=seed).facts}
    own = [key for key, (label, *_) in METRICS.items() if label in labels and key not in GUIDE]
    rng = random.Random(f"brief-{seed}-{scenario_id(scenario)}-{stakeholder}-{context}-{variant}")
    keys = [*GUIDE[: rng.choice((1, 2)) if len(own) > 2 else 2], *rng.sample(own, min(len(own), rng.randint(*BRIEF)))]
    out = rng.choice((*ALIKE, "neither")) if {*ALIKE} < {*keys} - {*GUIDE} else "neither"
    return [key for key in keys if key != out]


def near_only(scenario: Scenario) -> Scenario:
    """The scenario with its milestone near 2030 alone, of which a thin prompt tells the guide's figures.

    A model that has only seen rich prompts fills a poor one with figures of its own.
    """
    year = derive_metrics(scenario).slots.get("near")
    return scenario.model_copy(update={"milestones": [m for m in scenario.milestones if year in (None, m.year)]})


def build(
    scenarios: Sequence[Scenario],
    mix: Mapping[str, int] | int | None = None,
    seed: int = 0,
    *,
    asked: int = 0,
    enhance: int = 0,
    voice: int = 0,
    reply: Reply = "short",
    tool: str | Path | None = None,
) -> list[Dialogue]:
    """Rows for `scenarios`: `mix` is rows per stakeholder id, or a total in the guide's distribution (default 500).

    Besides these full dialogues so many rows, in the same distribution: `asked`, full dialogues after the guide's
    free-form question; `enhance`, the tool's Ollama prompt with a `reply` of one kind, in the wording of the tool's
    checkout `tool` if given; `voice`, two or three sentences. Some prompts hold one or two figures only, see
    THIN. Scenarios, stances and contexts take turns; a country's own development context comes up most.
    """
    mix = mix_for(mix) if isinstance(mix, int) else GUIDE_MIX if mix is None else mix
    if problems := [
        *(f"unknown stakeholder {name!r}" for name in mix if name not in STAKEHOLDERS),
        *([] if scenarios else ["no scenarios given"]),
        *([] if reply in ("short", "full") else [f"reply {reply!r} is neither 'short' nor 'full'"]),
    ]:
        raise CourseError(problems, f"give scenarios, and a mix over {', '.join(STAKEHOLDERS)}.")
    checkout = Path(tool) if tool else None
    template = enhance_template(checkout) if enhance else ""  # read anew each time: the checkout may have been edited
    kinds: list[tuple[str, _Row, Mapping[str, int]]] = [
        ("", _dialogue, mix),
        ("asked", _asked, mix_for(asked)),
        ("voice", voice_pair, mix_for(voice)),
        ("enhance", partial(enhance_pair, reply=reply, template=template), mix_for(enhance)),
    ]
    return [
        row
        for kind, make, rows in kinds
        for name in STAKEHOLDERS
        for row in _rows(scenarios, name, rows.get(name, 0), kind, make, seed)
    ]


_Row = Callable[[Situation, list[str], int], Told]


def _rows(scenarios: Sequence[Scenario], name: str, count: int, kind: str, make: _Row, seed: int) -> list[Dialogue]:
    """`count` rows of one stakeholder and kind; full dialogues have no kind, so their ids stay as they always were."""
    rng = random.Random(f"build-{seed}-{name}" + (f"-{kind}" if kind else ""))
    order = rng.sample(range(len(scenarios)), len(scenarios))
    seen: dict[str, int] = {}
    rows = []
    for j in range(count):
        scenario = scenarios[order[j % len(order)]]
        variant = "pragmatic" if kind == "voice" else VARIANTS[(j + j // len(order)) % len(VARIANTS)]
        own = country_profile(scenario.metadata.country).get("context", "emerging")
        context = own if rng.random() < 0.6 else rng.choice(CONTEXTS)
        key = f"{scenario_id(scenario)}.{name}.{context}.{variant}" + (f".{kind}" if kind else "")
        turn = seen[key] = seen.get(key, -1) + 1
        at = seed + 1000 * turn + 100 * (kind == "asked")  # a question is not answered like the prompt with a form
        told, keys = scenario, brief(scenario, name, context, variant, at)
        if kind in THIN and j % THIN[kind] == THIN[kind] - 1:
            told, keys = near_only(scenario), [*GUIDE[: 1 + j // THIN[kind] % 2]]
        prompt, completion, facts = make((told, name, context, variant), keys, at)
        rows.append(
            Dialogue(
                id=f"{key}.{turn}",
                prompt=prompt,
                completion=completion,
                facts=facts,
                stakeholder_id=name,
                stakeholder=STAKEHOLDERS[name].name,
                scenario=scenario.metadata.scenarioName,
                context=context,
                scenario_id=scenario_id(scenario),
                country=scenario.metadata.country,
                variant=variant,
                task=kind if kind in ("enhance", "voice") else "dialogue",
            )
        )
    return rows


def _dialogue(situation: Situation, keys: list[str], seed: int) -> Told:
    response = respond(*situation, seed=seed, keys=keys)
    return prompt_text(*situation, keys), completion_text(response), response.facts


def _asked(situation: Situation, keys: list[str], seed: int) -> Told:
    keys = keys[:4]  # nobody asks with a page of figures
    return question_text(situation, keys, seed), *_dialogue(situation, keys, seed)[1:]
