"""Rows: the mix, the split, every gate with a planted error, the files."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from stakelib.dialogues import (
    GUIDE_MIX,
    Dialogue,
    build,
    check,
    guide_test_prompts,
    mix_for,
    prepare,
    problems_of,
    read,
    split,
    write,
)
from stakelib.dialogues.numbers import mentions
from stakelib.run import CourseError, Run
from stakelib.scenarios import sample
from stakelib.scenarios.metrics import METRICS
from stakelib.voices import STAKEHOLDERS, respond

SCENARIOS = sample(60, seed=0)
ROWS = split(build(SCENARIOS))


class WordTokenizer:
    """Counts words: enough to test the length gate without a model."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[str]]:
        return {"input_ids": text.split()}


def planted(row: Dialogue, **changes: str) -> list[Dialogue]:
    return [row.model_copy(update=changes)]


def cited(unit: str) -> tuple[Dialogue, str]:
    """A row and a figure of its completion in `unit`, as printed."""
    for row in ROWS:
        for m in mentions(row.completion):
            if m.unit == unit and m.year and m.metric and row.completion.count(m.text) == 1:
                return row, m.text
    raise AssertionError(unit)


def test_the_guides_500_rows() -> None:
    assert sum(GUIDE_MIX.values()) == 500 == len(ROWS)
    assert Counter(r.stakeholder_id for r in ROWS) == GUIDE_MIX
    assert {v for r in ROWS for v in [r.variant]} == {"conservative", "pragmatic", "progressive"}
    assert min(Counter(r.context for r in ROWS).values()) > 60


@pytest.mark.parametrize("total", [9, 45, 100, 499])
def test_smaller_mixes_scale(total: int) -> None:
    mix = mix_for(total)
    assert sum(mix.values()) == total and min(mix.values()) >= 1
    assert max(mix.values()) == mix["policy-makers"]
    assert len(build(SCENARIOS[:6], mix=total)) == total


def test_ids_and_rows_are_stable() -> None:
    again = split(build(sample(60, seed=0)))
    assert [r.model_dump() for r in again] == [r.model_dump() for r in ROWS]
    assert [r.completion for r in build(SCENARIOS, seed=1)] != [r.completion for r in build(SCENARIOS)]
    assert len({r.id for r in ROWS}) == 500
    some = build(SCENARIOS, mix={"public": 10})
    assert {r.id for r in some} <= {r.id for r in ROWS}


def test_each_row_has_its_own_choice_of_figures() -> None:
    """A brief of few metrics, chosen before the stakeholder speaks: no page of 30 figures, no two prompts alike."""
    labels = [label for label, *_ in METRICS.values()]
    shown = [{label for label in labels if re.search(rf"^- {label}( \d{{4}})?:", r.prompt, re.M)} for r in ROWS]
    assert max(map(len, shown)) <= 8 and len({frozenset(s) for s in shown}) > 200
    assert all({f.metric for f in r.facts} <= s for r, s in zip(ROWS, shown, strict=True))
    told = respond(SCENARIOS[0], "grid-operators", keys=["re_share"])
    assert {f.metric for f in told.facts} == {"Renewable Share"}
    assert len({f.metric for f in respond(SCENARIOS[0], "grid-operators").facts}) > 1


def test_build_refuses_unknown_groups_and_nothing() -> None:
    with pytest.raises(CourseError) as caught:
        build([], mix={"financial": 3})
    assert len(caught.value.problems) == 2


def test_split_holds_out_countries() -> None:
    countries = {name: {r.country for r in ROWS if r.split == name} for name in ("train", "valid", "test")}
    scenarios = {name: {r.scenario_id for r in ROWS if r.split == name} for name in ("train", "valid", "test")}
    assert not countries["test"] & (countries["train"] | countries["valid"])
    assert not scenarios["train"] & scenarios["valid"]
    assert 10 <= len(scenarios["test"]) <= 12 and 4 <= len(scenarios["valid"]) <= 6
    assert {r.stakeholder_id for r in ROWS if r.split == "test"} == set(STAKEHOLDERS)
    assert [r.split for r in split(ROWS, seed=1)] != [r.split for r in ROWS]


@pytest.mark.parametrize("n", [3, 4, 6, 9, 15, 30])
def test_small_sets_split_too(n: int) -> None:
    rows = split(build(sample(n, seed=n), mix=9 * n))
    assert {r.split for r in rows} == {"train", "valid", "test"}
    assert sum(g["failures"] for g in check(rows)) == 0


