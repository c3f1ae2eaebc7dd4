"""Scenarios: read them, compute what follows from them, or sample believable synthetic ones."""

from stakelib.scenarios.load import load, scenario_id
from stakelib.scenarios.metrics import Metric, Metrics, derive_metrics, explain
from stakelib.scenarios.sampler import country_profile, sample
from stakelib.scenarios.schema import Milestone, Scenario

__all__ = [
    "Metric",
    "Metrics",
    "Milestone",
    "Scenario",
    "country_profile",
    "derive_metrics",
    "explain",
    "load",
    "sample",
    "scenario_id",
]
