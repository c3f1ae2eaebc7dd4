"""Tables that come from a spreadsheet or go to one: CSV with any of its habits, and Excel workbooks (.xlsx)."""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
import itertools
import re
import unicodedata
import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stakelib.run import CourseError, link, writing

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 20  # problems of one kind that are listed one by one
SEPARATORS = ",;\t"
SEARCHED = 100  # rows in which the header is looked for
LONGEST = 32_767  # characters that Excel keeps in a cell
MAX_BYTES = 500_000_000  # of a text file, or of what a workbook unpacks to
FORMULA = tuple("=+-@\t\n＝＋－＠")  # a cell that begins so may be run as a formula
SAVE = "save it in Excel as 'CSV UTF-8' or as 'Excel Workbook (.xlsx)', then read it again."
MEND = "mend the places named above and read the file again; nothing was taken over."
OTHERS = {  # what a file of another spreadsheet program holds, and what that program calls it
    "xl/workbook.bin": "an Excel binary workbook (.xlsb)",
    "content.xml": "an OpenDocument sheet (.ods)",
    "Index/Document.iwa": "a Numbers document",
    "Index.zip": "a Numbers document",
}


def read_sheet(path: str | Path, *wanted: Collection[str], optional: Collection[str] = ()) -> pd.DataFrame:
    """The table in a .csv, .tsv, .txt or .xlsx file, whatever its name ends in; every cell is text, "" where empty.

    `wanted`: one or more sets of columns. The header is the first row that holds all of one set, in any order and
    case; it and `optional` come back in the spelling given here, other columns in their own. The index is the row in
    the file as Excel counts. Blank rows, lines of dashes, text above the header and empty columns are left out.
    Raises CourseError with every problem, each with file and row.
    """
    path = Path(path)
    data = _bytes(path)
    if not _is_workbook(data):
        if path.suffix.lower() == ".xlsx" and b"\0" in data[:5000]:
            raise CourseError(f"{path.name} is no Excel workbook: it is damaged", "ask for the file again.")
        return parse_sheet(decode(data, path.name), path.name, *wanted, optional=optional)
    return _from_workbook(data, path.name, wanted, optional)


def parse_sheet(text: str, name: str, *wanted: Collection[str], optional: Collection[str] = ()) -> pd.DataFrame:
    """Like `read_sheet`, for the text of a CSV file called `name`."""
    if "\0" in text or not _encodes(text):
        raise CourseError(f"{name} holds bytes that are no text: its encoding is unknown, or it is damaged", SAVE)
    text = plain(text.lstrip("\ufeff"))
    try:
        return _parsed(text, name, wanted, optional)
    except CourseError:
        for outer in SEPARATORS:  # an Excel of another language put each line, whole, into one cell
            with contextlib.suppress(CourseError):
                whole = _unwrapped((row for _, row in _rows(text, outer, name)), outer)
                return _parsed(whole, name, wanted, optional, SEPARATORS.replace(outer, ""))
        raise


def _parsed(
    text: str, name: str, wanted: Sequence[Collection[str]], optional: Collection[str], separators: str = SEPARATORS
) -> pd.DataFrame:
    if told := re.match(r'"?sep=([,;\t])"?[,;\t]*(?:\r\n|\r|\n|$)', text, re.IGNORECASE):
        separators, text = told[1], text[told.end() :]  # Excel neither shows nor counts this line
    heads = [_head(text, s) for s in separators]
    for rows, s in zip(heads, separators, strict=True):
        if _header(rows, wanted):
            return _table(_rows(text, s, name), name, wanted, optional, padded=False)
    list(_rows(text, max(separators, key=text[:5000].count), name))  # a damaged file is told as such
    best = max(heads, key=lambda rows: _matches(rows, wanted)[0])
    raise _no_header(name, list(enumerate(best, 1)), wanted)


