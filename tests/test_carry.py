"""A run as one file: what arrives is what was packed, or nothing arrives."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from stakelib.carry import LIST, pack, unpack
from stakelib.run import CourseError, Run, sha256


def made_run(folder: Path) -> Run:
    """A run with one finished stage, a large-ish file and a leftover that belongs to this machine."""
    run = Run.open(folder, "smoke")
    source, made = run.path("training_data", "train.jsonl"), run.path("models", "x-lora", "adapter_model.safetensors")
    source.write_text('{"prompt": "Où?"}\n', encoding="utf-8")

    def work() -> dict[str, int]:
        made.write_bytes(bytes(range(256)) * 40)
        return {"rows": 1}

    run.stage("train", {"rank": 8}, [source], [made.parent], work)
    (folder / ".lock").write_text("[1, 2]", encoding="utf-8")
    return run


def test_a_run_goes_on_where_it_was_unpacked(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(home / "here" / "quick")
    count = pack(run.folder, home / "quick.zip")
    assert unpack(home / "quick.zip", home / "there" / "other name") == count == 3
    moved = Run.open(home / "there" / "other name", "smoke")
    assert not (moved.folder / ".lock").exists()
    names = {p.relative_to(run.folder) for p in run.folder.rglob("*") if p.is_file() and p.name != ".lock"}
    assert {p.relative_to(moved.folder) for p in moved.folder.rglob("*") if p.is_file()} == names
    assert all(sha256(run.folder / n) == sha256(moved.folder / n) for n in names)

    def stage(work: str) -> dict[str, int]:
        source, made = moved.path("training_data", "train.jsonl"), moved.path("models", "x-lora")
        return moved.stage("train", {"rank": 8}, [source], [made], lambda: pytest.fail(work))

    assert stage("it was done on the other machine") == {"rows": 1}
    assert "train: up to date" in capsys.readouterr().out
    moved.path("training_data", "train.jsonl").write_text("changed\n", encoding="utf-8")
    with pytest.raises(pytest.fail.Exception, match="must be made again"):  # the twin
        stage("must be made again")


def spoiled(file: Path, changes: dict[str, bytes | None], target: Path) -> Path:
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(target, "w") as new:
        kept = {n: old.read(n) for n in old.namelist()} | changes
        for name, data in kept.items():
            if data is not None:
                new.writestr(name, data)
    return target


def test_a_damaged_or_hostile_file_leaves_nothing_behind(home: Path) -> None:
    run = made_run(home / "here")
    good = home / "good.zip"
    pack(run.folder, good)
    with zipfile.ZipFile(good) as archive:
        names = json.loads(archive.read(LIST))
    out = [{**names, "../evil.txt": "0"}, {**names, "/etc/evil": "0"}, {**names, "C:evil": "0"}, {**names, "a\\b": "0"}]
    cases = [
        ({"models/x-lora/adapter_model.safetensors": b"other"}, "adapter_model.safetensors is not what was packed"),
        ({"run.json": None}, "'run.json' is not on its own list"),
        ({"extra.py": b"print(1)"}, "'extra.py' is not on its own list"),
        ({LIST: None}, "cannot be read"),
        ({LIST: b"not json"}, "cannot be read"),
        *(({LIST: json.dumps(o).encode(), list(o)[-1]: b"x"}, "leads out of the folder") for o in out),
    ]
    for number, (changes, said) in enumerate(cases):
        bad, there = spoiled(good, changes, home / f"bad{number}.zip"), home / f"there{number}"
        with pytest.raises(CourseError, match=said):
            unpack(bad, there)
        assert not there.exists() and not list(home.glob(".there*"))
    cut = home / "cut.zip"
    cut.write_bytes(good.read_bytes()[:-200])
    with pytest.raises(CourseError, match=r"cut\.zip cannot be read(.|\n)*copy it again"):
        unpack(cut, home / "there")
    with pytest.raises(CourseError, match="here is not empty"):
        unpack(good, run.folder)
    with pytest.raises(CourseError, match="holds no run"):
        pack(home, home / "x.zip")
    assert unpack(good, home / "fine") == len(names)


def test_the_launcher_packs_and_unpacks_without_set_up(home: Path, repository: Path) -> None:
    run = made_run(home / "mine")

    def course(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", "-E", str(repository / "course.py"), *arguments]  # -S: no installed packages
        return subprocess.run(command, capture_output=True, encoding="utf-8", cwd=home)

    assert "3 files: mine -> " in course("pack", "mine").stdout
    done = course("unpack", "mine.zip", "--out", "copy")
    assert (done.returncode, sha256(home / "copy" / "run.json")) == (0, sha256(run.folder / "run.json"))
    again = course("unpack", "mine.zip", "--out", "copy")
    assert again.returncode == 2 and "copy is not empty" in again.stdout and "Traceback" not in again.stderr
