"""Answers per minute of this course's way of asking against the guide's loop, on the same held-out prompts.

    python benchmarks/answer_speed.py --out runs/quick                # a run with models/ made by notebooks 04 and 05
    python benchmarks/answer_speed.py --out runs/quick --prompts 8 --pairs 3

The guide loads the merged model with `pipeline("text-generation")` and asks one prompt after the other. The course asks
the Q8_0 file through llama.cpp, several at once. Both greedy, chat template, the profile's longest answer. They take
turns in processes of their own; loading is left out of both. Writes benchmarks/records/answer-speed.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SYSTEMS = ("guide", "course")


def prompts_of(run: Any, count: int) -> list[str]:
    from stakelib.evaluation import held_out

    return [row["prompt"] for row in held_out(run)[:count]]


def guide(run: Any, prompts: list[str]) -> dict[str, float]:
    """The guide's loop: one prompt at a time through transformers' pipeline, in 32 bits."""
    import torch
    from transformers import pipeline

    from stakelib.models import base_model

    merged = run.path("models", f"stakeholder-{base_model(run.profile.model).short_name}-merged")
    model = pipeline("text-generation", model=str(merged), dtype=torch.float32)
    start, tokens = time.perf_counter(), 0
    for prompt in prompts:
        said = model([{"role": "user", "content": prompt}], max_new_tokens=run.profile.max_new_tokens, do_sample=False)
        tokens += len(model.tokenizer(said[0]["generated_text"][-1]["content"])["input_ids"])
    return {"seconds": time.perf_counter() - start, "tokens": tokens}


def course(run: Any, prompts: list[str]) -> dict[str, float]:
    """All prompts at once to the file that ships."""
    from stakelib.export import gguf_file
    from stakelib.models import base_model, engine

    with engine(gguf_file(run, "q8"), base_model(run.profile.model).folder) as model:
        start = time.perf_counter()
        replies = dict(model.ask(prompts, max_new_tokens=run.profile.max_new_tokens))
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "tokens": sum(reply.new_tokens for reply in replies.values())}


def once(system: str, out: str, count: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--out", out, "--prompts", str(count), "--child", system]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="a run folder with an exported model")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--child", choices=SYSTEMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    from stakelib import machine
    from stakelib.run import Run

    told = json.loads((Path(given.out) / "run.json").read_text(encoding="utf-8"))["profile"]
    run = Run.open(given.out, told["name"], told["model"])
    if given.child:
        found = {"guide": guide, "course": course}[given.child](run, prompts_of(run, given.prompts))
        print(json.dumps(found))
        return
    times: dict[str, list[dict[str, float]]] = {system: [] for system in SYSTEMS}
    for pair in range(given.pairs):
        for system in SYSTEMS[:: 1 if pair % 2 else -1]:  # who goes first takes turns as well
            times[system].append(once(system, given.out, given.prompts))
            seconds, tokens = times[system][-1].values()
            print(f"{pair + 1}/{given.pairs} {system:<7} {seconds:7.1f} s {tokens:6.0f} tokens", flush=True)
    ratios = [g["seconds"] / c["seconds"] for g, c in zip(times["guide"], times["course"], strict=True)]
    record = {
        "model": run.profile.model,
        "prompts": given.prompts,
        "runs": times,
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "machine": machine.describe(ROOT),
    }
    print(f"the course answers {record['ratio']:.1f} times as fast (pairs: {', '.join(f'{r:.1f}' for r in ratios)})")
    target = ROOT / "benchmarks" / "records" / "answer-speed.json"
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