def is_workbook(path: str | Path) -> bool:
    """Whether the file is an Excel workbook, or one of another program, and so no text."""
    return _is_workbook(_bytes(Path(path)))


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with its mark. CourseError if it cannot be read."""
    return decode(_bytes(Path(path)), Path(path).name)


def decode(data: bytes, name: str, next_action: str = SAVE) -> str:
    """Bytes of a file as text; the mark at its start decides, without one it must be UTF-8."""
    utf16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        return data.decode("utf-16" if utf16 else "utf-8").lstrip("\ufeff")
    except UnicodeDecodeError as error:
        raise CourseError(
            f"{name}: not UTF-8 (byte {error.start:,}): accents and signs would be lost", next_action
        ) from error


def write_sheet(path: str | Path, rows: Iterable[Sequence[str]], columns: Sequence[str], separator: str = "") -> Path:
    """Write a table for people: .xlsx, or CSV in UTF-8 with the mark that Excel needs, by what the name ends in.

    `separator`: ";" for an Excel in French, German and most other languages of Europe; where it is not given, that of
    the file which is there, else ",". No cell becomes a formula.
    A file of that name stays as it is if it holds these rows already, else it is kept as <name>.before-<number>.
    Raises CourseError for another ending, for a cell longer than Excel keeps, and if the file cannot be written.
    """
    path = Path(path)
    kind, separator = path.suffix.lower(), separator or _separator(path)
    if kind not in (".csv", ".tsv", ".txt", ".xlsx") or separator not in tuple(SEPARATORS):
        what = f"{path.name}, separator {separator!r}"
        raise CourseError(f"{what}: such a sheet cannot be written", "end the name in .csv or .xlsx; use ',' or ';'.")
    cells = [[plain(cell) for cell in row] for row in (columns, *rows)]
    long = [(n, f"a cell holds more than {LONGEST:,} characters") for n, r in enumerate(cells, 1) if _longest(r)]
    if long:
        raise CourseError(listed(path.name, long), "shorten these texts: no spreadsheet keeps them whole.")
    if path.exists() and _holds(path, cells) and separator == _separator(path):
        return path
    aside = _set_aside(path)
    try:
        with writing(path) as part:
            if kind == ".xlsx":
                _write_workbook(part, cells)
            else:
                with part.open("w", encoding="utf-8-sig", newline="") as stream:
                    csv.writer(stream, delimiter=separator).writerows(map(as_cell, row) for row in cells)
    except OSError as error:
        if aside:
            aside.unlink(missing_ok=True)
        why = error.strerror or error
        raise CourseError(f"{path}: cannot be written ({why})", "close it in Excel, or choose another name.") from error
    return path


def _separator(path: Path) -> str:
    with contextlib.suppress(CourseError):
        head = "" if is_workbook(path) else read_text(path)[:5000].partition("\n")[0]
        return max(SEPARATORS, key=head.count)
    return ","


def _holds(path: Path, cells: Sequence[Sequence[str]]) -> bool:
    with contextlib.suppress(CourseError):
        table = read_sheet(path, cells[0])
        return [list(table.columns), *table.to_numpy().tolist()] == [list(row) for row in cells]
    return False


def _set_aside(path: Path) -> Path | None:
    """A person may have written in the sheet, in columns of their own too: it is never thrown away."""
    if not path.is_file():
        return None
    names = (path.with_name(f"{path.stem}.before-{n}{path.suffix}") for n in itertools.count(1))
    free = next(name for name in names if not name.exists())
    link(path, free)
    return free


def plain(text: str) -> str:
    """A text as a spreadsheet can hold it: lines end in \\n, characters that no sheet knows become U+FFFD."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)


def as_cell(text: str) -> str:
    """A spreadsheet runs a cell that begins like a formula: an apostrophe before it keeps it text."""
    return f"'{text}" if text.lstrip("'")[:1] in FORMULA else text


def from_cell(cell: str) -> str:
    """The text that `as_cell` wrote."""
    return cell[1:] if cell[:1] == "'" and cell.lstrip("'")[:1] in FORMULA else cell


def listed(name: str, problems: Sequence[tuple[Any, str]]) -> list[str]:
    """Problems as lines with file and row; after the first SHOWN only how many more there are."""
    more = [f"{name}: and {len(problems) - SHOWN} more rows like these"] if len(problems) > SHOWN else []
    return [f"{name}: row {row}: {text}" for row, text in problems[:SHOWN]] + more


# ------------------------------------------------------------------------------------------------- rows to a table

Row = tuple[int, list[str]]  # its number as Excel counts, its cells


