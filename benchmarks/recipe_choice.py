"""Validation loss of the course's recipe with one setting changed at a time, over one epoch of the quick rows.

    python benchmarks/recipe_choice.py                     # SmolLM2, 427 rows, all variants: a night on two cores
    python benchmarks/recipe_choice.py course alpha-64     # these variants only

Every variant is a process of its own, from the same seed; the loss (nats per learned token) is that of the validation
rows at each quarter of the epoch. It runs where training runs: on a graphics card, if PyTorch finds one, in minutes.
Prints a table and writes benchmarks/records/recipe-choice.json, keeping variants measured before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
RECORD = ROOT / "benchmarks" / "records" / "recipe-choice.json"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PLAIN = {"alpha": 64}  # alpha/rank = 2, where most recipes stand: the other settings were chosen there
VARIANTS = {
    "course": {},
    "alpha-32": {"alpha": 32},
    "alpha-64": PLAIN,
    "alpha-256": {"alpha": 256},
    "alpha-64-attention-only": {"targets": ATTENTION, "rank": 85, "alpha": 170},  # as many numbers, alpha/rank = 2
    "alpha-64-rate-halved": PLAIN | {"learning_rate": 1e-3},
    "alpha-64-rate-doubled": PLAIN | {"learning_rate": 4e-3},
}


def measure(variant: str, model: str) -> dict[str, Any]:
    """Train in this process; the losses on the way, the adapter's numbers (million), the seconds, the hardware."""
    import torch

    from stakelib import machine
    from stakelib.dialogues import prepare, scenarios_needed
    from stakelib.models import base_model, load_tokenizer
    from stakelib.models.engines import quiet
    from stakelib.run import Run
    from stakelib.scenarios import sample
    from stakelib.training import RECIPES, peft_backend
    from stakelib.training.rows import checked_rows

    quiet()
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    precision = "float32" if card else machine.precision()[0]
    recipe = replace(RECIPES["course"], precision=precision, checkpointing="off", **VARIANTS[variant])
    with tempfile.TemporaryDirectory() as folder:
        run = Run.open(Path(folder, "run"), "quick", model)
        prepare(run, sample(scenarios_needed(run), run.profile.seed))
        files = [run.path("training_data", f"{part}.jsonl") for part in ("train", "valid")]
        train, valid = checked_rows(load_tokenizer(base_model(model).folder), files, recipe.max_length)
        started = time.monotonic()
        result = peft_backend.train_peft(base_model(model).folder, recipe, 1, train, valid, Path(folder, "kept"))[1]
    curve = [round(loss, 3) for _, loss in result["valid_loss"]]
    return {
        "valid_loss": round(result["best_valid_loss"], 3),
        "on_the_way": curve,
        "million": result["trainable_parameters"] / 1e6,
        "rows": len(train),
        "valid_rows": len(valid),
        "seconds": round(time.monotonic() - started),
        "machine": card or machine.describe(ROOT)["processor"],
        "precision": precision,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=[*VARIANTS])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.one:
        print("\n" + json.dumps(measure(wanted.variants[0], wanted.model)))
        return
    found = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    for name in wanted.variants:
        command = [sys.executable, __file__, name, "--one", "--model", wanted.model]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise SystemExit(done.stdout[-1000:] + done.stderr[-2000:])
        found[name] = {"model": wanted.model, **json.loads(done.stdout.strip().splitlines()[-1])}
        print(f"{name:<16} {found[name]}", flush=True)
        RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
