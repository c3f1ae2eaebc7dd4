"""The figures that the Scenario Dialogue Tool itself shows, to compare with; the course teaches with its own.

Known faults are kept, because equality is the point: all installed capacity counts as if it were new, gas, CSP and
pumped storage of a fleet table have no factor, and without a fleet table a fixed mix is assumed.
"""

from __future__ import annotations

import math

from stakelib.scenarios.metrics import Metric, Metrics, factors, slots
from stakelib.scenarios.schema import Milestone, Scenario

NO_FACTOR = ("gas", "solarCSP", "pumpStorage")
NUCLEAR = {"construction": 10, "permanent": 0.7}  # only the tool has these
MIX = {
    "renewables": {"hydro": 0.4, "solarPV": 0.3, "wind": 0.2, "geothermal": 0.05, "biomass": 0.05},
    "fossil": {"coal": 0.2, "gas": 0.5, "diesel": 0.15, "hfo": 0.15},
    "storage": {"battery": 1.0},
    "other": {"nuclear": 1.0},
}


def tool_metrics(scenario: Scenario) -> Metrics:
    """Jobs, land, shares and emission cut of every milestone by the tool's formulas; no data, no figure."""
    found: dict[tuple[str, int], Metric] = {}
    for m in scenario.milestones:
        raw = {
            "investment": m.at("investment.cumulative"),
            "re_share": None if m.reShare is None else _round(m.reShare, 1),
            "emission_cut": _cut(scenario.milestones[0], m),
            **_from_capacity(scenario, m),
        }
        found |= {(key, m.year): Metric(key, m.year, value) for key, value in raw.items() if value is not None}
    return Metrics(slots(scenario), found)


def _round(value: float, digits: int = 0) -> float:
    """JavaScript's Math.round: half up, on the binary value."""
    return math.floor(value * 10**digits + 0.5) / 10**digits


def _cut(first: Milestone, m: Milestone) -> float | None:
    if not (first.emissions and m.emissions):
        return None
    base = first.emissions.total
    cut = 100 * (base - m.emissions.total) / base if base else 0.0
    return _round(cut, 1) if math.isfinite(cut) else None


def _from_capacity(scenario: Scenario, m: Milestone) -> dict[str, float]:
    if m.capacity is None:
        return {}
    mix = {kind: mw or 0.0 for kind, mw in m.capacity.total}
    given = (scenario.detailedTech or {}).get(m.year)
    fleet = {t: mw * share for kind, mw in mix.items() for t, share in MIX[kind].items()}
    if given is not None:
        fleet = {t: mw or 0.0 for t, mw in given if t not in NO_FACTOR}
    rates = factors() | {"nuclear": NUCLEAR}
    building = math.fsum(mw * rates[t]["construction"] for t, mw in fleet.items())
    posts = math.fsum(mw * rates[t]["permanent"] for t, mw in fleet.items())
    sites = fleet | {"battery": fleet.get("battery") or mix["storage"]}
    out = {
        "construction_jobs": _round(building),
        "operations_jobs": _round(posts),
        "jobs": _round(building + posts),
        "land": _round(math.fsum(mw * rates[t].get("land", 0) for t, mw in sites.items())),
    }
    if total := math.fsum(mix.values()):
        out["vre_share"] = _round(100 * (fleet["solarPV"] + fleet["wind"]) / total, 1)
        out["fossil_share"] = _round(100 * mix["fossil"] / total, 1)
    return out
