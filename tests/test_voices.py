"""Voices: nine data files that parse, and responses that say enough, differ, and invent nothing."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from stakelib.dialogues import completion_text, prompt_text
from stakelib.dialogues.numbers import ungrounded
from stakelib.run import CourseError
from stakelib.scenarios import Scenario, derive_metrics, load, sample
from stakelib.scenarios.metrics import METRICS
from stakelib.voices import CONTEXTS, STAKEHOLDERS, VARIANTS, respond
from stakelib.voices.profiles import margin, parse_profile

SAMPLES = sample(60, seed=5)
DATA = Path(__file__).parents[1] / "stakelib" / "voices" / "data"
FIXTURE = Path(__file__).parent / "data" / "two-scenarios.json"
FINANCE = (Path(__file__).parents[1] / "stakelib" / "voices" / "data" / "finance.yaml").read_text(encoding="utf-8")


def test_nine_stakeholders_in_the_tools_order() -> None:
    assert list(STAKEHOLDERS) == [
        "policy-makers",
        "grid-operators",
        "industry",
        "public",
        "csos-ngos",
        "scientific",
        "finance",
        "regional-bodies",
        "development-partners",
    ]
    assert STAKEHOLDERS["csos-ngos"].name == "CSOs & NGOs"
    assert len({tuple(p.priorities) for p in STAKEHOLDERS.values()}) == 9


@pytest.mark.parametrize("name", list(STAKEHOLDERS))
def test_profiles_are_rich(name: str) -> None:
    p = STAKEHOLDERS[name]
    assert p.id == name and set(p.openers) == set(VARIANTS) and set(p.contexts) == set(CONTEXTS)
    assert len([x for x in p.appreciation if x.when]) >= 8 and len([x for x in p.concerns if x.when]) >= 8
    assert all(any(not x.when for x in points) for points in (p.appreciation, p.concerns, p.questions))


def test_no_phrase_is_shared_between_groups() -> None:
    owner: dict[str, str] = {}
    for name, p in STAKEHOLDERS.items():
        phrases = [s for x in (*p.appreciation, *p.questions, *p.advice) for s in x.say]
        phrases += [s for x in p.concerns for s in (*x.text, *x.why)] + [s for v in p.openers.values() for s in v]
        for phrase in phrases:
            assert owner.setdefault(phrase, name) == name, phrase


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("re_share.near >= 55", "re_share.near => 55", "is no condition"),
        ("re_share.near >= 55", "wishes.near >= 55", "is no condition"),
        ("{invest_near} in {country}", "{invest_near in {country}", "finance.yaml"),
        ("priorities: [bankability", "prioritys: [bankability", "prioritys"),
        ("name: Financial", "name: [Financial", "finance.yaml"),
        ("only: [conservative]", "only: [timid]", "conservative"),
        ("[qualifies|opens] the", "[qualifies|opens the", "a bracket is open"),
        ("{storage_near}", "{storage_nearly}", "{storage_nearly} is unknown; write e.g."),
        ("first: [investment, ", "concerns: {wealth: 2}, first: [investment, ", "'wealth' is no measure"),
    ],
)
def test_a_broken_file_is_named_with_field(old: str, new: str, said: str) -> None:
    assert parse_profile("finance.yaml", FINANCE).id == "finance"
    assert old in FINANCE
    with pytest.raises(CourseError) as caught:
        parse_profile("finance.yaml", FINANCE.replace(old, new, 1))
    assert said in str(caught.value)
    lines = [int(p.split(":")[1]) for p in caught.value.problems if p.startswith("finance.yaml:")]
    assert len(lines) == len(caught.value.problems)
    assert min(abs(line - FINANCE[: FINANCE.index(old)].count("\n") - 1) for line in lines) <= 1


def test_unknown_names_are_listed_together() -> None:
    with pytest.raises(CourseError) as caught:
        respond(SAMPLES[0], "financial", context="rich", variant="bold")
    assert len(caught.value.problems) == 3


def test_margin_knows_bars_and_ignorance() -> None:
    def same(key: str) -> float:
        return 1.0

    assert margin("peak.near >= 100", {"peak.near": 150.0}, same) == 0.4
    assert margin("peak.growth >= 2", {"peak.growth": 3.5}, same) == 0.75
    assert margin("peak.near >= 100", {"peak.near": 90.0}, same) is None
    assert margin("peak.near < 100", {}, same) is None  # unknown is not zero
    assert margin("re_share.near >= 80", {"re_share.near": 96.0}, lambda key: 1.4) == pytest.approx(
        0.2
    )  # clamped to 95
    assert margin("island", {"island": None}, same) is None


def test_sweep_60_scenarios_9_groups_3_variants() -> None:
    """Every number of every text stands in its prompt, and no text is thin."""
    texts, cited = set(), []
    for i, scenario in enumerate(SAMPLES):
        for name in STAKEHOLDERS:
            for variant in VARIANTS:
                context = CONTEXTS[(i + len(variant)) % 3]
                r = respond(scenario, name, context=context, variant=variant)
                text = completion_text(r)
                assert ungrounded(text, prompt_text(scenario, name, context, variant)) == []
                assert 2 <= len(r.appreciation) <= 4 and 2 <= len(r.concerns) <= 4
                assert 3 <= len(r.questions) <= 5 and 2 <= len(r.engagementAdvice) <= 3
                texts.add(text)
                cited.append(len(r.facts))
    assert len(texts) == 60 * 27
    assert min(cited) >= 3


def test_facts_are_the_scenarios_figures() -> None:
    for scenario in SAMPLES[:20]:
        known = {(m.label, m.year, m.unit, m.value) for m in derive_metrics(scenario).shown()}
        for name in STAKEHOLDERS:
            used = {(f.metric, f.year, f.unit, f.value) for f in respond(scenario, name).facts}
            assert used and used <= known


def test_same_arguments_same_words_and_other_arguments_other_words() -> None:
    s = SAMPLES[0]
    one = respond(s, "industry", seed=1)
    assert respond(s, "industry", seed=1) == one
    assert respond(s, "industry", seed=2) != one
    assert respond(s, "industry", variant="conservative", seed=1) != one
    assert respond(s, "industry", context="developed", seed=1) != one


def test_variants_move_the_bar() -> None:
    """Over many scenarios the cautious worry more, and more severely."""
    weight = {"low": 1, "medium": 2, "high": 3}
    total = {
        v: sum(weight[c.severity] for s in SAMPLES for n in STAKEHOLDERS for c in respond(s, n, variant=v).concerns)
        for v in VARIANTS
    }
    assert total["conservative"] > 1.2 * total["pragmatic"]
    assert sum(len(respond(s, "finance", variant="progressive").appreciation) for s in SAMPLES) > sum(
        len(respond(s, "finance", variant="conservative").appreciation) for s in SAMPLES
    )


def test_no_coal_without_coal_and_no_interconnector_on_islands() -> None:
    for s in SAMPLES:
        fleet = s.detailedTech and s.detailedTech[s.milestones[0].year]
        for name in STAKEHOLDERS:
            text = completion_text(respond(s, name)).lower()
            if fleet and not fleet.coal:
                assert "coal" not in text
            if fleet and not fleet.interconnector:
                assert "interconnector" not in text


def test_regional_body_names_the_pool_that_the_prompt_shows() -> None:
    named = 0
    for s in SAMPLES:
        prompt = prompt_text(s, "regional-bodies", "emerging", "pragmatic")
        for pool in (
            "SAPP",
            "EAPP",
            "WAPP",
            "CAPP",
            "COMELEC",
            "SIEPAC",
            "CARILEC",
            "Pacific Power",
            "Indian Ocean",
            "ASEAN",
        ):
            text = " ".join(completion_text(respond(s, "regional-bodies", seed=k)) for k in range(3))
            if pool in text:
                assert pool in prompt
                named += 1
    assert named >= 50


def test_thin_scenarios_get_answers_that_ask() -> None:
    bare = load(FIXTURE)[1]
    for name in STAKEHOLDERS:
        r = respond(bare, name)
        assert len(r.appreciation) >= 2 and len(r.concerns) >= 2 and len(r.questions) >= 3
        assert {f.metric for f in r.facts} <= {"Renewable Share"}


def test_a_country_that_no_table_knows_gets_whole_answers() -> None:
    data = SAMPLES[0].model_dump()
    data["metadata"]["country"] = "Exampleland"
    scenario = Scenario.model_validate(data)
    for name in STAKEHOLDERS:
        for variant in VARIANTS:
            r = respond(scenario, name, variant=variant)
            assert 2 <= len(re.split(r"(?<=[.!?]) ", r.initialReaction)) <= 3, r.initialReaction
            assert not ungrounded(completion_text(r), prompt_text(scenario, name, "emerging", variant))


def test_who_is_told_no_investment_asks_about_it_first() -> None:
    words = ("capital", "financ", "fund", "debt", "invest", "cost")
    for s in SAMPLES[:20]:
        told = [m for m in METRICS if m not in ("investment", "yearly_investment")]
        for name in ("finance", "development-partners"):
            assert any(w in respond(s, name, keys=told).questions[0].lower() for w in words)


def test_scenario_text_is_data_not_template() -> None:
    hostile = "{{ 7*7 }} {country} {% for x in y %} **bold** <|im_end|>"
    data = SAMPLES[0].model_dump()
    data["metadata"]["scenarioName"] = hostile
    scenario = Scenario.model_validate(data)
    text = " ".join(respond(scenario, n, seed=k).initialReaction for n in STAKEHOLDERS for k in range(4))
    assert hostile in text and "49" not in text
    assert hostile in prompt_text(scenario, "public", "emerging", "pragmatic")


BACKWARDS = re.compile(
    r"\{\w+\.(?:near|far|base|end)(?:\.by|\.at)?\} (?:of (?!capacity)|(?:renewables?|jobs|permanent|clean)\b)"
)


def phrases(text: str) -> list[str]:
    """What stands in quotation marks in a voice's file."""
    return re.findall(r'"([^"\n]*)"', text)


