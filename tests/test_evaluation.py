"""Answers, measures and statistics of stage evaluation: planted errors are found, failures count, intervals hold."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from stakelib.evaluation import MEASURES, answers, by_stakeholder, compare, score, smallest_visible_difference, wilson
from stakelib.evaluation.measures import HEADINGS, copied, repeated, score_answer, sections
from stakelib.evaluation.statistics import JUDGED, clustered_means, clustered_wilson, newcombe
from stakelib.run import CourseError

PROMPT = """You are simulating a Grid Operators stakeholder reviewing an energy scenario.

**Scenario Context**:
- Country: Kenya
- Scenario: Wind first
- Renewable Share 2030: 64.2%
- Renewable Share 2040: 82.1%
- Peak Demand: 1,450 MW (2030)
- Storage: 120 MW (2030)
- Investment: $2,850M USD by 2030

**Stakeholder Priorities**: Grid stability, Reserve margins, Storage

Respond as this stakeholder would, addressing their concerns and interests."""

GOOD = """**Initial Reaction**: A renewable share of 64.2% in 2030 asks a lot of our control room.

**Appreciates**:
- Storage of 120 MW by 2030 gives us something to balance with.
- The share climbs in steps that we can plan for.

**Concerns**:
- [high] Peak demand of 1,450 MW in 2030 leaves storage thin: reserves come first.
- [medium] Ramping: evenings need flexible plant.

**Questions**:
- Who pays for reserves?
- Which lines are reinforced first?
- How are outages shared?

