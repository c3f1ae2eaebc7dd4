"""Nine stakeholders, as data files, and what each of them says about a scenario."""

from stakelib.voices.profiles import CONTEXTS, STAKEHOLDERS, VARIANTS, Profile
from stakelib.voices.respond import Concern, Fact, Response, respond

__all__ = ["CONTEXTS", "STAKEHOLDERS", "VARIANTS", "Concern", "Fact", "Profile", "Response", "respond"]
