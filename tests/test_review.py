"""Review: decisions on disk at once, re-checked, applied to the training files; the CSV round trip; the widget."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from damaged_files import damaged
from hypothesis import given, settings
from hypothesis import strategies as st

import stakelib
from stakelib import widgets
from stakelib.dialogues import Review, build, open_review, prepare, read, split
from stakelib.dialogues.files import write_rows
from stakelib.dialogues.review import EDITS, GENERATED, apply_edits, read_edits
from stakelib.run import CourseError, Run
from stakelib.scenarios import sample

prepare_module = sys.modules["stakelib.dialogues.prepare"]  # the package exports the function under this name
ROWS = split(build(sample(9, seed=1), 36, enhance=9, voice=9))
FIRST, SECOND, THIRD = (r.id for r in ROWS[:3])
BAD = ROWS[0].completion + "\n- Why 99.9%?"
GOOD = ROWS[0].completion[: ROWS[0].completion.rindex("\n- ")] + "\n- Come with an open ear."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(ROWS, tmp_path / GENERATED)
    return tmp_path


def test_a_decision_is_on_disk_at_once_and_checked_at_once(folder: Path) -> None:
    review = Review(folder)
    assert "99.9%" in review.decide(FIRST, "edit", BAD)[0]
    assert Review(folder).current(FIRST).completion == BAD and Review(folder).state(FIRST) == "failing"
    assert review.decide(FIRST, "edit", GOOD) == [] and review.state(FIRST) == "edited"
    assert (review.current(FIRST).source, review.rows[FIRST].source) == ("edited", "rules")
    review.decide(SECOND, "accept")
    review.decide(THIRD, "reject")
    again = Review(folder)
    assert again.progress() == "3 of 50-100 rows reviewed: 1 accepted, 1 rejected, 1 edited"
    kept = apply_edits(ROWS, again.edits)
    assert THIRD not in {r.id for r in kept} and len(kept) == len(ROWS) - 1
    assert [r for r in kept if r.id not in (FIRST, THIRD)] == [r for r in ROWS if r.id not in (FIRST, THIRD)]
    again.reset(THIRD)
    assert Review(folder).state(THIRD) == "not reviewed"
    again.decide(FIRST, "edit", ROWS[0].completion)  # typed and taken back
    assert FIRST not in Review(folder).edits


def test_a_killed_process_loses_nothing(folder: Path) -> None:
    code = (
        "import sys, time; from stakelib import widgets; from stakelib.dialogues import Review\n"
        "board = widgets._Board(Review(sys.argv[1])); board.text.value += ' Typed.'; print('typed', flush=True)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdout=subprocess.PIPE,
        encoding="utf-8",
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONUTF8": "1"},
    )
    assert process.stdout.readline().strip() == "typed"
    process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
    process.communicate()
    assert Review(folder).current(FIRST).completion == ROWS[0].completion + " Typed."


def test_two_windows_do_not_undo_each_other(folder: Path) -> None:
    one, two = Review(folder), Review(folder)
    one.decide(FIRST, "accept")
    two.decide(SECOND, "reject")
    assert set(read_edits(folder)) == {FIRST, SECOND}


def test_edits_survive_regeneration_and_say_when_the_rules_changed(folder: Path) -> None:
    review = Review(folder)
    review.decide(FIRST, "edit", GOOD)
    review.decide(SECOND, "accept")
    moved = [r.model_copy(update={"completion": r.completion + " "}) if r.id == SECOND else r for r in reversed(ROWS)]
    write_rows(moved, folder / GENERATED)
    again = Review(folder)
    assert again.current(FIRST).completion == GOOD and again.state(FIRST) == "edited"
    assert again.state(SECOND) == "changed since"
    assert again.progress().startswith("1 of 50-100")


def test_broken_edits_are_all_named(folder: Path) -> None:
    (folder / EDITS).write_text('{"id": "x", "action": "burn"}\nnonsense\n{"action": "accept"}\n', encoding="utf-8")
    with pytest.raises(CourseError) as caught:
        Review(folder)
    assert [p.split(":")[1] for p in caught.value.problems] == ["1", "2", "3"]


def test_selection_and_plain_text(folder: Path) -> None:
    review = Review(folder)
    review.decide(FIRST, "edit", BAD)
    assert review.select(state="failing") == [FIRST]
    assert len(review.select(task="enhance")) == 9 == len(review.select(task="voice"))
    assert {review.rows[i].stakeholder_id for i in review.select("finance")} == {"finance"}
    text = review.text(FIRST)
    assert BAD in text and ROWS[0].prompt in text and "'99.9%': not in the prompt" in text
    assert "no objection" in review.text(SECOND)


def test_csv_round_trip(folder: Path) -> None:
    review = Review(folder)
    path = review.to_csv(folder / "review.csv")
    assert path.read_bytes().startswith(b"\xef\xbb\xbfid,")  # Excel reads UTF-8 only with this mark
    assert review.from_csv(path) == 0 and review.edits == {}
    table = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    at = {name: i for i, name in enumerate(table[0])}
    table[1][at["completion"]] = GOOD.replace("\n", "\r\n")
    table[2][at["decision"]] = " Accept "
    table[3][at["decision"]] = "reject"
    for delimiter in (";", ",", "\t"):
        with path.open("w", encoding="utf-8-sig", newline="") as stream:
            csv.writer(stream, delimiter=delimiter).writerows(table)
        assert review.from_csv(path) == (3 if delimiter == ";" else 0)
    again = Review(folder)
    assert [again.state(i) for i in (FIRST, SECOND, THIRD)] == ["edited", "accepted", "rejected"]
    assert again.current(FIRST).completion == GOOD and again.current(FIRST).source == "imported"
    assert again.from_csv(again.to_csv(path)) == 0


def test_a_sheet_that_comes_back_late_undoes_no_newer_work(folder: Path) -> None:
    review = Review(folder)
    path = review.to_csv(folder / "review.csv")
    text = path.read_text(encoding="utf-8-sig")
    path.write_text(text.replace(ROWS[0].completion[-20:], "Come late.", 1), encoding="utf-8-sig", newline="")
    Review(folder).decide(FIRST, "edit", GOOD)  # meanwhile, in another window
    with pytest.raises(CourseError, match="row 2: the row or its decision changed after this sheet"):
        review.from_csv(path)
    assert Review(folder).current(FIRST).completion == GOOD


def test_a_rejected_rewrite_can_be_taken_back(folder: Path) -> None:
    review = Review(folder)
    review.decide(FIRST, "edit", GOOD)
    review.decide(FIRST, "reject")
    assert review.state(FIRST) == "rejected" and apply_edits(ROWS[:1], review.edits) == []
    assert review.from_csv(review.to_csv(folder / "review.csv")) == 0
    Review(folder).reset(FIRST)
    assert Review(folder).current(FIRST).completion == GOOD and Review(folder).state(FIRST) == "edited"
    again = Review(folder)
    again.reset(FIRST)
    assert again.edits == {}


def test_the_board_shows_what_another_window_wrote(folder: Path) -> None:
    board = widgets._Board(Review(folder))
    Review(folder).decide(SECOND, "edit", ROWS[1].completion + " More.")
    board.pager.turn(1)
    assert board.text.value.endswith(" More.")


def test_csv_problems_are_all_listed_and_nothing_is_taken(folder: Path) -> None:
    review = Review(folder)
    path = folder / "review.csv"
    rows = [
        [FIRST, "", BAD],
        [SECOND, "burn", ROWS[1].completion],
        ["no-such-id", "accept", ""],
        [THIRD, "accept", ROWS[2].completion],
        [THIRD, "reject", ""],
    ]
    stamps = {i: review._stamp(i) for i in (FIRST, SECOND, THIRD)}
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        csv.writer(stream).writerows(
            [["id", "decision", "completion", "of"], *([*row, stamps.get(row[0], "")] for row in rows)]
        )
    with pytest.raises(CourseError) as caught:
        review.from_csv(path)
    named = {p.split(": ")[0] for p in caught.value.problems}
    assert named == {f"review.csv, row {n}" for n in (2, 3, 4, 6)} and not (folder / EDITS).exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"id,decision\n", "column 'completion' is missing"),
        (b"", "empty"),
        ("id,decision,completion\nä,,".encode("cp1252"), "not UTF-8"),
        (b"id,decision,completion\n", "column 'of' is missing"),
        (b"id,decision,completion,of\nx,accept\n", "row 2: has fewer cells"),
        (b'id,decision,completion,of\n"x,accept\n', "review.csv:"),
    ],
)
def test_csv_files_that_are_none(folder: Path, content: bytes, said: str) -> None:
    (folder / "review.csv").write_bytes(content)
    with pytest.raises(CourseError, match=said):
        Review(folder).from_csv(folder / "review.csv")
    with pytest.raises(CourseError, match="no such file"):
        Review(folder).from_csv(folder / "gone.csv")


def changed(path: Path, cells: dict[str, dict[str, str]], **options: Any) -> Path:
    """The sheet as a reviewer sends it back: cells by row id and column."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        head, *rows = csv.reader(stream)
    rows = [[cells.get(row[0], {}).get(c, old) for c, old in zip(head, row, strict=True)] for row in rows]
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        csv.writer(stream, **options).writerows([head, *rows])
    return path


