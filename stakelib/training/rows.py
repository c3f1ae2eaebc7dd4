"""Training rows as token ids: everything that can be wrong with them is said before a weight is loaded."""

from __future__ import annotations

import codecs
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from stakelib.dialogues.files import layout
from stakelib.models import Rendered, render
from stakelib.run import CourseError

MEND = "mend these lines or run notebook 01 again"
Rows = list[tuple[str, dict[str, Any]]]  # where it stands ("train.jsonl, line 3 (row x)"), and the row


def load_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file. Raises CourseError listing every line that is no JSON object with prompt and completion."""
    rows, problems = _read(file)
    return _sound([row for _, row in rows], problems, MEND)


def render_rows(tokenizer: Any, rows: list[dict[str, Any]], max_length: int) -> list[Rendered]:
    """ids and masks of all rows. Raises CourseError listing every row that cannot be learned whole: none is cut."""
    found = _render(tokenizer, [(f"row {r.get('id', i)}", r) for i, r in enumerate(rows)], max_length)
    return _sound(*found, "mend or shorten these rows, or raise max_length in the recipe if memory allows")


def checked_rows(tokenizer: Any, files: list[Path], max_length: int) -> list[list[Rendered]]:
    """`load_rows` and `render_rows` of several files; one CourseError lists what is wrong in all of them."""
    read = [_read(file) for file in files]
    found = [_render(tokenizer, rows, max_length) for rows, _ in read]
    problems = [p for (_, unread), (_, unfit) in zip(read, found, strict=True) for p in (*unread, *unfit)]
    mend = f"{MEND}; a row that is only too long can be shortened"
    return _sound([rendered for rendered, _ in found], problems, mend)


def _sound(rows: list[Any], problems: list[str], mend: str) -> list[Any]:
    if problems:
        raise CourseError(problems, mend)
    return rows


def _read(file: Path) -> tuple[Rows, list[str]]:
    """The good lines of a file, and what is wrong with the others."""
    text, rows, problems = file.read_bytes(), [], []
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return [], [f"{file.name} is UTF-16: save it as UTF-8"]
    if text.startswith(codecs.BOM_UTF8):  # many programs, mlx-lm among them, cannot read what follows
        problems.append(f"{file.name}, line 1: begins with a byte order mark (BOM): save it as UTF-8 without BOM")
        text = text[len(codecs.BOM_UTF8) :]
    # not splitlines(): it also cuts at U+2028 and the like, which JSON strings may hold
    for number, line in ((n, part) for n, part in enumerate(text.split(b"\n"), 1) if part.strip()):
        where = f"{file.name}, line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
            where += f" (row {str(row['id'])[:120]})" if "id" in row else ""
            texts = {k: row.get(k) for k in ("prompt", "completion")}
            missing = [k for k, value in texts.items() if not isinstance(value, str) or not value.strip()]
            problems += [f"{where}: '{k}' is empty, missing or no text" for k in missing]
            "".join(v for v in texts.values() if isinstance(v, str)).encode("utf-8")  # JSON may hold half a character
            rows += [] if missing else [(where, row)]
        except UnicodeError as problem:
            problems.append(f"{where}: not UTF-8 ({problem.reason})")
        except (ValueError, TypeError, AttributeError, RecursionError):
            problems.append(f"{where}: not a JSON object")
    if problems and not rows and (held := layout(text.decode("utf-8", "replace"))):
        return [], [f"{file.name} holds {held}; each row must be one object on a line of its own"]
    return rows, problems if problems or rows else [f"{file.name} has no rows"]


def _render(tokenizer: Any, rows: Rows, max_length: int) -> tuple[list[Rendered], list[str]]:
    """The rows that can be learned as they stand, and what is wrong with the others."""
    rendered, problems = [], []
    control = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    for where, row in rows:
        text = row["prompt"] + row["completion"]
        # They would be learned as plain letters, so no harm comes of them; but nobody means to write them.
        problems += [f"{where}: holds {token}, a control token of this model" for token in control if token in text]
        try:
            ready = replace(render(tokenizer, row["prompt"], row["completion"]), where=where)
        except CourseError as problem:
            problems += [f"{where}: {said}" for said in problem.problems]
            continue
        if len(ready.ids) > max_length:
            problems.append(f"{where}: {len(ready.ids)} tokens, at most {max_length} allowed")
        rendered.append(ready)
    return rendered, problems
