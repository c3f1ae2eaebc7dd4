"""Shared by all tests: where the course lies, and how hard hypothesis works."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("MPLBACKEND", "Agg")  # no window may open
# No deadline: the machine is shared. The same examples every time: a red test is red for everybody.
settings.register_profile(
    "course", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("course")


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder that holds course.py."""
    return Path(__file__).resolve().parents[1]
