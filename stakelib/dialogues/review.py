"""Review: a person accepts, rejects or rewrites generated rows. Decisions lie beside the rows, keyed by row id."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from stakelib.dialogues.build import Dialogue
from stakelib.dialogues.check import problems_of, said
from stakelib.dialogues.files import read, read_log
from stakelib.dialogues.numbers import mentions
from stakelib.run import CourseError, atomic_write_text
from stakelib.sheets import plain, read_sheet, write_sheet

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
    """Decisions by row id, empty if nobody reviewed anything; CourseError lists the broken lines."""
    path = Path(folder) / EDITS
    mend = f"mend these lines of {path}, or move the file away to start the review again."
    return {e.id: e for e in read_log(Edit, path, mend)}


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

    def to_sheet(self, path: str | Path, separator: str = "") -> Path:
        """All rows for a reviewer without Jupyter, who changes `completion` or `decision` in Excel.

        The name ends in .xlsx or .csv. `separator`: ";" for a CSV that an Excel in French or German opens. What was
        written in a sheet of that name is taken over first, see `from_sheet`; it is replaced only then.
        """
        if Path(path).exists():
            self.from_sheet(path)
        return write_sheet(path, [self._cells(i) for i in self.rows], COLUMNS, separator)

    def from_sheet(self, path: str | Path) -> int:
        """Take decisions and new texts from a file that `to_sheet` wrote; returns how many rows changed.

        All or nothing: CourseError lists every problem with file and row, and nothing is saved. Rows in which nobody
        wrote are passed over.
        """
        self.refresh()
        changes: dict[str, Edit | None] = {}
        problems: list[str] = []
        table = read_sheet(path, ("id", "decision", "completion", "of"))
        for number, cells in zip(table.index, table.to_dict("records"), strict=True):
            edit, wrong = self._from_cells(cells, changes)
            problems += [f"{Path(path).name}, row {number}: {why}" for why in wrong]
            changes |= {edit.id: edit} if edit else {}
        if problems:
            action = (
                "mend these rows in the file and read it again, or give a new sheet another name; nothing was taken."
            )
            raise CourseError(problems, action)
        changes = {i: e for i, e in changes.items() if (e.action, e.completion) != self._decision(i)}
        if changes:
            self._save(changes)
        return len(changes)

    to_csv, from_csv = to_sheet, from_sheet  # what the notebooks call them

    def _cells(self, row_id: str) -> tuple[str, ...]:
        row, edit = self.current(row_id), self.edits.get(row_id)
        decision, check = edit.action if edit else "", "; ".join(self.problems(row_id))
        shown = (row.stakeholder, row.task, row.country, row.scenario, row.prompt)
        stamp = self._stamp(row_id) + _written(decision, row.completion)
        return (row_id, *shown, decision, row.completion, check, stamp)

    def _decision(self, row_id: str) -> tuple[str, str]:
        edit = self.edits.get(row_id)
        return (edit.action, edit.completion if edit.action == "edit" else "") if edit else ("", "")

    def _stamp(self, row_id: str) -> str:
        """Fingerprint of a row and its decision: a sheet that comes back late must not undo newer work."""
        made_of = f"{_fingerprint(self.rows[row_id])}{self._decision(row_id)}"
        return f"v{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"  # Excel takes 1e5 for a number, v1e5 never

    def _from_cells(self, cells: Mapping[str, str], seen: dict[str, Any]) -> tuple[Edit | None, list[str]]:
        row_id, action, text = cells["id"].strip(), cells["decision"].strip().lower(), cells["completion"]
        row, before = self.rows.get(row_id), self.edits.get(row_id)
        if row is None:
            return None, [f"no row has the id {row_id[:60]!r}"]
        wrong = [f"a second row with the id {row.id}"] if row.id in seen else []
        if not wrong and cells["of"].strip()[len(self._stamp(row_id)) :] == _written(cells["decision"], text):
            return None, []
        wrong += (
            [f"decision {action[:60]!r} is none of accept, reject, edit or empty"]
            if action not in ("", "accept", "reject", "edit")
            else []
        )
        if re.fullmatch(r"#[A-ZÀ-Ü0-9/_]{2,12}[!?]?", text):  # where a person began a text with = or -
            wrong.append(f"completion is {text}: Excel took the text for a formula")
        known = (row.completion, before.completion if before else "")
        text = next((t for t in known if t and _bare(t) == _bare(text)), text)
        if action != "reject" and text != row.completion:
            action = "edit"
            new = row.model_copy(update={"completion": text, "source": "imported"})
            wrong += problems_of(new, self.tokenizer)
        elif action == "edit":
            action = "accept"
        kept = action if action != "edit" or text != row.completion else ""
        changed = (kept, text if kept == "edit" else "") != self._decision(row.id)
        if changed and not cells["of"].strip().startswith(self._stamp(row.id)):
            wrong = ["the row or its decision changed after this sheet was written; write a new sheet"]
        if wrong or not action:
            return None, wrong
        return Edit(
            id=row.id,
            action=action,
            completion=text if action == "edit" else "",
            source="imported",
            of=_fingerprint(row),
        ), []


def _bare(text: str) -> str:
    """A text without what programs change in it: its line ends, and an apostrophe that says that it is text."""
    return plain(text).lstrip("'")


def _written(decision: str, completion: str) -> str:
    """Fingerprint of the two cells that a reviewer changes: which rows somebody wrote in."""
    return hashlib.sha256(f"{decision.strip()}\0{_bare(completion)}".encode()).hexdigest()[:12]
