"""Read scenarios: the Scenario Dialogue Tool's JSON, the guide's older JSON, SPLAT's CSV, the course's CSV template."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stakelib.run import CourseError
from stakelib.scenarios.guide import from_guide
from stakelib.scenarios.schema import Milestone, Scenario, re_share
from stakelib.scenarios.splat import COLUMNS, read_mapping, read_splat
from stakelib.scenarios.tables import COLUMNS as TEMPLATE
from stakelib.scenarios.tables import read_table, read_template

NEXT = "mend the fields named above (schema: metadata, milestones[], detailedTech) and load the file again."
UNCOUNTED = {"warnings", "sourceFile", "dateCreated", "description"}  # a file sent again is the same scenario
LIMITS = {"capacity": (100_000, "MW"), "investment": (1_000_000, "m$"), "emissions": (10_000, "Mt CO2")}


def load(path: str | Path, years: Collection[int] | None = None, mapping: str | Path | None = None) -> list[Scenario]:
    """Scenarios of a file, whatever its name ends in; units become MW, GWh, m$ and Mt CO2.

    JSON: one scenario or a list, in the tool's shape or the guide's older one. CSV: a SPLAT export (`years`: its
    milestone years; `mapping`: a copy of splat.yaml) or the template (template.csv). metadata.derived says what was
    assumed, metadata.warnings what was left out or looks odd; warnings are printed too.
    Raises CourseError with every problem found, each with file and row or field.
    """
    path = Path(path)
    text = _read(path)
    if re.match(r"\s*[\[{]", text):
        data = _read_json(path, text)
        items = data if isinstance(data, list) else [data]
        _refuse(path, years, mapping)
    else:
        items = _read_csv(path, text, years, mapping)
    scenarios, problems = [], [] if items else [f"{path.name}: the list is empty"]
    for number, item in enumerate(items, 1):
        where = f"{path.name}: scenario {number}" if len(items) > 1 else path.name
        try:
            scenarios.append(Scenario.model_validate(from_guide(item) if _is_guide(item) else item))
        except ValidationError as error:
            problems += [f"{where}: {_field(e['loc'])}: {e['msg']}" for e in error.errors(include_url=False)]
        except ValueError as error:
            problems.append(f"{where}: {error}")
    if problems:
        raise CourseError(problems, NEXT)
    for scenario in scenarios:
        meta = scenario.metadata
        meta.warnings = list(dict.fromkeys([*(meta.warnings or []), *_doubts(scenario)])) or None
        for warning in meta.warnings or []:
            print(f"{path.name}: {meta.country}, {meta.scenarioName}: {warning}")
    return scenarios


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise CourseError(f"{path}: cannot be read ({error.strerror})", "check the path.") from error
    except UnicodeDecodeError as error:
        raise CourseError(f"{path.name}: not UTF-8 (byte {error.start})", "save the file as UTF-8.") from error


def _read_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CourseError(f"{path.name}: not valid JSON ({error})", "export the scenario again.") from error


def _is_guide(item: Any) -> bool:
    capacity = item.get("capacity") if isinstance(item, dict) and "milestones" not in item else None
    return isinstance(capacity, dict) and "byYear" in capacity


def _read_csv(path: Path, text: str, years: Collection[int] | None, mapping: str | Path | None) -> list[dict[str, Any]]:
    table = read_table(text, path.name)
    if set(COLUMNS) <= set(table.columns):
        return read_splat(table, path.name, years, read_mapping(mapping))
    if set(TEMPLATE) <= set(table.columns):
        _refuse(path, years, mapping)
        return read_template(table, path.name)
    raise CourseError(
        f"{path.name}: row 1: neither JSON nor a CSV with the columns {', '.join(TEMPLATE)} (the template) or "
        f"{', '.join(COLUMNS)} (SPLAT)",
        "compare the file with stakelib/scenarios/template.csv.",
    )


def _refuse(path: Path, years: Collection[int] | None, mapping: str | Path | None) -> None:
    """Options that would have no effect are an error, not a silence."""
    if years or mapping:
        raise CourseError(f"{path.name} is no SPLAT export", "leave years and mapping out.")


def _doubts(scenario: Scenario) -> list[str]:
    """What a planner should look at again; none of it stops the file from loading."""
    found, before = [], None
    for m in scenario.milestones:
        share = re_share(dict(m.generation.output)) if m.generation else None
        if share is not None and m.reShare is not None and abs(share - m.reShare) > 1:
            found.append(f"{m.year}: renewable share is stated as {m.reShare:g} %, its generation gives {share:.1f} %")
        sizes = _sizes(m)
        found += [
            f"{m.year}: {field} of {sizes[field]:,.0f} {unit} is far beyond a national scenario: check its unit"
            for field, (limit, unit) in LIMITS.items()
            if sizes.get(field, 0) > limit
        ]
        if m.peakDemand and 0 < sizes.get("capacity", 0) < m.peakDemand.value:
            found.append(f"{m.year}: peak demand is above all capacity")
        if before is not None and sizes.get("investment", before) < before:
            found.append(f"{m.year}: cumulative investment is below that of the milestone before")
        before = sizes.get("investment", before)
    return found


def _sizes(m: Milestone) -> dict[str, float]:
    sizes = {
        "capacity": sum(mw or 0 for _, mw in m.capacity.total) if m.capacity else None,
        "investment": m.at("investment.cumulative"),
        "emissions": m.at("emissions.total"),
    }
    return {field: size for field, size in sizes.items() if size is not None}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _field(location: tuple[int | str, ...]) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p[:60]}" for p in location).lstrip(".") or "scenario"


def scenario_id(scenario: Scenario) -> str:
    """Readable and stable: country and name, and eight hex digits of the content."""
    meta = scenario.metadata
    slug = re.sub(r"[^a-z0-9]+", "-", f"{meta.country} {meta.scenarioName}".lower()).strip("-")[:48]
    content = scenario.model_dump_json(exclude_none=True, exclude={"metadata": UNCOUNTED})
    return f"{slug}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