def _bytes(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CourseError(f"{path.name} is larger than {MAX_BYTES:,} bytes", "leave out rows that are not needed.")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        why = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({why})"
        raise CourseError(f"{path}: {why}", "check the path, and close the file in other programs.") from error


def _is_workbook(data: bytes) -> bool:
    return data[:4] in (b"PK\x03\x04", b"PK\x05\x06", b"\xd0\xcf\x11\xe0")


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _rows(text: str, separator: str, name: str) -> Iterator[Row]:
    number = 0
    try:
        for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True):
            number += 1
            yield number, row
    except csv.Error as error:
        why = "a quotation mark is not closed" if "unexpected end" in str(error) else str(error)
        why = "a text goes on after its closing quotation mark" if "expected after" in why else why
        raise CourseError(f"{name}: row {number + 1}: not a readable table ({why})", MEND) from error


def _head(text: str, separator: str) -> list[list[str]]:
    """The first rows, as far as they can be read."""
    rows: list[list[str]] = []
    try:
        rows.extend(row for _, row in itertools.islice(_rows(text, separator, ""), SEARCHED))
    except CourseError:
        return rows
    return rows


def _unwrapped(rows: Iterable[Sequence[str]], separator: str) -> str:
    """The text of a file before a spreadsheet took each of its lines for one cell."""
    return "\n".join(separator.join(row).rstrip(separator) for row in rows)


def _key(cell: str) -> str:
    """A heading without its case and its blanks, of whatever kind."""
    return " ".join(unicodedata.normalize("NFKC", cell).replace("\u200b", "").replace("\ufeff", "").split()).casefold()


def _header(rows: Iterable[Sequence[str]], wanted: Sequence[Collection[str]]) -> tuple[int, Collection[str]] | None:
    """Place of the first row that holds all of one set of columns, and that set."""
    for place, row in enumerate(rows):
        keys = {_key(cell) for cell in row}
        for columns in wanted:
            if keys.issuperset(map(_key, columns)):
                return place, columns
    return None


def _matches(rows: Sequence[Sequence[str]], wanted: Sequence[Collection[str]]) -> tuple[int, int, Collection[str]]:
    """How many columns the row most like a header holds, its place, and the set of columns it should hold."""
    best = (0, 0, wanted[0])
    for place, row in enumerate(rows):
        keys = {_key(cell) for cell in row}
        for columns in wanted:
            best = max(best, (sum(_key(c) in keys for c in columns), place, columns), key=lambda found: found[0])
    return best


def _no_header(name: str, numbered: Sequence[Row], wanted: Sequence[Collection[str]]) -> CourseError:
    rows = [row for _, row in numbered]
    count, place, columns = _matches(rows, wanted)
    if not any(map(str.strip, itertools.chain(*rows))):
        return CourseError(f"{name}: the file is empty", SAVE)
    keys = {_key(cell) for cell in rows[place]} if count else set()
    missing = [f"{name}: row {numbered[place][0]}: column {c!r} is missing" for c in columns if _key(c) not in keys]
    if count:
        return CourseError(missing, "give the columns these names in the first row of the table.")
    sets = " or ".join(", ".join(columns) for columns in wanted)
    return CourseError(f"{name}: no row holds the column names {sets}", "put these names above the table.")


def _is_rule(row: Sequence[str]) -> bool:
    """Nothing but blanks, or a line of dashes below a heading."""
    if row and row[0][:1].isalnum():  # by far the most rows
        return False
    return all(re.fullmatch(r"[\s\u200b\ufeff]*([-=_*+–—]{3,}\s*)?", cell) for cell in row)


