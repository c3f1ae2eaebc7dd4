"""Ninety of the tool's own requests to a tuned model, as the tool sends them and reads the replies.

    python benchmarks/tool_requests.py --out runs/quick         # after notebooks 01, 04 and 05; minutes

Notebook 08 asks 27 for a first look. Replies that are there already are not asked again. Prints shares with their
intervals and the seconds of a reply; writes benchmarks/records/tool.json, from which the README quotes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="a run folder with an exported model")
    parser.add_argument("--requests", type=int, default=90)
    given = parser.parse_args()
    from stakelib import machine
    from stakelib.evaluation import accepted_share, tool_requests, try_in_tool
    from stakelib.run import Run

    told = json.loads((given.out / "run.json").read_text(encoding="utf-8"))["profile"]
    run = Run.open(given.out, told["name"], told["model"])
    table = try_in_tool(run, tool_requests(run, enhance=given.requests, voice=9))
    asked = table[table["task"] == "enhance"]
    shares = accepted_share(table)
    print(shares.round(3).to_string(index=False))
    print(asked.loc[~asked["accepted"], ["id", "wrong"]].to_string(index=False))
    result = {
        "requests": len(asked),
        "scenarios": int(asked["scenario_id"].nunique()),
        **{f"{name}_percent": round(100 * asked[name].mean()) for name in ("accepted", "kept", "grounded", "in_time")},
        "echo": int(asked["echo"].sum()),
        "lost_characters": int(asked["lost"].sum()),
        **{f"p{p}_s": round(float(asked["seconds"].quantile(p / 100))) for p in (50, 95)},
        "voice_p50_s": round(float(table.loc[table["task"] == "voice", "seconds"].median()), 1),
        "shares": shares.to_dict("records"),
    }
    record = {
        "profile": told,
        "machine": machine.describe(ROOT),
        "notebooks": {},
        "stages": {"tool": {"result": result}},
    }
    target = ROOT / "benchmarks" / "records" / "tool.json"
    target.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
