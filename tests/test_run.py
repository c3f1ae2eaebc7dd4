"""The run folder: nothing half-written, nothing made twice, nothing of somebody else's continued or deleted."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any

import pytest
from full_disk import FullDisk

import stakelib.dialogues  # noqa: F401
from stakelib import run as run_module
from stakelib.models.catalog import cache_folder
from stakelib.run import (
    FORMAT,
    CourseError,
    Progress,
    Run,
    append_line,
    as_folder,
    atomic_write_json,
    atomic_write_text,
    clock,
    default_folder,
    hold,
    sha256,
    writing,
)

prepare_module = sys.modules["stakelib.dialogues.prepare"]  # the package exports the function under this name

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


def test_sha256_of_a_folder_is_the_same_on_every_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("README.md", "adapter_config.json", "a/x", "a-b/x", "B/x", "Z.txt")
    for name in names:
        atomic_write_text(tmp_path / "f" / name, name)
    lines = (f"{n}\0{hashlib.sha256(n.encode()).hexdigest()}\n" for n in sorted(names, key=lambda n: n.split("/")))
    wanted = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert sha256(tmp_path / "f") == wanted
    rules_here = prepare_module.rules()
    monkeypatch.setattr(PurePath, "__lt__", lambda a, b: str(a).lower() < str(b).lower())  # as Windows sorts paths
    assert sorted([Path("README"), Path("a")]) == [Path("a"), Path("README")]
    assert sha256(tmp_path / "f") == wanted
    assert prepare_module.rules() == rules_here


@pytest.mark.parametrize("moment", ["after the first rename", "before the first rename", "after the second rename"])
def test_a_power_cut_between_two_renames_loses_no_folder(moment: str, home: Path) -> None:
    """What a killed process of this number left; the next start puts the old folder back, and only then."""
    run = Run.open(home / "run", "smoke")
    path = old_one(run.path("models"), "folder") if run.path("models").mkdir() is None else home
    before, dead = sha256(path), 2**22 + 12345
    part, old = (path.with_name(f".thing.{dead}-0123abcd{end}") for end in (".part", ".old"))
    fill(part, "folder")
    if moment == "after the first rename":
        path.rename(old)
    if moment == "after the second rename":
        path.rename(old)
        part.rename(path)
    Run.open(run.folder, "smoke")
    assert [p.name for p in path.parent.iterdir()] == ["thing"]
    assert (sha256(path) == before) == (moment != "after the second rename")
    assert (path / ("one.txt" if moment == "after the second rename" else "kept.txt")).exists()


def test_a_number_that_another_process_has_got_since_loses_no_folder(home: Path) -> None:
    run = Run.open(home / "run", "smoke")
    old = run.path(f".thing.{os.getppid()}-0123abcd.old")
    fill(old, "folder")
    Run.open(run.folder, "smoke")
    assert [p.name for p in run.folder.iterdir()] == ["thing"]


# ------------------------------------------------------------------------------------------------- a full disk

FULL = {
    "written by us": OSError(errno.ENOSPC, "No space left on device"),
    "a quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "safetensors": ValueError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "Windows": OSError("[WinError 112] There is not enough space on the disk"),
    "a converter": CourseError(["the converter failed", "OSError: [Errno 28] No space left on device"], "report it"),
}
WORDLESS = {
    "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    "a stream": RuntimeError("basic_ios::clear: iostream error"),
    "numpy": OSError("4096 requested and 0 written"),
    "a converter": CourseError("the converter failed", "report it"),
}


@pytest.mark.parametrize(
    "problem", [*FULL.values(), *WORDLESS.values()], ids=[*FULL, *(f"{n}, wordless" for n in WORDLESS)]
)
def test_a_full_disk_is_named_whoever_notices(
    problem: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = old_one(tmp_path, "folder")
    before = sha256(path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3000))
    with pytest.raises(CourseError, match="is full, with 0.0 MB free") as told, writing(path) as part:
        fill(part, "folder")
        raise problem
    assert str(tmp_path) in str(told.value) and "make room on that disk" in told.value.next_action
    assert sha256(path) == before and not list(tmp_path.glob(".*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**10))
    with pytest.raises(Exception, match=".") as told, writing(path):
        raise problem
    assert ("is full" in str(told.value)) == (problem in FULL.values())  # the twin: there is room, so it is not that


def test_a_full_disk_that_a_child_process_has_told_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3000))
    with pytest.raises(CourseError) as first, writing(tmp_path / "x"):
        raise FULL["written by us"]
    again = CourseError(first.value.problems, first.value.next_action)  # as it comes through a pipe
    with pytest.raises(CourseError) as told, writing(tmp_path / "x"):
        raise again
    assert told.value is again and told.value.next_action.count("make room") == 1


def test_a_full_disk_of_another_place_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    monkeypatch.setattr(shutil, "disk_usage", lambda p: SimpleNamespace(free=0 if Path(p) == elsewhere else 10**10))
    with pytest.raises(CourseError, match=rf"disk of {re.escape(str(elsewhere))} is full"), writing(tmp_path / "x"):
        raise RuntimeError("iostream error")


def test_a_line_is_added_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "votes.jsonl"
    append_line(file, "first")
    with monkeypatch.context() as patch, pytest.raises(CourseError, match="is full"):
        FullDisk(tmp_path, 1).plant(patch)
        append_line(file, "é" * 50_000)
    append_line(file, "second")
    assert file.read_text(encoding="utf-8") == "first\nsecond\n"


# ------------------------------------------------------------------------------------------------- locks

HOLDS = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from stakelib.run import hold
with hold(Path({file!r}), "taken", "wait"):
    print("HELD", flush=True)
    time.sleep(600)
"""


