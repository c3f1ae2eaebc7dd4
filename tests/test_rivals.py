"""Rivals of the tuned model, prompts of profile report, bars, two runs, raters: who is asked what, and what follows."""

from __future__ import annotations

from dataclasses import replace
from math import log
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from test_evaluation import GOOD, answer, row, scored

from stakelib.dialogues import build, split
from stakelib.dialogues.files import write_rows
from stakelib.evaluation import MEASURES, ask, asking, compare, compare_runs, gate, general, held_out, score
from stakelib.evaluation.asking import prompted, report_prompts, reworded, texts
from stakelib.models import Rendered, bits_per_byte
from stakelib.run import PROFILES, CourseError
from stakelib.scenarios import sample
from stakelib.voices import STAKEHOLDERS


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run folder with training rows of ten scenarios, and no model."""
    folder = tmp_path_factory.mktemp("rivals")
    (folder / "training_data").mkdir()
    rows = split(build(sample(10, seed=7), dict.fromkeys(STAKEHOLDERS, 10), seed=7), seed=7)
    for part in ("train", "valid", "test"):
        write_rows([r for r in rows if r.split == part], folder / "training_data" / f"{part}.jsonl")
    return SimpleNamespace(folder=folder, path=lambda *p: folder.joinpath(*p), profile=PROFILES["smoke"], rows=rows)


@pytest.fixture
def asked(run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What `ask` hands on to the engine, not an engine; answers are GOOD, two general words before it, one behind."""
    calls: list[dict] = []

    def answers(_: object, system: str, gguf: Path, rows: list[dict], **settings: object) -> list[dict]:
        calls.append({"system": system, "gguf": str(gguf), "rows": rows, **settings})
        return [{**answer(f"Paris twelve\n{GOOD} Africa"), "row_id": r["id"], "system": system} for r in rows]

    monkeypatch.setattr(asking, "answers", answers)
    monkeypatch.setattr(asking, "base_model", lambda name: SimpleNamespace(folder=Path("base"), short_name=name))
    monkeypatch.setattr(asking, "ensure_base_gguf", lambda base: {q: f"base-{q}.gguf" for q in ("f16", "q8", "q4")})
    monkeypatch.setattr(asking, "gguf_file", lambda run, q: f"tuned-{q}.gguf")
    monkeypatch.setattr(asking, "check_exported", lambda run: None)
    return calls


@pytest.mark.parametrize(
    ("system", "bits", "label", "file"),
    [
        ("base", "q8", "base", "base-q8.gguf"),
        ("prompted", "q8", "prompted", "base-q8.gguf"),
        ("tuned", "q8", "tuned", "tuned-q8.gguf"),
        ("tuned-q4", "q8", "tuned-q4", "tuned-q4.gguf"),
        ("tuned", "q4", "tuned-q4", "tuned-q4.gguf"),
    ],
)
def test_each_system_asks_its_own_file(run, asked, system, bits, label, file) -> None:  # noqa: ANN001
    ask(run, system, held_out(run), bits)
    assert (asked[0]["system"], asked[0]["gguf"]) == (label, file) and "temperature" not in asked[0]


def test_the_shipped_sampling_is_the_modelfiles(run: SimpleNamespace, asked: list[dict]) -> None:
    ask(run, "tuned", held_out(run), sampled=True, seed=3)
    assert (asked[0]["temperature"], asked[0]["top_p"], asked[0]["seed"]) == (0.7, 0.9, 3)


def test_an_unknown_system_is_refused_with_the_list(run: SimpleNamespace) -> None:
    for system in ("best", "tuned-q3"):
        with pytest.raises(CourseError, match="prompted.*q4"):
            ask(run, system, [])


def test_without_a_held_out_dialogue_there_is_nothing_to_ask(tmp_path: Path) -> None:
    (tmp_path / "training_data").mkdir()
    line = '{"prompt": "p", "completion": "c", "task": "voice", "stakeholder_id": "finance"}\n'
    (tmp_path / "training_data" / "test.jsonl").write_text(line, encoding="utf-8")
    empty = SimpleNamespace(path=lambda *p: tmp_path.joinpath(*p), profile=PROFILES["smoke"])
    with pytest.raises(CourseError, match="no full dialogue(.|\n)*notebook 01"):
        held_out(empty)


def test_rules_answer_for_nothing_and_without_a_fault(run: SimpleNamespace) -> None:
    rows = held_out(run)
    table = score(rows, ask(run, "rules", rows))
    assert len(table) == 9 and table[["has_sections", "keeps_to_data", "right_direction"]].all(axis=None)
    assert table["grounded_share"].eq(1).all() and table["seconds"].isna().all()


def test_a_prompted_base_sees_two_examples_of_training_countries_only(run: SimpleNamespace) -> None:
    rows, train = held_out(run), [r for r in run.rows if r.split == "train"]
    for plain, full in zip(rows, prompted(run, rows), strict=True):
        shown = [r for r in train if r.completion in full["prompt"]]
        assert len({r.scenario_id for r in shown}) == 2
        assert {r.stakeholder_id for r in shown} == {plain["stakeholder_id"]}
        assert full["prompt"].endswith(plain["prompt"]) and full["id"] == plain["id"]
        assert not any(r.prompt in full["prompt"] for r in run.rows if r.split == "test" and r.id != plain["id"])


def test_other_words_keep_every_line_of_data(run: SimpleNamespace) -> None:
    for plain, other in zip(held_out(run), reworded(held_out(run)), strict=True):
        data = [line for line in plain["prompt"].splitlines() if line.startswith("- ")]
        assert other["prompt"] != plain["prompt"] and other["prompt"].count(plain["stakeholder"]) == 1
        assert data == [line for line in other["prompt"].splitlines() if line.startswith("- ")] and len(data) > 4


