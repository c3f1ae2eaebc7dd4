"""The LoRA recipe and the back-ends that carry it out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template

from stakelib import machine
from stakelib.models import BaseModel, base_model, check_same_base, load_config, load_tokenizer
from stakelib.models.adapters import PEFT_FILES, check_adapter, shapes, to_mlx
from stakelib.run import CourseError, Run, atomic_write_text, discard, is_main, sha256, size, versions, writing
from stakelib.training import keep
from stakelib.training.mlx_memory import limit_gb, mlx_memory, settle_mlx
from stakelib.training.mlx_run import mlx_place, train_mlx
from stakelib.training.plan import Plan, memory, plan, preflight, settle, what_fits
from stakelib.training.recipe import RECIPES, Recipe, adapter_parameters
from stakelib.training.rows import checked_rows, load_rows, render_rows

__all__ = [
    "RECIPES",
    "Plan",
    "Recipe",
    "adapter_folder",
    "adapter_parameters",
    "load_rows",
    "memory",
    "mlx_memory",
    "mlx_place",
    "plan",
    "preflight",
    "render_rows",
    "train",
    "what_fits",
]

BACKENDS = ("peft", "mlx")


def adapter_folder(run: Run) -> Path:
    """Where the trained adapter of this run lies, in PEFT form."""
    return run.path("models", f"stakeholder-{base_model(run.profile.model).short_name}-lora")


def train(
    run: Run, recipe: Recipe, backend: str = "auto", rows: int | None = None, start: Path | None = None
) -> dict[str, Any]:
    """Train an adapter on the run's training rows and save it with a model card; skipped if nothing changed.

    Rows are checked before a weight is loaded. A killed training goes on from its last checkpoint. Started by
    `accelerate launch`, the processes share the rows of each step, and the first one alone writes.
    With `rows`, a trial of one epoch on that many rows, drawn by the seed so that a larger trial holds the rows of a
    smaller one; its adapter goes to training/trials/. `start`: an adapter folder to go on from instead of the base
    alone, of the same recipe's shape. Returns the losses (nats per learned token), tokens and speed.
    Raises CourseError for bad rows, a run that cannot fit into memory, or a broken loss.
    """
    if backend not in ("auto", *BACKENDS):
        raise CourseError(f"back-end '{backend}' is unknown", f"use backend='auto', or one of {', '.join(BACKENDS)}")
    if rows:
        recipe = replace(recipe, validate_per_epoch=1)
    base, epochs = base_model(run.profile.model), 1 if rows else run.profile.epochs
    name = f"trial-{recipe.name}-{rows}" if rows else "train"
    folder = run.path("training", "trials", name) if rows else adapter_folder(run)
    files = [run.path("training_data", f"{part}.jsonl") for part in ("train", "valid")]
    inputs = [*files, base.source_json, *([start] if start else ())]
    settings = {"recipe": recipe.settings(), "epochs": epochs, "rows": rows, "backend": backend}
    if backend == "auto":  # this machine's own, unless another machine has finished this very training with the other
        own = "mlx" if machine.metal()[0] else "peft"
        made = (k for k in BACKENDS if run.finished(name, settings | {"backend": k}, inputs, [folder]))
        settings["backend"] = backend = next(made, own)

    def checkpoints() -> Path:
        return run.path("training", f"{_prefix(name)}{_key(settings, inputs)}")

    def work() -> dict[str, Any]:
        if start:
            _same_shape(start, recipe, load_config(base.folder))
        if backend == "mlx" and machine.mlx()[0] == "none":
            raise CourseError(machine.mlx()[1], "use backend='peft' (notebook 04), which runs everywhere")
        tokenizer = load_tokenizer(base.folder)
        train_rows, valid_rows = checked_rows(tokenizer, files, recipe.max_length)
        if rows:  # the file is sorted by stakeholder: its first rows are one voice
            train_rows = random.Random(recipe.seed).sample(train_rows, len(train_rows))[:rows]
        here = machine.describe(run.folder)
        run.remember(machine=here)

        def decide() -> list[str]:
            data = train_rows + valid_rows
            if backend == "mlx":
                way, why = settle_mlx(base.name, load_config(base.folder), recipe, data, limit_gb())
            else:
                way, why = settle(run.profile.model, recipe, data, here["ram_free_gb"])
            return [way.precision, way.checkpointing, why]

        precision, checkpointing, why = keep.as_begun(checkpoints(), decide)
        print(f"training: {len(train_rows)} rows, {precision} weights: {why}", flush=True)
        settled = replace(recipe, precision=precision, checkpointing=checkpointing)
        if backend == "mlx":
            save, result = train_mlx(base, settled, epochs, train_rows, valid_rows, checkpoints(), start)
        else:
            from stakelib.training.peft_backend import train_peft

            model, result = train_peft(base.folder, settled, epochs, train_rows, valid_rows, checkpoints(), start)
            save = model.save_pretrained
        result |= {"backend": backend, "precision": precision, "precision_why": why, "checkpointing": checkpointing}
        result |= {"rows": len(train_rows), "valid_rows": len(valid_rows), "machine": here}
        if is_main():
            by_people = sum(row.get("source", "rules") != "rules" for row in load_rows(files[0]))
            with writing(folder) as part:
                save(part)
                _finish(part, base, recipe, result | {"data_sha256": sha256(files[0]), "by_people": by_people, **here})
        trained.append(name)
        return result

    trained: list[str] = []
    check_same_base(run.record, base, run.profile.model)
    with keep.alone(run.path("training", f"{folder.name}.lock")):
        result = run.stage(name, settings, inputs, [folder], work)
        if is_main() and checkpoints().exists():  # only now: the record says that the adapter is there
            discard(checkpoints())
        if is_main() and trained:
            _sweep_abandoned(run.path("training"), name)
    return result


def _prefix(name: str) -> str:
    """How the checkpoint folders of a training begin; only the holder of its lock writes such folders."""
    return "checkpoints-" if name == "train" else f"checkpoints-{name}-"


def _sweep_abandoned(place: Path, name: str) -> None:
    """Remove the checkpoints of the same training with other settings, rows or base, which nobody goes on with."""
    old = [p for p in place.glob("checkpoints-*") if re.fullmatch(re.escape(_prefix(name)) + "[0-9a-f]{12}", p.name)]
    gb = sum(size(folder) for folder in old) / 1e9
    for folder in old:
        with contextlib.suppress(OSError):  # Windows: another program looks into it; the next training removes it
            discard(folder)
    if old:
        print(
            f"training: removed checkpoints of {len(old)} earlier settings that were given up ({gb:.1f} GB)", flush=True
        )


def _key(settings: dict[str, Any], files: list[Path]) -> str:
    """Names the checkpoints of exactly these settings, rows and base: others are never continued by mistake."""
    return hashlib.sha256(json.dumps([settings, *map(sha256, files)]).encode()).hexdigest()[:12]


def _same_shape(start: Path, recipe: Recipe, config: Any) -> None:
    """Raise CourseError unless the adapter in folder `start` has the numbers that this recipe trains."""
    check_adapter(start)
    made = json.loads((start / PEFT_FILES[0]).read_text(encoding="utf-8"))
    numbers = sum(math.prod(size) for size in shapes(start / PEFT_FILES[1]).values())
    if (made["r"], made["lora_alpha"], numbers) != (recipe.rank, recipe.alpha, adapter_parameters(config, recipe)):
        raise CourseError(
            f"{start.name} has rank {made['r']}, alpha {made['lora_alpha']} and {numbers:,} numbers, not "
            f"those of recipe '{recipe.name}'",
            "go on with the recipe that it was trained with",
        )


def _finish(folder: Path, base: BaseModel, recipe: Recipe, result: dict[str, Any]) -> None:
    """Replace the machine's own path in the adapter's config by the model's name, and write the model card."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base.origin
    atomic_write_text(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
    to_mlx(folder, result["precision"] if result["backend"] == "mlx" else None)
    card = Template(
        Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    settings = {key: value for key, value in recipe.settings().items() if key != "name"}
    text = card.render(**result, base=base, recipe=recipe.name, settings=settings, versions=versions())
    atomic_write_text(folder / "README.md", text)
