"""Believable synthetic national scenarios: real countries and pools, one fleet table that all else follows from."""

from __future__ import annotations

import math
import random
from importlib.resources import files
from typing import Any

import yaml

from stakelib.scenarios.metrics import factors, round_half_up
from stakelib.scenarios.names import countries
from stakelib.scenarios.schema import Scenario

LOAD_FACTOR = 0.65
_TABLES = yaml.safe_load(files(__package__).joinpath("sampler.yaml").read_text(encoding="utf-8"))
MIXES, AMBITION, COST, CHALLENGE, NAMES, GAPS = _TABLES.values()


def sample(n: int, seed: int = 0) -> list[Scenario]:
    """`n` synthetic scenarios over about n/2 countries (at least six where n allows); the same for the same seed.

    metadata.cell says where each stands on the axes geography, mix, ambition, investment and challenge.
    """
    rng = random.Random(f"sample-{seed}")
    places = _spread(rng, min(len(countries()), max(min(n, 6), round(n * 0.47))))
    cells = [(m, a) for m in MIXES for a in AMBITION]
    main = {"Solar": "solarPV", "Wind": "wind", "Hydro": "hydro"}
    out: list[Scenario] = []
    seen: set[tuple[str, str]] = set()
    while len(out) < n:
        k = len(out)
        country = places[k % len(places)]
        if k % len(cells) == 0:
            rng.shuffle(cells)
        mix, ambition = cells[k % len(cells)]
        if main.get(mix, "solarPV") not in countries()[country]["resources"]:
            mix = "Balanced"
        scenario = _one(country, mix, ambition, rng)
        name = scenario.metadata.scenarioName
        if again := sum(1 for place, known in seen if place == country and known.startswith(name)):
            name += f" Update {chr(ord('A') + again - 1)}"
        seen.add((country, name))
        scenario.metadata.scenarioName = name
        out.append(scenario)
    return out


def _spread(rng: random.Random, count: int) -> list[str]:
    """`count` countries, taken in turn from each region."""
    regions: dict[str, list[str]] = {}
    for name, row in countries().items():
        regions.setdefault(row["region"], []).append(name)
    for names in regions.values():
        rng.shuffle(names)
    order = [names[i] for i in range(max(map(len, regions.values()))) for names in regions.values() if i < len(names)]
    return order[:count]


def _one(country: str, mix: str, ambition: str, rng: random.Random) -> Scenario:
    row = countries()[country]
    years = rng.choice([[2025, 2030, 2040], [2025, 2030, 2040, 2050], [2025, 2030, 2035, 2040, 2050]])
    challenge = rng.choice(CHALLENGE)
    fleets = _fleets(row, years, mix, ambition, challenge, rng)
    cost = COST["costly" if challenge == "finance" else rng.choice(list(COST))]
    growth, spent, milestones = fleets["growth"], 0.0, []
    for i, year in enumerate(years):
        fleet, energy = fleets[year], fleets["energy", year]
        before = fleets[years[i - 1]] if i else fleet
        built = {t: max(0.0, mw - before[t]) for t, mw in fleet.items()}
        spent += cost * math.fsum(mw * factors()[t]["capex"] for t, mw in built.items())
        demand = row["gwh"] * growth ** (year - years[0])
        milestones.append(_milestone(year, fleet, energy, built, demand, spent, year - years[i - 1] if i else 0))
    tech = {str(y): fleets[y] for y in years}
    name = rng.choice(NAMES[ambition]).format("Mixed Renewable" if mix == "Balanced" else mix)
    data = {
        "metadata": {"country": country, "scenarioName": name, "modelVersion": "synthetic"},
        "milestones": milestones,
        "detailedTech": tech,
    }
    scenario = Scenario.model_validate(_with_gaps(data, rng))
    band = "below 1 B$" if spent < 1000 else "1-3 B$" if spent <= 3000 else "above 3 B$"
    scenario.metadata.cell = {
        "geography": row["region"],
        "mix": mix,
        "ambition": ambition,
        "investment": band,
        "challenge": challenge,
    }
    return scenario


