"""The same seed gives the same scenarios, figures and rows on every Python, system and order of sets."""

from __future__ import annotations

import builtins
import functools
import math
import operator
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from splat_file import kestrelia, text_of

from benchmarks.same_rows import HASH_SEEDS, NAMES, digests, of
from stakelib.scenarios import derive_metrics, load, sample, scenario_id
from stakelib.scenarios.names import name_key, one_line

# of sample(60, 7) and its rows; a change of them is a change of every record
IDS = "09828924589e24f2"


@functools.cache
def here() -> dict[str, str]:
    return digests(["smoke"])


def from_left(values: Iterable[float], start: float = 0) -> float:
    """sum() as it was until Python 3.11."""
    return functools.reduce(operator.add, values, start)


def exact(values: Iterable[float], start: float = 0) -> float:
    """sum() of floats as it is from Python 3.12 on, nearly always."""
    values = list(values)
    return math.fsum([start, *values]) if any(isinstance(v, float) for v in values) else from_left(values, start)


@pytest.mark.parametrize("other", [from_left, exact])
def test_no_figure_hangs_on_how_this_python_sums(
    other: Callable[..., float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(text_of([r | {"Value": r["Value"] * 0.1} for r in kestrelia()]), encoding="utf-8")
    before = here(), [scenario_id(s) for s in [*load(path), *sample(80, 3)]]
    assert before[0]["ids"] == IDS
    monkeypatch.setattr(builtins, "sum", other)
    assert (digests(["smoke"]), [scenario_id(s) for s in [*load(path), *sample(80, 3)]]) == before


def test_the_two_ways_to_sum_differ() -> None:
    assert from_left([0.1] * 10) != exact([0.1] * 10) == 1


def test_figures_come_from_rounded_sums_of_many_sizes() -> None:
    """A last digit that differs between systems may stand in no figure: every one is rounded as it is printed."""
    for scenario in sample(30, 7):
        assert all(m.value == round(m.value, 2) for m in derive_metrics(scenario).figures.values())


def test_names_do_not_hang_on_the_unicode_table_of_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    new = "A\u1c89\U00016d40\U0001fae9\u2ffcb"  # characters that only some of the supported Pythons know
    assert one_line(new) == new and name_key(new).startswith("a")
    old = one_line("Ke\u00adn\u200dya\u2066\u0085x"), name_key("ÀÉ ß ｋ’ ﬁ")
    for name in ("normalize", "category"):
        monkeypatch.setattr(unicodedata, name, getattr(unicodedata.ucd_3_2_0, name))
    assert (one_line("Ke\u00adn\u200dya\u2066\u0085x"), name_key("ÀÉ ß ｋ’ ﬁ")) == old == ("Kenya x", "ae ss k' fi")


def test_the_order_of_sets_changes_nothing() -> None:
    found = [of(sys.executable, ["smoke"], seed) for seed in HASH_SEEDS]
    assert [row | {"python": ""} for row in found] == [here() | {"python": ""}] * len(HASH_SEEDS)


@pytest.mark.parametrize("name", NAMES)
def test_another_python_makes_the_same_rows(name: str) -> None:
    python = shutil.which(name)
    if not python or name == f"python{sys.version_info.major}.{sys.version_info.minor}":
        pytest.skip(f"{name} is {'this Python' if python else 'not on the PATH'}")
    needed = [python, "-c", "import pydantic, yaml, jinja2, psutil, filelock"]
    if subprocess.run(needed, capture_output=True, check=False).returncode:
        pytest.skip(f"{name} lacks pydantic, pyyaml, jinja2, psutil or filelock")
    assert of(python, ["smoke"], "0") | {"python": ""} == here() | {"python": ""}
