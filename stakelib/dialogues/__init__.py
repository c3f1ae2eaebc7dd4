"""Training rows: from responses to prompts and completions, split by country, checked, written."""

from stakelib.dialogues.build import GUIDE_MIX, Dialogue, brief, build, mix_for
from stakelib.dialogues.check import check
from stakelib.dialogues.files import read, write
from stakelib.dialogues.formats import completion_text, guide_test_prompts, prompt_text
from stakelib.dialogues.prepare import prepare, scenarios_needed
from stakelib.dialogues.split import split

__all__ = ["GUIDE_MIX", "Dialogue", "brief", "build", "check", "completion_text", "guide_test_prompts",
           "mix_for", "prepare", "prompt_text", "read", "scenarios_needed", "split", "write"]
