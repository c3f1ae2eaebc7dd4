"""The Scenario Dialogue Tool's scenario, with its attribute names, in MW, GWh, m$ and Mt CO2.

A field that a file does not give stays None: unknown, which is not zero.
"""

from __future__ import annotations

import functools
import json
import re
from importlib.resources import files
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, create_model, model_validator

from stakelib.scenarios.names import one_line, plain

KINDS = {
    "renewables": ("hydro", "solarPV", "solarCSP", "wind", "geothermal", "biomass"),
    "fossil": ("coal", "gas", "diesel", "hfo"),
    "storage": ("battery", "pumpStorage"),
    "other": ("nuclear", "interconnector"),
}  # the technologies of each category
LARGEST = 1e9  # above any national figure in the units below; keeps sums finite
Amount = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False, strict=True)]


@functools.cache
def units() -> dict[str, dict[str, float]]:
    """units.json: for each standard unit (MW, GWh, m$, Mt CO2) the spellings that are read, with their factors."""
    table = json.loads(files(__package__).joinpath("units.json").read_text(encoding="utf-8"))
    return {name: row for name, row in table.items() if isinstance(row, dict)}


def unit_factor(text: str, standard: str) -> float:
    """What a value in unit `text` is multiplied by to be in `standard`; ValueError for a unit not in units.json.

    Blanks do not count; neither does upper or lower case, except for emissions: "mt" may mean a metric ton.
    """
    known = units()[standard]
    key = re.sub(r"[\s_]+", "", text).replace("₂", "2")
    if standard == "Mt CO2":
        key = key.removesuffix("CO2")
    else:
        known, key = {name.casefold(): factor for name, factor in known.items()}, key.casefold()
    if key not in known:
        names = ", ".join(list(units()[standard])[:4])
        raise ValueError(f"unit {text[:40]!r} is not known for {standard} ({names} and others are: units.json)")
    return known[key]


Name = Annotated[str, Field(max_length=120), AfterValidator(one_line)]
Text = Annotated[str, AfterValidator(plain)]  # it is printed, and may be empty


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class Mix(_Part):
    """Amounts by category; storage and other may be unknown."""

    renewables: Amount | None = None
    fossil: Amount | None = None
    storage: Amount | None = None
    other: Amount | None = None


def re_share(output: dict[str, float | None]) -> float | None:
    """Percent of generation that is renewable, storage left out; None where a part of the sum is unknown."""
    renewables, fossil = output.get("renewables"), output.get("fossil")
    if renewables is None or fossil is None:
        return None
    total = renewables + fossil + (output.get("other") or 0)
    return 100 * renewables / total if total else None


class _Measured(_Part):
    """Something with a unit: values are converted to STANDARD."""

    STANDARD: ClassVar[str] = ""
    unit: str

    @model_validator(mode="after")
    def _normalise(self) -> _Measured:
        factor = unit_factor(self.unit, self.STANDARD)
        for name, value in self:
            if isinstance(value, Mix):
                setattr(self, name, Mix(**{k: v * factor for k, v in value if v is not None}))
            elif isinstance(value, float):
                if value * factor > LARGEST:
                    raise ValueError(f"{value:g} {self.unit} is above {LARGEST:g} {self.STANDARD}")
                setattr(self, name, value * factor)
        self.unit = self.STANDARD
        return self


def _measured(standard: str, **parts: Any) -> Any:
    """A class of measured things in `standard`: its parts are amounts, or mixes of amounts by category."""
    made = create_model("Measured", __base__=_Measured, **{name: (kind, ...) for name, kind in parts.items()})
    made.STANDARD = standard
    return made


Capacity = _measured("MW", total=Mix)
Generation = _measured("GWh", output=Mix)
Additions = _measured("MW", additions=Mix)  # per year
Investment = _measured("m$", cumulative=Amount)
Emissions = _measured("Mt CO2", total=Amount)
PowerValue, EnergyValue, MoneyValue = (_measured(unit, value=Amount) for unit in ("MW", "GWh", "m$"))


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

    def at(self, place: str) -> Any:
        """What stands at `place`, such as "investment.cumulative"; None where any part of it is unknown."""
        return functools.reduce(lambda part, name: getattr(part, name, None), place.split("."), self)


class Technologies(_Part):
    """Installed MW by technology; an unknown name is an error, because every share would be wrong without it."""

    model_config = ConfigDict(extra="forbid")
    hydro: Amount | None = None
    solarPV: Amount | None = None
    solarCSP: Amount | None = None
    wind: Amount | None = None
    geothermal: Amount | None = None
    biomass: Amount | None = None
    coal: Amount | None = None
    gas: Amount | None = Field(None, validation_alias=AliasChoices("gas", "naturalGas"))
    diesel: Amount | None = None
    hfo: Amount | None = None
    nuclear: Amount | None = None
    battery: Amount | None = None
    pumpStorage: Amount | None = None
    interconnector: Amount | None = None


class Metadata(_Part):
    country: Name
    scenarioName: Name
    modelVersion: Text | None = None
    dateCreated: Text | None = None
    sourceFile: Text | None = None
    description: Text | None = None
    derived: list[Text] | None = None  # assumptions behind figures that the file itself does not state
    warnings: list[Text] | None = None  # what a reader left out or doubts
    cell: dict[str, str] | None = Field(None, exclude=True)  # the sampler's axes; never written out


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