def test_report_asks_forty_unseen_scenarios_of_test_countries(run: SimpleNamespace) -> None:
    rows = report_prompts(run)
    seen = {r.country for r in run.rows if r.split != "test"}
    assert len(rows) == 360 == PROFILES["report"].test_prompts and len({r["id"] for r in rows}) == 360
    assert len({r["scenario_id"] for r in rows}) == 40 and {r["split"] for r in rows} == {"test"}
    assert not {r["country"] for r in rows} & seen
    assert not {r["scenario_id"] for r in rows} & {r.scenario_id for r in run.rows}
    assert len({r["stakeholder"] for r in rows[:9]}) == 9
    other = SimpleNamespace(**{**vars(run), "profile": replace(run.profile, seed=8)})
    assert report_prompts(run, 2) == report_prompts(run, 2) != report_prompts(other, 2)


def test_report_prompts_need_a_country_of_their_own(run: SimpleNamespace, tmp_path: Path) -> None:
    for part in ("train", "valid", "test"):
        write_rows([r for r in run.rows if r.split == "train"], tmp_path / "training_data" / f"{part}.jsonl")
    with pytest.raises(CourseError, match="no country of its own"):
        report_prompts(SimpleNamespace(**{**vars(run), "path": lambda *p: tmp_path.joinpath(*p)}))


def test_general_questions_are_sixteen_and_match_whole_words(run: SimpleNamespace, asked: list[dict]) -> None:
    table = general(run, "tuned")
    assert len(table) == 16 == len(texts()["general"])
    assert table.loc[table["knows"], "question"].str.contains("France|7 plus 5").all() and table["knows"].sum() == 2
    both = pd.concat([table.assign(system="base", knows=True), table])
    assert compare(both, ["knows"]).iloc[0]["verdict"] == "worse"


# ---- any pair, bars, two runs


def test_any_pair_can_be_compared_and_columns_carry_its_names() -> None:
    three = pd.concat(
        [
            scored([False] * 40, [True] * 40),
            scored([True] * 40, [True] * 40).query("system == 'tuned'").assign(system="rules"),
        ]
    )
    line = compare(three, ["has_sections"], ("rules", "base")).iloc[0]
    assert (line["rules"], line["base"], line["verdict"]) == (1, 0, "worse")
    with pytest.raises(CourseError, match="'prompted'"):
        compare(three, ["has_sections"], ("prompted", "tuned"))


def test_bars_list_every_measure_below_and_pass_a_good_model() -> None:
    unheard = score([row(i) for i in range(3)], [answer(GOOD, i) for i in range(3)])
    with pytest.raises(CourseError, match="like the stakeholder: not measured, wanted at least 80%") as refused:
        gate(unheard)
    assert len(refused.value.problems) == 1
    good = unheard.assign(identity=True)
    table = gate(good).set_index("measure")
    for name, bar in table["bar"].items():
        step = 0.01 if MEASURES[name].direction == "higher" else -0.01
        assert len(gate(good.assign(**{name: bar + step / 10}))) == 11
        with pytest.raises(CourseError) as refused:
            gate(good.assign(**{name: bar - step}))
        assert [p.split(":")[0] for p in refused.value.problems] == [MEASURES[name].label]
    assert len(table) == 11 and "wanted at most 10%" in str(refused.value)
    with pytest.raises(CourseError, match="no answers"):
        gate(good, "base")


def test_two_runs_are_compared_on_the_rows_they_share(run: SimpleNamespace, asked: list[dict], tmp_path: Path) -> None:
    other = SimpleNamespace(**{**vars(run), "folder": tmp_path})
    table = compare_runs(run, other, ["has_sections"])
    assert table.iloc[0]["n"] == 9 and {run.folder.name, tmp_path.name} <= set(table.columns)
    (tmp_path / "training_data").mkdir()
    strange = [r.model_copy(update={"prompt": r.prompt + " x"}) for r in run.rows if r.split == "test"]
    write_rows(strange, tmp_path / "training_data" / "test.jsonl")
    with pytest.raises(CourseError, match="no held-out row in common"):
        compare_runs(run, SimpleNamespace(**{**vars(other), "path": lambda *p: tmp_path.joinpath(*p)}))


# ---- raters


# ---- bits per byte, and intervals of a difference


def test_bits_per_byte_by_hand() -> None:
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "é" * len(ids))  # two bytes a token
    rows = [Rendered([1, 2, 3], [0, 1, 1]), Rendered([4, 5], [0, 1])]
    assert bits_per_byte(log(2), rows, tokenizer) == pytest.approx(0.5)
    assert bits_per_byte(2 * log(2), rows, tokenizer) == pytest.approx(1.0)


@pytest.mark.parametrize(("first", "second"), [(0.5, 0.9), (0.9, 0.98)])
def test_the_interval_of_a_difference_covers_it(first: float, second: float, many_worlds: None) -> None:
    rng, hits, worlds = np.random.default_rng(4), 0, 200
    for _ in range(worlds):
        luck = [rng.beta(rate * 6, (1 - rate) * 6, (20, 1)) for rate in (first, second)]
        values = [(rng.random((20, 6)) < chance).ravel().tolist() for chance in luck]
        line = compare(scored(*values, per_scenario=6), ["has_sections"]).iloc[0]
        hits += line["difference_low"] <= second - first <= line["difference_high"]
    assert hits / worlds >= 0.93
