"""The number matcher: what is a figure, and when it is not the prompt's."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stakelib.dialogues.numbers import mentions, ungrounded, without_names, years
from stakelib.scenarios import Metric
from stakelib.scenarios.metrics import METRICS

PROMPT = """**Scenario Context**:
- Country: Kenya
- Scenario: 50% Wind Path 2035
- Renewable Share 2030: 64.2%
- Renewable Share 2040: 82.1%
- Investment: $2,850M USD by 2030, $7,840M USD by 2040
- Yearly Investment: $533M USD per year (2030)
- Jobs Created: 10,645 (2030), 12,000 (2040)
- Permanent Jobs: 435 (2030)
- Emissions Reduction: 35.8% (2030)
- Emissions: 2.15 Mt CO2 (2025), 0.58 Mt CO2 (2040)
- Solar and Wind Share of Capacity: 39.5% (2030)
- Peak Demand: 1,020 MW (2030)
- Solar PV Capacity: 385 MW (2030), 920 MW (2040)
- Wind Capacity: 180 MW (2030), 380 MW (2040)
- Storage Capacity: 120 MW (2030)
- New Land: 836 ha (2030)
- Renewable Additions: 105 MW per year (2030)
"""


@pytest.mark.parametrize(
    "text",
    [
        "Renewables reach 64.2% by 2030 and 82.1% by 2040.",
        "By 2030 we build 385 MW of solar and 180 MW of wind.",
        "$2.85 billion by 2030 buys 10,645 jobs in 2030.",
        "A renewable share of sixty-four percent in 2030.",
        "Emissions fall by 35.8% by 2030.",
        "836 hectares of land",
        "Solar capacity of 0.385 GW in 2030",
        "Yearly investment of $533M USD per year to 2030 is high.",
        "About 10,600 jobs in 2030",
        "2,150 kt CO2 in 2025",
        "Storage of 120 MW stands against 385 MW of solar in 2030.",
        "Renewable additions of 105 MW a year",
        "The renewable share climbs from 64.2% in 2030 to 82.1% in 2040.",
        "435 permanent jobs stay.",
        "Investment of 2,850 million USD by 2030",
        "solar and wind make 39.5% of capacity in 2030",
        "We back 50% Wind Path 2035 with 64% renewables.",
        "more than 80% renewables in 2040",
        "over 380 MW of solar in 2030",
        "nearly 390 MW of solar in 2030",
    ],
)
def test_grounded(text: str) -> None:
    assert mentions(text)
    assert ungrounded(text, PROMPT) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Renewables reach 64.2% by 2040.", "wrong year"),
        ("Renewables reach 65.2% by 2030.", "not in the prompt"),
        ("By 2030 we build 180 MW of solar.", "wrong metric"),
        ("64.2 MW of wind", "wrong unit"),
        ("Emissions fall by 64.2% by 2030.", "wrong metric"),
        ("two thirds of the power", "not in the prompt"),
        ("half of the capacity", "not in the prompt"),
        ("emissions double", "not in the prompt"),
        ("seventy percent renewables", "not in the prompt"),
        ("investment of $2,850M USD per year", "wrong unit"),
        ("10,645 permanent jobs in 2030", "wrong metric"),
        ("105 MW of wind", "wrong unit"),
        ("1,020 MW of storage", "wrong metric"),
        ("three new coal plants", "not in the prompt"),
        ("fifteen years", "not in the prompt"),
        ("25 GWh", "not in the prompt"),
        ("$500 million", "not in the prompt"),
        ("120 GW of storage", "not in the prompt"),
        ("we want 40 plants", "wrong unit"),
        ("a dozen plants", "not in the prompt"),
        ("1,000 jobs", "not in the prompt"),
        ("solar of 385 MW in 2040", "wrong year"),
        ("$28.5 billion", "not in the prompt"),
        ("50% of our members agree", "not in the prompt"),
        ("one in 836 ha of storage costs 533", "wrong unit"),
        ("between 300 and 385 MW of solar", "not in the prompt"),
        ("emissions tripled", "not in the prompt"),
        ("It creates 2000 permanent jobs.", "not in the prompt"),
        ("light for 2050 families", "not in the prompt"),
        ("1950 hectares of land", "not in the prompt"),
        ("2000 megawatts of solar", "not in the prompt"),
        ("an investment of 1950 million dollars", "not in the prompt"),
        ("more than 70% renewables in 2030", "not in the prompt"),
        ("over 390 MW of solar in 2030", "not in the prompt"),
        ("nearly 900 MW of solar in 2040", "not in the prompt"),
    ],
)
def test_not_grounded(text: str, reason: str) -> None:
    assert reason in [miss.reason for miss in ungrounded(text, PROMPT)]


CHANGES = (
    "- Peak Demand: 1,020 MW (2030), 1,320 MW (2040)\n- Solar Capacity: 385 MW (2030), 920 MW (2040)\n"
    "- Renewable Share 2030: 64.2%\n- Renewable Share 2040: 82.1%"
)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("about 900 MW of solar in 2040", "about 500 MW of solar in 2040"),
        ("about 80% renewables in 2040", "nearly 80% renewables in 2040"),
        ("nearly 400 MW of solar in 2030", "nearly 100% renewables in 2040"),
        ("Peak demand rises by 300 MW.", "Storage rises by 300 MW."),
        ("Solar grows by 535 MW.", "Storage of 535 MW is more than we need."),
        ("Peak demand grows by 29.4%.", "Peak demand grows to 29.4%."),
        ("The renewable share rises to 82.1% by 2040.", "The renewable share rises to 28% by 2040."),
        ("Between 2030 and 2040 solar grows from 385 MW to 920 MW.", "In 2040 solar grows from 385 MW to 920 MW."),
        ("The 2030 and 2040 shares are 64.2% and 82.1%.", "The 2040 share is 64.2%."),
        ("385,000 kW of solar", "385,000 kWh of solar"),
        ("385 megawatts of solar", "385,000 kilowatt-hours of solar"),
    ],
)
def test_hedges_changes_and_two_years_do_not_hide_a_wrong_figure(right: str, wrong: str) -> None:
    assert ungrounded(right, CHANGES, derived=True) == [] and ungrounded(wrong, CHANGES, derived=True)


@pytest.mark.parametrize(
    "text",
    [
        "Supply 24/7 under SDG7, SDG 7, N-1 and CASA-1000.",
        "CO2 and 1.5 °C",
        "By 2030 and in the 2040s.",
        "By 2040 workers will see it, and in 2030 people pay.",
        "1. First point",
        "One day, one of us asked two key questions.",
        "on the one hand",
        "COP28 and Article 6",
        "second-hand, first, half-hearted",
    ],
)
def test_idioms_and_names_are_no_figures(text: str) -> None:
    assert mentions(text) == []


def test_reads_prompt_lines() -> None:
    found = [(m.value, m.unit, m.metric, m.year) for m in mentions(PROMPT)]
    assert (10645.0, "jobs", "jobs", 2030) in found and (435.0, "jobs", "permanent_jobs", 2030) in found
    assert (7840.0, "m$", "investment", 2040) in found and (533.0, "m$/yr", "yearly_investment", 2030) in found
    assert (105.0, "MW/yr", "additions", 2030) in found and (2.15, "Mt CO2", "emissions", 2025) in found


CITABLE = [k for k in METRICS if k != "imports"]


@settings(max_examples=300, deadline=None)
@given(key=st.sampled_from(CITABLE), value=st.floats(12, 90), year=st.sampled_from([2030, 2040]))
def test_every_metric_round_trips_and_its_neighbours_do_not(key: str, value: float, year: int) -> None:
    metric = Metric.of(key, year, value)
    line = f"- {metric.label}: {metric} ({year})"
    read = mentions(line)
    assert [(m.value, m.unit, m.metric, m.year) for m in read] == [(metric.value, metric.unit, key, year)]
    noun = {"jobs": " jobs", "permanent_jobs": " permanent jobs"}.get(key, "")
    assert ungrounded(f"{metric.label} of {metric}{noun} in {year}", line) == []
    other = Metric.of(key, year, value + 1.5)
    assert ungrounded(f"{metric.label} of {other}{noun} in {year}", line)[0].reason == "not in the prompt"
    assert ungrounded(f"{metric.label} of {metric}{noun} in {year + 5}", line)[0].reason == "wrong year"


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300))
def test_never_fails_on_any_text(text: str) -> None:
    for m in mentions(text):
        assert text[m.start : m.end].strip() == m.text.strip() or m.text
    assert ungrounded(text, text) == [] or all(m.reason for m in ungrounded(text, text))


ONES = [
    "",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def spelled(n: int) -> str:
    if n >= 1000:
        return f"{spelled(n // 1000)} thousand {spelled(n % 1000)}".strip()
    if n >= 100:
        return f"{ONES[n // 100]} hundred {spelled(n % 100)}".strip()
    return ONES[n] if n < 20 else f"{TENS[n // 10]}-{ONES[n % 10]}".strip("-")


@settings(max_examples=200, deadline=None)
@given(n=st.integers(2, 99_999), off=st.integers(1, 50))
def test_spelled_out_numbers_are_read_like_digits(n: int, off: int) -> None:
    line = f"- Peak Demand: {n:,} MW (2030)"
    assert [(m.value, m.unit) for m in mentions(f"peak of {spelled(n)} megawatts")] == [(n, "MW")]
    assert ungrounded(f"Peak demand of {spelled(n)} MW in 2030", line) == []
    assert ungrounded(f"Peak demand of {spelled(n + off)} MW in 2030", line)[0].reason == "not in the prompt"


@settings(max_examples=200, deadline=None)
@given(mw=st.integers(100, 99_999), places=st.integers(0, 3))
def test_rounding_and_other_units_pass_only_as_far_as_they_are_true(mw: int, places: int) -> None:
    line = f"- Solar PV Capacity: {mw:,} MW (2030)"
    gw = f"{mw / 1000:.{places}f}"
    assert ungrounded(f"{gw} GW of solar in 2030", line) == []
    wrong = f"{mw / 1000 + 1.2 * 10.0**-places:.{places}f}"
    assert [m.reason for m in ungrounded(f"{wrong} GW of solar in 2030", line)] == ["not in the prompt"]
    assert ungrounded(f"{mw:,} GW of solar in 2030", line) and ungrounded(f"{mw:,} GWh of solar in 2030", line)


@settings(max_examples=200, deadline=None)
@given(m_usd=st.integers(1_000, 99_000), places=st.integers(1, 3))
def test_money_in_billions(m_usd: int, places: int) -> None:
    line = f"- Investment: ${m_usd:,}M USD by 2030"
    assert ungrounded(f"an investment of ${m_usd / 1000:.{places}f} billion by 2030", line) == []
    assert ungrounded(f"an investment of ${m_usd / 1000:.{places}f} million by 2030", line)
    assert ungrounded(f"an investment of ${m_usd:,}M USD per year by 2030", line)


@settings(max_examples=300, deadline=None)
@given(
    value=st.integers(3, 10**6).filter(lambda n: not 1900 <= n <= 2099),  # those read as years: another gate
    before=st.sampled_from(["", "about ", "some ", "USD ", "-", "~", "("]),
    after=st.sampled_from(["", " plants", "x", "%", " percent", " MW", " ha", " jobs", " people", ")", "+"]),
)
def test_no_form_of_an_invented_number_slips_through(value: int, before: str, after: str) -> None:
    held = "- Country: Kenya\n- Wind Capacity: 0.7 MW (2030)"
    text = f"We count on {before}{value}{after} here."
    assert ungrounded(text, held), text


@settings(max_examples=100)
@given(
    st.sampled_from(["24/7", "SDG7", "SDG 13", "N-1", "COP28", "CASA-1000", "Scope 2", "3rd", "1.5 °C", "CO2"]),
    st.sampled_from(["we need {} here", "{}", "by {} rules, always", "({})"]),
)
def test_names_and_idioms_in_any_place_are_no_figures(name: str, around: str) -> None:
    assert mentions(around.format(name)) == []


# ---- one true and one false sentence for each form in which a figure is written

HELD = """- Country: Kenya
- Scenario: Coal Farewell
- Renewable Share 2030: 38.0%
- Renewable Share 2040: 62.0%
- Investment: $1,234M USD by 2030, $3,400M USD by 2040
- Yearly Investment: $217M USD per year (2040)
- Jobs Created: 10,645 (2030), 20,000 (2040)
- Emissions Reduction: 40.0% (2040)
- Emissions: 1.50 Mt CO2 (2025), 0.90 Mt CO2 (2040)
- Peak Demand: 1,020 MW (2030), 1,320 MW (2040)
- Solar PV Capacity: 430 MW (2030), 1,290 MW (2040)
- Wind Capacity: 2,500 MW (2030), 3,000 MW (2040)
- Storage Capacity: 120 MW (2030), 240 MW (2040)
- Coal Capacity: 600 MW (2030), 200 MW (2040)
- Gas Capacity: 16 MW (2030), 8 MW (2040)
- Imports: 900 GWh (2030)
- New Land: 836 ha (2030)
"""
STATED = [  # what a prompt states: also the strict gate of training rows holds the true one
    # ranges share unit, scale, money and step
    ("Wind goes from 2.5 to 3.0 GW.", "Wind goes from 2.5 to 3.4 GW."),
    ("Wind of 2.5-3.0 GW is planned.", "Wind of 2.1-3.0 GW is planned."),
    ("Wind of 2.5\u20133.0 GW is planned.", "Wind of 2.5\u20133.0 MW is planned."),
    ("Wind lies between 2.5 and 3.0 GW.", "Wind lies between 2.5 and 3.3 GW."),
    ("Wind lies between 2,500 MW and 3,000.", "Wind lies between 2,500 MW and 3,300."),
    ("We count 10.6 to 20.0 thousand jobs.", "We count 11.6 to 20.0 thousand jobs."),
    ("An investment of $1.2 to 3.4 billion.", "An investment of $2.2 to 3.4 billion."),
    ("An investment of $1.2-3.4bn.", "An investment of $1.2-4.3bn."),
    ("Investment between $1.2 and $3.4 billion.", "Investment between $1.8 and $3.4 billion."),
    ("Investment of USD 1.2 to 3.4 billion.", "Investment of USD 1.2 to 3.4 million."),
    ("Renewables rise from 38 to 62 %.", "Renewables rise from 38 to 72 %."),
    ("Renewables rise from 38% in 2030 to 62 in 2040.", "Renewables rise from 38% in 2030 to 72 in 2040."),
    ("Peak demand of 1,020 (2030) to 1,320 MW (2040).", "Peak demand of 1,120 (2030) to 1,320 MW (2040)."),
    # money
    ("It costs USD1.234 billion by 2030.", "It costs USD9.9 billion by 2030."),
    ("It costs US$ 1,234 million by 2030.", "It costs US$ 1,334 million by 2030."),
    ("It costs 1,234 million dollars by 2030.", "It costs 1,334 million dollars by 2030."),
    ("It costs $1.2bn by 2030.", "It costs $1.2m by 2030."),
    ("It costs USD 1,234m by 2030.", "It costs USD 1,434m by 2030."),
    ("It costs 1,234 m$ by 2030.", "It costs 1,434 m$ by 2030."),
    ("It costs $1.234 billion.", "It costs \u20ac1.234 billion."),
    ("It costs USD 1,234 million.", "It costs EUR 1,234 million."),
    ("It costs 1,234 million US dollars.", "It costs 1,234 million euros."),
    ("It costs US$1.234 billion.", "It costs A$1.234 billion."),
    ("A yearly investment of $217M to 2040.", "A yearly investment of $317M to 2040."),
    ("We pay $217 million a year.", "We pay $1,234 million a year."),
    ("We pay $217M/yr.", "We pay $3,400M/yr."),
    # units
    ("430 Megawatts of solar in 2030", "430 Gigawatts of solar in 2030"),
    ("0.43 gigawatts of solar in 2030", "0.53 gigawatts of solar in 2030"),
    ("430 MWp of solar in 2030", "430 kWp of solar in 2030"),
    ("430,000 kilowatts of solar in 2030", "430,000 kilowatt-hours of solar in 2030"),
    ("1.5 megatonnes of CO2 in 2025", "1.5 kilotonnes of CO2 in 2025"),
    ("1.5 MtCO2e in 2025", "1.9 MtCO2e in 2025"),
    ("1.5 Mt CO\u2082-eq in 2025", "2.5 Mt CO\u2082-eq in 2025"),
    ("1.5 million tonnes of CO2 in 2025", "1.5 million tonnes of CO2 in 2040"),
    ("Imports of 0.9 terawatt-hours in 2030", "Imports of 0.9 terawatts in 2030"),
    ("Imports of 900 Gigawatt-hours in 2030", "Imports of 900 Megawatt-hours in 2030"),
    ("Renewables of 38 per cent in 2030", "Renewables of 48 per cent in 2030"),
    ("8.36 km\u00b2 of land", "9.36 km\u00b2 of land"),
    # digits and words
    ("10 645 jobs in 2030", "10 745 jobs in 2030"),
    ("10\u202f645 jobs in 2030", "10\u202f745 jobs in 2030"),
    ("1\u00a0020 MW of peak demand in 2030", "1\u00a0120 MW of peak demand in 2030"),
    ("38,0 % renewables in 2030", "38,5 % renewables in 2030"),
    (".9 Mt CO2 in 2040", ".7 Mt CO2 in 2040"),
    ("Gas of sixteen megawatts in 2030", "Gas of seventeen megawatts in 2030"),
    ("One hundred and twenty MW of storage in 2030", "One hundred and thirty MW of storage in 2030"),
    ("Twenty thousand jobs in 2040", "Thirty thousand jobs in 2040"),
    ("Solar of approx.430 MW in 2030", "Solar of approx.630 MW in 2030"),
    # dates and spans of years
    ("Between 2030 and 2040 solar goes from 430 MW to 1,290 MW.", "In 2040 solar goes from 430 MW to 1,290 MW."),
    ("Over 2030-40 storage moves to 240 MW.", "Over 2030-40 storage moves to 340 MW."),
    ("In FY2030 solar is 430 MW.", "In FY2040 solar is 430 MW."),
    ("On 1 January 2030 solar is 430 MW.", "On 1 January 2040 solar is 430 MW."),
    # bounds
    ("At least 60 % renewables in 2040", "At least 63 % renewables in 2040"),
    (">60 % renewables in 2040", ">65 % renewables in 2040"),
    ("\u226560% renewables in 2040", "\u226564% renewables in 2040"),
    ("60 % or more renewables in 2040", "65 % or more renewables in 2040"),
    ("No less than 1,000 MW of peak demand in 2030", "No less than 1,100 MW of peak demand in 2030"),
    ("Up to 250 MW of storage in 2040", "Up to 230 MW of storage in 2040"),
    ("Less than 65 % renewables in 2040", "Less than 60 % renewables in 2040"),
    ("No more than 65 % renewables in 2040", "No more than 61 % renewables in 2040"),
    ("Over 60 % renewables in 2040", "Over 70 % renewables in 2040"),
    ("More than 400 MW of solar in 2030", "More than 500 MW of solar in 2030"),
    ("Renewables exceed 60% in 2040.", "Renewables exceed 66% in 2040."),
    ("Emissions fall below 1 Mt CO2 in 2040.", "Emissions fall below 0.8 Mt CO2 in 2040."),
    # approximations
    ("About 10,600 jobs in 2030", "About 11,600 jobs in 2030"),
    ("Roughly 60 % renewables in 2040", "Roughly 70 % renewables in 2040"),
    ("Almost 40 % renewables in 2030", "Almost 50 % renewables in 2030"),
    ("~1,300 MW of solar in 2040", "~1,500 MW of solar in 2040"),
    ("Nearly $3.5 billion by 2040", "Nearly $3.9 billion by 2040"),
    # parts of a whole
    ("An emissions cut of two fifths by 2040", "An emissions cut of two thirds by 2040"),
    ("Emissions fall by two in five.", "Emissions fall by two in three."),
    ("Three fifths of our power is renewable in 2040.", "Two thirds of our power is renewable in 2040."),
    # direction of a change
    ("Emissions are 40 % lower in 2040.", "Emissions are 40 % higher in 2040."),
    ("A 40 % reduction of emissions by 2040", "A 40 % growth of emissions by 2040"),
    ("Emissions fall by 40 % by 2040.", "Emissions rise by 40 % by 2040."),
    ("Emissions are down 40 % by 2040.", "Emissions are up 40 % by 2040."),
    ("\u221240 % emissions by 2040", "+40 % emissions by 2040"),
    ("A drop in emissions of 40 % by 2040", "A rise in emissions of 40 % by 2040"),
    ("Emissions fall to 0.90 Mt CO2 by 2040.", "Emissions fall by 0.90 Mt CO2 by 2040."),
    ("Renewables rise to 62% by 2040.", "Renewables rise by 62% by 2040."),
]
DERIVED = [  # what follows from two held years: for answers only
    ("Coal falls by two thirds by 2040.", "Coal falls by half by 2040."),
    ("Coal falls by two thirds in 2040.", "Coal rises by two thirds in 2040."),
    ("Gas is halved.", "Coal is halved."),
    ("Coal falls to a third of its 2030 level.", "Gas falls to a third of its 2030 level."),
    ("Solar triples by 2040.", "Storage triples by 2040."),
    ("Storage doubles.", "Solar doubles."),
    ("A threefold rise of solar", "A threefold rise of storage"),
    ("Three times as much solar in 2040", "Three times as much storage in 2040"),
    ("Solar of 2040 is three times the level of 2030.", "Wind of 2040 is three times the level of 2030."),
    ("Twice the storage of 2030", "Twice the wind of 2030"),
    ("Storage is twice as large.", "Storage is 1.5 times as large."),
    ("Renewables grow by more than 60 %.", "Renewables grow by more than 70 %."),
    ("The renewable share rises by 24 points.", "The renewable share rises by 34 points."),
    ("The renewable share rises by 24 percentage points.", "The renewable share falls by 24 percentage points."),
    ("The renewable share gains 24 pp.", "The renewable share gains 22 pp."),
    ("The renewable share rises by 24 points.", "The renewable share rises by 24%."),
    ("Peak demand rises by 300 MW.", "Peak demand falls by 300 MW."),
    ("Peak demand is 300 MW higher in 2040.", "Peak demand is 300 MW lower in 2040."),
    ("Peak demand grows by 29.4%.", "Storage grows by 29.4%."),
    ("An additional 860 MW of solar", "An additional 960 MW of solar"),
    ("400 MW less coal", "400 MW more coal"),
]


@pytest.mark.parametrize(("true", "false"), STATED + DERIVED)
def test_of_every_form_the_true_sentence_is_held_and_its_false_twin_is_not(true: str, false: str) -> None:
    assert mentions(true)
    assert ungrounded(true, HELD, derived=True) == []
    assert ungrounded(false, HELD, derived=True)
    assert ungrounded(false, HELD)


@pytest.mark.parametrize("true", [true for true, _ in STATED])
def test_the_gate_of_rows_holds_what_a_prompt_states(true: str) -> None:
    assert ungrounded(true, HELD) == []


@pytest.mark.parametrize("true", [true for true, _ in DERIVED])
def test_the_gate_of_rows_takes_no_sums(true: str) -> None:
    assert ungrounded(true, HELD)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Over 2025-30 we build.", {2025, 2030}),
        ("The season 2029/30 was dry.", {2029, 2030}),
        ("From 2030\u201340 we build, and in 2030-2040.", {2030, 2040}),
        ("In the mid-2030s and the 2040s", {2030, 2040}),
        ("FY2030, Q3 2031, 31 December 2032, 2033-05-31, 01/02/2034", {2030, 2031, 2032, 2033, 2034}),
        ("It is due by May 15, at 10:30.", set()),
    ],
)
def test_dates_are_no_figures_and_their_years_are_read(text: str, named: set[int]) -> None:
    assert mentions(text) == [] and years(text) == named


# ---- names of scenarios and countries


def prompt_of(name: str) -> str:
    return f"- Country: Kenya\n- Scenario: {name}\n- Solar PV Capacity: 430 MW (2030)\n- Peak Demand: 900 MW (2030)"


@pytest.mark.parametrize(
    ("name", "as_name", "as_claim"),
    [
        ("80% RE by 2040", "80% RE by 2040 is a plan that we can use.", "We reach 80% RE by 2040."),
        ("5 GW Solar", "Our members read the scenario 5 GW Solar slowly.", "We count on 5 GW of solar."),
        ("100%", 'The plan "100%" is on our desk.', "We count on 100% renewables."),
        ("$2bn Grid Plan", "Behind $2bn Grid Plan we see no lines.", "It costs $2bn."),
        ("Solar", "Solar gives us a basis, with 430 MW of panels.", "Solar of 900 MW in 2030"),
        ("Solar", "Our fleet of Solar PV is 430 MW in 2030.", "Solar climbs to 900 MW in 2030."),
        ("Peak Demand", "Peak Demand is what we read, and peak demand is 900 MW.", "Peak Demand of 430 MW in 2030"),
        ("+20% demand", "We test +20% demand by what it leaves.", "We expect 20% more demand."),
        ("solar first", "Solar first is bold.", "Solar is 43 MW."),
        ('The "3x" Push', 'Behind The "3x" Push stand 430 MW of solar.', "We get 3x the solar."),
        ("2040", "In 2040 we read on.", "In 2040 solar is 430 MW."),
    ],
)
def test_a_name_is_no_figure_and_a_figure_no_name(name: str, as_name: str, as_claim: str) -> None:
    assert ungrounded(as_name, prompt_of(name)) == []
    assert ungrounded(as_claim, prompt_of(name))


@pytest.mark.parametrize("name", ["Solar", "Peak Demand", "PV", "Capacity", "MW", "Solar PV Capacity", "430", "RE"])
def test_a_name_is_never_cut_out_of_a_metrics_label(name: str) -> None:
    blotted = without_names(prompt_of(name), prompt_of(name))
    assert [(m.value, m.unit, m.metric, m.year) for m in mentions(blotted)] == [
        (430.0, "MW", "solar", 2030),
        (900.0, "MW", "peak", 2030),
    ]


# ---- any figure, any text

FORMS = (
    "{label} of {metric}{noun} in {year}",
    "In {year}, {label} is {metric}{noun}.",
    "We plan {metric}{noun} of {label} by {year}.",
    "{label} ({year}): {metric}{noun}",
    "{label} is at least {metric}{noun} in {year}.",
    "about {metric}{noun} of {label} in {year}",
)


@given(
    key=st.sampled_from(CITABLE),
    value=st.floats(0.3, 20_000),
    year=st.sampled_from([2025, 2030, 2040, 2050]),
    form=st.sampled_from(FORMS),
)
def test_every_printed_figure_is_read_back_as_it_is(key: str, value: float, year: int, form: str) -> None:
    metric = Metric.of(key, year, value)
    noun = {"jobs": " jobs", "permanent_jobs": " permanent jobs"}.get(key, "")
    text = form.format(label=metric.label, metric=metric, noun=noun, year=year)
    (read,) = mentions(text)
    assert (read.value, read.unit) == (pytest.approx(metric.value), metric.unit)
    assert read.year in (year, None) and (read.year == year or "):" in text)
    assert ungrounded(text, f"- {metric.label}: {metric} ({year})") == []
    assert ungrounded(text, f"- {metric.label}: {Metric.of(key, year, 1.2 * value + 3)} ({year})")


PIECES = [
    "1 ",
    "1,",
    "$5 ",
    "one hundred and ",
    "half a ",
    "2030-",
    "20",
    "½",
    "two thirds of ",
    "rises by 5% ",
    "\n",
    " ",
]
PIECES += [
    "between 5 and ",
    "solar ",
    "jobs ",
    "01/",
    "1:",
    "x-",
    "(1) ",
    "nearly ",
    "80% RE by 2040 ",
    "CO2 ",
    ".",
    "'",
]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=60).map("".join))
def test_no_text_is_too_odd_to_read(text: str) -> None:
    for m in mentions(text):
        assert 0 <= m.start < m.end <= len(text) and m.text and m.value == m.value
    assert all(miss.reason for miss in ungrounded(text, prompt_of("80% RE by 2040"), derived=True))
    assert ungrounded("We need 77 MW.", text) or "77" in text
    assert len(without_names(text, prompt_of("80% RE by 2040"))) == len(text) and years(text) <= set(range(1900, 2100))


@pytest.mark.parametrize("piece", PIECES)
def test_a_long_text_is_read_in_time_that_grows_with_its_length(piece: str) -> None:
    """A pattern that tries everything again at each place would need minutes for this."""
    text = (piece * 20_000)[:20_000]
    start = time.process_time()
    ungrounded(text, prompt_of("80% RE by 2040"), derived=True)
    assert time.process_time() - start < 30
