"""Training rows from scenarios: which stakeholder speaks about which scenario, in which context and stance."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel

from stakelib.dialogues.formats import completion_text, prompt_text
from stakelib.run import CourseError
from stakelib.scenarios import Scenario, country_profile, scenario_id
from stakelib.scenarios.metrics import METRICS
from stakelib.voices import CONTEXTS, STAKEHOLDERS, VARIANTS, Fact, respond

# the fine-tuning guide's 500 rows
GUIDE_MIX = {"policy-makers": 60, "grid-operators": 60, "industry": 55, "public": 55, "csos-ngos": 55, "scientific": 55,
             "finance": 55, "regional-bodies": 55, "development-partners": 50}


ALWAYS = ("re_share", "investment")  # metrics of every prompt, where known
BRIEF = (3, 6)  # and how many of those that the stakeholder would speak about


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
    task: Literal["dialogue"] = "dialogue"
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
    """The metrics to lay before a stakeholder: the guide's two, and some of those that it would speak about.

    A page of 30 figures makes a small model mix them up, and no two users give the same ones; so each row has its own
    choice, made before the stakeholder speaks, and says nothing that goes beyond it.
    """
    full = respond(scenario, stakeholder, context=context, variant=variant, seed=seed)
    labels = {fact.metric for fact in full.facts}
    own = [key for key, (label, *_) in METRICS.items() if label in labels and key not in ALWAYS]
    rng = random.Random(f"brief-{seed}-{scenario_id(scenario)}-{stakeholder}-{context}-{variant}")
    return [*ALWAYS, *rng.sample(own, min(len(own), rng.randint(*BRIEF)))]


def build(scenarios: Sequence[Scenario], mix: Mapping[str, int] | int | None = None, seed: int = 0) -> list[Dialogue]:
    """Rows for `scenarios`: `mix` is rows per stakeholder id, or a total in the guide's distribution (default 500).

    Scenarios, stances and contexts take turns; a country's own development context comes up most.
    """
    mix = mix_for(mix) if isinstance(mix, int) else mix or GUIDE_MIX
    problems = [f"unknown stakeholder {name!r}" for name in mix if name not in STAKEHOLDERS]
    problems += [] if scenarios else ["no scenarios given"]
    if problems:
        raise CourseError(problems, f"give scenarios, and a mix over {', '.join(STAKEHOLDERS)}.")
    rows: list[Dialogue] = []
    for name in STAKEHOLDERS:
        rng = random.Random(f"build-{seed}-{name}")
        order = rng.sample(range(len(scenarios)), len(scenarios))
        seen: dict[str, int] = {}
        for j in range(mix.get(name, 0)):
            scenario = scenarios[order[j % len(order)]]
            variant = VARIANTS[(j + j // len(order)) % len(VARIANTS)]
            own = country_profile(scenario.metadata.country).get("context", "emerging")
            context = own if rng.random() < 0.6 else rng.choice(CONTEXTS)
            rows.append(_row(scenario, name, context, variant, seed, seen))
    return rows


def _row(scenario: Scenario, name: str, context: str, variant: str, seed: int, seen: dict[str, int]) -> Dialogue:
    key = f"{scenario_id(scenario)}.{name}.{context}.{variant}"
    turn = seen[key] = seen.get(key, -1) + 1
    keys = brief(scenario, name, context, variant, seed + 1000 * turn)
    response = respond(scenario, name, context=context, variant=variant, seed=seed + 1000 * turn, keys=keys)
    return Dialogue(id=f"{key}.{turn}", prompt=prompt_text(scenario, name, context, variant, keys),
                    completion=completion_text(response), stakeholder=STAKEHOLDERS[name].name, stakeholder_id=name,
                    scenario=scenario.metadata.scenarioName, scenario_id=scenario_id(scenario),
                    country=scenario.metadata.country, context=context, variant=variant, facts=response.facts)
