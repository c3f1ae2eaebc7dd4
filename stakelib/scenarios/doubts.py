"""Figures that do not fit each other: shares as fractions, GW for MW, TWh for GWh, kt for Mt."""

from __future__ import annotations

import math

from stakelib.scenarios.schema import KINDS, Milestone, Mix, Scenario, Technologies, re_share

HOURS = 8.76  # GWh that 1 MW gives in a year without a stop
# ratio -> (doubted below, doubted above, lowest and highest usual value)
FULL_HOURS = {"renewables": (0.01, 1.01, 0.02, 1.0), "fossil": (0.0012, 1.01, 0.02, 1.0)}  # plants may be a reserve
CARBON = (0.01, 1.5, 0.05, 1.5)  # kt CO2 per GWh of fossil electricity
MOST_CARBON = (0.0, 1.5, 0.05, 1.5)  # and where only the most that the plants can give is known
BESIDE_CAPACITY = {  # field: (words, unit), per MW of capacity
    "peakDemand.value": ("peak demand", "MW", 0.01, 100.0, 0.05, 1.5),
    "investment.cumulative": ("cumulative investment", "m$", 0.0, 100.0, 0.0, 20.0),
    "annualOMCosts.value": ("yearly O&M cost", "m$", 0.0, 10.0, 0.0, 2.0),
    "curtailment.value": ("curtailment", "GWh", 0.0, HOURS, 0.0, HOURS),
    "imports.value": ("imports", "GWh", 0.0, 10 * HOURS, 0.0, HOURS),
}
LIMITS = {"capacity": (100_000, "MW"), "investment": (1_000_000, "m$"), "emissions": (10_000, "Mt CO2")}


def fractions(scenario: Scenario) -> list[str]:
    """Shares of 0.38 and 1 where 38 and 100 % are meant; generation by category shows when they are not."""
    stated = {m.year: m.reShare for m in scenario.milestones if m.reShare is not None}
    shares = [re_share(dict(m.generation.output)) for m in scenario.milestones if m.generation and m.year in stated]
    if not stated or not 0 < max(stated.values()) <= 1 or any(share is not None and share <= 1.5 for share in shares):
        return []
    told = ", ".join(f"{value:g} in {year}" for year, value in stated.items())
    return [
        f"reShare (re_share): {told}: fractions where percent is wanted; write 38 for 38 %. "
        "If they are percent, give generation by category too"
    ]


def doubts_of(scenario: Scenario) -> list[str]:
    """What a planner should look at again; none of it stops the file from loading."""
    doubts: list[str] = []
    before: dict[str, float] = {}
    for m in scenario.milestones:
        share = re_share(dict(m.generation.output)) if m.generation else None
        if share is not None and m.reShare is not None and abs(share - m.reShare) > 1:
            doubts.append(f"{m.year}: renewable share is stated as {m.reShare:g} %, its generation gives {share:.1f} %")
        sizes = _sizes(m)
        doubts += [
            f"{m.year}: {field} of {sizes[field]:,.0f} {unit} is far beyond a national scenario: check its unit"
            for field, (limit, unit) in LIMITS.items()
            if sizes.get(field, 0) > limit
        ]
        doubts += [f"{m.year}: {text}" for text in _unit_slips(m, (scenario.detailedTech or {}).get(m.year))]
        if m.peakDemand and 0 < sizes.get("capacity", 0) < m.peakDemand.value:
            doubts.append(f"{m.year}: peak demand is above all capacity")
        if sizes.get("investment", math.inf) < before.get("investment", 0):
            doubts.append(f"{m.year}: cumulative investment is below that of the milestone before")
        doubts += [
            f"{m.year}: {field} is {_shown(sizes[field])}, and {_shown(before[field])} at the milestone before: "
            "one of them may be off by a factor of 1,000; check the units"
            for field in ("capacity", "generation", "peak demand")
            if 0 < 100 * min(sizes.get(field, 0), before.get(field, 0)) < max(sizes[field], before[field])
        ]
        before |= sizes
    return doubts


