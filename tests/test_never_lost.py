"""What training must survive: kill -9 at any moment, a loss that breaks, a model that stops learning, two processes."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_training import FAST, furthest, run_with_rows, some_rows, tensors, write_rows

from stakelib import machine
from stakelib.models import BaseModel
from stakelib.run import CourseError, Progress, Run, sha256, writing
from stakelib.training import RECIPES, Recipe, adapter_folder, train
from stakelib.training.keep import RISE, alone, by_step, last_checkpoint, no_better
from stakelib.training.peft_backend import RowTrainer, Watch, _arguments

PRECISION = ("float32", "the same for every process of these tests, however busy the machine is")
ONE_BY_ONE = replace(FAST, name="one by one", accumulate=1)  # 16 rows: 16 steps, a validation every 4


@pytest.fixture(autouse=True)
def one_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "precision", lambda: PRECISION)


def checkpoints(run: Run) -> Path:
    return next((run.folder / "training").glob("checkpoints-*"), run.folder / "none")


def steps(run: Run) -> list[str]:
    return [p.name.split("-")[1] for p in by_step(checkpoints(run))]


def fake_validation(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Validation says what the test wants; everything else is real."""

    def evaluate(self: Any, *_: Any, **__: Any) -> dict[str, float]:
        metrics = {"eval_loss": losses[self.state.global_step]}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    monkeypatch.setattr(RowTrainer, "evaluate", evaluate)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C at the end of this step."""
    step_end = Watch.on_step_end

    def end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> Any:
        if state.global_step == step:
            raise KeyboardInterrupt
        return step_end(self, args, state, control, **more)

    monkeypatch.setattr(Watch, "on_step_end", end)


# ------------------------------------------------------------------------------------------------- a broken loss


def test_a_loss_that_is_no_number_names_its_row_and_keeps_the_last_good_checkpoint(
    tiny: BaseModel, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stakelib.training import peft_backend
    from stakelib.training.keep import row_order

    run, good, seventh = run_with_rows(home / "run"), peft_backend.row_loss, row_order(16, 1, FAST.seed)[6]

    def row_loss(model: Any, batch: Any) -> Any:
        total, count = good(model, batch)
        wrong = torch.is_grad_enabled() and model.training and row_loss.seen == 6
        row_loss.seen += torch.is_grad_enabled()
        return (total * math.nan if wrong else total), count

    row_loss.seen = 0
    with monkeypatch.context() as patch, pytest.raises(CourseError, match="lower learning_rate") as problem:
        patch.setattr(peft_backend, "row_loss", row_loss)
        train(run, ONE_BY_ONE)
    said = problem.value.problems
    assert said[0] == "training diverged: the loss is not a number at step 7"
    assert said[1] == f"it was learning train.jsonl, line {seventh + 1} (row r{seventh})"
    assert said[2:] == [f"the best checkpoint so far, of step 4, is kept in {checkpoints(run).name}"]
    assert last_checkpoint(checkpoints(run)) == checkpoints(run) / "checkpoint-4"
    assert not adapter_folder(run).exists()
    result = train(run, ONE_BY_ONE)  # the twin: the same rows without the fault, from the good checkpoint on
    assert (result["resumed_at"], result["valid_loss"][-1][0]) == (4, 16)
    assert all(bool(t.isfinite().all()) for t in tensors(run).values())


def test_a_loss_far_above_its_start_stops_the_run(tiny: BaseModel, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model cannot get worse than chance whatever the rate, so its loss is raised by hand."""
    from stakelib.training import peft_backend

    run, good, calls = run_with_rows(home / "run", 32), peft_backend.row_loss, []

    def row_loss(model: Any, batch: Any) -> Any:
        calls.append(1)
        total, count = good(model, batch)
        return total + count * 0.3 * len(calls), count

    with monkeypatch.context() as patch, pytest.raises(CourseError, match="the loss rose from") as problem:
        patch.setattr(peft_backend, "row_loss", row_loss)
        train(run, ONE_BY_ONE)
    said = problem.value.problems
    start, end = (float(word) for word in said[0].split("from ")[1].split(" at")[0].split(" to "))
    assert end > start + RISE
    assert sum("it was learning train.jsonl, line" in p for p in said) == 5  # those of the last logged mean
    assert not adapter_folder(run).exists()


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([3, 6], False),
        ([3, 6, 4], False),
        ([3, 4, 6, 6], True),
        ([3, 5.1, 5.1], True),
        ([3, 4.9, 9], False),
        ([3], False),
    ],
)
def test_one_odd_window_is_no_divergence_two_are(losses: list[float], stops: bool) -> None:
    watch = Watch(50, [f"row {i}" for i in range(50)], ONE_BY_ONE)
    state = SimpleNamespace(global_step=5 * len(losses), log_history=[{"loss": x} for x in losses], best_global_step=0)
    args = SimpleNamespace(logging_steps=5, output_dir="x")
    if not stops:
        assert watch.on_log(args, state, None, logs=state.log_history[-1]) is None
        return
    with pytest.raises(CourseError, match="the loss rose from 3.00") as problem:
        watch.on_log(args, state, None, logs=state.log_history[-1])
    assert problem.value.problems[1] == f"it was learning row {state.global_step - 5}"


