"""`plan` against reality: peak memory and seconds a row, predicted and measured, several models and two lengths.

    python benchmarks/plan_check.py                        # all cases, three rounds
    python benchmarks/plan_check.py smollm2-135m:auto:704:352:off --rounds 1

Prediction and run are processes of their own and take turns; each measures the speed of a matrix product before and
after. Time is compared raw, and scaled by those speeds; the figure is the median of the rounds. Prints a table and
writes benchmarks/records/plan_check.json; cases named by hand replace their own lines there and leave the others.
Cases are those of benchmarks/memory.py. All eight took 66 minutes on two cores without matrix units.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
RECORD = ROOT / "benchmarks" / "records" / "plan_check.json"
MODELS = ("smollm2-135m:auto:{}:off", "gemma-3-270m:auto:{}:off", "gemma-3-1b:auto:{}:off", "gemma-2b:auto:{}:on")
CASES = [model.format(length) for model in MODELS for length in ("320:128", "704:352")]


def predict(case: dict[str, Any], steps: int) -> dict[str, Any]:
    """What `plan` says of training rows of this length."""
    from benchmarks.shapes import random_rows
    from stakelib.models import config_of
    from stakelib.training import Recipe, memory
    from stakelib.training.plan import hours, settle

    rows = random_rows(case["tokens"], case["learned"], config_of(case["model"]).vocab_size, 1)
    wanted = Recipe(precision=case["precision"], checkpointing=case["checkpointing"])
    recipe = settle(case["model"], wanted, rows, 1e9)[0]
    parts = memory(config_of(case["model"]), recipe, case["tokens"], case["learned"])
    row_s = 3600 * hours(case["model"], recipe, rows, (), 1)
    return {"anonymous_gb": sum(parts.values()) - parts["mapped"], "row_s": row_s, "parts": parts}


def measured(case: dict[str, Any], steps: int) -> dict[str, Any]:
    """What happens."""
    from benchmarks.memory import measure

    return measure(case, steps)


def child(order: dict[str, Any]) -> None:
    """One prediction or one run, with the machine's speed before and after (median of three, GFLOP/s)."""
    from stakelib import machine

    kind = machine.precision()[0]

    def speed() -> float:  # of single products, so that what else the machine does counts as it does in training
        return statistics.median(machine.matmul_gflops(kind, 1024, 0) for _ in range(60))

    before = speed()
    found = {"predict": predict, "measured": measured}[order["what"]](order["case"], order["steps"])
    print("\n" + json.dumps({**found, "gflops": [before, speed()]}), flush=True)


def ask(what: str, case: dict[str, Any], steps: int) -> dict[str, Any]:
    order = json.dumps({"what": what, "case": case, "steps": steps})
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__, "--child", order], env=env, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"{what} {case}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(case: dict[str, Any], rounds: int, steps: int) -> dict[str, Any]:
    """Medians over the rounds of predicted / measured."""
    memory, raw, scaled, runs = [], [], [], []  # one of each for every round
    for _ in range(rounds):
        said, was = ask("predict", case, steps), ask("measured", case, steps)
        memory.append(said["anonymous_gb"] / was["anonymous_gb"])
        raw.append(said["row_s"] / was["row_s"])
        scaled.append(raw[-1] * statistics.mean(said["gflops"]) / statistics.mean(was["gflops"]))
        runs.append({"said": said, "was": was})
    middle = {
        name: round(statistics.median(x), 2)
        for name, x in (("memory_ratio", memory), ("time_ratio_raw", raw), ("time_ratio", scaled))
    }
    shown = {
        f"{who}_{short}": round(statistics.median(run[who][name] for run in runs), 2)
        for short, name in (("gb", "anonymous_gb"), ("row_s", "row_s"))
        for who in ("said", "was")
    }
    return {**case, **shown, **middle, "runs": runs}


def main(arguments: list[str]) -> int:
    from benchmarks.memory import case_of

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="rows trained; the first is not timed")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(json.loads(options.child))
        return 0
    found = json.loads(RECORD.read_text(encoding="utf-8")) if options.cases is not CASES and RECORD.exists() else []
    for case in map(case_of, options.cases):
        found = [line for line in found if {k: line[k] for k in case} != case]
        found.append(compare(case, options.rounds, options.steps))
        print(json.dumps({k: v for k, v in found[-1].items() if k != "runs"}), flush=True)
        RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
