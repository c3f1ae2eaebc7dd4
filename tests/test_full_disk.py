"""A disk that is full at every single write: nothing that was there is damaged, and the same work goes on with room."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from full_disk import FullDisk

from stakelib.carry import pack, unpack
from stakelib.dialogues import Review, build, split, write
from stakelib.dialogues.files import write_rows
from stakelib.dialogues.review import GENERATED
from stakelib.run import CourseError, Run, append_line, atomic_write_text, link, sha256, writing
from stakelib.scenarios import sample

ROWS = split(build(sample(9, seed=1), 18))
RECORDS = ("run.json", "state.json", ".lock")  # hold times, or random names


def cheap_course(place: Path, turn: int) -> None:
    """What a run writes, without a model: rows, a review, votes, weights, a report, a folder to hand on, a packed run.

    `turn`: 0 or 1, the second time with other rows and decisions.
    """
    run = Run.open(place / "run", "smoke")
    run.remember(machine={"cores": 2 + turn})
    folder, rows = run.path("training_data"), ROWS[turn:]
    folder.mkdir(parents=True, exist_ok=True)
    names = ("train.jsonl", "valid.jsonl", "test.jsonl", GENERATED, "stakeholder_hf_dataset")

    def data() -> dict[str, Any]:
        write_rows(rows, folder / GENERATED)
        write(rows, folder, lambda prompt, completion: f"{prompt}\n{completion}")
        return {"rows": len(rows)}

    run.stage("data", {"turn": turn}, [], [folder / n for n in names], data)
    Review(folder).decide(rows[2 + turn].id, "reject")
    votes = run.path("evaluation", "votes.jsonl")
    if not votes.exists() or len(votes.read_text(encoding="utf-8").splitlines()) <= turn:
        append_line(votes, json.dumps({"vote": turn}))
    adapter = run.path("models", "x-lora")

    def train() -> dict[str, Any]:
        with writing(adapter) as part:
            part.mkdir()
            (part / "adapter_model.safetensors").write_bytes(bytes([turn]) * 9000)
            (part / "README.md").write_text(f"turn {turn}", encoding="utf-8")
        return {"loss": 1.0}

    run.stage("train", {"turn": turn}, [folder / "train.jsonl"], [adapter], train)
    atomic_write_text(run.path("report.html"), f"<html>{turn}</html>" * 300)
    with writing(run.path("product")) as part:
        part.mkdir()
        link(adapter / "adapter_model.safetensors", part / "model.safetensors")
    pack(run.folder, place / "run.zip")
    shutil.rmtree(place / "copy", ignore_errors=True)
    unpack(place / "run.zip", place / "copy")


def contents(folder: Path) -> dict[str, str]:
    """sha256 of each visible file of the run by its name; the records only as far as they can be read."""
    found = {}
    for file in sorted(p for p in (folder / "run").rglob("*") if p.is_file()):
        name = file.relative_to(folder / "run").as_posix()
        if not any(part.startswith(".") for part in name.split("/")):
            json.loads(file.read_text(encoding="utf-8")) if file.suffix == ".json" else None
            found[name] = "" if file.name in RECORDS else sha256(file)
    return found


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    cheap_course(folder, 0)
    return folder


@pytest.fixture(scope="module")
def operations(before: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, str]]:
    """How often the second turn touches the disk, and what it leaves."""
    place = tmp_path_factory.mktemp("after") / "x"
    shutil.copytree(before, place)
    disk = FullDisk(place)
    with pytest.MonkeyPatch.context() as patch:
        disk.plant(patch)
        cheap_course(place, 1)
    return disk.count, contents(place)


def fail_at(number: int, before: Path, place: Path) -> str:
    """Run the second turn on a disk that is full at operation `number`; what failed. Asserts that nothing is lost."""
    shutil.copytree(before, place)
    disk, old = FullDisk(place, number), contents(place)
    with pytest.MonkeyPatch.context() as patch:
        disk.plant(patch)
        with pytest.raises(CourseError, match=r"the disk of .* is full(.|\n)*next: make room on that disk"):
            cheap_course(place, 1)
    now = contents(place)
    assert [name for name in old if name not in now] == [], disk.failed
    return disk.failed


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 6])
def test_a_disk_full_at_any_moment_damages_nothing_and_work_goes_on(
    every: int,
    before: Path,
    operations: tuple[int, dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tell: Callable[[str], None],
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    count, wanted = operations
    old, failed = contents(before), []
    assert count > 100
    for number in range(1, count + 1, every):
        place = tmp_path / str(number)
        failed.append(fail_at(number, before, place))
        now = contents(place)
        strange = [name for name, digest in now.items() if digest not in (old.get(name), wanted.get(name))]
        assert strange == [], failed[-1]
        stages = json.loads((place / "run" / "run.json").read_text(encoding="utf-8"))["stages"]
        assert set(stages) == {"data", "train"}
        Review(place / "run" / "training_data")
        cheap_course(place, 1)  # there is room again
        assert contents(place) == wanted, failed[-1]
        assert [p for p in place.rglob("*") if p.suffix in (".part", ".old")] == [], failed[-1]
        shutil.rmtree(place)
    names = ("create", "short write", "fsync", "rename", "mkdir", "link")
    kinds = {kind: sum(f.startswith(kind) for f in failed) for kind in names}
    assert sum(kinds.values()) == len(failed) and (every > 1 or min(kinds.values()) > 0)
    tell(f"disk full at {len(failed)} of {count} operations: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))


def test_the_planted_disk_fails_where_it_should(tmp_path: Path) -> None:
    """The twin: a write that does not look at what the system took leaves half a file, and the checks see it."""
    file = tmp_path / "x.json"
    with pytest.MonkeyPatch.context() as patch:
        FullDisk(tmp_path, 2).plant(patch)
        with file.open("wb", buffering=0) as stream:
            stream.write(b'{"a": 1}')
    assert file.read_bytes() == b'{"a"'
