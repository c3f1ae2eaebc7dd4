"""Training rows: from responses to prompts and completions, split by country, checked, written."""

from stakelib.dialogues.build import GUIDE_MIX, Dialogue, brief, build, mix_for
from stakelib.dialogues.check import check, problems_of
from stakelib.dialogues.files import read, write
from stakelib.dialogues.formats import completion_text, guide_test_prompts, prompt_text
from stakelib.dialogues.prepare import open_review, prepare, scenarios_needed
from stakelib.dialogues.review import Review
from stakelib.dialogues.split import split

__all__ = [
    "GUIDE_MIX",
    "Dialogue",
    "Review",
    "brief",
    "build",
    "check",
    "completion_text",
    "guide_test_prompts",
    "mix_for",
    "open_review",
    "prepare",
    "problems_of",
    "prompt_text",
    "read",
    "scenarios_needed",
    "split",
    "write",
]
