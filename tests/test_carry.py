"""A run as one file: what arrives is what was packed, or nothing arrives."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from stakelib.carry import LIST, pack, unpack
from stakelib.run import CourseError, Run, atomic_write_json, atomic_write_text, link, sha256


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
    names = {p.relative_to(run.folder) for p in run.folder.rglob("*") if p.is_file() and p.suffix != ".lock"}
    names -= {Path(".lock")}
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


def test_one_flipped_byte_is_told_as_damage(home: Path) -> None:
    """zlib, struct and the zip format complain each in its own way, a changed file by its sum; or nothing was hit."""
    run = made_run(home / "here")
    good = home / "good.zip"
    pack(run.folder, good)
    data, wanted, refused = good.read_bytes(), sha256(run.folder / "run.json"), 0
    for place in range(0, len(data), 23):
        bad, there = home / "bad.zip", home / f"there{place}"
        bad.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        try:
            unpack(bad, there)
            assert sha256(there / "run.json") == wanted
        except CourseError as problem:
            refused += 1
            assert "What to do next" in str(problem) and not there.exists()
        assert not list(home.glob(".there*"))
    assert refused > 20


def test_the_same_model_in_three_places_is_packed_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made_run(home / "here")
    model = run.path("models", "x-q8.gguf")
    model.write_bytes(os.urandom(200_000))
    names = ["models/x-q8.gguf", "product/x-q8.gguf", "page/model.gguf"]
    for name in names[1:]:
        link(model, run.path(*name.split("/")))
    texts = ["training_data/valid.jsonl", "voices/a/training_data/valid.jsonl"]
    for name in texts:
        run.path(*name.split("/")).write_text("the same rows\n", encoding="utf-8")
    pack(run.folder, home / "x.zip")
    assert (home / "x.zip").stat().st_size < 250_000
    for number, links in enumerate((True, False)):
        if not links:
            monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links on FAT")))
        there = home / f"there{number}"
        assert unpack(home / "x.zip", there) == len([p for p in there.rglob("*") if p.is_file()])
        assert all(sha256(there / n) == sha256(run.folder / n) for n in (*names, *texts))
        assert (there / names[0]).samefile(there / names[2]) == links
        assert not (there / texts[0]).samefile(there / texts[1])  # a person may edit one of them
    with zipfile.ZipFile(home / "x.zip") as archive:
        held = next(n for n in archive.namelist() if n in names)
    bad = spoiled(home / "x.zip", {held: None}, home / "bad.zip")
    with pytest.raises(CourseError, match="is not on its own list"):
        unpack(bad, home / "nowhere")


def test_checkpoints_of_abandoned_settings_and_locks_are_not_packed(home: Path) -> None:
    run = made_run(home / "here")
    training = run.path("training")
    for age, key in enumerate(["c", "b", "a", "trial-1-d"]):
        begun = atomic_write_json(training / f"checkpoints-{key}" / "begun.json", {"processor": "x"})
        (begun.parent / "checkpoint-4").mkdir()
        (begun.parent / "checkpoint-4" / "optimizer.pt").write_bytes(b"x" + key.encode())
        os.utime(begun, (10**9 - age, 10**9 - age))
    (training / "x-lora.lock").write_bytes(b"")
    pack(run.folder, home / "x.zip")
    unpack(home / "x.zip", home / "there")
    kept = sorted(p.name for p in (home / "there" / "training").iterdir())
    assert kept == ["checkpoints-c", "checkpoints-trial-1-d"]
    assert (home / "there" / "training" / "checkpoints-c" / "checkpoint-4" / "optimizer.pt").read_bytes() == b"xc"


def test_files_of_any_age_are_packed(home: Path) -> None:
    run = made_run(home / "here")
    for number, year in enumerate((0, 4_000_000_000 * 2)):
        os.utime(atomic_write_text(run.path(f"{number}.txt"), "x"), (year, year))
    assert pack(run.folder, home / "x.zip") == unpack(home / "x.zip", home / "there") == 5


@pytest.mark.parametrize("problem", [errno.ENOSPC, errno.EFBIG, errno.EACCES])
def test_a_disk_that_takes_no_file_is_named(home: Path, monkeypatch: pytest.MonkeyPatch, problem: int) -> None:
    run = made_run(home / "here")
    pack(run.folder, home / "x.zip")
    before = (home / "x.zip").read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(problem, os.strerror(problem))

    said = "is full" if problem == errno.ENOSPC else r"x\.zip cannot be written(.|\n)*--out"
    with monkeypatch.context() as patch, pytest.raises(CourseError, match=said):
        patch.setattr(zipfile.ZipFile, "write", fail)
        pack(run.folder, home / "x.zip")
    assert (home / "x.zip").read_bytes() == before and not list(home.glob(".x.zip*"))
    monkeypatch.setattr(shutil, "copyfileobj", fail)
    with pytest.raises(CourseError, match="is full" if problem == errno.ENOSPC else "cannot be read"):
        unpack(home / "x.zip", home / "there")
    assert not (home / "there").exists()


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