def test_a_workbook_goes_out_and_comes_back(folder: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    review = Review(folder)
    path = review.to_sheet(folder / "review.xlsx")
    assert review.from_sheet(path) == 0 and not (folder / EDITS).exists()
    book = openpyxl.load_workbook(path)
    sheet = book.active
    at = {cell.value: cell.column for cell in sheet[1]}
    sheet.cell(2, at["completion"], GOOD)
    sheet.cell(3, at["decision"], "Accept ")
    sheet.insert_rows(2, 3)
    sheet.insert_cols(1, 2)
    sheet["A1"] = "remarks"
    sheet["A9"] = "to be talked about"
    book.save(path)
    assert review.from_sheet(path) == 2
    again = Review(folder)
    assert [again.state(i) for i in (FIRST, SECOND, THIRD)] == ["edited", "accepted", "not reviewed"]
    assert again.current(FIRST).completion == GOOD
    again.to_sheet(path)
    assert again.from_sheet(path) == 0
    kept = openpyxl.load_workbook(folder / "review.before-1.xlsx").active
    assert kept["A9"].value == "to be talked about"


@pytest.mark.parametrize("habit", ["semicolons", "blank rows", "one column", "sorted", "moved"])
def test_habits_of_spreadsheets_in_a_review_sheet(habit: str, folder: Path) -> None:
    review = Review(folder)
    path = review.to_sheet(folder / "review.csv")
    changed(
        path,
        {FIRST: {"completion": GOOD}, SECOND: {"decision": "reject"}},
        delimiter="," if habit == "one column" else ";",
    )
    text = path.read_text(encoding="utf-8-sig")
    if habit == "blank rows":
        text += ";;;;;;;;;\r\n" * 9
    if habit == "one column":
        lines = [line.split(";") for line in text.replace("\r\n", "\n").split("\n")]
        out = io.StringIO(newline="")
        csv.writer(out, delimiter=";").writerows(lines)
        text = out.getvalue()
    if habit in ("sorted", "moved"):
        head, *rows = csv.reader(io.StringIO(text, newline=""), delimiter=";")
        out = io.StringIO(newline="")
        table = [head, *rows[::-1]] if habit == "sorted" else [row[::-1] for row in (head, *rows)]
        csv.writer(out, delimiter=";").writerows(table)
        text = out.getvalue()
    path.write_text(text, encoding="utf-8-sig", newline="")
    assert review.from_sheet(path) == 2
    again = Review(folder)
    assert again.current(FIRST).completion == GOOD and again.state(SECOND) == "rejected"


@pytest.mark.parametrize("text", ["'Tis no plan. {}", "''{}", "'={}", "={}", "-{}", "'"])
@pytest.mark.parametrize("program", ["Excel", "strips one apostrophe", "strips them all", "workbook"])
def test_a_first_sign_is_no_edit_in_any_program(text: str, program: str, folder: Path) -> None:
    texts = text.format(ROWS[0].completion)
    write_rows([ROWS[0].model_copy(update={"completion": texts}), *ROWS[1:]], folder / GENERATED)
    review = Review(folder)
    path = review.to_sheet(folder / ("review.xlsx" if program == "workbook" else "review.csv"))
    if program.startswith("strips"):
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.reader(stream))
        at = rows[0].index("completion")
        rows[1][at] = rows[1][at].lstrip("'") if "all" in program else rows[1][at].removeprefix("'")
        rows[2][rows[0].index("decision")] = "accept"
        with path.open("w", encoding="utf-8-sig", newline="") as stream:
            csv.writer(stream).writerows(rows)
    assert review.from_sheet(path) == (1 if program.startswith("strips") else 0)
    assert FIRST not in Review(folder).edits


