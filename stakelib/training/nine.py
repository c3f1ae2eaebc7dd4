"""One adapter for each stakeholder: the run's rows split by voice, trained one after the other, each a run of its own.

A voice lives in voices/<stakeholder id>/ with its rows, its record and its checkpoints, so that what is finished is
never touched again, and one that was killed goes on where it was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stakelib.models import base_model, config_of, load_tokenizer
from stakelib.run import CourseError, Run, atomic_write_text
from stakelib.training import adapter_folder, train
from stakelib.training.mlx_memory import limit_gb
from stakelib.training.plan import hours, settle_here
from stakelib.training.recipe import Recipe, adapter_parameters
from stakelib.training.rows import checked_rows, load_rows
from stakelib.voices import STAKEHOLDERS

if TYPE_CHECKING:
    import pandas as pd

PARTS = ("train", "valid")
PLACES = {"base": "voices", "one": "voices-from-one"}  # where each way lies: from the base, from the adapter for all


def voice_run(run: Run, who: str, start: str = "base") -> Run:
    """The run of one stakeholder inside `run`; `adapter_folder` and `export` work on it as on any other.

    `start`: "base", or "one" for training that goes on from the run's own adapter for all nine.
    """
    return Run.open(run.path(PLACES[start], who), run.profile.name, run.profile.model)


def split_rows(run: Run, start: str = "base") -> dict[str, Run]:
    """Write each stakeholder's own training and validation rows into its run; returns stakeholder id -> run.

    Each training row of the run, whatever its task, goes to exactly one voice. A voice without a validation row of its
    own is validated on those of all, and that is said. A file whose rows are the same is left as it is. Raises
    CourseError listing each voice without training rows.
    """
    voices = {who: voice_run(run, who, start) for who in STAKEHOLDERS}
    train, valid = (load_rows(run.path("training_data", f"{part}.jsonl")) for part in PARTS)
    own = {who: [[r for r in rows if r["stakeholder_id"] == who] for rows in (train, valid)] for who in voices}
    if problems := [f"train.jsonl holds no row of '{who}'" for who, (rows, _) in own.items() if not rows]:
        raise CourseError(problems, "make more rows in notebook 01: each voice needs some")
    if lone := [who for who, (_, rows) in own.items() if not rows]:
        print(f"validated on the rows of all voices, having none of their own: {', '.join(lone)}", flush=True)
    for who, (rows, some) in own.items():
        files = [voices[who].path("training_data", f"{part}.jsonl") for part in PARTS]
        with voices[who].keeping_edits(files):
            for file, mine in zip(files, (rows, some or valid), strict=True):
                text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in mine)
                if not (file.exists() and file.read_text(encoding="utf-8") == text):
                    atomic_write_text(file, text)
    return voices


def plan_nine(run: Run, recipe: Recipe) -> pd.DataFrame:
    """What the nine trainings will need, before they start: one line each, and one for all of them together.

    Columns: rows, learned tokens, minutes (as `hours` has them), peak memory and free memory (GB, of one at a time),
    MB of the adapter on disk in both forms. Raises CourseError if one of them cannot fit.
    """
    import pandas as pd

    base, free_gb = base_model(run.profile.model), limit_gb()[0]
    tokenizer, model = load_tokenizer(base.folder), run.profile.model
    data = {
        who: checked_rows(tokenizer, [own.path("training_data", f"{p}.jsonl") for p in PARTS], recipe.max_length)
        for who, own in split_rows(run).items()
    }
    rows, valid = ([row for parts in data.values() for row in parts[i]] for i in (0, 1))
    way, _, formula = settle_here(model, recipe, rows + valid, free_gb)
    minutes, tokens = 60 * hours(model, way, rows, valid, run.profile.epochs), sum(len(r.ids) for r in rows)
    numbers = adapter_parameters(config_of(model), recipe)
    lines = []
    for who, (own, _) in {**data, "all nine": (rows, valid)}.items():
        parts = formula(config_of(model), way, max(len(r.ids) for r in own), max(sum(r.mask) for r in own))
        lines.append(
            {
                "voice": who,
                "rows": len(own),
                "learned tokens": run.profile.epochs * sum(sum(r.mask) for r in own),
                "minutes": minutes * sum(len(r.ids) for r in own) / tokens,
                "GB": sum(parts.values()),
                "GB free": free_gb,
                "MB": 8e-6 * numbers * (len(data) if who == "all nine" else 1),
            }
        )
    return pd.DataFrame(lines)


def train_nine(
    run: Run, recipe: Recipe, backend: str = "auto", start: str = "base", rows: int | None = None
) -> dict[str, dict[str, Any]]:
    """Train the nine adapters one after the other; stakeholder id -> what `train` returns of it.

    Together they see the rows of the one adapter for all, equally often: the learned tokens are the same. Finished
    ones are recognised, and one that was killed goes on from its last checkpoint. `start`: "base", or "one" to go on
    from the run's own adapter. `rows`: a trial on so many rows of each voice.
    """
    begin, done = adapter_folder(run) if start == "one" else None, {}
    if begin and not begin.exists():
        raise CourseError(f"{begin.name} is missing", "train the adapter for all nine first: notebook 03 or 04")
    voices = split_rows(run, start)
    for number, (who, own) in enumerate(voices.items(), 1):
        print(f"{who}: voice {number} of {len(voices)}", flush=True)
        done[who] = train(own, recipe, backend, rows, begin)
    return done


def voice_adapters(run: Run, start: str = "base") -> dict[str, Path]:
    """The nine trained adapters in PEFT form, by stakeholder id. Raises CourseError listing those that are missing."""
    found = {who: adapter_folder(voice_run(run, who, start)) for who in STAKEHOLDERS}
    if missing := [f"the adapter of '{who}' is missing" for who, folder in found.items() if not folder.exists()]:
        raise CourseError(missing, "run notebook 07 up to its training")
    return found
