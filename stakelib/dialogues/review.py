"""Review: a person accepts, rejects or rewrites generated rows. Decisions lie beside the rows, keyed by row id."""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from stakelib.dialogues.build import Dialogue
from stakelib.dialogues.check import problems_of, said
from stakelib.dialogues.files import read, read_lines
from stakelib.dialogues.numbers import mentions
from stakelib.run import CourseError, atomic_write_text, writing

GENERATED, EDITS = "generated.jsonl", "edits.jsonl"
GOAL = (50, 100)  # rows that the guide asks to improve by hand
STATES = ("not reviewed", "accepted", "rejected", "edited", "failing", "changed since")
COLUMNS = ("id", "stakeholder", "task", "country", "scenario", "prompt", "decision", "completion", "check", "of")
Action = Literal["accept", "reject", "edit"]


class Edit(BaseModel):
    """One decision. `of` is a fingerprint of the generated row that was looked at."""

    id: str
    action: Action
    completion: str = ""
    source: Literal["edited", "imported"] = "edited"
    of: str = ""


def read_edits(folder: str | Path) -> dict[str, Edit]:
    """Decisions by row id, empty if nobody reviewed anything; CourseError lists every broken line."""
    path = Path(folder) / EDITS
    mend = f"mend these lines of {path}, or move the file away to start the review again."
    return {e.id: e for e in read_lines(Edit, path, mend)} if path.exists() else {}


def apply_edits(rows: Iterable[Dialogue], edits: dict[str, Edit]) -> list[Dialogue]:
    """The rows as reviewed: rejected ones left out, rewritten ones with their new text; unknown ids wait."""
    return [_edited(row, edits.get(row.id)) for row in rows if getattr(edits.get(row.id), "action", "") != "reject"]


def _edited(row: Dialogue, edit: Edit | None) -> Dialogue:
    if edit is None or edit.action != "edit":
        return row
    new = row.model_copy(update={"completion": edit.completion, "source": edit.source})
    left = {(m.unit, round(m.value, 6)) for m in mentions(said(new))}
    return new.model_copy(update={"facts": [f for f in row.facts if (f.unit, round(f.value, 6)) in left]})


def _fingerprint(row: Dialogue) -> str:
    return hashlib.sha256(f"{row.prompt}\0{row.completion}".encode()).hexdigest()[:12]