def test_a_late_sheet_brings_what_was_written_in_it(folder: Path) -> None:
    review = Review(folder)
    path = review.to_sheet(folder / "review.csv")
    changed(path, {SECOND: {"decision": "accept"}})
    Review(folder).decide(FIRST, "edit", GOOD)  # meanwhile, in another window, about another row
    assert review.from_sheet(path) == 1
    again = Review(folder)
    assert [again.state(i) for i in (FIRST, SECOND)] == ["edited", "accepted"]


def test_a_sheet_saved_again_keeps_what_a_person_wrote(folder: Path) -> None:
    review = Review(folder)
    path = review.to_sheet(folder / "review.csv")
    before = path.read_bytes()
    assert review.to_sheet(path).read_bytes() == before and not list(folder.glob("*before*"))
    changed(path, {FIRST: {"completion": GOOD}})
    review.to_sheet(path)
    assert Review(folder).current(FIRST).completion == GOOD and GOOD in path.read_text(encoding="utf-8-sig")
    changed(path, {FIRST: {"completion": BAD}, SECOND: {"prompt": "Is this figure right?"}})
    spoiled = path.read_bytes()
    with pytest.raises(CourseError, match="99.9%"):
        review.to_sheet(path)
    assert path.read_bytes() == spoiled
    path.write_text("my own,table\n1,2\n", encoding="utf-8")
    with pytest.raises(CourseError):
        review.to_sheet(path)
    assert path.read_text(encoding="utf-8") == "my own,table\n1,2\n"


