"""Scenario files that are damaged in many ways, for the tests and for benchmarks/fuzz_load.py."""

from __future__ import annotations

import io
import json
import math
import random
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from splat_file import kestrelia, text_of

from stakelib.dialogues import prompt_text
from stakelib.run import CourseError
from stakelib.scenarios import Scenario, derive_metrics, load, scenario_id
from stakelib.scenarios.names import plain

JSON = (Path(__file__).parent / "data" / "two-scenarios.json").read_text(encoding="utf-8")
OLD = json.dumps(
    {
        "metadata": {"country": "Oldland", "scenarioName": "Sun First"},
        "capacity": {"byYear": {"2030": {"solarPV": 200, "windOnshore": 100, "gas": 150}, "2040": {"solarPV": 800}}},
        "investment": {"total": 1800},
        "emissions": {"byYear": {"2025": 4.0, "2045": 1.0}},
    }
)
TEMPLATE = files("stakelib.scenarios").joinpath("template.csv").read_text(encoding="utf-8")
SPLAT = text_of([r for r in kestrelia() if r["Year"] in (2029, 2030, 2040)])
BASES = {"json": JSON, "old": OLD, "template": TEMPLATE, "splat": SPLAT}
NUMBERS = [
    "NaN",
    "nan",
    "Infinity",
    "-inf",
    "1e400",
    "-1",
    "1e308",
    "9" * 400,
    "9" * 5000,
    "12,5",
    "1.2.3",
    "0x1F",
    "",
    "null",
    "true",
    "[]",
    '"7"',
    "１２",
    "1e-400",
    "--1",
    "2030",
    "∞",
]
WORDS = ["PW", "mt", "GWh", "MW", "%", "", "\x00", "Mt CO2e", "€", "=1+1", "\u202e", "�", "k" * 500, "\ud83d"]
Damage = Callable[[str, random.Random], bytes]


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def swapped(text: str, rng: random.Random, find: Callable[[str], bool], options: list[str]) -> bytes:
    """One to three cells or values for which `find` is true replaced by one of `options`."""
    parts = [[]]
    for c in text:  # words and what stands between them
        if c in ',:{}[]" \n;' or (parts[-1] and parts[-1][-1] in ',:{}[]" \n;'):
            parts.append([])
        parts[-1].append(c)
    words = ["".join(p) for p in parts]
    places = [i for i, w in enumerate(words) if find(w)]
    for i in rng.sample(places, min(len(places), rng.randint(1, 3))):
        words[i] = rng.choice(options)
    return encoded("".join(words))


def is_number(word: str) -> bool:
    return word.replace(".", "").replace("-", "").isdigit()


def is_word(word: str) -> bool:
    return word.replace("_", "").isalpha()


def truncated(text: str, rng: random.Random) -> bytes:
    return encoded(text)[: rng.randrange(len(text))]


def a_byte_changed(text: str, rng: random.Random) -> bytes:
    data = bytearray(encoded(text))
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def a_piece_gone_or_twice(text: str, rng: random.Random) -> bytes:
    a = rng.randrange(len(text))
    b = min(len(text), a + rng.choice([1, 2, 7, 60, 500]))
    return encoded(text[:a] + (text[a:b] * 2 if rng.random() < 0.5 else "") + text[b:])


def a_wrong_number(text: str, rng: random.Random) -> bytes:
    return swapped(text, rng, is_number, NUMBERS)


def a_wrong_word(text: str, rng: random.Random) -> bytes:
    return swapped(text, rng, is_word, WORDS + NUMBERS)


def something_put_in(text: str, rng: random.Random) -> bytes:
    at = rng.randrange(len(text))
    odd = ['"', ",", "\n", "\r", "\x00", "{", "]", ";;;", ",,,,,\n", "\ufeff", '""', "\t"]
    return encoded(text[:at] + rng.choice(odd) + text[at:])


def deeply_nested(text: str, rng: random.Random) -> bytes:
    depth, at = rng.choice([50, 3000, 200_000]), rng.randrange(len(text))
    mark = rng.choice(["[", '{"a":', '"('])
    return encoded(text[:at] + mark * depth + text[at:]) if rng.random() < 0.5 else encoded(mark * depth)


def lines_mixed(text: str, rng: random.Random) -> bytes:
    lines = text.splitlines(keepends=True)
    if rng.random() < 0.5:
        rng.shuffle(lines)
    else:
        lines += rng.choices(lines, k=5)
    return encoded("".join(lines))


def another_encoding(text: str, rng: random.Random) -> bytes:
    text = text.replace("land", "länd").replace("Kestrelia", "Kestrélia")
    return text.encode(rng.choice(["latin-1", "utf-16", "utf-16-le", "utf-32", "utf-7", "cp1252"]))


def another_dress(text: str, rng: random.Random) -> bytes:
    """What must not matter: byte-order mark, line ends, blank lines at the end."""
    text = text.replace("\n", rng.choice(["\n", "\r\n"])) + rng.choice(["", "\n", "\r\n\r\n"])
    return rng.choice([b"", b"\xef\xbb\xbf"]) + encoded(text)


DAMAGES: list[Damage] = [
    truncated,
    a_byte_changed,
    a_piece_gone_or_twice,
    a_wrong_number,
    a_wrong_word,
    something_put_in,
    deeply_nested,
    lines_mixed,
    another_encoding,
    another_dress,
]


