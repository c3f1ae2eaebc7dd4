"""Scenarios -> checked training files of one run, with what reviewers decided."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import stakelib
from stakelib.dialogues.build import build, mix_for
from stakelib.dialogues.check import check
from stakelib.dialogues.files import write, write_rows
from stakelib.dialogues.review import EDITS, GENERATED, Review, apply_edits, read_edits
from stakelib.dialogues.split import split
from stakelib.dialogues.tasks import Reply, enhance_template
from stakelib.models import base_model, load_tokenizer, template
from stakelib.run import CourseError, Run, atomic_write_json, sha256
from stakelib.scenarios import Scenario

PARTS = ("train", "valid", "test")
SETTINGS = "generated.json"  # what the rows in generated.jsonl were made with, also where the gates refused them


def scenarios_needed(run: Run) -> int:
    """So many that no stakeholder answers to the same scenario twice."""
    return max(mix_for(run.profile.rows).values())


def open_review(run: Run) -> Review:
    """The run's rows to be reviewed, with the gates that `prepare` applies."""
    return Review(run.path("training_data"), _tokenizer(run))


def _tokenizer(run: Run) -> Any:
    base = base_model(run.profile.model)
    # the toy tokenizer makes longer rows
    return None if base.source == "made here" else load_tokenizer(base.folder)


def rules(package: Path = Path(stakelib.__file__).parent) -> str:
    """Fingerprint of all that decides what a row says: the code and data files of scenarios, voices and dialogues."""
    stages = ("scenarios", "voices", "dialogues")  # in one order on all systems: sorted paths have another on Windows
    found = [p for stage in stages for p in sorted((package / stage).rglob("*"), key=lambda p: p.parts)]
    files = [p for p in found if p.suffix in (".py", ".yaml", ".json")]
    text = "".join(f"{p.relative_to(package).as_posix()} {sha256(p)}\n" for p in files)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


LOADED = rules()  # of the code that runs, and of the voices that it has read


def prepare(
    run: Run,
    scenarios: Sequence[Scenario] | None = None,
    *,
    enhance: int | None = None,
    voice: int | None = None,
    reply: Reply = "short",
    tool: str | Path | None = None,
) -> dict[str, Any]:
    """Build, split, review, check and write the rows of `run.profile`; skipped if nothing changed, edits included.

    `reply` and `tool` are those of `build`, and so are the numbers of rows, which None leaves to the profile. Without
    scenarios: those and all settings of last time, so that edits are taken over. Returns the gates' table, the number
    of rows per split and what was reviewed.
    Raises CourseError listing every row that fails a gate.
    """
    made_with = run.path("training_data", SETTINGS)
    if scenarios is None:
        if not made_with.exists():
            raise CourseError("no training rows have been made in this run", "run notebook 01 first.")
        settings = {**json.loads(made_with.read_text(encoding="utf-8")), "rules": rules()}
    else:
        thin = run.profile.thin
        more = {
            "asked": run.profile.asked,
            "enhance": thin if enhance is None else enhance,
            "voice": thin if voice is None else voice,
            "reply": reply,
            "tool": tool and str(tool),
        }
        settings = {
            "rows": run.profile.rows,
            "seed": run.profile.seed,
            "more": more,
            "rules": rules(),
            "scenarios": [s.model_dump() for s in scenarios],
        }
    if settings["rules"] != LOADED:
        what = "the rules or voices of the course were changed after this Python had read them"
        raise CourseError(what, "restart the kernel, then run this again: else the old rules would make the rows")
    if checkout := settings["more"].get("tool"):  # its words, so that an edited checkout makes the rows again
        settings["template"] = enhance_template(Path(checkout))
    base = base_model(run.profile.model)
    folder = run.path("training_data")
    files = [folder / f"{p}{name}.jsonl" for name in PARTS for p in ("", "mlx/")]
    outputs = [
        *files,
        made_with,
        *(folder / n for n in (GENERATED, "stakeholder_dialogues.jsonl", "stakeholder_hf_dataset")),
    ]
    edits = [p for p in [folder / EDITS] if p.exists()]

    def work() -> dict[str, Any]:
        around = template(load_tokenizer(base.folder))
        known = [Scenario.model_validate(s) for s in settings["scenarios"]] if scenarios is None else scenarios
        made = split(build(known, mix_for(settings["rows"]), settings["seed"], **settings["more"]), settings["seed"])
        atomic_write_json(folder / SETTINGS, settings)
        write_rows(made, folder / GENERATED)  # before the gates, so that a reviewer can mend what they refuse
        rows = apply_edits(made, read_edits(folder))
        gates = check(rows, _tokenizer(run), "stakeholder_dialogues.jsonl")
        write(rows, folder, lambda p, c: f"{around.before}{p}{around.between}{c}{around.end}")
        reviewed = {"rejected": len(made) - len(rows), "edited": sum(r.source != "rules" for r in rows)}
        return {
            "gates": gates,
            "rows": {part: sum(r.split == part for r in rows) for part in PARTS},
            "reviewed": reviewed,
        }

    return run.stage("data", settings, [base.source_json, *edits], outputs, work)
