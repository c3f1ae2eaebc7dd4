"""The report: self-contained, escaped, and never louder than its numbers. The figures: right titles, right marks."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from test_evaluation import GOOD, PROMPT, answer, row

from stakelib import plots
from stakelib.evaluation import Rating, compare, report, score
from stakelib.evaluation.claims import UNKNOWN, claims
from stakelib.evaluation.report import NOT_MEASURED, faults, finite, marked, seen_in_training, verdict, worst
from stakelib.run import CourseError, clock, sha256
from stakelib.scenarios import sample

HOSTILE = '<script>alert(1)</script><img src=http://evil.example/x onerror="alert(1)"> {{ 7*7 }} $x^$'
WHO = ["Grid Operators", "Public & Communities"]


def material(name: str = "Wind first") -> tuple[list[dict], list[dict]]:
    rows = [
        row(i, f"s{i // 2}", stakeholder=WHO[i % 2], scenario=name, prompt=PROMPT.replace("Wind first", name))
        for i in range(12)
    ]
    one = HOSTILE + ". Renewables reach 64.2% by 2030."
    said = [answer("" if i else one, i, "base", stopped=False) for i in range(12)]
    said += [answer(GOOD.replace("64.2%", "99.9%") if i == 3 else GOOD, i, "tuned") for i in range(12)]
    return rows, said


TRAINED = {"rows": 40, "precision": "bfloat16", "trainable_parameters": 1_000_000}
RECORD = {
    "stages": {
        "train": {
            "seconds": 61.0,
            "peak_mb": 900,
            "outputs": {"adapter": {"bytes": 2_000_000, "sha256": "ab" * 32}},
            "result": TRAINED,
        },
        "export": {"seconds": 9.0, "result": {"bytes": {"f16": 200_000_000}}},
        "voices": {"seconds": 5000.0},
        "page": {"seconds": 5000.0},  # made after the report: no part of its total
    },
    "machine": {"processor": "Intel(R) Core(TM) i7-10610U"},
    "versions": {"torch": "2.13.0"},
}


def make(
    folder: Path, name: str = "Wind first", raters: tuple = (), record: dict = RECORD, rivals: tuple = (), **more: float
) -> tuple[str, dict, pd.DataFrame]:
    run = SimpleNamespace(
        profile=SimpleNamespace(name="quick", model="tiny"), record=record, path=lambda *p: folder.joinpath(*p)
    )
    rows, said = material(name)
    said += [answer(GOOD if i % 2 else "", i, rival) for rival in rivals for i in range(12)]
    scores = score(rows, said).assign(**more)
    for rater in raters:
        one = Rating(folder / "evaluation", rows, said, rater)
        for i in one.rows:
            one.vote(i, "accuracy", "B" if one.side_a(i) == "base" else "A")
    guide = [{"prompt": HOSTILE, "base": HOSTILE, "tuned": GOOD}]
    page = report(run, scores, compare(scores), rows, said, guide).read_text(encoding="utf-8")
    return page, json.loads((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8")), scores


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))


def test_every_rival_stands_beside_the_tuned_model_with_its_interval(tmp_path: Path) -> None:
    page, facts, _ = make(tmp_path, rivals=("prompted", "tuned-q4"))
    told = facts["rivals"]["prompted"]["has_sections"]
    assert told["prompted"] == 0.5 and 0 < told["prompted_low"] < 0.5 < told["prompted_high"] < 1
    table = page.split('aria-label="Table of further rivals')[1].split("</table>")[0]
    low, high = (f"{100 * told[f'prompted_{end}']:.0f}" for end in ("low", "high"))
    assert f">50<small>[{low}, {high}]<br>{told['verdict']}</small>" in table
    assert "Base model, better prompt</th>" in table and "Tuned model, 4 bits</th>" in table
    assert "Table of further rivals" not in make(tmp_path / "none")[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict, pd.DataFrame]:
    return make(tmp_path_factory.mktemp("run"), HOSTILE, ("Ada", "Ben"))


def test_the_map_of_cells_counts_and_copes_with_own_scenarios() -> None:
    scenarios = sample(30, seed=1)
    assert plots.cells(scenarios).alt.startswith("30 scenarios fill ")
    assert "not sampled" in plots.cells([s.model_validate(s.model_dump()) for s in scenarios]).alt
    assert "solarPV" in plots.fleet(scenarios[0]).alt


def test_hostile_names_do_nothing(made: tuple) -> None:
    tags = Tags(made[0]).seen
    assert not {"script", "iframe", "object", "embed"} & {t for t, _ in tags}
    assert not [a for _, attrs in tags for a in attrs if a.startswith("on")]
    assert "&lt;script&gt;alert(1)" in made[0] and "{{ 7*7 }}" in made[0]


def test_nothing_is_loaded_from_anywhere(made: tuple) -> None:
    loads = [
        v
        for _, attrs in Tags(made[0]).seen
        for k, v in attrs.items()
        if k in ("src", "srcset", "data", "action", "poster")
    ]
    links = [attrs["href"] for _, attrs in Tags(made[0]).seen if "href" in attrs]
    assert len(loads) == 2 and all(v.startswith("data:image/svg+xml;base64,") for v in loads)
    assert all(v.startswith("#") for v in links) and "url(" not in made[0] and "@import" not in made[0]


def test_the_page_is_accessible(made: tuple) -> None:
    tags = Tags(made[0]).seen
    assert ("html", {"lang": "en"}) in tags
    levels = [int(t[1]) for t, _ in tags if re.fullmatch("h[1-6]", t)]
    assert (
        levels[0] == 1
        and levels.count(1) == 1
        and all(b - a <= 1 for a, b in zip(levels[:40], levels[1:40], strict=False))
    )
    assert all(len(attrs.get("alt", "")) > 30 for t, attrs in tags if t == "img")
    assert sum(t == "caption" for t, _ in tags) == sum(t == "table" for t, _ in tags) == 4
    assert {attrs.get("scope") for t, attrs in tags if t == "th"} == {"col", "row"}
    assert "@media print" in made[0]
    ids = {attrs["id"] for _, attrs in tags if "id" in attrs}
    assert {attrs["href"][1:] for _, attrs in tags if "href" in attrs} <= ids


def test_every_stakeholder_is_shown_and_misses_are_marked(made: tuple) -> None:
    assert all(
        name in made[0] for name in ("Grid Operators", "Public &amp; Communities", "Test prompt 1", "99.9%</mark>")
    )
    assert "<mark" in made[0] and "(empty answer)" in made[0]


def test_the_json_holds_the_figures_and_only_finite_ones(made: tuple) -> None:
    facts, scores = made[1], made[2]
    assert json.dumps(facts, allow_nan=False)
    line = {c["measure"]: c for c in facts["comparison"]}
    tuned = scores[scores["system"] == "tuned"]
    assert (
        line["grounded_share"]["tuned"] == pytest.approx(tuned["grounded_share"].mean())
        and line["words"]["p_holm"] is None
    )
    totals = {k: facts["totals"]["tuned"][k] for k in ("answers", "numbers", "grounded", "faultless")}
    assert totals == {"answers": 12, "numbers": 36, "grounded": 35, "faultless": 11}
    assert [w["row_id"] for w in facts["worst"]] == ["r3"] and "99.9" in facts["worst"][0]["faults"][0]


def test_the_verdict_says_what_the_numbers_say(made: tuple) -> None:
    facts = made[1]
    assert (
        verdict(facts) == facts["verdict"]
        and "clearly better than its base on: all five sections" in facts["verdict"][0]
    )
    dull = {**facts, "comparison": [{**c, "verdict": "cannot tell"} for c in facts["comparison"]]}
    assert "on no measure clearly better" in verdict(dull)[0] and "clearly worse on none" in verdict(dull)[0]
    assert f"{facts['prompts']} prompts" in " ".join(verdict(dull)) and "only people can say" in verdict(dull)[-1]
    assert len(facts["verdict"]) == 5
    fewer = [{**c, "n": 16 if c["measure"] == "has_sections" else c["n"]} for c in dull["comparison"]]
    said = [verdict({**dull, "comparison": lines})[3] for lines in (dull["comparison"], fewer)]
    assert ["all five sections" in text for text in said] == [True, False]
    assert "35 of 36 are as the prompt has them; of the base model's, 1 of 1" in facts["verdict"][1]
    assert "accuracy 24 against 0" in facts["verdict"][-1]
    assert "Nobody has rated" in verdict({**facts, "people": []})[-1]


def test_what_people_said_is_a_table_and_else_is_named_as_missing(made: tuple, tmp_path: Path) -> None:
    page, facts, _ = made
    assert [(p["criterion"], p["raters"], p["tuned"]) for p in facts["people"]] == [("accuracy", 2, 24)]
    assert "does it match the stakeholder&#39;s priorities?" in page and "Krippendorff" in page
    unrated, without, _ = make(tmp_path)
    assert "Nobody has rated these answers yet. Notebook 06" in unrated and without["people"] == []
    (missing,) = set(without["not_measured"]) - set(facts["not_measured"])
    assert NOT_MEASURED[missing] == "people"
    assert all("Cohen" in text and "rating_sheet" in text for text in (page, unrated))


def test_every_figure_of_the_guide_stands_beside_ours_or_reads_not_measured(made: tuple, tmp_path: Path) -> None:
    lines = {(c["about"], c["where"]): c for c in made[1]["guide"]}
    assert lines["Training, 500 examples", "i7"]["ours"] == "61 s (tiny, 40 rows, bfloat16)"
    assert lines["Training, 500 examples", "M1"]["ours"] == UNKNOWN
    assert lines["Share of the weights that is trained", "any"]["ours"] == "1.0% (tiny)"
    assert lines["Naturalness", "any"]["ours"] == UNKNOWN
    said = lines["Accuracy", "any"]["ours"]
    assert said.startswith("people (2) preferred tuned 24 times, base 0")
    assert 'check "Correctness of figures": 8% to' in said
    mac = {**RECORD, "machine": {"processor": "Apple M1"}}
    there = {(c["about"], c["where"]): c["ours"] for c in make(tmp_path, record=mac)[1]["guide"]}
    assert there["Training, 500 examples", "M1"].startswith("61 s") and there["Training, 500 examples", "i7"] == UNKNOWN
    elsewhere = [{"system": "tuned", "seconds": 9.0, "new_tokens": 99, "processor": "Intel i7"}]
    told = claims(mac, "tiny", elsewhere, [], [])
    assert {c["ours"] for c in told if c["about"].startswith("One answer")} == {UNKNOWN}
    bare = make(tmp_path / "bare", record={})[1]["guide"]
    assert all(c["ours"] == UNKNOWN for c in bare if not c["about"].startswith(("One answer", "Acc", "Spec")))
    assert all(f"<td>{c['guide'] or '–'}</td>" in made[0] for c in made[1]["guide"])


def test_times_are_told_of_the_computer_that_trained() -> None:
    """A trial elsewhere comes into the record later; its computer did not train the adapter."""
    train = {**RECORD["stages"]["train"], "result": {**TRAINED, "machine": {"processor": "Apple M1"}}}
    told = claims({**RECORD, "stages": {"train": train}}, "tiny", [], [], [])
    lines = {(c["about"], c["where"]): c["ours"] for c in told}
    assert lines["Training, 500 examples", "M1"].startswith("61 s") and lines["Training, 500 examples", "i7"] == UNKNOWN


def test_no_figure_of_the_guides_tables_is_left_out(made: tuple) -> None:
    said = " ".join(c["guide"] for c in made[1]["guide"])
    tables = "15-30 min|60-120 min|3-4x|4-6 GB|8-12 GB|6-8 GB|12-16 GB|0.5-1.5 s|0.3-0.8 s|2-4 s|2-4 h|30-60 min|1-2 h"
    for figure in f"{tables}|2-3 h|1-2 days|30-50 %|10-20 %|40-60 %|50-70 %|0.1 %|1/10".split("|"):
        assert figure in said
    assert "5-10 min" not in said


def test_other_systems_stand_beside_base_and_tuned(made: tuple, tmp_path: Path) -> None:
    assert "Rules, no model" not in made[0]
    profile = SimpleNamespace(name="quick", model="tiny")
    run = SimpleNamespace(profile=profile, record={}, path=lambda *p: tmp_path.joinpath(*p))
    rows, said = material()
    rows = [{**r, "completion": "what the rules say"} for r in rows]
    said += [{**answer(GOOD, i, "prompted"), "gguf": "m.gguf"} for i in range(12)]
    scores = score(rows, said)
    page = report(run, scores, compare(scores[scores["system"] != "prompted"]), rows, said).read_text(encoding="utf-8")
    assert "Base model, better prompt" in page and page.count("Rules, no model") == len(WHO)


def test_the_figures_name_what_they_are_of(tmp_path: Path) -> None:
    run = SimpleNamespace(
        profile=SimpleNamespace(name="quick", model="tiny"), record={}, path=lambda *p: tmp_path.joinpath(*p)
    )
    rows, said = material()

    def written(answers: list[dict], rows: list[dict] = rows) -> dict[str, str]:
        scores = score(rows, answers)
        report(run, scores, compare(scores), rows, answers)
        return json.loads((tmp_path / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["sha256"]

    of = {"base": "b" * 64, "tuned": "a" * 64}
    said = [{**a, "sha256": of[a["system"]]} for a in said]
    first = written(said)
    assert {k: first[k] for k in of} == of and first["report.html"] == sha256(tmp_path / "report.html")
    assert "a" * 64 in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert written(said[::-1]) == first  # the order of asking says nothing
    other = written([{**said[0], "text": "Another text."}, *said[1:]])
    assert other["answers"] != first["answers"] and other["rows"] == first["rows"]
    asked = written(said, [{**rows[0], "prompt": rows[0]["prompt"] + " "}, *rows[1:]])
    assert asked["rows"] != first["rows"] and asked["answers"] == first["answers"]
    with pytest.raises(CourseError, match="'tuned' are of two model files"):
        written([*said[:-1], {**said[-1], "sha256": "c" * 64}])
    assert "tuned" not in written([{k: v for k, v in a.items() if k != "sha256"} for a in said])


def test_a_report_needs_both_systems(tmp_path: Path) -> None:
    run = SimpleNamespace(
        profile=SimpleNamespace(name="quick", model="tiny"), record={}, path=lambda *p: tmp_path.joinpath(*p)
    )
    rows, said = material()
    for some, lacking in (([], ["base", "tuned"]), (said[:12], ["tuned"]), (said[12:], ["base"])):
        scores = score(rows, some) if some else pd.DataFrame()
        with pytest.raises(CourseError) as problem:
            report(run, scores, pd.DataFrame(), rows, some)
        assert problem.value.problems == [f"no answers of '{system}'" for system in lacking]
        with pytest.raises(CourseError, match="no answers"):
            compare(score(rows, some))
    with pytest.raises(CourseError, match="no answers"):
        score([], [])
    assert not list(tmp_path.iterdir())


def test_answers_that_all_failed_make_a_report_that_says_so(tmp_path: Path) -> None:
    run = SimpleNamespace(
        profile=SimpleNamespace(name="quick", model="tiny"), record={}, path=lambda *p: tmp_path.joinpath(*p)
    )
    rows, _ = material()
    said = [answer("", i, system, stopped=False) for system in ("base", "tuned") for i in range(12)]
    scores = score(rows, said)
    page = report(run, scores, compare(scores), rows, said).read_text(encoding="utf-8")
    facts = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    assert facts["totals"]["tuned"]["faultless"] == 0 and "wrote no figure" in facts["verdict"][1]
    assert "0 of 0" not in page and "passes every bar" not in page and len(facts["worst"]) == 10


@pytest.mark.parametrize("seen", [0, 2, None])
def test_whether_training_saw_the_scenarios_is_counted(tmp_path: Path, seen: int | None) -> None:
    rows = [{"scenario_id": f"s{i}", "prompt": "p", "completion": "c"} for i in range(2)]
    (tmp_path / "training_data").mkdir(parents=True)
    for part in ("train", "valid"):
        lines = [{**r, "scenario_id": r["scenario_id"] if seen else "other"} for r in rows]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "training_data" / f"{part}.jsonl").write_text(text, encoding="utf-8")
    inputs = {f"training_data/{p}.jsonl": sha256(tmp_path / "training_data" / f"{p}.jsonl") for p in ("train", "valid")}
    record = {"stages": {"train": {"inputs": inputs}}} if seen is not None else {}  # of other rows than lie there now
    run = SimpleNamespace(record=record, path=lambda *p: tmp_path.joinpath(*p))
    assert seen_in_training(run, rows) == seen


def test_the_page_says_what_training_saw_only_where_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seen, words in ((0, "the model never trained on"), (3, ", 3 of which the model was trained on"), (None, "")):
        monkeypatch.setattr(sys.modules["stakelib.evaluation.report"], "seen_in_training", lambda *_, n=seen: n)
        page = make(tmp_path / str(seen))[0]
        assert ("trained on" in page.split("</header>")[0]) == bool(words) and words in page


def test_the_same_report_twice_is_the_same_file(tmp_path: Path) -> None:
    assert make(tmp_path / "a")[0] == make(tmp_path / "b")[0] != make(tmp_path / "c", "Sun first")[0]


def test_worst_puts_empty_answers_first_and_leaves_good_ones_out() -> None:
    scores = score([row(i) for i in range(3)], [answer(GOOD, 0), answer(GOOD.replace("64.2%", "9%"), 1), answer("", 2)])
    assert [w["row_id"] for w in worst(scores)] == ["r2", "r1"]
    assert (
        faults(scores.to_dict("records")[0]) == [] and faults(scores.to_dict("records")[2])[0] == "the answer is empty"
    )


def test_a_strange_voice_and_an_echo_are_faults() -> None:
    (line,) = score([row()], [answer(GOOD)]).assign(heard="finance").to_dict("records")
    assert faults(line) == ["sounds like finance"] and faults({**line, "heard": line["stakeholder_id"]}) == []
    (echo,) = score([row()], [answer(GOOD + "\nScenario: Kenya")]).to_dict("records")
    assert "holds an echo, for which the tool throws it away" in faults(echo)


def test_each_figure_that_is_there_takes_its_own_line_from_what_is_missing(tmp_path: Path) -> None:
    page, facts, _ = make(tmp_path)
    named = {name for name in NOT_MEASURED.values() if name}
    absent = {NOT_MEASURED[text] for text in facts["not_measured"]} - {""}
    assert {"people", "identity", "consistency", "perplexity", "tuned-q4", "prompted"} <= absent < named
    assert "Under the bar for a workshop:</strong> " in page
    assert any("not measured" in problem for problem in facts["below_bar"])
    for name in ("consistency", "perplexity"):
        (tmp_path / name).mkdir()
        _, more, _ = make(tmp_path / name, **{name: 0.5})
        assert [NOT_MEASURED[t] for t in facts["not_measured"] if t not in more["not_measured"]] == [name]


def test_marked_pieces_join_to_the_answer() -> None:
    text = GOOD.replace("64.2%", "9%")
    pieces = marked(score([row()], [answer(text)]), {("r0", "tuned"): text}, "r0", "tuned")
    assert "".join(p for p, _ in pieces) == text and [p for p, why in pieces if why] == ["9%"]


def test_finite_turns_unknown_into_none() -> None:
    assert finite({"a": [float("nan"), float("inf"), 1.5], "b": (pd.Series([2]).iloc[0],)}) == {
        "a": [None, None, 1.5],
        "b": [2],
    }


# ---- figures


def test_figure_titles_state_the_finding() -> None:
    history = {"train_loss": [[5, 1.4]], "valid_loss": [[0, 3.0], [5, 1.2], [9, 1.5]]}
    assert "from 3.00 to 1.20" in plots.loss_curve(history).alt and "step 5" in plots.loss_curve(history).alt
    alt = plots.trend({50: 2.0, 100: 1.5, 200: 1.75}, "rows").alt
    assert "1.50, with rows 100" in alt and "200: 1.75" in alt
    assert (
        "All 3 rows fit" in plots.lengths([10, 20, 90], 100).alt
        and "1 of 3 rows" in plots.lengths([10, 20, 190], 100).alt
    )
    rows = [{"stakeholder": s, "split": p} for s in WHO for p in ("train", "test")]
    assert (
        "every stakeholder in every split" in plots.coverage(rows).alt
        and "1 empty cells" in plots.coverage(rows[:3]).alt
    )
    assert "q8 is 50% of f16" in plots.sizes({"f16": 2_000_000, "q8": 1_000_000}).alt


def test_figures_draw_and_are_png() -> None:
    milestones = [
        SimpleNamespace(year=2030 + 10 * i, reShare=s, emissions=SimpleNamespace(total=1.0 + i))
        for i, s in enumerate((60, None))
    ]
    scenario = SimpleNamespace(metadata=SimpleNamespace(country="A $1$ B", scenarioName=HOSTILE), milestones=milestones)
    for chart in (plots.emissions_and_share(scenario), plots.loss_curve({}), plots.sizes({"a": 5})):
        assert chart._repr_png_().startswith(b"\x89PNG")


def test_tokens_html_escapes_and_marks_only_trained_tokens() -> None:
    shown = plots.tokens_html(["<b>", "Hi", "\n"], [0, 1, 1])
    assert "<b>" not in shown and "&lt;b&gt;" in shown and shown.count("#cfeadf") == 2 and "2 of 3 tokens" in shown
    with pytest.raises(ValueError):
        plots.tokens_html(["a"], [1, 0])


def test_the_total_holds_what_came_before_the_report_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path)
    lines = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))["guide"]
    assert next(c["ours"] for c in lines if c["about"].startswith("The computer's time")) == clock(61 + 9)