def test_an_error_of_the_spreadsheet_is_no_text(folder: Path) -> None:
    review = Review(folder)
    voice = next(i for i, row in review.rows.items() if row.task == "voice")
    with pytest.raises(CourseError, match="formula"):
        review.from_sheet(changed(review.to_sheet(folder / "review.csv"), {voice: {"completion": "#NAME?"}}))


@pytest.mark.parametrize(
    "spoil", [lambda b: b + b"\xe9\n", lambda b: b"\xe9" + b, lambda b: b + b"{}\n" + b'{"id": "x']
)
def test_broken_decisions_stop_every_step_and_are_kept(spoil: Any, folder: Path) -> None:
    review = Review(folder)
    review.decide(FIRST, "edit", GOOD)
    (folder / EDITS).write_bytes(spoil((folder / EDITS).read_bytes()))
    before = (folder / EDITS).read_bytes()
    for step in (lambda: Review(folder), lambda: review.decide(SECOND, "accept"), lambda: review.reset(FIRST)):
        with pytest.raises(CourseError):
            step()
    assert (folder / EDITS).read_bytes() == before


def test_a_last_decision_that_was_cut_is_kept_aside(folder: Path) -> None:
    review = Review(folder)
    review.decide(FIRST, "edit", GOOD)
    review.decide(SECOND, "accept")
    whole = (folder / EDITS).read_bytes()
    (folder / EDITS).write_bytes(whole[:-9])
    Review(folder).decide(THIRD, "reject")
    assert set(Review(folder).edits) == {FIRST, THIRD}
    assert (folder / f"{EDITS}.cut").read_bytes().strip() == whole.split(b"\n")[1][:-8]
    (folder / EDITS).write_bytes(whole.rstrip())  # as some editors leave it
    assert set(read_edits(folder)) == {FIRST, SECOND}


# ------------------------------------------------------------------------------------------------- rows