**Engagement Tips**:
- Bring hourly profiles.
- Invite the dispatch engineers early."""


def row(i: int = 0, scenario_id: str = "s0", prompt: str = PROMPT, **more: str) -> dict:
    return {
        "id": f"r{i}",
        "prompt": prompt,
        "scenario_id": scenario_id,
        "scenario": "Wind first",
        "country": "Kenya",
        "stakeholder_id": "grid-operators",
        "stakeholder": "Grid Operators",
        **more,
    }


def answer(text: str, i: int = 0, system: str = "tuned", stopped: bool = True, seconds: float = 2.0) -> dict:
    return {
        "row_id": f"r{i}",
        "system": system,
        "gguf": "m.gguf",
        "text": text,
        "stopped": stopped,
        "new_tokens": len(text.split()),
        "prompt_tokens": 9,
        "seconds": seconds,
    }


def measured(text: str, **more: bool) -> dict:
    return score_answer(row(), answer(text, **more))


# ---- measures: a good answer passes everything; each planted error is caught by its own measure


def test_a_good_answer_has_no_fault() -> None:
    found = measured(GOOD)
    assert [found[k] for k in ("has_sections", "items_ok", "stopped", "cites_three")] == [True] * 4
    assert (found["numbers"], found["grounded"], found["grounded_share"], found["invented"]) == (3, 3, 1.0, [])
    assert not found["copied_prompt"] and found["repeated"] < 0.05 and found["missing"] == []


def test_a_figure_in_a_name_is_none() -> None:
    named = row(prompt=PROMPT.replace("Wind first", "50% Solar Now"))
    found = score_answer(named, answer("We like 50% Solar Now."))
    assert (found["numbers"], found["grounded"], found["grounded_share"], found["cites_three"]) == (0, 0, 0.0, False)


def test_where_the_prompt_holds_one_figure_that_one_is_enough() -> None:
    thin = {**row(), "prompt": "Renewable Share 2030: 64.2%"}
    assert score_answer(thin, answer("A renewable share of 64.2% by 2030 is fine."))["cites_three"]
    assert not score_answer(thin, answer("It is fine."))["cites_three"]
    assert not score_answer({**thin, "prompt": "Country: Ghana"}, answer(" "))["cites_three"]


@pytest.mark.parametrize(("right", "wrong"), [("64.2%", "67.4%"), ("1,450 MW", "1,540 MW"), ("120 MW", "120 GWh")])
def test_a_wrong_number_or_unit_is_listed(right: str, wrong: str) -> None:
    found = measured(GOOD.replace(right, wrong))
    assert (found["grounded"], found["cites_three"], len(found["invented"])) == (2, False, 1)
    miss = found["invented"][0]
    assert wrong.split()[0].rstrip("%") in miss["text"] and miss["reason"]
    assert GOOD.replace(right, wrong)[miss["start"] : miss["end"]] == miss["text"]


def test_the_nearest_source_value_is_named() -> None:
    assert "64.2" in measured(GOOD.replace("64.2%", "65.0%"))["invented"][0]["nearest"]


def test_the_right_number_of_another_year_is_wrong() -> None:
    assert measured(GOOD.replace("64.2% in 2030", "82.1% in 2030"))["grounded"] == 2
    assert measured(GOOD.replace("64.2% in 2030", "82.1% in 2040"))["grounded"] == 3


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_missing_section_is_named(heading: str) -> None:
    found = measured(GOOD.replace(f"**{heading}**:", ""))
    assert not found["has_sections"] and found["missing"] == [heading]


def test_sections_out_of_order_twice_or_empty_fail() -> None:
    swapped = (
        GOOD.replace("**Concerns**", "**X**").replace("**Questions**", "**Concerns**").replace("**X**", "**Questions**")
    )
    assert not measured(swapped)["has_sections"]
    assert not measured(GOOD + "\n\n" + GOOD)["has_sections"]
    assert measured(GOOD.replace("- Bring hourly profiles.\n- Invite the dispatch engineers early.", ""))[
        "missing"
    ] == [HEADINGS[-1]]


def test_headings_are_read_in_three_styles_but_not_inside_prose() -> None:
    for style in ("**Concerns:** a", "## Concerns\na", "Concerns: a"):
        assert sections(style) == [("Concerns", "a")]
    assert sections("Concerns remain about cost.\nOur Questions: none") == []


def test_item_counts_have_both_ends() -> None:
    assert not measured(GOOD.replace("- How are outages shared?\n", ""))["items_ok"]
    assert not measured(GOOD.replace("- Bring hourly profiles.", "- A.\n- B.\n- Bring hourly profiles."))["items_ok"]


def test_an_empty_or_number_free_answer_is_no_success() -> None:
    for text in ("", "   ", "We like it."):
        found = measured(text)
        assert not any(found[k] for k in ("has_sections", "items_ok", "cites_three")) and found["grounded_share"] == 0
    assert not measured("")["stopped"] and measured("We like it.")["stopped"]
    assert not measured(GOOD, stopped=False)["stopped"]


def test_a_copied_prompt_is_seen_and_quoting_its_figures_is_not_copying() -> None:
    assert copied(PROMPT, PROMPT) and copied("Well. " + PROMPT.splitlines()[0] + " So.", PROMPT)
    assert copied("- Peak Demand: 1,450 MW (2030)\n- Storage: 120 MW (2030)\n- Renewable Share 2030: 64.2%", PROMPT)
    lines = [line.replace("*", "") for line in PROMPT.splitlines() if line.startswith("- ")]
    assert copied("\n".join(f"* {line[2:]}" for line in lines), PROMPT)
    assert copied("\n".join(f"{n}. {line[2:]}" for n, line in enumerate(lines, 1)), PROMPT)
    assert not copied(GOOD, PROMPT)


def test_repetition_by_hand() -> None:
    assert repeated("a b c d e f g") == 0 and repeated("too short") == 1
    assert repeated("a b c d a b c d") == pytest.approx(1 - 4 / 5)


@given(st.text(max_size=300))
def test_any_text_can_be_measured(text: str) -> None:
    found = measured(text)
    assert 0 <= found["grounded_share"] <= 1 and 0 <= found["repeated"] <= 1
    assert found["grounded"] + len(found["invented"]) == found["numbers"] and set(MEASURES) <= set(found)


def test_failures_stay_in_the_denominator() -> None:
    rows = [row(i) for i in range(4)]
    table = score(rows, [answer(GOOD, 0), answer(GOOD, 1), answer("", 2)])  # r3 was never answered
    assert len(table) == 4 and table["has_sections"].mean() == 0.5 and table["grounded_share"].mean() == 0.5
    assert pd.isna(table["tokens_per_second"]).tolist() == [False, False, False, True]


# ---- statistics


def scored(base: list[bool], tuned: list[bool], per_scenario: int = 3, measure: str = "has_sections") -> pd.DataFrame:
    lines = [
        {
            "row_id": f"r{i}",
            "scenario_id": f"s{i // per_scenario}",
            "stakeholder": "Grid Operators",
            "system": s,
            measure: v,
        }
        for s, values in (("base", base), ("tuned", tuned))
        for i, v in enumerate(values)
    ]
    return pd.DataFrame(lines)


def test_wilson_against_a_worked_example_and_its_ends() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert (
        wilson(0, 20)[0] == 0
        and wilson(20, 20)[1] == pytest.approx(1)
        and wilson(20, 20)[0] < 0.9
        and wilson(0, 0) == (0, 1)
    )


def test_mcnemar_is_exact_and_paired() -> None:
    base, tuned = [False] * 8 + [True] * 22, [True] * 8 + [True] * 20 + [False] * 2
    line = compare(scored(base, tuned, 1), ["has_sections"]).iloc[0]
    assert line["p"] == pytest.approx(2 * sum((1, 10, 45)) / 2**10)  # 8 against 2 discordant pairs, two-sided
    assert line["difference"] == pytest.approx(0.2) and line["verdict"] == "cannot tell"


def test_verdicts_follow_direction_and_need_both_test_and_interval() -> None:
    none, all_ = [False] * 45, [True] * 45
    assert compare(scored(none, all_), ["has_sections"]).iloc[0]["verdict"] == "better"
    assert compare(scored(all_, none), ["has_sections"]).iloc[0]["verdict"] == "worse"
    assert compare(scored(none, all_, measure="copied_prompt"), ["copied_prompt"]).iloc[0]["verdict"] == "worse"
    assert compare(scored(all_, all_), ["has_sections"]).iloc[0]["verdict"] == "cannot tell"
    assert compare(scored(none, all_, measure="words"), ["words"]).iloc[0]["verdict"] == "not judged"


def test_one_scenario_cannot_decide_a_share() -> None:
    low, high = np.random.default_rng(1).uniform(0, 0.2, 30), np.random.default_rng(2).uniform(0.8, 1, 30)
    one = compare(scored(low, high, 30, "grounded_share"), ["grounded_share"]).iloc[0]
    many = compare(scored(low, high, 3, "grounded_share"), ["grounded_share"]).iloc[0]
    assert one["verdict"] == "cannot tell" and many["verdict"] == "better"


def test_holm_makes_p_larger_with_more_measures() -> None:
    base, tuned = [False] * 7 + [True] * 30, [True] * 37
    alone = compare(scored(base, tuned), ["has_sections"]).iloc[0]
    table = scored(base, tuned).assign(items_ok=True, stopped=True, copied_prompt=False)
    among = compare(table, ["has_sections", "items_ok", "stopped", "copied_prompt"]).iloc[0]
    assert alone["p_holm"] == alone["p"] and among["p_holm"] == pytest.approx(4 * alone["p"])


def test_certain_results_still_have_width() -> None:
    line = compare(scored([False] * 45, [True] * 45), ["has_sections"]).iloc[0]
    assert line["tuned_low"] < 0.95 and line["base_high"] > 0.05 and line["difference_low"] < 0.95
    low, high = newcombe(np.zeros(45), np.ones(45), np.arange(45))
    assert 0.8 < low < 1 and high == pytest.approx(1)


def coverage(interval, rate: float, groups: int = 40, worlds: int = 400) -> float:  # noqa: ANN001
    """Share of worlds whose interval holds `rate`; in each, `groups` scenarios x 9 answers share a scenario's luck."""
    rng, hits = np.random.default_rng(11), 0
    for _ in range(worlds):
        luck = rng.beta(rate * 4, (1 - rate) * 4, groups)
        values = (rng.random((groups, 9)) < luck[:, None]).ravel().astype(float)
        low, high = interval(values, np.repeat(np.arange(groups), 9))
        hits += low <= rate <= high
    return hits / worlds


