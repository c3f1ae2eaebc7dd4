"""Blind rating by people: base and tuned side by side in random order, on the guide's four criteria."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from stakelib import sheets
from stakelib.dialogues.files import read_log
from stakelib.evaluation.statistics import clustered_wilson
from stakelib.run import CourseError, append_line

CRITERIA = {  # the guide's, in its words
    "accuracy": "does it match the stakeholder's priorities?",
    "naturalness": "does it sound human?",
    "relevance": "does it address the scenario?",
    "specificity": "does it reference actual numbers and details?",
}
CHOICES = ("A", "same", "B")
WORTH = {"base": 0.0, "same": 1.0, "tuned": 2.0}  # an order, so that base against tuned is a graver disagreement
COLUMNS = ("id", "stakeholder", "prompt", "A", "B", *CRITERIA, "of")
SHEET = ("id", *CRITERIA, "of")  # what a filled sheet must hold


class Vote(BaseModel):
    """One judgement. `a` is the system that stood on side A, `of` a fingerprint of rater, row and both texts."""

    row_id: str
    rater: str
    criterion: Literal[tuple(CRITERIA)]
    choice: Literal[CHOICES]
    a: Literal["base", "tuned"]
    of: str
    at: str = ""

    @property
    def prefers(self) -> str:
        """One of WORTH."""
        return "same" if self.choice == "same" else self.a if self.choice == "A" else _other(self.a)


def _other(system: str) -> str:
    return "tuned" if system == "base" else "base"


class Rating:
    """The pairs that one rater judges; each vote is at once on disk, in `folder`/ratings-<rater>.jsonl.

    `rows`: those to rate; `answers`: of both systems, other rows are passed over. Which answer is A, and which pair
    comes when, is a coin of rater and row: equal on every computer, unlike for another rater. `folder`: the run's
    evaluation/. CourseError for a name that makes no file name, and for broken lines.
    """

    def __init__(
        self, folder: str | Path, rows: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]], rater: str
    ) -> None:
        self.rater = rater.strip().lower()
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,39}", self.rater):
            raise CourseError(f"{rater!r} cannot be part of a file name", "use letters a-z, digits, - and _.")
        self.texts = {(a["row_id"], a["system"]): a["text"] for a in answers}
        both = [r for r in rows if all((r["id"], s) in self.texts for s in ("base", "tuned"))]
        self.rows = {r["id"]: r for r in sorted(both, key=lambda r: self._dice(r["id"], "turn"))}
        self.file = Path(folder) / f"ratings-{self.rater}.jsonl"
        self.votes = {
            (v.row_id, v.criterion): v
            for v in read_votes(self.file)
            if v.row_id in self.rows and v.of == self.stamp(v.row_id)
        }

    def _dice(self, *about: str) -> int:
        return int(hashlib.sha256("\0".join((self.rater, *about)).encode()).hexdigest()[:12], 16)

    def stamp(self, row_id: str) -> str:
        """Fingerprint of what is compared: a vote about other texts does not count."""
        texts = (self.texts.get((row_id, s), "") for s in ("base", "tuned"))
        return f"v{self._dice(row_id, *texts):012x}"  # digits alone, or around an e, Excel takes for a number

    def side_a(self, row_id: str) -> str:
        """Which system is A. Not for the rater's eyes."""
        return "base" if self._dice(row_id) % 2 else "tuned"

    def shown(self, row_id: str) -> dict[str, str]:
        """What the rater sees: stakeholder, prompt, A and B."""
        a, row = self.side_a(row_id), self.rows[row_id]
        texts = (self.texts[row_id, s].strip() or "(an empty answer)" for s in (a, _other(a)))
        return {"stakeholder": row["stakeholder"], "prompt": row["prompt"], **dict(zip("AB", texts, strict=True))}

    def choice(self, row_id: str, criterion: str) -> str | None:
        vote = self.votes.get((row_id, criterion))
        return vote and vote.choice

    def vote(self, row_id: str, criterion: str, choice: str) -> None:
        """Append one judgement ("A", "same" or "B") to the file; a later one about the same takes its place."""
        now = datetime.now().isoformat(timespec="seconds")
        vote = Vote(
            row_id=row_id,
            rater=self.rater,
            criterion=criterion,
            choice=choice,
            a=self.side_a(row_id),
            of=self.stamp(row_id),
            at=now,
        )
        append_line(self.file, vote.model_dump_json())
        self.votes[row_id, criterion] = vote

    def progress(self) -> str:
        done = sum(all((i, c) in self.votes for c in CRITERIA) for i in self.rows)
        return f"{self.rater}: {done} of {len(self.rows)} pairs judged on all {len(CRITERIA)} criteria"


def read_votes(file: Path) -> list[Vote]:
    """A rater's votes in the order given. A last vote cut by a kill goes, one that only lacks its newline stays.

    Raises CourseError that lists every other broken line.
    """
    return read_log(Vote, file, f"mend these lines of {file}, or move the file away to rate again.")