def a_workbook(text: str, rng: random.Random) -> bytes:
    """The table as an .xlsx file with one to three odd cells, sometimes with a byte changed or cut short."""
    from openpyxl import Workbook
    from openpyxl.utils.exceptions import IllegalCharacterError

    book = Workbook()
    cells = [line.split(",") for line in text.splitlines()][:60]
    odd = [None, True, -1, 1e300, 0.38, 2030, "", " ", "=1/0", "#REF!", *NUMBERS[:12], *WORDS]
    for _ in range(rng.randint(0, 3)):
        row = rng.choice(cells)
        row[rng.randrange(len(row))] = rng.choice(odd)
    for at, row in enumerate(cells, 1):
        for column, value in enumerate(row, 1):
            number = isinstance(value, str) and is_number(value) and value.isascii() and rng.random() < 0.9
            try:
                book.active.cell(at, column, float(value) if number else value)
            except (IllegalCharacterError, ValueError):  # a sheet cannot hold it
                continue
    stream = io.BytesIO()
    try:
        book.save(stream)
    except UnicodeEncodeError:
        return b"PK\x03\x04"
    data = bytearray(stream.getvalue())
    if rng.random() < 0.4:
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.1 else data)


def any_bytes(_: str, rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice([0, 1, 3, 40, 2000]))


def another_leaf(text: str, rng: random.Random) -> bytes:
    """JSON with one to three values, or keys, replaced by values of any kind."""
    data = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        spot = data
        while isinstance(spot, dict | list) and spot:
            parent, key = spot, rng.choice(list(spot) if isinstance(spot, dict) else range(len(spot)))
            spot = parent[key]
            if rng.random() < 0.2:
                break
        else:
            if isinstance(spot, dict | list):
                continue
        new = rng.choice(
            [None, True, [], {}, [1], {"a": 1}, "", "\ud83d", "\u202e\x07", 10**30, -0.0, 1e-320, 0.5, *WORDS]
        )
        if isinstance(parent, dict) and rng.random() < 0.3:
            parent[str(rng.choice([*WORDS, "\ud83d", "2030", "total"]))] = parent.pop(key)
        else:
            parent[key] = new
    return json.dumps(data, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def separated_otherwise(text: str, rng: random.Random) -> bytes:
    """Another separator, thousands and decimals as in other languages."""
    lines = [line.split(",") for line in text.splitlines()]
    for row in rng.sample(lines[1:], min(len(lines) - 1, rng.randint(0, 5))):
        at = rng.randrange(len(row))
        row[at] = rng.choice(
            ["1.400", "1,400", "1.400,5", "1 400", "1\u202f400", "12,5", "1'400", "0.5", "38%", "1.234.567"]
        )
    return encoded("\n".join(rng.choice(";\t").join(row) if rng.random() < 0.01 else ";".join(row) for row in lines))


TABLES = ("template", "splat")


def damaged(kind: str, rng: random.Random) -> bytes:
    """A file of BASES[kind] damaged in one way, or in two."""
    more = [a_workbook, a_workbook, separated_otherwise] if kind in TABLES else [another_leaf] * 8
    data = rng.choice([*DAMAGES, *more, any_bytes])(BASES[kind], rng)
    if rng.random() < 0.2 and not data.startswith(b"PK") and data:
        data = rng.choice([truncated, a_byte_changed, a_piece_gone_or_twice, something_put_in])(
            data.decode("utf-8", "replace"), rng
        )
    return data


# what no person who plans energy should have to read
INSIDE = re.compile(r"pydantic|Traceback|NoneType|<class|object at 0x|[a-z]Error\b|set_int_max|recursion")
# a file as a whole may be wrong; every other problem names a row or a field
WHOLE = re.compile(
    r"not valid JSON|not UTF-8|is empty|no row holds|is larger than|is a damaged|cannot be read as|holds bytes that|"
    r"no sheet holds|the list is empty|no capacity or output|sheets hold|is an old Excel|is a zip file|is no |unpacks|"
    r"and \d+ more|left out|not in the mapping|plants without capacity|is an? "
)
PLACE = re.compile(
    r"row \d+|(metadata|milestones|detailedTech|capacity|investment|emissions|scenario)\b|\[\d+\]|half a character"
)


def outcome(path: Path, **options: Any) -> list[Scenario] | CourseError:
    """What `load` makes of the file; fails unless that is right, or one CourseError that people understand."""
    before = path.read_bytes()
    try:
        result: list[Scenario] | CourseError = load(path, **options)
    except CourseError as error:
        result = error
        assert error.problems and error.next_action and str(error).encode("utf-8")
        for problem in error.problems:
            assert path.name in problem.partition(":")[0] and len(problem) < 2000, problem
            assert plain(problem) == problem and not INSIDE.search(problem.replace(path.name, "")), problem
            assert PLACE.search(problem) or WHOLE.search(problem), problem
    else:
        assert result
        for scenario in result:
            sound(scenario)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]
    return result


def sound(scenario: Scenario) -> None:
    """Every figure is one, every text can be written and printed in one line."""
    figures = [*derive_metrics(scenario).figures.values(), *derive_metrics(scenario, "tool").figures.values()]
    assert all(math.isfinite(m.value) and str(m) for m in figures) and scenario_id(scenario)
    assert all(m.reShare is None or 0 <= m.reShare <= 100 for m in scenario.milestones)
    assert {m.unit for x in scenario.milestones for m in [x.capacity] if m} <= {"MW"}
    text = scenario.model_dump_json()
    assert text.encode("utf-8") and plain(text) == text
    assert prompt_text(scenario, "finance", "emerging", "pragmatic").encode("utf-8")
    assert all("\n" not in w for w in scenario.metadata.warnings or [])