LINE = ROWS[0].model_dump_json()


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + LINE.encode() + b"\n",
        b"\xff\xfe" + f"{LINE}\n{LINE}".encode("utf-16-le"),
        f"{LINE}\r\n\r\n".encode(),
        f"{LINE}\r{LINE}\r".encode(),
        LINE.replace(ROWS[0].scenario, "A\u2028B\u0085C").encode(),
    ],
)
def test_rows_as_programs_save_them(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    assert all(row.completion == ROWS[0].completion for row in read(path)) and read(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (json.dumps(json.loads(LINE), indent=2).encode(), "an object over several lines"),
        (f"[{LINE},\n{LINE}]".encode(), "a list"),
        (f"[{LINE}]".encode(), "a list"),
        (LINE.replace('"id":"', '"id":"\\ud83d').encode(), "half a character"),
        (LINE.encode().replace(b'"id":"', b'"id":"\xe9'), "not UTF-8"),
        (LINE.replace('"id":"', '"id":"\0').encode(), "control character"),
        (LINE.encode("utf-16-le"), "mine.jsonl"),
        (f"{LINE}{LINE}".encode(), "trailing characters"),
    ],
)
def test_rows_that_cannot_be_read_say_why(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(CourseError, match=said) as caught:
        read(path)
    assert len(caught.value.problems) == 1 and path.read_bytes() == content


def test_a_thousand_broken_rows_are_not_a_thousand_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("nonsense\n" * 1000, encoding="utf-8")
    with pytest.raises(CourseError, match="980 more") as caught:
        read(path)
    assert len(caught.value.problems) == 21
    with pytest.raises(CourseError):
        read(tmp_path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    write_rows(ROWS[:4], folder / GENERATED)
    return folder


@settings(max_examples=200, deadline=None)
@given(content=damaged("\n".join(row.model_dump_json() for row in ROWS[:3]).encode()))
def test_damaged_rows_are_read_or_refused(content: bytes, small: Path) -> None:
    path = small / "mine.jsonl"
    path.write_bytes(content)
    try:
        read(path)
    except CourseError as error:
        assert error.problems and all(p.startswith("mine.jsonl") for p in error.problems)
    assert path.read_bytes() == content


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_review_sheet_is_taken_whole_or_not_at_all(data: st.DataObject, small: Path) -> None:
    (small / EDITS).unlink(missing_ok=True)
    review, path = Review(small), small / "review.csv"
    path.unlink(missing_ok=True)
    content = data.draw(damaged(review.to_sheet(path).read_bytes()))
    path.write_bytes(content)
    try:
        review.from_sheet(path)
    except CourseError as error:
        assert error.problems and all(p.startswith("review.csv") for p in error.problems)
        assert not (small / EDITS).exists()
    assert path.read_bytes() == content


# ------------------------------------------------------------------------------------------------- widget


def board(folder: Path) -> Any:
    return widgets._Board(Review(folder))


def test_widget_edits_accepts_rejects_and_goes_back(folder: Path) -> None:
    it = board(folder)
    assert (it.text.value, it.pager.total.value) == (ROWS[0].completion, f"of {len(ROWS)}")
    assert not (folder / EDITS).exists()  # looking is not deciding
    it.text.value = BAD
    assert "99.9%" in it.verdict.value and Review(folder).state(FIRST) == "failing"
    it.text.value = GOOD
    it.pager.turn(1)
    it.decide("accept")
    it.pager.turn(1)
    it.decide("reject")
    assert it.progress.value == "3 of 50-100 rows reviewed: 1 accepted, 1 rejected, 1 edited"
    it.decide("undo")
    it.pager.turn(-9)
    assert it.pager.current == FIRST and it.text.value == GOOD
    assert [Review(folder).state(i) for i in (FIRST, SECOND, THIRD)] == ["edited", "accepted", "not reviewed"]
    reloaded = board(folder)
    assert reloaded.text.value == GOOD and reloaded.progress.value == it.progress.value


def test_widget_filters(folder: Path) -> None:
    it = board(folder)
    it.filters["task"].value = "voice"
    assert it.pager.total.value == "of 9" and "---" not in it.text.value
    it.filters["state"].value = "rejected"
    assert it.pager.current is None and it.pager.total.value == "of 0"
    it.text.value = "typed into nothing"
    it.decide("accept")
    assert not (folder / EDITS).exists()


def test_widget_shows_texts_as_text_only(folder: Path) -> None:
    """Of all widgets only text fields hold text of rows: nothing is interpreted as HTML or as a formula."""
    evil = "<img src=x onerror=alert(1)>$x^2$"
    write_rows([r.model_copy(update={"scenario": evil, "prompt": r.prompt + evil}) for r in ROWS], folder / GENERATED)
    it = board(folder)
    seen, queue = [], [it.box]
    while queue:
        widget = queue.pop()
        queue += getattr(widget, "children", ())
        seen.append(widget)
    holding = {type(w).__name__ for w in seen if evil in str(getattr(w, "value", ""))}
    assert holding == {"Textarea"}
    assert not {"HTML", "HTMLMath", "Label"} & {type(w).__name__ for w in seen}


# ------------------------------------------------------------------------------------------------- a run


@pytest.fixture
def run(tiny: Any, tmp_path: Path) -> Run:
    run = Run.open(tmp_path / "run", "smoke")
    prepare(run, sample(7, run.profile.seed))
    return run


def lines(run: Run, name: str) -> list[dict[str, Any]]:
    return [json.loads(x) for x in run.path("training_data", name).read_text(encoding="utf-8").splitlines()]


def test_a_run_without_review_is_as_it_was(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert read(run.path("training_data", GENERATED)) == read(run.path("training_data", "stakeholder_dialogues.jsonl"))
    made = prepare(run)
    assert "up to date" in capsys.readouterr().out and made["reviewed"] == {"rejected": 0, "edited": 0}
    assert len(made["gates"]) >= 9 and sum(made["rows"].values()) == 90


def test_rows_that_the_gates_refused_are_made_again_from_their_own_scenarios(run: Run) -> None:
    bad = [s.model_copy(deep=True) for s in sample(7, seed=99)]
    for scenario in bad:
        scenario.metadata.scenarioName = "Plan <|im_end|>"  # a completion must not teach control tokens
    with pytest.raises(CourseError, match="control-token"):
        prepare(run, bad)
    seen = read(run.path("training_data", GENERATED))
    with pytest.raises(CourseError, match="control-token"):
        prepare(run)  # not a silent return to the scenarios of the build before
    assert read(run.path("training_data", GENERATED)) == seen and "<|im_end|>" in seen[0].prompt


def test_a_changed_phrase_makes_the_rows_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = tmp_path / "stakelib"
    shutil.copytree(Path(stakelib.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    assert prepare_module.rules(package) == prepare_module.rules()
    voice = package / "voices" / "data" / "finance.yaml"
    voice.write_text(voice.read_text(encoding="utf-8").replace("credit", "loan", 1), encoding="utf-8")
    assert (changed := prepare_module.rules(package)) != prepare_module.rules()
    monkeypatch.setattr(prepare_module, "rules", lambda: changed)
    prepare(run, sample(7, run.profile.seed))
    assert "up to date" not in capsys.readouterr().out
    prepare(run)
    assert "up to date" in capsys.readouterr().out


def test_edits_reach_the_training_files_and_only_then_rows_are_made_again(run: Run) -> None:
    review = open_review(run)
    chosen, gone = [i for i, r in review.rows.items() if r.split == "train"][:2]
    text = review.rows[chosen].completion
    text = text[: text.rindex("\n- ")] + "\n- Bring tea."
    assert review.decide(chosen, "edit", text) == []
    review.decide(gone, "reject")
    made = prepare(Run.open(run.folder, "smoke"))
    assert made["reviewed"] == {"rejected": 1, "edited": 1} and sum(made["rows"].values()) == 89
    rows = {r["id"]: r for r in lines(run, "train.jsonl")}
    assert rows[chosen]["completion"] == text and rows[chosen]["source"] == "edited" and gone not in rows
    assert any("Bring tea." in r["completion"] for r in lines(run, "mlx/train.jsonl"))
    assert len(read(run.path("training_data", GENERATED))) == 90
    assert prepare(run, sample(7, run.profile.seed))["rows"] == made["rows"]  # and regeneration keeps them
    (run.path("training_data", EDITS)).unlink()
    assert sum(prepare(run)["rows"].values()) == 90


def test_an_edit_that_fails_a_gate_stops_the_build_and_names_it(run: Run) -> None:
    review = open_review(run)
    row_id = next(iter(review.rows))
    review.decide(row_id, "edit", review.rows[row_id].completion + "\n- Why 99.9%?")
    with pytest.raises(CourseError) as caught:
        prepare(run)
    assert caught.value.problems[0].startswith(f"stakeholder_dialogues.jsonl:1: {row_id}: figures in prompt")
    review.reset(row_id)
    assert sum(prepare(run)["rows"].values()) == 90


def test_other_tasks_and_a_run_without_rows(run: Run, tmp_path: Path) -> None:
    kinds = Counter(r.task for r in read(run.path("training_data", "stakeholder_dialogues.jsonl")))
    assert kinds == {"dialogue": 72, "enhance": 9, "voice": 9}  # the tool's requests are part of every data set
    more = prepare(run, sample(7, run.profile.seed), enhance=27, voice=0)
    assert sum(more["rows"].values()) == 99
    assert prepare(run)["rows"] == more["rows"]
    with pytest.raises(CourseError, match="run notebook 01 first"):
        prepare(Run.open(tmp_path / "empty", "smoke"))
