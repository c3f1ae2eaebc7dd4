"""The run folder: nothing half-written, nothing made twice, nothing of somebody else's continued or deleted."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stakelib import run as run_module
from stakelib.run import (
    FORMAT,
    CourseError,
    Progress,
    Run,
    atomic_write_json,
    atomic_write_text,
    clock,
    default_folder,
    sha256,
    writing,
)

# ------------------------------------------------------------------------------------------------- atomic writes


def fill(part: Path, kind: str) -> None:
    """Write something new where `writing` said; half of it, if the caller then fails."""
    if kind == "folder":
        part.mkdir()
        part = part / "one.txt"
    part.write_text("new", encoding="utf-8")


def old_one(folder: Path, kind: str) -> Path:
    path = folder / "thing"
    if kind == "folder":
        path.mkdir()
        (path / "kept.txt").write_text("old", encoding="utf-8")
    else:
        path.write_text("old", encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_writing_replaces_the_old_one_and_leaves_nothing_else(kind: str, tmp_path: Path) -> None:
    path = old_one(tmp_path, kind)
    with writing(path) as part:
        fill(part, kind)
        assert part.parent == path.parent  # the same disk, so that the rename cannot fail half-way
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]
    assert ((path / "one.txt") if kind == "folder" else path).read_text(encoding="utf-8") == "new"
    assert not (path / "kept.txt").exists()  # a folder is replaced, not mixed


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_exception_in_the_middle_leaves_the_old_one(kind: str, tmp_path: Path) -> None:
    path = old_one(tmp_path, kind)
    before = sha256(path)
    with pytest.raises(ZeroDivisionError), writing(path) as part:
        fill(part, kind)
        _ = 1 / 0
    assert sha256(path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_kill_in_the_middle_leaves_the_old_one(kind: str, tmp_path: Path, repository: Path) -> None:
    path = old_one(tmp_path, kind)
    before = sha256(path)
    code = f"""
import os, signal, sys
sys.path[:0] = [{str(repository)!r}, {str(repository / "tests")!r}]
from test_run import fill
from pathlib import Path
from stakelib.run import writing
with writing(Path({str(path)!r})) as part:
    fill(part, {kind!r})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert sha256(path) == before
    with writing(path) as part:  # what the killed one left behind is in nobody's way
        fill(part, kind)
    assert sha256(path) != before


def test_a_folder_that_cannot_take_its_place_gives_it_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = old_one(tmp_path, "folder")
    before, replace, refused = sha256(path), os.replace, []

    def refuse(source: Path, target: Path) -> None:
        if source.suffix == ".part" and len(refused) < 21:
            refused.append(source)
            raise PermissionError("another program holds a file in it")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError), writing(path) as part:
        fill(part, "folder")
    assert sha256(path) == before
    del refused[3:]  # a virus scanner lets go after a moment
    refused += [path] * 15
    with writing(path) as part:
        fill(part, "folder")
    assert sha256(path) != before
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_text_is_utf8_with_unix_line_ends_and_json_is_finite(tmp_path: Path) -> None:
    assert atomic_write_text(tmp_path / "new" / "a.txt", "é\n").read_bytes() == b"\xc3\xa9\n"
    file = atomic_write_json(tmp_path / "a.json", {"x": [1, 2.5, "é"]})
    assert json.loads(file.read_text(encoding="utf-8")) == {"x": [1, 2.5, "é"]}
    with pytest.raises(ValueError, match="JSON compliant"):
        atomic_write_json(file, {"x": float("nan")})
    assert json.loads(file.read_text(encoding="utf-8")) == {"x": [1, 2.5, "é"]}


