"""Scenarios -> checked training files of one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stakelib.dialogues.build import build, mix_for
from stakelib.dialogues.check import check
from stakelib.dialogues.files import write
from stakelib.dialogues.split import split
from stakelib.models import base_model, load_tokenizer, template
from stakelib.run import Run
from stakelib.scenarios import Scenario

PARTS = ("train", "valid", "test")


def scenarios_needed(run: Run) -> int:
    """So many that no stakeholder answers to the same scenario twice."""
    return max(mix_for(run.profile.rows).values())


def prepare(run: Run, scenarios: Sequence[Scenario]) -> dict[str, Any]:
    """Build, split, check and write the rows of `run.profile`; skipped if nothing changed.

    Returns the gates' table and the number of rows per split. Raises CourseError listing every row that fails a gate.
    """
    base = base_model(run.profile.model)
    folder = run.path("training_data")
    files = [folder / f"{p}{name}.jsonl" for name in PARTS for p in ("", "mlx/")]
    outputs = [*files, folder / "stakeholder_dialogues.jsonl", folder / "stakeholder_hf_dataset"]

    def work() -> dict[str, Any]:
        tokenizer = load_tokenizer(base.folder)
        around = template(tokenizer)
        rows = split(build(scenarios, mix_for(run.profile.rows), run.profile.seed), run.profile.seed)
        gates = check(rows, None if base.source == "made here" else tokenizer)  # the toy tokenizer makes longer rows
        write(rows, folder, lambda p, c: f"{around.before}{p}{around.between}{c}{around.end}")
        return {"gates": gates, "rows": {part: sum(r.split == part for r in rows) for part in PARTS}}

    settings = {"rows": run.profile.rows, "seed": run.profile.seed, "scenarios": [s.model_dump() for s in scenarios]}
    return run.stage("data", settings, [base.folder / "source.json"], outputs, work)
