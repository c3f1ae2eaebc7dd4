"""Training rows as token ids: everything that can be wrong with them is said before a weight is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stakelib.models import Rendered, render
from stakelib.run import CourseError


def load_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file. Raises CourseError listing every line that is no JSON object with prompt and completion."""
    rows, problems = [], []
    try:
        # not splitlines(): it also cuts at U+2028 and the like, which JSON strings may hold
        lines = enumerate(file.read_text(encoding="utf-8").split("\n"), 1)
    except UnicodeDecodeError as problem:
        raise CourseError(f"{file.name} is not UTF-8 ({problem.reason})", "save it as UTF-8") from problem
    for number, line in ((n, text) for n, text in lines if text.strip()):
        try:
            row = json.loads(line)
            texts = {k: row.get(k) for k in ("prompt", "completion")}
            missing = [k for k, text in texts.items() if not isinstance(text, str) or not text.strip()]
            problems += [f"{file.name}, line {number}: '{k}' is empty, missing or no text" for k in missing]
            rows.append(row)
        except (ValueError, AttributeError):
            problems.append(f"{file.name}, line {number}: not a JSON object")
    if problems or not rows:
        raise CourseError(problems or [f"{file.name} has no rows"], "mend these lines or run notebook 01 again")
    return rows


def render_rows(tokenizer: Any, rows: list[dict[str, Any]], max_length: int) -> list[Rendered]:
    """ids and masks of all rows. Raises CourseError listing every row longer than `max_length` tokens: none is cut."""
    rendered = [render(tokenizer, r["prompt"], r["completion"]) for r in rows]
    long = [
        f"row {row.get('id', i)}: {len(r.ids)} tokens, at most {max_length} allowed"
        for i, (row, r) in enumerate(zip(rows, rendered, strict=True))
        if len(r.ids) > max_length
    ]
    if long:
        raise CourseError(long, "shorten these rows, or raise max_length in the recipe if memory allows")
    return rendered
