"""The training of notebook 04 from a command line: for several processes, or a computer without Jupyter."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace

from stakelib.models import base_model
from stakelib.run import CourseError, Run, is_main
from stakelib.training import RECIPES, preflight, train


def main() -> int:
    """Train the run that the arguments name; notebook 01 must have made its rows. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m stakelib.training", description=__doc__)
    parser.add_argument("--profile", help="smoke, quick, report or full")
    parser.add_argument("--model", help="another base model")
    parser.add_argument("--out", help="another run folder")
    parser.add_argument("--recipe", default="course", choices=RECIPES)
    parser.add_argument("--check", action="store_true", help="train nothing: say whether the run fits this computer")
    parser.add_argument("--rows-per-step", type=int, help="rows per optimiser step, shared by the processes")
    options = parser.parse_args()
    recipe = RECIPES[options.recipe]
    if options.rows_per_step:
        recipe = replace(recipe, accumulate=options.rows_per_step)
    if not is_main():  # one voice is enough
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        run = Run.open(options.out, options.profile, options.model)
        if options.check:
            preflight(run.profile.model, run.folder, recipe)
            return 0
        from stakelib.training.keep import processes

        with processes().main_process_first():  # fetches or makes the model; the others find it in the cache
            base_model(run.profile.model)
        result = train(run, recipe)
    except CourseError as problem:
        print(problem, flush=True)
        return 2
    print(f"best validation loss {result['best_valid_loss']:.3f} at step {result['best_step']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