def _table(
    numbered: Iterable[Row], name: str, wanted: Sequence[Collection[str]], optional: Collection[str], padded: bool
) -> pd.DataFrame:
    """The DataFrame below the header. `padded`: a row may end early, as in a workbook, where empty cells are absent."""
    import pandas as pd

    rows = iter(numbered)
    first = list(itertools.islice(rows, SEARCHED))
    place, columns = _header([row for _, row in first], wanted) or (0, wanted[0])
    spelling = {_key(c): c for c in (*optional, *columns)}
    header = [spelling.get(_key(cell), " ".join(cell.split())) for cell in first[place][1]]
    width = max(n for n, cell in enumerate(header, 1) if cell)
    below = [(n, row) for n, row in itertools.chain(first[place + 1 :], rows) if not _is_rule(row)]
    problems = [
        f"{name}: row {first[place][0]}: column {c!r} comes twice"
        for c in dict.fromkeys(header)
        if c and header.count(c) > 1
    ]
    if not padded:
        problems += listed(name, [(n, "has fewer cells than the header") for n, row in below if len(row) < width])
    nameless = [at for at, cell in enumerate(header[:width]) if not cell]
    beside = [(n, _astray(row, nameless, width)) for n, row in below if nameless or len(row) > width]
    problems += listed(name, [(n, f"{cell[:30]!r} stands in a column without a name") for n, cell in beside if cell])
    if problems:
        raise CourseError(problems, MEND)
    whole = (row if len(row) >= width else [*row, *[""] * (width - len(row))] for _, row in below)
    data = {
        title: [from_cell(cell) if cell[:1] == "'" else cell for cell in column]
        for title, column in zip(header, zip(*whole, strict=False), strict=False)
        if title
    }
    return pd.DataFrame(data, columns=[title for title in header if title], index=[n for n, _ in below], dtype=str)


def _astray(row: Sequence[str], nameless: Sequence[int], width: int) -> str:
    """The first text of a row that stands below no heading."""
    return next((c for c in (*(_cell(row, at) for at in nameless), *row[width:]) if not _is_rule([c])), "")


def _cell(row: Sequence[str], at: int) -> str:
    return row[at] if at < len(row) else ""


# ------------------------------------------------------------------------------------------------- workbooks


def _longest(row: Sequence[str]) -> bool:
    return any(len(cell) > LONGEST for cell in row)


def _from_workbook(
    data: bytes, name: str, wanted: Sequence[Collection[str]], optional: Collection[str]
) -> pd.DataFrame:
    _check_workbook(data, name)
    tables, heads, problems = {}, [], []
    try:
        sheets = _sheets(data)
    except Exception as error:  # a damaged workbook can fail anywhere in openpyxl
        raise CourseError(f"{name} cannot be read as an Excel workbook: it is damaged", SAVE) from error
    for title, (rows, wrong) in sheets.items():
        heads.append(rows[:SEARCHED])
        if _header([row for _, row in heads[-1]], wanted):
            problems += listed(f"{name}, sheet {title!r}", wrong)
            tables[title] = [] if wrong else _table(rows, name, wanted, optional, padded=True)
            continue
        with contextlib.suppress(CourseError):  # each line of a CSV, whole, in one cell
            tables[title] = _parsed(_unwrapped((row for _, row in rows), ";"), name, wanted, optional)
    if problems:
        raise CourseError(problems, MEND)
    filled = {title: table for title, table in tables.items() if len(table)} or tables
    if len(filled) > 1:
        told = ", ".join(map(repr, filled))
        raise CourseError(f"{name}: {len(filled)} sheets hold such a table: {told}", "keep one of them in the file.")
    if not filled:
        told = ", ".join(map(repr, sheets)) or "none that can be read"
        best = max(heads, key=lambda rows: _matches([row for _, row in rows], wanted)[0], default=[])
        problem = _no_header(name, best, wanted)
        raise CourseError(
            [f"{name}: no sheet holds the table (sheets: {told})", *problem.problems], problem.next_action
        )
    return next(iter(filled.values()))


def _check_workbook(data: bytes, name: str) -> None:
    if data[:4] == b"\xd0\xcf\x11\xe0":
        raise CourseError(f"{name} is an old Excel file (.xls), or protected by a password", SAVE)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            inside = {info.filename: info.file_size for info in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError) as error:
        raise CourseError(f"{name} is a damaged workbook ({error})", "ask for the file again.") from error
    other = next((what for part, what in OTHERS.items() if part in inside), "a zip file, but no workbook")
    if "[Content_Types].xml" not in inside or "xl/workbook.bin" in inside:
        raise CourseError(f"{name} is {other}", SAVE)
    if sum(inside.values()) > MAX_BYTES:
        raise CourseError(f"{name} unpacks to more than {MAX_BYTES:,} bytes", "leave out rows that are not needed.")


