"""Scenarios: read them, compute what follows from them, or sample believable synthetic ones."""

from stakelib.scenarios.load import load, scenario_id
from stakelib.scenarios.metrics import Metric, Metrics, derive_metrics, explain
from stakelib.scenarios.names import country_key, country_profile, name_key
from stakelib.scenarios.sampler import sample
from stakelib.scenarios.schema import Milestone, Scenario

__all__ = [
    "Metric",
    "Metrics",
    "Milestone",
    "Scenario",
    "country_key",
    "country_profile",
    "derive_metrics",
    "explain",
    "load",
    "name_key",
    "sample",
    "scenario_id",
]