def rating_sheet(rating: Rating, path: str | Path, separator: str = "") -> Path:
    """The pairs as a sheet for a rater without Jupyter, who writes A, B or same under each criterion.

    The name ends in .xlsx or .csv. `separator`: ";" for a CSV that an Excel in French or German opens. Votes in a
    sheet that is there already are taken first, see `read_sheet`; it is replaced only then.
    """
    if Path(path).exists():
        old = sheets.read_sheet(path, SHEET)
        if old[list(CRITERIA)].apply(lambda column: column.str.strip().ne("").any()).any():
            read_sheet(rating, path)
    given = {i: [rating.choice(i, c) or "" for c in CRITERIA] for i in rating.rows}
    rows = [(i, *rating.shown(i).values(), *given[i], rating.stamp(i)) for i in rating.rows]
    return sheets.write_sheet(path, rows, COLUMNS, separator)


def read_sheet(rating: Rating, path: str | Path) -> int:
    """Take the votes of a filled sheet; returns how many were new. Empty cells are no votes.

    All or nothing: CourseError lists every bad line with file and row, and nothing is saved.
    """
    known, problems, votes = {c.lower(): c for c in CHOICES}, [], {}
    table = sheets.read_sheet(path, SHEET)
    for number, cells in zip(table.index, table.to_dict("records"), strict=True):
        row, given = cells["id"].strip(), {c: cells[c].strip() for c in CRITERIA}
        wrong = [
            f"{c} {said[:60]!r} is none of A, B, same or empty"
            for c, said in given.items()
            if said and said.lower() not in known
        ]
        if row not in rating.rows:
            wrong = [f"no pair has the id {row[:60]!r}"]
        elif cells["of"].strip() != rating.stamp(row):
            wrong = [f"the answers changed after this sheet was written, or it is not {rating.rater}'s"]
        wrong += [f"a second row with the id {row}"] if row in votes else []
        problems += [f"{Path(path).name}, row {number}: {why}" for why in wrong]
        votes[row] = {c: known.get(said.lower()) for c, said in given.items() if said}
    if problems:
        raise CourseError(problems, "mend these rows in the file, or give the sheet another name; nothing was taken.")
    new = [(i, c, said) for i, row in votes.items() for c, said in row.items() if said != rating.choice(i, c)]
    for vote in new:
        rating.vote(*vote)
    return len(new)


def agreement(judged: Sequence[Sequence[str | None]]) -> float | None:
    """Krippendorff's (2019) alpha, ordinal: 1 is full agreement, 0 is what chance would give; None if it has no value.

    `judged`: one list for each rater, in the same order of pairs: "base", "same", "tuned", None where not rated.
    It has none where no pair was judged twice, or where all say the same: then nothing tells agreement from habit.
    """
    import krippendorff

    data = [[WORTH.get(said, math.nan) for said in rater] for rater in judged]
    twice = [v for v in zip(*data, strict=True) if sum(map(math.isfinite, v)) > 1]
    if len({x for pair in twice for x in pair if math.isfinite(x)}) < 2:
        return None
    return float(krippendorff.alpha(list(zip(*twice, strict=True)), level_of_measurement="ordinal"))


def preferences(
    folder: str | Path,
    rows: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """What all raters in `folder` prefer, one dict for each criterion; empty if nobody rated these answers.

    `share`: of the comparisons that tuned or base won (`decided`), those that tuned won, with its 95 % interval over
    scenarios; `net`: wins minus losses of all, -1 to 1; `left`: share of A among the decided, 0.5 without a habit.
    """
    import numpy as np

    files = sorted(Path(folder).glob("ratings-*.jsonl"))
    found = [Rating(folder, rows, answers, file.stem.removeprefix("ratings-")) for file in files]
    scenario, lines = {r["id"]: r["scenario_id"] for r in rows}, []
    for criterion in CRITERIA:
        votes = [v for r in found for v in r.votes.values() if v.criterion == criterion]
        if not votes:
            continue
        decided = [v for v in votes if v.prefers != "same"]
        wins = [v.prefers == "tuned" for v in decided]
        clusters = [scenario[v.row_id] for v in decided]
        low, high = clustered_wilson(np.array(wins, dtype=float), clusters) if wins else (0.0, 1.0)
        judged = [[(v := r.votes.get((i, criterion))) and v.prefers for i in scenario] for r in found]
        lines.append(
            {
                "criterion": criterion,
                "asks": CRITERIA[criterion],
                "raters": len({v.rater for v in votes}),
                "votes": len(votes),
                "tuned": sum(wins),
                "same": len(votes) - len(wins),
                "base": len(wins) - sum(wins),
                "share": sum(wins) / len(wins) if wins else None,
                "low": low,
                "high": high,
                "net": (2 * sum(wins) - len(wins)) / len(votes),
                "left": sum(v.choice == "A" for v in decided) / len(decided) if decided else None,
                "alpha": agreement(judged),
            }
        )
    return lines
