"""LoRA with peft, driven by transformers' Trainer: row by row, logits at learned places only, safe checkpoints."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import SaveStrategy

from stakelib.models import Rendered, load_weights
from stakelib.run import CourseError, Progress
from stakelib.training.recipe import Recipe

COMPLETE = "complete.json"  # written last: a checkpoint without it was cut short and is not used


def collate(rows: list[Rendered]) -> dict[str, torch.Tensor]:
    """One row as tensors of shape [1, tokens]; label -100 marks what is not learned.

    Rows go through one at a time, none padded to the longest; on a CPU one row keeps the matrix units as busy as four
    (measured: 350 tokens/s alone, 260 packed by four, because attention grows with the square of the length).
    The end is padded to a multiple of 64, unseen by what stands before it and outside the loss: every new length would
    make the matrix library build and keep new routines (28 MB a row, 6 GB in a run of 355 rows).
    """
    (row,) = rows
    pad = -len(row.ids) % 64
    labels = [i if m else -100 for i, m in zip(row.ids, row.mask, strict=True)]
    ids = row.ids + row.ids[-1:] * pad
    return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels + [-100] * pad])}


def row_loss(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """(sum of the negative log-likelihood in nats, number) over the learned tokens; logits are made there only."""
    places = (batch["labels"][0] != -100).nonzero()[:, 0]
    # The adapter is kept in float32 and multiplied in bf16 beside a bf16 base: a fifth faster, same loss to 4 digits.
    half = torch.autocast(batch["labels"].device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)
    with half, disable_input_dtype_casting(model, active=half._enabled):
        logits = model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=places - 1).logits[0]
    wanted = batch["labels"][0, places]
    return torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum"), len(places)


class RowTrainer(Trainer):
    """transformers' Trainer with our loss, an exact validation mean, and rows in an order fixed by the seed."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # noqa: ANN001, ANN201
        total, count = row_loss(model, inputs)
        return total / (num_items_in_batch or count)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        self.model.eval()
        with torch.inference_mode():
            parts = [row_loss(self.model, self._prepare_inputs(b)) for b in self.get_eval_dataloader()]
        metrics = {"eval_loss": float(sum(t for t, _ in parts)) / sum(n for _, n in parts)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Watch(TrainerCallback):
    """Progress lines, a checkpoint every few minutes, a mark on complete checkpoints, and a stop on a broken loss."""

    def __init__(self, total: int, save_every_s: float = 180.0) -> None:
        self.progress, self.save_every_s = Progress("training", total, "steps", every=15), save_every_s
        self.saved, self.loss = time.monotonic(), float("nan")

    def on_train_begin(self, args, state, control, **_):  # noqa: ANN001, ANN003, ANN201
        self.progress.tick(state.global_step)

    def on_log(self, args, state, control, logs=None, **_):  # noqa: ANN001, ANN003, ANN201
        self.loss = (logs or {}).get("loss", self.loss)
        broken = [k for k in ("loss", "eval_loss") if k in (logs or {}) and not math.isfinite(logs[k])]
        if broken:
            raise CourseError(
                f"{broken[0]} is not a number at step {state.global_step}: training diverged",
                "lower learning_rate in the recipe (half of it) and run the notebook again",
            )
        if "eval_loss" in (logs or {}):
            print(f"validation loss {logs['eval_loss']:.3f} at step {state.global_step}", flush=True)

    def on_step_end(self, args, state, control, **_):  # noqa: ANN001, ANN003, ANN201
        self.progress.tick(state.global_step, f"loss {self.loss:.3f}" if math.isfinite(self.loss) else "")
        if time.monotonic() - self.saved > self.save_every_s:
            control.should_save = True
        return control

    def on_save(self, args, state, control, **_):  # noqa: ANN001, ANN003, ANN201
        self.saved = time.monotonic()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / COMPLETE).write_text(json.dumps({"step": state.global_step}), encoding="utf-8")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; those that were cut short are removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for broken in [c for c in found if not (c / COMPLETE).exists()]:
        shutil.rmtree(broken)
    return next((c for c in reversed(found) if c.exists()), None)


def train_peft(
    base: Path, recipe: Recipe, epochs: int, train: list[Rendered], valid: list[Rendered], checkpoints: Path
) -> tuple[Any, dict[str, Any]]:
    """Train LoRA on the model in folder `base`; go on from the last checkpoint if there is one.

    The recipe's precision and checkpointing are decided before (`settle`). Returns the peft model holding the best
    adapter by validation loss, and the result: history of training and validation loss (nats per learned token), best
    step, trainable parameters, learned tokens, rows per second.
    """
    set_seed(recipe.seed)
    model = load_weights(base, dtype=recipe.precision)
    model.config.use_cache = False
    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules=list(recipe.targets),
        bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(model, config)
    order = row_order(len(train), epochs, recipe.seed)
    steps = math.ceil(len(order) / recipe.accumulate)
    every = max(1, steps // (epochs * recipe.validate_per_epoch))
    trainer = RowTrainer(
        model=model,
        args=_arguments(recipe, checkpoints, steps, every),
        train_dataset=[train[i] for i in order],
        eval_dataset=valid,
        data_collator=collate,
        callbacks=[Watch(steps)],
    )
    trainer.remove_callback(PrinterCallback)
    resumed = last_checkpoint(checkpoints)
    if resumed:
        print(f"training: going on from {resumed.name} of {steps}", flush=True)
    started = time.monotonic()
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    return model, _result(trainer, model, train, order, steps, resumed, time.monotonic() - started, recipe.accumulate)


def row_order(rows: int, epochs: int, seed: int) -> list[int]:
    """Row numbers in the order of training: each epoch a new shuffle, the same for the same seed."""
    shuffle = random.Random(seed)
    return [i for _ in range(epochs) for i in shuffle.sample(range(rows), rows)]


def _arguments(recipe: Recipe, folder: Path, steps: int, every: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=1,
        per_device_eval_batch_size=1, gradient_accumulation_steps=recipe.accumulate,
        learning_rate=recipe.learning_rate, lr_scheduler_type=recipe.schedule,
        warmup_steps=math.ceil(recipe.warmup * steps), weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch",
        train_sampling_strategy="sequential", remove_unused_columns=False, dataloader_num_workers=0,
        logging_steps=max(1, min(5, every)), logging_nan_inf_filter=False, disable_tqdm=True, report_to="none",
        eval_strategy="steps", eval_steps=every, save_strategy=SaveStrategy.STEPS, save_steps=every, save_total_limit=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
        activation_checkpointing=recipe.checkpointing == "on", activation_checkpointing_kwargs={"use_reentrant": True},
        seed=recipe.seed, use_cpu=not torch.cuda.is_available(), label_names=["labels"],
    )  # fmt: skip


def _result(trainer, model, train, order, steps, resumed, seconds, per_step):  # noqa: ANN001, ANN202
    history = trainer.state.log_history
    done = steps - (int(resumed.name.split("-")[1]) if resumed else 0)
    return {
        "train_loss": [[h["step"], h["loss"]] for h in history if "loss" in h],
        "valid_loss": [[h["step"], h["eval_loss"]] for h in history if "eval_loss" in h],
        "best_step": trainer.state.best_global_step,
        "best_valid_loss": trainer.state.best_metric,
        "steps": steps,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "learned_tokens": sum(sum(train[i].mask) for i in order),
        "all_tokens": sum(len(train[i].ids) for i in order),
        "rows_per_second": round(done * per_step / max(seconds, 1e-9), 2),
        "resumed_at": int(resumed.name.split("-")[1]) if resumed else 0,
    }