def test_too_little_to_split() -> None:
    with pytest.raises(CourseError, match="too few"):
        split(build(SCENARIOS[:1], mix=9))


def test_all_gates_pass_on_the_default_rows() -> None:
    table = check(ROWS, WordTokenizer())
    assert len(table) == 11 and all(g["failures"] == 0 and g["rows"] == 500 for g in table)
    assert len(check(ROWS)) == 10
    words = [len(r.completion.split()) for r in ROWS]
    assert 140 <= sum(words) / len(words) <= 200
    assert max(words) * 1.8 <= 400  # SmolLM2 needs at most 1.7 tokens a word here


def test_wrong_number_year_unit_and_metric_are_caught() -> None:
    row, text = cited("%")
    changed = str(round(float(text.rstrip("%")) + 0.7, 1)) + "%"
    with pytest.raises(CourseError, match="not in the prompt"):
        check(planted(row, completion=row.completion.replace(text, changed)))
    row, text = cited("m$")
    with pytest.raises(CourseError, match="wrong unit"):
        check(planted(row, completion=row.completion.replace(text, text.replace("$", "").replace("M USD", " MW"))))
    row = next(r for r in ROWS if re.search(r"\d MW by 2030", r.completion))
    with pytest.raises(CourseError, match="wrong year"):
        check(planted(row, completion=re.sub(r"(\d MW by )2030", r"\g<1>2040", row.completion, count=1)))
    row = next(r for r in ROWS if " created jobs numbering " in r.completion)
    with pytest.raises(CourseError, match="wrong metric"):
        check(planted(row, completion=row.completion.replace(" created jobs numbering ", " permanent jobs numbering ")))


ROW = ROWS[0]
ITEM = ROW.completion.split("**Questions**:\n")[1].split("\n")[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"completion": ROW.completion.replace("**Concerns**:", "**Worries**:")}, "five sections"),
        ({"completion": ROW.completion + "\n**Questions**:\n- And why?"}, "five sections"),
        ({"completion": ROW.completion.replace(ITEM + "\n", "")}, "2 items under Questions"),
        ({"completion": ROW.completion.replace(ITEM, "- We like that question.")}, "not a question"),
        ({"completion": re.sub(r"- \[(?:low|medium|high)\] ", "- ", ROW.completion, count=1)}, "without severity"),
        ({"prompt": ROW.prompt.replace("Stakeholder Stance", "Stance")}, "lacks its variant"),
        ({"prompt": ROW.prompt.replace("- Development Context", "- Context")}, "lacks its context"),
        ({"prompt": ROW.prompt.replace("energy security, ", "")}, "lacks its priorities"),
        ({"completion": ROW.completion + "<end_of_turn>"}, "control-token"),
        ({"completion": ROW.completion.replace(ITEM, "- Why <|im_start|>?")}, "control-token"),
        (
            {"completion": ROW.completion.replace("**Questions**", "- [low] Tariffs: too high.\n\n**Questions**")},
            "banned term",
        ),
        (
            {"completion": ROW.completion.replace("**Questions**", "- [low] Nuclear: too slow.\n\n**Questions**")},
            "'nuclear' without data",
        ),
        (
            {"completion": ROW.completion.replace("**Questions**", "- [low] Power: by 2047.\n\n**Questions**")},
            "year 2047",
        ),
        ({"completion": ROW.completion.replace(ITEM, ITEM + " word" * 400)}, "tokens, limit 400"),
        ({"prompt": ROW.prompt + " word" * 1500}, "tokens, limit 1536"),
    ],
)
def test_planted_errors_are_caught(changes: dict[str, str], said: str) -> None:
    check([ROW], WordTokenizer())
    bad = planted(ROW, **changes)
    assert bad[0] != ROW
    with pytest.raises(CourseError, match=re.escape(said)) as caught:
        check(bad, WordTokenizer())
    assert ROW.id in caught.value.problems[0]


def test_control_tokens_in_user_data_stay_text_in_the_prompt() -> None:
    """`render` never makes a control token of a prompt's text, so a scenario may have such a name."""
    name = "Plan <end_of_turn>"
    named = ROW.prompt.replace(f"- Scenario: {ROW.scenario}", f"- Scenario: {name}")
    row = ROW.model_copy(
        update={"scenario": name, "prompt": named, "completion": ROW.completion.replace(ROW.scenario, "the plan")}
    )
    assert problems_of(row) == []
    told = ROW.completion.replace(ITEM, f"- Does {name} hold?")
    assert "language: control-token text '<end_of_turn>'" in problems_of(row.model_copy(update={"completion": told}))


