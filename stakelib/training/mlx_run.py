"""The notebook's side of MLX training: starts the process that trains, shows how far it is, and guards the machine."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from stakelib import machine
from stakelib.models import BaseModel, Rendered, load_config
from stakelib.models.adapters import to_peft
from stakelib.models.mlx_models import mlx_folder
from stakelib.run import REPOSITORY, CourseError, Progress, Run, atomic_write_json, atomic_write_text
from stakelib.training.keep import MARK, outcome, row_order, show_losses
from stakelib.training.recipe import Recipe, rate_for
from stakelib.training.rows import load_rows

SLOWER, SWAPPED_GB = 5.0, 0.5  # together they mean that memory went to disk: 200 tokens/s became 1.4 (mlx-examples#210)


def mlx_place(run: Run, rows: int = 12) -> Run | None:
    """Where notebook 03 trains: `run` itself on a Mac; elsewhere a run of the tiny model inside it, on short rows.

    None where MLX cannot be loaded. What was decided, and why, goes into the record.
    """
    kind, why = machine.mlx()
    done = {"metal": "trained with MLX", "cpu": "proved on the smoke model", "none": "skipped"}[kind]
    run.remember(mlx={"done": done, "why": why})
    if kind != "cpu":
        return run if kind == "metal" else None
    proof = Run.open(run.path("mlx-proof"), "smoke")
    for part, count in (("train", rows), ("valid", rows // 6)):
        found = load_rows(run.path("training_data", f"{part}.jsonl"))
        short = sorted(found, key=lambda r: len(r["prompt"] + r["completion"]))[:count]
        lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in short]
        atomic_write_text(proof.path("training_data", f"{part}.jsonl"), "".join(lines))
    return proof


class Watchdog:
    """Stops a training that fell into swap; a slow row or a busy minute alone is no reason."""

    def __init__(self, swap_gb: float) -> None:
        self.swap_gb, self.first, self.last = swap_gb, [], deque(maxlen=10)

    def see(self, tokens_per_second: float, swap_gb: float) -> None:
        """Raise CourseError if the last ten steps were five times slower than the first ten while swap grew."""
        self.last.append(tokens_per_second)
        if len(self.first) < 10:
            self.first.append(tokens_per_second)
            return
        before, now, grown = median(self.first), median(self.last), swap_gb - self.swap_gb
        if now * SLOWER < before and grown > SWAPPED_GB:
            raise CourseError(
                f"training fell from {before:.0f} to {now:.0f} tokens a second while {grown:.1f} GB went to swap: the "
                "memory is full",
                "close other programs and run again (it goes on from its last checkpoint), or set precision='nf4' and "
                "checkpointing='on' in the recipe",
            )


def swap_gb() -> float:
    """Memory that lies on disk (GB), of all programs together."""
    import psutil

    return psutil.swap_memory().used / 2**30


def train_mlx(
    base: BaseModel,
    recipe: Recipe,
    epochs: int,
    train: list[Rendered],
    valid: list[Rendered],
    checkpoints: Path,
    start: Path | None = None,
) -> tuple[Callable[[Path], Any], dict[str, Any]]:
    """As `train_peft`, with MLX in a process of its own: what crashes the graphics driver spares the notebook.

    The recipe's precision and checkpointing are decided before (`settle_mlx`). Every checkpoint is an adapter that
    mlx-lm itself can load. Returns a function that writes the best one into a folder in PEFT's form, and the result.
    """
    order = row_order(len(train), epochs, recipe.seed)
    steps = math.ceil(len(order) / recipe.accumulate)
    job = {
        "base": str(mlx_folder(base, recipe.precision).resolve()),
        "model": base.origin,
        "checkpoints": str(checkpoints.resolve()),
        "start": str((start / "mlx" / "adapters.safetensors").resolve()) if start else None,
        "recipe": replace(recipe, learning_rate=rate_for(load_config(base.folder), recipe)).settings(),
        "train": [[r.ids, r.mask] for r in train],
        "valid": [[r.ids, r.mask] for r in valid],
        "names": [train[i].where for i in order],
        "steps": steps,
        "epochs": epochs,
        "every": max(1, steps // (epochs * recipe.validate_per_epoch)),
    }
    file = atomic_write_json(checkpoints / "job.json", job)
    started = time.monotonic()
    said = _follow(file, steps)
    done, end = said["done"], said["done"]["end"]
    result = outcome(
        done["history"],
        done["best"],
        [train[i] for i in order[: end * recipe.accumulate]],
        steps=steps,
        begun=said["begun"],
        end=end,
        trainable=done["trainable_parameters"],
        seconds=time.monotonic() - started,
        per_step=recipe.accumulate,
    )
    best = checkpoints / f"checkpoint-{result['best_step']}"
    return partial(to_peft, best), result | {"mlx_peak_gb": round(said.get("peak_gb", 0.0), 2)}


def _fact(line: str) -> dict[str, Any] | None:
    """What the trainer tells in this line of its output, if it does."""
    with contextlib.suppress(ValueError):
        fact = json.loads(line.rpartition(MARK)[2]) if MARK in line else None
        return fact if isinstance(fact, dict) else None
    return None


def _follow(job: Path, steps: int) -> dict[str, Any]:
    """Run the trainer on `job` until it ends; everything it said, the last word on each matter. It dies with us."""
    progress, dog, said, history = Progress("training", steps, "steps", every=15), Watchdog(swap_gb()), {}, []
    picture, log = None, job.with_name("mlx.log")
    command = [sys.executable, "-m", "stakelib.training.mlx_backend", str(job.resolve())]
    with log.open("w", encoding="utf-8") as errors, progress.heartbeat():
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "encoding": "utf-8", "errors": "replace"}
        process = subprocess.Popen(command, cwd=REPOSITORY, **pipes)
        try:
            for line in process.stdout:
                if (fact := _fact(line)) is None:  # a library's own word, past Python
                    errors.write(line)
                    errors.flush()
                    continue
                said |= fact
                if "begun" in fact:
                    history = fact["history"]
                    progress.tick(fact["begun"])
                    if fact["begun"]:
                        print(f"training: going on from step {fact['begun']} of {steps}", flush=True)
                if "step" in fact:
                    progress.tick(fact["step"], f"loss {fact['loss']:.3f}")
                    dog.see(fact["tokens_per_second"], swap_gb())
                if "log" in fact:
                    history.append(fact["log"])
                    picture = show_losses(history, picture)
                    if loss := fact["log"].get("eval_loss"):
                        print(f"validation loss {loss:.3f} at step {fact['log']['step']}", flush=True)
            process.wait()
        except KeyboardInterrupt:
            print("training: interrupted; started again, it goes on from its last checkpoint", flush=True)
            raise
        finally:
            process.kill()
            process.wait()
    if "problems" in said:
        raise CourseError(said["problems"], said["next_action"])
    if "done" not in said:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise CourseError(
            [f"the MLX process ended with code {process.returncode}", *last],
            "run again: it goes on from its last checkpoint; if it happens twice, set precision='nf4' and "
            "checkpointing='on' in the recipe",
        )
    return said
