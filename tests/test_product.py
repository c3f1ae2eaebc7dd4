"""The folder that is handed on: complete, checkable, honest about what was measured, and only of what was proved."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from stakelib.export import product
from stakelib.export.handout import renew, report_line
from stakelib.export.serve import page_is_of
from stakelib.run import CourseError, atomic_write_json, sha256

PROOF = {
    "hops": {n: {"nll": 1.25, "kl": 0.001, "top": 0.991} for n in ("base", "merged", "f16", "q8")}
    | {"adapter": {"nll": 1.25, "kl": None, "top": None}},
    "engine": {"q8": {"stopped": 1.0}, "q4": {"stopped": 1.0}},
    "rows": 8,
    "prompts": 4,
    "answers": "judged",
}


def proved(copied: SimpleNamespace, quantisation: str = "q8") -> None:
    """Put into the record that the gate has passed this very file."""
    file = copied.files[quantisation]
    inputs = {f"models/{file.name}": sha256(file), "Modelfile": sha256(copied.recipe)}
    copied.run.record["stages"]["parity"] = {"result": PROOF, "inputs": inputs}
    on_disk(copied)


def on_disk(copied: SimpleNamespace) -> None:
    """Write the record as it is now: what stands in run.json counts, not what a program remembers."""
    atomic_write_json(copied.run.folder / "run.json", copied.run.record)


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


VERDICT = "The tuned model is clearly better than its base on: form."


def evaluated(copied: SimpleNamespace, digest: str) -> None:
    """Leave an evaluation of the file with this sha256, and a page that it names."""
    folder = copied.run.folder
    (folder / "report.html").write_text("<html>", encoding="utf-8")
    facts = {"prompts": 45, "scenarios": 20, "verdict": [VERDICT], "not_measured": ["Taste."]}
    facts["sha256"] = {"tuned": digest, "report.html": sha256(folder / "report.html")}
    copied.run.path("evaluation", "evaluation.json").write_text(json.dumps(facts), encoding="utf-8")


def trained(copied: SimpleNamespace) -> None:
    """Put into the record the training that made the exported adapter, and the rows that it learned from."""
    rows = copied.run.path("training_data", "train.jsonl")
    rows.write_text("{}\n", encoding="utf-8")
    result = {"learned_tokens": 9, "best_valid_loss": 1.234, "best_step": 5, "machine": {"processor": "Abacus"}}
    result["machine"] |= {"cores": 2, "ram_gb": 8}
    more = {
        "data": {
            "result": {
                "rows": {"train": 427, "valid": 48, "test": 133},
                "reviewed": {"edited": 3, "rejected": 2},
            },
            "outputs": {"training_data/train.jsonl": {"sha256": sha256(rows)}},
        },
        "train": {
            "result": result,
            "settings": {},
            "versions": {"torch": "9.9.9"},
            "inputs": {"training_data/train.jsonl": sha256(rows)},
            "outputs": {"models/adapter": {"sha256": sha256(copied.adapter)}},
        },
    }
    copied.run.record["stages"] |= more
    on_disk(copied)


def card_of(copied: SimpleNamespace, quantisation: str = "q8") -> str:
    proved(copied, quantisation)
    return (product(copied.run, quantisation) / "README.md").read_text(encoding="utf-8")


def test_the_pages_say_what_the_record_says(copied: SimpleNamespace) -> None:
    card = card_of(copied)
    assert "| q8 | 1.2500 | 0.00100 | 99.1 % |" in card and "| adapter | 1.2500 | not measured | not measured |" in card
    assert "not measured yet (notebook 06)" in card and "Gemma Terms of Use" in card
    assert sha256(copied.files["q8"]) in card and "no third party's text" not in card  # the rows are not on record
    evaluated(copied, sha256(copied.files["q8"]))
    trained(copied)
    card = card_of(copied)  # again, now that it was evaluated
    assert VERDICT in card and "- Taste." in card and "427 rows to learn from" in card
    assert "not measured yet" not in card and "1.234" in card and "torch 9.9.9" in card and "Abacus" in card
    assert "rewrote 3" in card and "no third party's text" not in card  # three texts are a person's
    copied.run.record["stages"]["data"]["result"]["reviewed"]["edited"] = 0
    assert "no third party's text" in card_of(copied)
    page = (copied.run.folder / "product" / "HOW-TO-USE.md").read_text(encoding="utf-8")
    assert "ollama create stakeholder-tiny-gemma -f Modelfile" in page
    assert [line.split(" | ")[2] for line in page.splitlines() if "under" in line and "GB" in line] == ["yes |"] * 3


@pytest.mark.parametrize("spoil", ["other file", "no sha256", "broken", "none"])
def test_an_evaluation_of_another_file_is_not_quoted(copied: SimpleNamespace, spoil: str) -> None:
    evaluated(copied, sha256(copied.files["q8"]))
    assert VERDICT in card_of(copied) and report_line(copied.run) == str(copied.run.folder / "report.html")
    file = copied.run.folder / "evaluation" / "evaluation.json"
    if spoil == "other file":  # as after a new training: the file changed, the evaluation stayed
        copied.files["q8"].write_bytes(copied.files["q8"].read_bytes() + b"x")
    elif spoil == "no sha256":
        file.write_text(json.dumps({"prompts": 1, "scenarios": 1, "verdict": [VERDICT], "not_measured": []}), "utf-8")
    elif spoil == "broken":
        file.write_text('{"sha256": {"tuned"', encoding="utf-8")
    else:
        file.unlink()
    assert VERDICT not in (card := card_of(copied)) and "not measured yet" in card
    assert "not of the present q8 file" in report_line(copied.run)


def test_a_report_page_that_was_changed_is_not_named(copied: SimpleNamespace) -> None:
    assert report_line(copied.run) == "not made yet"
    evaluated(copied, sha256(copied.files["q8"]))
    assert report_line(copied.run) == str(copied.run.folder / "report.html")
    (copied.run.folder / "report.html").write_text("<html>of another run", encoding="utf-8")
    assert "not of the present q8 file" in report_line(copied.run)


def test_the_card_of_a_smaller_file_does_not_quote_the_evaluation_of_q8(copied: SimpleNamespace) -> None:
    evaluated(copied, sha256(copied.files["q8"]))
    copied.run.record["stages"]["parity"] = {}
    assert VERDICT not in card_of(copied, "q4")
    page = (copied.run.folder / "product" / "HOW-TO-USE.md").read_text(encoding="utf-8")
    assert "the q8 file, not this one" in page


@pytest.mark.parametrize("changed", ["adapter trained anew", "rows made anew", "rows by hand"])
def test_a_training_that_did_not_make_this_file_is_not_quoted(copied: SimpleNamespace, changed: str) -> None:
    trained(copied)
    assert "1.234" in card_of(copied)
    stages = copied.run.record["stages"]
    if changed == "adapter trained anew":
        stages["train"]["outputs"]["models/adapter"]["sha256"] = "of a later training"
    elif changed == "rows made anew":
        stages["data"]["outputs"]["training_data/train.jsonl"]["sha256"] = "of other rows"
    else:  # edited after they were made, then learned
        stages["train"]["inputs"]["training_data/train.jsonl"] = "of an edited file"
    card = card_of(copied)
    assert "427 rows" not in card and ("1.234" in card) == (changed != "adapter trained anew")


def test_the_evaluation_renews_the_card_of_the_file_that_is_handed_on(
    copied: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    renew(copied.run)  # nothing to renew
    assert not (copied.run.folder / "product").exists()
    assert VERDICT not in card_of(copied)
    evaluated(copied, sha256(copied.files["q8"]))
    renew(copied.run)
    folder = copied.run.folder / "product"
    assert VERDICT in (folder / "README.md").read_text(encoding="utf-8")
    sums = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines())
    assert sums["README.md"] == sha256(folder / "README.md")
    copied.run.record["stages"]["parity"]["inputs"] = {}  # no proof any more: the folder stays, and that is said
    on_disk(copied)
    (folder / "README.md").write_text("as it was", encoding="utf-8")
    renew(copied.run)
    assert (folder / "README.md").read_text(encoding="utf-8") == "as it was"
    assert "not the file that was proved" in capsys.readouterr().out


def test_a_folder_with_another_model_keeps_its_card(copied: SimpleNamespace) -> None:
    card = card_of(copied)
    new = copied.run.path("models", "new.gguf")
    new.write_bytes(copied.files["q8"].read_bytes() + b"x")  # as training and export leave it: another file by its name
    new.replace(copied.files["q8"])
    proved(copied)
    evaluated(copied, sha256(copied.files["q8"]))
    renew(copied.run)
    assert (copied.run.folder / "product" / "README.md").read_text(encoding="utf-8") == card


def test_a_page_of_another_model_is_known(copied: SimpleNamespace, tmp_path: Path) -> None:
    page, gguf = tmp_path / "page", copied.files["q8"]
    assert not page_is_of(page, gguf)
    page.mkdir()
    for text, fits in ((json.dumps({"sha256": sha256(gguf)}), True), ("{}", False), ("[]", False), ("{", False)):
        (page / "prompts.json").write_text(text, encoding="utf-8")
        assert page_is_of(page, gguf) == fits
    (page / "prompts.json").write_text(json.dumps({"sha256": sha256(gguf)}), encoding="utf-8")
    gguf.write_bytes(gguf.read_bytes() + b"x")
    assert not page_is_of(page, gguf)


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
    proved(copied)
    copied.recipe.write_text(copied.recipe.read_text(encoding="utf-8") + "# by hand\n", encoding="utf-8")
    with pytest.raises(CourseError, match="Modelfile is not the file that was proved"):
        product(copied.run)
    for lost in (file, copied.recipe):
        lost.unlink()
    with pytest.raises(CourseError) as problem:
        product(copied.run)
    assert problem.value.problems == ["models/stakeholder-tiny-gemma-q8.gguf is missing", "Modelfile is missing"]
    assert not (copied.run.folder / "product").exists()