@pytest.mark.parametrize(
    ("rate", "groups"), [(0.5, 40), (0.9, 40), (0.98, 40), (0.5, 5), (0.9, 5), (0.9, 11), (0.98, 11)]
)
def test_intervals_cover_the_truth_for_clustered_answers(rate: float, groups: int) -> None:
    assert coverage(clustered_wilson, rate, groups) >= 0.93


def test_intervals_blind_to_scenarios_would_not_cover() -> None:
    """The twin: Wilson alone misses the truth far too often in the same worlds."""
    assert coverage(lambda v, _: wilson(int(v.sum()), len(v)), 0.5) < 0.9


def bootstrap(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    return tuple(np.quantile(clustered_means(values[:, None], clusters), [0.025, 0.975]))


def test_bootstrap_means_cover_too_but_not_near_one() -> None:
    """Numbers without bounds have it; for shares near 1 it has next to no width, so they have score intervals."""
    assert coverage(bootstrap, 0.5, 12, 300) >= 0.92
    assert coverage(bootstrap, 0.98, 12, 300) < 0.85


@pytest.mark.parametrize(("rate", "groups"), [(r, g) for r in (0.5, 0.9, 0.98, 0.99) for g in (12, 40)])
def test_intervals_of_shares_cover_the_truth(rate: float, groups: int) -> None:
    """Each answer a share of its 1 to 9 figures, the luck shared by a scenario's four answers, 300 worlds."""
    rng, hits, rows = np.random.default_rng(12), 0, np.repeat(np.arange(groups), 4)
    for _ in range(300):
        luck = rng.beta(rate * 6, (1 - rate) * 6, groups)[rows]
        figures = rng.integers(1, 10, len(rows))
        values = rng.binomial(figures, luck) / figures
        low, high = clustered_wilson(values, rows)
        hits += low <= rate <= high
    assert hits / 300 >= 0.93


def test_no_difference_is_rarely_called_one(many_worlds: None) -> None:
    """11 scenarios x 4 prompts, luck per scenario shared by base and tuned or each its own: 1 wrong verdict in 20."""
    rng, wrong = np.random.default_rng(5), 0
    for world in range(60):
        lucks = [rng.beta(2, 2, 11)[:, None] for _ in range(2)]
        base, tuned = ((rng.random((11, 4)) < lucks[i * (world % 2)]).ravel().tolist() for i in range(2))
        wrong += compare(scored(base, tuned, 4), ["has_sections"]).iloc[0]["verdict"] != "cannot tell"
    assert wrong <= 3


def test_many_measures_and_shared_luck_hardly_ever_make_a_difference() -> None:
    """40 scenarios x 9 prompts, nine yes/no measures, luck per scenario and system: 1 world in 20 has any verdict."""
    rng, names = np.random.default_rng(6), [k for k, m in MEASURES.items() if m.kind == "yes/no"][:9]
    wrong = alone = 0
    for _ in range(40):
        values = (rng.random((2, 40, 9, 9)) < rng.beta(2, 2, (2, 40, 1, 9))).reshape(2, 360, 9)
        table = scored([False] * 360, [False] * 360, 9).drop(columns="has_sections")
        found = compare(table.assign(**dict(zip(names, values.reshape(720, 9).T, strict=True))), names)
        wrong += (found["verdict"] != "cannot tell").any()
        alone += any(
            binomtest(int(up), int(up + down)).pvalue < 0.05 / 9
            for up, down in zip((values[1] & ~values[0]).sum(0), (values[0] & ~values[1]).sum(0), strict=True)
        )
    assert len(names) == 9 and wrong <= 5 < alone, (wrong, alone)  # the twin: McNemar alone, after Holm


def test_smallest_visible_difference_shrinks_and_matches_simulation() -> None:
    assert smallest_visible_difference(20) > smallest_visible_difference(45) > smallest_visible_difference(400) > 0.05
    assert smallest_visible_difference(4) == 1.0
    assert smallest_visible_difference(45, tests=1) < smallest_visible_difference(45)  # what the correction costs
    rng = np.random.default_rng(3)
    for tests in (1, JUDGED):
        d, seen = smallest_visible_difference(100, tests=tests), 0
        for _ in range(200):
            kind = rng.choice(3, size=100, p=[(0.3 + d) / 2, (0.3 - d) / 2, 0.7])
            ups, downs = (kind == 0).sum(), (kind == 1).sum()
            seen += binomtest(int(ups), int(ups + downs)).pvalue < 0.05 / tests  # what exact McNemar is, after Holm
        assert 0.65 < seen / 200 < 0.9


def test_compare_names_the_system_that_has_no_answers() -> None:
    alone = scored([True] * 4, [True] * 4).query("system == 'tuned'")
    with pytest.raises(CourseError, match="'base'"):
        compare(alone)
    with pytest.raises(CourseError, match="no row has perplexity"):
        compare(scored([True], [True]).assign(perplexity=float("nan")), ["perplexity"])


def test_by_stakeholder_counts_each_system() -> None:
    table = by_stakeholder(scored([False, True], [True, True], 1), ["has_sections"]).set_index("system")
    assert table.loc["base", "value"] == 0.5 and table.loc["tuned", "value"] == 1 and table.loc["tuned", "low"] < 0.5


# ---- answers: cached, in order, resumable


class FakeEngine:
    """Answers in reverse order, as a batch might; dies after `dies_after` answers; `asked` counts all prompts."""

    def __init__(self, dies_after: int | None = None) -> None:
        self.dies_after, self.asked = dies_after, 0

    def __call__(self, path: Path) -> FakeEngine:
        return self

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, prompts: list[str], *, max_new_tokens: int, temperature: float, seed: int):  # noqa: ANN201
        for count, i in enumerate(reversed(range(len(prompts)))):
            if count == self.dies_after:
                raise KeyboardInterrupt
            self.asked += 1
            yield i, SimpleNamespace(text=f"re: {prompts[i]}", stopped=True, new_tokens=3, prompt_tokens=5, seconds=0.1)


