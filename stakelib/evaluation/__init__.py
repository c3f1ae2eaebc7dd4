"""Stage evaluation: ask base, tuned and their rivals the same held-out prompts, measure each answer, compare."""

from stakelib.evaluation.answers import answers
from stakelib.evaluation.asking import (
    SYSTEMS,
    ask,
    ask_guide_prompts,
    compare_runs,
    general,
    held_out,
    nine_voices,
    prompted,
    report_prompts,
    reworded,
    voices_heard,
)
from stakelib.evaluation.measures import MEASURES, confusion, score
from stakelib.evaluation.rating import Rating, agreement, preferences, rating_sheet, read_sheet
from stakelib.evaluation.report import report
from stakelib.evaluation.statistics import (
    by_stakeholder,
    compare,
    compare_each,
    gate,
    smallest_visible_difference,
    wilson,
)
from stakelib.evaluation.tool import (
    accepted_share,
    ask_as_tool,
    laid_over,
    tool_patch,
    tool_requests,
    try_in_tool,
    waiting,
)

__all__ = [
    "MEASURES",
    "Rating",
    "SYSTEMS",
    "accepted_share",
    "agreement",
    "answers",
    "ask",
    "ask_as_tool",
    "ask_guide_prompts",
    "by_stakeholder",
    "compare",
    "compare_each",
    "compare_runs",
    "confusion",
    "gate",
    "general",
    "held_out",
    "laid_over",
    "nine_voices",
    "preferences",
    "prompted",
    "rating_sheet",
    "read_sheet",
    "report",
    "report_prompts",
    "reworded",
    "score",
    "smallest_visible_difference",
    "tool_patch",
    "tool_requests",
    "try_in_tool",
    "voices_heard",
    "waiting",
    "wilson",
]
