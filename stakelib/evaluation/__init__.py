"""Stage evaluation: ask base and tuned the same held-out prompts, measure each answer, compare, report."""

from stakelib.evaluation.answers import answers
from stakelib.evaluation.asking import ask, ask_guide_prompts, held_out, nine_voices
from stakelib.evaluation.measures import MEASURES, score
from stakelib.evaluation.rating import Rating, agreement, preferences, rating_sheet, read_sheet
from stakelib.evaluation.report import report
from stakelib.evaluation.statistics import by_stakeholder, compare, smallest_visible_difference, wilson

__all__ = [
    "MEASURES", "answers", "ask", "ask_guide_prompts", "held_out", "nine_voices",
    "Rating", "agreement", "preferences", "rating_sheet", "read_sheet",
    "by_stakeholder", "compare", "report", "score", "smallest_visible_difference", "wilson",
]  # fmt: skip
