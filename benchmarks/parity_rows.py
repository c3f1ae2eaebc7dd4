"""The proof of notebook 05 on fifty held-out rows instead of eight: is each file still the model that was trained?

    python benchmarks/parity_rows.py --out runs/quick           # after notebooks 01, 04 and 05; ten minutes and more
    python benchmarks/parity_rows.py --out runs/quick-gemma-3-270m

Works on a copy, so that the run's own proof stays. Raises where notebook 05 would. Prints the table and writes
benchmarks/records/parity-<model>.json, with what training and export told.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def shares(proof: dict[str, Any]) -> dict[str, dict[str, float]]:
    """For each GGUF, against the merged model: `more_percent` nats per token, `top_percent` equal likeliest tokens."""
    hops = {name: hop for name, hop in proof["hops"].items() if name in proof["engine"]}
    merged = proof["hops"]["merged"]["nll"]
    return {
        "more_percent": {name: 100 * (hop["nll"] / merged - 1) for name, hop in hops.items()},
        "top_percent": {name: 100 * hop["top"] for name, hop in hops.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="a run folder with an exported model")
    parser.add_argument("--rows", type=int, default=50)
    parser.add_argument("--prompts", type=int, default=10, help="of these rows, asked in llama.cpp as well")
    given = parser.parse_args()
    from stakelib import machine
    from stakelib.export import parity, table
    from stakelib.models import base_model, load_tokenizer, render
    from stakelib.run import Run
    from stakelib.training import adapter_folder, load_rows

    done = json.loads((given.out / "run.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(dir=given.out.parent) as folder:
        copy = Path(folder) / "run"
        for name in ("models", "training_data"):
            shutil.copytree(given.out / name, copy / name)
        for name in ("run.json", "Modelfile"):
            shutil.copyfile(given.out / name, copy / name)
        run = Run.open(copy, done["profile"]["name"], done["profile"]["model"])
        base = base_model(run.profile.model)
        tokenizer = load_tokenizer(base.folder)
        rows = load_rows(run.path("training_data", "test.jsonl"))
        chosen = rows[:: max(1, len(rows) // given.rows)][: given.rows]
        sample = [render(tokenizer, r["prompt"], r["completion"]) for r in chosen]
        prompts = [r["prompt"] for r in chosen[:: max(1, len(chosen) // given.prompts)][: given.prompts]]
        proof = parity(run, adapter_folder(run), sample, prompts)
    print(f"{base.name}, {proof['rows']} rows, {proof['prompts']} prompts")
    print(table(proof).to_string())
    stages = {"parity": {"result": proof | shares(proof)}}
    for name in ("train", "export"):
        stages[name] = {k: done["stages"][name][k] for k in ("seconds", "peak_mb", "result")}
    record = {"profile": done["profile"], "machine": machine.describe(ROOT), "notebooks": {}, "stages": stages}
    target = ROOT / "benchmarks" / "records" / f"parity-{base.name}.json"
    target.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