class Review:
    """The rows of a folder `training_data/` and what people decided about them; every decision is on disk at once."""

    def __init__(self, folder: str | Path, tokenizer: Any = None) -> None:
        self.folder, self.tokenizer = Path(folder), tokenizer
        self.rows = {row.id: row for row in read(self.folder / GENERATED)}
        self.edits = read_edits(self.folder)

    def decide(
        self, row_id: str, action: Action, completion: str = "", source: Literal["edited", "imported"] = "edited"
    ) -> list[str]:
        """Save one decision and return what the gates say against the row as it is now (empty: nothing)."""
        if action == "edit" and completion == self.rows[row_id].completion:
            self.reset(row_id)  # typed, and taken back
            return self.problems(row_id)
        before = self.edits.get(row_id)  # a rejected row keeps its rewritten text, in case it is taken back
        text = completion if action == "edit" else before.completion if before and action == "reject" else ""
        edit = Edit(id=row_id, action=action, completion=text, source=source, of=_fingerprint(self.rows[row_id]))
        self._save({row_id: edit})
        return self.problems(row_id)

    def reset(self, row_id: str) -> None:
        """Take a decision back: a rejected rewrite is a rewrite again, anything else is forgotten."""
        edit = self.edits.get(row_id)
        again = edit is not None and edit.action == "reject" and edit.completion != ""
        self._save({row_id: edit.model_copy(update={"action": "edit"}) if edit and again else None})

    def refresh(self) -> None:
        """Read the decisions again: another window may have made some."""
        self.edits = read_edits(self.folder)

    def _save(self, changes: dict[str, Edit | None]) -> None:
        """Read again first: another window may have decided about other rows meanwhile."""
        self.edits = {i: e for i, e in (read_edits(self.folder) | changes).items() if e is not None}
        text = "".join(edit.model_dump_json() + "\n" for edit in self.edits.values())
        atomic_write_text(self.folder / EDITS, text)

    def current(self, row_id: str) -> Dialogue:
        """The row with its edit, if it has one."""
        return _edited(self.rows[row_id], self.edits.get(row_id))

    def problems(self, row_id: str) -> list[str]:
        """What the gates say against the row as it is now."""
        return problems_of(self.current(row_id), self.tokenizer)

    def state(self, row_id: str) -> str:
        """One of STATES; "failing": rewritten, and a gate objects; "changed since": the rules now say another text."""
        edit = self.edits.get(row_id)
        if edit is None:
            return "not reviewed"
        if edit.action == "edit" and self.problems(row_id):
            return "failing"
        if edit.of and edit.of != _fingerprint(self.rows[row_id]):
            return "changed since"
        return {"accept": "accepted", "reject": "rejected", "edit": "edited"}[edit.action]

    def select(self, stakeholder: str = "", task: str = "", state: str = "") -> list[str]:
        """Ids of the rows with this stakeholder id, task and state; an empty filter takes all."""
        return [
            i
            for i, row in self.rows.items()
            if stakeholder in ("", row.stakeholder_id)
            and task in ("", row.task)
            and (not state or self.state(i) == state)
        ]

    def counts(self) -> dict[str, int]:
        """Rows per state."""
        found = Counter(self.state(i) for i in self.edits if i in self.rows)
        return {state: found[state] for state in STATES[1:]}

    def progress(self) -> str:
        """One line: how many of the guide's 50-100 rows are reviewed, and with what result."""
        counts = self.counts()
        done = sum(counts[state] for state in ("accepted", "rejected", "edited"))
        told = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
        return f"{done} of {GOAL[0]}-{GOAL[1]} rows reviewed" + (f": {told}" if told else "")

    def text(self, row_id: str) -> str:
        """One row as plain text, for a terminal or a notebook without widgets."""
        row, problems = self.current(row_id), self.problems(row_id)
        facts = [f"- {f.metric} {f.year}: {f.value:g} {f.unit}" for f in row.facts]
        return "\n".join(
            [
                f"{row.id} ({row.task}, {self.state(row_id)})",
                "",
                "PROMPT",
                row.prompt,
                "",
                "COMPLETION",
                row.completion,
                "",
                "FACTS",
                *facts,
                "",
                "GATES",
                *(problems or ["no objection"]),
            ]
        )

    def to_csv(self, path: str | Path) -> Path:
        """All rows for a reviewer without Jupyter: a file that Excel opens, to change `completion` or `decision` in."""
        with writing(Path(path)) as part, part.open("w", encoding="utf-8-sig", newline="") as stream:
            table = csv.writer(stream)
            table.writerow(COLUMNS)
            for i in self.rows:
                row, edit = self.current(i), self.edits.get(i)
                cells = (
                    i,
                    row.stakeholder,
                    row.task,
                    row.country,
                    row.scenario,
                    row.prompt,
                    edit.action if edit else "",
                    row.completion,
                    "; ".join(self.problems(i)),
                    self._stamp(i),
                )
                table.writerow(map(as_cell, cells))
        return Path(path)

    def from_csv(self, path: str | Path) -> int:
        """Take decisions and new texts from a file that `to_csv` wrote; returns how many rows changed.

        All or nothing: CourseError lists every problem with file and row, and nothing is saved.
        """
        self.refresh()
        changes: dict[str, Edit | None] = {}
        problems: list[str] = []
        for number, cells in read_table(Path(path), ("id", "decision", "completion", "of"), "to_csv"):
            edit, wrong = self._from_cells(cells, changes)
            problems += [f"{Path(path).name}, row {number}: {why}" for why in wrong]
            changes |= {edit.id: edit} if edit else {}
        if problems:
            raise CourseError(problems, "mend these rows in the file and read it again; nothing was taken over.")
        changes = {i: e for i, e in changes.items() if (e.action, e.completion) != self._decision(i)}
        self._save(changes)
        return len(changes)

    def _decision(self, row_id: str) -> tuple[str, str]:
        edit = self.edits.get(row_id)
        return (edit.action, edit.completion if edit.action == "edit" else "") if edit else ("", "")

    def _stamp(self, row_id: str) -> str:
        """Fingerprint of a row and its decision: a sheet that comes back late must not undo newer work."""
        made_of = f"{_fingerprint(self.rows[row_id])}{self._decision(row_id)}"
        return f"v{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"  # Excel takes 1e5 for a number, v1e5 never

    def _from_cells(self, cells: dict[str, str], seen: dict[str, Any]) -> tuple[Edit | None, list[str]]:
        row, action = self.rows.get(cells["id"]), cells["decision"].strip().lower()
        if row is None:
            return None, [f"no row has the id {cells['id']!r}"]
        wrong = [f"a second row with the id {row.id}"] if row.id in seen else []
        wrong += (
            [f"decision {action!r} is none of accept, reject, edit or empty"]
            if action not in ("", "accept", "reject", "edit")
            else []
        )
        text = cells["completion"]
        if action != "reject" and text != row.completion:
            action = "edit"
            new = row.model_copy(update={"completion": text, "source": "imported"})
            wrong += problems_of(new, self.tokenizer)
        elif action == "edit":
            action = "accept"
        kept = action if action != "edit" or text != row.completion else ""
        if (kept, text if kept == "edit" else "") != self._decision(row.id) and cells["of"] != self._stamp(row.id):
            wrong = ["the row or its decision changed after this sheet was written; write a new one with to_csv"]
        if wrong or not action:
            return None, wrong
        return Edit(
            id=row.id,
            action=action,
            completion=text if action == "edit" else "",
            source="imported",
            of=_fingerprint(row),
        ), []


def as_cell(text: str) -> str:
    """Excel runs a cell that begins like a formula: an apostrophe keeps it text."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "'") else text


def read_table(path: Path, columns: Sequence[str], writer: str) -> list[tuple[int, dict[str, str]]]:
    """(row number as Excel counts, cells) of a CSV, comma or semicolon, that the function `writer` wrote.

    CourseError if it lacks one of `columns` or is damaged.
    """
    if not path.is_file():
        raise CourseError(f"{path}: no such file", f"write it with {writer} first.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CourseError(f"{path.name} is not UTF-8 ({error.reason})", "save it in Excel as 'CSV UTF-8'.") from error
    head = text.split("\n", 1)[0]
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True))
    except csv.Error as error:
        raise CourseError(f"{path.name}: {error}", f"write the file again with {writer} and edit that.") from error
    missing = [c for c in columns if not rows or c not in rows[0]]
    if missing:
        raise CourseError([f"{path.name}: column {c!r} is missing" for c in missing], f"keep the columns of {writer}.")
    out, problems = [], []
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(rows[0]):
            problems += [f"{path.name}, row {number}: {len(row)} cells, want {len(rows[0])}"] if any(row) else []
            continue
        cells = (c.replace("\r\n", "\n").replace("\r", "\n") for c in row)
        out.append((number, dict(zip(rows[0], (c[1:] if c[:1] == "'" else c for c in cells), strict=True))))
    if problems:
        raise CourseError(problems, "mend these rows in the file and read it again; nothing was taken over.")
    return out
