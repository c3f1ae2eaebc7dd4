"""Rows per second and memory of the course's training against the guide's recipe through transformers' plain Trainer.

    python benchmarks/train_speed.py                           # SmolLM2, what this processor can do
    python benchmarks/train_speed.py --model gemma-3-270m
    python benchmarks/train_speed.py --avx2                    # as on a processor without AVX-512 and AMX
    python benchmarks/train_speed.py --loss --rows 96          # validation loss after the same rows, three recipes
    python benchmarks/train_speed.py --compile --rows 48       # the course's way with torch.compile, against without

Every measurement is a process of its own, and they take turns, the first of a pair in turn too, so that a slow minute
of the machine hits both. All learn the same rows in the same order, and the same ones are timed. The figure is the
median of the pairs' ratios; a step's time leaves loading and validation out. Writes benchmarks/records/*.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
SYSTEMS = ("guide", "course", "guide-tuned", "compiled")  # the third: the guide's way with our rate and targets
WARM_UP = 8  # rows that are trained but not timed: routines are made for each new length


def rows_of(model: str, count: int) -> tuple[list[Any], list[Any]]:
    """`count` training and 24 validation rows of the course's own data, rendered."""
    from stakelib.dialogues import build, split
    from stakelib.models import base_model, load_tokenizer, render
    from stakelib.scenarios import sample

    tokenizer = load_tokenizer(base_model(model).folder)
    rows = split(build(sample(60, 7), seed=7), 7)
    parts = {p: [r for r in rows if r.split == p] for p in ("train", "valid")}
    every = len(parts["train"]) / count  # all nine stakeholders, not the first rows of the file
    chosen = [parts["train"][int(i * every)] for i in range(count)]
    valid = parts["valid"][:: max(1, len(parts["valid"]) // 24)][:24]
    return tuple([render(tokenizer, r.prompt, r.completion) for r in part] for part in (chosen, valid))


def clock_of(base: type) -> type:
    """A Trainer callback that notes how long each optimizer step took (s)."""

    class Clock(base):  # type: ignore[misc, valid-type]
        seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **more: Any) -> Any:
            self.seconds.append(time.perf_counter() - self.start)
            return super().on_step_end(*args, **more)

    return Clock


def guide(model: str, train: list[Any], folder: Path, tuned: bool) -> tuple[Any, list[float], int]:
    """The guide's recipe as far as it runs: float32, batches of 2 padded, 4 accumulated, loss on all tokens."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from stakelib.models import base_model
    from stakelib.training.keep import row_order
    from stakelib.training.recipe import ALL_LINEAR, ATTENTION, Recipe, rate_for

    net = AutoModelForCausalLM.from_pretrained(base_model(model).folder, dtype=torch.float32)
    targets, rate = (ALL_LINEAR, rate_for(net.config, Recipe())) if tuned else (ATTENTION, 2e-5)
    net = get_peft_model(
        net,
        LoraConfig(
            r=16, lora_alpha=32, target_modules=list(targets), lora_dropout=0.05, bias="none", task_type="CAUSAL_LM"
        ),
    )

    def pad(rows: list[Any]) -> dict[str, torch.Tensor]:
        width = max(len(r.ids) for r in rows)
        ids = torch.tensor([r.ids + [0] * (width - len(r.ids)) for r in rows])
        real = torch.tensor([[1] * len(r.ids) + [0] * (width - len(r.ids)) for r in rows])
        return {"input_ids": ids, "attention_mask": real, "labels": ids.masked_fill(real == 0, -100)}

    clock = clock_of(TrainerCallback)()
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=rate,
        optim="adamw_torch",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        seed=7,
    )
    ordered = [train[i] for i in row_order(len(train), 1, Recipe().seed)]
    Trainer(net, arguments, train_dataset=ordered, data_collator=pad, callbacks=[clock]).train()
    return net, clock.seconds, 8


def course(
    model: str, train: list[Any], valid: list[Any], folder: Path, compiled: bool = False
) -> tuple[Any, list[float], int]:
    """The course's own back-end and recipe, one validation at the end; `compiled`: each layer by torch.compile.

    Layer by layer is the form that costs least: all layers share one compilation for each new length.
    """
    from stakelib import machine
    from stakelib.models import base_model
    from stakelib.training import RECIPES, peft_backend

    plain = peft_backend.get_peft_model

    def with_compiled_layers(*args: Any, **more: Any) -> Any:
        net = plain(*args, **more)
        for layer in net.get_base_model().model.layers:
            layer.compile()
        return net

    peft_backend.get_peft_model = with_compiled_layers if compiled else plain
    peft_backend.Watch = clock = clock_of(peft_backend.Watch)
    recipe = replace(RECIPES["course"], validate_per_epoch=1, precision=machine.precision()[0])
    net, _ = peft_backend.train_peft(base_model(model).folder, recipe, 1, train, valid[:1], folder)
    return net, clock.seconds, recipe.accumulate


def measure(system: str, model: str, count: int, loss: bool) -> dict[str, Any]:
    """One training in this process: rows per second, peak memory (GB), and the validation loss if wanted."""
    import torch

    from stakelib import machine
    from stakelib.models.engines import quiet
    from stakelib.run import PeakMemory
    from stakelib.training import peft_backend

    quiet()
    train, valid = rows_of(model, count)
    before = machine.matmul_gflops("float32"), machine.matmul_gflops("bfloat16")
    with PeakMemory() as memory, tempfile.TemporaryDirectory() as folder:
        if system in ("course", "compiled"):
            net, seconds, per_step = course(model, train, valid, Path(folder), system == "compiled")
        else:
            net, seconds, per_step = guide(model, train, Path(folder), system == "guide-tuned")
    timed = seconds[WARM_UP // per_step :]
    found = {
        "rows_per_s": len(timed) * per_step / sum(timed),
        "all_s": sum(seconds),
        "peak_gb": memory.peak_mb / 1024,
        "fp32_gflops": before[0],
        "bf16_gflops": before[1],
        "tokens_per_row": sum(len(r.ids) for r in train) / len(train),
    }
    if loss:
        net.eval()
        with torch.inference_mode():
            parts = [peft_backend.row_loss(net, peft_backend.collate([r])) for r in valid]
        found["valid_loss"] = float(sum(t for t, _ in parts)) / sum(n for _, n in parts)
    return found


def instructions(capped: bool) -> str:
    """What the matrix products used: "amx", "bf16" (AVX512-BF16) or "avx2"; where Linux does not tell, "all"."""
    file = Path("/proc/cpuinfo")
    flags = file.read_text(encoding="utf-8") if file.exists() and not capped else ""
    known = (("amx_bf16", "amx"), ("avx512_bf16", "bf16"), ("avx2", "avx2"))
    return "avx2" if capped else next((name for flag, name in known if flag in flags), "all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=24, help="rows of one measurement")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--avx2", action="store_true", help="cap the instruction set")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--loss", action="store_true", help="one training each, with the validation loss")
    kinds.add_argument("--compile", action="store_true", help="torch.compile against none, instead of the guide")
    parser.add_argument("--one", choices=SYSTEMS, help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.one:
        print("\n" + json.dumps(measure(wanted.one, wanted.model, wanted.rows, wanted.loss)))
        return
    from stakelib import machine
    from stakelib.training import RECIPES

    other = "compiled" if wanted.compile else "guide"
    systems, turns = (SYSTEMS[:3], 1) if wanted.loss else ((other, "course"), wanted.pairs)
    command = [sys.executable, __file__, "--model", wanted.model, "--rows", str(wanted.rows), *["--loss"] * wanted.loss]
    found: dict[str, list[dict[str, float]]] = {s: [] for s in systems}
    for turn in range(turns):
        for system in systems[:: -1 if turn % 2 else 1]:
            done = subprocess.run(
                [*command, "--one", system],
                env={**os.environ, **(AVX2 if wanted.avx2 else {})},
                capture_output=True,
                encoding="utf-8",
            )
            if done.returncode:
                raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
            found[system].append(json.loads(done.stdout.strip().split("\n")[-1]))
            print(turn + 1, system, {k: round(v, 3) for k, v in found[system][-1].items()}, flush=True)
    ratios = [a["rows_per_s"] / b["rows_per_s"] for a, b in zip(found["course"], found[other], strict=True)]
    ratio = statistics.median(ratios)
    print(
        f"{wanted.model}{' capped at AVX2' if wanted.avx2 else ''}: {ratio:.2f} times the rows a second of {other} "
        f"(pairs: {', '.join(f'{r:.2f}' for r in ratios)})"
    )
    what = "loss" if wanted.loss else "compile" if wanted.compile else "speed"
    name = f"train-{what}-{wanted.model}{f'-{instructions(wanted.avx2)}' if what == 'speed' else ''}.json"
    file = ROOT / "benchmarks" / "records" / name
    about = {"rows": wanted.rows, "processor": machine.describe()["processor"], "alpha": RECIPES["course"].alpha}
    file.write_text(
        json.dumps({**about, "ratio": round(ratio, 3), "ratios": ratios, "runs": found}, indent=1) + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
