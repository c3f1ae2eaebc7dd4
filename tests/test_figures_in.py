"""Slips that people make in scenario files: each is refused, mended or told by name, and a right file is left alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from splat_file import HEADER, kestrelia, text_of, zebrina

from stakelib.dialogues import build, check, split
from stakelib.run import CourseError
from stakelib.scenarios import Scenario, country_key, country_profile, derive_metrics, load, name_key, sample
from stakelib.scenarios.doubts import doubts_of
from stakelib.sheets import write_sheet

TEMPLATE = files("stakelib.scenarios").joinpath("template.csv").read_text(encoding="utf-8")
HEAD = "country;scenario;year;quantity;value;unit\n"
FACTOR = "factor of 1,000"
BASE = kestrelia()
ROWS = build(sample(20, 3), mix=36)


def written(folder: Path, text: str, name: str = "mine.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    return path


def cells(rows: Iterable[tuple[int, str, str, str]], separator: str = ";") -> str:
    """A template of one scenario: year, quantity, value, unit."""
    return HEAD.replace(";", separator) + "".join(separator.join(("X", "S", str(y), *row)) + "\n" for y, *row in rows)


def warnings_of(path: Path, **options: Any) -> list[str]:
    return [w for s in load(path, **options) for w in s.metadata.warnings or []]


def as_json(folder: Path, milestones: list[dict], **more: Any) -> Path:
    meta = {"country": "X", "scenarioName": "S"}
    return written(folder, json.dumps({"metadata": meta, "milestones": milestones, **more}), "mine.json")


# ----------------------------------------------------------------------------------------- thousands or decimals


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_point_that_may_mark_thousands_is_refused_until_the_reader_says_what_it_is(
    separator: str, tmp_path: Path
) -> None:
    rows = [(2025, "capacity renewables", "800", "MW"), (2030, "capacity renewables", "1.400", "MW")]
    path = written(tmp_path, cells([*rows, (2040, "capacity renewables", "2.100", "MW")], separator))
    with pytest.raises(CourseError) as caught:
        load(path)
    assert [p.partition(": ")[2].split(":")[0] for p in caught.value.problems] == ["row 3", "row 4"]
    assert "1400" in caught.value.problems[0] and "decimal" in caught.value.problems[0]
    for decimal, expected in ((",", [800, 1400, 2100]), (".", [800, 1.4, 2.1])):
        (scenario,) = load(path, decimal=decimal)
        assert [m.capacity.total.renewables for m in scenario.milestones] == expected
    assert any(FACTOR in w for w in warnings_of(path, decimal="."))


def test_other_cells_of_the_column_or_the_comma_settle_it(tmp_path: Path) -> None:
    rows = [(2025, "capacity renewables", "0.5", "GW"), (2030, "capacity renewables", "1.400", "GW")]
    for text in (cells(rows), cells(rows[1:], ",")):
        (scenario,) = load(written(tmp_path, text))
        assert scenario.milestones[-1].capacity.total.renewables == 1400
    with pytest.raises(CourseError, match="row 2: value: '0.5'"):
        load(written(tmp_path, cells(rows)), decimal=",")


@pytest.mark.parametrize(
    ("cell", "value"),
    [("1.234.567", 1234567), ("1.400,5", 1400.5), ("1 400", 1400), ("1\u202f400,25", 1400.25), ("12,5", 12.5)],
)
def test_with_a_decimal_comma_all_marks_of_thousands_are_read(cell: str, value: float, tmp_path: Path) -> None:
    path = written(tmp_path, cells([(2030, "capacity renewables", cell, "kW")]))
    assert load(path, decimal=",")[0].milestones[0].capacity.total.renewables == pytest.approx(value / 1000)
    with pytest.raises(CourseError, match="row 2"):
        load(path)


def test_the_same_holds_for_a_model_export(tmp_path: Path) -> None:
    table = [
        r | {"Value": f"{r['Value'] * 100:,.0f}".replace(",", ".")} for r in BASE if r["Par/Var"] != "Capacity Factor"
    ]
    text = text_of(table).replace(";", " ").replace('"E_Blue River, stage 1 (H)"', "E_Blue River").replace(",", ";")
    path = written(tmp_path, text)
    with pytest.raises(CourseError, match="row .*Value.*decimal"):
        load(path)
    right = [r | {"Value": round(r["Value"] * 100)} for r in BASE if r["Par/Var"] != "Capacity Factor"]
    expected = load(written(tmp_path, text_of(right), "right.csv"))[0].milestones
    assert load(path, decimal=",")[0].milestones == expected


def test_decimal_is_no_option_where_it_means_nothing(tmp_path: Path) -> None:
    path = as_json(tmp_path, [{"year": 2030, "reShare": 60}])
    for decimal in (",", "."):
        with pytest.raises(CourseError, match="decimal"):
            load(path, decimal=decimal)
    with pytest.raises(CourseError, match="decimal"):
        load(written(tmp_path, TEMPLATE), decimal="dot")


# ----------------------------------------------------------------------------------------- shares as fractions


@pytest.mark.parametrize("shares", [(0.38, 0.62, 1), (0, 0.2, 0.5), (1,), (0.38,)])
def test_shares_as_fractions_are_refused(shares: tuple[float, ...], tmp_path: Path) -> None:
    rows = [(2025 + 5 * i, "re_share", str(share), "%") for i, share in enumerate(shares)]
    milestones = [{"year": y, "reShare": float(value)} for y, _, value, _ in rows]
    for path in (written(tmp_path, cells(rows)), as_json(tmp_path, milestones)):
        with pytest.raises(CourseError, match="fractions.*percent"):
            load(path)


def test_small_shares_that_are_percent_load(tmp_path: Path) -> None:
    mixed = [{"year": 2025, "reShare": 0.4}, {"year": 2030, "reShare": 12.0}]
    generation = {"output": {"renewables": 4, "fossil": 996}, "unit": "GWh"}
    for milestones in (
        mixed,
        [{"year": 2025, "reShare": 0.4, "generation": generation}],
        [{"year": 2025, "reShare": 0}],
    ):
        assert load(as_json(tmp_path, milestones))
    assert load(written(tmp_path, cells([(2030, "re_share", "38%", "%")])))[0].milestones[0].reShare == 38
    write_sheet(tmp_path / "mine.xlsx", [("X", "S", "2030", "re_share", "38%", "%")], HEAD.strip().split(";"))
    assert load(tmp_path / "mine.xlsx")[0].milestones[0].reShare == 38


# ----------------------------------------------------------------------------------------- a factor near 1,000


def scaled(use: str, factor: float) -> str:
    return text_of([r | ({"Value": r["Value"] * factor} if use in str(r["Par/Var"]) else {}) for r in BASE + zebrina()])


@pytest.mark.parametrize("use", ["Total Capacity", "Output", "CO2 Emissions"])
@pytest.mark.parametrize("factor", [1000, 0.001])
def test_a_wrong_unit_in_a_model_export_is_told(use: str, factor: float, tmp_path: Path) -> None:
    path = written(tmp_path, scaled(use, factor))
    assert any(FACTOR in w for w in warnings_of(path))
    assert not any(FACTOR in w for w in warnings_of(written(tmp_path, scaled(use, 1))))


def tool_file() -> dict[str, Any]:
    milestone = {
        "capacity": {"total": {"renewables": 900, "fossil": 300, "storage": 110, "other": 0}, "unit": "MW"},
        "generation": {"output": {"renewables": 3400, "fossil": 1200}, "unit": "GWh"},
        "emissions": {"total": 0.9, "unit": "Mt CO2"},
        "investment": {"cumulative": 1200, "unit": "m$"},
        "peakDemand": {"value": 850, "unit": "MW"},
        "annualOMCosts": {"value": 40, "unit": "m$"},
        "curtailment": {"value": 90, "unit": "GWh"},
        "imports": {"value": 400, "unit": "GWh"},
    }
    fleet = {"hydro": 400, "solarPV": 300, "wind": 200, "gas": 300, "battery": 110}
    return {
        "milestones": [{"year": 2030, **milestone}, {"year": 2040, **milestone}],
        "detailedTech": {"2030": fleet, "2040": fleet},
    }


SLIPS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "capacity in MW called GW": lambda d: [m["capacity"].update(unit="GW") for m in d["milestones"]],
    "capacity in MW called kW": lambda d: [m["capacity"].update(unit="kW") for m in d["milestones"]],
    "output in GWh called TWh": lambda d: d["milestones"][0]["generation"].update(unit="TWh"),
    "output in GWh called MWh": lambda d: d["milestones"][0]["generation"].update(unit="MWh"),
    "kt called Mt": lambda d: d["milestones"][1]["emissions"].update(total=900),
    "Mt called kt": lambda d: d["milestones"][1]["emissions"].update(unit="kt CO2"),
    "k$ called m$": lambda d: d["milestones"][0]["investment"].update(cumulative=1_200_000),
    "O&M in k$": lambda d: d["milestones"][0]["annualOMCosts"].update(value=40_000),
    "peak in GW": lambda d: d["milestones"][0]["peakDemand"].update(value=0.85),
    "peak in kW": lambda d: d["milestones"][0]["peakDemand"].update(value=850_000),
    "curtailment in MWh": lambda d: d["milestones"][0]["curtailment"].update(value=90_000),
    "imports in MWh": lambda d: d["milestones"][0]["imports"].update(value=400_000),
    "fleet in GW": lambda d: d["detailedTech"].update({"2040": {"hydro": 0.7, "wind": 0.2, "gas": 0.3}}),
    "one kind of the fleet in GW": lambda d: d["detailedTech"]["2040"].update(gas=0.3),
    "one kind of capacity in GW": lambda d: d["milestones"][0]["capacity"]["total"].update(fossil=0.3),
    "one kind of output in TWh": lambda d: d["milestones"][0]["generation"]["output"].update(fossil=1.2),
    "no output, and kt called Mt": lambda d: [
        m.pop("generation") and m["emissions"].update(total=900) for m in d["milestones"]
    ],
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_figure_that_is_off_by_a_thousand_is_told_with_its_year(slip: str, tmp_path: Path) -> None:
    data = tool_file()
    assert not warnings_of(as_json(tmp_path, **data))
    data = json.loads(json.dumps(data))
    SLIPS[slip](data)
    found = [w for w in warnings_of(as_json(tmp_path, **data)) if FACTOR in w]
    assert found and all(w.startswith(("2030: ", "2040: ")) for w in found)


def test_other_misfits_are_told_without_a_factor(tmp_path: Path) -> None:
    data = tool_file()
    data["detailedTech"]["2030"] = {"hydro": 400}
    data["milestones"][1]["generation"]["output"]["fossil"] = 4000
    told = warnings_of(as_json(tmp_path, **data))
    assert any("detailedTech adds up to 400 MW" in w for w in told)
    assert any("fossil plants of 300 MW give 4,000 GWh" in w for w in told)
    assert not any(FACTOR in w for w in told)


def test_believable_scenarios_raise_no_doubt() -> None:
    doubts = [(s.metadata.country, doubt) for s in sample(150, 5) for doubt in doubts_of(s)]
    assert not [text for text in doubts if "peak demand is above" not in text[1]]


# ----------------------------------------------------------------------------------------- two spellings

ALIKE = [
    ("Kenya", "KENYA", "kenya ", "Ken\u200bya", "Republic of Kenya"),
    ("Cote d'Ivoire", "Côte d’Ivoire", "CÔTE D`IVOIRE", "Co\u0302te d'Ivoire", "Ivory Coast", "Cote d Ivoire"),
    ("Tanzania", "United Republic of Tanzania", "TANZANIA, UNITED REPUBLIC OF"),
    ("DRC", "Democratic Republic of the Congo", "Congo, Dem. Rep.", "DR  Congo"),
    ("Cabo Verde", "Cape\u00a0Verde"),
    ("Eswatini", "Swaziland", "eSwatini"),
    ("Lao PDR", "Laos", "Lao People's Democratic Republic", "Lao P.D.R."),
    ("Viet Nam", "Vietnam"),
    ("Gambia", "The Gambia", "Gambia, The"),
    ("Guinea-Bissau", "Guinea Bissau"),
]


def test_a_country_without_a_profile_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, told in (("DRC", True), ("Atlantis", True), ("IVORY COAST", False), ("Kenya", False)):
        load(written(tmp_path, f"{HEAD}{name};S;2030;re_share;50;%\n"))
        assert (f"{name} is not in countries.json" in capsys.readouterr().out) is told


@pytest.mark.parametrize("names", ALIKE, ids=lambda names: names[0])
def test_spellings_and_names_of_one_country_have_one_key_and_profile(names: tuple[str, ...]) -> None:
    assert len({country_key(name) for name in names}) == 1
    assert all(country_profile(name) == country_profile(names[0]) for name in names)


def test_other_countries_and_scenarios_keep_their_own_key() -> None:
    firsts = [names[0] for names in ALIKE]
    others = ["Congo", "Niger", "Nigeria", "Guinea", "Dominica", "Dominican Republic", "Равнина", "日本", "?", "!"]
    assert len({country_key(name) for name in firsts + others}) == len(firsts) + len(others)
    assert all(a != b for a, b in pairwise(map(name_key, ("High RE", "High RE+", "High-RE", "RE 5%", "RE -5%"))))


def other_name(name: str) -> str:
    table = json.loads(files("stakelib.scenarios").joinpath("countries.json").read_text(encoding="utf-8"))
    return table["other names"].get(name, [name])[0]


@pytest.mark.parametrize("spell", [str.upper, str.lower, other_name, lambda name: f" {name}\u200b "])
def test_one_country_never_stands_in_train_and_test_under_two_spellings(spell: Callable[[str], str]) -> None:
    again = [r.model_copy(update={"country": spell(r.country), "scenario_id": f"{r.scenario_id}-b"}) for r in ROWS]
    for seed in range(20):
        parts: dict[str, set[str]] = {}
        for row, new in zip(ROWS + ROWS, split(ROWS + again, seed), strict=True):
            parts.setdefault(row.country, set()).add(new.split)
        assert all(part == {"test"} or "test" not in part for part in parts.values())


def test_the_gate_on_leakage_sees_through_spellings() -> None:
    rows = split(ROWS)
    train, test = (next(r for r in rows if r.split == part) for part in ("train", "test"))
    for spelling in (train.country.upper(), f"{train.country} "):
        prompt = test.prompt.replace(f"- Country: {test.country}", f"- Country: {spelling}")
        with pytest.raises(CourseError, match="test country also in"):
            check([train, test.model_copy(update={"country": spelling, "prompt": prompt})])


def test_two_spellings_in_a_template_are_joined_and_told(tmp_path: Path) -> None:
    text = HEAD + "".join(
        f"{country};{scenario};{year};re_share;{share};%\n"
        for country, scenario, year, share in [
            ("Tanzania", "High RE", 2030, 50),
            ("tanzania", "High\u00a0RE", 2040, 60),
            ("United Republic of Tanzania", "High  RE", 2050, 70),
            ("Tanzania", "Low", 2030, 20),
        ]
    )
    high, low = load(written(tmp_path, text))
    assert (high.metadata.country, high.metadata.scenarioName) == ("Tanzania", "High RE")
    assert [m.year for m in high.milestones] == [2030, 2040, 2050] and not low.metadata.warnings
    told = "\n".join(high.metadata.warnings)
    assert all(repr(name) in told for name in ("tanzania", "United Republic of Tanzania", "High\u00a0RE", "High  RE"))
    assert derive_metrics(high).get("re_share", "near").value == 50


def test_two_spellings_in_a_model_export_are_joined_and_told(tmp_path: Path) -> None:
    expected = load(written(tmp_path, text_of(BASE)))[0]
    table = [
        r | {"Gx.Country": "KESTRELIA", "Scenario": "Base\u00a0"} if str(r["Technology"]).startswith("KQWD") else r
        for r in BASE
    ]
    (scenario,) = load(written(tmp_path, text_of(table)))
    assert scenario.milestones == expected.milestones and scenario.metadata.country == "Kestrelia"
    assert {"'KESTRELIA'", "'Base'"} <= {word for w in scenario.metadata.warnings for word in w.split()}


def test_two_spellings_in_a_list_of_json_scenarios(tmp_path: Path) -> None:
    def item(country: str, name: str, share: float) -> dict[str, Any]:
        return {
            "metadata": {"country": country, "scenarioName": name},
            "milestones": [{"year": 2030, "reShare": share}],
        }

    items = [item("Kenya", "A", 50), item("KENYA", "B", 60), item("Kenya", "a", 50), item("Kenya", "A", 70)]
    loaded = load(written(tmp_path, json.dumps(items)))
    names = [(s.metadata.country, s.metadata.scenarioName, s.milestones[0].reShare) for s in loaded]
    assert names == [("Kenya", "A", 50), ("Kenya", "B", 60), ("Kenya", "A", 70)]
    told = ["\n".join(s.metadata.warnings or []) for s in loaded]
    assert "twice" in told[0] and "'KENYA'" in told[1] and "other figures" in told[2]


def test_a_key_that_comes_twice_in_json_is_refused(tmp_path: Path) -> None:
    text = '{"milestones": [{"year": 2030, "reShare": 50, "reShare": 60}], "metadata": {}}'
    with pytest.raises(CourseError, match="'reShare' comes twice"):
        load(written(tmp_path, text))


# ----------------------------------------------------------------------------------------- spreadsheets' habits

LINES = TEMPLATE.splitlines()
HABITS: dict[str, list[str]] = {
    "empty columns at the end": [line + ",," for line in LINES],
    "rows of blanks": [*LINES[:5], ",,,,,", " , , , , , ", *LINES[5:], ",,,,,"],
    "a title and an empty line": ["Scenarios of the ministry,,,,,", "", *LINES],
    "an empty line first": ["", *LINES],
    "the separator's own line": ["sep=,", *LINES],
    "one cell more": [LINES[0], *(line + "," for line in LINES[1:])],
    "headings in capitals": [LINES[0].upper(), *LINES[1:]],
    "quantities in capitals": [line.replace("capacity fossil", "Capacity  FOSSIL") for line in LINES],
}


@pytest.mark.parametrize("habit", HABITS)
def test_what_spreadsheets_add_changes_nothing(habit: str, tmp_path: Path) -> None:
    (expected,) = load(written(tmp_path, TEMPLATE))
    (scenario,) = load(written(tmp_path, "\r\n".join(HABITS[habit])))
    assert (scenario.milestones, scenario.detailedTech) == (expected.milestones, expected.detailedTech)
    assert scenario.metadata == expected.metadata


def test_rows_are_named_as_the_spreadsheet_counts_them(tmp_path: Path) -> None:
    lines = ["A title", "", *LINES[:3], ",,,,,", LINES[3].replace("360", "many")]
    with pytest.raises(CourseError, match="row 7: value: 'many'"):
        load(written(tmp_path, "\n".join(lines)))


def test_a_workbook_is_read_like_the_csv_file(tmp_path: Path) -> None:
    for text in (TEMPLATE, text_of([r for r in BASE if "," not in str(r["Tech.Description"])])):
        head, *body = [line.split(",") for line in text.splitlines()]
        write_sheet(tmp_path / "mine.xlsx", body, head)
        a, b = load(written(tmp_path, text))[0], load(tmp_path / "mine.xlsx")[0]
        assert (a.milestones, a.detailedTech) == (b.milestones, b.detailedTech)
        (tmp_path / "mine.xlsx").replace(tmp_path / "mine.csv")  # what it is decides, not its name
        assert load(tmp_path / "mine.csv")[0].milestones == a.milestones


@pytest.mark.parametrize("cell", ["", "EPS", "n/a", "1.2.3"])
def test_only_rows_that_count_must_hold_numbers(cell: str, tmp_path: Path) -> None:
    expected = load(written(tmp_path, text_of(BASE)))[0].milestones
    idle = [
        r | {"Value": cell, "Year": "", "Unit": "?"} if r["Par/Var"] in ("Capacity Factor", "Fuel Costs") else r
        for r in BASE
    ]
    supply = [r | {"Value": cell} if "Supply" in str(r["TechSetL2"]) else r for r in idle]
    twin = [r | {"Value": cell} if r["Technology"] == "KQWDLCZ001" else r for r in BASE]
    assert load(written(tmp_path, text_of(supply)))[0].milestones == expected
    with pytest.raises(CourseError, match="Value"):
        load(written(tmp_path, text_of(twin)))


def test_parameters_in_capitals_are_read_and_unknown_ones_named(tmp_path: Path) -> None:
    expected = load(written(tmp_path, text_of(BASE)))[0].milestones
    capitals = [r | {"Par/Var": str(r["Par/Var"]).upper()} for r in BASE]
    assert load(written(tmp_path, text_of(capitals)))[0].milestones == expected
    with pytest.raises(CourseError, match="'Puissance installée'"):
        load(written(tmp_path, text_of([r | {"Par/Var": "Puissance installée"} for r in BASE])))


def test_the_order_of_rows_changes_no_digit(tmp_path: Path) -> None:
    assert len(HEADER) > 20
    one, other = (load(written(tmp_path, text_of(t)))[0] for t in (BASE, BASE[::-1]))
    assert one.milestones == other.milestones and one.detailedTech == other.detailedTech


# ----------------------------------------------------------------------------------------- what is no text


def half(text: str) -> str:
    """JSON in which @ stands for half a character, as JavaScript's slice leaves it."""
    return text.replace("@", "\\ud83d")


