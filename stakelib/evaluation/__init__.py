"""Stage evaluation: ask base and tuned the same held-out prompts, measure each answer, compare, report."""

from stakelib.evaluation.answers import answers
from stakelib.evaluation.asking import ask, ask_guide_prompts, held_out, nine_voices
from stakelib.evaluation.measures import MEASURES, score
from stakelib.evaluation.report import report
from stakelib.evaluation.statistics import by_stakeholder, compare, smallest_visible_difference, wilson
from stakelib.evaluation.tool import (
    accepted_share,
    ask_as_tool,
    laid_over,
    tool_patch,
    tool_requests,
    try_in_tool,
    waiting,
)  # fmt: skip

__all__ = [
    "MEASURES", "answers", "ask", "ask_guide_prompts", "held_out", "nine_voices",
    "by_stakeholder", "compare", "report", "score", "smallest_visible_difference", "wilson",
    "accepted_share", "ask_as_tool", "laid_over", "tool_patch", "tool_requests", "try_in_tool", "waiting",
]  # fmt: skip
