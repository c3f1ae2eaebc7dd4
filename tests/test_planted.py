"""The measures are measured: faults planted in clean rule text are found, and clean text raises no alarm."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from types import SimpleNamespace

import pytest
from test_evaluation import answer

from stakelib.dialogues import build
from stakelib.dialogues.classifier import heard, listener, masked
from stakelib.dialogues.numbers import mentions, ungrounded
from stakelib.evaluation import confusion, score
from stakelib.evaluation.measures import HEADINGS
from stakelib.evaluation.words import agreement, priorities, reading_ease, unfounded, wrong_way
from stakelib.scenarios import sample
from stakelib.voices import STAKEHOLDERS

CLEAN, PLANTED, SEEN, FALSE = 200, 100, 0.95, 0.02  # answers, of each fault, found at least, false alarms at most
Row = dict
Plant = Callable[[Row, int], "str | None"]  # the spoilt text, None where this answer has no place for the fault


@pytest.fixture(scope="module")
def world() -> SimpleNamespace:
    """Rule texts of 46 scenarios; one half of the countries trains the classifier, the other is judged."""
    rows = [r.model_dump() for r in build(sample(46, seed=7), dict.fromkeys(STAKEHOLDERS, 46), seed=7)]
    half = set(sorted({r["country"] for r in rows})[::2])
    judged = [r for r in rows if r["country"] not in half][::-1]
    judged = [r for _, r in sorted(enumerate(judged), key=lambda x: (x[0] % 23, x[0]))][:CLEAN]  # voices in turn
    return SimpleNamespace(rows=rows, judged=judged, listener=listener([r for r in rows if r["country"] in half]))


def put(text: str, sentence: str) -> str:
    return text.replace("**Concerns**:\n", f"**Concerns**:\n- [high] {sentence}: this matters to us.\n", 1)


def wrong_number(row: Row, i: int) -> str | None:
    found = mentions(row["completion"])[:3]
    m = found[i % len(found)] if found else None
    digits = m and re.search(r"\d[\d,.]*\d|\d", m.text)
    if not (m and digits):
        return None
    value = float(digits.group().replace(",", ""))
    other = f"{value * 1.13 + 3:,.1f}" if "." in digits.group() else f"{value * 1.13 + 3:,.0f}"
    return row["completion"][: m.start] + m.text.replace(digits.group(), other) + row["completion"][m.end :]


def another_year(row: Row, _: int) -> str | None:
    held = mentions(row["prompt"])
    for m in mentions(row["completion"]):
        for h in held:
            same = m.metric and (h.metric, h.unit) == (m.metric, m.unit)
            if same and m.year and h.year and h.year != m.year and abs(h.value - m.value) > 2 * m.step:
                return row["completion"][: m.start] + h.text + row["completion"][m.end :]
    return None


TURNED = [
    ("peak demand growing", "peak demand declining"),
    ("peak demand climbing", "peak demand dropping"),
    ("peak demand surging", "peak demand falling"),
    ("investment growing from", "investment falling from"),
    ("total investment rising", "total investment shrinking"),
    ("hydro expanding", "a decline of hydro"),
    ("hydro growing", "hydro shrinking"),
]
NAMES = {
    "re_share": "the renewable share",
    "investment": "investment",
    "jobs": "jobs",
    "peak": "peak demand",
    "storage": "storage",
    "solar": "solar",
    "wind": "wind",
    "hydro": "hydro",
    "gas": "gas",
    "coal": "coal",
    "emissions": "emissions",
}
FORMS = cycle(
    (
        "{name} {verb} steadily",
        "{verbs} {name} worries us",
        "{name} {verb} from {a} to {b}",
        "the {noun} of {name} by {year} comes too early",
        "{name} of {b} in {year} has {verb_past}",
    )
)
VERBS = {True: ("falls", "falling", "decline", "declined"), False: ("rises", "rising", "growth", "increased")}


def flipped(row: Row, _: int) -> str | None:
    text = row["completion"]
    tips = text.index("**Questions**")
    for right, wrong in TURNED:
        if right in text[:tips].lower():
            return re.sub(right, wrong, text, count=1, flags=re.I)
    told = [m for m in mentions(row["prompt"]) if m.metric in NAMES and m.year]
    for a, b in zip(told, told[1:], strict=False):
        years = sorted((m.year, m.value) for m in told if m.metric == a.metric)
        if a.metric == b.metric and len(years) == 2 and a.value != b.value:
            verb, verbs, noun, past = VERBS[b.value > a.value]
            said = next(FORMS).format(
                name=NAMES[a.metric], a=a.text, b=b.text, year=b.year, verb=verb, verbs=verbs, noun=noun, verb_past=past
            )
            return put(text, said[0].upper() + said[1:])
    return None


CLAIMS = cycle(
    {
        "storage": "The storage of 300 MW by 2030 is thin",
        "coal": "Coal plants close too late",
        "jobs": "The created jobs numbering 4,200 in 2030 are few",
        "emissions": "An emissions cut of 45% by 2040 is bold",
        "gas": "The gas fleet stays in service too long",
        "interconnector": "The interconnectors run at full load",
        "peak demand": "Peak demand of 900 MW in 2030 is high",
        "diesel": "Diesel units carry the evening",
        "geothermal": "Geothermal wells cool down",
    }.items()
)


def invented_metric(row: Row, _: int) -> str | None:
    for _, (word, claim) in zip(range(9), CLAIMS, strict=False):
        if word not in row["prompt"].lower():
            return put(row["completion"], claim)
    return None


def without_section(row: Row, i: int) -> str:
    name = HEADINGS[i % 5]
    return re.sub(rf"\*\*{name}\*\*:.*?(?=\n\*\*|\Z)", "", row["completion"], flags=re.S)


def swapped(row: Row, i: int, rows: list[Row]) -> str | None:
    others = [r for r in rows if r["scenario_id"] == row["scenario_id"] and r["stakeholder"] != row["stakeholder"]]
    return others[i % len(others)]["completion"]


def copied_prompt(row: Row, i: int) -> str:
    return row["prompt"] if i % 2 else "\n".join(row["prompt"].splitlines()[3:9]) + "\n" + row["completion"]


FAULTS: dict[str, tuple[Plant, Callable[[dict], bool]]] = {
    "wrong number": (wrong_number, lambda s: bool(s["invented"])),
    "number of another year": (another_year, lambda s: bool(s["invented"])),
    "flipped direction": (flipped, lambda s: not s["right_direction"]),
    "swapped stakeholder": (swapped, lambda s: not s["identity"]),
    "missing section": (without_section, lambda s: not s["has_sections"]),
    "invented metric": (invented_metric, lambda s: not s["keeps_to_data"]),
    "copied prompt": (copied_prompt, lambda s: s["copied_prompt"]),
}


def measured(rows: list[Row], texts: list[str], ear: object) -> list[dict]:
    answers = [{**answer(text), "row_id": row["id"]} for row, text in zip(rows, texts, strict=True)]
    return score(rows, answers, listener=ear).to_dict("records")


def test_planted_faults_are_found_and_clean_text_is_left_alone(
    world: SimpleNamespace, tell: Callable[[str], None]
) -> None:
    start, done = time.process_time(), CLEAN
    clean = measured(world.judged, [r["completion"] for r in world.judged], world.listener)
    table, missed = [], []
    for fault, (plant, seen) in FAULTS.items():
        more = {"rows": world.rows} if plant is swapped else {}
        spoilt = [(r, t) for i, r in enumerate(world.judged) if (t := plant(r, i, **more)) and t != r["completion"]]
        rows, texts = zip(*spoilt[:PLANTED], strict=True)
        found = [seen(line) for line in measured(list(rows), list(texts), world.listener)]
        alarms = sum(map(seen, clean))
        done += len(rows)
        table.append((fault, len(rows), sum(found) / len(rows), alarms / CLEAN))
        missed += [(fault, t) for t, ok in zip(texts, found, strict=True) if not ok][:2]
    seconds = time.process_time() - start
    tell(f"{'planted fault':24}{'answers':>8}{'found':>8}{'false alarms':>14}")
    tell("\n".join(f"{fault:24}{n:8}{rate:8.0%}{alarms:14.1%}" for fault, n, rate, alarms in table))
    tell(f"all measures of 1,000 answers: {1000 * seconds / done:.0f} s of processor time (budget 20 s)")
    assert len(clean) == CLEAN and all(n >= 60 for _, n, _, _ in table)
    assert [line for line in table if line[2] < SEEN or line[3] > FALSE] == [], missed


def test_the_classifier_hears_all_nine_of_other_countries(world: SimpleNamespace) -> None:
    table = score(
        world.judged[:90],
        [{**answer(r["completion"]), "row_id": r["id"]} for r in world.judged[:90]],
        listener=world.listener,
    )
    matrix = confusion(table)
    assert matrix.to_numpy().sum() == 90 and set(matrix.index) == set(STAKEHOLDERS)
    assert sum(matrix.loc[who, who] for who in STAKEHOLDERS) >= 88
    silent = heard(world.listener, ["", "2030: 45%"], world.judged[:2])
    assert silent == ["", ""]  # no words, no voice


def test_a_voice_is_not_heard_by_its_name_or_priorities(world: SimpleNamespace) -> None:
    row = world.judged[0]
    told = f"As a Grid Operator of {row['country']}, a progressive one: system reliability, debt sustainability, 45%."
    assert masked(told, row).split() == ["As", "a", ",", "a", "one:", ",", ",", "%."]
    assert "dispatch" in masked("Our dispatch room", row)


@pytest.mark.parametrize(
    "given",
    [
        lambda r: r["prompt"],
        lambda r: "\n".join(x for x in r["prompt"].splitlines() if x.startswith("- ")),
        lambda r: " ".join(w for p in STAKEHOLDERS[r["stakeholder_id"]].priorities for w in p.split()[::-1]),
        lambda r: " ".join(re.sub(r"\W|\band\b", " ", p) for p in STAKEHOLDERS[r["stakeholder_id"]].priorities[::-1]),
        lambda r: STAKEHOLDERS[r["stakeholder_id"]].name.split()[0].lower() + "-minded people answer here",
    ],
    ids=["prompt", "data lines", "priorities reversed", "priorities in other order", "a word of the name"],
)
def test_what_the_prompt_gives_away_is_no_voice(world: SimpleNamespace, given: Callable[[Row], str]) -> None:
    """Chance is one in nine; with exact names masked and nothing else, these were heard in 23 to 78 of a hundred."""
    voices = heard(world.listener, [given(r) for r in world.judged], world.judged)
    right = sum(v == r["stakeholder_id"] for v, r in zip(voices, world.judged, strict=True))
    assert right / len(world.judged) <= 0.25


# ---- one by one, each with a twin that passes

PROMPT = """- Country: Kenya
- Scenario: Coal Farewell
- Renewable Share 2030: 60.0%
- Renewable Share 2040: 80.0%
- Coal Capacity: 400 MW (2030), 100 MW (2040)
- Emissions Reduction: 20.0% (2030), 40.0% (2040)