def test_sha256_of_a_folder_sees_contents_names_and_places(tmp_path: Path) -> None:
    def folder(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            atomic_write_text(tmp_path / name / file, text)
        return sha256(tmp_path / name)

    first = folder("a", {"x.txt": "1", "in/y.txt": "2"})
    assert folder("b", {"in/y.txt": "2", "x.txt": "1"}) == first  # its own name and the order do not count
    others = [{"z.txt": "1", "in/y.txt": "2"}, {"x.txt": "1", "y.txt": "2"}, {"x.txt": "2", "in/y.txt": "1"}]
    assert len({first, *(folder(f"c{i}", files) for i, files in enumerate(others))}) == 4
    known = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # of "hello", as everywhere
    assert sha256(atomic_write_text(tmp_path / "hello", "hello")) == known


# ------------------------------------------------------------------------------------------------- stages


class Stage:
    """A stage of one input and one output that counts how often it worked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.worked, self.settings = folder, 0, {"rate": 0.5, "targets": ("q", "v")}
        self.input = atomic_write_text(folder / "in.txt", "given")
        self.output = folder / "deep" / "out.txt"

    def work(self) -> dict[str, Any]:
        self.worked += 1
        atomic_write_text(self.output, f"made from {self.input.read_text(encoding='utf-8')}")
        return {"loss": [1, 2.5], "attempt": self.worked}

    def __call__(self) -> dict[str, Any]:
        """A new Run each time, as in a new process: only what is on disk counts."""
        return Run.open(self.folder, "smoke").stage("test", self.settings, [self.input], [self.output], self.work)


@pytest.fixture()
def stage(home: Path) -> Stage:
    return Stage(home / "run")


def test_an_unchanged_stage_is_skipped_and_gives_its_result_again(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    first = stage()
    assert "up to date" not in capsys.readouterr().out
    assert stage() == first == {"loss": [1, 2.5], "attempt": 1}
    assert stage.worked == 1
    assert "test: up to date" in capsys.readouterr().out


CHANGES = {
    "setting": lambda s: s.settings.update(rate=0.25),
    "targets": lambda s: s.settings.update(targets=("q",)),
    "new setting": lambda s: s.settings.update(more=1),
    "input": lambda s: s.input.write_text("other", encoding="utf-8"),
    "output edited": lambda s: s.output.write_text("made from giveN", encoding="utf-8"),
    "output cut short": lambda s: s.output.write_text("made", encoding="utf-8"),
    "output gone": lambda s: s.output.unlink(),
    "another output": lambda s: setattr(s, "output", s.folder / "other.txt"),
}
NO_CHANGES = {
    "same setting": lambda s: s.settings.update(rate=0.5, targets=["q", "v"]),
    "input touched": lambda s: os.utime(s.input, (1, 1)),
    "output touched": lambda s: os.utime(s.output, (1, 1)),
    "another file": lambda s: atomic_write_text(s.folder / "note.txt", "mine"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_the_stage_work_again_once(change: str, stage: Stage) -> None:
    stage()
    CHANGES[change](stage)
    assert stage()["attempt"] == 2
    assert stage.output.read_text(encoding="utf-8") == f"made from {stage.input.read_text(encoding='utf-8')}"
    assert stage()["attempt"] == 2


@pytest.mark.parametrize("change", NO_CHANGES)
def test_what_is_no_change_is_not_taken_for_one(change: str, stage: Stage) -> None:
    stage()
    NO_CHANGES[change](stage)
    assert stage()["attempt"] == 1


def test_a_run_folder_can_move(stage: Stage, home: Path) -> None:
    stage()
    stage.folder.rename(home / "elsewhere")
    moved = Stage(home / "elsewhere")
    assert moved()["attempt"] == 1
    assert moved.worked == 0


def test_a_stage_that_fails_is_not_recorded_and_keeps_the_others(stage: Stage) -> None:
    stage()
    run = Run.open(stage.folder, "smoke")

    def fail() -> dict[str, Any]:
        raise CourseError("row 3 is wrong", "mend row 3")

    with pytest.raises(CourseError, match="mend row 3"):
        run.stage("other", {}, [], [], fail)
    assert set(Run.open(stage.folder, "smoke").record["stages"]) == {"test"}


def test_missing_files_are_named_all_at_once(stage: Stage) -> None:
    run = Run.open(stage.folder, "smoke")
    wanted = [stage.folder / "a.jsonl", stage.folder / "in" / "b.jsonl"]
    with pytest.raises(CourseError, match="the notebook before") as problem:
        run.stage("x", {}, wanted, [], lambda: pytest.fail("worked without its inputs"))
    assert problem.value.problems == ["a.jsonl is missing", "in/b.jsonl is missing"]
    with pytest.raises(CourseError, match=r"- c\.txt was not written"):
        run.stage("x", {}, [], [stage.folder / "c.txt"], dict)
    assert not (stage.folder / "run.json").exists()


def test_what_another_process_finished_is_neither_redone_nor_lost(stage: Stage) -> None:
    one, other = (Run.open(stage.folder, "smoke") for _ in range(2))
    out = stage.folder / "long.txt"
    other.stage("long", {}, [], [out], lambda: {"seconds": len(atomic_write_text(out, "x").name)})
    one.remember(machine={"cores": 2})
    assert one.stage("long", {}, [], [out], lambda: pytest.fail("done again")) == {"seconds": 8}
    other.stage("short", {}, [], [], dict)
    one.stage("next", {}, [], [], dict)
    assert set(Run.open(stage.folder, "smoke").record["stages"]) == {"long", "short", "next"}


def test_the_record_says_how_long_and_how_much(stage: Stage) -> None:
    stage()
    record = json.loads((stage.folder / "run.json").read_text(encoding="utf-8"))
    saved = record["stages"]["test"]
    assert saved["outputs"]["deep/out.txt"] == {"sha256": sha256(stage.output), "bytes": stage.output.stat().st_size}
    assert saved["inputs"] == {"in.txt": sha256(stage.input)}
    assert saved["seconds"] >= 0 and saved["peak_mb"] > 5
    assert record["format"] == FORMAT and record["profile"]["name"] == "smoke"
    assert record["versions"]["torch"].startswith("2.")


def test_peak_memory_sees_what_was_given_back_before_the_end() -> None:
    """In a process of its own: one that freed much before takes the block from there and does not grow."""
    code = """
from stakelib.run import PeakMemory
with PeakMemory() as memory:
    block = bytearray(b"x" * (200 << 20))
    memory._done.wait(0.7)
    del block
with PeakMemory() as idle:
    pass
print(memory.peak_mb - idle.peak_mb)"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True, cwd=Path(__file__).parents[1]
    )
    assert 150 < float(done.stdout) < 500


