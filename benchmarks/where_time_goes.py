"""What share of the machine's measured matmul peak a training step reaches, and where the rest of the time goes.

    python benchmarks/where_time_goes.py                       # SmolLM2
    python benchmarks/where_time_goes.py --model gemma-3-270m

Floating-point operations are counted by torch (matrix products and attention, forward and backward), the peak is that
of square products in the precision of the run. Set the three variables of train_speed.AVX2 to see an older processor.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

from train_speed import ROOT, instructions, rows_of

KINDS = {  # the first kind whose word is in the operation's name
    "attention": ("scaled_dot_product", "flash_attention"),
    "matrix products": ("mm", "linear", "mkldnn"),
    "optimizer": ("Optimizer", "adam", "foreach", "lerp", "addcdiv", "addcmul", "linalg_vector_norm"),
    "copies and casts": ("copy_", "to_copy", "cat", "contiguous", "clone", "index", "gather", "fill", "zero"),
}


def kind_of(operation: str) -> str:
    """Which part of a step an ATen operation belongs to; norms, rotary positions and activations are the rest."""
    return next((kind for kind, words in KINDS.items() if any(w in operation for w in words)), "element by element")


def attention_flops() -> dict[Any, Any]:
    """Formulas for the processor's attention, which torch does not count by itself; the whole square, as it does."""
    import torch
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    ops = torch.ops.aten

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    return {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def measure(model: str, rows: int) -> dict[str, Any]:
    """Steps of the course's recipe, one row each: seconds, operations, share of the peak, share of time by kind."""
    import torch
    from peft import get_peft_model
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode

    from stakelib import machine
    from stakelib.models import base_model, load_weights
    from stakelib.models.engines import quiet
    from stakelib.training import RECIPES, peft_backend

    quiet()
    recipe = RECIPES["course"]
    train, _ = rows_of(model, 2 * rows + 2)
    net = load_weights(base_model(model).folder)
    net = get_peft_model(net, peft_backend.lora_config(recipe, net.config))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], recipe.learning_rate, fused=True)
    multiple = 64 if net.dtype == torch.bfloat16 else 1
    spent = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}

    def step(row: Any) -> None:
        at = [time.perf_counter()]
        total, count = peft_backend.row_loss(net, peft_backend.collate([row], multiple))
        at.append(time.perf_counter())
        (total / count).backward()
        at.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        at.append(time.perf_counter())
        for i, part in enumerate(spent):
            spent[part] += at[i + 1] - at[i]

    for row in train[:2]:
        step(row)
    spent.update(dict.fromkeys(spent, 0.0))
    for row in train[2 : rows + 2]:
        step(row)
    seconds = {part: value / rows for part, value in spent.items()}
    with FlopCounterMode(display=False, custom_mapping=attention_flops()) as counter:
        for row in train[2 : rows + 2]:
            step(row)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for row in train[2 : rows + 2]:
            step(row)
    kinds: dict[str, float] = {}
    for event in profiler.key_averages():
        kinds[kind_of(event.key)] = kinds.get(kind_of(event.key), 0) + event.self_cpu_time_total
    dtype = str(net.dtype).removeprefix("torch.")
    peak = max(machine.matmul_gflops(dtype, size) for size in (768, 2048))
    reached = counter.get_total_flops() / rows / sum(seconds.values()) / 1e9
    return {
        "model": model,
        "dtype": dtype,
        "tokens_per_row": sum(len(r.ids) for r in train[2 : rows + 2]) / rows,
        "seconds_per_row": seconds,
        "gflop_per_row": counter.get_total_flops() / rows / 1e9,
        "gflops_reached": reached,
        "gflops_peak": peak,
        "share_of_peak": reached / peak,
        "share_of_time": {k: v / sum(kinds.values()) for k, v in sorted(kinds.items(), key=lambda i: -i[1])},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=6)
    wanted = parser.parse_args()
    found = measure(wanted.model, wanted.rows)
    print(json.dumps(found, indent=1))
    kind = instructions(os.environ.get("ATEN_CPU_CAPABILITY") == "avx2")
    file = ROOT / "benchmarks" / "records" / f"where-{wanted.model}-{kind}.json"
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