**Stakeholder Priorities**: flexibility and storage"""


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("Coal will rise by 2040.", "Coal will fall by 2040."),
        ("The growth of coal is a shame.", "The decline of coal is a relief."),
        ("The renewable share of 80.0% in 2040 falls.", "The renewable share of 80.0% in 2040 rises."),
        ("It drops from 60.0% to 80.0%.", "It climbs from 60.0% to 80.0%."),
        ("We go from 60.0% in 2030 to 80.0% in 2040, a fall.", "We go from 60.0% in 2030 to 80.0% in 2040, a rise."),
        (
            "The renewable share of 80.0% in 2040 falls.",
            "The renewable share of 80.0% in 2040 falls short of our needs.",
        ),
        ("The renewable share is lowered.", "The renewable share of 80.0% in 2040 lowers inertia."),
        ("We see rising emissions.", "We see falling emissions."),
        ("Renewables decline.", "If renewables decline, we leave."),
        ("Coal grows.", "Must coal grow?"),
        ("Higher emissions follow.", "We want higher emissions cuts."),
        ("Emissions are 40 % higher in 2040.", "Emissions are 40 % lower in 2040."),
        ("Emissions are up by 40%.", "Emissions are down by 40%."),
        ("A 40 % increase in emissions follows.", "A 40 % reduction in emissions follows."),
        ("An increase of emissions by 40 percent", "A cut of emissions by 40 percent"),
        ("Coal is 300 MW higher in 2040.", "Coal is 300 MW lower in 2040."),
        ("Coal will rise about 300 MW.", "Coal, made up of old plants, will fall about 300 MW."),
        ("There will be a smaller share of renewables and fewer renewables.", "Fewer renewables would be a shame."),
    ],
)
def test_a_rise_called_a_fall_is_seen(wrong: str, right: str) -> None:
    assert wrong_way(wrong, PROMPT) and not wrong_way(right, PROMPT)


SERIES = """- Renewable Share 2030: 64.2%
- Renewable Share 2040: 82.1%
- Emissions: 3.50 Mt CO2 (2030), 1.80 Mt CO2 (2040)
- Peak Demand: 1,020 MW (2030), 1,320 MW (2040)
- Coal Capacity: 365 MW (2030), 275 MW (2040)
- Solar Capacity: 385 MW (2030), 920 MW (2040)
- Jobs Created: 2,852 (2030), 3,900 (2040)
- Storage Capacity: 75 MW (2030), 135 MW (2040)"""
FREE_AND_WRONG = """Emissions go up to 2040. Coal capacity is going up. The share of renewables goes down. Coal use
rises. Peak demand is lower in 2040 than in 2030. Electricity demand declines. Pollution rises.
Solar dwindles after 2030. Storage is halved by 2040. Jobs will decline by 2040. We see emissions
climbing. A rise in emissions worries us. The growth of coal is plain. Falling solar capacity is a
concern. Emissions are set to increase. The number of jobs slips. Peak demand eases. The renewable
share shrinks. Solar capacity has been reduced. Coal expands. Demand drops. Less solar
is planned in 2040. More coal comes by 2040. Batteries are scaled down.
Emissions of 3.50 Mt CO2 in 2030 grow to 2040. Rising emissions undo the plan. The decline of the
renewable share is steep."""
FREE_AND_RIGHT = """Emissions fall to 2040. Coal capacity is going down. The share of renewables goes up. Coal use
falls. Peak demand is higher in 2040 than in 2030. Jobs grow less quickly than in the past, but they
grow. Emissions ease by 2040. Emissions would rise without it. Should coal rise again, we object.
Lower emissions help. A cut of emissions is welcome. Solar reduces emissions. More solar means less
coal. Faster growth of solar would help. Electricity demand grows."""


def test_a_turned_direction_in_free_words_is_seen_three_times_in_four() -> None:
    """Sentences that were not made from the word lists: what the measure is worth on another model's wording."""
    wrong, right = (re.split(r"(?<=\.) ", " ".join(text.split())) for text in (FREE_AND_WRONG, FREE_AND_RIGHT))
    assert len(wrong) == 27 and sum(bool(wrong_way(s, SERIES)) for s in wrong) >= 21
    assert [s for s in right if wrong_way(s, SERIES)] == []


