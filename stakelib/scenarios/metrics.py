"""What follows from a scenario: figures with metric, unit and year, only where the data exist.

Every figure is rounded once, to the form in which it is printed; prompts and texts print the same characters.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from importlib.resources import files
from typing import Any, Literal

from stakelib.scenarios.schema import Scenario, Technologies


@functools.cache
def _table(name: str) -> dict[str, dict[str, Any]]:
    table = json.loads(files(__package__).joinpath(name).read_text(encoding="utf-8"))
    return {key: row for key, row in table.items() if isinstance(row, dict)}


# key: (label in the prompt, unit, years shown)
METRICS: dict[str, tuple[str, str, str]] = {
    key: (row["label"], row["unit"], row["years"]) for key, row in _table("metrics.json").items() if row["years"]
}
TECH = {
    "hydro": "hydro",
    "solar": "solarPV",
    "wind": "wind",
    "geothermal": "geothermal",
    "biomass": "biomass",
    "coal": "coal",
    "gas": "gas",
    "diesel": "diesel",
    "hfo": "hfo",
    "interconnector": "interconnector",
}
# figures that a milestone states, and where
STATED = {
    "re_share": "reShare",
    "investment": "investment.cumulative",
    "emissions": "emissions.total",
    "peak": "peakDemand.value",
    "storage": "capacity.total.storage",
    "imports": "imports.value",
    "additions": "capacityAdditions.additions.renewables",
}


def factors() -> dict[str, dict[str, Any]]:
    """Factors per technology (see `about` in factors.json for units and sources)."""
    return _table("factors.json")


def explain(key: str) -> dict[str, str]:
    """Metric, label, unit, formula, inputs and source of one figure (metrics.json)."""
    row = _table("metrics.json")[key]
    return {"metric": key} | {name: row[name] for name in ("label", "unit", "formula", "inputs", "source")}


def round_half_up(value: float, digits: int = 0) -> float:
    """Round as people do (2.5 -> 3), not to even as Python does."""
    return float(Decimal(repr(value)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP))


def _digits(unit: str, value: float) -> int:
    if unit == "Mt CO2":
        return 2 if value < 10 else 1
    return 1 if unit == "%" or (value < 10 and unit != "jobs") else 0


@dataclass(frozen=True)
class Metric:
    """One figure: `value` in `unit` for `year`, rounded as printed."""

    key: str
    year: int
    value: float

    @classmethod
    def of(cls, key: str, year: int, value: float) -> Metric:
        return cls(key, year, round_half_up(value, _digits(METRICS[key][1], value)))

    @property
    def label(self) -> str:
        return _table("metrics.json")[self.key]["label"]

    @property
    def unit(self) -> str:
        return _table("metrics.json")[self.key]["unit"]

    @property
    def number(self) -> str:
        whole = self.value == int(self.value) and self.unit not in ("%", "Mt CO2")
        digits = 0 if whole else _digits(self.unit, self.value)
        return f"{self.value:,.{digits}f}"

    def __str__(self) -> str:
        if self.unit == "%":
            return f"{self.number}%"
        if self.unit == "jobs":
            return self.number
        if self.unit.startswith("m$"):
            return f"${self.number}M USD" + (" per year" if self.unit.endswith("/yr") else "")
        return f"{self.number} {self.unit.replace('/yr', ' per year')}"


@dataclass(frozen=True)
class Metrics:
    """All figures of a scenario. `slots`: which year is base, near (about 2030), far (about 2040) and end."""

    slots: dict[str, int]
    figures: dict[tuple[str, int], Metric]

    def get(self, key: str, slot: str) -> Metric | None:
        """The figure of `key` for a slot ("near") of this scenario, or None when unknown."""
        return self.figures.get((key, self.slots.get(slot, -1)))

    def only(self, keys: Collection[str]) -> Metrics:
        """The same scenario as if nothing but the metrics `keys` were known of it."""
        return Metrics(self.slots, {at: m for at, m in self.figures.items() if m.key in keys})

    def shown(self) -> list[Metric]:
        """The figures that a prompt prints, in order; a technology that stays at zero is left out."""
        found = []
        for key, (_, _, when) in METRICS.items():
            years = sorted({self.slots[s] for s in when.split() if s in self.slots})
            rows = [self.figures[key, y] for y in years if (key, y) in self.figures]
            found += rows if key not in TECH or any(m.value for m in rows) else []
        return found


def slots(scenario: Scenario) -> dict[str, int]:
    """Base = first milestone; near and far = the milestones closest to 2030 and 2040 after it; end = last.

    A scenario that starts at 2028 or later has no year before the transition: its first milestone is base and near.
    """
    years = [m.year for m in scenario.milestones]
    named = {"base": years[0]}
    later = years[1:] if years[0] < 2028 else years
    if len(years) > 1:
        named["near"] = min(later, key=lambda y: abs(y - 2030))
        if after := [y for y in later if y > named["near"]]:
            named["far"] = min(after, key=lambda y: abs(y - 2040))
            named["end"] = years[-1]
    else:
        named["near"] = years[0]
    return named


def derive_metrics(scenario: Scenario, mode: Literal["default", "tool"] = "default") -> Metrics:
    """Figures of every milestone, each with unit and year; what the data do not hold is absent.

    `mode="tool"`: the Scenario Dialogue Tool's own figures, for comparison only (tool_mode.py says what they count).

    Jobs count capacity built since the first milestone: job-years of construction spread over the years since the
    milestone before, plus permanent posts. Land: new solar, wind and battery sites. Yearly investment: the
    difference of cumulative values. Emissions reduction and additions: against the first and the previous milestone.
    """
    if mode == "tool":
        from stakelib.scenarios.tool_mode import tool_metrics

        return tool_metrics(scenario)
    found: dict[tuple[str, int], Metric] = {}
    for index, milestone in enumerate(scenario.milestones):
        raw = {**_stated(scenario, index), **_from_fleet(scenario, index)}
        for key, value in raw.items():
            if value is not None:
                found[key, milestone.year] = Metric.of(key, milestone.year, value)
    return Metrics(slots(scenario), found)


def _stated(scenario: Scenario, index: int) -> dict[str, float | None]:
    m, first = scenario.milestones[index], scenario.milestones[0]
    out = {key: m.at(place) for key, place in STATED.items() if index or key != "additions"}
    if m.capacity and scenario.detailedTech is None:
        out |= {"re_capacity": m.capacity.total.renewables, "fossil_capacity": m.capacity.total.fossil}
    if index:
        before = scenario.milestones[index - 1]
        spent, earlier = out["investment"], before.at(STATED["investment"])
        if None not in (spent, earlier) and spent >= earlier:
            out["yearly_investment"] = (spent - earlier) / (m.year - before.year)
        if m.emissions and first.emissions and first.emissions.total > 0:
            cut = 100 * (1 - m.emissions.total / first.emissions.total)
            out["emission_cut"] = cut if cut >= 0 else None
    return out


def _from_fleet(scenario: Scenario, index: int) -> dict[str, float | None]:
    table, m = scenario.detailedTech or {}, scenario.milestones[index]
    fleet, first = table.get(m.year), table.get(scenario.milestones[0].year)
    if fleet is None:
        return {}
    out: dict[str, float | None] = {key: getattr(fleet, name) for key, name in TECH.items()}
    installed, mix = math.fsum(v for _, v in fleet if v), m.capacity.total if m.capacity else None
    stated = math.fsum(v for _, v in mix if v) if mix else 0.0
    # a fleet table that lists some plants only says nothing about shares
    whole = installed > 0 and abs(installed - stated) < 0.02 * installed
    if whole and fleet.solarPV is not None and fleet.wind is not None:
        out["vre_share"] = 100 * (fleet.solarPV + fleet.wind) / installed
    before = table.get(scenario.milestones[index - 1].year) if index else None
    if first is not None and before is not None:
        posts = math.fsum(mw * f["permanent"] for mw, f in _built(first, fleet))
        building = math.fsum(mw * f["construction"] for mw, f in _built(before, fleet))
        span = m.year - scenario.milestones[index - 1].year
        out |= {"jobs": building / span + posts, "permanent_jobs": posts}
        out["land"] = math.fsum(mw * f.get("land", 0) for mw, f in _built(first, fleet))
    return out


def _built(before: Technologies, now: Technologies) -> list[tuple[float, dict[str, float]]]:
    """(MW added, factors) per technology that both years give and that has factors."""
    pairs = ((getattr(before, name), getattr(now, name), row) for name, row in factors().items())
    return [(b - a, row) for a, b, row in pairs if a is not None and b is not None and b > a]


# relative measures for rules: name -> (figure, what it is divided by)
RATIOS = {name: (row["figure"], row["by"]) for name, row in _table("ratios.json").items()}


def ratios(metrics: Metrics) -> dict[str, float]:
    """Figures and relative measures for rules, named like `re_share.near`, `storage_per_vre.far`, `peak.growth`.

    `change` is far minus near, `growth` far over near, `rise` far over base. Never printed, so never cited.
    """
    out: dict[str, float] = {}
    for slot in ("base", "near", "far", "end"):
        value = {key: m.value for key in METRICS if (m := metrics.get(key, slot))}
        if "solar" in value and "wind" in value:
            value["vre"] = value["solar"] + value["wind"]
        if "diesel" in value and "hfo" in value:
            value["oil"] = value["diesel"] + value["hfo"]
        out |= {f"{key}.{slot}": number for key, number in value.items()}
        out |= {
            f"{name}.{slot}": value[key] / value[by]
            for name, (key, by) in RATIOS.items()
            if key in value and value.get(by)
        }
    for key in METRICS | RATIOS:
        base, near, far = (out.get(f"{key}.{slot}") for slot in ("base", "near", "far"))
        if far is None:
            continue
        out |= {f"{key}.change": far - near, f"{key}.growth": far / near} if near else {}
        out |= {f"{key}.rise": far / base} if base else {}
    return out
