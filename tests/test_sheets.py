"""Tables from spreadsheets: every habit of Excel, LibreOffice and people reads right or is refused by row."""

from __future__ import annotations

import csv
import datetime
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stakelib.run import CourseError
from stakelib.sheets import as_cell, from_cell, parse_sheet, plain, read_sheet, read_text, write_sheet

WANTED = ("id", "year", "value")
ROWS = [("a", "2030", "0.62"), ("b", "2040", 'He said "x, y; z"\nand left — élan ≥ 5')]
NBSP = "\u00a0"


def text_of(rows: list[Any], separator: str = ",", end: str = "\r\n") -> str:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=separator, lineterminator=end).writerows(rows)
    return out.getvalue()


def through_the_wrong_excel(text: str, separator: str) -> str:
    """An Excel that splits at `separator` opens the text and saves it: no line of it is split where it should be."""
    return text_of([line.split(separator) for line in text.replace("\r\n", "\n").split("\n")], separator)


TABLE = [WANTED, *ROWS]
COMMA = text_of(TABLE)
GOOD: dict[str, str | bytes] = {
    "comma": COMMA,
    "semicolon": text_of(TABLE, ";"),
    "tab": text_of(TABLE, "\t"),
    "sep line": "sep=;\r\n" + text_of(TABLE, ";"),
    "sep line that a spreadsheet saved again": '"sep=;"\r\n' + text_of(TABLE, ";"),
    "mark": b"\xef\xbb\xbf" + COMMA.encode(),
    "mark twice": b"\xef\xbb\xbf" * 2 + COMMA.encode(),
    "utf-16 little": b"\xff\xfe" + COMMA.encode("utf-16-le"),
    "utf-16 big": b"\xfe\xff" + text_of(TABLE, "\t").encode("utf-16-be"),
    "lf": text_of(TABLE, end="\n"),
    "cr": text_of(TABLE, end="\r"),
    "no last line end": COMMA.rstrip(),
    "one column, French Excel": through_the_wrong_excel(COMMA, ";"),
    "one column, our semicolons in an American Excel": through_the_wrong_excel(text_of(TABLE, ";"), ","),
    "blank first line": "\r\n" + COMMA,
    "title": "Results of the workshop\r\n\r\n" + COMMA,
    "title with separators": "Results, of the workshop,,\r\n" + COMMA,
    "empty columns at the end": text_of([[*row, "", ""] for row in TABLE]),
    "empty column in the middle": text_of([[row[0], " ", *row[1:]] for row in TABLE]),
    "rows with empty cells": text_of([TABLE[0], ["", "", ""], *TABLE[1:], [" ", NBSP, ""], ["", "", ""]], ";"),
    "blank lines": COMMA.replace("\r\nb", "\r\n\r\n\r\nb") + "\r\n\r\n",
    "line of dashes": text_of([TABLE[0], ["-----", "====", "---"], *TABLE[1:]]),
    "capitals and blanks": text_of([[f"{NBSP} {c.upper()} " for c in WANTED], *ROWS]),
    "columns moved": text_of([row[::-1] for row in TABLE]),
}


def cells_of(table: Any) -> list[tuple[str, ...]]:
    return list(table[list(WANTED)].itertuples(index=False, name=None))


@pytest.mark.parametrize("habit", GOOD)
def test_habits_of_spreadsheets_read_right(habit: str, tmp_path: Path) -> None:
    path, content = tmp_path / "mine.csv", GOOD[habit]
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    table = read_sheet(path, ("country", "unit"), WANTED)
    assert cells_of(table) == ROWS and set(table.columns) == set(WANTED)


def test_the_row_is_the_one_that_excel_shows() -> None:
    text = text_of([["Title"], [], WANTED, *ROWS[1:], [], *ROWS[:1]])
    assert list(parse_sheet(text, "x.csv", WANTED).index) == [4, 6]
    assert list(parse_sheet("sep=,\n" + text, "x.csv", WANTED).index) == [4, 6]  # Excel does not show this line


def test_more_columns_stay_and_optional_ones_get_their_spelling() -> None:
    table = parse_sheet("ID,Remarks,YEAR,unit,Value\na,ok,2030,MW,1\n", "x.csv", WANTED, optional=["Unit", "Source"])
    assert list(table.columns) == ["id", "Remarks", "year", "Unit", "value"]


