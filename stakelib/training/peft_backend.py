"""LoRA with peft, driven by transformers' Trainer: row by row, logits at learned places only, safe checkpoints."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import SaveStrategy

from stakelib.models import Rendered, load_weights
from stakelib.run import CourseError, Progress, atomic_write_json, is_main, move, sha256, writing
from stakelib.training import keep
from stakelib.training.recipe import Recipe, layer_numbers, rate_for


def collate(rows: list[Rendered], multiple: int = 64) -> dict[str, torch.Tensor]:
    """One row as tensors of shape [1, tokens]; label -100 marks what is not learned.

    Rows go through one at a time, none padded to the longest; on a CPU one row keeps the matrix units as busy as four
    (measured: 350 tokens/s alone, 260 packed by four, because attention grows with the square of the length).
    The end is padded to a multiple of 64, unseen by what stands before it and outside the loss: in bfloat16 every new
    length would make the matrix library build and keep new routines (28 MB a row, 6 GB in a run of 355 rows).
    """
    (row,) = rows
    pad = -len(row.ids) % multiple
    labels = [i if m else -100 for i, m in zip(row.ids, row.mask, strict=True)]
    ids = row.ids + row.ids[-1:] * pad
    return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels + [-100] * pad])}


def row_loss(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """(sum of the negative log-likelihood in nats, number) over the learned tokens; logits are made there only."""
    places = (batch["labels"][0] != -100).nonzero()[:, 0]
    # The adapter is kept in float32 and multiplied in bf16 beside a bf16 base: a fifth faster, same loss to 4 digits.
    own = extract_model_from_parallel(model)  # accelerate wraps it where several processes train
    half = torch.autocast(batch["labels"].device.type, torch.bfloat16, enabled=own.dtype == torch.bfloat16)
    learned = len(places)
    if half._enabled:  # as in `collate`: a new count of places would leave routines behind too
        places = torch.cat([places, places[-1:].expand(-learned % 64)])
    with half, disable_input_dtype_casting(own, active=half._enabled):
        logits = model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=places - 1).logits[0]
    wanted = batch["labels"][0, places]
    wanted[learned:] = -100
    return torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum"), learned


class RowTrainer(Trainer):
    """transformers' Trainer with our loss, an exact validation mean, and checkpoints that are whole or not there."""

    part: Path | None = None  # where a checkpoint is being written

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # noqa: ANN001, ANN201
        total, count = row_loss(model, inputs)
        return total * self.args.world_size / (num_items_in_batch or count)  # of all processes, which take the mean

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        self.model.eval()
        own = self.eval_dataset[self.args.process_index :: self.args.world_size]
        if is_main():
            print(f"training: validating on {len(self.eval_dataset)} rows, not counted in the time left", flush=True)
        with torch.inference_mode():
            parts = [row_loss(self.model, self._prepare_inputs(self.data_collator([row]))) for row in own]
        sums = torch.tensor([sum(float(t) for t, _ in parts), sum(n for _, n in parts)], dtype=torch.float64)
        total, count = self.accelerator.reduce(sums.to(self.args.device)).tolist()
        metrics = {"eval_loss": total / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _get_output_dir(self, trial):  # noqa: ANN001, ANN202
        return str(self.part or self.args.output_dir)

    def _save_checkpoint(self, model, trial) -> None:  # noqa: ANN001
        """Hidden until it is whole; then the last two and the best are kept."""
        final = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if not is_main():
            return super()._save_checkpoint(model, trial)
        with writing(final) as self.part:
            super()._save_checkpoint(model, trial)
            for file in (self.part / final.name).iterdir():
                move(file, self.part / file.name)
            (self.part / final.name).rmdir()
            atomic_write_json(self.part / keep.COMPLETE, {f.name: sha256(f) for f in self.part.iterdir()})
        keep.prune(final.parent, self.state.best_global_step)

    def _save_rng_state(self, output_dir: str) -> None:
        if is_main():
            super()._save_rng_state(output_dir)


class Watch(TrainerCallback):
    """Progress lines and a live picture, a checkpoint every few minutes, and a stop when nothing good comes any more.

    `total`: optimiser steps; `names`: what to call each row, in the order of training.
    """

    def __init__(self, total: int, names: list[str], recipe: Recipe, save_every_s: float = 180.0) -> None:
        self.progress, self.save_every_s = Progress("training", total, "steps", every=15), save_every_s
        self.names, self.recipe, self.picture = names, recipe, None
        self.saved, self.drawn, self.loss = time.monotonic(), 0.0, float("nan")

    def on_train_begin(self, args, state, control, **_):  # noqa: ANN001, ANN003, ANN201
        self.progress.tick(state.global_step)

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):  # noqa: ANN001, ANN003, ANN201
        """Before the weights change: a checkpoint never holds what is not a number."""
        if not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
            rows = self.names[state.global_step * self.recipe.accumulate :][: self.recipe.accumulate]
            what = f"the loss is not a number at step {state.global_step + 1}"
            raise keep.diverged(what, rows, state.best_global_step, Path(args.output_dir))

    def on_log(self, args, state, control, logs=None, **_):  # noqa: ANN001, ANN003, ANN201
        logs, step, losses = logs or {}, state.global_step, [h["loss"] for h in state.log_history if "loss" in h]
        self.loss = logs.get("loss", self.loss)
        if "loss" in logs and keep.rose(losses):
            rows = self.names[(step - args.logging_steps) * self.recipe.accumulate : step * self.recipe.accumulate]
            what = f"the loss rose from {min(losses):.2f} to {losses[-1]:.2f} at step {step}"
            raise keep.diverged(what, rows, state.best_global_step, Path(args.output_dir))
        if "eval_loss" in logs:
            print(f"validation loss {logs['eval_loss']:.3f} at step {step}", flush=True)
        if "eval_loss" in logs or self.drawn < self.progress.last:
            self.drawn, self.picture = self.progress.last, keep.show_losses(state.log_history, self.picture)

    def on_evaluate(self, args, state, control, **_):  # noqa: ANN001, ANN003, ANN201
        if not math.isfinite(state.log_history[-1]["eval_loss"]):
            what = f"the validation loss is not a number at step {state.global_step}"
            raise keep.diverged(what, [], state.best_global_step, Path(args.output_dir))
        if state.global_step < state.max_steps and keep.no_better(state.log_history, self.recipe.patience):
            print(f"training: no better for {self.recipe.patience} validations, so it ends here", flush=True)
            control.should_training_stop, control.should_save = True, False  # a resumed run shall stop here again

    def on_step_end(self, args, state, control, **_):  # noqa: ANN001, ANN003, ANN201
        self.progress.tick(state.global_step, f"loss {self.loss:.3f}" if math.isfinite(self.loss) else "")
        if args.world_size == 1 and time.monotonic() - self.saved > self.save_every_s:  # clocks of two would disagree
            control.should_save = True
        return control

    def on_save(self, args, state, control, **_):  # noqa: ANN001, ANN003, ANN201
        self.saved = time.monotonic()


