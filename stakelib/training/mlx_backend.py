"""LoRA with MLX, on mlx-lm's own trainer: our rows, our loss, our checkpoints. Runs in a process of its own.

`python -m stakelib.training.mlx_backend job.json` trains and prints facts as JSON, one a line behind `keep.MARK`: what
libraries print is none; see `mlx_run`.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx import nn, optimizers
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, evaluate, train
from mlx_lm.tuner.utils import linear_to_lora_layers

from stakelib.models import Rendered
from stakelib.models.mlx_models import load_mlx, logits_at
from stakelib.run import CourseError, atomic_write_json, sha256, writing
from stakelib.training import keep
from stakelib.training.recipe import Recipe, as_recipe, layer_numbers

WHERE = {t: f"{'self_attn' if t in ('q_proj', 'k_proj', 'v_proj', 'o_proj') else 'mlp'}.{t}" for t in Recipe().targets}
SAVE_EVERY_S = 180.0
Batch = tuple[mx.array, mx.array, mx.array, mx.array]


def lora_config(recipe: Recipe, layers: int) -> dict[str, Any]:
    """The recipe in MLX's words, for a model of so many layers."""
    parameters = {"rank": recipe.rank, "scale": recipe.scale, "dropout": recipe.dropout}
    parameters["keys"] = [WHERE[t] for t in recipe.targets]
    count = len(layer_numbers(SimpleNamespace(num_hidden_layers=layers), recipe))
    return {"fine_tune_type": "lora", "num_layers": count, "lora_parameters": parameters}


def with_lora(model: Any, recipe: Recipe) -> Any:
    """The model frozen, with thin matrices beside the same targets of the same layers as in PEFT."""
    model.freeze()
    config = lora_config(recipe, len(model.layers))
    linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"])
    return model


def batch_of(row: Rendered, step_tokens: int, share: int, multiple: int) -> Batch:
    """One row: ids [1, tokens], places whose logits are needed, ids wanted there, and the weight of each.

    The weights make mlx-lm's mean over the `share` rows of a step the mean over all `step_tokens` learned tokens of
    that step, as transformers has it. Lengths are padded to a `multiple`, unseen and outside the loss: on a Mac each
    new length is compiled once.
    """
    ids = row.ids + row.ids[-1:] * (-len(row.ids) % multiple)
    places = [i for i, m in enumerate(row.mask) if m]
    pad = [0] * (-len(places) % multiple)
    weights = [share / step_tokens] * len(places) + pad
    wanted = [row.ids[i] for i in places] + pad
    return mx.array([ids]), mx.array([i - 1 for i in places] + pad), mx.array(wanted), mx.array(weights, mx.float32)


def row_loss(model: Any, ids: mx.array, places: mx.array, wanted: mx.array, weights: mx.array) -> Any:
    """(weighted sum of the negative log-likelihood, number of learned tokens) of a batch from `batch_of`."""
    each = nn.losses.cross_entropy(logits_at(model, ids, places), wanted)
    return (each * weights).sum(), (weights > 0).sum()


def training_batches(recipe: Recipe, order: list[int], first: int, multiple: int) -> Callable[..., Iterator[Batch]]:
    """What mlx-lm's trainer iterates over: rows in `order` from step `first` on, always whole steps.

    Each row sets the random numbers anew, so that a resumed run drops out the same places.
    """

    def batches(dataset: list[Rendered], **_: Any) -> Iterator[Batch]:
        share = recipe.accumulate
        for start in range(first * share, len(order), share):
            rows = [dataset[i] for i in order[start : start + share]]
            tokens = sum(sum(r.mask) for r in rows)
            for i in range(share):  # where the last step is short, its first row again, without weight
                mx.random.seed((recipe.seed << 24) + start + i)
                yield batch_of(*(rows[i], tokens, share) if i < len(rows) else (rows[0], tokens, 0), multiple)

    return batches


def validation_batches(dataset: list[Rendered], **_: Any) -> Iterator[Batch]:
    """Each row once, weighted so that mlx-lm's evaluate gives the mean over all learned tokens."""
    yield from (batch_of(row, sum(row.mask), 1, 64) for row in dataset)


