"""The whole course, headless, on the tiny model and without a network: to a report, again, and after a kill -9."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from stakelib.run import PROFILES, hold, sha256

STAGES = {"data", "trial-course-24", "trial-guide-pc-24", "train", "guide-prompts", "export", "parity", "voices"}
MINUTES = 15  # a hung run must end the test, not the day

# Put on PYTHONPATH where the system lets nobody take the network away: this Python and its children stay at home.
BLOCK = """
import socket
connect = socket.socket.connect
def stay(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(101, f"Network is unreachable (cut off by the test): {address}")
    return connect(self, address)
socket.socket.connect = stay
"""
OUTSIDE = "import socket; socket.create_connection(('1.1.1.1', 443), timeout=3)"
INSIDE = "import socket; s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname(), 3)"


@cache
def unplugged() -> list[str]:
    """A command that gives a program only 127.0.0.1, in a network namespace of its own; [] if not allowed."""
    for flags in ("-n", "-rn"):
        command = ["unshare", flags, "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return []


def environment(place: Path) -> dict[str, str]:
    """Own cache and runs; a Python that stays at home where there are no namespaces."""
    hidden = ("HF_", "STAKE_", "HTTP_PROXY", "HTTPS_PROXY")
    env = {k: v for k, v in os.environ.items() if not k.upper().startswith(hidden)}
    env |= {"STAKE_CACHE": str(place / "cache"), "STAKE_RUN_ROOT": str(place / "runs")}
    if not unplugged():
        (place / "block").mkdir(exist_ok=True)
        (place / "block" / "sitecustomize.py").write_text(BLOCK, encoding="utf-8")
        env["PYTHONPATH"] = str(place / "block")
    return env


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[1]
    command = [*unplugged(), sys.executable, str(root / "course.py"), "run", "--profile", "smoke", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    return subprocess.Popen(command, cwd=place, env=environment(place), **pipes)


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=60 * MINUTES)
    except subprocess.TimeoutExpired:
        end(process)
        raise
    assert process.returncode == 0, output[-3000:]
    return output


def end(process: subprocess.Popen[str]) -> None:
    """kill -9 the launcher, its worker and the notebook's kernel: those that we started, by their ids."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=20)
    process.communicate()


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def shown(folder: Path) -> dict[str, Counter[str]]:
    """How many pictures, tables and errors each executed notebook shows; a progress bar is none of them."""
    kinds, found = ("image/png", "image/svg+xml", "text/html"), {}
    for path in sorted((folder / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        outputs = [o for c in cells if c["cell_type"] == "code" for o in c["outputs"]]
        found[path.stem] = Counter(kind for o in outputs for kind in o.get("data", {}) if kind in kinds)
        found[path.stem]["error"] = sum(o["output_type"] == "error" for o in outputs)
    return found


@pytest.fixture(scope="module")
def spine(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One smoke run in an empty place: nothing cached, nothing made before."""
    place = tmp_path_factory.mktemp("spine")
    started = time.monotonic()
    output = finish(start(place))
    folder = place / "runs" / "smoke"
    made = SimpleNamespace(place=place, folder=folder, output=output, seconds=time.monotonic() - started)
    made.record, made.shown = record(folder), shown(folder)
    made.files = {name: sha256(folder / name) for name in ("models", "training_data", "evaluation")}
    return made


def test_the_network_is_really_cut_off(tmp_path: Path, tell: Callable[[str], None]) -> None:
    tell(f"network cut off by: {' '.join(unplugged()[:2]) or 'sockets blocked in Python'}")
    codes = []
    for code in (OUTSIDE, INSIDE):
        command = [*unplugged(), sys.executable, "-c", code]
        codes.append(subprocess.run(command, env=environment(tmp_path), capture_output=True, timeout=30).returncode)
    assert codes == [1, 0]


def test_blocked_sockets_stay_at_home(tmp_path: Path) -> None:
    """The second way, which other machines take, is tried here too."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    outside, inside = (
        subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, encoding="utf-8", timeout=30)
        for code in (OUTSIDE, INSIDE)
    )
    assert "cut off by the test" in outside.stderr
    assert inside.returncode == 0, inside.stderr


def test_smoke_runs_to_a_report_in_minutes(spine: SimpleNamespace, tell: Callable[[str], None]) -> None:
    page = (spine.folder / "report.html").read_text(encoding="utf-8")
    assert f"Report: {spine.folder / 'report.html'}" in spine.output
    assert "<html" in page and len(page) > 5_000
    assert "stakeholder-tiny-gemma-q8.gguf" in spine.output
    assert set(spine.record["stages"]) >= STAGES
    assert {"machine", "versions", "profile"} <= set(spine.record)
    tell(f"smoke, nothing cached: {spine.seconds:.0f} s on one of two busy cores")
    assert "Traceback" not in spine.output
    with hold(spine.folder / ".lock", "the run is still held", "look for the process that holds it"):
        assert [p for p in spine.place.rglob("*.part")] == []


def test_nine_voices_answer_through_the_shipped_gguf(spine: SimpleNamespace) -> None:
    lines = (spine.folder / "training_data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    voice = {row["id"]: row["stakeholder_id"] for row in map(json.loads, lines)}
    for system in ("base", "tuned"):
        file = spine.folder / "evaluation" / f"answers-{system}.jsonl"
        asked = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        answers = [a for a in asked if not a["row_id"].startswith("general-")]
        drawn = 9 * (system == "tuned")  # the same prompts once more, with the Modelfile's sampling
        assert len(answers) == PROFILES["smoke"].test_prompts + drawn == 9 + drawn and len(asked) == 9 + drawn + 16
        assert len({voice[a["row_id"]] for a in answers}) == 9
        assert {a["gguf"] for a in answers} == {f"{'stakeholder-' * (system == 'tuned')}tiny-gemma-q8.gguf"}
        assert all(0 < a["new_tokens"] <= 24 for a in answers)


def test_every_file_of_the_contract_is_there(spine: SimpleNamespace) -> None:
    data, models = spine.folder / "training_data", spine.folder / "models"
    wanted = [data / f"{p}{n}.jsonl" for n in ("train", "valid", "test") for p in ("", "mlx/")]
    wanted += [data / "stakeholder_dialogues.jsonl", data / "stakeholder_hf_dataset", spine.folder / "Modelfile"]
    wanted += [
        models / f"stakeholder-tiny-gemma-{name}" for name in ("lora", "merged", "f16.gguf", "q8.gguf", "q4.gguf")
    ]
    assert [p for p in wanted if not p.exists()] == []
    for name, stage in spine.record["stages"].items():
        for file, saved in stage["outputs"].items():
            assert sha256(spine.folder / file) == saved["sha256"], (name, file)
    assert spine.record["stages"]["parity"]["result"]["same_ids"] is True


def test_notebooks_show_their_figures_and_no_errors(spine: SimpleNamespace) -> None:
    assert len(spine.shown) == len(list((Path(__file__).parents[1] / "notebooks").glob("[0-9]*.ipynb")))
    assert all(kinds["error"] == 0 for kinds in spine.shown.values())
    pictures = {name: kinds.total() for name, kinds in spine.shown.items()}
    assert [name for name, count in pictures.items() if count < 2] == []
    assert sum(kinds["image/png"] for kinds in spine.shown.values()) >= 8


def test_the_same_command_again_is_up_to_date_and_shows_everything(spine: SimpleNamespace) -> None:
    started = time.monotonic()
    output = finish(start(spine.place))
    assert time.monotonic() - started < 600  # a hang, not a benchmark; the plan is measured anew each time
    told = {
        name for name in spine.record["stages"] if re.search(rf"^\s*{name}: up to date \(made ", output, re.MULTILINE)
    }
    assert told == set(spine.record["stages"])
    work = re.compile(r"^\s*(training|export|parity|quantising to \w+|base|tuned): (?!up to date)", re.MULTILINE)
    assert work.search(spine.output) and not work.search(output)
    assert record(spine.folder)["stages"] == spine.record["stages"]
    assert shown(spine.folder) == spine.shown
    assert {name: sha256(spine.folder / name) for name in spine.files} == spine.files
    assert f"Report: {spine.folder / 'report.html'}" in output


def first_checkpoint(folder: Path, process: subprocess.Popen[str]) -> Path:
    """Wait for a complete checkpoint of the real training, which comes after the two trials."""
    end_at = time.monotonic() + 60 * MINUTES
    while time.monotonic() < end_at and process.poll() is None:
        if (folder / "run.json").exists() and "trial-guide-pc-24" in record(folder)["stages"]:
            for mark in (folder / "training").glob("checkpoints-*/checkpoint-*/complete.json"):
                time.sleep(0.3)  # the trial's are thrown away just after it is on record
                if mark.parents[1].exists():
                    return mark.parent
        time.sleep(0.01)
    raise AssertionError(f"no checkpoint: {process.communicate()[0][-2000:]}")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_run_killed_in_training_goes_on_and_ends_the_same(spine: SimpleNamespace) -> None:
    folder = spine.place / "runs" / "killed"
    process = start(spine.place, "--out", str(folder))
    checkpoint = first_checkpoint(folder, process)
    end(process)
    assert [*checkpoint.parent.glob("checkpoint-*/complete.json")]  # a newer one may have replaced it
    assert "train" not in record(folder)["stages"]
    assert not (folder / "models" / "stakeholder-tiny-gemma-lora").exists()
    output = finish(start(spine.place, "--out", str(folder)))
    assert re.search(r"training: going on from checkpoint-\d+ of \d+", output)
    assert "data: up to date" in output and "trial-course-24: up to date" in output
    ended, whole = (r["stages"]["train"]["result"] for r in (record(folder), spine.record))
    assert ended["resumed_at"] > 0 == whole["resumed_at"]
    assert ended["precision"] == whole["precision"], (ended["precision_why"], whole["precision_why"])
    assert ended["best_valid_loss"] == pytest.approx(whole["best_valid_loss"], rel=1e-5)
    assert {p.name for p in (folder / "models").iterdir()} == {p.name for p in (spine.folder / "models").iterdir()}
    for name in ("stakeholder-tiny-gemma-lora", "stakeholder-tiny-gemma-merged"):
        assert sorted(p.name for p in (folder / "models" / name).iterdir()) == sorted(
            p.name for p in (spine.folder / "models" / name).iterdir()
        )
    assert set(record(folder)["stages"]) == set(spine.record["stages"])
    assert (folder / "report.html").exists()


@pytest.mark.slow
def test_the_sweeps_of_notebook_04_run_when_asked(spine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    import papermill

    root = Path(__file__).resolve().parents[1]
    for variable, value in (environment(spine.place) | {"PYTHONPATH": str(root)}).items():
        monkeypatch.setenv(variable, value)
    folder, name = spine.place / "runs" / "swept", "04_train_with_peft"
    shutil.copytree(spine.folder, folder)
    notebook, copy = root / "notebooks" / f"{name}.ipynb", folder / "notebooks" / f"{name}.ipynb"
    parameters, quiet = {"profile": "smoke", "out": str(folder), "sweep": True}, {"progress_bar": False}
    papermill.execute_notebook(notebook, copy, parameters, cwd=notebook.parent, kernel_name="python3", **quiet)
    rows = spine.record["stages"]["train"]["result"]["rows"]
    added = {f"trial-course-{n}" for n in {min(n, rows) for n in (50, 100, 200, 400)}}
    added |= {f"trial-rate-{rate}-100" for rate in ("0.0005", "0.002", "0.008")}
    assert set(record(folder)["stages"]) == set(spine.record["stages"]) | added
    assert shown(folder)[name]["image/png"] == spine.shown[name]["image/png"] + 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "switches", "tables"),
    [
        ("06_evaluate", {"deep": True}, 2),
        ("07_one_voice_each", {"curve": True, "onward": True}, 1),
    ],
)
def test_what_is_off_by_default_works_when_it_is_switched_on(
    spine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, name: str, switches: dict[str, bool], tables: int
) -> None:
    import papermill

    root = Path(__file__).resolve().parents[1]
    for variable, value in (environment(spine.place) | {"PYTHONPATH": str(root)}).items():
        monkeypatch.setenv(variable, value)
    folder = spine.place / "runs" / f"on-{name[:2]}"
    shutil.copytree(spine.folder, folder)
    notebook, copy = root / "notebooks" / f"{name}.ipynb", folder / "notebooks" / f"{name}.ipynb"
    parameters, quiet = {"profile": "smoke", "out": str(folder)} | switches, {"progress_bar": False}
    papermill.execute_notebook(notebook, copy, parameters, cwd=notebook.parent, kernel_name="python3", **quiet)
    assert shown(folder)[name]["text/html"] == spine.shown[name]["text/html"] + tables
    if name == "06_evaluate":
        asked = {file.stem.removeprefix("answers-") for file in (folder / "evaluation").glob("answers-*.jsonl")}
        assert asked >= {"base", "tuned", "prompted", "tuned-q4"}
        again = (folder / "evaluation" / "answers-tuned.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(again) == 9 + 16 + 9 + 9  # its own, the general questions, drawn, in other words
    else:
        assert len(list((folder / "voices-from-one").glob("*/models/*-lora"))) == 9


@pytest.mark.slow
def test_a_seed_of_its_own_would_show(spine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of the test above: the loss that a resumed run must reach is not reached with another seed."""
    from dataclasses import replace

    from stakelib.run import Run
    from stakelib.training import RECIPES, train

    monkeypatch.setenv("STAKE_CACHE", str(spine.place / "cache"))
    folder = spine.place / "runs" / "seed"
    shutil.copytree(spine.folder / "training_data", folder / "training_data")
    recipe = replace(RECIPES["course"], seed=RECIPES["course"].seed + 1)
    loss = train(Run.open(folder, "smoke"), recipe)["best_valid_loss"]
    assert abs(loss / spine.record["stages"]["train"]["result"]["best_valid_loss"] - 1) > 1e-5