# ------------------------------------------------------------------------------------------------- opening a run


BROKEN = {
    "cut": '{"format": 1, "profile": {"na',
    "empty": "",
    "list": "[1]",
    "text": '"run"',
    "bytes": b"\xff\xfe{}",
    "no profile": json.dumps({"format": FORMAT, "stages": {}}),
    "profile is text": json.dumps({"format": FORMAT, "profile": "smoke", "stages": {}}),
}


@pytest.mark.parametrize("kind", [*BROKEN, "no stages"])
def test_a_broken_record_is_named_and_kept(kind: str, stage: Stage) -> None:
    stage()
    file = stage.folder / "run.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    record.pop("stages")
    text = BROKEN.get(kind, json.dumps(record))
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert_refused(stage, [str(file), "cannot be read"], "restore it from a copy, or choose another folder with --out")


def assert_refused(stage: Stage, words: list[str], action: str, **asked: str) -> None:
    """Opening fails with these words and leaves every file as it was."""
    before = sha256(stage.folder)
    with pytest.raises(CourseError) as problem:
        Run.open(stage.folder, **{"profile": "smoke", **asked})
    assert [w for w in words if w not in "\n".join(problem.value.problems)] == []
    assert problem.value.next_action.startswith(action)
    assert str(problem.value).endswith(f"What to do next: {problem.value.next_action}")
    assert sha256(stage.folder) == before


