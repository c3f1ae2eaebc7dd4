"""Thousands of damaged files: each loads rightly or raises one error type that names file and row or field."""

from __future__ import annotations

import copy
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from damaged_scenarios import BASES, DAMAGES, another_dress, damaged, encoded, outcome, truncated
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from splat_file import kestrelia, text_of

from stakelib.run import CourseError
from stakelib.scenarios import load


def content(path: Path) -> list[dict]:
    return [s.model_dump(exclude={"metadata": {"sourceFile", "warnings"}}) for s in load(path)]


def checked(path: Path) -> bool:
    """Whether the file loads; fails where anything but a CourseError escapes, or a figure is no figure."""
    return not isinstance(outcome(path), CourseError)


@pytest.mark.parametrize(("kind", "count"), [("json", 800), ("old", 600), ("template", 400), ("splat", 200)])
def test_two_thousand_damaged_files(kind: str, count: int, tmp_path: Path) -> None:
    path = tmp_path / f"mine-{kind}.txt"
    path.write_bytes(encoded(BASES[kind]))
    whole, loaded = content(path), 0
    for number in range(count):
        damage, rng = DAMAGES[number % len(DAMAGES)], random.Random(f"{kind}-{number}")
        path.write_bytes(damage(BASES[kind], rng))
        began = time.perf_counter()
        fine = checked(path)
        assert time.perf_counter() - began < 10, f"{damage.__name__} {number}"
        loaded += fine
        if damage is another_dress:
            assert content(path) == whole
        if damage is truncated and kind in ("json", "old"):
            assert not fine
    assert 0.12 * count <= loaded <= 0.88 * count  # neither everything passes nor everything fails


def test_workbooks_and_files_damaged_twice(tmp_path: Path) -> None:
    results = []
    for number in range(120):
        rng = random.Random(f"twice-{number}")
        path = tmp_path / "mine.csv"
        path.write_bytes(damaged(sorted(BASES)[number % len(BASES)], rng))
        results.append(checked(path))
    assert 6 < sum(results) < 114


leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8)
anything = st.recursive(leaf, lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=4), some))


def places_of(value: Any, at: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for k, v in items for p in [(*at, k), *places_of(v, (*at, k))]]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data(), kind=st.sampled_from(["json", "old"]), new=st.lists(anything, min_size=1, max_size=3))
def test_any_value_anywhere_in_json(data: st.DataObject, kind: str, new: list[Any], tmp_path: Path) -> None:
    whole = copy.deepcopy(json.loads(BASES[kind]))
    for value in new:
        *parents, last = data.draw(st.sampled_from(places_of(whole)))
        spot = whole
        for key in parents:
            spot = spot[key]
        spot[last] = value
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(whole), encoding="utf-8")
    assert outcome(path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 28), st.integers(0, 5), st.text(st.characters(codec="utf-8"), max_size=9)), max_size=4
    ),
    separator=st.sampled_from(",;\t"),
    decimal=st.sampled_from([None, ".", ","]),
)
def test_any_text_in_any_cell(
    changes: list[tuple[int, int, str]], separator: str, decimal: Any, tmp_path: Path
) -> None:
    rows = [line.split(",") for line in BASES["template"].splitlines()]
    for row, column, text in changes:
        rows[row][column] = text
    path = tmp_path / "mine.csv"
    path.write_text("\n".join(separator.join(row) for row in rows), encoding="utf-8", newline="")
    assert outcome(path, decimal=decimal)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "a",
        '"',
        "a,b\n1,2",
        "\x00",
        ",,,\n,,,",
        "\ufeff",
        "[[]]",
        "[1]",
        '["a"]',
        "country,scenario,year,quantity,value,unit\n",
        '{"capacity": {"byYear": 5}}',
        '{"capacity": 5}',
        '{"capacity": {"byYear": {"2030": {}}}}',
    ],
)
def test_almost_nothing_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "little.csv"
    path.write_bytes(encoded(text))
    assert not checked(path)


def test_a_first_year_with_next_to_no_emissions(tmp_path: Path) -> None:
    emissions = [{"year": y, "emissions": {"total": t, "unit": "Mt CO2"}} for y, t in ((2025, 1e-320), (2030, 1.0))]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"metadata": {"country": "A", "scenarioName": "B"}, "milestones": emissions}), "utf-8")
    assert checked(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CourseError, match="cannot be read"):
        load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [False, True], ids=["right", "all wrong"])
def test_a_million_rows(bad: bool, tmp_path: Path) -> None:
    head, _, body = text_of(kestrelia()).partition("\n")
    copies = 1_000_000 // body.count("\n") + 1
    body = body.replace(",m$,", ",pesos,") if bad else body
    path = tmp_path / "big.csv"
    with path.open("w", encoding="utf-8", newline="") as out:
        out.write(head + "\n")
        for number in range(copies):
            out.write(body.replace("base,", f"case {number % 40},"))
    began = time.perf_counter()
    assert checked(path) is not bad
    assert time.perf_counter() - began < 120  # a hang, not a benchmark