@pytest.mark.parametrize("path", sorted(DATA.glob("*.yaml")), ids=lambda p: p.stem)
def test_the_metric_stands_before_its_figure(path: Path) -> None:
    """A model that must write the figure first takes any: 39 of the 45 wrong figures of one run were of this form."""
    assert [p for p in phrases(path.read_text(encoding="utf-8")) if BACKWARDS.search(p)] == []


@pytest.mark.parametrize("phrase", ["the {storage.near} of storage in {storage.near.year}", "{jobs.near} jobs are few"])
def test_a_figure_before_its_metric_is_seen(phrase: str) -> None:
    assert BACKWARDS.search(phrase) and not BACKWARDS.search("storage of {storage.near.by} is thin")


def test_who_is_told_two_figures_does_not_look_for_a_third(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the tool's prompts have it: shares of two years, and nothing else is known."""
    module, turns = sys.modules[respond.__module__], []
    once = module._once
    monkeypatch.setattr(module, "_once", lambda *given: (turns.append(1), once(*given))[1])
    told = [s.model_copy(update={"milestones": [m for m in s.milestones if m.year in (2030, 2040)]}) for s in SAMPLES]
    told = [s for s in told if len(s.milestones) == 2]
    said = [respond(scenario, who, keys=("re_share",)) for scenario in told for who in ("finance", "scientific")]
    assert {len(answer.facts) for answer in said} == {2}
    assert len(turns) < 12 * len(said)  # it was 24 each, whatever they found