def test_a_lock_belongs_to_one_living_process(tmp_path: Path, repository: Path) -> None:
    lock = tmp_path / "deep" / ".lock"
    command = [sys.executable, "-c", HOLDS.format(root=str(repository), file=str(lock))]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") for _ in range(2)]
    try:  # of two that start at the same moment one gets it
        assert others[0].stdout is not None and others[1].stdout is not None
        ended = next(i for i in itertools.cycle((0, 1)) if others[i].poll() is not None or time.sleep(0.05))
        holder = others[1 - ended]
        assert holder.stdout is not None and holder.stdout.readline() == "HELD\n"
        with pytest.raises(CourseError, match=rf"taken \(process {holder.pid}, since 2"), hold(lock, "taken", "wait"):
            pytest.fail("two at once")
    finally:
        for other in others:
            other.kill()  # the system lets go of the lock, whatever the clock says
            other.communicate()
    lock.write_text(f"[{os.getpid()}, 1e12]", encoding="utf-8")  # of an older version, or half written
    with contextlib.ExitStack() as stack:
        stack.enter_context(hold(lock, "taken", "wait"))
        with pytest.raises(CourseError, match=rf"process {os.getpid()}"):
            stack.enter_context(hold(lock, "taken", "wait"))
    with hold(lock, "taken", "wait"):
        pass


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


