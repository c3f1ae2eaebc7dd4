"""Shared by all tests: where the course lies, and how hard hypothesis works."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("MPLBACKEND", "Agg")  # no window may open
# What a test starts imports this clone's stakelib, whichever clone the environment was set up for.
others = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *others])
if "PYTEST_XDIST_WORKER" in os.environ:  # two files are tested at a time: more threads than cores wait for each other
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
LONGEST_FIRST = ("test_spine", "test_browser", "test_real", "test_variety", "test_never_lost", "test_mlx_life")
# No deadline: the machine is shared. The same examples every time: a red test is red for everybody.
settings.register_profile(
    "course", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("course")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker ends long after the other."""
    items.sort(key=lambda item: (*LONGEST_FIRST, item.path.stem).index(item.path.stem))


@pytest.fixture()
def tell(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Says a measured figure; all are shown at the end, whichever worker measured them."""
    return lambda text: record_property("told", text)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [r for rs in terminalreporter.stats.values() for r in rs if getattr(r, "when", None) == "call"]
    if told := [str(text) for r in reports for name, text in r.user_properties if name == "told"]:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(told))


@pytest.fixture()
def many_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    """For simulations: statsmodels collects all garbage at every correction, half a second beside loaded models."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds course.py."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture()
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for caches and runs, so that no test sees or touches the course's own."""
    monkeypatch.setenv("STAKE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STAKE_RUN_ROOT", str(tmp_path / "runs"))
    return tmp_path


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the tiny model, made once for all tests; no test may change what is in it.

    A second thread makes so small a model no faster, and on a busy machine several times slower.
    """
    import torch

    from stakelib.models import base_model

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAKE_CACHE", str(folder))
        base_model("tiny-gemma")
    return folder


@pytest.fixture()
def tiny(home: Path, tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiny model (a BaseModel); runs go to a folder of the test's own."""
    from stakelib.models import base_model

    monkeypatch.setenv("STAKE_CACHE", str(tiny_cache))
    return base_model("tiny-gemma")


@pytest.fixture(scope="session")
def tokenizer(tiny_cache: Path) -> Any:
    """The tiny model's tokenizer."""
    from stakelib.models import load_tokenizer

    return load_tokenizer(tiny_cache / "models" / "tiny-gemma")


@pytest.fixture(scope="session")
def made(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A trained and exported tiny model, see exported.py; nobody changes it."""
    from exported import make

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAKE_CACHE", str(tiny_cache))
        patch.setenv("PATH", "")  # no llama-quantize of this machine's own
        return make(tiny_cache / "models" / "tiny-gemma", tmp_path_factory.mktemp("export"))


@pytest.fixture()
def copied(made: Any, tiny_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """That run once more, to be spoiled."""
    from exported import copy

    monkeypatch.setenv("STAKE_CACHE", str(tiny_cache))
    return copy(made, tmp_path)