def test_a_metric_of_one_year_has_no_direction() -> None:
    assert not wrong_way("Storage falls. Gas rises.", PROMPT + "\n- Storage Capacity: 40 MW (2030)")


@pytest.mark.parametrize(
    ("wrong", "right", "word"),
    [
        ("The gas fleet stays.", "The coal fleet stays.", "gas"),
        ("Storage of 300 MW helps.", "We care for storage.", "storage"),  # a priority may be named, not counted
        ("The jobs come late.", "No figure on jobs is given.", "jobs"),
        ("Diesel runs at night.", "Does diesel run at night?", "diesel"),
    ],
)
def test_a_claim_without_data_is_seen(wrong: str, right: str, word: str) -> None:
    assert unfounded(wrong, PROMPT) == [word] and unfounded(right, PROMPT) == []


def test_a_technology_in_the_name_of_a_scenario_is_no_data() -> None:
    named = PROMPT.replace("Coal Farewell", "Wind, Solar and Hope")
    assert unfounded("The solar fleet stays.", named) == ["solar"]


def test_the_tips_end_where_their_list_ends() -> None:
    tips = "**Engagement Tips**:\n\n- Bring gas data.\n2. Show coal falling.\n"
    assert unfounded(tips, PROMPT) == []
    assert unfounded(tips + "\nThe gas fleet stays.", PROMPT) == ["gas"]


