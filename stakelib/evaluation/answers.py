"""Held-out prompts through the model that ships, each answer saved the moment it is finished."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stakelib.export.merged import TOKENIZER_FILES
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
    tokenizer: Path | None = None,
    timed: bool = False,
) -> list[dict[str, Any]]:
    """Answer every row's prompt with the GGUF at `gguf_path`; return one dict per row, in the order of `rows`.

    With `voices`, one for each row, that voice's file of `adapters` answers, laid over the GGUF by the engine.
    `tokenizer`: the folder whose tokenizer and chat template wrap the prompts. `timed`: the seconds are what is asked
    for, so answers of another computer do not count.

    Finished answers are appended to evaluation/answers-<system>.jsonl under a key made of the sha256 of all files that
    make an answer, the engine's version, the prompt and the settings: a killed run asks only what is missing, a changed
    model everything. Each dict names the model file and its "sha256", and with `voices` the "adapter_sha256".
    Raises CourseError when the saved file is damaged anywhere but in its last line, or an answer never came.
    """
    gguf_path, here = Path(gguf_path), describe()["processor"]
    file = run.path("evaluation", f"answers-{system}.jsonl")
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    settings |= {"top_p": top_p} if temperature else {}  # greedy has none
    model = sha256(gguf_path)
    wrapped = {n: sha256(tokenizer / n) for n in TOKENIZER_FILES if (tokenizer / n).exists()} if tokenizer else {}
    made_with = json.dumps([model, wrapped, version("xllamacpp"), settings, here if timed else ""], sort_keys=True)
    laid = {who: sha256(path) for who, path in (adapters or {}).items()}
    of_each = [{"gguf": gguf_path.name, "sha256": model} for _ in rows]
    if voices:
        of_each = [of | {"adapter_sha256": laid[who]} for of, who in zip(of_each, voices, strict=True)]
    asked = [f"{made_with}\n{r['prompt']}\n{of.get('adapter_sha256')}" for r, of in zip(rows, of_each, strict=True)]
    keys = [hashlib.sha256(text.encode()).hexdigest() for text in asked]
    saved, voice_of = _saved(file), dict(zip(keys, voices or keys, strict=True))
    missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in saved}
    if missing:
        if engine_factory is None:
            from stakelib.models import engine as engine_factory
        about = {"system": system, "gguf": gguf_path.name, "processor": here}
        with engine_factory(gguf_path) as engine:
            more = {"voices": [voice_of[key] for key in missing]} if voices else {}
            replies = engine.ask([row["prompt"] for row in missing.values()], **settings, **more)
            _append(replies, missing, about, file, saved, Progress(system, len(set(keys)), "answers", 5.0, progress))
    if lost := [row["id"] for key, row in zip(keys, rows, strict=True) if key not in saved]:
        raise CourseError([f"{system}: no answer to row {i}" for i in lost], "run this cell again; finished ones stay")
    each = zip(keys, rows, of_each, strict=True)
    return [{**saved[key], "row_id": row["id"], "system": system, **of} for key, row, of in each]


def _append(replies: Any, missing: dict, about: dict, file: Path, saved: dict, progress: Progress) -> None:
    """Add each reply to `file` as it arrives, in any order."""
    asked = list(missing.items())
    earlier, start = progress.total - len(asked), time.monotonic()
    progress.tick(earlier, "saved by an earlier run" if earlier else "asked, none finished yet")
    for done, (index, reply) in enumerate(replies, start=1):
        key, row = asked[index]
        answer = {
            "row_id": row["id"],
            **about,
            "key": key,
            "text": reply.text,
            "stopped": bool(reply.stopped),
            "new_tokens": int(reply.new_tokens),
            "prompt_tokens": int(reply.prompt_tokens),
            "seconds": round(float(reply.seconds), 3),
        }
        saved[key] = answer | {"check": _check(answer)}
        append_line(file, json.dumps(saved[key], ensure_ascii=False))
        progress.tick(earlier + done, f"{done / max(time.monotonic() - start, 1e-3) * 60:.1f} a minute")


def _check(answer: Mapping[str, Any]) -> str:
    """Fingerprint of one saved answer: a text that a person changed is no longer the model's."""
    plain = json.dumps({k: v for k, v in answer.items() if k != "check"}, sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def _saved(file: Path) -> dict[str, dict[str, Any]]:
    """Answers on disk by key. A last line that a kill cut goes, and the file is made whole; blank lines are no answers.

    Raises CourseError that lists every other line which is no answer, or not as it was written; the file stays.
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        return {}
    data = file.read_bytes()
    lines, found, problems, torn = data.split(b"\n"), {}, [], 0
    for number, line in enumerate(lines, start=1):
        try:
            answer = json.loads(line) if line.strip() else None
            if answer is None:
                continue
            key, _ = answer["key"], answer["text"]
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                problems.append(f"{file.name} line {number} is not an answer")
            torn = len(line)  # the last one alone has no line end
            continue
        if "check" in answer:  # else an older version of the course wrote it, under other keys
            found[key] = answer
            if answer["check"] != _check(answer):
                problems.append(f"{file.name} line {number} was changed after the model wrote it")
    if problems:
        raise CourseError(problems, f"delete these lines of {file} and run this again: only they are asked afresh")
    whole = data[: len(data) - torn]
    whole += b"" if whole.endswith(b"\n") or not whole else b"\n"  # an editor may take the last line end away
    if whole != data:
        atomic_write_text(file, whole.decode("utf-8"))
    return found
