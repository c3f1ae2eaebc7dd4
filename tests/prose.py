"""Numbers in prose come from the record of a run: between `<!--=key-->` and `<!--/-->` stands what the record says.

python tests/prose.py --record runs/quick     take a finished run's figures into benchmarks/records/quick.json
python tests/prose.py --record runs/quick other 05,06,08    of these notebooks only, into other.json
python tests/prose.py --write                 fill the README and the notebooks from the records
python tests/prose.py                         print every sentence that contradicts its record, exit 1 if any
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "records"
EARLY = ("data", "train", "guide-prompts")  # stages of notebooks 01 to 04
MARK = re.compile(r"<!--=([\w.-]+)-->(.*?)<!--/-->", re.DOTALL)


def files() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))]


def take(folder: Path, called: str = "", only: str = "") -> Path:
    """Copy the figures of a finished run; refuses one whose stages were skipped: its minutes mean nothing.

    `called`: the record's name, that of the profile unless given; `only`: these notebooks, the rest is another's.
    """
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    timings = json.loads((folder / "notebooks" / "timings.json").read_text(encoding="utf-8"))
    stages = record["stages"]
    if only:
        timings = {long: seconds for long, seconds in timings.items() if long[:2] in only.split(",")}
        stages = {k: s for k, s in stages.items() if k not in EARLY}
    if not only and timings["04_train_with_peft"] < stages["train"]["seconds"]:
        raise SystemExit(f"{folder}: the last course run skipped finished stages; run into a fresh folder with --out")
    kept = {name: {k: s[k] for k in ("seconds", "peak_mb", "result")} for name, s in stages.items()}
    for name, stage in kept.items():
        stage["disk_bytes"] = sum(f["bytes"] for f in stages[name]["outputs"].values())
    kept.get("guide-prompts", {}).pop("result", None)  # texts, not figures
    if (told := folder / "evaluation" / "evaluation.json").exists():
        kept["evaluation"] = quality(json.loads(told.read_text(encoding="utf-8")))
    taken = {
        "profile": record["profile"],
        "machine": record["machine"],
        "versions": record["versions"],
        "notebooks": {name[:2]: seconds for name, seconds in sorted(timings.items())},
        "stages": kept,
    }
    target = RECORDS / f"{called or record['profile']['name']}.json"
    RECORDS.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(taken, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    return target


def quality(facts: dict[str, Any]) -> dict[str, Any]:
    """Of evaluation.json: each system's measures as "98.6 (97.9 to 99.1)", in % but for numbers, and its counts."""

    def shown(line: dict[str, Any], system: str) -> str:
        times = 1 if line["kind"] == "number" else 100
        value, low, high = (f"{times * line[system + end]:.1f}" for end in ("", "_low", "_high"))
        return f"{value} ({low} to {high})"

    said = {s: {c["measure"]: shown(c, s) for c in facts["comparison"]} for s in ("base", "tuned")}
    said |= {s: {m: shown(c, s) for m, c in lines.items()} for s, lines in facts["rivals"].items()}
    counts = {s: {k: t[k] for k in ("answers", "numbers", "grounded", "faultless")} for s, t in facts["totals"].items()}
    return {"prompts": facts["prompts"], "scenarios": facts["scenarios"], "measures": said, "totals": counts}


def figure(key: str) -> str:
    """What the record says: `<profile>.<notebook number|total|report>.minutes`, `<profile>.<stage>.peak_gb`, ..."""
    profile, *path = key.split(".")
    record = json.loads((RECORDS / f"{profile}.json").read_text(encoding="utf-8"))
    if path[1:] == ["minutes"] and path[0] in ("total", "report"):  # all notebooks; those up to the report
        last = "06" if path[0] == "report" else "99"
        return minutes(sum(seconds for number, seconds in record["notebooks"].items() if number <= last))
    if path[0] in record["notebooks"] and path[1:] == ["minutes"]:
        return minutes(record["notebooks"][path[0]])
    if path[0] == "nll":
        return f"{record['stages']['parity']['result']['nll'][path[1]]:.2f}"
    if path[0] in ("machine", "versions"):
        return str(record[path[0]][path[1]])
    stage: Any = record["stages"][path[0]]
    known = {
        "seconds": lambda: f"{stage['seconds']:.0f}",
        "minutes": lambda: minutes(stage["seconds"]),
        "peak_gb": lambda: f"{stage['peak_mb'] / 1024:.1f}",
        "disk_gb": lambda: f"{stage['disk_bytes'] / 1e9:.1f}",
    }
    if path[1] in known:
        return known[path[1]]()
    for part in path[1:]:
        stage = stage[part]
    if isinstance(stage, str):
        return stage
    if path[-2] == "bytes":
        return f"{stage / 1e6:.0f}"
    return f"{stage:,}" if isinstance(stage, int) else f"{stage:.2f}"


def minutes(seconds: float) -> str:
    return str(round(seconds / 60)) if seconds >= 90 else f"{max(seconds, 6) / 60:.1f}"


def contradictions(text: str) -> list[str]:
    """Marks whose value is not the record's, that name nothing in a record, or that begin a line.

    A comment at the beginning of a line ends the paragraph before it in Markdown.
    """
    found = [f"{line.strip()[:60]}: a mark begins a line" for line in re.findall(r'(?m)^\s*"?<!--=.*', text)]
    for key, said in MARK.findall(text):
        try:
            wanted = figure(key)
        except (KeyError, FileNotFoundError, IndexError, TypeError) as problem:
            found.append(f"{key}: not in any record ({type(problem).__name__} {problem})")
            continue
        if said != wanted:
            found.append(f"{key}: the text says {said!r}, the record {wanted!r}")
    return found


def fill(text: str) -> str:
    return MARK.sub(lambda m: f"<!--={m[1]}-->{figure(m[1])}<!--/-->", text)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--record"]:
        print("written:", take(Path(arguments[1]), *arguments[2:4]).relative_to(ROOT))
        return 0
    if arguments == ["--write"]:
        for path in files():
            text = path.read_text(encoding="utf-8")
            path.write_text(fill(text), encoding="utf-8", newline="\n")
    problems = [f"{p.name}: {c}" for p in files() for c in contradictions(p.read_text(encoding="utf-8"))]
    print("\n".join(problems) or "every marked number agrees with its record")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
