"""Tables of scenarios: what all of them share, and the course's own template.

template.csv is an example to fill in: one row per year and quantity, with the columns country, scenario, year,
quantity, value and unit. A quantity is re_share, investment (cumulative), emissions, peak_demand, om_costs,
curtailment, imports; or capacity, generation, additions (MW per year) followed by renewables, fossil, storage or
other; or a technology of the schema (installed capacity). What has no row is unknown, not zero. Units: units.json.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from stakelib.run import CourseError
from stakelib.scenarios.names import country_key, name_key, plain, respelt, usual_spellings
from stakelib.scenarios.schema import KINDS, Technologies, re_share, unit_factor
from stakelib.sheets import listed, parse_sheet, read_sheet

if TYPE_CHECKING:
    import pandas as pd

NEXT = "mend the rows named above and load the file again."
COLUMNS = ("country", "scenario", "year", "quantity", "value", "unit")
_TABLES = yaml.safe_load(files(__package__).joinpath("quantities.yaml").read_text(encoding="utf-8"))
# quantity in the template: (standard unit, field of a milestone, field in it)
QUANTITIES = {name: tuple(row) for name, row in _TABLES["single"].items()}
QUANTITIES |= {f"{name} {kind}": tuple(row) for name, row in _TABLES["by category"].items() for kind in KINDS}
QUANTITIES |= {tech: ("MW", "", "") for tech in Technologies.model_fields}
_QUANTITY = {name_key(name): name for name in QUANTITIES}
# a number: with a decimal point; with a decimal comma, and points, blanks or apostrophes between thousands
_POINT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_COMMA = re.compile(
    r"[+-]?([0-9]{1,3}(?P<mark>[. '’\u00a0\u202f])[0-9]{3}((?P=mark)[0-9]{3})*|[0-9]+)(,[0-9]*)?([eE][+-]?[0-9]+)?"
)
_DOUBTFUL = re.compile(r"[+-]?[1-9][0-9]{0,2}(\.[0-9]{3})+")


def read_table(
    path: Path, text: str | None, *columns: Collection[str], optional: Collection[str] = ()
) -> tuple[pd.DataFrame, str | None]:
    """The cells, as text, of the CSV file `text` or of the workbook at `path`; and the decimal sign of its numbers.

    That is "." in a workbook and where commas separate the cells; elsewhere the file does not say it, hence None.
    """
    if text is None:
        return read_sheet(path, *columns, optional=optional), "."
    head = next((line for line in text.splitlines()[:100] if any(_names(line, some) for some in columns)), text[:5000])
    decimal = "." if max(",;\t", key=head.count) == "," else None
    text = re.sub("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", " ", text)
    return parse_sheet(text, path.name, *columns, optional=optional), decimal


def _names(line: str, columns: Collection[str]) -> bool:
    return all(column.casefold() in line.casefold() for column in columns)


def numbers(
    cells: pd.Series, name: str, decimal: str | None = None, whole: bool = False
) -> tuple[pd.Series, list[str]]:
    """The cells as finite numbers (`whole`: years), and what is wrong with them; a wrong cell becomes NaN.

    `decimal`: "." or ","; None where the file does not say: then 1.400, which may mean 1400 as well as 1.4, is a
    problem, unless another cell shows what a point is.
    """
    import pandas as pd

    texts = [cell.strip() for cell in cells]
    read = {text: _number(text, decimal, whole) for text in set(texts)}
    values = pd.Series([read[text] for text in texts], cells.index, dtype=float)
    points = {text for text, value in read.items() if "." in text and value == value and not whole}
    doubtful = points if decimal is None and all(map(_DOUBTFUL.fullmatch, points)) else ()
    kind, rows = "a year" if whole else "a number", []
    for row, text in zip(cells.index, texts, strict=True):
        if text in doubtful:
            told = f'may be {text.replace(".", "")} or {read[text]:g}; say which: load(..., decimal=",") or decimal="."'
        elif read[text] == read[text]:
            continue
        elif decimal != "," and "," in text and _COMMA.fullmatch(text):
            told = f'is not {kind}; where the comma marks decimals: load(..., decimal=",")'
        else:
            told = f"is not {kind}"
        rows.append((row, f"{cells.name}: {text[:30]!r} {told}"))
    return values, listed(name, rows)


def _number(text: str, decimal: str | None, whole: bool) -> float:
    """A finite number below 1e15, or a year; NaN for anything else."""
    if not (_COMMA if decimal == "," else _POINT).fullmatch(text):
        return float("nan")
    if decimal == ",":
        text = re.sub(r"[^0-9eE,+-]", "", text).replace(",", ".")
    value = float(text)
    good = 1000 <= value <= 9999 and value % 1 == 0 if whole else abs(value) < 1e15
    return value if good else float("nan")


def read_template(table: pd.DataFrame, name: str, decimal: str | None = None) -> list[dict[str, Any]]:
    """Scenarios of the course's template, in the tool's JSON shape: one row per year and quantity."""
    table = table.apply(lambda column: column.str.strip())
    years, problems = numbers(table["year"], name, decimal, whole=True)
    shares = table["value"].where(table["unit"] != "%", table["value"].str.rstrip("% "))  # 38% in a cell of its own
    values, bad = numbers(shares, name, decimal)
    found: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    seen: dict[tuple[str, str], list[tuple[str, str]]] = {}
    rows: list[tuple[Any, str]] = []
    countries = usual_spellings(table["country"], country_key)
    scenarios = usual_spellings(table["scenario"], name_key)
    columns = (table[c] for c in ("country", "scenario", "quantity", "unit"))
    for row, year, value, country, scenario, said, unit in zip(table.index, years, values, *columns, strict=True):
        if empty := [what for what, text in (("country", country), ("scenario", scenario)) if not plain(text).strip()]:
            rows.append((row, f"{empty[0]}: must not be empty"))
        quantity = _QUANTITY.get(name_key(said))
        if quantity is None:
            rows.append((row, f"quantity: {said[:40]!r} is not one of {', '.join(QUANTITIES)}"))
            continue
        try:
            standard = QUANTITIES[quantity][0]
            factor = unit_factor(unit, standard) if standard != "%" else {"%": 1}[unit]
        except (KeyError, ValueError):
            rows.append((row, f"unit: {unit[:40]!r} does not measure {quantity} (which is in {standard})"))
            continue
        if year != year or value != value:  # NaN: already a problem
            continue
        key = (countries[country], scenarios[scenario])
        seen.setdefault(key, []).append((country, scenario))
        known = found.setdefault(key, {}).setdefault(int(year), {})
        if quantity in known:
            rows.append((row, f"{quantity} of {int(year)} comes twice"))
        known[quantity] = value * factor
    if problems := problems + bad + listed(name, rows):
        raise CourseError(problems, NEXT)
    return [
        _scenario(country, scenario, by_year, spelling_warnings(seen[country, scenario], countries, scenarios))
        for (country, scenario), by_year in found.items()
    ]


def spelling_warnings(
    names: Collection[tuple[str, str]], countries: dict[str, str], scenarios: dict[str, str]
) -> list[str]:
    """Warnings of one scenario, of whose rows `names` are country and scenario as they are written."""
    return [
        *respelt("country", countries, (country for country, _ in names)),
        *respelt("scenario", scenarios, (scenario for _, scenario in names)),
    ]


def _scenario(country: str, scenario: str, by_year: dict[int, dict[str, float]], warnings: list[str]) -> dict[str, Any]:
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
        "warnings": warnings or None,
    }
    out = {"metadata": metadata, "milestones": milestones}
    return out | {"detailedTech": fleet} if any(fleet.values()) else out
