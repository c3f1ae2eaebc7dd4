"""Held-out prompts through the model that ships, each answer saved the moment it is finished."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stakelib.machine import describe
from stakelib.run import CourseError, Progress, append_line, atomic_write_text, sha256


def answers(
    run: Any,
    system: str,
    gguf_path: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    engine_factory: Callable[[Path], Any] | None = None,
    max_new_tokens: int = 400,
    temperature: float = 0.0,
    seed: int = 0,
    top_p: float = 1.0,
    progress: Callable[[str], None] = print,
    voices: Sequence[str] | None = None,
    adapters: Mapping[str, Path] | None = None,
) -> list[dict[str, Any]]:
    """Answer every row's prompt with the GGUF at `gguf_path`; return one dict per row, in the order of `rows`.

    With `voices`, one for each row, that voice's file of `adapters` answers, laid over the GGUF by the engine.

    Finished answers are appended to evaluation/answers-<system>.jsonl under a key made of the file's sha256, the
    engine's version, the prompt and the settings: a killed run asks only what is missing, a changed model everything.
    Raises CourseError when the saved file is damaged anywhere but in its last line, or an answer never came.
    """
    gguf_path = Path(gguf_path)
    file = run.path("evaluation", f"answers-{system}.jsonl")
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    settings |= {"top_p": top_p} if temperature else {}  # greedy has none
    made_with = json.dumps([sha256(gguf_path), version("xllamacpp"), settings], sort_keys=True)
    laid = {who: "\n" + sha256(file) for who, file in (adapters or {}).items()}
    over = [laid[who] for who in voices] if voices else [""] * len(rows)
    asked = [f"{made_with}\n{row['prompt']}{adapter}" for row, adapter in zip(rows, over, strict=True)]
    keys = [hashlib.sha256(text.encode()).hexdigest() for text in asked]
    saved, of = _saved(file), dict(zip(keys, voices or keys, strict=True))
    missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in saved}
    if missing:
        if engine_factory is None:
            from stakelib.models import engine as engine_factory
        about = {"system": system, "gguf": gguf_path.name, "processor": describe()["processor"]}
        with engine_factory(gguf_path) as engine:
            more = {"voices": [of[key] for key in missing]} if voices else {}
            replies = engine.ask([row["prompt"] for row in missing.values()], **settings, **more)
            _append(replies, missing, about, file, saved, Progress(system, len(set(keys)), "answers", 5.0, progress))
    if lost := [row["id"] for key, row in zip(keys, rows, strict=True) if key not in saved]:
        raise CourseError([f"{system}: no answer to row {i}" for i in lost], "run this cell again; finished ones stay")
    return [{**saved[key], "row_id": row["id"], "system": system} for key, row in zip(keys, rows, strict=True)]


def _append(replies: Any, missing: dict, about: dict, file: Path, saved: dict, progress: Progress) -> None:
    """Add each reply to `file` as it arrives, in any order."""
    asked = list(missing.items())
    earlier, start = progress.total - len(asked), time.monotonic()
    progress.tick(earlier, "saved by an earlier run" if earlier else "asked, none finished yet")
    for done, (index, reply) in enumerate(replies, start=1):
        key, row = asked[index]
        saved[key] = {
            "row_id": row["id"],
            **about,
            "key": key,
            "text": reply.text,
            "stopped": bool(reply.stopped),
            "new_tokens": int(reply.new_tokens),
            "prompt_tokens": int(reply.prompt_tokens),
            "seconds": round(float(reply.seconds), 3),
        }
        append_line(file, json.dumps(saved[key], ensure_ascii=False))
        progress.tick(earlier + done, f"{done / max(time.monotonic() - start, 1e-3) * 60:.1f} a minute")


def _saved(file: Path) -> dict[str, dict[str, Any]]:
    """Answers on disk by key. A last line without its newline was cut by a kill: it goes, the file is made whole."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        return {}
    whole, _, torn = file.read_bytes().rpartition(b"\n")
    found, problems = {}, []
    for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
        try:
            answer = json.loads(line)
            found[answer["key"]] = answer
        except (ValueError, KeyError, TypeError):
            problems.append(f"{file.name} line {number} is not an answer")
    if problems:
        raise CourseError(problems, f"delete {file} and run this cell again; every prompt is then asked afresh")
    if torn:
        atomic_write_text(file, whole.decode("utf-8") + "\n" if whole else "")
    return found