def _sheets(data: bytes) -> dict[str, tuple[list[Row], list[tuple[str, str]]]]:
    """Of every sheet the rows that hold something, and (row, problem) of cells that say nothing certain."""
    from openpyxl import load_workbook

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what openpyxl leaves out (colours, lists to choose from)
        book = load_workbook(io.BytesIO(data), read_only=True, data_only=False)
        found, formulas = {}, set()
        for sheet in book.worksheets:
            sheet.reset_dimensions()  # what the file says of its own size may be wrong by a million rows
            rows, wrong = [], []
            for number, cells in enumerate(sheet.iter_rows(), 1):
                texts = [_shown(cell, wrong) for cell in cells]
                formulas |= {(sheet.title, number, at) for at, c in enumerate(cells) if c.data_type == "f"}
                if any(texts):
                    rows.append((number, texts))
            found[sheet.title] = rows, wrong
        if not formulas:
            return found
        book = load_workbook(io.BytesIO(data), read_only=True, data_only=True)  # what Excel last calculated
        for sheet in book.worksheets:
            sheet.reset_dimensions()
            rows, wrong = dict(found[sheet.title][0]), found[sheet.title][1]
            for number, cells in enumerate(sheet.iter_rows(), 1):
                for at, cell in enumerate(cells):
                    if (sheet.title, number, at) in formulas:
                        rows[number][at] = _shown(cell, wrong)
                        if cell.value is None:
                            wrong.append((number, f"column {at + 1} is a formula that was never calculated"))
            found[sheet.title] = list(rows.items()), wrong
    return found


def _shown(cell: Any, wrong: list[tuple[int, str]]) -> str:
    """A cell's value as text, as a person reads it; numbers with all their digits. Doubts go to `wrong`."""
    value = cell.value
    if value is None:
        return ""
    if cell.data_type == "f":
        return "="  # its value comes from the second reading
    if cell.data_type == "e":
        wrong.append((cell.row, f"column {cell.column} holds the error {value}"))
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, int | float):
        form = re.sub(r'"[^"]*"|\\.|\[[^]]*\]', "", cell.number_format or "")
        if re.search(r"[0#?],+(?![0#?,])", form):
            wrong.append((cell.row, f"column {cell.column}: {value} is shown in thousands (format {form})"))
        return f"{_digits(round(value * 100, 12))}%" if "%" in form else _digits(value)
    if isinstance(value, datetime.datetime):
        if re.fullmatch("y+", (cell.number_format or "").lower()):
            return str(value.year)
        return value.date().isoformat() if value.time() == datetime.time() else value.isoformat(" ")
    text = re.sub(r"_x005F(_x[0-9A-Fa-f]{4}_)|_x000D_", r"\1", plain(str(value)))
    return as_cell(text) if cell.style_array.quotePrefix else text  # marked as text: its apostrophe is its own


def _digits(value: float) -> str:
    """15 digits, as Excel has them: 2030, not 2030.0; 0.62, not 0.6200000000000001."""
    if isinstance(value, int) or abs(value) < 1e15 and value == int(value):
        return str(int(value))
    return repr(float(f"{value:.15g}"))


def _write_workbook(path: Path, cells: Sequence[Sequence[str]]) -> None:
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.styles import Alignment, Font
    from openpyxl.utils import get_column_letter

    book = Workbook(write_only=True)
    sheet = book.create_sheet("sheet")
    sheet.freeze_panes = "A2"
    for at, column in enumerate(zip(*cells, strict=True), 1):
        sheet.column_dimensions[get_column_letter(at)].width = 60 if max(map(len, column)) > 60 else 16
    for number, row in enumerate(cells):
        line = []
        for text in row:
            cell = WriteOnlyCell(sheet, re.sub("_x(?=[0-9A-Fa-f]{4}_)", "_x005F_x", text))
            cell.data_type = "s"  # a text, whatever it begins with
            cell.alignment = Alignment(wrap_text=True, vertical="top")
            cell.font = Font(bold=number == 0)
            cell.quotePrefix = as_cell(text) != text  # and it stays one when a person types in it
            line.append(cell)
        sheet.append(line)
    book.save(path)
