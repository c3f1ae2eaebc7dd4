"""What load() makes of SPLAT exports, the CSV template, the guide's older JSON and units; the tool's own figures."""

from __future__ import annotations

import copy
import json
import math
import os
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from splat_file import HEADER, kestrelia, line, rows, text_of, zebrina

from stakelib.run import CourseError
from stakelib.scenarios import Scenario, derive_metrics, explain, load, scenario_id
from stakelib.scenarios.metrics import METRICS, TECH
from stakelib.scenarios.schema import unit_factor, units
from stakelib.scenarios.splat import read_mapping
from stakelib.scenarios.tables import QUANTITIES

BASE, ZEBRA, HIGH = kestrelia(), zebrina(), kestrelia("high", 16.0)
TEMPLATE = files("stakelib.scenarios").joinpath("template.csv").read_text(encoding="utf-8")
OLD = {
    "metadata": {"country": "Oldland", "scenarioName": "Sun First"},
    "capacity": {
        "byYear": {
            "2040": {"solarPV": 800, "windOnshore": 150, "windOffshore": 50, "hydro": 100, "gas": 0},
            "2030": {"solarPV": 200, "windOnshore": 100, "hydro": 100, "gas": 150},
        }
    },
    "investment": {"total": 1800},
    "emissions": {"byYear": {"2025": 4.0, "2045": 1.0}},
}


def written(tmp_path: Path, content: object, name: str = "any.dat") -> Path:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8", newline="")
    return path


def edited_mapping(tmp_path: Path, **changes: object) -> Path:
    """A copy of splat.yaml with some of its parts replaced."""
    table = yaml.safe_load(files("stakelib.scenarios").joinpath("splat.yaml").read_text(encoding="utf-8"))
    return written(tmp_path, yaml.safe_dump(table | changes), "mapping.yaml")


def rules() -> list[list[str]]:
    return yaml.safe_load(files("stakelib.scenarios").joinpath("splat.yaml").read_text(encoding="utf-8"))["rules"]


def warned(scenario: Scenario, text: str) -> list[str]:
    return [w for w in scenario.metadata.warnings or [] if text in w]


def sent(table: list[dict], year: int) -> float:
    return sum(
        r["Value"]
        for r in table
        if r["Technology"].endswith("EL00T00") and r["Year"] == year and r["Par/Var"] == "Output"
    )


# ---------------------------------------------------------------------------------------------------- SPLAT exports


def test_what_would_be_silently_wrong_is_refused(tmp_path: Path) -> None:
    """A technology of another name, a fleet table of some plants only, options that mean nothing for the file."""
    mix = {"capacity": {"total": {"renewables": 700, "fossil": 300}, "unit": "MW"}}
    item = {"metadata": {"country": "Kenya", "scenarioName": "Own"}, "milestones": [{"year": 2030, **mix}]}
    path = tmp_path / "own.json"

    def share(fleet: dict[str, float]) -> float | None:
        path.write_text(json.dumps(item | {"detailedTech": {"2030": fleet}}), encoding="utf-8")
        found = derive_metrics(load(path)[0]).get("vre_share", "near")
        return found and found.value

    assert share({"solarPV": 500, "wind": 200, "naturalGas": 300}) == 70.0
    assert share({"solarPV": 500, "wind": 200}) is None
    with pytest.raises(CourseError, match="tidal"):
        share({"solarPV": 500, "wind": 200, "gas": 300, "tidal": 5})
    with pytest.raises(CourseError, match="no SPLAT export"):
        load(path, years=[2030])


def test_the_same_file_under_another_name_is_the_same_scenario() -> None:
    one = Scenario.model_validate(
        {
            "metadata": {"country": "Kenya", "scenarioName": "Own", "sourceFile": "a.csv"},
            "milestones": [{"year": 2030, "reShare": 60}],
        }
    )
    two = one.model_copy(deep=True)
    two.metadata.sourceFile = "b.csv"
    assert scenario_id(one) == scenario_id(two)
    two.milestones[0].reShare = 61
    assert scenario_id(one) != scenario_id(two)


