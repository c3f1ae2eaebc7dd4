"""The same seed gives the same scenarios, figures and rows on every Python: digests of each, side by side.

    python benchmarks/same_rows.py                                # this Python and all others on the PATH
    python benchmarks/same_rows.py PYTHON ...                     # this Python and those named
    python benchmarks/same_rows.py --digests                      # of this Python alone, as JSON

Each other Python needs pydantic, pyyaml, jinja2 and psutil, and runs twice, with two seeds of its string hashes.
Ends with 1 where a digest differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NAMES = [f"python3.{minor}" for minor in (11, 12, 13, 14)]
HASH_SEEDS = ("0", "1")  # the order of a set of texts depends on it


def digest(value: Any) -> str:
    """The first 16 hex digits of the value's sha256."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]


def digests(profiles: list[str]) -> dict[str, str]:
    """What -> digest: ids, scenarios and figures of sample(60, 7), and all rows of the profiles."""
    sys.path[:0] = [str(ROOT)]
    from stakelib.dialogues import build, mix_for, split
    from stakelib.run import PROFILES
    from stakelib.scenarios import derive_metrics, sample, scenario_id

    scenarios = sample(60, 7)
    figures = [[(m.key, m.year, m.value) for m in derive_metrics(s).figures.values()] for s in scenarios]
    out = {
        "ids": digest([scenario_id(s) for s in scenarios]),
        "scenarios": digest([s.model_dump() for s in scenarios]),
        "figures": digest(figures),
    }
    for profile in (PROFILES[name] for name in profiles):
        more = {"asked": profile.asked, "enhance": profile.thin, "voice": profile.thin}
        needed = sample(max(mix_for(profile.rows).values()), profile.seed)
        rows = split(build(needed, mix_for(profile.rows), profile.seed, **more), profile.seed)
        out[f"rows of {profile.name}"] = digest([row.model_dump() for row in rows])
        out[f"texts of {profile.name}"] = digest([(row.prompt, row.completion) for row in rows])
    return out


def of(python: str, profiles: list[str], hash_seed: str) -> dict[str, str]:
    """Version and digests of another interpreter; its last words instead where it cannot make any."""
    command = [python, __file__, "--digests", "--profiles", *profiles]
    env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONUTF8": "1"}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=env)
    lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
    return json.loads(done.stdout) if done.returncode == 0 else {"not run": lines[-1]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*")
    parser.add_argument("--profiles", nargs="*", default=["smoke", "quick"])
    parser.add_argument("--digests", action="store_true")
    asked = parser.parse_args()
    if asked.digests:
        print(json.dumps({"python": sys.version.split()[0]} | digests(asked.profiles)))
        return 0
    pythons = [sys.executable, *(asked.pythons or filter(None, map(shutil.which, NAMES)))]
    results = [(p, seed, of(p, asked.profiles, seed)) for p in dict.fromkeys(pythons) for seed in HASH_SEEDS]
    for python, seed, result in results:
        told = {"python": python} | result
        print(", ".join(f"{what} {value}" for what, value in told.items()), f"(hash seed {seed})")
    ran = [{k: v for k, v in result.items() if k != "python"} for *_, result in results if "not run" not in result]
    same = all(result == ran[0] for result in ran)
    print(f"{len(ran)} of {len(results)} runs, " + ("all equal" if same else "NOT EQUAL"))
    return 0 if same and ran else 1


if __name__ == "__main__":
    sys.exit(main())