def test_a_record_of_another_format_or_run_is_refused_and_kept(stage: Stage) -> None:
    stage()
    file = stage.folder / "run.json"
    words = [str(file), "name is 'smoke', you asked for 'quick'", "rows is 63, you asked for 500"]
    assert_refused(stage, words, "choose another folder", profile="quick")
    assert_refused(stage, ["model is 'tiny-gemma', you asked for 'gemma-3-270m'"], "choose", model="gemma-3-270m")
    assert stage() == {"loss": [1, 2.5], "attempt": 1}  # the twin: the same run is continued
    record = json.loads(file.read_text(encoding="utf-8"))
    atomic_write_json(file, {**record, "format": FORMAT + 1})
    assert_refused(stage, [str(file), f"has format {FORMAT + 1}"], "choose another folder with --out, or move")


def test_an_unknown_profile_is_refused_before_a_folder_is_made(home: Path) -> None:
    with pytest.raises(CourseError, match="profile 'huge' is unknown(.|\n)*smoke, quick, report, full"):
        Run.open(home / "r", "huge")
    assert list(home.iterdir()) == []


def test_where_a_run_lies_by_default(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = home / "runs"
    assert default_folder("quick") == default_folder("quick", "smollm2-135m") == runs / "quick"
    assert default_folder("quick", "gemma-3-270m") == runs / "quick-gemma-3-270m"
    assert default_folder("quick", str(home / "my-model")) == runs / "quick-my-model"
    monkeypatch.setenv("STAKE_PROFILE", "smoke")
    opened = Run.open
    assert (opened().folder, opened().profile.rows) == (runs / "smoke", 63)
    assert opened(profile="report").folder == runs / "report"
    monkeypatch.delenv("STAKE_PROFILE")
    assert opened().profile.name == "quick"
    monkeypatch.delenv("STAKE_RUN_ROOT")
    assert default_folder("quick") == Path(run_module.__file__).parents[1] / "runs" / "quick"


# ------------------------------------------------------------------------------------------------- progress


@pytest.fixture()
def watch(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that the test moves, and the lines that were said."""
    seen = SimpleNamespace(now=1000.0, lines=[])
    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: seen.now))
    return seen


def test_progress_speaks_at_once_then_every_few_seconds_and_at_the_end(watch: SimpleNamespace) -> None:
    progress = Progress("training", 40, "steps", every=10, say=watch.lines.append)
    for done in range(41):
        progress.tick(done, "loss 1.0")
        watch.now += 2
    assert watch.lines[0] == "training: 0/40 steps  loss 1.0"
    assert watch.lines[1] == "training: 5/40 steps, about 70 s left  loss 1.0"
    assert watch.lines[-1] == "training: 40/40 steps  loss 1.0"
    assert len(watch.lines) == 8


def test_an_hour_of_work_says_so_once_a_minute_and_not_three_hundred_times(watch: SimpleNamespace) -> None:
    said: list[float] = []
    progress = Progress("training", 1800, "steps", every=10, say=lambda line: said.append(watch.now))
    for done in range(1801):
        progress.tick(done)
        watch.now += 2
    assert len(said) < 80 and max(b - a for a, b in itertools.pairwise(said)) <= 62


def test_work_of_an_earlier_run_does_not_count_as_speed(watch: SimpleNamespace) -> None:
    progress = Progress("training", 100, "steps", every=10, say=watch.lines.append)
    progress.tick(90)
    watch.now += 20
    progress.tick(91)
    assert watch.lines == ["training: 90/100 steps", "training: 91/100 steps, about 3 min left"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "0 s"), (89.4, "89 s"), (91, "2 min"), (720, "12 min"), (119 * 60, "119 min"), (12_000, "3 h 20 min")],
)
def test_clock_reads_as_a_person_says_it(seconds: float, said: str) -> None:
    assert clock(seconds) == said


def test_course_error_lists_everything_and_the_next_action() -> None:
    error = CourseError(["a.txt is missing", "row 7: no prompt"], "mend them")
    assert str(error) == "- a.txt is missing\n- row 7: no prompt\nWhat to do next: mend them"
    assert CourseError("one", "x").problems == ["one"]
