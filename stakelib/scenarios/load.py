"""Read scenarios from the Scenario Dialogue Tool's JSON."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stakelib.run import CourseError
from stakelib.scenarios.schema import Scenario

NEXT = "mend the fields named above (schema: metadata, milestones[], detailedTech) and load the file again."


def load(path: str | Path) -> list[Scenario]:
    """Scenarios of a JSON file that holds one scenario or a list of them; units become MW, GWh, m$, Mt CO2.

    Raises CourseError with every problem found, each with file and field.
    """
    path = Path(path)
    data = _read_json(path)
    items = data if isinstance(data, list) else [data]
    scenarios, problems = [], [] if items else [f"{path.name}: the list is empty"]
    for number, item in enumerate(items):
        where = f"{path.name}: scenario {number + 1}" if isinstance(data, list) else path.name
        try:
            scenarios.append(Scenario.model_validate(item))
        except ValidationError as error:
            problems += [f"{where}: {_field(e['loc'])}: {e['msg']}" for e in error.errors(include_url=False)]
    if problems:
        raise CourseError(problems, NEXT)
    return scenarios


def _read_json(path: Path) -> Any:
    try:
        text = path.read_bytes().decode("utf-8-sig")
        return json.loads(text, parse_constant=_refuse_constant)
    except OSError as error:
        raise CourseError(f"{path}: cannot be read ({error.strerror})", "check the path.") from error
    except UnicodeDecodeError as error:
        raise CourseError(f"{path.name}: not UTF-8 (byte {error.start})", "save the file as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise CourseError(f"{path.name}: not valid JSON ({error})", "export the scenario again.") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _field(location: tuple[int | str, ...]) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".") or "scenario"


def scenario_id(scenario: Scenario) -> str:
    """Readable and stable: country and name, and eight hex digits of the content."""
    meta = scenario.metadata
    slug = re.sub(r"[^a-z0-9]+", "-", f"{meta.country} {meta.scenarioName}".lower()).strip("-")[:48]
    digest = hashlib.sha256(scenario.model_dump_json(exclude_none=True).encode()).hexdigest()[:8]
    return f"{slug}-{digest}"
