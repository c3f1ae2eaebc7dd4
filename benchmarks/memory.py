"""Peak memory of training a few rows, each case in a process of its own, under a hard cap where one is given.

    python benchmarks/memory.py gemma-2b:nf4:704:352:on smollm2-135m:auto:704:352:off --cap-gb 6 --isa avx2

A case is model:precision:tokens:learned:checkpointing; precision "full" learns every weight. Models that are not in
.cache get random weights of their shape, kept in runs/random (5 GB for the largest).
Anonymous memory, swapped or not, is what the system cannot drop; mapped weight files are counted apart. The cap is a
memory cgroup (root on Linux), which counts mapped pages too and allows no swap. Prints a table and writes
benchmarks/records/memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
RECORD = ROOT / "benchmarks" / "records" / "memory.json"
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
CASE = ("model", "precision", "tokens", "learned", "checkpointing")


def case_of(text: str) -> dict[str, Any]:
    """The words of a case by name, its two numbers as numbers."""
    case = dict(zip(CASE, text.split(":"), strict=True))
    return {**case, "tokens": int(case["tokens"]), "learned": int(case["learned"])}


def cap_group(gb: float) -> Path | None:
    """A memory cgroup (version 1 or 2) that ends a process above `gb`; None where only root may make one."""
    v1 = Path("/sys/fs/cgroup/memory")
    try:
        if v1.exists():
            lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
            own = next(line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory")
            group, limit = v1 / own.lstrip("/") / f"stake-{os.getpid()}", "memory.limit_in_bytes"
            swap, allowed = "memory.memsw.limit_in_bytes", int(gb * 2**30)  # memory and swap together
        else:
            group, limit = Path("/sys/fs/cgroup") / f"stake-{os.getpid()}", "memory.max"
            swap, allowed = "memory.swap.max", 0
        group.mkdir(exist_ok=True)
        (group / limit).write_text(str(int(gb * 2**30)), encoding="utf-8")
        if (group / swap).exists():  # not there where the kernel counts no swap
            (group / swap).write_text(str(allowed), encoding="utf-8")
        return group
    except OSError:
        return None


class Watch:
    """Peak anonymous (RssAnon) and mapped (RssFile) memory of this process in GB, sampled 50 times a second."""

    def __enter__(self) -> Watch:
        self.anonymous_gb = self.mapped_gb = 0.0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def _sample(self) -> None:
        from stakelib.run import anonymous_mb

        status = Path("/proc/self/status")
        while not self.done.wait(0.02):
            lines, swapped = {}, 0.0
            if status.exists():
                lines = dict(x.split(":", 1) for x in status.read_text(encoding="utf-8").splitlines() if ":" in x)
                swapped = int(lines["VmSwap"].split()[0]) / 2**20
            self.anonymous_gb = max(self.anonymous_gb, anonymous_mb() / 1024 + swapped)
            if lines:
                self.mapped_gb = max(self.mapped_gb, int(lines["RssFile"].split()[0]) / 2**20)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def full_steps(folder: Path, rows: list[Any]) -> list[float]:
    """Seconds of each step in which every weight learns (float32, AdamW): the guide's second option."""
    import torch

    from stakelib.models import load_weights
    from stakelib.training.peft_backend import collate, row_loss

    model, seconds = load_weights(folder, dtype="float32").train(), []
    optimizer = torch.optim.AdamW(model.parameters(), 2e-5, fused=True)
    for row in rows:
        start = time.perf_counter()
        total, count = row_loss(model, collate([row], 1))
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(case: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train `steps` rows with the course's own back-end and validate once, in this process; the first is not timed."""
    from benchmarks.shapes import random_model, random_rows
    from benchmarks.train_speed import clock_of
    from stakelib import machine
    from stakelib.models import MODELS, base_model, config_of
    from stakelib.models.catalog import cache_folder
    from stakelib.training import Recipe, peft_backend

    Clock = clock_of(peft_backend.Watch)
    peft_backend.Watch, name = Clock, case["model"]
    known = name in MODELS and (cache_folder() / "models" / name / "source.json").exists()
    folder = base_model(name).folder if known else random_model(name, ROOT / "runs" / "random" / name)
    precision = machine.precision()[0] if case["precision"] == "auto" else case["precision"]
    recipe = Recipe(precision=precision, checkpointing=case["checkpointing"], validate_per_epoch=1)
    rows = random_rows(case["tokens"], case["learned"], config_of(name).vocab_size, steps)
    with Watch() as watch, tempfile.TemporaryDirectory() as checkpoints:
        if precision == "full":
            Clock.seconds = full_steps(folder, rows)
        else:
            peft_backend.train_peft(folder, recipe, 1, rows, rows[:1], Path(checkpoints))
    return {
        **case,
        "weights": "real" if known else "random",
        "compute": machine.precision()[0],
        "anonymous_gb": round(watch.anonymous_gb, 2),
        "mapped_gb": round(watch.mapped_gb, 2),
        "row_s": round(statistics.median(Clock.seconds[1:]), 2),
        "rows": steps,
        "processor": machine.describe()["processor"],
    }


def run_case(case: dict[str, Any], steps: int, cap_gb: float | None, isa: str) -> dict[str, Any]:
    """One case in a process of its own; `ended` says how it went."""
    group = cap_group(cap_gb) if cap_gb else None
    env = {**os.environ, **(AVX2 if isa == "avx2" else {}), "PYTHONPATH": str(ROOT)}
    order = json.dumps({"case": case, "steps": steps, "group": str(group) if group else None})
    done = subprocess.run([sys.executable, __file__, "--child", order], env=env, capture_output=True, encoding="utf-8")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1]) if lines else {**case, "error": done.stderr.strip().splitlines()[-1:]}
    if group:
        found["cap"] = f"{cap_gb} GB, cgroup"
        group.rmdir()
    elif cap_gb:
        found["cap"] = "no cap"
    return {**found, "isa": isa or "all", "ended": "well" if done.returncode == 0 else f"code {done.returncode}"}


def child(order: dict[str, Any]) -> None:
    if order["group"]:
        (Path(order["group"]) / "cgroup.procs").write_text(str(os.getpid()), encoding="utf-8")
    print(json.dumps(measure(order["case"], order["steps"])), flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="model:precision:tokens:learned:checkpointing")
    parser.add_argument("--cap-gb", type=float)
    parser.add_argument("--isa", default="", choices=["", "avx2"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(json.loads(options.child))
        return 0
    kept = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else []
    for text in options.cases:
        found = run_case(case_of(text), options.steps, options.cap_gb, options.isa)
        print(json.dumps(found), flush=True)
        kept.append(found)
        RECORD.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