def test_what_a_person_changed_in_an_output_is_kept(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    stage()
    edits = [f"mine {n}" for n in range(3)]
    for text in (edits[0], edits[1], edits[1], edits[2]):
        stage.output.write_text(text, encoding="utf-8")
        stage()
        assert "kept as deep/out.txt.edited" in capsys.readouterr().out
    kept = sorted(stage.output.parent.glob("out.txt.edited*"))
    assert [p.read_text(encoding="utf-8") for p in kept] == edits  # one each, however often
    stage.input.write_text("other", encoding="utf-8")  # the twin: the course's own old text is no edit
    stage()
    stage.settings.update(rate=3)
    stage()
    assert sorted(stage.output.parent.glob("out.txt.edited*")) == kept
    assert "kept" not in capsys.readouterr().out


def test_rows_that_a_person_changed_point_to_the_review(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = Stage(home / "run")
    stage.output = stage.folder / "training_data" / "train.jsonl"
    stage()
    stage.output.write_text("mine", encoding="utf-8")
    stage()
    line = next(x for x in capsys.readouterr().out.splitlines() if "train.jsonl.edited" in x)
    assert "notebook 02" in line
    assert stage.output.with_name("train.jsonl.edited").read_text(encoding="utf-8") == "mine"


def test_a_person_s_text_is_kept_when_the_work_fails_and_what_failed_work_wrote_is_not(stage: Stage) -> None:
    """As `prepare` does it: rows that a gate refuses are written, and the stage fails."""
    stage()
    work, kept = stage.work, stage.output.with_name("out.txt.edited")

    def fail() -> dict[str, Any]:
        work()
        raise CourseError("a gate refuses row 3", "mend it")

    stage.work = fail
    for rate in (1, 2, 3):
        stage.settings.update(rate=rate)
        stage.input.write_text(f"given {rate}", encoding="utf-8")
        with pytest.raises(CourseError, match="row 3"):
            stage()
        assert not kept.exists()
    stage.output.write_text("mine", encoding="utf-8")
    stage.work = lambda: pytest.fail("before it wrote anything")
    with pytest.raises(pytest.fail.Exception):
        stage()
    assert stage.output.read_text(encoding="utf-8") == "mine" and not kept.exists()
    stage.work = work
    stage()
    assert kept.read_text(encoding="utf-8") == "mine"


def test_a_file_that_was_there_before_the_first_run_is_kept(stage: Stage) -> None:
    atomic_write_text(stage.output, "mine")
    stage()
    assert stage.output.with_name("out.txt.edited").read_text(encoding="utf-8") == "mine"


def test_a_killed_stage_that_is_done_again_leaves_nothing_beside(stage: Stage) -> None:
    stage.work()  # and killed before it was on record
    stage()
    assert [p.name for p in stage.output.parent.iterdir()] == ["out.txt"]


def test_changed_texts_of_a_folder_are_kept_and_weights_are_not(home: Path) -> None:
    run, folder = Run.open(home / "run", "smoke"), home / "run" / "models" / "x-lora"

    def work() -> dict[str, Any]:
        with writing(folder) as part:
            part.mkdir()
            (part / "README.md").write_text("card", encoding="utf-8")
            (part / "config.json").write_text("{}", encoding="utf-8")
            (part / "adapter_model.safetensors").write_bytes(b"weights")
        return {}

    def again(rate: int) -> None:
        Run.open(run.folder, "smoke").stage("train", {"rate": rate}, [], [folder], work)

    again(1)
    again(2)
    kept = folder.with_name("x-lora.edited")
    assert not kept.exists()
    (folder / "README.md").write_text("my card", encoding="utf-8")
    (folder / "notes.txt").write_text("my notes", encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(b"spoiled")
    again(2)
    texts = {p.name: p.read_text(encoding="utf-8") for p in kept.iterdir()}
    assert texts == {"README.md": "my card", "notes.txt": "my notes"}
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "adapter_model.safetensors", "config.json"]


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


def test_facts_of_another_open_notebook_are_kept(stage: Stage) -> None:
    one, other = (Run.open(stage.folder, "smoke") for _ in range(2))
    one.remember(machine={"cores": 2}, shared="old")
    other.remember(mlx={"done": "proved"}, shared="new")
    one.stage("next", {}, [], [], dict)
    other.remember(k_quants="none")
    record = Run.open(stage.folder, "smoke").record
    assert (record["machine"], record["mlx"], record["k_quants"]) == ({"cores": 2}, {"done": "proved"}, "none")
    assert record["shared"] == "new" and "next" in record["stages"]


WRITES = """
import sys
sys.path.insert(0, {root!r})
from stakelib.run import Run
run = Run.open({folder!r}, "smoke")
for n in range(10):
    run.remember(**{{f"{name}{{n}}": n}})
"""


def test_two_processes_that_write_the_record_at_once_lose_nothing(home: Path, repository: Path) -> None:
    codes = [WRITES.format(root=str(repository), folder=str(home / "run"), name=name) for name in ("a", "b", "c")]
    processes = [subprocess.Popen([sys.executable, "-c", code]) for code in codes]
    assert [p.wait(60) for p in processes] == [0, 0, 0]
    record = Run.open(home / "run", "smoke").record
    assert [n for n in (f"{name}{i}" for name in "abc" for i in range(10)) if n not in record] == []


def test_each_stage_remembers_the_versions_that_made_it(stage: Stage) -> None:
    stage()
    again = Run.open(stage.folder, "smoke")
    again.record["versions"] = {"torch": "9.9"}
    again.stage("later", {}, [], [], dict)
    record = json.loads((stage.folder / "run.json").read_text(encoding="utf-8"))
    assert record["stages"]["test"]["versions"]["torch"].startswith("2.")
    assert record["stages"]["later"]["versions"] == record["versions"] == {"torch": "9.9"}


def test_long_settings_are_on_record_as_their_sha256(stage: Stage) -> None:
    stage.settings["scenarios"] = [{"name": f"scenario {n}", "mw": n / 7} for n in range(2000)]
    stage()
    file = stage.folder / "run.json"
    assert file.stat().st_size < 4000
    assert json.loads(file.read_text(encoding="utf-8"))["stages"]["test"]["settings"]["rate"] == 0.5
    assert stage()["attempt"] == 1
    stage.settings["scenarios"][1999]["mw"] += 1
    assert stage()["attempt"] == 2
    record = json.loads(file.read_text(encoding="utf-8"))
    record["stages"]["test"]["settings"] = json.loads(json.dumps(stage.settings))  # as older versions wrote it
    atomic_write_json(file, record)
    assert stage()["attempt"] == 2


@pytest.mark.parametrize("kind", ["cut", "empty", "list", "bytes"])
def test_a_record_that_breaks_during_a_run_is_named_and_kept(kind: str, stage: Stage) -> None:
    run = Run.open(stage.folder, "smoke")
    run.remember(a=1)
    broken, file = BROKEN[kind], stage.folder / "run.json"
    file.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    before = file.read_bytes()
    for work in (lambda: run.remember(b=2), lambda: run.stage("x", {}, [], [], dict)):
        with pytest.raises(CourseError, match=r"run\.json cannot be read(.|\n)*restore it from a copy"):
            work()
        assert file.read_bytes() == before


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


@pytest.mark.parametrize("name", ["STAKE_CACHE", "STAKE_RUN_ROOT"])
def test_folders_may_be_given_with_a_tilde_relative_or_empty(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(run_module.__file__).parents[1]
    monkeypatch.chdir(tmp_path)

    def place() -> Path:
        return cache_folder() if name == "STAKE_CACHE" else default_folder("smoke").parent

    home = Path.home()
    usual = root / (".cache" if name == "STAKE_CACHE" else "runs")
    for given, wanted in (("~/x", home / "x"), ("x", tmp_path / "x"), ("", usual), (" ", usual), ("/x", Path("/x"))):
        monkeypatch.setenv(name, given)
        assert place() == Path(os.path.abspath(wanted)), given
    monkeypatch.delenv(name)
    assert place() == usual
    assert Run.open("~/nowhere/x", "smoke").folder == home / "nowhere" / "x"
    nothing = ""
    assert Run.open(nothing, "smoke").folder == default_folder("smoke")
    assert as_folder(None) is None


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
