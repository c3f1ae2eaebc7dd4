"""No sentence of the README or a notebook contradicts the committed record of a run."""

from __future__ import annotations

import json
from pathlib import Path

import prose
import pytest


@pytest.mark.parametrize("path", prose.files(), ids=lambda p: p.name)
def test_marked_numbers_agree_with_the_record(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert prose.contradictions(text) == []
    assert prose.MARK.search(text), "every text that quotes minutes or gigabytes quotes them from a record"


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(prose, "RECORDS", tmp_path)
    stage = {"seconds": 630.0, "peak_mb": 1946, "disk_bytes": 5e8, "result": {"rows": 355, "best_valid_loss": 0.874}}
    values = {"notebooks": {"04": 900.0, "05": 60.0, "07": 600.0}, "stages": {"train": stage}, "machine": {"cores": 2}}
    (tmp_path / "quick.json").write_text(json.dumps(values), encoding="utf-8")
    return tmp_path


def test_a_wrong_number_is_caught(record: Path) -> None:
    assert prose.contradictions("takes <!--=quick.04.minutes-->15<!--/--> minutes") == []
    assert "says '4'" in prose.contradictions("takes <!--=quick.04.minutes-->4<!--/--> minutes")[0]
    assert "begins a line" in prose.contradictions("takes\n<!--=quick.04.minutes-->15<!--/--> minutes")[0]
    assert "not in any record" in prose.contradictions("at <!--=quick.lunch.minutes-->15<!--/-->")[0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quick.04.minutes", "15"),
        ("quick.05.minutes", "1.0"),
        ("quick.report.minutes", "16"),
        ("quick.total.minutes", "26"),
        ("quick.train.peak_gb", "1.9"),
        ("quick.train.disk_gb", "0.5"),
        ("quick.train.seconds", "630"),
        ("quick.train.result.rows", "355"),
        ("quick.train.result.best_valid_loss", "0.87"),
        ("quick.machine.cores", "2"),
    ],
)
def test_figures_are_read_and_filled_in(record: Path, key: str, value: str) -> None:
    assert prose.figure(key) == value
    assert prose.fill(f"<!--={key}-->?<!--/-->") == f"<!--={key}-->{value}<!--/-->"


def test_a_run_that_skipped_its_work_gives_no_minutes(tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "run.json").write_text(json.dumps({"stages": {"train": {"seconds": 600}}}), encoding="utf-8")
    (tmp_path / "notebooks" / "timings.json").write_text(json.dumps({"04_train_with_peft": 9.0}), encoding="utf-8")
    with pytest.raises(SystemExit, match="skipped"):
        prose.take(tmp_path)


def test_an_evaluation_is_taken_with_its_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def line(system: str, value: float, kind: str = "share") -> dict:
        return {"measure": "m", "kind": kind, system: value, f"{system}_low": value / 2, f"{system}_high": value}

    facts = {
        "prompts": 9,
        "scenarios": 3,
        "comparison": [line("base", 0.2) | line("tuned", 0.986)],
        "rivals": {"prompted": {"m": line("prompted", 3, "number")}},
        "totals": {"tuned": {"answers": 9, "numbers": 1300, "grounded": 1290, "faultless": 8}},
    }
    record = {"stages": {"evaluation": prose.quality(facts)}, "notebooks": {}}
    monkeypatch.setattr(prose, "RECORDS", tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(record), encoding="utf-8")
    keys = ("measures.tuned.m", "measures.prompted.m", "totals.tuned.grounded", "prompts")
    told = [prose.figure(f"report.evaluation.{key}") for key in keys]
    assert told == ["98.6 (49.3 to 98.6)", "3.0 (1.5 to 3.0)", "1,290", "9"]
