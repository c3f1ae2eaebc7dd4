"""The Scenario Dialogue Tool's scenario, with its attribute names, in MW, GWh, m$ and Mt CO2.

A field that a file does not give stays None: unknown, which is not zero.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

LARGEST = 1e9  # above any national figure in the units below; keeps sums finite
Amount = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False, strict=True)]

POWER = {"MW": 1.0, "GW": 1e3, "kW": 1e-3}
ENERGY = {"GWh": 1.0, "TWh": 1e3, "MWh": 1e-3}
MONEY = {"m$": 1.0, "million USD": 1.0, "B$": 1e3, "k$": 1e-3, "USD": 1e-6}
EMISSIONS = {"Mt CO2": 1.0, "kt CO2": 1e-3, "t CO2": 1e-6}


def _one_line(text: str) -> str:
    """Names land in one prompt line: no line breaks, no invisible characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if not text:
        raise ValueError("must not be empty")
    return text


Name = Annotated[str, Field(max_length=120), AfterValidator(_one_line)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class Mix(_Part):
    """Amounts by category; storage and other may be unknown."""

    renewables: Amount | None = None
    fossil: Amount | None = None
    storage: Amount | None = None
    other: Amount | None = None


class _Measured(_Part):
    """Something with a unit: the first unit of UNITS is the standard one, to which values are converted."""

    UNITS: ClassVar[dict[str, float]] = {}
    unit: str

    @model_validator(mode="after")
    def _normalise(self) -> _Measured:
        if self.unit not in self.UNITS:
            raise ValueError(f"unit {self.unit!r} is not one of {', '.join(self.UNITS)}")
        factor = self.UNITS[self.unit]
        for name, value in self:
            if isinstance(value, Mix):
                setattr(self, name, Mix(**{k: v * factor for k, v in value if v is not None}))
            elif isinstance(value, float):
                setattr(self, name, value * factor)
        self.unit = next(iter(self.UNITS))
        return self


class Capacity(_Measured):
    UNITS = POWER
    total: Mix


class Generation(_Measured):
    UNITS = ENERGY
    output: Mix


class Additions(_Measured):
    """MW per year."""

    UNITS = POWER
    additions: Mix


class Investment(_Measured):
    UNITS = MONEY
    cumulative: Amount


class Emissions(_Measured):
    UNITS = EMISSIONS
    total: Amount


class PowerValue(_Measured):
    UNITS = POWER
    value: Amount


class EnergyValue(_Measured):
    UNITS = ENERGY
    value: Amount


class MoneyValue(_Measured):
    UNITS = MONEY
    value: Amount


class Milestone(_Part):
    """One year of a scenario. `reShare` is percent of generation."""

    year: Annotated[int, Field(ge=2020, le=2100, strict=True)]
    capacity: Capacity | None = None
    generation: Generation | None = None
    reShare: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False, strict=True)] | None = None
    investment: Investment | None = None
    emissions: Emissions | None = None
    peakDemand: PowerValue | None = None
    capacityAdditions: Additions | None = None
    annualOMCosts: MoneyValue | None = None
    curtailment: EnergyValue | None = None
    imports: EnergyValue | None = None


class Technologies(_Part):
    """Installed MW by technology."""

    hydro: Amount | None = None
    solarPV: Amount | None = None
    solarCSP: Amount | None = None
    wind: Amount | None = None
    geothermal: Amount | None = None
    biomass: Amount | None = None
    coal: Amount | None = None
    gas: Amount | None = None
    diesel: Amount | None = None
    hfo: Amount | None = None
    nuclear: Amount | None = None
    battery: Amount | None = None
    pumpStorage: Amount | None = None
    interconnector: Amount | None = None


class Metadata(_Part):
    country: Name
    scenarioName: Name
    modelVersion: str | None = None
    dateCreated: str | None = None
    sourceFile: str | None = None
    description: str | None = None


class Scenario(_Part):
    """One national power-sector scenario, milestones in ascending years."""

    metadata: Metadata
    milestones: Annotated[list[Milestone], Field(min_length=1)]
    detailedTech: dict[int, Technologies] | None = None

    @model_validator(mode="before")
    @classmethod
    def _year_keys(cls, data: Any) -> Any:
        """JSON keys are strings: "2030" -> 2030."""
        table = data.get("detailedTech") if isinstance(data, dict) else None
        if not isinstance(table, dict):
            return data
        bad = [key for key in table if not str(key).isascii() or not str(key).isdigit() or len(str(key)) != 4]
        if bad:
            raise ValueError(f"detailedTech: {bad[0]!r} is not a year")
        return {**data, "detailedTech": {int(key): value for key, value in table.items()}}

    @model_validator(mode="after")
    def _ascending(self) -> Scenario:
        years = [m.year for m in self.milestones]
        if any(a >= b for a, b in zip(years, years[1:], strict=False)):
            raise ValueError(f"milestone years must ascend, got {years}")
        return self