def test_near_duplicates_across_splits() -> None:
    train = next(r for r in ROWS if r.split == "train")
    test = next(r for r in ROWS if r.split == "test" and r.stakeholder_id == train.stakeholder_id)
    near = test.model_copy(update={"completion": train.completion.replace("?", "??", 1)})
    with pytest.raises(CourseError, match="nearly the text of " + re.escape(train.id)):
        check([train, near])
    far = test.model_copy(update={"completion": train.completion, "stakeholder_id": "finance"})
    with pytest.raises(CourseError) as caught:  # another group's text is no near-duplicate
        check([train, far])
    assert not any("nearly" in p for p in caught.value.problems)


def test_failing_rows_are_named_with_file_and_line() -> None:
    bad = ROWS[3].model_copy(update={"completion": ROWS[3].completion + "</s>"})
    with pytest.raises(CourseError) as caught:
        check([*ROWS[:3], bad], file="rows.jsonl")
    assert {p.split(": ")[0] for p in caught.value.problems} == {"rows.jsonl:4"}


def test_facts_gate() -> None:
    row = next(r for r in ROWS if len(r.facts) > 2)
    with pytest.raises(CourseError, match="not among the row's facts"):
        check([row.model_copy(update={"facts": []})])


def test_duplicates_and_leakage() -> None:
    with pytest.raises(CourseError, match="same completion"):
        check([ROW, ROW.model_copy(update={"id": "other"})])
    with pytest.raises(CourseError, match="same id"):
        check([ROWS[0], ROWS[1].model_copy(update={"id": ROWS[0].id})])
    train, test = (next(r for r in ROWS if r.split == name) for name in ("train", "test"))
    with pytest.raises(CourseError, match="scenario in"):
        check(
            [
                train,
                next(r for r in ROWS if r.scenario_id == train.scenario_id and r.id != train.id).model_copy(
                    update={"split": "valid"}
                ),
            ]
        )
    with pytest.raises(CourseError, match="test country also in"):
        check(
            [
                train,
                test.model_copy(
                    update={
                        "country": train.country,
                        "prompt": test.prompt.replace(f"- Country: {test.country}", f"- Country: {train.country}"),
                    }
                ),
            ]
        )
    with pytest.raises(CourseError, match="no rows"):
        check([])


def test_check_lists_all_failing_rows() -> None:
    bad = [r.model_copy(update={"completion": r.completion + "</s>"}) for r in ROWS[:7]]
    with pytest.raises(CourseError) as caught:
        check(bad)
    assert {p.split(": ")[0] for p in caught.value.problems} == {r.id for r in bad}


