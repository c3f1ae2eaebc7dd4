"""Peak memory and seconds of folder -> GGUF f16 -> Q8_0, for a model of a named shape with random weights.

    python benchmarks/export_memory.py gemma-2b --cap-gb 8          (needs 13 GB of disk)
    python benchmarks/export_memory.py smollm2-135m --kinds Q8_0,Q4_0

The shape is one of stakelib/models/shapes.yaml; its weights are random bfloat16 numbers in one file a layer, kept in
runs/random-<shape>; the tiny model's words are enough for the converter, which pads them. The work is done in a process
of its own, under a hard cap (a memory cgroup: root on Linux) that counts the converter and mapped pages too.
Peak: anonymous memory, which the system cannot drop, of that process and its children together, twenty times a second.
Prints a line a step and writes benchmarks/records/export.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
RECORD = ROOT / "benchmarks" / "records" / "export.json"
WORDS = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def anonymous_gb() -> float:
    """Anonymous memory of this process and of all its children (GB)."""
    import psutil

    total, me = 0.0, psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            status = Path(f"/proc/{process.pid}/status")
            if status.exists():
                line = next(x for x in status.read_text(encoding="utf-8").splitlines() if x.startswith("RssAnon"))
                total += int(line.split()[1]) / 2**20
            else:
                total += process.memory_full_info().uss / 2**30
        except (psutil.Error, OSError, StopIteration):  # it has just ended
            continue
    return total


class Watch:
    """Peak of `anonymous_gb` and seconds while the block runs."""

    def __enter__(self) -> Watch:
        self.peak_gb, self.start, self.done = anonymous_gb(), time.perf_counter(), threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.done.wait(0.05):
            self.peak_gb = max(self.peak_gb, anonymous_gb())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()
        self.seconds = time.perf_counter() - self.start


def folder_of(shape: str) -> Path:
    """A model folder that the converter accepts: random weights of the shape, the tiny model's words."""
    from benchmarks.shapes import random_model
    from stakelib.models import base_model, config_of

    folder = random_model(shape, ROOT / "runs" / f"random-{shape}", "bfloat16")
    tiny = base_model("tiny-gemma").folder
    for name in WORDS:
        if (tiny / name).exists():
            shutil.copyfile(tiny / name, folder / name)
    from transformers import AutoModelForCausalLM

    kind = AutoModelForCausalLM._model_mapping[type(config_of(shape))].__name__
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "architectures": [kind]}), encoding="utf-8")
    return folder


def work(folder: Path, kinds: list[str]) -> dict[str, Any]:
    """Convert and quantise in this process; each step's peak memory, seconds and bytes."""
    from stakelib.export import quantise, to_gguf

    found, f16 = {}, folder.with_name(f"{folder.name}-f16.gguf")
    for kind in ("f16", *kinds):
        target = folder.with_name(f"{folder.name}-{kind.lower()}.gguf")
        with Watch() as watch:
            to_gguf(folder, target) if kind == "f16" else quantise(f16, target, kind)
        found[kind] = {
            "peak_gb": round(watch.peak_gb, 2),
            "seconds": round(watch.seconds, 1),
            "gb": round(target.stat().st_size / 1e9, 2),
        }
        print(f"{kind}: {found[kind]}", file=sys.stderr, flush=True)
    if found["f16"]["gb"] < 1.9 * weights_of(folder) / 1e9:
        raise SystemExit("the converter left weights out")
    for kind in found:
        folder.with_name(f"{folder.name}-{kind.lower()}.gguf").unlink()
    return found


def run_shape(shape: str, kinds: list[str], cap_gb: float | None) -> dict[str, Any]:
    """One shape in a process of its own, capped where this system can; `ended` says how it went."""
    from benchmarks.memory import cap_group
    from stakelib.export import converter

    folder, group = folder_of(shape), cap_group(cap_gb) if cap_gb else None
    converter()  # installed before the clock runs
    order = json.dumps({"folder": str(folder), "kinds": kinds, "group": str(group) if group else None})
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__, "--child", order], env=env, stdout=subprocess.PIPE, encoding="utf-8"
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if group:
        group.rmdir()
    return {
        "shape": shape,
        "parameters_m": round(weights_of(folder) / 1e6, 1),
        "steps": json.loads(lines[-1]) if lines else {},
        "cap": f"{cap_gb} GB, cgroup" if group else "no cap",
        "ended": "well" if done.returncode == 0 else f"code {done.returncode}",
    }


def weights_of(folder: Path) -> int:
    import math

    from stakelib.models.adapters import shapes

    return sum(math.prod(size) for size in shapes(folder).values())


def child(order: dict[str, Any]) -> None:
    if order["group"]:
        (Path(order["group"]) / "cgroup.procs").write_text(str(os.getpid()), encoding="utf-8")
    print(json.dumps(work(Path(order["folder"]), order["kinds"])), flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", help="names of stakelib/models/shapes.yaml")
    parser.add_argument("--kinds", default="Q8_0", help="quantisations after f16, with commas between")
    parser.add_argument("--cap-gb", type=float)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(json.loads(options.child))
        return 0
    from stakelib import machine

    kept = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else []
    for shape in options.shapes:
        found = {**run_shape(shape, options.kinds.split(","), options.cap_gb), "machine": machine.describe(ROOT)}
        print(json.dumps(found), flush=True)
        kept = [k for k in kept if (k["shape"], k["cap"]) != (found["shape"], found["cap"])] + [found]
        RECORD.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
