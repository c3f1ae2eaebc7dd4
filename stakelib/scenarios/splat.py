"""SPLAT exports: a long CSV, one row per technology, parameter, commodity and year; splat.yaml says what a row is."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from stakelib.run import CourseError
from stakelib.scenarios.names import country_key, name_key, plain, usual_spellings
from stakelib.scenarios.schema import KINDS, Technologies, re_share, unit_factor
from stakelib.scenarios.tables import NEXT, numbers, spelling_warnings
from stakelib.sheets import SHOWN, listed

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("Scenario", "Gx.Country", "Technology", "Par/Var", "Year", "Value", "Unit")
OPTIONAL = ("Tech.Description", "TechSetL1", "TechSetL2", "OutputCom", "Activity", "Source", "double")
STANDARD = {
    "capacity": "MW",
    "new": "MW",
    "output": "GWh",
    "curtailment": "GWh",
    "emissions": "Mt CO2",
    "investment": "m$",
    "om": "m$",
}
PLANTS = tuple(Technologies.model_fields)
CLASSES = (*PLANTS, "dummy", "fuel", "grid", "transmission", "demand", "curtailment")
BUILT = tuple(c for c in CLASSES if c != "dummy")
# what counts of each parameter; a cell of another row may hold anything
COUNTED = {
    "capacity": (*PLANTS, "demand"),
    "new": PLANTS,
    "output": (*PLANTS, "transmission", "curtailment"),
    "curtailment": CLASSES,
    "emissions": (*PLANTS, "fuel"),
    "investment": BUILT,
    "om": tuple(c for c in BUILT if c != "fuel"),
}
BESIDE = ("Value", "Source", "double")  # two rows that are equal in all other columns are the same figure
MILESTONES = (2025, 2030, 2040, 2050)
DERIVED = [
    "peak demand: Total Capacity of the demand row",
    "renewable share: from generation by category",
    "investment: lump-sum costs of every year so far",
    "additions: mean New Capacity per year",
]


class Mapping(BaseModel):
    """splat.yaml, or a planner's own copy of it."""

    model_config = ConfigDict(extra="forbid")
    rules: list[
        tuple[
            Literal["Technology", "Tech.Description", "TechSetL1", "TechSetL2", "OutputCom"],
            re.Pattern[str],
            Literal[CLASSES],
        ]
    ]
    electricity: re.Pattern[str]
    parameters: dict[str, Literal["ignored", *STANDARD]]
    units: dict[str, str] = {}

    @field_validator("rules", "electricity", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        """Upper and lower case are the same in every pattern."""
        if isinstance(value, list):
            return [[r[0], f"(?i){r[1]}", r[2]] if isinstance(r, list) and len(r) == 3 else r for r in value]
        return f"(?i){value}"


@functools.lru_cache(maxsize=4)
def _parsed(text: str) -> Mapping:
    return Mapping.model_validate(yaml.safe_load(text))


def read_mapping(path: str | Path | None = None) -> Mapping:
    """The mapping in `path`, else splat.yaml. Raises CourseError with every problem, each with file and place."""
    source = Path(path) if path else files(__package__).joinpath("splat.yaml")
    try:
        return _parsed(source.read_text(encoding="utf-8"))
    except ValidationError as error:
        problems = [f"{source.name}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems = [f"{source.name}: {' '.join(str(error).split())}"]
    raise CourseError(problems, "mend the mapping; stakelib/scenarios/splat.yaml is the pattern to follow.")


def read_splat(
    table: pd.DataFrame, name: str, years: Collection[int] | None, mapping: Mapping, decimal: str | None = None
) -> list[dict[str, Any]]:
    """One scenario, in the tool's JSON shape, per scenario and country of the file, at its milestone years.

    What no rule fits, what is left out and what does not add up stands in metadata.warnings of each.
    """
    given = list(table)
    table = table.apply(lambda column: _mapped(column, str.strip)).assign(**{c: "" for c in OPTIONAL if c not in given})
    parameters = {name_key(text): use for text, use in mapping.parameters.items()}
    table["use"] = _mapped(table["Par/Var"], lambda text: parameters.get(name_key(text)))
    table["class"] = _classes(table, mapping)
    names = table[["Gx.Country", "Scenario"]]
    nowhere = names.apply(lambda column: _mapped(column, lambda text: not plain(text).strip())).any(axis=1)
    lost = _lost("rows without scenario or country", table[nowhere])
    table, names = table[~nowhere], names[~nowhere]
    countries = usual_spellings(names["Gx.Country"], country_key)
    scenarios = usual_spellings(names["Scenario"], name_key)
    table = table.assign(
        **{"Gx.Country": names["Gx.Country"].map(countries), "Scenario": names["Scenario"].map(scenarios)}
    )
    uses = zip(table["use"], table["class"], _marked(table), strict=True)
    table["counts"] = [not marked and kind in COUNTED.get(use, ()) for use, kind, marked in uses]
    counted = table[table["counts"]]
    problems = _read_figures(table, counted, name, mapping, decimal)
    if not problems:
        table, problems = _once(table, given, name)
    if problems:
        raise CourseError(problems, NEXT)
    groups = [(*key, part) for key, part in table.groupby(["Scenario", "Gx.Country"], sort=False)]
    empty = [not (part["class"].isin(PLANTS) & part["use"].isin(("capacity", "output"))).any() for *_, part in groups]
    for scenario, country, part in itertools.compress(groups, empty):  # a power pool's trade, a name misspelt
        lost += _lost(f"rows of {country[:40]!r}, {scenario[:40]!r}, where no plant is,", part)
    if all(empty):
        unknown = table["Par/Var"][table["use"].isna()].unique()[:SHOWN]
        told = [f"parameter {text[:40]!r} is not in the mapping" for text in unknown]
        raise CourseError(
            [f"{name}: no capacity or output of a plant", *(f"{name}: {text}" for text in (*told, *lost))],
            "check that the rules and parameters of the mapping (stakelib/scenarios/splat.yaml) fit this file.",
        )
    return [
        _scenario(
            country,
            scenario,
            part,
            name,
            years,
            mapping,
            lost
            + spelling_warnings(list(names.loc[part.index].itertuples(index=False, name=None)), countries, scenarios),
        )
        for (scenario, country, part), none in zip(groups, empty, strict=True)
        if not none
    ]


def _mapped(column: pd.Series, function: Callable[[str], Any]) -> pd.Series:
    """`function` of every cell; each text is looked at once."""
    return column.map({text: function(text) for text in column.unique()})


def _marked(table: pd.DataFrame) -> pd.Series:
    """Whether the column 'double' says that a row stands elsewhere too."""
    return ~table["double"].isin(("", "0", "0.0"))


def _read_figures(
    table: pd.DataFrame, counted: pd.DataFrame, name: str, mapping: Mapping, decimal: str | None
) -> list[str]:
    """Puts year and value, in the standard unit, of the rows that count into `table`; returns what is wrong in them."""
    years, problems = numbers(counted["Year"], name, decimal, whole=True)
    values, bad = numbers(counted["Value"], name, decimal)
    factors, unknown = _factors(counted, name, mapping)
    table["Year"], table["value"] = years, values * factors
    return problems + bad + unknown


def _once(table: pd.DataFrame, given: list[str], name: str) -> tuple[pd.DataFrame, list[str]]:
    """The table without figures that come again, marked in the column "again"; and those that differ, as problems.

    A file without the column Activity or OutputCom cannot tell a plant's ways to run apart: there they are added up.
    """
    counted = table[table["counts"]]
    same = [c for c in given if c not in BESIDE]
    again = counted.duplicated(same)
    table = table.assign(again="")
    if not again.any():
        return table, []
    first = counted.groupby(same, sort=False, dropna=False)["value"].transform("first")
    other = again & (counted["value"] != first)
    table.loc[again[again & ~other].index, ["again", "counts"]] = ["equal", False]
    if {"Activity", "OutputCom"} <= set(given):
        at = counted[other]
        texts = zip(at.index, at["Technology"], at["Par/Var"], at["Year"], strict=True)
        return table, listed(
            name,
            [
                (row, f"{code[:40]}, {what}, {year:.0f}: stands above with another Value (two runs under one name?)")
                for row, code, what, year in texts
            ],
        )
    table.loc[other[other].index, "again"] = "other"
    return table, []


def _classes(table: pd.DataFrame, mapping: Mapping) -> pd.Series:
    """The class of each row by the first rule that fits, None where none does."""
    columns = ["Technology", "Tech.Description", "TechSetL1", "TechSetL2", "OutputCom"]
    kinds = table[columns].drop_duplicates()
    fitting = [
        next((c for column, pattern, c in mapping.rules if pattern.search(row[column])), None)
        for row in kinds.to_dict("records")
    ]
    return table[columns].merge(kinds.assign(found=fitting), on=columns, how="left")["found"].set_axis(table.index)


def _factors(table: pd.DataFrame, name: str, mapping: Mapping) -> tuple[pd.Series, list[str]]:
    """To the standard unit of each row's parameter, and the rows whose unit is unknown."""
    import pandas as pd

    @functools.cache
    def factor(use: str, unit: str) -> float | None:
        try:
            return unit_factor(mapping.units.get(unit.strip(), unit), STANDARD[use])
        except (KeyError, ValueError):  # not a parameter with a unit, or not a unit of it
            return None

    factors = pd.Series(map(factor, table["use"], table["Unit"]), table.index, dtype=float)
    bad = table[factors.isna() & table["use"].isin(STANDARD)]
    rows = zip(bad.index, bad["Unit"], bad["Par/Var"], strict=True)
    return factors, listed(name, [(row, f"Unit: {u[:40]!r} is not a unit of {p}") for row, u, p in rows])


def _lost(what: str, rows: pd.DataFrame) -> list[str]:
    """A warning about rows that are left out: how many, and the first of them."""
    return [f"{len(rows)} {what} left out, the first in row {rows.index[0]}"] if len(rows) else []


def _left_out(part: pd.DataFrame, electric: pd.Series) -> list[str]:
    """What is known of the rows that do not count, technology by technology."""
    found: list[str] = []
    for (code, text), rows in part[part["class"].isna()].groupby(["Technology", "Tech.Description"], sort=False):
        found += _lost(f"rows of {code[:40]!r} ({text[:60] or 'no description'}) fit no rule of the mapping:", rows)
    for parameter, rows in part[part["use"].isna()].groupby("Par/Var", sort=False):
        found += _lost(f"rows of the unknown parameter {parameter[:40]!r}", rows)
    other = part[part["class"].isin(PLANTS) & (part["use"] == "output") & ~electric]
    for commodity, rows in other.groupby("OutputCom", sort=False):
        found += _lost(f"outputs of plants on {commodity[:40]!r}, which is not electricity,", rows)
    more = [f"and {len(found) - SHOWN} more kinds of rows"] if len(found) > SHOWN else []
    return found[:SHOWN] + more


class _Sums:
    """Totals of one scenario by parameter, class and year."""

    def __init__(self, part: pd.DataFrame) -> None:
        self.table: dict[tuple[str, str], dict[int, float]] = {}
        values: dict[tuple[str, str, float], list[float]] = {}
        for use, kind, year, value in zip(part["use"], part["class"], part["Year"], part["value"], strict=True):
            values.setdefault((use, kind, year), []).append(value)
        for (use, kind, year), some in values.items():  # fsum: the order of rows changes no digit
            self.table.setdefault((use, kind), {})[int(year)] = math.fsum(some)

    def years(self, use: str, classes: Iterable[str]) -> set[int]:
        return {year for kind in classes for year in self.table.get((use, kind), ())}

    def total(self, use: str, classes: Iterable[str], *years: int) -> float | None:
        """Sum over classes and years; None where no year of the file has such a row: then it is unknown, not zero."""
        rows = [self.table[use, kind] for kind in classes if (use, kind) in self.table]
        return math.fsum(row.get(year, 0.0) for row in rows for year in years) if rows else None

    def mix(self, use: str, *years: int, per: int = 1) -> dict[str, float]:
        """By category; a model's file lists every plant, so that no fossil row means none."""
        found = {kind: self.total(use, techs, *years) for kind, techs in KINDS.items()}
        found |= {kind: found[kind] or 0.0 for kind in ("renewables", "fossil")}
        return {kind: value / per for kind, value in found.items() if value is not None}


def _scenario(
    country: str,
    scenario: str,
    part: pd.DataFrame,
    name: str,
    years: Collection[int] | None,
    mapping: Mapping,
    warnings: list[str],
) -> dict[str, Any]:
    double = _marked(part)
    warnings = warnings + _lost("rows with a mark in the column 'double'", part[double])
    warnings += _lost("rows that come twice", part[part["again"] == "equal"])
    if len(rows := part[part["again"] == "other"]):
        warnings.append(
            f"{len(rows)} rows are added to others that are equal but for Value, the first in row {rows.index[0]}"
        )
    part = part[~double]
    electric = _mapped(part["OutputCom"], lambda text: bool(mapping.electricity.search(text)))
    warnings += _left_out(part, electric)
    part, electric = part[part["counts"]], electric[part["counts"]]
    plant_output = part["class"].isin(PLANTS) & (part["use"] == "output")
    part = part[~plant_output | electric]
    charging = plant_output & (part["value"] < 0)  # pumps and exports take electricity: never negative generation
    sums = _Sums(part.assign(use=part["use"].mask(charging, "charging")))
    chosen, more = _milestone_years(sums, years, f"{name}: {country[:40]}, {scenario[:40]}")
    warnings += more + _balance(sums, chosen)
    if curtailed := sorted(sums.years("curtailment", CLASSES) | sums.years("output", ["curtailment"])):
        warnings.append(f"curtailment of {', '.join(map(str, curtailed))} is as reported; it may not be complete")
    fleet = {str(y): {t: sums.total("capacity", [t], y) for t in PLANTS} for y in chosen}
    metadata = {
        "country": country,
        "scenarioName": scenario,
        "modelVersion": "SPLAT",
        "sourceFile": name,
        "derived": DERIVED,
        "warnings": warnings or None,
    }
    return {
        "metadata": metadata,
        "detailedTech": fleet,
        "milestones": [_milestone(sums, y, chosen[i - 1] if i else None) for i, y in enumerate(chosen)],
    }


def _milestone_years(sums: _Sums, years: Collection[int] | None, where: str) -> tuple[list[int], list[str]]:
    """The years asked for, else the usual ones that the file has, else its first, middle and last."""
    known = sorted(sums.years("output", PLANTS) or sums.years("capacity", PLANTS))
    if not known:
        raise CourseError(f"{where}: plants without capacity and without electricity", NEXT)
    if missing := sorted(set(years or ()) - set(known)):
        raise CourseError(
            f"{where}: no data for {', '.join(map(str, missing))}", f"ask for years between {known[0]} and {known[-1]}."
        )
    chosen = sorted(set(years or set(MILESTONES) & set(known)))
    if years or len(chosen) > 1:
        return chosen, []
    chosen = sorted({known[0], known[len(known) // 2], known[-1]})
    return chosen, [f"milestone years {', '.join(map(str, chosen))}: the file has not the usual ones"]


def _balance(sums: _Sums, years: list[int]) -> list[str]:
    """Plants less pumping against the grid's input; beyond 1 % the mapping misses something or counts it twice."""
    found = []
    for year in years:
        made = (sums.total("output", PLANTS, year) or 0.0) + (sums.total("charging", PLANTS, year) or 0.0)
        sent = sums.total("output", ["transmission"], year)
        if sent and abs(made - sent) > 0.01 * sent:
            found.append(f"{year}: plants give {made:,.1f} GWh, transmission {sent:,.1f} GWh: check the mapping")
    return found


def _milestone(sums: _Sums, year: int, before: int | None) -> dict[str, Any]:
    output = sums.mix("output", year)
    plants = any(any(sums.table.get(("emissions", t), {}).values()) for t in PLANTS)
    burning = PLANTS if plants else (*PLANTS, "fuel")  # either may carry them; both would be twice
    curtailing = "curtailment" if year in sums.years("curtailment", CLASSES) else "output"
    first = min(sums.years("investment", BUILT) or {year})
    values = {
        "investment": ("cumulative", "m$", sums.total("investment", BUILT, *range(first, year + 1))),
        "emissions": ("total", "Mt CO2", sums.total("emissions", burning, year)),
        "peakDemand": ("value", "MW", sums.total("capacity", ["demand"], year)),
        "annualOMCosts": ("value", "m$", sums.total("om", COUNTED["om"], year)),
        "imports": ("value", "GWh", sums.total("output", ["interconnector"], year)),
    }
    techs = CLASSES if curtailing == "curtailment" else ["curtailment"]
    if year in sums.years(curtailing, techs):  # some years only: elsewhere it is unknown
        values["curtailment"] = ("value", "GWh", sums.total(curtailing, techs, year))
    milestone = {
        "year": year,
        "reShare": re_share(output),
        "generation": {"output": output, "unit": "GWh"},
        "capacity": {"total": sums.mix("capacity", year), "unit": "MW"},
    }
    milestone |= {key: {part: value, "unit": unit} for key, (part, unit, value) in values.items() if value is not None}
    if before and sums.years("new", PLANTS):
        additions = sums.mix("new", *range(before + 1, year + 1), per=year - before)
        milestone["capacityAdditions"] = {"additions": additions, "unit": "MW"}
    return milestone
