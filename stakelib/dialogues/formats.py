"""The guide's prompt and completion for a full dialogue, and its three test prompts."""

from __future__ import annotations

from collections.abc import Collection
from itertools import groupby

from stakelib.dialogues.tasks import texts
from stakelib.scenarios import Metric, Scenario, country_profile, derive_metrics, sample
from stakelib.scenarios.metrics import METRICS
from stakelib.voices import STAKEHOLDERS, Response

HEADINGS = ("Initial Reaction", "Appreciates", "Concerns", "Questions", "Engagement Tips")


def prompt_text(
    scenario: Scenario, stakeholder: str, context: str, variant: str, keys: Collection[str] = tuple(METRICS)
) -> str:
    """The guide's prompt: every figure that a response may use, with unit and year, and what decides its wording.

    `keys`: the metrics to print, the same as given to `respond`; all if not given.
    """
    profile = STAKEHOLDERS[stakeholder]
    return texts()["dialogue"].format(
        name=profile.name,
        details="\n".join(_scenario_lines(scenario, keys)),
        context=context,
        variant=variant,
        priorities=", ".join(profile.priorities),
    )


def _scenario_lines(scenario: Scenario, keys: Collection[str] = tuple(METRICS)) -> list[str]:
    lines = [f"- Country: {scenario.metadata.country}", f"- Scenario: {scenario.metadata.scenarioName}"]
    if place := country_profile(scenario.metadata.country):
        kind = "Regional Body" if place["island"] else "Power Pool"
        lines.append(f"- {kind}: {place['pool']}" + (" (isolated island grid)" if place["island"] else ""))
    for _, group in groupby(derive_metrics(scenario).only(keys).shown(), key=lambda m: m.key):
        lines += _metric_lines(list(group))
    return lines


def _metric_lines(rows: list[Metric]) -> list[str]:
    label = rows[0].label
    if rows[0].key == "re_share":  # the guide's own form
        return [f"- {label} {m.year}: {m}" for m in rows]
    if rows[0].key == "investment":
        return [f"- {label}: " + ", ".join(f"{m} by {m.year}" for m in rows)]
    return [f"- {label}: " + ", ".join(f"{m} ({m.year})" for m in rows)]


def completion_text(response: Response) -> str:
    """The guide's five sections."""
    reaction, praise, concerns, questions, tips = (f"**{h}**:" for h in HEADINGS)
    return "\n".join(
        [
            f"{reaction} {response.initialReaction}",
            "",
            praise,
            *(f"- {text}" for text in response.appreciation),
            "",
            concerns,
            *(f"- [{c.severity}] {c.text}: {c.explanation}" for c in response.concerns),
            "",
            questions,
            *(f"- {text}" for text in response.questions),
            "",
            tips,
            *(f"- {text}" for text in response.engagementAdvice),
        ]
    )


def guide_test_prompts() -> dict[str, str]:
    """The guide's three test prompts by stakeholder id; finance's "[scenario details]" is one sampled scenario."""
    details = "\n".join(_scenario_lines(sample(1, seed=2030)[0]))
    return {name: text.format(details=details) for name, text in texts()["guide_tests"].items()}
