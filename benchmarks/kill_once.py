"""kill -9 in the middle of a training of the real model: does it end where an uninterrupted one ends?

    python benchmarks/kill_once.py                 # SmolLM2, 96 rows of the course, one epoch

Three trainings, each a process of its own: one undisturbed; one killed at a random moment of its middle and begun
again; one with another seed, which must not end in the same place, or the comparison would show nothing. Writes
benchmarks/records/kill.json: for each the validation loss and how far its adapter lies from the undisturbed one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from train_speed import ROOT, rows_of

RECORD = ROOT / "benchmarks" / "records" / "kill.json"


def train(model: str, rows: int, seed: int, folder: Path) -> None:
    """One training with the course's recipe; its adapter and its result go into `folder`, checkpoints lie there too."""
    from safetensors.torch import save_file

    from stakelib import machine
    from stakelib.models import base_model
    from stakelib.models.engines import quiet
    from stakelib.training import RECIPES, peft_backend

    quiet()
    recipe = replace(RECIPES["course"], seed=seed, precision=machine.precision()[0])
    learned, valid = rows_of(model, rows)
    net, result = peft_backend.train_peft(base_model(model).folder, recipe, 1, learned, valid, folder / "checkpoints")
    adapter = {name: p.detach().contiguous() for name, p in net.named_parameters() if "lora_" in name}
    save_file(adapter, folder / "end.safetensors")
    losses = [loss for _, loss in result["train_loss"]]
    about = {"valid_loss": result["best_valid_loss"], "train_loss": [losses[0], losses[-1]]}
    (folder / "end.json").write_text(json.dumps(about), encoding="utf-8")


def run(arguments: list[str], folder: Path, kill_after_s: float | None = None) -> float:
    """A training in a process of its own, killed after so many seconds if wanted; returns its seconds."""
    folder.mkdir(exist_ok=True)
    start = time.monotonic()
    with (folder / "said.txt").open("a", encoding="utf-8") as said:
        command = [sys.executable, __file__, *arguments, "--into", str(folder)]
        child = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "PYTHONPATH": str(ROOT)})
        try:
            child.wait(kill_after_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if kill_after_s is None and child.returncode:
        raise SystemExit((folder / "said.txt").read_text(encoding="utf-8")[-2000:])
    return time.monotonic() - start


def apart(first: Path, second: Path) -> float:
    """Largest difference of a number of the two adapters, as a share of the largest number."""
    from safetensors.torch import load_file

    a, b = (load_file(folder / "end.safetensors") for folder in (first, second))
    return max(float((a[n] - b[n]).abs().max()) for n in a) / max(float(x.abs().max()) for x in a.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--seed", type=int, default=7, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.into:
        train(wanted.model, wanted.rows, wanted.seed, wanted.into)
        return
    from stakelib import machine

    same = ["--model", wanted.model, "--rows", str(wanted.rows)]
    with tempfile.TemporaryDirectory() as place:
        whole, killed, other = (Path(place) / name for name in ("whole", "killed", "other"))
        seconds = run(same, whole)
        moment = random.uniform(0.4, 0.9) * seconds
        run(same, killed, moment)
        if (killed / "end.json").exists():
            raise SystemExit("it had ended before it was killed: run this again")
        left = sorted(file.name for file in (killed / "checkpoints").iterdir())
        run(same, killed)
        run([*same, "--seed", "8"], other)
        found: dict[str, Any] = {}
        for folder in (whole, killed, other):
            end = json.loads((folder / "end.json").read_text(encoding="utf-8"))
            found[folder.name] = {**end, "apart": apart(whole, folder)}
        resumed = "going on from" in (killed / "said.txt").read_text(encoding="utf-8")
    loss = found["whole"]["valid_loss"]
    for line in found.values():
        line["loss_apart_percent"] = 100 * abs(line["valid_loss"] / loss - 1)
    about = {
        "model": wanted.model,
        "rows": wanted.rows,
        "seconds": seconds,
        "killed_after_s": moment,
        "left_at_the_kill": left,
        "resumed": resumed,
        "processor": machine.describe()["processor"],
        "precision": machine.precision()[0],
    }
    RECORD.write_text(json.dumps({**about, "runs": found}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({**about, "runs": found}, indent=1))
    before, after = found["whole"]["train_loss"]
    elsewhere = found["other"]["apart"] > 10 * max(found["killed"]["apart"], 1e-4)
    held = {
        "it went on from a checkpoint": resumed,
        "the loss fell by 30 %": after <= 0.7 * before,
        "the killed one ends within 1 %": found["killed"]["loss_apart_percent"] <= 1,
        "another seed ends elsewhere": elsewhere,
    }
    if not all(held.values()):
        raise SystemExit("does not hold: " + ", ".join(name for name, ok in held.items() if not ok))


if __name__ == "__main__":
    main()
