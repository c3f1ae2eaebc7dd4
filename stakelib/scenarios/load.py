"""Read scenarios: the Scenario Dialogue Tool's JSON, the guide's older JSON, SPLAT's CSV, the course's CSV template."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from stakelib.run import CourseError
from stakelib.scenarios.doubts import doubts_of, fractions
from stakelib.scenarios.guide import from_guide
from stakelib.scenarios.names import country_key, country_profile, name_key, plain, respelt, usual_spellings
from stakelib.scenarios.schema import Scenario, Technologies
from stakelib.scenarios.splat import COLUMNS, OPTIONAL, read_mapping, read_splat
from stakelib.scenarios.tables import COLUMNS as TEMPLATE
from stakelib.scenarios.tables import read_table, read_template
from stakelib.sheets import is_workbook, read_text

NEXT = "mend the fields named above (schema: metadata, milestones[], detailedTech) and load the file again."
UNCOUNTED = {"warnings", "sourceFile", "dateCreated", "description"}  # a file sent again is the same scenario
OBJECT, LIST = "must be an object in braces {}", "must be a list in brackets []"
SAID = {  # kind of problem -> what to tell, where the validator's own words are for programmers
    "missing": "is missing",
    "extra_forbidden": f"is not one of {', '.join(Technologies.model_fields)}",
    "model_type": OBJECT,
    "model_attributes_type": OBJECT,
    "dict_type": OBJECT,
    "list_type": LIST,
    "too_short": "must not be empty",
    "string_pattern_mismatch": "is not a year",
    "string_too_long": "is too long",
    "int_type": "must be a whole number",
}


def load(
    path: str | Path,
    years: Collection[int] | None = None,
    mapping: str | Path | None = None,
    decimal: Literal[".", ","] | None = None,
) -> list[Scenario]:
    """Scenarios of a file, whatever its name ends in; units become MW, GWh, m$ and Mt CO2.

    JSON: one scenario or a list, in the tool's shape or the guide's older one. CSV or an Excel workbook: a SPLAT export
    (`years`: its milestone years; `mapping`: a copy of splat.yaml) or the template (template.csv). `decimal`: the
    decimal sign of a CSV file; "." if not given, and where 1.400 may mean 1400, the file is refused until it is.
    metadata.derived says what was assumed, metadata.warnings what was left out or looks odd; warnings are printed too.
    Raises CourseError with every problem found, each with file and row or field.
    """
    path = Path(path)
    if decimal not in (".", ",", None):
        raise CourseError(f"decimal is {decimal!r}", 'write decimal="." or decimal=",".')
    text = None if is_workbook(path) else read_text(path)
    if text is not None and re.match(r"\s*[\[{]", text):
        data = _read_json(path, text)
        items = data if isinstance(data, list) else [data]
        _refuse(path, years, mapping, decimal)
    else:
        items = _read_sheet(path, text, years, mapping, decimal)
    scenarios, problems = [], [] if items else [f"{path.name}: the list is empty"]
    for number, item in enumerate(items, 1):
        where = f"{path.name}: scenario {number}" if len(items) > 1 else path.name
        try:
            scenarios.append(Scenario.model_validate(from_guide(item) if _is_guide(item) else item))
            problems += [f"{where}: {text}" for text in fractions(scenarios[-1])]
        except ValidationError as error:
            problems += [f"{where}: {_field(e['loc'])}: {_told(e)}" for e in error.errors(include_url=False)]
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise CourseError(problems, NEXT)
    scenarios = _named_once(scenarios)
    for scenario in scenarios:
        meta = scenario.metadata
        meta.warnings = list(dict.fromkeys([*(meta.warnings or []), *doubts_of(scenario)])) or None
        for warning in meta.warnings or []:
            print(f"{path.name}: {meta.country}, {meta.scenarioName}: {warning}")
    for country in dict.fromkeys(s.metadata.country for s in scenarios):
        if not country_profile(country):
            print(f"{path.name}: {country} is not in countries.json: its power pool is unknown, its context 'emerging'")
    return scenarios


def _read_json(path: Path, text: str) -> Any:
    try:
        data = json.loads(text, parse_constant=_refuse_constant, parse_int=_whole, object_pairs_hook=_once)
    except RecursionError as error:
        raise CourseError(f"{path.name}: not valid JSON (nested too deeply)", "export the scenario again.") from error
    except ValueError as error:
        raise CourseError(f"{path.name}: not valid JSON ({error})", "export the scenario again.") from error
    if halves := [
        f"{path.name}: {_field(place)}: holds half a character (such as \\ud83d)" for place in _half_characters(data)
    ]:
        raise CourseError(halves[:20], "write these texts again; a program has cut a sign, such as an emoji, in two.")
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        twice = next(key for at, (key, _) in enumerate(pairs) if key in dict(pairs[:at]))
        raise ValueError(f"{twice[:60]!r} comes twice in one object")
    return out


def _whole(digits: str) -> int | float:
    """Python refuses to read whole numbers of more than 4,300 digits."""
    return int(digits) if len(digits) < 40 else float(digits)


def _half_characters(data: Any) -> Iterator[tuple[int | str, ...]]:
    """Places of texts and keys that no file in UTF-8 can hold; a stack, because the nesting may be deep."""
    stack: list[tuple[tuple[int | str, ...], Any]] = [((), data)]
    while stack:
        place, value = stack.pop()
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            yield place
        elif isinstance(value, dict):
            stack += [((*place, key), key) for key in value] + [((*place, key), item) for key, item in value.items()]
        elif isinstance(value, list):
            stack += [((*place, at), item) for at, item in enumerate(value)]


def _is_guide(item: Any) -> bool:
    capacity = item.get("capacity") if isinstance(item, dict) and "milestones" not in item else None
    return isinstance(capacity, dict) and "byYear" in capacity


def _read_sheet(
    path: Path, text: str | None, years: Collection[int] | None, mapping: str | Path | None, decimal: str | None
) -> list[dict[str, Any]]:
    table, sign = read_table(path, text, TEMPLATE, COLUMNS, optional=OPTIONAL)
    if set(COLUMNS) <= set(table.columns):
        return read_splat(table, path.name, years, read_mapping(mapping), decimal or sign)
    _refuse(path, years, mapping, None)
    return read_template(table, path.name, decimal or sign)


def _refuse(path: Path, years: Collection[int] | None, mapping: str | Path | None, decimal: str | None) -> None:
    """Options that would have no effect are an error, not a silence."""
    if years or mapping:
        raise CourseError(f"{path.name} is no SPLAT export", "leave years and mapping out.")
    if decimal:
        raise CourseError(f"{path.name} is JSON, where the decimal sign is always a point", "leave decimal out.")


def _named_once(scenarios: list[Scenario]) -> list[Scenario]:
    """One spelling for each country and scenario of the file, and no scenario twice; metadata.warnings says it."""
    metas = [s.metadata for s in scenarios]
    countries = usual_spellings((m.country for m in metas), country_key)
    names = usual_spellings((m.scenarioName for m in metas), name_key)
    known: dict[tuple[str, str], list[Scenario]] = {}
    for scenario in scenarios:
        meta = scenario.metadata
        told = respelt("country", countries, [meta.country]) + respelt("scenario", names, [meta.scenarioName])
        meta.country, meta.scenarioName = countries[meta.country], names[meta.scenarioName]
        alike = known.setdefault((meta.country, meta.scenarioName), [])
        if same := [s for s in alike if scenario_id(s) == scenario_id(scenario)]:
            meta, told = same[0].metadata, ["the file holds this scenario twice: read once"]
        else:
            told += ["another scenario of the file has the same country and name, and other figures"] if alike else []
            alike.append(scenario)
        meta.warnings = [*(meta.warnings or []), *told] or None
    kept = {id(s) for alike in known.values() for s in alike}
    return [s for s in scenarios if id(s) in kept]


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _told(error: Any) -> str:
    """What pydantic says of one field, in a planner's words, with the value."""
    kind, value = error["type"], error["input"]
    what = SAID.get(kind) or error["msg"].removeprefix("Value error, ").replace("Input should be a valid", "must be a")
    what = what.replace("Input should be", "must be")
    given = isinstance(value, str | int | float | None) and what.startswith("must be") and kind != "too_short"
    return f"{what}, not {value!r:.40}" if given else what


def _field(location: tuple[int | str, ...]) -> str:
    parts = (f"[{p}]" if isinstance(p, int) else f".{plain(p)[:60]}" for p in location if p != "[key]")
    return "".join(parts).lstrip(".").encode("utf-8", "backslashreplace").decode() or "scenario"


def scenario_id(scenario: Scenario) -> str:
    """Readable and stable: country and name, and eight hex digits of the content."""
    meta = scenario.metadata
    slug = re.sub(r"[^a-z0-9]+", "-", f"{meta.country} {meta.scenarioName}".lower()).strip("-")[:48]
    content = scenario.model_dump_json(exclude_none=True, exclude={"metadata": UNCOUNTED})
    return f"{slug}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
