"""A small SPLAT export of invented plants, with every kind of row that such files hold."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable

HEADER = next(
    csv.reader(
        [
            "Scenario,Gx.PowerPool,Exporting.PowerPool,Importing.PowerPool,Exporting.Country,Importing.Country,Gx.Country,"
            "Technology,Tech.Description,Latitude,Longitude,TechSetL0,TechSetL1,TechSetL2,Par/Var,OutputCom,Year,Activity,"
            "Value,Unit,Source,double"
        ]
    )
)
UNITS = {"Total Capacity": "MW", "New Capacity": "MW", "Output": "GWh (TJ for fuels)", "CO2 Emissions": "ktons"}
UNITS |= {"RE Curtailment": "GWh", "Capacity Factor": ""}
POWER = "Electricity/Secondary"
YEARS = range(2023, 2041)  # 2023 holds only standing capacity
Row = dict[str, object]


def rows(
    country: str,
    scenario: str,
    code: str,
    text: str,
    sets: str,
    what: str,
    value: Callable[[int], float],
    commodity: str = POWER,
    years: Iterable[int] = YEARS,
    mode: int = 1,
) -> list[Row]:
    """One row per year; `sets` is "L1 > L2"; years from 2024 except for Total Capacity."""
    l1, _, l2 = sets.partition(" > ")
    row = dict.fromkeys(HEADER, "") | {"Scenario": scenario, "Gx.PowerPool": "XPP", "Gx.Country": country}
    row |= {"Technology": code, "Tech.Description": text, "TechSetL0": "Candidate", "TechSetL1": l1, "TechSetL2": l2}
    row |= {"Par/Var": what, "OutputCom": commodity, "Activity": mode, "Unit": UNITS.get(what, "m$"), "double": "0"}
    first = 2023 if what == "Total Capacity" else 2024
    return [row | {"Year": y, "Value": value(y)} for y in years if y >= first]


def line(start: float, step: float) -> Callable[[int], float]:
    return lambda year: start + step * (year - 2024)


def plant(
    country: str,
    scenario: str,
    code: str,
    text: str,
    sets: str,
    mw: Callable[[int], float],
    gwh: Callable[[int], float] | None,
) -> list[Row]:
    """Capacity, additions, output, cost (2 m$ per new MW) and a capacity factor, which no sum may hold."""
    at = (country, scenario, code, text, sets)
    new = max(0.0, mw(2025) - mw(2024))
    out = rows(*at, "Total Capacity", mw) + rows(*at, "Capacity Factor", lambda y: 0.5)
    out += rows(*at, "New Capacity", lambda y: new) + rows(*at, "Lumpsum Investment Costs", lambda y: 2 * new)
    out += rows(*at, "Fixed O&M Costs", lambda y: 0.01 * mw(y))
    return out + (rows(*at, "Output", gwh) if gwh else [])


def kestrelia(scenario: str = "base", sun: float = 8.0) -> list[Row]:
    """Prefix KQ. Plants: hydro, wind, PV, CSP, diesel, pumped storage, import line; tidal has no place here."""
    at = ("Kestrelia", scenario)
    plants: list[tuple[str, str, str, Callable[[int], float], Callable[[int], float] | None]] = [
        ("KQHYRO_Blue", "E_Blue River, stage 1 (H)", "Large Hydro PP > Large Hydro ROR PP", line(100, 0), line(400, 0)),
        ("KQHYDM_Red", "P_Red (H)", "Large Hydro PP > Large Hydro Dams", line(0, 5), line(0, 20)),
        ("KQWDLCZ001", "Wind Zone 001", "VRE > Wind PP", line(20, 10), line(60, 30)),
        ("KQSOPCZ002", "Solar Zone 002", "VRE > Solar PV - Utility PP", line(10, sun), line(18, 1.8 * sun)),
        ("KQSOTNZ001", "Solar CSP 6hrStor Zone 001", "Other RE > Solar Thermal PP", line(0, 1), line(0, 4)),
        ("KQDSRC00", "Generic Diesel Centralized", "Fossil&Nuclear PP > Diesel PP", line(40, -1), line(80, -4)),
        ("KQELSTPSHill", "P_Hill Pump storage", "Non Hydro Storage > PumpStorage", line(0, 2), line(0, 3)),
        (
            "KQEL00i00",
            "Import of Electricity",
            "Electricity Net Imports > Electricity Net Imports",
            line(50, 2),
            line(30, 0),
        ),
        ("KQTDST01", "Tidal stream", "Other RE > Tidal PP", line(1, 0), line(1, 0)),
    ]
    out = [row for code, text, sets, mw, gwh in plants for row in plant(*at, code, text, sets, mw, gwh)]
    made = sum_of([gwh for *_, gwh in plants if gwh])
    pump = ("KQELSTPSHill", "P_Hill Pump storage", "Non Hydro Storage > PumpStorage")
    out += rows(*at, *pump, "Output", line(0, -4), mode=2)  # charging
    out += rows(*at, *pump, "Output", line(0, -4), "DummyCom_KQELSTPSHill/DummyLevelStorage", mode=2)  # and its shadow
    diesel = ("KQDSRC00", "Generic Diesel Centralized", "Fossil&Nuclear PP > Diesel PP")
    out += rows(*at, *diesel, "CO2 Emissions", line(56, -2.8), "CO2/Emissions")
    out += rows(*at, *diesel, "Fuel Costs", line(9, 0))
    return out + grid(*at, "KQ", lambda y: made(y) - 4 * (y - 2024)) + helpers(*at, "KQ")


def zebrina() -> list[Row]:
    """Prefix ZQ: thermal plants, nuclear and a battery; three plants have no sets, so code or description must do."""
    at = ("Zebrina", "base")
    plants: list[tuple[str, str, str, Callable[[int], float], Callable[[int], float] | None]] = [
        ("ZQCLST01", "Coal steam", "Fossil&Nuclear PP > Coal PP", line(300, 0), line(1500, 0)),
        ("ZQNGCC01", "CCGT, two shafts", "Fossil&Nuclear PP > Gas PP", line(100, 10), line(400, 40)),
        ("ZQNUCL01", "Reactor", "Fossil&Nuclear PP > Nuclear PP", line(50, 0), line(350, 0)),
        ("ZQGEOT01", "Rift field", "Other RE > Geothermal PP", line(20, 0), line(140, 0)),
        ("ZQBMCO01", "Bagasse cogeneration", "Other RE > Biomass PP", line(10, 0), line(40, 0)),
        ("ZQELSTBA", "Battery 4h", "Non Hydro Storage > Battery Storage", line(0, 5), line(0, 2)),
        ("ZQHYSM07", "E_Upper fall", "", line(30, 0), line(120, 0)),  # by its code
        ("ZQXX0001", "Windhoek Diesel", "", line(15, 0), line(30, 0)),  # by a whole word, which is not "wind"
        ("ZQXX0002", "Hydrogen turbine", "", line(2, 0), line(3, 0)),  # unmapped, and not hydro
    ]
    out = [row for code, text, sets, mw, gwh in plants for row in plant(*at, code, text, sets, mw, gwh)]
    coal = ("ZQCLST01", "Coal steam", "Fossil&Nuclear PP > Coal PP")
    out += rows(*at, *coal, "CO2 Emissions", line(1350, 0), "CO2/Emissions")
    return out + grid(*at, "ZQ", sum_of([gwh for *_, gwh in plants if gwh])) + helpers(*at, "ZQ")


def sum_of(parts: list[Callable[[int], float]]) -> Callable[[int], float]:
    return lambda year: sum(part(year) for part in parts)


def grid(country: str, scenario: str, prefix: str, sent: Callable[[int], float]) -> list[Row]:
    """Transmission carries all that plants give; then distribution and demand."""
    at = (country, scenario)
    wires = (f"{prefix}EL00T00", "Transmission", "Dom.T&D > Transmission")
    local = (f"{prefix}EL00TDR", "Rural Distribution", "Dom.T&D > Distribution")
    need = (f"{prefix}EL00TUS", "SentOut Demand", "SentOut Demand > SentOut Demand")
    out = rows(*at, *wires, "Output", sent, "Electricity/Tertiary")
    out += rows(*at, *wires, "Lumpsum Investment Costs", lambda y: 1.0, "Electricity/Tertiary")
    out += rows(*at, *local, "Output", lambda y: 0.1 * sent(y), "Rural/Tertiary")
    out += rows(*at, *local, "Total Capacity", line(12, 0), "Rural/Tertiary")
    out += rows(*at, *need, "Output", sent, "SentOut/Final")
    return out + rows(*at, *need, "Total Capacity", line(120, 10), "SentOut/Final")


def helpers(country: str, scenario: str, prefix: str) -> list[Row]:
    """Dummies, fuel and resource supply in TJ, and curtailment, reported both per technology and in all."""
    at, cost = (country, scenario), "Lumpsum Investment Costs"
    dummy, shadow = f"{prefix}EXDT00", "ElcDummy/Secondary"
    store = f"DummyCom_{prefix}ELSTPSHill/DummyLevelStorage"
    out = rows(*at, dummy, "", " > DummyTech for Existing Capacity", "Total Capacity", line(500, 0), shadow)
    out += rows(*at, dummy, "", " > DummyTech for Existing Capacity", cost, line(99, 0), shadow)
    for code, text in (("DTPSHill_03", "DummyTech for Battery Storage"), ("PTPSHill", "ProxyTech for Battery Storage")):
        out += rows(*at, f"{prefix}EL{code}", "", f" > {text}", "Total Capacity", line(70, 0), store)
        out += rows(*at, f"{prefix}EL{code}", "", f" > {text}", "Output", line(90, 0), store)
    out += rows(*at, f"{prefix}EPPP01", "", "", "Total Capacity", line(60, 0), shadow)
    supply = "Fuel Imports/Extraction > RE Supply"
    out += rows(*at, f"{prefix}HY00X00", "Supply of Hydro", supply, "Output", line(1440, 72), "Hydro/Primary")
    out += rows(*at, f"{prefix}WD00X00", "Supply of Wind", supply, "Output", line(216, 108), "Wind/Primary")
    fuel = (f"{prefix}DS00I00", "Import of Diesel", "Fuel Imports/Extraction > Diesel Fuel")
    out += rows(*at, *fuel, "Output", line(800, -40), "Oil/Primary")
    out += rows(*at, *fuel, "Variable Costs", line(25, 0), "Oil/Primary")
    lost = (f"{prefix}RECURTAIL", "RE Curtailment", "RE Curtailment > RE Curtailment")
    out += rows(*at, *lost, "Output", line(7, 0), "", years=(2024, 2025))
    wind = (f"{prefix}WDLCZ001", "Wind Zone 001", "VRE > Wind PP")
    return out + rows(*at, *wind, "RE Curtailment", line(7, 0), years=(2024, 2025))


def text_of(table: list[Row], newline: str = "\n") -> str:
    """The rows as CSV text; cells with commas are quoted."""
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, HEADER, lineterminator=newline)
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue()
