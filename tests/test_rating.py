"""Blind rating: sides are hidden, shuffled and recorded; no vote is lost; sheets are read whole or not at all."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from damaged_files import damaged
from hypothesis import given, settings
from hypothesis import strategies as st
from test_evaluation import answer, row

from stakelib import widgets
from stakelib.evaluation import Rating, agreement, preferences, rating_sheet, read_sheet
from stakelib.evaluation.rating import CRITERIA, read_votes
from stakelib.run import CourseError

ROWS = [row(i, f"s{i // 2}", completion=f"rules {i}") for i in range(8)]
SAID = [answer(f"{system} says {i}", i, system) for system in ("base", "tuned") for i in range(8)]


def rating(folder: Path, rater: str = "Ada", rows: list[dict] = ROWS, said: list[dict] = SAID) -> Rating:
    return Rating(folder, rows, said, rater)


def prefer(one: Rating, system: str, rows: int = 8, criterion: str = "accuracy") -> None:
    for i in [f"r{n}" for n in range(rows)]:
        one.vote(i, criterion, "A" if one.side_a(i) == system else "B")


def test_sides_are_shuffled_blind_and_the_same_after_a_restart(tmp_path: Path) -> None:
    many = [row(i) for i in range(400)]
    said = [answer(f"{s} {i}", i, s) for s in ("base", "tuned") for i in range(400)]
    ada, again, ben = (rating(tmp_path, who, many, said) for who in ("Ada", "ada ", "Ben"))
    sides = [ada.side_a(i) for i in ada.rows]
    assert 160 < Counter(sides)["base"] < 240
    assert list(ada.rows) == list(again.rows) and sides == [again.side_a(i) for i in again.rows]
    assert list(ada.rows) != list(ben.rows) != sorted(ben.rows)
    assert 150 < sum(ada.side_a(i) == ben.side_a(i) for i in ada.rows) < 250
    assert all(ada.shown(i)["A"].startswith(ada.side_a(i)) for i in ada.rows)
    assert set(ada.shown("r0")) == {"stakeholder", "prompt", "A", "B"}


def test_a_vote_is_on_disk_at_once_and_says_which_side_was_which(tmp_path: Path) -> None:
    one = rating(tmp_path)
    one.vote("r3", "accuracy", "A")
    one.vote("r3", "accuracy", "same")
    lines = (tmp_path / "ratings-ada.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 and json.loads(lines[0])["a"] == one.side_a("r3")
    assert [v.prefers for v in read_votes(one.file)] == [one.side_a("r3"), "same"]
    again = rating(tmp_path)
    assert again.choice("r3", "accuracy") == "same" and again.choice("r3", "relevance") is None
    for criterion in CRITERIA:
        again.vote("r3", criterion, "B")
    assert again.progress() == "ada: 1 of 8 pairs judged on all 4 criteria" != one.progress()


def test_a_vote_about_other_texts_does_not_count(tmp_path: Path) -> None:
    prefer(rating(tmp_path), "tuned")
    retrained = [{**a, "text": a["text"] + "!"} if a["row_id"] == "r0" else a for a in SAID]
    assert rating(tmp_path, said=retrained).choice("r0", "accuracy") is None
    assert preferences(tmp_path, ROWS, retrained)[0]["votes"] == 7 != preferences(tmp_path, ROWS, SAID)[0]["votes"]


def test_a_line_cut_by_a_kill_goes_and_other_broken_lines_are_all_listed(tmp_path: Path) -> None:
    prefer(rating(tmp_path), "tuned")
    file = tmp_path / "ratings-ada.jsonl"
    whole = file.read_text(encoding="utf-8")
    file.write_text(whole[:-20], encoding="utf-8")
    one = rating(tmp_path)
    assert len(one.votes) == 7
    one.vote("r7", "accuracy", "same")
    assert len(read_votes(file)) == 8
    other = whole.split("\n")[0].replace('"accuracy"', '"beauty"')
    file.write_text(whole.rstrip("\n"), encoding="utf-8")  # as some editors leave it
    assert len(read_votes(file)) == 8 and file.read_text(encoding="utf-8") == whole
    file.write_text(f"no json\n{whole}{other}\n", encoding="utf-8")
    with pytest.raises(CourseError) as problem:
        rating(tmp_path)
    assert [p.split(": ")[0] for p in problem.value.problems] == ["ratings-ada.jsonl:1", "ratings-ada.jsonl:10"]


@pytest.mark.parametrize("name", ["", "../ada", "ada lovelace", "a" * 41, "con:", "-x"])
def test_a_name_that_makes_no_file_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CourseError):
        rating(tmp_path, name)


def filled(
    path: Path,
    changes: dict[int, dict[str, str]],
    delimiter: str = ",",
    semicolons: dict[int, dict[str, str]] | None = None,
) -> Path:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        head, *lines = csv.reader(stream, delimiter=";" if semicolons else ",")
    changes = semicolons or changes
    for number, cells in changes.items():
        lines[number] = [cells.get(name, old) for name, old in zip(head, lines[number], strict=True)]
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows([head, *lines])
    return path


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_a_sheet_hides_the_sides_and_comes_back(delimiter: str, tmp_path: Path) -> None:
    formula = [{**a, "text": "=1+1"} if a["row_id"] == "r0" else a for a in SAID]
    one = rating(tmp_path, said=formula)
    path = rating_sheet(one, tmp_path / "ada.csv")
    text = path.read_text(encoding="utf-8-sig")
    assert "\n'=" not in text and ",=1+1" not in text and text.split("\n")[0].count(",") == 9
    assert not {"tuned", "base"} & set(text.split("\n")[0].split(","))
    filled(path, {0: {"accuracy": " a ", "naturalness": "SAME"}, 5: {"specificity": "B"}}, delimiter)
    assert (read_sheet(one, path), read_sheet(one, path)) == (3, 0)
    first, sixth = list(one.rows)[0], list(one.rows)[5]
    again = rating(tmp_path, said=formula)
    assert (again.choice(first, "accuracy"), again.choice(first, "naturalness")) == ("A", "same")
    assert (again.choice(sixth, "specificity"), len(again.votes)) == ("B", 3)


def test_a_sheet_written_again_keeps_the_votes_in_it(tmp_path: Path) -> None:
    one = rating(tmp_path)
    path = rating_sheet(one, tmp_path / "ada.csv")
    filled(path, {0: {"accuracy": "A"}, 1: {"relevance": "same"}})
    before = path.read_bytes()
    changed = rating(tmp_path / "later", said=[{**a, "text": a["text"] + " More."} for a in SAID])
    with pytest.raises(CourseError, match="another name"):  # votes on other answers: neither taken nor thrown away
        rating_sheet(changed, path)
    assert path.read_bytes() == before and changed.votes == {}
    assert len(one.votes) == 0 and rating_sheet(one, path) == path and len(one.votes) == 2
    rows = csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines())
    assert [row["accuracy"] for row in rows][0] == "A" and rating(tmp_path).votes.keys() == one.votes.keys()
    rating_sheet(one, empty := tmp_path / "empty.csv")
    assert rating_sheet(rating(tmp_path / "later2"), empty) == empty


def test_every_bad_line_of_a_sheet_is_listed_and_nothing_taken(tmp_path: Path) -> None:
    one = rating(tmp_path)
    path = rating_sheet(one, tmp_path / "ada.csv")
    bad = {0: {"accuracy": "A", "relevance": "tuned"}, 2: {"id": "r99"}, 3: {"of": "v1"}, 4: {"id": list(one.rows)[0]}}
    with pytest.raises(CourseError) as problem:
        read_sheet(one, filled(path, bad))
    said = problem.value.problems
    assert [line.split(":")[0] for line in said[:4]] == [f"ada.csv, row {n}" for n in (2, 4, 5, 6)]
    assert "'tuned' is none of A" in said[0] and "r99" in said[1] and one.votes == {} and not one.file.exists()
    with pytest.raises(CourseError, match="not ben's"):
        read_sheet(rating(tmp_path, "Ben"), rating_sheet(one, tmp_path / "again.csv"))
    (tmp_path / "x.csv").write_text("id,accuracy\n", encoding="utf-8")
    with pytest.raises(CourseError, match="column 'naturalness' is missing"):
        read_sheet(one, tmp_path / "x.csv")


def test_a_workbook_goes_out_and_comes_back(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    odd = [{**a, "text": "=1+1\x00"} if a["row_id"] == "r0" else a for a in SAID]
    one = rating(tmp_path, said=odd)
    path = rating_sheet(one, tmp_path / "ada.xlsx")
    book = openpyxl.load_workbook(path)
    sheet = book.active
    at = {cell.value: cell.column for cell in sheet[1]}
    assert sheet.cell([r[0].value for r in sheet].index("r0") + 1, at["A"]).value.startswith("=1+1")
    sheet.cell(2, at["accuracy"], " a ")
    sheet.cell(4, at["relevance"], "Same")
    sheet.move_range("A2:J9", rows=3)  # blank rows above
    book.create_sheet("remarks", 0).append(["I was tired"])
    book.save(path)
    assert (read_sheet(one, path), read_sheet(one, path)) == (2, 0)
    first, third = list(one.rows)[0], list(one.rows)[2]
    assert (one.choice(first, "accuracy"), one.choice(third, "relevance")) == ("A", "same")
    rating_sheet(one, path)  # without the other sheet, which is kept beside it
    assert len(openpyxl.load_workbook(path).sheetnames) == 1
    assert "remarks" in openpyxl.load_workbook(tmp_path / "ada.before-1.xlsx").sheetnames


def test_remarks_of_a_rater_outlive_a_new_sheet(tmp_path: Path) -> None:
    one = rating(tmp_path)
    path = rating_sheet(one, tmp_path / "ada.csv", separator=";")
    text = path.read_text(encoding="utf-8-sig")
    assert text.startswith("id;stakeholder;")
    assert rating_sheet(one, path).read_text(encoding="utf-8-sig") == text and not list(tmp_path.glob("*before*"))
    head, _, body = text.partition("\n")
    path.write_text(f"{head.strip()};remarks\n" + body.replace("\n", ";good\r\n"), encoding="utf-8", newline="")
    rating_sheet(one, path)
    assert path.read_text(encoding="utf-8-sig") == text  # with semicolons, as it was
    assert ";good" in (tmp_path / "ada.before-1.csv").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text + ";;;;;;;;;\r\n" * 5,
        lambda text: "\r\n" + text.replace("accuracy", " Accuracy"),
        lambda text: "sep=;\r\n" + text,
        lambda text: "\n".join('"' + line.replace('"', '""') + '"' for line in text.splitlines()),
    ],
)
def test_habits_of_spreadsheets_in_a_rating_sheet(spoil: Callable[[str], str], tmp_path: Path) -> None:
    one = rating(tmp_path)
    path = rating_sheet(one, tmp_path / "ada.csv", separator=";")
    filled(path, {}, ";", {0: {"accuracy": "B"}})
    path.write_text(spoil(path.read_text(encoding="utf-8-sig")), encoding="utf-8", newline="")
    assert read_sheet(one, path) == 1 and one.choice(list(one.rows)[0], "accuracy") == "B"


def test_votes_that_are_not_utf8_or_were_cut_are_kept(tmp_path: Path) -> None:
    prefer(rating(tmp_path), "tuned")
    file = tmp_path / "ratings-ada.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    assert len(rating(tmp_path).votes) == 7
    assert (tmp_path / "ratings-ada.jsonl.cut").read_bytes() + b"" == whole.split(b"\n")[7][:-19] + b"\n"
    file.write_bytes(whole + b'{"row_id": "\xe9"}\n{"half')
    before = file.read_bytes()
    with pytest.raises(CourseError, match="UTF-8"):
        rating(tmp_path)
    assert file.read_bytes() == before
    file.write_bytes(b"\xff\xfe" + whole.decode().encode("utf-16-le"))
    assert len(rating(tmp_path).votes) == 8
    rating(tmp_path).vote("r1", "relevance", "A")
    assert len(rating(tmp_path).votes) == 9


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_damaged_rating_sheet_is_taken_whole_or_not_at_all(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    one, path = rating(folder), folder / "ada.csv"
    content = data.draw(damaged(filled(rating_sheet(one, path), {0: {"accuracy": "A"}}).read_bytes()))
    path.write_bytes(content)
    try:
        read_sheet(one, path)
    except CourseError as error:
        assert error.problems and all(p.startswith("ada.csv") for p in error.problems)
        assert not one.file.exists()
    assert path.read_bytes() == content


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_damaged_votes_are_read_or_kept_as_they_are(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    one = rating(tmp_path_factory.mktemp("damaged"))
    prefer(one, "tuned", rows=3)
    content = data.draw(damaged(one.file.read_bytes()))
    one.file.write_bytes(content)
    try:
        read_votes(one.file)
    except CourseError as error:
        assert error.problems and all(p.startswith("ratings-ada.jsonl") for p in error.problems)
        assert one.file.read_bytes() == content
    else:
        before = read_votes(one.file)
        one.vote("r5", "relevance", "A")
        assert len(read_votes(one.file)) == len(before) + 1  # the next vote does not join a broken line


def test_preferences_count_wins_with_intervals_over_scenarios(tmp_path: Path) -> None:
    assert preferences(tmp_path, ROWS, SAID) == []
    prefer(rating(tmp_path), "tuned")
    prefer(rating(tmp_path, "Ben"), "tuned", rows=6)
    rating(tmp_path, "Ben").vote("r6", "accuracy", "same")
    (found,) = preferences(tmp_path, ROWS, SAID)
    assert (found["raters"], found["votes"], found["tuned"], found["same"], found["base"]) == (2, 15, 14, 1, 0)
    assert preferences(tmp_path, ROWS[:4], SAID)[0]["votes"] == 8  # other rows do not count
    assert found["share"] == 1.0 and 0.4 < found["low"] < 0.9 and found["net"] == pytest.approx(14 / 15)
    prefer(rating(tmp_path / "no"), "base", rows=1)
    (one,) = preferences(tmp_path / "no", ROWS, SAID)
    assert (one["share"], one["low"], one["high"], one["net"], one["alpha"]) == (0.0, 0.0, 1.0, -1.0, None)


def test_always_the_left_side_shows(tmp_path: Path) -> None:
    lazy = rating(tmp_path)
    for i in lazy.rows:
        lazy.vote(i, "relevance", "A")
    (found,) = preferences(tmp_path, ROWS, SAID)
    assert found["left"] == 1.0 and 0 < found["share"] < 1


def test_agreement_is_krippendorffs_alpha() -> None:
    says = {"t": "tuned", "b": "base", "=": "same", ".": None}

    def made(*raters: str) -> float | None:
        return agreement([[says[x] for x in rater] for rater in raters])

    assert made("ttbb=", "ttbb=") == pytest.approx(1.0)
    assert made("ttbb", "bbtt") < 0  # worse than chance
    assert made("ttttttttt", "ttttttttb") == pytest.approx(0.0, abs=0.01)  # nine tenths agree, out of habit
    assert made("ttb", "ttb", "...") == pytest.approx(1.0)
    assert made("tb=t", "tb=b") < made("tb=t", "tb==")  # base against tuned is graver than against no difference
    assert made("tttt", "tttt") is made("tb..", "..tb") is made("tbt") is None


# ---- the widgets, without a browser


def test_the_ballot_votes_only_when_a_person_does(tmp_path: Path) -> None:
    ballot = widgets._Ballot(rating(tmp_path))
    first, second = list(ballot.rating.rows)[:2]
    assert not ballot.rating.file.exists() and ballot.sides["A"].value == ballot.rating.shown(first)["A"]
    ballot.votes["accuracy"].value = "B"
    ballot.pager.turn(1)
    assert ballot.votes["accuracy"].value is None and ballot.sides["B"].value == ballot.rating.shown(second)["B"]
    ballot.pager.turn(-1)
    assert ballot.votes["accuracy"].value == "B"
    assert [(v.row_id, v.choice) for v in read_votes(ballot.rating.file)] == [(first, "B")]
    assert widgets._Ballot(rating(tmp_path, rows=[])).votes["accuracy"].disabled


def test_the_chat_shows_three_systems_and_says_what_went_wrong() -> None:
    def ask(system: str, asked: list[dict]) -> list[dict]:
        if asked[0]["prompt"] == "too long":
            raise CourseError("too long", "shorten the prompt")
        return [answer(f"{system}: {asked[0]['prompt'][:3]}")]

    box = widgets.chat([ROWS[0], row(1, prompt="Hello", completion="rules 1")], ask)
    starts, prompt, button, columns = box.children
    shown = {column.children[0].value: column.children[1] for column in columns.children}
    button.click()
    assert [shown[s].value for s in ("base", "tuned", "rules")] == ["base: You", "tuned: You", "rules 0"]
    starts.value = "Hello"
    button.click()
    assert [shown[s].value for s in ("tuned", "rules")] == ["tuned: Hel", "rules 1"]
    prompt.value = "too long"
    button.click()
    assert "shorten" in shown["base"].value and "only a prompt of the list" in shown["rules"].value
    assert button.disabled is False