BAD: dict[str, tuple[str | bytes, str]] = {
    "cp1252": (COMMA.encode("cp1252", "replace"), "CSV UTF-8"),
    "utf-16 without mark": (COMMA.encode("utf-16-le"), "CSV UTF-8"),
    "empty": ("", "empty"),
    "blank rows only": (",,\r\n\r\n", "empty"),
    "another table": ("x,y\n1,2\n", "no row holds the column names id, year, value"),
    "a column missing": ("id,year\na,2030\n", "row 1: column 'value' is missing"),
    "a column twice": ("id,year,value,year\na,1,2,3\n", "row 1: column 'year' comes twice"),
    "decimal comma": ("id,year,value\na,2030,0,62\n", "row 2: '62' stands in a column without a name"),
    "text in a nameless column": ("id,,year,value\na,,2030,1\nb,see here,2030,1\n", "row 3: 'see here'"),
    "row cut": ("id,year,value\na,2030\n", "row 2: has fewer cells"),
    "quote not closed": ('id,year,value\na,"2030,1\n', "row 2: not a readable table"),
    "quote in the middle": ('id,year,value\na,"2030"x,1\n', "row 2: not a readable table (a text goes on"),
    "nul": ("id,year,value\na,2030,\0\n", "no text"),
    "half a character": ("id,year,value\na,2030,\ud83d\n", "no text"),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_cannot_be_read_for_certain_is_refused(fault: str, tmp_path: Path) -> None:
    path, (content, said) = tmp_path / "mine.csv", BAD[fault]
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    with pytest.raises(CourseError) as caught:
        if "surrogate" in fault:
            parse_sheet(str(content), "mine.csv", WANTED)
        read_sheet(path, WANTED)
    assert said in str(caught.value) or fault == "half a character"
    assert all("mine.csv" in problem for problem in caught.value.problems)


def test_all_rows_that_are_wrong_are_named_at_once() -> None:
    text = "id,year,value\na\na,1,2,3\n" + "a\n" * 30
    with pytest.raises(CourseError) as caught:
        parse_sheet(text, "x.csv", WANTED)
    assert len(caught.value.problems) == 22 and "and 11 more" in caught.value.problems[20]


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone.csv", tmp_path / "no\0name"):
        with pytest.raises(CourseError):
            read_sheet(path, WANTED)
        with pytest.raises(CourseError):
            read_text(path)


# ------------------------------------------------------------------------------------------------- workbooks


def book(path: Path, fill: Callable[[Any], None]) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    workbook = openpyxl.Workbook()
    fill(workbook)
    workbook.save(path)
    return path


def put(*rows: Any) -> Callable[[Any], None]:
    def fill(workbook: Any) -> None:
        for row in rows:
            workbook.active.append(row)

    return fill


def test_a_workbook_reads_as_a_person_sees_it(tmp_path: Path) -> None:
    def fill(workbook: Any) -> None:
        sheet = workbook.active
        for row in (["Results"], [], ["ID ", "Year", "VALUE", None], ["a", 2030.0, 0.1 + 0.2], [None], ["b", 2040, 3]):
            sheet.append(row)
        sheet.append(["c", datetime.date(2030, 1, 1), 0.38])
        sheet.append(["d", datetime.datetime(2050, 1, 1), 1400])
        sheet["C7"].number_format, sheet["B8"].number_format, sheet["C8"].number_format = "0%", "yyyy", '#,##0 "%"'
        sheet["A1048576"].number_format = "0.00"  # a formatted cell far below
        workbook.create_sheet("notes").append(["anything"])

    table = read_sheet(book(tmp_path / "mine.xlsx", fill), WANTED)
    wanted = [("a", "2030", "0.3"), ("b", "2040", "3"), ("c", "2030-01-01", "38%"), ("d", "2050", "1400")]
    assert cells_of(table) == wanted and list(table.index) == [4, 6, 7, 8]


def test_a_workbook_where_each_row_stands_in_one_cell(tmp_path: Path) -> None:
    lines = [[line] for line in COMMA.replace("\r\n", "\n").split("\n")]
    assert cells_of(read_sheet(book(tmp_path / "mine.xlsx", put(*lines)), WANTED)) == ROWS


def test_what_a_workbook_does_not_say_for_certain_is_refused(tmp_path: Path) -> None:
    def fill(workbook: Any) -> None:
        put(WANTED, ["a", "=2000+30", "#DIV/0!"], ["b", 2030, 1400], ["c", 2030, 1])(workbook)
        workbook.active["C3"].number_format = "#,##0,"

    with pytest.raises(CourseError) as caught:
        read_sheet(book(tmp_path / "mine.xlsx", fill), WANTED)
    said = sorted(caught.value.problems)
    assert [p.split(": ")[1] for p in said] == ["row 2", "row 2", "row 3"] and "never calculated" in str(said)


def test_one_sheet_must_hold_the_table(tmp_path: Path) -> None:
    def fill(workbook: Any) -> None:
        put(WANTED, ["a", 2030, 1])(workbook)
        put(WANTED)(workbook)
        workbook.create_sheet("more").append(WANTED)

    path = tmp_path / "mine.xlsx"
    assert len(read_sheet(book(path, fill), WANTED)) == 2  # the second sheet holds no row

    def twice(workbook: Any) -> None:
        fill(workbook)
        workbook["more"].append(["b", 1, 1])

    with pytest.raises(CourseError, match="'more'"):
        read_sheet(book(path, twice), WANTED)
    with pytest.raises(CourseError, match="'Sheet'"):
        read_sheet(book(path, put(["x"])), WANTED)
    with pytest.raises(CourseError, match="row 3: column 'value' is missing"):
        read_sheet(book(path, put(["x"], [], ["id", "year"])), WANTED)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(512), ".xls"),
        (b"PK\x03\x04 and nothing", "damaged"),
        (b"P\x03\x04\x00\xe9", "damaged"),
        ({"content.xml": "<x/>"}, ".ods"),
        ({"Index/Document.iwa": ""}, "Numbers"),
        ({"[Content_Types].xml": "", "xl/workbook.bin": ""}, ".xlsb"),
        ({"a.txt": ""}, "zip"),
        ({"[Content_Types].xml": "<Types/>"}, "cannot be read"),
    ],
)
def test_workbooks_of_other_programs_are_named(content: bytes | dict[str, str], said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.xlsx"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in content.items():
                archive.writestr(name, text)
    with pytest.raises(CourseError, match=said) as caught:
        read_sheet(path, WANTED)
    assert ".xlsx" in caught.value.next_action or "again" in caught.value.next_action


# ------------------------------------------------------------------------------------------------- writing

HARD = ["=1+1", "'=1", "'quoted'", "''", "+4", "-x", "@a", "\ttab", "\n- item", "1e5", "007", "TRUE", "_x000D_", "ü≥“”"]


@pytest.mark.parametrize(("name", "separator"), [("x.csv", ","), ("x.csv", ";"), ("x.csv", "\t"), ("x.xlsx", ",")])
def test_what_is_written_comes_back(name: str, separator: str, tmp_path: Path) -> None:
    rows = [(str(n), text, text) for n, text in enumerate(HARD)]
    path = write_sheet(tmp_path / name, rows, WANTED, separator)
    assert cells_of(read_sheet(path, WANTED)) == rows


def test_a_workbook_holds_texts_and_no_formula(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    path = write_sheet(tmp_path / "x.xlsx", [("=1+1", "2030", "@SUM(1)")], WANTED)
    sheet = openpyxl.load_workbook(path).active
    assert [c.data_type for c in sheet[2]] == ["s", "s", "s"] and sheet["A2"].value == "=1+1"
    assert sheet["A2"].quotePrefix and not sheet["B2"].quotePrefix


def test_a_sheet_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = write_sheet(tmp_path / "x.csv", ROWS, WANTED)
    before = path.read_bytes()
    with pytest.raises(CourseError, match="row 3"):
        write_sheet(path, [ROWS[0], ("b", "1", "x" * 32_768)], WANTED)
    for other in ("x.xls", "x.ods", "x"):
        with pytest.raises(CourseError, match=r"\.xlsx"):
            write_sheet(tmp_path / other, ROWS, WANTED)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(CourseError):
        write_sheet(tmp_path / "x.csv" / "y.csv", ROWS, WANTED)
    with pytest.raises(CourseError):
        write_sheet(tmp_path / "folder.csv", ROWS, WANTED)
    assert path.read_bytes() == before and not list(tmp_path.glob("*before*"))


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_no_cell_is_a_formula(text: str) -> None:
    cell = as_cell(text)
    assert cell[:1] not in ("=", "+", "-", "@", "\t")
    assert from_cell(cell) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.text(), st.text(), st.text()), max_size=5), st.sampled_from(",;\t"))
def test_any_text_comes_back(rows: list[tuple[str, str, str]], separator: str) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=separator)
    writer.writerow(WANTED)
    writer.writerows([f"x{a}", as_cell(plain(b)), as_cell(plain(c))] for a, b, c in rows if plain(a) == a)
    wanted = [(f"x{a}", plain(b), plain(c)) for a, b, c in rows if plain(a) == a]
    assert cells_of(parse_sheet(out.getvalue(), "x.csv", WANTED)) == wanted


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from(list("id,year,value;\t\r\n\"='- é\ufeff\0sep")), max_size=60))
def test_any_text_reads_or_is_refused(text: str) -> None:
    for content in (text, COMMA + text, text + COMMA):
        try:
            table = parse_sheet(content, "x.csv", WANTED)
        except CourseError as error:
            assert all("x.csv" in problem for problem in error.problems)
        else:
            assert set(WANTED) <= set(table.columns)
