"""Training files: one JSONL of all rows, one per split, MLX's form, and a Hugging Face dataset."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from stakelib.dialogues.build import Dialogue
from stakelib.run import CourseError, writing

Line = TypeVar("Line", bound=BaseModel)
SPLITS = ("train", "valid", "test")


def write(rows: Sequence[Dialogue], folder: str | Path, render_text: Callable[[str, str], str]) -> dict[str, Path]:
    """Write the training files into `folder`, each whole or not at all; returns name -> path.

    `render_text(prompt, completion)` gives the chat-formatted text for the dataset's `text` column.
    """
    folder = Path(folder)
    paths = {"all": write_rows(rows, folder / "stakeholder_dialogues.jsonl")}
    for name in SPLITS:
        part = [row for row in rows if row.split == name]
        paths[name] = write_rows(part, folder / f"{name}.jsonl")
        pairs = ({"prompt": row.prompt, "completion": row.completion} for row in part)
        paths[f"mlx/{name}"] = _jsonl(folder / "mlx" / f"{name}.jsonl", pairs)
    paths["hf"] = _dataset(folder / "stakeholder_hf_dataset", rows, render_text)
    return paths


def write_rows(rows: Iterable[Dialogue], path: Path) -> Path:
    """Rows as JSON Lines, one after the other: 50,000 of them need no second copy in memory."""
    return _jsonl(path, (row.model_dump() for row in rows))


def read(path: str | Path) -> list[Dialogue]:
    """Rows of a JSONL file; CourseError lists every broken line."""
    path = Path(path)
    if not path.is_file():
        raise CourseError(f"{path}: no such file", "build the training data first.")
    return read_lines(Dialogue, path, "mend these lines or build the training data again.")


def read_lines(kind: type[Line], path: Path, mend: str) -> list[Line]:
    """One object per line of a JSONL file; CourseError lists every broken line and ends with `mend`."""
    rows, problems = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        try:
            rows += [kind.model_validate_json(line)] if line.strip() else []
        except ValidationError as error:
            problems += [
                f"{path.name}:{number}: {'.'.join(map(str, e['loc'])) or 'line'}: {e['msg']}"
                for e in error.errors(include_url=False)
            ]
    if problems:
        raise CourseError(problems, mend)
    return rows


def _jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    with writing(path) as part, part.open("w", encoding="utf-8", newline="\n") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def _dataset(path: Path, rows: Sequence[Dialogue], render_text: Callable[[str, str], str]) -> Path:
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()  # in a notebook each leaves a dead widget behind
    columns = ("id", "prompt", "completion", "stakeholder", "scenario", "split")
    parts = {}
    for name in SPLITS:
        part = [row for row in rows if row.split == name]
        table = {column: [getattr(row, column) for row in part] for column in columns}
        parts[name] = Dataset.from_dict({**table, "text": [render_text(r.prompt, r.completion) for r in part]})
    with writing(path) as folder:
        DatasetDict(parts).save_to_disk(str(folder))
    return path