# ------------------------------------------------------------------------------------------------- nothing more to gain


def test_no_better_looks_at_the_last_validations_only() -> None:
    def history(*losses: float) -> list[dict[str, float]]:
        return [{"loss": 9.0}, *({"eval_loss": x} for x in losses)]

    assert not no_better(history(2, 3), 2)
    assert no_better(history(2, 3, 2), 2)
    assert not no_better(history(2, 3, 1.9), 2)
    assert no_better(history(3, 2, 2, 2.5), 2)
    # an epoch is as long as the patience, so a profile of one epoch (quick) never stops before its last step
    assert Recipe().patience >= Recipe().validate_per_epoch


def test_training_ends_early_keeps_the_best_and_ends_there_again(
    tiny: BaseModel, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_validation(monkeypatch, {4: 2.0, 8: 2.1, 12: 2.0, 16: 1.0})
    run, recipe = run_with_rows(home / "run"), replace(ONE_BY_ONE, patience=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("stakelib.run.size", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))  # before the record
        train(run, recipe)
    assert steps(run) == ["4", "8"]
    result = train(Run.open(run.folder, "smoke"), recipe)
    assert capsys.readouterr().out.count("no better for 2 validations, so it ends here") == 2
    assert (result["stopped_early_at"], result["best_step"], result["best_valid_loss"]) == (12, 4, 2.0)
    assert (result["steps"], result["resumed_at"]) == (16, 8)
    more = train(run_with_rows(home / "patient"), replace(recipe, patience=3))  # the twin
    assert (more["stopped_early_at"], more["best_step"]) == (None, 16)
    assert more["learned_tokens"] > result["learned_tokens"] > more["learned_tokens"] / 2


def test_the_last_two_and_the_best_checkpoint_are_kept(
    tiny: BaseModel, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_validation(monkeypatch, {4: 1.0, 8: 2.0, 12: 2.0, 16: 2.0})
    for at, kept in ((11, ["4", "8"]), (15, ["4", "8", "12"])):
        run = run_with_rows(home / str(at))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            stop_at(patch, at)
            train(run, ONE_BY_ONE)
        assert steps(run) == kept
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("stakelib.run.size", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        train(run, ONE_BY_ONE)
    assert steps(run) == ["4", "12", "16"]


def test_an_adapter_without_a_record_is_not_trained_again(
    tiny: BaseModel, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with_rows(home / "run")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("stakelib.run.size", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        train(run, FAST)
    before = tensors(run)
    shutil.move(run.folder, home / "moved")  # a run may also be carried to another computer in between
    run = Run.open(home / "moved", "smoke")
    result = train(run, FAST)
    assert (result["resumed_at"], result["steps"]) == (8, 8)
    assert furthest(before, tensors(run)) == 0
    assert not list((run.folder / "training").glob("checkpoints-*"))


# ------------------------------------------------------------------------------------------------- signs of life


def test_the_heart_beats_until_the_first_step_is_done() -> None:
    lines: list[str] = []
    progress = Progress("training", 9, "steps", every=1e9, say=lines.append)
    progress.tick(3)  # where a resumed run begins
    with progress.heartbeat(every=0.05):
        time.sleep(0.4)
        beats = [x for x in lines if "no steps finished yet" in x]
        assert len(beats) >= 2 and beats[0].startswith("training: at work for 0 s")
        progress.tick(4)
        time.sleep(0.1)
        silent = len(lines)
        time.sleep(0.3)
        assert len(lines) == silent
    with pytest.raises(KeyboardInterrupt), Progress("x", 9, "steps", say=lines.append).heartbeat(every=0.05):
        raise KeyboardInterrupt
    silent = len(lines)
    time.sleep(0.2)
    assert len(lines) == silent
    assert Progress.heartbeat.__wrapped__.__defaults__[0] <= 60


def test_a_picture_follows_the_loss_in_an_open_notebook_and_nowhere_else(tiny: BaseModel, home: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    run_with_rows(home / "run")
    cell = f"""
import sys; sys.path[:0] = {[str(p) for p in (Path(__file__).parents[1], Path(__file__).parent)]!r}
from test_training import FAST
from stakelib import plots
from stakelib.run import Progress, Run
from stakelib.training import train
drawn, draw = [], plots.loss_curve
plots.loss_curve = lambda history: drawn.append(history) or draw(history)
train(Run.open({str(home / "run")!r}, "smoke"), FAST, rows=ROWS, backend="peft")
print("drawn", len(drawn))
"""
    seen = []
    for rows, session in ((9, {}), (10, {"JPY_SESSION_NAME": "a notebook"})):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.replace("ROWS", str(rows)))])
        NotebookClient(notebook, timeout=300, kernel_name="python3").execute(env={**os.environ, **session})
        outputs = notebook.cells[0].outputs
        text = "".join(o.get("text", "") for o in outputs)
        assert "validation loss" in text
        pictures = sum("image/png" in o.get("data", {}) for o in outputs)
        seen.append((pictures, int(text.split("drawn ")[1])))
    assert seen[0] == (0, 0)
    assert seen[1][0] == 1 < seen[1][1]  # drawn several times, but in one place


# ------------------------------------------------------------------------------------------------- leftovers


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_next_run_clears_what_a_killed_one_left(kind: str, home: Path) -> None:
    Run.open(home / "run", "smoke").remember(a=1)
    place = home / "run" / "models" / "deep"
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
from stakelib.run import writing
with writing(Path({str(place)!r}) / "thing") as part:
    part.mkdir() if {kind == "folder"} else part.write_bytes(b"half")
    (part / "a").write_bytes(b"half") if part.is_dir() else None
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    old = place / next(place.iterdir()).name.replace(".part", ".old")
    old.write_bytes(b"whole")  # killed between the two renames
    with writing(place / "mine") as part:
        part.write_bytes(b"x")
        Run.open(home / "run", "smoke")
        assert {p.name for p in place.iterdir()} == {part.name, "thing"}  # the twin: a living writer is left alone
    assert {p.name for p in place.iterdir()} == {"mine", "thing"}
    assert (place / "thing").read_bytes() == b"whole"  # the old one is back


# ------------------------------------------------------------------------------------------------- two at once


def test_of_several_cards_one_trains_unless_accelerate_shares_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer would lay one row on each card (DataParallel), and a step would hold more rows than the recipe says."""
    from transformers import TrainingArguments

    for cards, used in ((4, 1), (1, 1), (0, 0)):
        monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda _, cards=cards: cards))
        assert _arguments(FAST, tmp_path, 4, 2)._n_gpu == used


HOLDS = """
import sys, time
from pathlib import Path
from stakelib.training import keep

with keep.alone(Path({place!r})):
    print("HELD", flush=True)
    time.sleep(600)
"""


def test_a_second_process_does_not_touch_a_training_at_work(
    tiny: BaseModel, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with_rows(home / "run")
    stop_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train(run, FAST)
    monkeypatch.undo()
    monkeypatch.setattr(machine, "precision", lambda: PRECISION)
    before = steps(run)
    (lock,) = (run.folder / "training").glob("*.lock")
    command = [sys.executable, "-c", HOLDS.format(place=str(lock))]
    root = {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    other = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", env=os.environ | root)
    try:
        assert other.stdout is not None and other.stdout.readline() == "HELD\n"
        with pytest.raises(CourseError, match="another notebook or process"):
            train(run, FAST)
        assert steps(run) == before and before
    finally:
        other.kill()  # -9: nothing of it lets go of the lock but the system
        other.communicate()
    assert train(run, FAST)["resumed_at"] == int(before[-1])
    assert checkpoints(run).name == "none"


def test_where_no_lock_can_be_made_it_is_said_and_work_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no folder").write_text("", encoding="utf-8")
    with alone(tmp_path / "no folder" / "x.lock"):
        assert "cannot be locked" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- kill -9

LONG = Recipe(
    name="long",
    rank=8,
    alpha=16,
    layers=None,
    learning_rate=0.005,
    tuned_width=None,
    accumulate=1,
    validate_per_epoch=8,
    max_length=96,
)
TRAINS = """
import sys, time
sys.path[:0] = {path!r}
from test_never_lost import LONG, PRECISION
from stakelib import machine
from stakelib.run import Run
from stakelib.training import peft_backend, train

machine.precision = lambda: PRECISION

class Watch(peft_backend.Watch):
    def __init__(self, *arguments):
        super().__init__(*arguments, save_every_s=0.05)  # so that many moments lie in a checkpoint

    def on_train_begin(self, *arguments, **more):
        Watch.begun = time.monotonic()
        print("READY", flush=True)
        super().on_train_begin(*arguments, **more)

peft_backend.Watch = Watch
train(Run.open({run!r}, "smoke", {model!r}), LONG, backend="peft")
print("SECONDS", time.monotonic() - Watch.begun, flush=True)
"""


@pytest.fixture()
def loud(tiny: BaseModel, tmp_path: Path) -> str:
    """The tiny model with tenfold logits: as it is, even its best answer is a sixth better than chance, no more."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "loud"
    shutil.copytree(tiny.folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 9  # Gemma multiplies by one plus this
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def loud_run(folder: Path, model: str) -> Run:
    run = Run.open(folder, "smoke", model)
    write_rows(run, "train", some_rows(96))
    write_rows(run, "valid", some_rows(100)[-4:])
    return run


def start(run: Run) -> subprocess.Popen[str]:
    here = Path(__file__).resolve().parents
    code = TRAINS.format(path=[str(here[1]), str(here[0])], run=str(run.folder), model=run.profile.model)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: another number of threads adds up in another order
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, encoding="utf-8", env=env)


def kill_after(run: Run, seconds: float) -> int:
    process = start(run)
    for line in process.stdout or ():
        if line == "READY\n":
            break
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    return process.communicate() and process.returncode


def half_files(folder: Path) -> list[str]:
    """Visible files that cannot be read, and visible checkpoints that are not whole; hidden ones are nobody's."""
    from safetensors.torch import load_file

    read = {
        ".json": lambda p: json.loads(p.read_text(encoding="utf-8")),
        ".safetensors": load_file,
        ".pt": torch.load,
        ".pth": lambda p: torch.load(p, weights_only=False),
    }
    found = []
    for file in [p for p in folder.rglob("*") if p.is_file() and p.suffix in read]:
        if not any(part.startswith(".") for part in file.relative_to(folder).parts):
            try:
                read[file.suffix](file)
            except Exception as problem:
                found.append(f"{file}: {problem}")
    marks = [p for p in folder.rglob("checkpoint-*") if not (p / "complete.json").exists()]
    return found + [f"{p} is not marked" for p in marks if not any(part.startswith(".") for part in p.parts[-3:])]


def test_half_files_are_seen(tmp_path: Path) -> None:
    whole = tmp_path / "checkpoint-1"
    whole.mkdir()
    (whole / "complete.json").write_text("{}", encoding="utf-8")
    torch.save({"a": torch.ones(3)}, whole / "optimizer.pt")
    assert half_files(tmp_path) == []
    (whole / "optimizer.pt").write_bytes((whole / "optimizer.pt").read_bytes()[:200])
    assert len(half_files(tmp_path)) == 1
    (whole / "complete.json").unlink()
    assert len(half_files(tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_at_ten_random_moments_it_always_ends_the_same(
    loud: str, home: Path, tell: Callable[[str], None]
) -> None:
    whole, other = (loud_run(home / name, loud) for name in ("whole", "other"))
    result, _ = train(whole, LONG), train(other, replace(LONG, seed=LONG.seed + 1))
    wanted = tensors(whole)
    assert result["valid_loss"][-1][1] < 0.7 * result["train_loss"][0][1]  # it fell by 30 %, so there is much to lose
    assert furthest(tensors(other), wanted) > 1e-2  # the twin: another seed fails the comparison below
    timed = start(loud_run(home / "timed", loud))
    seconds = float(timed.communicate()[0].split("SECONDS ")[1])
    chance, told = random.Random(time.time_ns()), []
    for tenth in range(10):
        run, moment = loud_run(home / f"killed {tenth}", loud), seconds * (tenth + chance.random()) / 10
        assert kill_after(run, moment) in (-signal.SIGKILL, 0)
        assert half_files(run.folder) == []
        if adapter_folder(run).exists():
            assert furthest(tensors(run), wanted) < 1e-4
        finished, kept = "train" in Run.open(run.folder, "smoke", loud).record["stages"], steps(run)
        ended = train(Run.open(run.folder, "smoke", loud), LONG)
        assert finished or ended["resumed_at"] == int(kept[-1] if kept else 0)  # the newest one on the disk was whole
        assert furthest(tensors(run), wanted) < 1e-4, f"killed after {moment:.2f} of {seconds:.2f} s"
        assert ended["valid_loss"] == [[s, pytest.approx(loss, abs=1e-4)] for s, loss in result["valid_loss"]]
        assert [p for p in run.folder.rglob("*") if p.suffix in (".part", ".old")] == []
        told.append(f"{moment:.2f} s, " + ("finished" if finished else f"on from step {ended['resumed_at']}"))
    tell(f"killed at, of {seconds:.2f} s: " + "; ".join(told))


# ------------------------------------------------------------------------------------------------- two processes

HELPER = """
import os, runpy, sys
sys.path[:0] = {path!r}
from test_never_lost import PRECISION
from stakelib import machine

machine.precision = lambda: PRECISION
sys.argv[1:] = ["--out", {folders!r}[int(os.environ["RANK"])], "--profile", "smoke", *{arguments!r}]
runpy.run_module("stakelib.training", run_name="__main__")
"""


def launch(place: Path, folders: list[Run], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Two processes, each with a run folder of its own, so that the test sees who writes."""
    script = place / "script.py"
    path, names = [str(p) for p in Path(__file__).resolve().parents[:2]], [str(r.folder) for r in folders]
    script.write_text(HELPER.format(path=path, folders=names, arguments=arguments), encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(place / "hf")}
    return subprocess.run([*command, str(script)], capture_output=True, encoding="utf-8", env=env, timeout=600)


def files(run: Run) -> dict[str, str]:
    return {p.relative_to(run.folder).as_posix(): sha256(p) for p in run.folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_two_processes_train_the_same_adapter_and_one_of_them_writes(tiny: BaseModel, home: Path) -> None:
    recipe = replace(RECIPES["course"], accumulate=4)
    alone, other, both, helper = (run_with_rows(home / name, 21) for name in ("alone", "other", "both", "helper"))
    result, before = train(alone, recipe), files(helper)  # 21 rows: six steps, and one row in the last
    train(other, replace(recipe, seed=recipe.seed + 1))
    done = launch(home, [both, helper], "--rows-per-step", "4")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("best validation loss") == 1
    record = json.loads((both.folder / "run.json").read_text(encoding="utf-8"))["stages"]["train"]["result"]
    assert record["steps"] == result["steps"] == 6
    assert record["valid_loss"] == [[s, pytest.approx(loss, abs=1e-4)] for s, loss in result["valid_loss"]]
    assert furthest(tensors(both), tensors(alone)) < 1e-4
    assert furthest(tensors(other), tensors(alone)) > 1e-2
    assert files(helper) == before
    assert not adapter_folder(helper).exists()


@pytest.mark.slow
def test_rows_that_two_processes_cannot_share_are_refused(tiny: BaseModel, home: Path) -> None:
    runs = [run_with_rows(home / name) for name in ("both", "helper")]
    done = launch(home, runs, "--rows-per-step", "3")
    assert done.returncode != 0
    assert "2 processes cannot share evenly the rows of a step, which are 3" in done.stdout
    assert "give --rows-per-step 2 or a multiple of it" in done.stdout


def test_the_command_line_trains_like_the_notebook(
    tiny: BaseModel, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stakelib.training.__main__ import main

    mine, yours = (run_with_rows(home / name) for name in ("mine", "yours"))
    train(mine, replace(RECIPES["guide-mlx"], accumulate=4))
    arguments = ["--out", str(yours.folder), "--profile", "smoke", "--recipe", "guide-mlx", "--rows-per-step", "4"]
    monkeypatch.setattr(sys, "argv", ["training", *arguments])
    assert main() == 0
    assert "best validation loss" in capsys.readouterr().out
    assert furthest(tensors(mine), tensors(yours)) == 0
    monkeypatch.setattr(sys, "argv", ["training", "--profile", "smoke", "--out", str(home / "empty")])
    assert main() == 2
    assert "run the notebook before this one first" in capsys.readouterr().out


def test_a_helper_process_leaves_the_record_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.open(home / "run", "smoke")
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")
        run.remember(a=1)
        assert run.stage("x", {}, [], [run.path("never made")], lambda: {"b": 2}) == {"b": 2}
    assert not (home / "run" / "run.json").exists()
    run.remember(a=1)  # the twin
    assert (home / "run" / "run.json").exists()