@pytest.fixture
def run(tmp_path: Path) -> SimpleNamespace:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "m.gguf").write_bytes(b"weights")
    return SimpleNamespace(path=lambda *parts: tmp_path.joinpath(*parts))


def ask(run: SimpleNamespace, engine: FakeEngine, rows: list[dict], **more: int) -> list[dict]:
    return answers(run, "tuned", run.path("m.gguf"), rows, engine_factory=engine, progress=lambda _: None, **more)


def test_answers_come_in_row_order_and_are_not_asked_twice(run: SimpleNamespace) -> None:
    rows, engine = [row(i, prompt=f"p{i}") for i in range(5)], FakeEngine()
    first = ask(run, engine, rows)
    assert [a["text"] for a in first] == [f"re: p{i}" for i in range(5)] and [a["row_id"] for a in first] == [
        r["id"] for r in rows
    ]
    assert ask(run, engine, rows[::-1]) == first[::-1] and engine.asked == 5


def test_other_settings_prompts_weights_or_engines_are_asked_afresh(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, engine = [row(i, prompt=f"p{i}") for i in range(2)], FakeEngine()
    ask(run, engine, rows)
    ask(run, engine, rows, max_new_tokens=9)
    assert engine.asked == 4
    run.path("m.gguf").write_bytes(b"other weights")
    ask(run, engine, rows)
    assert engine.asked == 6
    ask(run, engine, [*rows, row(7, prompt="new")])
    assert engine.asked == 7
    monkeypatch.setattr(sys.modules["stakelib.evaluation.answers"], "version", lambda _: "another engine")
    ask(run, engine, rows)
    assert engine.asked == 9


def test_a_killed_run_asks_only_what_is_missing(run: SimpleNamespace) -> None:
    rows, dying, next_one = [row(i, prompt=f"p{i}") for i in range(6)], FakeEngine(dies_after=4), FakeEngine()
    with pytest.raises(KeyboardInterrupt):
        ask(run, dying, rows)
    file = run.path("evaluation", "answers-tuned.jsonl")
    assert len(file.read_text(encoding="utf-8").splitlines()) == 4
    with file.open("a", encoding="utf-8") as out:
        out.write('{"row_id": "r0", "key": "to')  # the line that the kill cut
    found = ask(run, next_one, rows)
    assert next_one.asked == 2 and [a["text"] for a in found] == [f"re: p{i}" for i in range(6)]
    assert len([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]) == 6


def test_equal_prompts_are_asked_once_and_a_lost_answer_is_an_error(run: SimpleNamespace) -> None:
    engine = FakeEngine()
    found = ask(run, engine, [row(0), row(1)])
    assert engine.asked == 1 and [a["row_id"] for a in found] == ["r0", "r1"]
    engine.ask = lambda prompts, **_: iter(())
    with pytest.raises(CourseError, match="r9"):
        ask(run, engine, [row(9, prompt="never answered")])


def test_damage_in_the_middle_is_reported_not_skipped(run: SimpleNamespace) -> None:
    ask(run, FakeEngine(), [row(0, prompt="a"), row(1, prompt="b")])
    file = run.path("evaluation", "answers-tuned.jsonl")
    file.write_text("rubbish\n" + file.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(CourseError, match="line 1"):
        ask(run, FakeEngine(), [row(0, prompt="a")])
    file.write_bytes(b'{"key": "\xff"}\n' + file.read_bytes())
    with pytest.raises(CourseError) as problem:
        ask(run, FakeEngine(), [row(0, prompt="a")])
    assert [p.split(" is")[0] for p in problem.value.problems] == [f"{file.name} line {n}" for n in (1, 2)]


def test_answers_of_another_tokenizer_or_template_are_asked_afresh(run: SimpleNamespace, tmp_path: Path) -> None:
    rows, engine, base = [row(0, prompt="p")], FakeEngine(), tmp_path / "base"
    base.mkdir()
    for name, text in (("tokenizer.json", "{}"), ("chat_template.jinja", "a"), ("chat_template.jinja", "b")):
        (base / name).write_text(text, encoding="utf-8")
        for _ in range(2):
            ask(run, engine, rows, tokenizer=base)
    assert engine.asked == 3
    base.rename(tmp_path / "moved")  # a run that went to another computer
    ask(run, engine, rows, tokenizer=tmp_path / "moved")
    assert engine.asked == 3


def test_times_of_another_computer_do_not_count_where_time_is_asked_for(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, times = FakeEngine(), FakeEngine()
    for computer in ("i7", "M1", "i7"):
        monkeypatch.setattr(sys.modules["stakelib.evaluation.answers"], "describe", lambda c=computer: {"processor": c})
        ask(run, texts, [row(0)])
        ask(run, times, [row(0)], timed=True)
    assert (texts.asked, times.asked) == (1, 2)


def test_each_answer_names_the_file_that_gave_it(run: SimpleNamespace) -> None:
    def digest() -> str:
        return hashlib.sha256(run.path("m.gguf").read_bytes()).hexdigest()

    rows = [row(i, prompt=f"p{i}") for i in range(2)]
    assert {(a["gguf"], a["sha256"]) for a in ask(run, FakeEngine(), rows)} == {("m.gguf", digest())}
    run.path("m.gguf").write_bytes(b"trained anew")
    assert {a["sha256"] for a in ask(run, FakeEngine(), rows)} == {digest()}


@pytest.mark.parametrize("kind", ["text", "tokens", "field", "line", "encoding"])
def test_answers_changed_by_hand_are_refused_by_line_and_nothing_is_lost(run: SimpleNamespace, kind: str) -> None:
    rows = [row(i, prompt=f"pö{i}") for i in range(4)]
    ask(run, FakeEngine(), rows)
    file = run.path("evaluation", "answers-tuned.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    spoiled = {
        "text": lines[1].replace(b"re: ", b"well said: "),
        "tokens": lines[1].replace(b'"new_tokens": 3', b'"new_tokens": 9'),
        "field": lines[1].replace(b'"text"', b'"txt"'),
        "line": b"rubbish\n",
        "encoding": lines[1].decode("utf-8").encode("cp1252"),
    }[kind]
    data = b"".join([lines[0], spoiled, *lines[2:]]) + lines[0][:30]  # and a kill in the last line
    file.write_bytes(data)
    with pytest.raises(CourseError) as problem:
        ask(run, FakeEngine(), rows)
    assert len(problem.value.problems) == 1 and "line 2 " in problem.value.problems[0]
    assert file.read_bytes() == data
    file.write_bytes(data.replace(spoiled, b""))
    engine = FakeEngine()
    assert len(ask(run, engine, rows)) == 4 and engine.asked == 1


def test_an_editors_blank_lines_and_line_ends_do_no_harm(run: SimpleNamespace) -> None:
    rows, engine = [row(i, prompt=f"p{i}") for i in range(3)], FakeEngine()
    first = ask(run, engine, rows)
    file = run.path("evaluation", "answers-tuned.jsonl")
    text = file.read_text(encoding="utf-8")
    for changed in (
        "\ufeff" + text,
        text.replace("\n", "\r\n"),
        text.replace("\n", "\n\n"),
        text.rstrip("\n"),
        '{"key": "of an older version", "text": "x"}\n' + text,
    ):
        file.write_bytes(changed.encode("utf-8"))
        assert ask(run, engine, rows) == first and engine.asked == 3
    ask(run, engine, [*rows, row(9, prompt="new")])
    assert len(ask(run, engine, [*rows, row(9, prompt="new")])) == 4 and engine.asked == 4


def test_progress_tells_how_far(run: SimpleNamespace) -> None:
    said: list[str] = []
    answers(
        run,
        "tuned",
        run.path("m.gguf"),
        [row(i, prompt=f"p{i}") for i in range(3)],
        engine_factory=FakeEngine(),
        progress=said.append,
    )
    assert any("3/3 answers" in line for line in said)
