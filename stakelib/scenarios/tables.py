"""CSV files: what all of them share, and the course's own template.

template.csv is an example to fill in: one row per year and quantity, with the columns country, scenario, year,
quantity, value and unit. A quantity is re_share, investment (cumulative), emissions, peak_demand, om_costs,
curtailment, imports; or capacity, generation, additions (MW per year) followed by renewables, fossil, storage or
other; or a technology of the schema (installed capacity). What has no row is unknown, not zero. Units: units.json.
"""

from __future__ import annotations

import io
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import yaml

from stakelib.run import CourseError
from stakelib.scenarios.schema import KINDS, Technologies, re_share, unit_factor

if TYPE_CHECKING:
    import pandas as pd

NEXT = "mend the rows named above and load the file again."
SHOWN = 20  # problems of one kind that are listed one by one
COLUMNS = ("country", "scenario", "year", "quantity", "value", "unit")
_TABLES = yaml.safe_load(files(__package__).joinpath("quantities.yaml").read_text(encoding="utf-8"))
# quantity in the template: (standard unit, field of a milestone, field in it)
QUANTITIES = {name: tuple(row) for name, row in _TABLES["single"].items()}
QUANTITIES |= {f"{name} {kind}": tuple(row) for name, row in _TABLES["by category"].items() for kind in KINDS}
QUANTITIES |= {tech: ("MW", "", "") for tech in Technologies.model_fields}


def read_table(text: str, name: str) -> pd.DataFrame:
    """All cells as text, blank rows gone, columns stripped; the index is the row in the file, the header being row 1.

    The separator is whichever of comma, semicolon and tab the header has most of. Raises CourseError for rows of
    another length than the header's and for columns that come twice.
    """
    import pandas as pd

    head = text[:5000].partition("\n")[0]
    try:
        cells = pd.read_csv(
            io.StringIO(text),
            sep=max(",;\t", key=head.count),
            header=None,
            dtype=str,
            keep_default_na=False,
            skip_blank_lines=False,
        )
    except (ValueError, OverflowError) as error:
        raise CourseError(f"{name}: not a readable table ({' '.join(str(error).split())[:200]})", NEXT) from error
    cells.index += 1
    header = [str(cell).strip() for cell in cells.iloc[0]]
    table = cells.iloc[1:].set_axis(header, axis=1)
    table = table[~(table.isna() | (table == "")).all(axis=1)]
    problems = [f"{name}: row 1: column {c!r} comes twice" for c in sorted({c for c in header if header.count(c) > 1})]
    short = table.index[table.isna().any(axis=1)]
    problems += listed(name, [(row, "has fewer cells than the header") for row in short])
    if problems:
        raise CourseError(problems, NEXT)
    return table


def listed(name: str, found: list[tuple[Any, str]]) -> list[str]:
    """Problems as lines with file and row; after the first SHOWN only how many more there are."""
    more = [f"{name}: and {len(found) - SHOWN} more rows like these"] if len(found) > SHOWN else []
    return [f"{name}: row {row}: {text}" for row, text in found[:SHOWN]] + more


def numbers(table: pd.DataFrame, column: str, name: str, whole: bool = False) -> tuple[pd.Series, list[str]]:
    """The column as finite numbers (`whole`: years), and what is wrong with it; a wrong cell becomes NaN."""
    import pandas as pd

    text = table[column].str.strip()
    values = pd.to_numeric(text, errors="coerce").astype(float)
    good = values.abs() < 1e15
    if whole:
        good &= values.between(1000, 9999) & (values % 1 == 0)
    kind = "a year" if whole else "a number"
    bad = [(row, f"{column}: {cell[:30]!r} is not {kind}") for row, cell in text[~good].items()]
    return values.where(good), listed(name, bad)


def read_template(table: pd.DataFrame, name: str) -> list[dict[str, Any]]:
    """Scenarios of the course's template, in the tool's JSON shape: one row per year and quantity."""
    years, problems = numbers(table, "year", name, whole=True)
    values, bad = numbers(table, "value", name)
    found: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    rows: list[tuple[Any, str]] = []
    columns = (table[c].str.strip() for c in ("country", "scenario", "quantity", "unit"))
    for row, year, value, country, scenario, quantity, unit in zip(table.index, years, values, *columns, strict=True):
        if quantity not in QUANTITIES:
            rows.append((row, f"quantity: {quantity[:40]!r} is not one of {', '.join(QUANTITIES)}"))
            continue
        try:
            standard = QUANTITIES[quantity][0]
            factor = unit_factor(unit, standard) if standard != "%" else {"%": 1}[unit]
        except (KeyError, ValueError):
            rows.append((row, f"unit: {unit[:40]!r} does not measure {quantity} (which is in {standard})"))
            continue
        if year != year or value != value:  # NaN: already a problem
            continue
        known = found.setdefault((country, scenario), {}).setdefault(int(year), {})
        if quantity in known:
            rows.append((row, f"{quantity} of {int(year)} comes twice"))
        known[quantity] = value * factor
    if problems := problems + bad + listed(name, rows):
        raise CourseError(problems, NEXT)
    return [_scenario(country, scenario, by_year) for (country, scenario), by_year in found.items()]


def _scenario(country: str, scenario: str, by_year: dict[int, dict[str, float]]) -> dict[str, Any]:
    fleet = {str(y): {q: v for q, v in row.items() if q in Technologies.model_fields} for y, row in by_year.items()}
    derived, milestones = [], []
    for year, row in sorted(by_year.items()):
        milestone: dict[str, Any] = {"year": year}
        for quantity, value in row.items():
            unit, field, part = QUANTITIES[quantity]
            if not part:
                milestone |= {field: value} if field else {}
                continue
            measured = milestone.setdefault(field, {"unit": unit})
            kind = quantity.partition(" ")[2]
            measured |= {part: measured.get(part, {}) | {kind: value}} if kind else {part: value}
        share = re_share(milestone.get("generation", {}).get("output", {}))
        if "reShare" not in milestone and share is not None:
            milestone["reShare"] = share
            derived.append(f"renewable share of {year}: from generation by category")
        milestones.append(milestone)
    metadata = {
        "country": country,
        "scenarioName": scenario,
        "modelVersion": "CSV template",
        "derived": derived or None,
    }
    out = {"metadata": metadata, "milestones": milestones}
    return out | {"detailedTech": fleet} if any(fleet.values()) else out