def test_files(tmp_path: Path) -> None:
    rows = ROWS[:40] + [r for r in ROWS if r.split == "valid"][:5]
    rows = list({r.id: r for r in rows}.values())
    write(rows, tmp_path, lambda prompt, completion: f"<u>{prompt}<m>{completion}")
    first = json.loads((tmp_path / "stakeholder_dialogues.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert list(first) == [
        "id",
        "prompt",
        "completion",
        "stakeholder",
        "stakeholder_id",
        "scenario",
        "scenario_id",
        "country",
        "context",
        "variant",
        "task",
        "facts",
        "source",
        "split",
    ]
    assert list(first["facts"][0]) == ["metric", "year", "unit", "value"]
    assert read(tmp_path / "stakeholder_dialogues.jsonl") == rows
    for name in ("train", "valid", "test"):
        part = [r for r in rows if r.split == name]
        assert read(tmp_path / f"{name}.jsonl") == part
        lines = (tmp_path / "mlx" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(x) for x in lines] == [{"prompt": r.prompt, "completion": r.completion} for r in part]
    from datasets import load_from_disk

    data = load_from_disk(str(tmp_path / "stakeholder_hf_dataset"))
    assert data["train"].num_rows == sum(r.split == "train" for r in rows)
    assert data["train"][0]["text"].startswith("<u>You are simulating a ")
    assert not list(tmp_path.rglob("*.part"))


def test_read_names_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(ROW.model_dump_json() + '\n{"id": 1}\nnot json\n', encoding="utf-8")
    with pytest.raises(CourseError) as caught:
        read(path)
    assert {p.split(":")[1] for p in caught.value.problems} == {"2", "3"}


def test_guide_test_prompts() -> None:
    prompts = guide_test_prompts()
    assert list(prompts) == ["policy-makers", "grid-operators", "finance"]
    assert "Tanzania" in prompts["policy-makers"] and "60% solar by 2030" in prompts["grid-operators"]
    assert "[scenario details]" not in prompts["finance"] and "- Renewable Share 2030:" in prompts["finance"]
    assert prompts == guide_test_prompts()


def test_some_prompts_hold_one_or_two_figures_and_their_answers_no_other() -> None:
    """A model that has only seen rich prompts fills a poor one with figures of its own."""
    for rows, one_in in ((ROWS, 6), (build(SCENARIOS, 0, asked=90), 2)):
        figures = [(r, {(m.value, m.year) for m in mentions(r.prompt)}) for r in rows]
        few = {n: [r for r, found in figures if len(found) == n and len({y for _, y in found}) == 1] for n in (1, 2)}
        assert 0.8 * len(rows) / one_in - 9 <= len(few[1]) + len(few[2]) <= len(rows) / one_in
        for metrics in (["Renewable Share"], ["Renewable Share", "Investment"]):  # the guide's own prompts
            thin = few[len(metrics)]
            assert len(thin) > 0.3 * len(rows) / one_in and {r.stakeholder_id for r in thin} == set(STAKEHOLDERS)
            assert all({f.metric for f in r.facts} <= set(metrics) and len(r.facts) <= len(metrics) for r in thin)
            assert sum(len(r.facts) for r in thin) > 0.9 * len(metrics) * len(thin)


def test_what_is_easily_confused_is_also_given_alone() -> None:
    """Where jobs and permanent jobs always came together, a model called one by the other's name."""
    told = Counter(tuple(f"- {name}: " in r.prompt for name in ("Jobs Created", "Permanent Jobs")) for r in ROWS)
    assert min(told[True, False], told[False, True], told[False, False]) > 0.05 * len(ROWS) > told[True, True] / 2
    without = [r for r in ROWS if "- Investment: " not in r.prompt]
    assert 0.2 * len(ROWS) < len(without) < 0.6 * len(ROWS)
    assert not [r for r in without if any(f.metric == "Investment" for f in r.facts)]


NAMES = [
    "80% RE by 2040",
    "NDC 30%",
    "100% Renewables",
    "5 GW Solar",
    "$2bn Grid Plan",
    "+20% demand",
    "Solar",
    "Wind",
    "RE",
    "B",
    "R&D & Grid",
    "-40% CO2",
    "Solar & Wind",
    'The "Big Push"',
    "Plan 2",
    "Net Zero 2050",
    "Vision 2030",
    "1.5C pathway",
    "Two Thirds Renewable",
    "Double Solar",
    "100%",
    "Peak Demand",
    "Renewable Share",
    "Investment",
    "3x Storage",
    "Hydro: 2,000 MW",
    "Jobs",
    "Emissions",
    "10,000 Jobs",
    "50/50",
    "2040",
    "Imports",
    "Coal Exit 2035",
    "No Coal, 60% Solar and Wind",
    "Twice as green",
    "Half & Half",
    "H2 10 GW",
    "US$ 1 billion a year",
    "solar first",
]
COUNTRIES = [
    "Zone 4",
    "Region 50 Hertz",
    "Island 5 MW",
    "Area 51%",
    "North & East",
    "Solar Islands",
    "Zone 3 MW (North)",
    "Congo, Dem. Rep.",
    "Two Rivers",
    "South-West 2",
    "D\u00e9partement 75",
]


@pytest.mark.parametrize(("field", "names"), [("scenarioName", NAMES), ("country", COUNTRIES)])
def test_no_row_is_refused_for_the_name_of_its_scenario_or_country(field: str, names: list[str]) -> None:
    scenarios = [s.model_copy(deep=True) for s in SCENARIOS[: len(names)]]
    for scenario, name in zip(scenarios, names, strict=True):
        setattr(scenario.metadata, field, name)
    each = dict.fromkeys(STAKEHOLDERS, len(names))
    rows = build(scenarios, each, seed=7, asked=len(names) * 3, enhance=len(names) * 2, voice=len(names) * 2)
    assert {getattr(row, {"scenarioName": "scenario"}.get(field, field)) for row in rows} == set(names)
    assert [(row.id, found) for row in rows if (found := problems_of(row))] == []


def test_notebook_01_takes_scenarios_with_natural_names(tiny: object, tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", "smoke")
    scenarios = sample(7, run.profile.seed)
    for scenario, name in zip(scenarios, NAMES, strict=False):
        scenario.metadata.scenarioName = name
    assert sum(prepare(run, scenarios)["rows"].values()) == 90