def _sizes(m: Milestone) -> dict[str, float]:
    sizes = {
        "capacity": math.fsum(mw or 0 for _, mw in m.capacity.total) if m.capacity else None,  # MW
        "generation": math.fsum(gwh or 0 for _, gwh in m.generation.output) if m.generation else None,  # GWh
        "peak demand": m.at("peakDemand.value"),  # MW
        "investment": m.at("investment.cumulative"),  # m$
        "emissions": m.at("emissions.total"),  # Mt CO2
    }
    return {field: size for field, size in sizes.items() if size is not None}


def _unit_slips(m: Milestone, fleet: Technologies | None) -> list[str]:
    """A sentence for each doubt at a milestone; it names a factor near 1,000 that would explain the figures."""
    mw, gwh = _by_kind(m.capacity and m.capacity.total), _by_kind(m.generation and m.generation.output)
    own = {kind: math.fsum(getattr(fleet, t) or 0.0 for t in techs) for kind, techs in KINDS.items()} if fleet else {}
    doubts, fossil = [], None
    for kind, limits in FULL_HOURS.items():
        size, output = mw.get(kind, own.get(kind)), gwh.get(kind)
        if size is not None and output:
            share = output / (HOURS * size) if size else math.inf
            doubts += _doubt(f"{kind} plants of {_shown(size)} MW give {_shown(output)} GWh", share, *limits)
        if kind == "fossil" and (size or output):
            fossil = output or HOURS * (size or 0.0)
    emitted = m.at("emissions.total")
    if emitted and fossil:
        text = f"emissions are {_shown(emitted)} Mt CO2, electricity from fossil fuels "
        text += f"{_shown(fossil)} GWh" if gwh.get("fossil") else f"at most {_shown(fossil)} GWh"
        doubts += _doubt(text, 1000 * emitted / fossil, *(CARBON if gwh.get("fossil") else MOST_CARBON))
    whole = math.fsum(mw.values()) or math.fsum(own.values())
    for place, (words, unit, *limits) in BESIDE_CAPACITY.items():
        if whole and (value := m.at(place)):
            doubts += _doubt(
                f"{words} is {_shown(value)} {unit}, all capacity {_shown(whole)} MW", value / whole, *limits
            )
    return doubts + _fleet_beside(mw, own)


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _by_kind(mix: Mix | None) -> dict[str, float]:
    return {kind: value for kind, value in mix or () if value is not None}


def _doubt(text: str, ratio: float, low: float, high: float, usual_low: float, usual_high: float) -> list[str]:
    if low <= ratio <= high:
        return []
    factor = ratio / 1000 if ratio > high else ratio * 1000
    fits = usual_low <= factor <= usual_high
    return [f"{text}: " + ("one is likely off by a factor of 1,000; " if fits else "") + "check the units"]


def _fleet_beside(mw: dict[str, float], own: dict[str, float]) -> list[str]:
    """detailedTech against capacity by category: all of it, else one kind."""
    sums = {"all capacity": (math.fsum(mw.values()), math.fsum(own.values()))}
    sums |= {kind: (mw[kind], own[kind]) for kind in KINDS if kind in mw and kind in own}
    doubts = []
    for what, (stated, added) in sums.items():
        if not (stated and added) or (doubts and what != "all capacity"):
            continue
        ratio = max(stated / added, added / stated)
        if 300 <= ratio <= 3000:
            why = "one is likely off by a factor of 1,000; check the units"
        elif what == "all capacity" and not 0.5 <= added / stated <= 1.5:
            why = "is a part missing, or a unit wrong?"
        else:
            continue
        doubts.append(
            f"{what}: detailedTech adds up to {_shown(added)} MW, capacity by category to {_shown(stated)} MW: {why}"
        )
    return doubts
