"""The scenario shape of the fine-tuning guide's step 1: MW by year, one sum of money, emissions of some years."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, Field

from stakelib.scenarios.metrics import factors
from stakelib.scenarios.schema import KINDS, Amount, re_share

ALIASES = {"windOnshore": "wind", "windOffshore": "wind", "naturalGas": "gas"}
Year = Annotated[str, Field(pattern=r"^[0-9]{4}$")]


class _Capacity(BaseModel):
    byYear: Annotated[dict[Year, dict[str, Amount]], Field(min_length=1)]


class _Investment(BaseModel):
    total: Amount | None = None


class _Emissions(BaseModel):
    byYear: dict[Year, Amount] = {}


class GuideScenario(BaseModel):
    """What is needed of it; anything else in the file is passed over."""

    metadata: dict[str, Any]
    capacity: _Capacity
    investment: _Investment = _Investment()
    emissions: _Emissions = _Emissions()


def from_guide(data: Any) -> dict[str, Any]:
    """The same scenario in the tool's shape, milestones where capacity is given; metadata.derived says what is assumed.

    Raises pydantic's ValidationError, or ValueError for a technology that is not known.
    """
    old = GuideScenario.model_validate(data)
    fleets = {year: _fleet(row) for year, row in sorted(old.capacity.byYear.items())}
    derived = [
        "generation: capacity x hours x this course's capacity factors ("
        + ", ".join(
            f"{t} {factors()[t]['capacityFactor']}"
            for t in sorted({t for f in fleets.values() for t in f})
            if "capacityFactor" in factors().get(t, {})
        )
        + ")",
        "renewable share: from that generation",
    ]
    milestones = [_milestone(int(year), fleet) for year, fleet in fleets.items()]
    if old.investment.total is not None:
        milestones[-1]["investment"] = {"cumulative": old.investment.total, "unit": "m$"}
        derived.append(f"investment: the total stands at {milestones[-1]['year']}")
    stated = {int(year): value for year, value in old.emissions.byYear.items()}
    for m in milestones:
        if (value := _between(stated, m["year"])) is not None:
            m["emissions"] = {"total": value, "unit": "Mt CO2"}
    if any("emissions" in m and m["year"] not in stated for m in milestones):
        derived.append(f"emissions: on straight lines between {', '.join(map(str, sorted(stated)))}")
    return {"metadata": old.metadata | {"derived": derived}, "milestones": milestones, "detailedTech": fleets}


def _fleet(row: dict[str, float]) -> dict[str, float]:
    """MW per technology of the schema; onshore and offshore wind are one."""
    known = {tech for techs in KINDS.values() for tech in techs}
    out: dict[str, float] = {}
    for name, mw in row.items():
        tech = ALIASES.get(name, name)
        if tech not in known:
            raise ValueError(f"capacity.byYear: technology {name[:40]!r} is not one of {', '.join(sorted(known))}")
        out[tech] = out.get(tech, 0.0) + mw
    return out


def _milestone(year: int, fleet: dict[str, float]) -> dict[str, Any]:
    """Categories from the fleet; storage and other stay unknown unless it names them."""
    kinds = {kind: [t for t in techs if t in fleet] for kind, techs in KINDS.items()}
    rates = {t: factors().get(t, {}).get("capacityFactor") for t in fleet}
    output = {
        kind: math.fsum(8.76 * fleet[t] * (rates[t] or 0) for t in kinds[kind])
        for kind in ("renewables", "fossil")
        if all(rates[t] or not fleet[t] for t in kinds[kind])
    }
    total = {
        kind: math.fsum(fleet[t] for t in techs)
        for kind, techs in kinds.items()
        if techs or kind in ("renewables", "fossil")
    }
    return {
        "year": year,
        "reShare": None if fleet.get("nuclear") else re_share(output),
        "capacity": {"total": total, "unit": "MW"},
        "generation": {"output": output, "unit": "GWh"},
    }


def _between(stated: dict[int, float], year: int) -> float | None:
    """The stated value, or the one on the straight line between two stated years; None outside of them."""
    before, after = [y for y in stated if y <= year], [y for y in stated if y >= year]
    if not (before and after):
        return None
    a, b = max(before), min(after)
    return stated[a] if a == b else stated[a] + (stated[b] - stated[a]) * (year - a) / (b - a)
