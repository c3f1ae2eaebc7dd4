"""Random and mutated scenario files against `load`: each is read rightly, or refused in words that people understand.

    python benchmarks/fuzz_load.py                              # 10,000 files
    python benchmarks/fuzz_load.py --count 500 --seed 3 --more my_scenario.json

Kinds: the tool's JSON, the guide's older JSON, a SPLAT export and the template, as text and as .xlsx. `--more`: JSON
files that are mutated too. Prints how many files loaded, each kind of message with its number, and what went wrong;
the first forty files that went wrong stay in the folder that is named. Ends with 1 if there are any.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import re
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main() -> int:
    from damaged_scenarios import BASES, damaged, outcome

    from stakelib.run import CourseError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", type=Path, nargs="*", default=[])
    asked = parser.parse_args()
    BASES.update({f"json of {number}": p.read_text(encoding="utf-8") for number, p in enumerate(asked.more, 1)})
    kinds, kept = sorted(BASES), Path(tempfile.mkdtemp(prefix="fuzz-"))
    results: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    messages: Counter[str] = Counter()
    wrong: list[str] = []
    for number in range(asked.count):
        kind, rng = kinds[number % len(kinds)], random.Random(f"{asked.seed}-{number}")
        folder = kept / "file"
        folder.mkdir(exist_ok=True)
        path = folder / "mine.dat"
        path.write_bytes(data := damaged(kind, rng))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                result = outcome(path)
        except Exception:
            results[kind]["WRONG"] += 1
            wrong.append(f"{number}, {kind}: {traceback.format_exc(limit=-2)}")
            if len(wrong) <= 40:
                (kept / f"{number}.dat").write_bytes(data)
            continue
        results[kind]["refused" if isinstance(result, CourseError) else "loaded"] += 1
        if isinstance(result, CourseError):
            messages.update({re.sub(r"\d+", "#", re.sub(r"'[^']*'|\"[^\"]*\"|\(.*", "…", p)) for p in result.problems})
    for kind, counts in results.items():
        print(f"{kind}: " + ", ".join(f"{counts[what]:,} {what}" for what in ("loaded", "refused", "WRONG")))
    print(f"{len(messages)} kinds of message, the most frequent:")
    print("\n".join(f"{count:6,}  {text[:150]}" for text, count in messages.most_common(60)))
    print("\n".join([f"{len(wrong)} of {asked.count:,} went wrong; folder {kept}", *wrong[:40]]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
