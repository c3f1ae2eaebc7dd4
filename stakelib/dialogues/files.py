"""Training files: one JSONL of all rows, one per split, MLX's form, and a Hugging Face dataset."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from stakelib.dialogues.build import Dialogue
from stakelib.run import CourseError, writing
from stakelib.sheets import SHOWN, decode

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
    """One object per line of a JSONL file; CourseError lists the broken lines and ends with `mend`."""
    return _parsed(kind, _bytes(path, mend), path.name, mend)


def read_log(kind: type[Line], path: Path, mend: str) -> list[Line]:
    """Like `read_lines`, for a file that grows line by line; empty where there is none yet.

    A last line that was cut off is moved to <name>.cut, so that the next line does not join it. Nothing is moved where
    another line is broken.
    """
    if not path.exists():
        return []
    data = _bytes(path, mend)
    whole = decode(data, path.name, mend).encode() if data[:2] in (b"\xff\xfe", b"\xfe\xff") else data
    last = whole[whole.rfind(b"\n") + 1 :].strip()
    cut = last.startswith(b"{") and not last.endswith(b"}")
    whole = whole[: whole.rfind(b"\n") + 1] if cut else whole if whole.endswith(b"\n") or not last else whole + b"\n"
    rows = _parsed(kind, whole, path.name, mend)
    if cut:
        with path.with_name(f"{path.name}.cut").open("ab") as aside:
            aside.write(last + b"\n")
        print(f"{path.name}: its last line was cut off; it is kept in {path.name}.cut")
    if whole != data:
        with writing(path) as part:
            part.write_bytes(whole)
    return rows


def _bytes(path: Path, mend: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CourseError(f"{path}: cannot be read ({error.strerror})", mend) from error


def _parsed(kind: type[Line], data: bytes, name: str, mend: str) -> list[Line]:
    text = decode(data, name, mend).replace("\r\n", "\n").replace("\r", "\n")
    rows, broken = [], []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [kind.model_validate_json(line)] if line.strip() else []
        except ValidationError as error:
            broken.append(
                (number, [f"{'.'.join(map(str, e['loc'])) or 'line'}: {_said(e['msg'])}" for e in error.errors()])
            )
    if broken and (held := layout(text)):
        raise CourseError(f"{name} holds {held}; each row must be one object on a line of its own", mend)
    if broken:
        more = [f"{name}: and {len(broken) - SHOWN} more lines like these"] if len(broken) > SHOWN else []
        raise CourseError([f"{name}:{n}: {why}" for n, all_of in broken[:SHOWN] for why in all_of] + more, mend)
    return rows


def _said(message: str) -> str:
    if "hex escape" in message or "surrogate" in message:
        return "holds half a character, as a cut emoji leaves it"
    return re.sub(r" at line \d+ column", " at column", message)


def layout(text: str) -> str:
    """What a file of JSON holds that is none of JSON Lines."""
    with contextlib.suppress(ValueError, RecursionError):
        value, end = json.JSONDecoder().raw_decode(text.strip())
        if isinstance(value, list):
            return "a list"
        if "\n" in text.strip()[:end]:
            return "an object over several lines"
    return ""


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