def test_a_name_is_no_claim() -> None:
    bare = PROMPT.replace("- Coal Capacity: 400 MW (2030), 100 MW (2040)\n", "")
    assert unfounded("We like Coal Farewell.", bare) == [] and unfounded("We like coal.", bare.replace("Coal", "Sun"))


def test_sums_are_right_only_after_a_word_of_change_and_only_for_answers() -> None:
    grows, stays = "The renewable share grows by 20 points.", "The renewable share is 20 points."
    assert not ungrounded(grows, PROMPT, derived=True) and ungrounded(grows, PROMPT)
    assert ungrounded(stays.replace("20", "21"), PROMPT, derived=True)
    assert not ungrounded("Coal drops by 75%.", PROMPT, derived=True)
    assert ungrounded("Coal drops by 76%.", PROMPT, derived=True)


def test_agreement_by_hand() -> None:
    first = "**Concerns**:\n- Coal of 400 MW in 2030.\n- Storage is thin.\n\n**Questions**:\n- Jobs?"
    assert agreement(first, first) == 1 and agreement("", "") == agreement(first, "Fine.") == 0
    assert agreement(first, first.replace("Storage", "Money")) == pytest.approx((1 + 1 / 2) / 2)


def test_priorities_and_reading_ease_by_hand() -> None:
    assert priorities("Reliability and flexible plant first.", "grid-operators") == pytest.approx(2 / 5)
    assert reading_ease("The cat sat on the mat.") == pytest.approx(206.835 - 1.015 * 6 - 84.6, abs=0.01)
    assert reading_ease("Intergovernmental harmonisation necessitates deliberation.") < 0 and reading_ease("") is None


def test_a_second_answer_and_an_absent_one(world: SimpleNamespace) -> None:
    rows = world.judged[:2]
    answers = [{**answer(r["completion"]), "row_id": r["id"]} for r in rows]
    table = score(rows, answers, again=answers[:1])
    assert table["consistency"].tolist() == [1.0, 0.0]  # what never came back agrees with nothing
    assert score(rows, answers)["consistency"].isna().all() and score(rows, answers)["identity"].isna().all()


def test_mentions_are_remembered_but_never_shared() -> None:
    first = mentions("Coal of 40 MW")
    first.append(replace(first[0], value=0.0))
    assert len(mentions("Coal of 40 MW")) == 1