def test_splat_scenarios_and_countries_come_back_separately(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    loaded = load(written(tmp_path, text_of(BASE + ZEBRA + HIGH)))
    names = [(s.metadata.country, s.metadata.scenarioName) for s in loaded]
    assert names == [("Kestrelia", "base"), ("Zebrina", "base"), ("Kestrelia", "high")]
    assert [[m.year for m in s.milestones] for s in loaded] == [[2025, 2030, 2040]] * 3
    alone = load(written(tmp_path, text_of(ZEBRA)))[0]
    assert loaded[1].milestones == alone.milestones and loaded[1].detailedTech == alone.detailedTech
    printed = capsys.readouterr().out
    assert all(w in printed for s in loaded for w in s.metadata.warnings)


def test_splat_figures_by_hand(tmp_path: Path) -> None:
    scenario = load(written(tmp_path, text_of(BASE)))[0]
    _, m, last = scenario.milestones  # 2030: six years after 2024
    fleet = {"hydro": 100 + 30, "wind": 80, "solarPV": 58, "solarCSP": 6, "diesel": 34, "pumpStorage": 12}
    assert scenario.detailedTech[2030].model_dump(exclude_none=True) == fleet | {"interconnector": 62}
    assert m.capacity.total.model_dump() == {"renewables": 274, "fossil": 34, "storage": 12, "other": 62}
    energy = {"renewables": 400 + 120 + 240 + 18 + 6 * 14.4 + 24, "fossil": 56, "storage": 18, "other": 30}
    assert m.generation.output.model_dump() == pytest.approx(energy)
    assert m.reShare == pytest.approx(100 * energy["renewables"] / (energy["renewables"] + 56 + 30))
    new = 5 + 10 + 8 + 1 + 2 + 2  # MW a year at 2 m$ per MW, and 1 m$ a year of transmission
    assert m.investment.cumulative == pytest.approx(7 * (2 * new + 1))
    assert m.emissions.total == pytest.approx((56 - 2.8 * 6) / 1000)
    assert m.peakDemand.value == 180 and m.imports.value == 30
    assert m.capacityAdditions.additions.model_dump() == {"renewables": 24, "fossil": 0, "storage": 2, "other": 2}
    assert m.annualOMCosts.value == pytest.approx(0.01 * (sum(fleet.values()) + 62))
    assert last.capacityAdditions.additions.renewables == 24
    assert scenario.milestones[0].curtailment.value == 7 and m.curtailment is None  # unknown, not zero; once, not twice
    assert warned(scenario, "curtailment of 2024, 2025 is as reported")
    assert scenario.metadata.modelVersion == "SPLAT" and "peak demand" in scenario.metadata.derived[0]


@pytest.mark.parametrize("table", [BASE, ZEBRA, HIGH], ids=["Kestrelia", "Zebrina", "high"])
def test_plants_sum_to_transmission(tmp_path: Path, table: list[dict]) -> None:
    scenario = load(written(tmp_path, text_of(table)), years=range(2024, 2041))[0]
    assert not warned(scenario, "check the mapping") and len(scenario.milestones) == 17
    pumped = {r["Year"]: r["Value"] for r in table if r["Activity"] == 2 and r["OutputCom"] == "Electricity/Secondary"}
    for m in scenario.milestones:
        plants = sum(gwh for _, gwh in m.generation.output) + pumped.get(m.year, 0)
        assert plants == pytest.approx(sent(table, m.year), rel=0.01)
        assert plants < sent(table, m.year)  # by the unmapped plant


def test_counting_fuel_in_tj_breaks_the_sum(tmp_path: Path) -> None:
    wrong = [["TechSetL2", "^RE Supply$", "hydro"], *rules()]
    mapping = edited_mapping(tmp_path, rules=wrong, electricity=".")
    right, twin = (load(written(tmp_path, text_of(BASE)), mapping=m)[0] for m in (None, mapping))
    assert len(warned(twin, "check the mapping")) == 3 and not warned(right, "check the mapping")
    assert twin.milestones[1].generation.output.renewables > 2 * right.milestones[1].generation.output.renewables


def test_without_the_dummy_rules_storage_appears_that_is_not_there(tmp_path: Path) -> None:
    mapping = edited_mapping(tmp_path, rules=[r for r in rules() if r[2] != "dummy"])
    right, twin = (load(written(tmp_path, text_of(BASE)), mapping=m)[0] for m in (None, mapping))
    assert right.milestones[0].capacity.total.storage == 2 and twin.milestones[0].capacity.total.storage == 142


def test_rows_that_come_twice_count_once(tmp_path: Path) -> None:
    right = load(written(tmp_path, text_of(BASE)))[0]
    of_one = [r for r in BASE if r["Technology"] == "KQHYRO_Blue"]
    capacity = [r | {"Source": "again"} for r in BASE if r["Par/Var"] == "Total Capacity"]
    for more in (
        of_one,
        BASE,
        capacity,
        [r | {"Value": f"{r['Value']:.3f}", "Technology": "KQHYRO_Blue "} for r in of_one],
    ):
        scenario = load(written(tmp_path, text_of(BASE + more)))[0]
        assert scenario.milestones == right.milestones and scenario.detailedTech == right.detailedTech
        assert len(warned(scenario, "come twice")) == 1 and not warned(scenario, "check the mapping")
    marked = BASE + [r | {"double": "1", "Value": 7} for r in of_one]
    scenario = load(written(tmp_path, text_of(marked)))[0]
    assert scenario.milestones == right.milestones
    assert len(warned(scenario, "'double'")) == 1


def test_two_runs_under_one_name_are_refused(tmp_path: Path) -> None:
    again = [r | {"Scenario": "Base"} for r in HIGH]  # another run, and its name in another case
    with pytest.raises(CourseError, match="two runs under one name") as caught:
        load(written(tmp_path, text_of(BASE + again), "two.csv"))
    rows_named = [p for p in caught.value.problems if p.startswith("two.csv: row ")]
    assert len(rows_named) >= 20 and all(int(p.split()[2].rstrip(":")) > 1 + len(BASE) for p in rows_named)
    # without the column Activity a plant's ways to run look alike: they are added up, and that is said
    text = "\n".join(",".join(str(r[c]) for c in HEADER if c not in ("Activity", "Tech.Description")) for r in BASE)
    head = ",".join(c for c in HEADER if c not in ("Activity", "Tech.Description"))
    scenario = load(written(tmp_path, f"{head}\n{text}"))[0]
    assert warned(scenario, "are added to others")


def test_what_no_rule_fits_is_listed(tmp_path: Path) -> None:
    odd = rows("Kestrelia", "base", "KQHEAT1", "Heat pump", "Other > Diesel PP", "Output", line(5, 0), "Heat/Final")
    odd += rows("Kestrelia", "base", "KQDSRC00", "Generic", "Other > Diesel PP", "Water Use", line(5, 0))
    odd += [r | {"Gx.Country": " "} for r in BASE[:4]]
    pool = {"Gx.Country": "Pool", "Technology": "POOL", "Tech.Description": "", "TechSetL1": "", "TechSetL2": "Trade"}
    odd += [r | pool for r in BASE[:2]]
    (scenario,) = load(written(tmp_path, text_of(BASE + odd)))
    assert len(warned(scenario, "'KQTDST01' (Tidal stream) fit no rule")) == 1
    assert warned(scenario, "outputs of plants on 'Heat/Final'") and warned(scenario, "parameter 'Water Use'")
    assert warned(scenario, "4 rows without scenario or country")
    assert warned(scenario, "2 rows of 'Pool', 'base', where no plant is")
    assert scenario.milestones == load(written(tmp_path, text_of(BASE)))[0].milestones
    own = [["Technology", "^KQTDST", "hydro"], *rules()]  # a planner who counts tidal power as hydro says so
    mended = load(written(tmp_path, text_of(BASE)), mapping=edited_mapping(tmp_path, rules=own))[0]
    assert not warned(mended, "Tidal") and mended.detailedTech[2030].hydro == scenario.detailedTech[2030].hydro + 1


@pytest.mark.parametrize(
    ("code", "text", "sets", "expected"),
    [
        ("XXPHS001", "Pumped Hydro Storage", "", "pumpStorage"),
        ("XXH2T001", "Hydrogen turbine", "", None),
        ("XXQQ0001", "Windhoek Diesel", "", "diesel"),
        ("XXQQ0001", "Biogas", "", "biomass"),
        ("XXQQ0001", "Reserve margin", "", None),
        ("XXQQ0001", "Residential Distribution", "", "grid"),
        ("XXQQ0001", "Refinery residue", "", None),
        ("KEHYDM_Fall", "", "", "hydro"),
        ("ZMSOTNZ001", "", "", "solarCSP"),
        ("XXQQ0001", "Bagasse cogeneration", "Other RE > Biomass PP", "biomass"),
        ("XXQQ0001", "anything", "Fossil&Nuclear PP > LPG PP", None),
        ("XXQQ0001", "anything", "Fossil&Nuclear PP > OCGT PP", "gas"),
        ("XXQQ0001", "", "Non Hydro Storage > Unheard of", None),
        ("XXHY00X00", "Supply of Hydro", "", "fuel"),
    ],
)
def test_rules_take_the_set_before_the_code_before_the_words(
    code: str, text: str, sets: str, expected: str | None
) -> None:
    l1, _, l2 = sets.partition(" > ")
    row = {"Technology": code, "Tech.Description": text, "TechSetL1": l1, "TechSetL2": l2, "OutputCom": ""}
    fitting = [c for column, pattern, c in read_mapping().rules if pattern.search(row[column])]
    assert (fitting[0] if fitting else None) == expected


def test_milestone_years(tmp_path: Path) -> None:
    path = written(tmp_path, text_of(BASE))
    assert [m.year for m in load(path, years=[2033, 2026])[0].milestones] == [2026, 2033]
    with pytest.raises(CourseError, match="no data for 2050"):
        load(path, years=[2030, 2050])
    late = [r for r in BASE if 2031 <= r["Year"] <= 2039]
    scenario = load(written(tmp_path, text_of(late)))[0]
    assert [m.year for m in scenario.milestones] == [2031, 2035, 2039] and warned(scenario, "has not the usual ones")


def test_splat_problems_name_the_row(tmp_path: Path) -> None:
    bad = copy.deepcopy(BASE)
    bad[0]["Value"], bad[1]["Year"], bad[2]["Unit"], bad[3]["Value"] = "12,5", "20x5", "PS", "inf"
    with pytest.raises(CourseError) as caught:
        load(written(tmp_path, text_of(bad), "mine.csv"))
    text = "\n".join(caught.value.problems)
    for part in ("row 2: Value: '12,5'", "row 3: Year: '20x5'", "row 4: Unit: 'PS'", "row 5: Value: 'inf'"):
        assert f"mine.csv: {part}" in text
    assert len(caught.value.problems) == 4


def test_a_wrong_mapping_is_named(tmp_path: Path) -> None:
    data = written(tmp_path, text_of(BASE))
    for change in (
        {"rules": [["TechSetL2", "(", "hydro"]]},
        {"rules": [["TechSetL2", "x", "sunlight"]]},
        {"parameters": {"Output": "power"}},
        {"colour": "green"},
    ):
        with pytest.raises(CourseError, match="mapping.yaml"):
            load(data, mapping=edited_mapping(tmp_path, **change))
    with pytest.raises(CourseError, match="none.yaml"):
        load(data, mapping=tmp_path / "none.yaml")
    with pytest.raises(CourseError, match="no capacity or output of a plant"):
        load(data, mapping=edited_mapping(tmp_path, rules=[["TechSetL2", ".", "grid"]]))


def test_the_same_content_in_another_dress(tmp_path: Path) -> None:
    expected = load(written(tmp_path, text_of(BASE)))[0].milestones
    text = text_of(BASE)
    assert '"E_Blue River, stage 1 (H)"' in text  # a comma in quotes moves no column
    blanks = text.replace("\nbase,", "\n base ,", 9)
    for other in (
        text_of(BASE, "\r\n"),
        blanks,
        "\ufeff" + text,
        text + "\n\n",
        text.replace(",ktons,", ",kt,"),
        "\n".join([text.splitlines()[0], *reversed(text.splitlines()[1:])]),
    ):
        found = load(written(tmp_path, other))[0].milestones
        for a, b in zip(found, expected, strict=True):  # the order of rows moves the last digit of sums
            assert a.investment.cumulative == pytest.approx(b.investment.cumulative)
            assert a.generation.output.model_dump() == pytest.approx(b.generation.output.model_dump())
    few = ["Scenario", "Gx.Country", "Technology", "TechSetL2", "Par/Var", "OutputCom", "Year", "Value", "Unit"]
    cells = [[str(r[c]) for c in few] for r in BASE if "," not in str(r["Tech.Description"])]
    assert set(few) < set(HEADER) and load(written(tmp_path, "\n".join(";".join(c) for c in [few, *cells])))


# ------------------------------------------------------------------------------------- the template, the older JSON


def test_the_template_loads_and_says_what_it_says(tmp_path: Path) -> None:
    (scenario,) = load(written(tmp_path, TEMPLATE))
    first, second = scenario.milestones
    assert (scenario.metadata.country, first.reShare, first.emissions.total) == ("Exampleland", 38, pytest.approx(1.9))
    assert second.capacity.total.model_dump() == {"renewables": 900, "fossil": 300, "storage": 110, "other": None}
    assert second.investment.cumulative == 1200 and second.reShare == pytest.approx(68)
    assert scenario.metadata.derived == ["renewable share of 2030: from generation by category"]
    assert first.generation is None and scenario.detailedTech[2030].coal is None  # unknown, not zero
    assert {x.key for x in derive_metrics(scenario).shown()} >= {"jobs", "land", "vre_share", "emission_cut"}


def test_the_template_holds_two_scenarios_and_names_rows(tmp_path: Path) -> None:
    other = TEMPLATE + "\n".join(r.replace("Steady", "Fast") for r in TEMPLATE.splitlines()[1:])
    assert [s.metadata.scenarioName for s in load(written(tmp_path, other))] == ["Steady Sun", "Fast Sun"]
    lines = TEMPLATE.splitlines()
    lines[2] = lines[2].replace("MW", "GWh")
    lines[3] = lines[3].replace("capacity fossil", "capacity magic")
    lines[5] = lines[5].replace("150", "many")
    lines.append(lines[6])
    with pytest.raises(CourseError) as caught:
        load(written(tmp_path, "\n".join(lines), "own.csv"))
    found = [p.split(": ")[1] for p in caught.value.problems]
    assert sorted(found) == sorted(["row 6", "row 3", "row 4", f"row {len(lines)}"])
    assert set(TECH.values()) < set(QUANTITIES)


def test_the_guides_json_is_converted_and_says_how(tmp_path: Path) -> None:
    (scenario,) = load(written(tmp_path, OLD))
    first, last = scenario.milestones
    assert (first.year, last.year, scenario.detailedTech[2040].wind) == (2030, 2040, 200)
    energy = {t: mw * 8.76 * cf for t, mw, cf in [("pv", 200, 0.19), ("wind", 100, 0.33), ("hydro", 100, 0.45)]}
    gas = 150 * 8.76 * 0.45
    assert first.generation.output.fossil == pytest.approx(gas)
    assert first.reShare == pytest.approx(100 * sum(energy.values()) / (sum(energy.values()) + gas))
    assert first.investment is None and last.investment.cumulative == 1800
    assert (first.emissions.total, last.emissions.total) == pytest.approx((3.25, 1.75))
    assert first.capacity.total.storage is None and first.peakDemand is None and last.reShare == 100
    derived = "; ".join(scenario.metadata.derived)
    for word in ("generation", "solarPV 0.19", "renewable share", "investment", "between 2025, 2045"):
        assert word in derived
    both = load(written(tmp_path, [OLD, json.loads(json.dumps(OLD).replace("Oldland", "Otherland"))]))
    assert [s.metadata.country for s in both] == ["Oldland", "Otherland"]


def test_the_guides_json_knows_what_it_does_not_know(tmp_path: Path) -> None:
    sparse = copy.deepcopy(OLD)
    sparse["capacity"]["byYear"]["2030"] |= {"nuclear": 100}
    sparse["emissions"] = {"byYear": {"2035": 2.0}}
    del sparse["investment"]
    first, last = load(written(tmp_path, sparse))[0].milestones
    assert first.reShare is None and first.emissions is None and last.emissions is None and last.investment is None
    for wrong, field in [({"fusion": 1}, "'fusion'"), ({"solarPV": -1}, "solarPV"), ({"solarPV": "many"}, "solarPV")]:
        bad = copy.deepcopy(OLD)
        bad["capacity"]["byYear"]["2030"] = wrong
        with pytest.raises(CourseError, match=field):
            load(written(tmp_path, bad))


def test_doubts_are_said_and_change_nothing(tmp_path: Path) -> None:
    data = {
        "metadata": {"country": "A", "scenarioName": "B"},
        "milestones": [
            {
                "year": 2025,
                "reShare": 50,
                "generation": {"output": {"renewables": 40, "fossil": 60}, "unit": "GWh"},
                "investment": {"cumulative": 900, "unit": "m$"},
            },
            {
                "year": 2030,
                "capacity": {"total": {"renewables": 50, "fossil": 60}, "unit": "MW"},
                "peakDemand": {"value": 500, "unit": "MW"},
                "investment": {"cumulative": 800, "unit": "m$"},
                "emissions": {"total": 20_000, "unit": "Mt CO2"},
            },
        ],
    }
    scenario = load(written(tmp_path, data))[0]
    for text in ("stated as 50 %, its generation gives 40.0", "peak demand is above", "below that", "20,000 Mt CO2"):
        assert warned(scenario, text)
    assert scenario.milestones[0].reShare == 50
    plain = scenario.model_copy(update={"metadata": scenario.metadata.model_copy(update={"warnings": None})})
    assert scenario_id(plain) == scenario_id(scenario)
    again = load(written(tmp_path, scenario.model_dump_json()))[0]
    assert again == scenario  # its own output loads, and nothing is said twice


# ------------------------------------------------------------------------------------------------------------ units


@given(st.data())
def test_known_units_in_any_spacing_and_case(data: st.DataObject) -> None:
    standard = data.draw(st.sampled_from([u for u in units() if u != "Mt CO2"]))
    name = data.draw(st.sampled_from(sorted(units()[standard])))
    spaced = "".join(c + data.draw(st.sampled_from(["", " ", "_"])) for c in name)
    spelled = data.draw(st.sampled_from([spaced, spaced.upper(), spaced.lower()]))
    assert unit_factor(spelled, standard) == units()[standard][name] > 0


@given(st.text(max_size=12), st.sampled_from(sorted(units())))
def test_any_text_is_a_unit_or_an_error(text: str, standard: str) -> None:
    try:
        factor = unit_factor(text, standard)
    except ValueError as error:
        assert standard in str(error)
    else:
        assert factor in units()[standard].values() and math.isfinite(factor)


def test_units_by_hand() -> None:
    assert unit_factor("TJ", "GWh") == pytest.approx(1 / 3.6) and unit_factor("kWh", "GWh") == 1e-6
    assert unit_factor("kt CO2", "Mt CO2") == unit_factor("ktons", "Mt CO2") == unit_factor("ktCO₂", "Mt CO2") == 1e-3
    assert unit_factor("million USD", "m$") == 1 and unit_factor("B$", "m$") == 1000
    for text, standard in [("mt", "Mt CO2"), ("MT", "Mt CO2"), ("Mt CO2e", "Mt CO2"), ("MW", "GWh"), ("", "MW")]:
        with pytest.raises(ValueError, match="is not known for"):
            unit_factor(text, standard)


# ------------------------------------------------------------------------------------------- metrics, the tool's too


def test_every_metric_explains_itself() -> None:
    keys = [*METRICS, "construction_jobs", "operations_jobs", "fossil_share"]
    table = [explain(key) for key in keys]
    assert all(set(row) == {"metric", "label", "unit", "formula", "inputs", "source"} for row in table)
    assert all(len(value) > 1 or row["unit"] == value == "%" for row in table for value in row.values())
    assert explain("jobs")["unit"] == "jobs" and "factors.json" in explain("land")["source"]


def test_tool_mode_by_hand() -> None:
    fleet = {
        "hydro": 100,
        "solarPV": 200,
        "solarCSP": 50,
        "wind": 50,
        "coal": 10,
        "gas": 90,
        "nuclear": 5,
        "battery": 0,
        "pumpStorage": 40,
        "interconnector": 20,
    }
    total = {"renewables": 400, "fossil": 100, "storage": 40, "other": 25}
    milestones = [
        {
            "year": 2030,
            "reShare": 61.25,
            "capacity": {"total": total, "unit": "MW"},
            "emissions": {"total": 2.0, "unit": "Mt CO2"},
        },
        {"year": 2040, "capacity": {"total": total, "unit": "MW"}, "emissions": {"total": 1.5, "unit": "Mt CO2"}},
    ]
    data = {"metadata": OLD["metadata"], "milestones": milestones, "detailedTech": {"2030": fleet}}
    found = derive_metrics(Scenario.model_validate(data), mode="tool").figures
    work = 100 * 12 + 200 * 10 + 50 * 8 + 10 * 4 + 5 * 10 + 20 * 5  # neither gas nor CSP nor pumped storage
    posts = 100 * 0.5 + 200 * 0.3 + 50 * 0.4 + 10 * 0.8 + 5 * 0.7 + 20 * 0.05
    expected = {
        "construction_jobs": work,
        "operations_jobs": 143,
        "jobs": 3933,
        "land": 200 * 2 + 50 * 0.3 + 40 * 0.1,
        "vre_share": 44.2,
        "fossil_share": 17.7,
        "re_share": 61.3,
        "emission_cut": 0,
    }
    assert work == 3790 and posts == pytest.approx(142.5)  # half goes up
    assert {k: m.value for (k, y), m in found.items() if y == 2030} == expected
    # no fleet in 2040: 40/30/20/5/5 % of renewables, 20/50/15/15 % of fossil, storage is batteries, other is nuclear
    work = 400 * (4.8 + 3 + 1.6 + 0.3 + 0.4) + 100 * (0.8 + 2 + 0.45 + 0.45) + 40 * 3 + 25 * 10
    assert found["construction_jobs", 2040].value == math.floor(work + 0.5) == 4780
    assert found["vre_share", 2040].value == round(100 * 200 / 565, 1) and found["emission_cut", 2040].value == 25
    assert ("re_share", 2040) not in found and str(found["fossil_share", 2030]) == "17.7%"


SAMPLE = Path(os.environ.get("STAKE_TOOL_SAMPLE", "none"))


@pytest.mark.skipif(not SAMPLE.is_file(), reason="STAKE_TOOL_SAMPLE names no file (the tool's own sample)")
def test_tool_mode_equals_the_tool_on_its_own_sample() -> None:
    (scenario,) = load(SAMPLE)
    found = derive_metrics(scenario, mode="tool").figures
    oracle = {
        "construction_jobs": (5430, 10210, 19265, 28355),
        "operations_jobs": (324, 435, 777, 1110),
        "jobs": (5754, 10645, 20042, 29465),
        "land": (206, 836, 1988, 3144),
        "vre_share": (16.1, 39.5, 53.9, 58.7),
        "fossil_share": (43.7, 19.6, 3.5, 0.7),
        "emission_cut": (0, 35.8, 73, 93),
    }
    for key, values in oracle.items():
        assert tuple(found[key, y].value for y in (2025, 2030, 2040, 2050)) == values
    assert derive_metrics(scenario).get("jobs", "near").value != 10645  # the course counts new capacity only
