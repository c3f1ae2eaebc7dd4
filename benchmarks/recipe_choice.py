"""Validation loss of the course's recipe with one setting changed at a time, after the same rows.

    python benchmarks/recipe_choice.py                     # SmolLM2, 48 rows, all variants
    python benchmarks/recipe_choice.py course alpha-32     # these variants only

Every variant is a process of its own, from the same seed; the loss is that of 24 held-out rows (nats per learned
token). Prints a table and writes benchmarks/records/recipe-choice.json, keeping variants measured before.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
RECORD = ROOT / "benchmarks" / "records" / "recipe-choice.json"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
VARIANTS = {
    "course": {},
    "alpha-32": {"alpha": 32},  # the adapter counts once, not twice
    "alpha-128": {"alpha": 128},
    "attention-only": {"targets": ATTENTION, "rank": 85, "alpha": 170},  # as many numbers as the seven at rank 32
    "rate-halved": {"learning_rate": 1e-3},
    "rate-doubled": {"learning_rate": 4e-3},
}


def measure(variant: str, model: str, count: int) -> dict[str, float]:
    """Train in this process; the loss at the end, the adapter's numbers (million), the seconds."""
    from benchmarks.train_speed import rows_of
    from stakelib import machine
    from stakelib.models import base_model
    from stakelib.models.engines import quiet
    from stakelib.training import RECIPES, peft_backend

    quiet()
    train, valid = rows_of(model, count)
    recipe = replace(RECIPES["course"], validate_per_epoch=1, precision=machine.precision()[0], **VARIANTS[variant])
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = peft_backend.train_peft(base_model(model).folder, recipe, 1, train, valid, Path(folder))[1]
    return {"valid_loss": round(result["best_valid_loss"], 3), "million": result["trainable_parameters"] / 1e6,
            "rows": count, "seconds": round(time.monotonic() - started)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=[*VARIANTS])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.one:
        print("\n" + json.dumps(measure(wanted.variants[0], wanted.model, wanted.rows)))
        return
    found = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    for name in wanted.variants:
        command = [sys.executable, __file__, name, "--one", "--model", wanted.model, "--rows", str(wanted.rows)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise SystemExit(done.stdout[-1000:] + done.stderr[-2000:])
        found[name] = {"model": wanted.model, **json.loads(done.stdout.strip().splitlines()[-1])}
        print(f"{name:<16} {found[name]}", flush=True)
        RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