def rate(recipe: Recipe, steps: int) -> Any:
    """The learning rate over the optimizer's steps, number for number as transformers has it."""
    warm, top = math.ceil(recipe.warmup * steps), recipe.learning_rate
    if recipe.schedule == "constant":
        return top
    rest = max(1, steps - warm)
    falling = {"cosine": optimizers.cosine_decay(top, rest), "linear": optimizers.linear_schedule(top, 0.0, rest)}
    chosen = falling[recipe.schedule]
    return optimizers.join_schedules([optimizers.linear_schedule(0.0, top, warm), chosen], [warm]) if warm else chosen


class ClippedAdamW(optimizers.AdamW):
    """AdamW as torch has it (bias corrected), with gradients no longer than 1 in all."""

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        return super().apply_gradients(optimizers.clip_grad_norm(gradients, 1.0)[0], parameters)


class EndOfTraining(Exception):
    """An epoch over known rows taught nothing: the trainer's loop is left by this."""


class Keeper(TrainingCallback):
    """Called by mlx-lm after each row: adds up the losses of a step, validates, saves, and stops a broken run."""

    def __init__(self, model: Any, optimizer: Any, recipe: Recipe, job: dict[str, Any], say: Callable[..., None]):
        self.model, self.optimizer, self.recipe, self.say = model, optimizer, recipe, say
        self.folder, self.steps, self.every = Path(job["checkpoints"]), job["steps"], job["every"]
        self.valid, self.names, self.start = [Rendered(*row) for row in job["valid"]], job["names"], job.get("start")
        self.config = {"model": job["model"], "base_precision": recipe.precision}
        self.config |= lora_config(recipe, len(model.layers))
        self.step, self.history, self.best = 0, [], None  # best: [step, validation loss]
        self.sum, self.window, self.saved = 0.0, [], time.monotonic()

    def broken(self, what: str, first: int = 0, end: int = 0) -> CourseError:
        """What to raise, naming the rows from `first` to before `end` in the order of training."""
        return keep.diverged(what, self.names[first:end], self.best and self.best[0], self.folder)

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, or from the adapter to start with, if there is one.

        A checkpoint of step 0 holds no more than an adapter to begin with.
        """
        found = keep.last_checkpoint(self.folder)
        if found is None:
            if self.start:
                self.model.load_weights(self.start, strict=False)
            return
        state = json.loads((found / "state.json").read_text(encoding="utf-8"))
        self.step, self.history, self.best = state["step"], state["history"], state["best"]
        self.model.load_weights(str(found / "adapters.safetensors"), strict=False)
        if (found / "optimizer.safetensors").exists():
            self.optimizer.state = tree_unflatten(list(mx.load(str(found / "optimizer.safetensors")).items()))

    def on_train_loss_report(self, train_info: dict) -> None:
        share, row_at = self.recipe.accumulate, self.step * self.recipe.accumulate
        self.sum += train_info["train_loss"] / share
        if not math.isfinite(self.sum):
            raise self.broken(f"the loss is not a number at step {self.step + 1}", row_at, row_at + share)
        if train_info["iteration"] % share:
            return
        self.step += 1
        self.window.append(self.sum)
        self.sum = 0.0
        speed = {"tokens_per_second": train_info["tokens_per_second"], "peak_gb": mx.get_peak_memory() / 2**30}
        self.say(step=self.step, loss=self.window[-1], **speed)
        if self.step % max(1, min(5, self.every)) == 0:
            self.mean_of_window()
        if self.step % self.every == 0 or self.step == self.steps:
            self.validate()
        elif time.monotonic() - self.saved > SAVE_EVERY_S:
            self.save()

    def mean_of_window(self) -> None:
        """Log the mean loss of the last steps, as transformers does, and stop where it lies far above the first."""
        count = len(self.window)
        self.log(loss=sum(self.window) / count)
        self.window = []
        losses = [h["loss"] for h in self.history if "loss" in h]
        if keep.rose(losses):
            what, share = f"the loss rose from {min(losses):.2f} to {losses[-1]:.2f}", self.recipe.accumulate
            raise self.broken(f"{what} at step {self.step}", (self.step - count) * share, self.step * share)

    def log(self, **loss: float) -> None:
        self.history.append({"step": self.step, **loss})
        self.say(log=self.history[-1])

    def validate(self) -> None:
        """Mean loss of the validation rows, a checkpoint, and the end if nothing got better for long."""
        with contextlib.redirect_stdout(sys.stderr):
            loss = evaluate(self.model, self.valid, 1, -1, loss=row_loss, iterate_batches=validation_batches)
        self.model.train()
        if not math.isfinite(loss):
            raise self.broken(f"the validation loss is not a number at step {self.step}")
        self.log(eval_loss=loss)
        self.best = min([b for b in (self.best, [self.step, loss]) if b], key=lambda b: b[1])
        self.save()
        if self.step < self.steps and keep.no_better(self.history, self.recipe.patience):
            raise EndOfTraining

    def save(self) -> None:
        """A checkpoint, hidden until it is whole; none is written of what is not a number."""
        adapter = dict(tree_flatten(self.model.trainable_parameters()))
        if not all(mx.isfinite(t).all().item() for t in adapter.values()):
            raise self.broken(f"the adapter is not a number at step {self.step}")
        with writing(self.folder / f"checkpoint-{self.step}") as part:
            part.mkdir()
            mx.save_safetensors(str(part / "adapters.safetensors"), adapter)
            atomic_write_json(part / "adapter_config.json", self.config)
            mx.save_safetensors(str(part / "optimizer.safetensors"), dict(tree_flatten(self.optimizer.state)))
            atomic_write_json(part / "state.json", {"step": self.step, "history": self.history, "best": self.best})
            atomic_write_json(part / keep.COMPLETE, {f.name: sha256(f) for f in part.iterdir()})
        keep.prune(self.folder, self.best and self.best[0])
        self.saved = time.monotonic()


def work(job: dict[str, Any], say: Callable[..., None]) -> None:
    """Train as `job` says (see `mlx_run.train_mlx`), telling what happens through `say`."""
    recipe = as_recipe(job["recipe"])
    if not mx.metal.is_available():
        mx.disable_compile()  # on Linux each new shape would go through a C++ compiler, if there is one
    mx.random.seed(recipe.seed)
    model = with_lora(load_mlx(Path(job["base"])), recipe)
    rows = [Rendered(*row) for row in job["train"]]
    order = keep.row_order(len(rows), job["epochs"], recipe.seed)
    optimizer = ClippedAdamW(rate(recipe, job["steps"]), weight_decay=0.0, bias_correction=True)
    keeper = Keeper(model, optimizer, recipe, job, say)
    keeper.resume()
    say(begun=keeper.step, history=keeper.history)
    left = (job["steps"] - keeper.step) * recipe.accumulate
    arguments = TrainingArgs(
        batch_size=1,
        iters=left,
        steps_per_report=1,
        steps_per_save=left + 1,
        max_seq_length=recipe.max_length,
        adapter_file=str(keeper.folder / "last.safetensors"),
        grad_checkpoint=recipe.checkpointing == "on",
        grad_accumulation_steps=recipe.accumulate,
        clear_cache_threshold=2**30,
    )
    batches = training_batches(recipe, order, keeper.step, 64)
    with contextlib.suppress(EndOfTraining):
        if left and not keep.no_better(keeper.history, recipe.patience):
            train(model, optimizer, rows, None, arguments, row_loss, batches, keeper)
    count = sum(t.size for _, t in tree_flatten(model.trainable_parameters()))
    say(done={"best": keeper.best, "end": keeper.step, "history": keeper.history, "trainable_parameters": count})


def main() -> int:
    """Tell facts on the real output; what Python libraries print goes to the log."""
    say = partial(_say, sys.stdout)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            work(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), say)
        except CourseError as problem:
            say(problems=problem.problems, next_action=problem.next_action)
            return 2
    return 0


def _say(out: Any, **facts: Any) -> None:
    print(keep.MARK + json.dumps(facts), file=out, flush=True)  # a parent that died closed the pipe: we end here too


if __name__ == "__main__":
    sys.exit(main())
