"""What a training needs, said before it starts: memory by formula, time by one short real step on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from stakelib import machine as computer
from stakelib.models import MODELS, Rendered, config_of, find_model
from stakelib.run import CourseError, clock
from stakelib.training.recipe import Recipe, adapter_parameters, layer_numbers, matrices

FULL = "full"  # the guide's second option, every weight learned in float32: planned for, never run here
PACKED_BYTES = {"int8": 1.0, "nf4": 0.5 + 4 / 64}  # nf4: 4 bits, and a float32 scale for every 64 numbers
PROGRAM_GB = 0.4  # Python, torch, transformers and peft, before a weight is there (measured)
NIGHT_H = 10.0


def padded(tokens: int) -> int:
    """The length that goes through the model: the next multiple of 64."""
    return -(-tokens // 64) * 64


def memory(config: Any, recipe: Recipe, tokens: int, learned: int) -> dict[str, float]:
    """Peak memory (GB, by part) of training one row of `tokens` ids of which `learned` are learned.

    weights: numbers x bytes; what lies on disk in the format of training stays in the file ("mapped": no part of the
    peak, but read again and again, so it must fit too). adapter: weight, gradient and AdamW's two moments in float32,
    16 bytes a number (Rajbhandari et al. 2020, arXiv 1910.02054, 3.1), and a bf16 copy beside a bf16 base.
    activations: what the way back needs, see `kept_bytes`; with checkpointing only the input of each layer, and one
    layer in full at a time (Chen et al. 2016, arXiv 1604.06174). passing: the larger of the loss, whose logits, their
    logarithm and its gradient are vocabulary x learned tokens x 4 bytes each, and the gradients inside one layer.
    """
    fast = {FULL: "float32", **dict.fromkeys(("auto", *PACKED_BYTES), computer.precision()[0])}.get(
        recipe.precision, recipe.precision
    )
    size, places, layers = (2 if fast == "bfloat16" else 4), padded(tokens), config.num_hidden_layers
    words = config.vocab_size * config.hidden_size
    numbers = layers * sum(a * b for a, b in matrices(config).values())
    packed = PACKED_BYTES.get(recipe.precision)
    same = fast == str(config.dtype).removeprefix("torch.") and recipe.precision != FULL
    mapped = size * (words + (0 if packed else numbers)) if same else 0
    weights = (packed or size) * numbers + size * words - mapped
    learning = 16 * adapter_parameters(config, recipe) if recipe.precision != FULL else 12 * (words + numbers)
    layer = kept_bytes(config, recipe, places, size)
    inside = places * size * 5 * config.intermediate_size
    learn = len(layer_numbers(config, recipe)) if recipe.precision != FULL else layers  # those below keep nothing
    if recipe.checkpointing == "on":
        kept, inside = learn * places * size * config.hidden_size, layer + inside
    else:
        kept = learn * layer
    logits = 12 * config.vocab_size * learned
    parts = {"program": PROGRAM_GB * 2**30, "weights": weights, "adapter": learning, "activations": kept,
             "passing": max(logits, inside), "mapped": mapped}  # fmt: skip
    return {name: amount / 2**30 for name, amount in parts.items()}


def kept_bytes(config: Any, recipe: Recipe, places: int, size: int) -> float:
    """Bytes that one frozen layer with LoRA keeps for the way back, `size` bytes a number (count of saved tensors).

    What enters a norm, in float32; each thin product; queries, keys, values and the attention's output; four of the
    inner width (gate, its activation, up, their product). Attention that caps its scores (Gemma 2) keeps them all.
    """
    sizes = matrices(config)
    queries, keys = sizes["q_proj"][1], sizes["k_proj"][1]
    gemma = config.model_type in ("gemma2", "gemma3_text")
    normed = (4 if gemma else 2) * config.hidden_size + (queries + keys) * (config.model_type == "gemma3_text")
    own = 2 * config.hidden_size + 4 * config.intermediate_size + 7 * recipe.rank + 2 * queries + 2 * keys
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    scores = config.num_attention_heads * places * 8 + size * 2 * (queries - keys) if capped else 0
    mask = size * places if places > (getattr(config, "sliding_window", None) or places) and not capped else 0
    return places * (4 * normed + size * own + scores + mask)


def need_gb(model: str, recipe: Recipe, data: Sequence[Rendered]) -> float:
    """All memory (GB) that training `model` on the longest of these rows needs free, mapped weights included."""
    longest = max(len(r.ids) for r in data), max(sum(r.mask) for r in data)
    return sum(memory(config_of(model), recipe, *longest).values())


def settle(model: str, recipe: Recipe, data: Sequence[Rendered], free_gb: float) -> tuple[Recipe, str]:
    """The recipe with precision and checkpointing decided, and why. Raises CourseError if it cannot fit `free_gb`."""
    precision, why = computer.precision() if recipe.precision == "auto" else (recipe.precision, "chosen in the recipe")
    ways = ("off", "on") if recipe.checkpointing == "auto" else (recipe.checkpointing,)
    for way in (replace(recipe, precision=precision, checkpointing=c) for c in ways):
        needed_gb = need_gb(model, way, data)
        if needed_gb <= free_gb:
            return way, why
    others = [(model, p) for p in PACKED_BYTES] + [(m, precision) for m in MODELS]
    fits = [
        f"{name} with precision '{p}' ({gb:.1f} GB)"
        for name, p in others
        if (gb := need_gb(name, replace(recipe, precision=p, checkpointing="on"), data)) <= free_gb
    ]
    raise CourseError(
        f"memory: {model} in {precision}, rows of up to {max(len(r.ids) for r in data)} tokens, checkpointing "
        f"{way.checkpointing}: {needed_gb:.1f} GB needed, {free_gb} GB free",
        "set checkpointing='on' in the recipe and take " + " or ".join(fits[:3]) if fits else "close other programs",
    )


@dataclass(frozen=True)
class Plan:
    """What a run will need, what every other model would need, and what is best taken."""

    recipe: Recipe  # with precision and checkpointing decided
    why: str  # this precision
    parts_gb: dict[str, float]  # see `memory`
    hours: float
    table: Any  # pandas: one line for each model and precision
    choice: dict[str, Any]  # the line that is advised; {} if nothing fits into a night
    advice: str

    @property
    def peak_gb(self) -> float:
        """Anonymous memory at its highest."""
        return sum(self.parts_gb.values()) - self.parts_gb["mapped"]


def plan(
    model: str,
    recipe: Recipe,
    data: Sequence[Rendered],
    machine: dict[str, Any] | None = None,
    *,
    valid: Sequence[Rendered] = (),
    epochs: int = 1,
    models: Sequence[str] = tuple(MODELS),
) -> Plan:
    """Peak memory and wall time of training `model` on `data` on this machine, and a table of what else would fit.

    `machine`: as `machine.describe()` gives it; its `ram_free_gb` decides what fits. `models`: lines of the table; each
    that fits costs a probe of some seconds. Loads no weights. Raises CourseError if the run cannot fit.
    """
    import pandas

    free_gb = (machine or computer.describe())["ram_free_gb"]
    chosen, why = settle(model, recipe, data, free_gb)
    kinds = [computer.precision()[0], *(PACKED_BYTES if find_spec("bitsandbytes") else ()), FULL]
    lines = [_line(m, replace(recipe, precision=k), data, valid, epochs, free_gb) for m in models for k in kinds]
    tonight = [x for x in lines if x["hours"] is not None and x["hours"] <= NIGHT_H]
    choice = max(tonight, key=lambda x: (x["million"], -x["hours"]), default={})
    advice = "nothing of this list is done in a night" if not choice else (
        f"{choice['model']} in {choice['precision']}: the largest that fits into {free_gb} GB of free memory and is "
        f"done in a night (about {clock(3600 * choice['hours'])})"
    )  # fmt: skip
    longest = max(len(r.ids) for r in data), max(sum(r.mask) for r in data)
    parts_gb = memory(config_of(model), chosen, *longest)
    time_h = hours(model, chosen, data, valid, epochs)
    return Plan(chosen, why, parts_gb, time_h, pandas.DataFrame(lines), choice, advice)


def _line(
    model: str, recipe: Recipe, data: Sequence[Rendered], valid: Sequence[Rendered], epochs: int, free_gb: float
) -> dict[str, Any]:
    """One line of the table: checkpointing only where the longest row needs it; no hours for what does not fit."""
    needs = {c: need_gb(model, replace(recipe, checkpointing=c), data) for c in ("off", "on")}
    way = replace(recipe, checkpointing="off" if needs["off"] <= free_gb else "on")
    fits = needs[way.checkpointing] <= free_gb
    share = max(sum(r.mask) for r in data) / max(len(r.ids) for r in data)
    lengths = {f"{n} tokens, GB": memory(config_of(model), way, n, int(n * share)) for n in (512, 1024, 1536)}
    timed = fits and recipe.precision != FULL
    return {
        "model": model, "million": find_model(model).parameters_m, "precision": recipe.precision,
        "checkpointing": way.checkpointing, **{n: round(sum(p.values()), 1) for n, p in lengths.items()}, "fits": fits,
        "hours": hours(model, way, data, valid, epochs) if timed else None,
    }  # fmt: skip


def hours(model: str, recipe: Recipe, data: Sequence[Rendered], valid: Sequence[Rendered], epochs: int) -> float:
    """Wall time of the training: a layer and the output layer are run for real on a row of middle length.

    Longer rows cost as their products do: matrices x tokens, attention x tokens squared (Kaplan et al. 2020, arXiv
    2001.08361, table 1); the output layer works on learned tokens only.
    """
    config = config_of(model)
    middle = sorted(data, key=lambda r: len(r.ids))[len(data) // 2]
    tokens, learned = padded(len(middle.ids)), sum(middle.mask)
    probed = _probe(model, recipe.precision, recipe.checkpointing, recipe.rank, recipe.targets, tokens, learned)
    sizes = matrices(config)

    def cost(row: Rendered) -> float:
        n = padded(len(row.ids))
        return n * (sum(a * b for a, b in sizes.values()) + 2 * n * sizes["q_proj"][1])

    def seconds(rows: Sequence[Rendered], layers_s: float, output_s: float) -> float:
        return sum(map(cost, rows)) / cost(middle) * layers_s + sum(sum(r.mask) for r in rows) / learned * output_s

    every, learn = config.num_hidden_layers, len(layer_numbers(config, recipe))
    forward_s = probed["layer_forward_s"]
    step = seconds(data, learn * probed["layer_s"] + (every - learn) * forward_s, probed["output_s"])
    looks = recipe.validate_per_epoch * seconds(valid, every * forward_s, probed["output_forward_s"])
    return epochs * (step + looks) / 3600


@cache
def _probe(
    model: str, precision: str, checkpointing: str, rank: int, targets: tuple[str, ...], tokens: int, learned: int
) -> dict[str, float]:
    """Seconds of one layer and of the output layer with the loss, forward alone and there and back.

    A model of no layer and one of one layer are made with random weights and an eighth of the vocabulary, written to a
    folder and loaded as training would load them.
    """
    import torch

    from stakelib.models.engines import load_weights, quiet
    from stakelib.training.peft_backend import LoraConfig, collate, get_peft_model

    quiet()
    row, times = collate([Rendered([5] * tokens, [0] * (tokens - learned) + [1] * learned)]), []
    for layers in (0, 1):  # Windows keeps mapped files; a training after the plan must draw the same random numbers
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder, torch.random.fork_rng(devices=[]):
            _write_random(config_of(model), layers, Path(folder))
            net = load_weights(Path(folder), dtype=precision).train()
            if layers:
                net = get_peft_model(net, LoraConfig(r=rank, target_modules=list(targets), task_type="CAUSAL_LM"))
            if checkpointing == "on":
                net.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            net.enable_input_require_grads()
            times.append(_time(net, row))
    (out_forward, out), (forward, step) = times
    return {"layer_s": step - out, "layer_forward_s": forward - out_forward, "output_s": 8 * out,
            "output_forward_s": 8 * out_forward}  # fmt: skip


def _write_random(config: Any, layers: int, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = config.to_dict() | {"num_hidden_layers": layers, "vocab_size": config.vocab_size // 8}
    kinds = getattr(config, "layer_types", None)
    values |= {"layer_types": kinds[:layers]} if kinds else {}
    values |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=config.dtype).save_pretrained(folder)


def _time(net: Any, row: dict[str, Any]) -> tuple[float, float]:
    """(forward, forward and back) of one row in seconds: medians of at least two tries after a first."""
    from stakelib.training.peft_backend import row_loss

    tries: list[tuple[float, float]] = []
    while len(tries) < 3 or sum(t for _, t in tries) < 0.5:
        start = perf_counter()
        total, count = row_loss(net, row)
        forward = perf_counter() - start
        (total / count).backward()
        tries.append((forward, perf_counter() - start))
    return median(f for f, _ in tries[1:]), median(t for _, t in tries[1:])
