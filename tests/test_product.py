"""The folder that is handed on: complete, checkable, honest about what was measured, and only of what was proved."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from stakelib.export import product
from stakelib.run import CourseError, sha256

PROOF = {
    "hops": {n: {"nll": 1.25, "kl": 0.001, "top": 0.991} for n in ("base", "merged", "f16", "q8")}
    | {"adapter": {"nll": 1.25, "kl": None, "top": None}},
    "engine": {"q8": {"stopped": 1.0}},
    "rows": 8,
    "prompts": 4,
    "answers": "judged",
}


def proved(copied: SimpleNamespace, quantisation: str = "q8") -> None:
    """Put into the record that the gate has passed this very file."""
    file = copied.files[quantisation]
    inputs = {f"models/{file.name}": sha256(file)}
    copied.run.record["stages"]["parity"] = {"result": PROOF, "inputs": inputs}


def test_the_folder_is_complete_and_its_sums_are_right(copied: SimpleNamespace) -> None:
    proved(copied)
    folder = product(copied.run)
    assert folder == copied.run.folder / "product"
    names = {"stakeholder-tiny-gemma-q8.gguf", "Modelfile", "README.md", "HOW-TO-USE.md", "SHA256SUMS"}
    assert {p.name for p in folder.iterdir()} == names and not any(p.is_symlink() for p in folder.iterdir())
    lines = (folder / "SHA256SUMS").read_bytes().decode().splitlines()  # as `sha256sum -c` reads them
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert sums == {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names - {"SHA256SUMS"}}
    recipe = (folder / "Modelfile").read_text(encoding="utf-8")
    assert "\nFROM ./stakeholder-tiny-gemma-q8.gguf\n" in recipe
    ours = copied.recipe.read_text(encoding="utf-8")
    assert recipe == ours.replace("./models/stakeholder", "./stakeholder")


def test_the_pages_say_what_the_record_says(copied: SimpleNamespace) -> None:
    proved(copied)
    card = (product(copied.run) / "README.md").read_text(encoding="utf-8")
    assert "| q8 | 1.2500 | 0.00100 | 99.1 % |" in card and "| adapter | 1.2500 | not measured | not measured |" in card
    assert "not measured yet (notebook 06)" in card and "Gemma Terms of Use" in card
    verdict = ["The tuned model is clearly better than its base on: form."]
    facts = {"prompts": 45, "scenarios": 20, "verdict": verdict, "not_measured": ["Taste."]}
    copied.run.path("evaluation", "evaluation.json").write_text(json.dumps(facts), encoding="utf-8")
    copied.run.record["stages"]["data"] = {"result": {"rows": {"train": 427, "valid": 48, "test": 133}}}
    folder = product(copied.run)  # again, now that it was evaluated
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert verdict[0] in card and "- Taste." in card and "427 rows to learn from" in card
    assert "not measured yet" not in card
    page = (folder / "HOW-TO-USE.md").read_text(encoding="utf-8")
    assert "ollama create stakeholder-tiny-gemma -f Modelfile" in page
    assert [line.split(" | ")[2] for line in page.splitlines() if "under" in line and "GB" in line] == ["yes |"] * 3


def test_sizes_are_held_against_the_limits_of_a_workshop(
    copied: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    proved(copied)
    limits = {"a laptop (Ollama)": 4, "workshop Wi-Fi": copied.files["q8"].stat().st_size / 1e9}
    monkeypatch.setattr("stakelib.export.handout.LIMITS_GB", limits)
    page = (product(copied.run) / "HOW-TO-USE.md").read_text(encoding="utf-8")
    assert page.count("| yes |") == 1 and page.count("| no: take a smaller base model") == 1


def test_what_was_not_proved_is_not_handed_on(made: SimpleNamespace, copied: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(CourseError, match="no stage 'parity'(.|\n)*run notebook 05"):
        product(copied.run)
    proved(copied)
    file = copied.files["q8"]
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(CourseError, match="q8.gguf is not the file that was proved"):
        product(copied.run)
    for lost in (file, copied.recipe):
        lost.unlink()
    with pytest.raises(CourseError) as problem:
        product(copied.run)
    assert problem.value.problems == ["models/stakeholder-tiny-gemma-q8.gguf is missing", "Modelfile is missing"]
    assert not (copied.run.folder / "product").exists()