@pytest.mark.parametrize(
    "text",
    [
        '{"metadata": {"country": "K@", "scenarioName": "B"}, "milestones": [{"year": 2030}]}',
        '{"metadata": {"country": "K", "scenarioName": "@"}, "milestones": [{"year": 2030}]}',
        '{"metadata": {"country": "K", "scenarioName": "B", "@": 1}, "milestones": [{"year": 2030}]}',
        '{"metadata": {"country": "K", "scenarioName": "B", "derived": ["@"]}, "milestones": [{"year": 2030}]}',
        '{"metadata": {"country": "K", "scenarioName": "B"}, "milestones": [], "detailedTech": {"@": {}}}',
        '{"metadata": {"country": "K", "scenarioName": "B"}, "milestones": [{"capacity": {"@": [{"@": "@"}]}}]}',
        '{"metadata": {"country": "K@", "scenarioName": "B"}, "capacity": {"byYear": {"2030": {"hydro@": 1}}}}',
    ],
)
def test_half_characters_are_refused_by_place(text: str, tmp_path: Path) -> None:
    with pytest.raises(CourseError, match="half a character") as caught:
        load(written(tmp_path, half(text), "mine.json"))
    assert str(caught.value).encode("utf-8") and all(p.startswith("mine.json: ") for p in caught.value.problems)
    whole = half(text.replace("@", "@\\ude00"))  # both halves: an emoji
    try:
        load(written(tmp_path, whole, "mine.json"))
    except CourseError as error:
        assert "half" not in str(error)


ODD = "\u202eK\u200be\x07n\u2066y\ufeffa\u2069\x1b[31m\u2028\x85!"


def test_names_and_notes_lose_what_no_reader_sees(tmp_path: Path) -> None:
    meta = {"country": ODD, "scenarioName": f"A\x00{ODD}", "description": ODD, "warnings": [ODD], "derived": [ODD]}
    data = {"metadata": meta, "milestones": [{"year": 2030, "reShare": 50}]}
    (scenario,) = load(written(tmp_path, json.dumps(data), "mine.json"))
    text = scenario.model_dump_json()
    assert text.isprintable() and scenario.metadata.country == "Ke nya [31m !"
    csv = HEAD + "Ke\x07nya\u202e;S\x1b;2030;re_share;50;%\n"
    assert load(written(tmp_path, csv))[0].metadata.country == "Ke nya"
    assert Scenario.model_validate_json(text) == scenario