def train_peft(
    base: Path,
    recipe: Recipe,
    epochs: int,
    train: list[Rendered],
    valid: list[Rendered],
    checkpoints: Path,
    start: Path | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Train LoRA on the model in folder `base`; go on from the last checkpoint if there is one, else from `start`.

    The recipe's precision and checkpointing are decided before (`settle`). Returns the peft model holding the best
    adapter by validation loss, and the result: history of training and validation loss (nats per learned token), best
    step, trainable parameters, learned tokens, rows per second.
    """
    set_seed(recipe.seed)
    model = load_weights(base, dtype=recipe.precision)
    model.config.use_cache = False
    model = get_peft_model(model, lora_config(recipe, model.config))
    if start:
        model.load_adapter(start, "default", is_trainable=True)
    if recipe.checkpointing == "on":
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()  # or the way back would go through the layers below those that learn
    order = keep.row_order(len(train), epochs, recipe.seed)
    steps = math.ceil(len(order) / recipe.accumulate)
    every = max(1, steps // (epochs * recipe.validate_per_epoch))
    shares = keep.processes().num_processes  # all must have one, so rows of nothing fill up
    nothing = [Rendered(train[0].ids[:1], [0])] * (-len(order) % shares)
    trainer = RowTrainer(
        model=model,
        args=_arguments(replace(recipe, learning_rate=rate_for(model.config, recipe)), checkpoints, steps, every),
        train_dataset=[train[i] for i in order] + nothing,
        eval_dataset=valid,
        data_collator=partial(collate, multiple=64 if model.dtype == torch.bfloat16 else 1),
        callbacks=[watch := Watch(steps, [train[i].where for i in order], recipe)],
    )
    trainer.remove_callback(PrinterCallback)
    resumed = keep.last_checkpoint(checkpoints)
    if resumed:
        print(f"training: going on from {resumed.name} of {steps}", flush=True)
    started = time.monotonic()
    try:
        with watch.progress.heartbeat():
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except KeyboardInterrupt:
        print("training: interrupted; started again, it goes on from its last checkpoint", flush=True)
        raise
    if is_main():
        model.load_adapter(checkpoints / f"checkpoint-{trainer.state.best_global_step}", "default")
    state, begun = trainer.state, int(resumed.name.split("-")[1]) if resumed else 0
    return model, keep.outcome(
        state.log_history,
        (state.best_global_step, state.best_metric),
        [train[i] for i in order[: state.global_step * recipe.accumulate]],
        steps=steps,
        begun=begun,
        end=state.global_step,
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        seconds=time.monotonic() - started,
        per_step=recipe.accumulate,
    )


def lora_config(recipe: Recipe, config: Any) -> LoraConfig:
    """The recipe in PEFT's words, for a model with this transformers config."""
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.targets),
        layers_to_transform=layer_numbers(config, recipe) if recipe.layers else None,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _arguments(recipe: Recipe, folder: Path, steps: int, every: int) -> TrainingArguments:
    count = keep.processes().num_processes
    if recipe.accumulate % count:
        wrong = f"{count} processes cannot share evenly the rows of a step, which are {recipe.accumulate}"
        raise CourseError(wrong, f"give --rows-per-step {count} or a multiple of it")
    made = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=recipe.accumulate // count,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=math.ceil(recipe.warmup * steps),
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_num_workers=0,
        logging_steps=max(1, min(5, every)),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        eval_strategy="steps",
        eval_steps=every,
        save_strategy=SaveStrategy.STEPS,
        save_steps=every,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        seed=recipe.seed,
        use_cpu=not torch.cuda.is_available(),
        label_names=["labels"],
        ddp_find_unused_parameters=False,
    )
    made._n_gpu = min(made.n_gpu, 1)  # of several cards one, or Trainer lays a row on each: `accelerate launch` shares
    return made