def _fleets(
    row: dict[str, Any], years: list[int], mix: str, ambition: str, challenge: str, rng: random.Random
) -> dict[Any, Any]:
    """Growth of demand; MW per technology and GWh per technology for each year."""
    growth = rng.uniform(*row["growth"])
    wanted = {t: w for t, w in MIXES[mix].items() if t in row["resources"]}
    wanted |= {t: rng.uniform(0.5, 1.5) for t in row["resources"] if t in ("geothermal", "biomass")}
    start = row["mix"]
    start_re = math.fsum(s for t, s in start.items() if factors()[t]["kind"] == "renewables")
    targets = dict(zip((2030, 2040, 2050), AMBITION[ambition], strict=True)) | {years[0]: start_re}
    targets[2035] = (targets[2030] + targets[2040]) / 2
    storage = {"grid": 0.06, "land": 0.2}.get(challenge, rng.choice([0.12, 0.25, 0.4]))
    link = 0 if row["island"] else rng.choice([0.08, 0.2, 0.35])
    out: dict[Any, Any] = {"growth": growth}
    fleet = dict.fromkeys(factors(), 0.0)
    for i, year in enumerate(years):
        demand = row["gwh"] * growth ** (year - years[0])
        share = min(98.0, max(targets[year] + rng.uniform(-4, 4), start_re * (0.97 if i else 1) + 2 * i))
        energy = _energy(start, wanted, demand, start_re if i == 0 else share, start_re)
        before = fleet
        fleet = {
            t: _tidy(energy.get(t, 0) / 8.76 / f["capacityFactor"])
            for t, f in factors().items()
            if "capacityFactor" in f
        }
        fleet |= {t: max(mw, before[t]) for t, mw in fleet.items() if factors()[t]["kind"] == "renewables"}
        vre, peak = fleet["solarPV"] + fleet["wind"], demand / 8.76 / LOAD_FACTOR
        fleet["battery"] = max(_tidy(vre * storage * (1 if i else 0.3)), before["battery"])
        fleet["interconnector"] = _tidy(peak * link * (1 + 0.3 * i))
        out[year] = fleet
        out["energy", year] = {
            t: mw * 8.76 * factors()[t]["capacityFactor"] for t, mw in fleet.items() if "capacityFactor" in factors()[t]
        }
    return out


def _energy(
    start: dict[str, float], wanted: dict[str, float], demand: float, share: float, start_re: float
) -> dict[str, float]:
    """GWh per technology: today's renewables stay, new ones follow `wanted`; coal and oil leave before gas."""
    re_now = {t: s for t, s in start.items() if factors()[t]["kind"] == "renewables"}
    keep = min(1.0, share / start_re) if start_re else 0
    old = {t: s * keep * (0.6 if share > start_re else 1) for t, s in re_now.items()}
    left = max(0.0, share - math.fsum(old.values()))
    total = math.fsum(wanted.values())
    out = {t: old.get(t, 0) + left * wanted.get(t, 0) / total for t in old | wanted}
    fossil = {
        t: s * ((100 - share) / max(100 - start_re, 1) if t != "gas" else 1)
        for t, s in start.items()
        if factors()[t]["kind"] == "fossil"
    }
    scale = (100 - share) / math.fsum(fossil.values()) if fossil else 0
    return {t: s * demand / 100 for t, s in {**out, **{t: s * scale for t, s in fossil.items()}}.items()}


def _tidy(mw: float) -> float:
    """A planner's round number: 1 MW below 50, 5 below 1,000, else 10."""
    step = 1 if mw < 50 else 5 if mw < 1000 else 10
    return step * round_half_up(mw / step) if mw >= 0.5 else 0.0


def _milestone(
    year: int,
    fleet: dict[str, float],
    energy: dict[str, float],
    built: dict[str, float],
    demand: float,
    spent: float,
    span: int,
) -> dict[str, Any]:
    def total(table: dict[str, float]) -> dict[str, float]:
        out = dict.fromkeys(("renewables", "fossil", "storage", "other"), 0.0)
        for tech, value in table.items():  # one by one: from Python 3.12 on, sum() rounds floats in another way
            out[factors()[tech]["kind"]] += value
        return out

    output = {k: v for k, v in total(energy).items() if k in ("renewables", "fossil")}
    share = 100 * output["renewables"] / (math.fsum(output.values()) or 1)
    emitted = math.fsum(gwh * factors()[t].get("co2", 0) for t, gwh in energy.items()) / 1e6
    row = {
        "year": year,
        "reShare": round_half_up(share, 1),
        "capacity": {"total": total(fleet), "unit": "MW"},
        "generation": {"output": output, "unit": "GWh"},
        "investment": {"cumulative": _tidy(spent), "unit": "m$"},
        "emissions": {"total": round_half_up(emitted, 3), "unit": "Mt CO2"},
        "peakDemand": {"value": _tidy(demand / 8.76 / LOAD_FACTOR), "unit": "MW"},
    }
    if span:
        row["capacityAdditions"] = {"additions": {k: v / span for k, v in total(built).items()}, "unit": "MW"}
    return row


def _with_gaps(data: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Take away some data of the whole scenario, at most two kinds."""
    gone = [key for key, chance in GAPS.items() if rng.random() < chance][:2]
    for milestone in data["milestones"]:
        for key in gone:
            milestone.pop(key, None)
        if "storage" in gone:
            milestone["capacity"]["total"].pop("storage")
    if "detailedTech" in gone:
        data.pop("detailedTech")
    elif "storage" in gone:
        data["detailedTech"] = {
            y: {t: v for t, v in fleet.items() if t != "battery"} for y, fleet in data["detailedTech"].items()
        }
    return data
