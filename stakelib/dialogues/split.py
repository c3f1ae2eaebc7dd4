"""Split by scenario, with whole countries held out: a test row's country was never seen in training."""

from __future__ import annotations

import random
from collections.abc import Sequence

from stakelib.dialogues.build import Dialogue
from stakelib.run import CourseError
from stakelib.scenarios import country_key

TEST, VALID = 0.2, 0.1


def split(rows: Sequence[Dialogue], seed: int = 0) -> list[Dialogue]:
    """The rows with `split` set: test = whole countries holding about 20 % of the scenarios, valid = 10 % of the rest.

    Two spellings or names of a country are one country (`country_key`). Raises CourseError when there are too few
    countries or scenarios to hold any out.
    """
    places = {row.scenario_id: country_key(row.country) for row in rows}
    scenarios: dict[str, list[str]] = {}
    for name, country in sorted(places.items()):
        scenarios.setdefault(country, []).append(name)
    test = _held_out(scenarios, round(TEST * len(places)), random.Random(f"split-{seed}"))
    rest = [name for country, names in scenarios.items() if country not in test for name in names]
    if not test or len(rest) < 2:
        raise CourseError(
            f"{len(places)} scenarios of {len(scenarios)} countries are too few to split",
            "use at least 5 scenarios from 3 countries.",
        )
    valid = set(random.Random(f"valid-{seed}").sample(rest, max(1, round(VALID * len(rest)))))
    part = {
        name: "test" if country in test else "valid" if name in valid else "train" for name, country in places.items()
    }
    return [row.model_copy(update={"split": part[row.scenario_id]}) for row in rows]


def _held_out(scenarios: dict[str, list[str]], wanted: int, rng: random.Random) -> set[str]:
    """Countries, in random order, as long as they fit into `wanted` scenarios; the smallest one if none does."""
    if len(scenarios) < 2:
        return set()
    order = rng.sample(sorted(scenarios), len(scenarios))
    chosen: set[str] = set()
    count = 0
    for country in order[:-1]:
        if count + len(scenarios[country]) <= wanted:
            chosen.add(country)
            count += len(scenarios[country])
    return chosen or {min(order, key=lambda c: len(scenarios[c]))}
