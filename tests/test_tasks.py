"""The tool's own two prompts and the free-form question: form, what they hold, and every gate with a planted error."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stakelib.dialogues import GUIDE_MIX, Dialogue, build, check, mix_for, problems_of, split
from stakelib.dialogues.check import base_of, given, said
from stakelib.dialogues.numbers import mentions
from stakelib.dialogues.tasks import KEYS
from stakelib.run import CourseError
from stakelib.scenarios import Scenario, country_profile, sample

SCENARIOS = sample(60, seed=0)
SHORT = split(build(SCENARIOS, 0, asked=90, enhance=135, voice=135))
FULL = split(build(SCENARIOS, 0, enhance=135, reply="full"))
PLAIN = [r for r in SHORT if r.task == "dialogue"]
VOICE = [r for r in SHORT if r.task == "voice"]


def test_all_gates_pass_and_the_mix_is_the_guides() -> None:
    for rows in (SHORT, FULL):
        assert all(gate["failures"] == 0 for gate in check(rows))
    assert Counter(r.stakeholder_id for r in FULL) == mix_for(135)
    assert Counter(r.task for r in SHORT) == {"dialogue": 90, "enhance": 135, "voice": 135}


def test_more_tasks_leave_the_full_dialogues_as_they_were() -> None:
    some = build(SCENARIOS, 45)
    assert build(SCENARIOS, 45, asked=9, enhance=9, voice=9)[:45] == some
    assert {r.task for r in some} == {"dialogue"}
    assert len({r.id for r in [*SHORT, *some]}) == len(SHORT) + 45
    assert Counter(r.stakeholder_id for r in build(SCENARIOS)) == GUIDE_MIX


def test_bases_are_as_thin_as_the_tools() -> None:
    bases = [base_of(r.prompt) for r in FULL]
    assert {len(b["concerns"]) for b in bases} == {0, 1, 2} and {len(b["appreciation"]) for b in bases} == {0, 1}
    planted = [
        r
        for r, b in zip(FULL, bases, strict=True)
        if any("coal" in c["metric"] or "fossil" in c["metric"] for c in b["concerns"])
    ]
    assert 15 < len(planted) < 60
    without = [r for r in planted if not any("Coal" in f.metric for f in r.facts)]
    assert without and all(re.search("coal", said(r), re.I) for r in without)  # kept, not mended
    for r, base in zip(FULL, bases, strict=True):
        assert list(base) == ["stakeholderId", "stakeholderName", *KEYS, "generatedAt", "generationType", "metadata"]
        assert base["metadata"]["context"] == r.context and base["metadata"]["variant"] == r.variant
        assert "- Estimated Jobs (2030): N/A\n- Emissions Reduction: N/A%\n" in r.prompt
    labels = [
        "STAKEHOLDER PROFILE:",
        "- Name:",
        "- Primary Concerns:",
        "- Questions They Typically Ask:",
        "SCENARIO CONTEXT:",
        "- Country:",
        "- Scenario:",
        "- Renewable Share 2030:",
        "- Renewable Share 2040:",
        "TASK:",
        "CRITICAL RULES:",
        "BASE RESPONSE TO ENHANCE:",
        "ENHANCED VERSION",
    ]
    assert sorted(labels, key=FULL[0].prompt.index) == labels


def test_a_year_that_the_scenario_lacks_is_printed_as_the_tool_does_and_not_cited() -> None:
    odd = SCENARIOS[0].model_copy(deep=True)
    for milestone, year in zip(odd.milestones, (2026, 2032, 2042, 2052, 2060), strict=False):
        milestone.year = year
    odd.detailedTech = None
    row = build([odd], {}, enhance=9)[0]
    assert "- Renewable Share 2030: 0.0%\n- Renewable Share 2040: 0.0%" in row.prompt
    assert problems_of(row) == [] and "0.0%" not in row.completion


def test_replies_are_one_json_object_of_the_kind_asked_for() -> None:
    enhanced = [r for r in SHORT if r.task == "enhance"]
    assert all(list(json.loads(r.completion)) == ["initialReaction"] for r in enhanced)
    assert max(len(r.completion) for r in enhanced) < 600
    assert all(tuple(json.loads(r.completion)) == KEYS for r in FULL)
    reworded = sum(json.loads(r.completion)["concerns"] != base_of(r.prompt)["concerns"] for r in FULL)
    assert reworded > 20 and max(len(said(r).split()) for r in FULL) <= 200
    with pytest.raises(CourseError, match="'long'"):
        build(SCENARIOS, 9, reply="long")
    with pytest.raises(CourseError, match="a full reply among short ones"):
        check([*enhanced[:5], FULL[0].model_copy(update={"split": enhanced[0].split})])


def test_voices_are_short_cite_the_scenario_and_pass_the_tools_filter() -> None:
    with_examples = [r for r in VOICE if "---END OF EXAMPLES---" in r.prompt]
    assert 30 < len(with_examples) < 105 and {r.variant for r in VOICE} == {"pragmatic"}
    assert all(len(r.completion) < 500 and mentions(r.completion) for r in VOICE)
    assert all("Response:" not in given(r) and r.scenario in given(r) for r in with_examples)


def test_free_form_questions_hold_every_figure_of_their_answer() -> None:
    assert all("\n" not in r.prompt and r.prompt.count("?") == 1 for r in PLAIN)
    assert len({r.prompt.split()[0] for r in PLAIN}) == 3
    assert max(len(mentions(r.prompt)) for r in PLAIN) <= 12


E = FULL[
    next(
        i
        for i, r in enumerate(FULL)
        if base_of(r.prompt)["concerns"]
        and base_of(r.prompt)["appreciation"]
        and mentions(base_of(r.prompt)["appreciation"][0])
    )
]
V = next(r for r in VOICE if "---END OF EXAMPLES---" in r.prompt)
Q = next(r for r in PLAIN if any(m.unit == "%" for m in mentions(r.completion)))
EXAMPLE = re.search(r'Response: "(.+?\.) ', V.prompt)[1]


def changed(**keys: Any) -> str:
    return json.dumps({**json.loads(E.completion), **keys}, ensure_ascii=False)


CONCERN = json.loads(E.completion)["concerns"][0]
PLANTED = [
    (E, "```json\n" + E.completion + "\n```", "not one bare JSON object"),
    (E, "Here it is: " + E.completion, "not one bare JSON object"),
    (E, E.completion[:-20], "not one bare JSON object"),
    (E, json.dumps({"initial_reaction": "We like it."}), "keys initial_reaction"),
    (E, changed(note="x"), "keys initialReaction"),
    (E, changed(initialReaction=""), "initialReaction is no text"),
    (E, changed(initialReaction=None), "initialReaction: not the same number"),
    (E, changed(concerns=[]), "concerns: not the same number"),
    (E, changed(concerns=None), "concerns: not the same number"),
    (E, changed(appreciation=["It is good."]), "appreciation: drops the figures"),
    (E, changed(appreciation=[None]), "is no text"),
    (E, changed(concerns=[{**CONCERN, "severity": "unheard of"}]), "another metric, severity or shape"),
    (E, changed(concerns=[{**CONCERN, "metric": "luck"}]), "another metric, severity or shape"),
    (E, changed(concerns=["plain words"]), "another metric, severity or shape"),
    (E, changed(concerns=[{**CONCERN, "text": ""}]), "another metric, severity or shape"),
    (E, changed(initialReaction="We read 12.34% somewhere."), "'12.34%': not in the prompt"),
    (E, changed(initialReaction="We keep to the 200 words."), "figures in prompt"),
    (E, changed(initialReaction="By 2047 we may agree."), "year 2047"),
    (E, changed(initialReaction="Uranium and nuclear will help."), "'nuclear' without data"),
    (E, changed(initialReaction="The LCOE is fine."), "banned term"),
    (E, changed(initialReaction="word " * 201), "words, limit 200"),
    (E, changed(initialReaction="We like it.<end_of_turn>"), "control-token"),
    (V, V.completion + " One more. And more. And more.", "sentences, want 2 or 3"),
    (V, "We like it. We do.", "cites no figure"),
    (V, f"{V.completion}\nThat is all.", "several lines"),
    (V, V.completion.replace(".", '."', 1), "quotes"),
    (V, "Reaction: " + V.completion, "labels"),
    (V, V.completion[:-1] + ", as we said in this scenario: more.", "echo of the prompt: 'scenario:'"),
    (V, V.completion[:-1] + ", as a bank would respond.", "echo of the prompt"),
    (V, EXAMPLE + " " + V.completion.split(". ")[-1], "repeats an example"),
    (V, V.completion + " We see 99.9% everywhere.", "'99.9%': not in the prompt"),
    (Q, Q.completion.replace("**Questions**:", "**Questions**:\n- Why 99.9%?"), "'99.9%': not in the prompt"),
    (Q, Q.completion.replace("**Questions**", "- [low] Nuclear: too slow.\n\n**Questions**"), "without data"),
]


@pytest.mark.parametrize(("row", "completion", "reason"), PLANTED, ids=[p[2][:30] for p in PLANTED])
def test_planted_errors_are_caught(row: Dialogue, completion: str, reason: str) -> None:
    assert problems_of(row) == []
    found = problems_of(row.model_copy(update={"completion": completion, "source": "edited"}))
    assert any(reason in problem for problem in found), found


@pytest.mark.parametrize(
    ("row", "old", "new", "what"),
    [
        (E, '"variant": "', '"stance": "', "variant"),
        (E, '"context": "', '"where": "', "context"),
        (E, "- Country: ", "- Land: ", "country"),
        (V, "- Context: ", "- Where: ", "context"),
        (V, "You are ", "Be ", "stakeholder"),
        (Q, Q.variant, "", "variant"),
        (Q, Q.context, "", "context"),
        (Q, f'"{Q.scenario}"', "of ours", "scenario"),
    ],
)
def test_what_decides_the_wording_stands_in_the_prompt(row: Dialogue, old: str, new: str, what: str) -> None:
    spoiled = row.model_copy(update={"prompt": row.prompt.replace(old, new)})
    assert f"wording decided by prompt: the prompt lacks its {what}" in problems_of(spoiled)


def test_rows_of_a_scenario_that_was_saved_are_the_same() -> None:
    """The record keeps scenarios as JSON; what `prepare` makes of them must be what a reviewer saw."""
    kept = [Scenario.model_validate(s.model_dump()) for s in SCENARIOS]
    assert kept[0].metadata.cell is None and SCENARIOS[0].metadata.cell
    texts = [[(r.id, r.prompt, r.completion) for r in build(s, 0, enhance=18, voice=18)] for s in (SCENARIOS, kept)]
    assert texts[0] == texts[1]


def test_no_voice_names_a_pool_that_its_prompt_lacks() -> None:
    rows = [r for r in SHORT if r.stakeholder_id == "regional-bodies" and r.task in ("voice", "enhance")]
    pools = [country_profile(r.country)["pool"] for r in rows]
    first = [r.completion if r.task == "voice" else json.loads(r.completion)["initialReaction"] for r in rows]
    named = [pool for r, text, pool in zip(rows, first, pools, strict=True) if pool in text and pool not in r.prompt]
    assert rows and not named
    assert any("our region" in text.lower() for text in first)


def test_full_stops_and_banned_words_in_names_are_names() -> None:
    data = SCENARIOS[0].model_dump()
    data["metadata"] |= {"country": "Congo, Dem. Rep.", "scenarioName": "Tariff Reform vs. Least Cost"}
    rows = build([Scenario.model_validate(data)], {"finance": 3, "public": 3}, enhance=9, voice=9)
    assert [p for r in rows for p in problems_of(r)] == []


def test_a_voice_has_no_stance_but_the_default() -> None:
    assert any("lacks its variant" in p for p in problems_of(V.model_copy(update={"variant": "progressive"})))


def test_figures_of_worked_examples_rules_and_time_stamps_ground_nothing() -> None:
    share = next(m for m in mentions(V.prompt) if m.unit == "%" and m.text not in given(V))
    told = f"{V.completion.split('. ')[0]}. Renewables reach {share.text}."
    assert any(share.text in p for p in problems_of(V.model_copy(update={"completion": told, "source": "edited"})))
    assert "200" not in given(E) and "generatedAt" not in given(E)


TOOL = """
export function prompt(s: Stakeholder, b: Base): string {
  return `Act like a ${s.name} person. { braces }

STAKEHOLDER PROFILE:
- Name: ${s.name}
- Primary Concerns: ${s.priorities.join(', ')}
- Questions They Typically Ask: ${s.questions.map(q => { return q }).join('; ')}

SCENARIO CONTEXT:
- Country: ${c.country}
- Scenario: ${c.name}
- Renewable Share 2030: ${share(2030).toFixed(1)}%
- Renewable Share 2040: ${share(2040).toFixed(1)}%
- Estimated Jobs (2030): ${jobs ?? 'N/A'}
- Emissions Reduction: ${cut ?? 'N/A'}%

TASK: improve the text for ${s.name}.

BASE RESPONSE TO ENHANCE:

${JSON.stringify(b, null, 2)}

ENHANCED VERSION (JSON):`;
}
"""


def test_the_tools_own_wording_comes_from_a_checkout_that_the_user_names(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "ai.ts").write_text(TOOL, encoding="utf-8")
    rows = build(SCENARIOS, 0, enhance=9, tool=tmp_path)
    own = build(SCENARIOS, 0, enhance=9)
    assert [r.completion for r in rows] == [r.completion for r in own]
    for row, other in zip(rows, own, strict=True):
        assert row.prompt.startswith(f"Act like a {row.stakeholder} person. {{ braces }}\n")
        assert row.prompt.endswith("ENHANCED VERSION (JSON):") and "${" not in row.prompt
        assert base_of(row.prompt) == base_of(other.prompt) and problems_of(row) == []
    edited = TOOL.replace("Act like a", "Speak as a")  # in a kernel that has read the old words
    (tmp_path / "src" / "ai.ts").write_text(edited, encoding="utf-8")
    assert all(r.prompt.startswith("Speak as a") for r in build(SCENARIOS, 0, enhance=9, tool=tmp_path))
    (tmp_path / "src" / "ai.ts").write_text("export {}", encoding="utf-8")
    empty = tmp_path / "src"
    with pytest.raises(CourseError, match="0 enhance prompts found"):
        build(SCENARIOS, 0, enhance=9, tool=empty)
