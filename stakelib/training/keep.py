"""What both back-ends keep and watch: checkpoints that are whole or not there, the order of rows, the two losses."""

from __future__ import annotations

import contextlib
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stakelib import machine, plots
from stakelib.models import Rendered
from stakelib.run import CourseError, atomic_write_json, discard, hold, is_main, sha256

COMPLETE = "complete.json"  # sha256 of a checkpoint's files: one that a power cut spoiled is not used
MARK = "\x1e"  # begins each fact that the MLX process tells: the record separator of JSON text sequences (RFC 7464)
RISE = 2.0  # nats per token above the best so far: the right token is e^2 = 7 times less likely than it was


def no_better(history: list[dict[str, float]], patience: int) -> bool:
    """True if the last `patience` validation losses of the log are all worse than the best one before them."""
    losses = [h["eval_loss"] for h in history if "eval_loss" in h]
    return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


def diverged(what: str, rows: list[str], best: int | None, folder: Path) -> CourseError:
    """What happened, with which rows, and what is left: the checkpoint of step `best`, in `folder`."""
    return CourseError(
        [f"training diverged: {what}", *(f"it was learning {row}" for row in rows)]
        + ([f"the best checkpoint so far, of step {best}, is kept in {folder.name}"] if best else []),
        "read the rows named; if nothing is wrong with them, lower learning_rate in the recipe (half of it), run again",
    )


def rose(losses: list[float]) -> bool:
    """True if the last two logged means both lie far above the best before: one odd row is no reason."""
    return len(losses) > 2 and min(losses[-2:]) > min(losses[:-2]) + RISE


def show_losses(history: list[dict[str, float]], picture: Any) -> Any:
    """Draw both losses so far in place of `picture`; only where Jupyter says that a person's notebook is open.

    Under papermill and nbval, and without a notebook, nothing is shown: plain lines tell the same.
    """
    if "JPY_SESSION_NAME" not in os.environ:
        return None
    from IPython.display import display

    chart = plots.loss_curve(curves(history))
    if picture is None:
        return display(chart, display_id=True)
    picture.update(chart)
    return picture


def curves(history: list[dict[str, float]]) -> dict[str, list[list[float]]]:
    """(step, loss) of training and validation from the trainer's log."""
    names = {"train_loss": "loss", "valid_loss": "eval_loss"}
    return {name: [[h["step"], h[key]] for h in history if key in h] for name, key in names.items()}


def by_step(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are as they were written; later ones that are not are removed."""
    for found in reversed(by_step(folder)):
        with contextlib.suppress(OSError, ValueError):
            files = json.loads((found / COMPLETE).read_text(encoding="utf-8"))
            if files and all(sha256(found / name) == wanted for name, wanted in files.items()):
                return found
        if is_main():
            discard(found)
    return None


def prune(folder: Path, best: int | None) -> None:
    """Keep the last two checkpoints and the best one."""
    for old in by_step(folder)[:-2]:
        if old.name != f"checkpoint-{best}":
            discard(old)


def as_begun(checkpoints: Path, decide: Callable[[], list[str]]) -> list[str]:
    """What `decide` says, or said on this computer when these checkpoints were begun; the same in all processes.

    Measured again while the computer is busy, it could come out otherwise.
    """
    file, here, chosen = checkpoints / "begun.json", machine.describe()["processor"], None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        begun = json.loads(file.read_text(encoding="utf-8"))
        chosen = begun["chosen"] if begun["processor"] == here else None
    chosen = chosen or decide()
    if is_main():
        atomic_write_json(file, {"processor": here, "chosen": chosen})
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return chosen
    from accelerate.utils import broadcast_object_list

    processes()  # they must know of each other first
    return broadcast_object_list([chosen])[0]


@contextlib.contextmanager
def alone(file: Path) -> Iterator[None]:
    """Hold the lock `file` of one adapter for this process. Raises CourseError where another process holds it."""
    with contextlib.ExitStack() as stack:
        if is_main():  # of those that train together, the first speaks for all
            action = "wait for it, or stop it and run again: the training goes on from its last checkpoint"
            stack.enter_context(hold(file, "another notebook or process is training this adapter", action))
        yield


def processes() -> Any:
    """Those that train together (accelerate's view of them): one, unless `accelerate launch` started more."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def row_order(rows: int, epochs: int, seed: int) -> list[int]:
    """Row numbers in the order of training: each epoch a new shuffle, the same for the same seed."""
    shuffle = random.Random(seed)
    return [i for _ in range(epochs) for i in shuffle.sample(range(rows), rows)]


def outcome(
    history: list[dict[str, float]],
    best: tuple[int, float],
    seen: Sequence[Rendered],
    *,
    steps: int,
    begun: int,
    end: int,
    trainable: int,
    seconds: float,
    per_step: int,
) -> dict[str, Any]:
    """What a training tells of itself, with either back-end.

    `best`: (step, validation loss); `seen`: the rows learned, of this start and of those before; `begun`, `end`: the
    steps between which this start worked, for `seconds`.
    """
    return {
        **curves(history),
        "best_step": best[0],
        "best_valid_loss": best[1],
        "steps": steps,
        "stopped_early_at": end if end < steps else None,
        "trainable_parameters": trainable,
        "learned_tokens": sum(sum(row.mask) for row in seen),
        "all_tokens": sum(len(row.ids) for row in seen),
        "rows_per_second": round((end - begun) * per_step / max(seconds, 1e-9), 2),
        "resumed_at": begun,
    }
