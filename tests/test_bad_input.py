"""Two thousand damaged files: each loads rightly or raises one error type that names file and row or field."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest
from splat_file import kestrelia, text_of

from stakelib.run import CourseError
from stakelib.scenarios import derive_metrics, load, scenario_id

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


def content(path: Path) -> list[dict]:
    return [s.model_dump(exclude={"metadata": {"sourceFile", "warnings"}}) for s in load(path)]


def checked(path: Path) -> bool:
    """Whether the file loads; fails where anything but a CourseError escapes, or a figure is no figure."""
    try:
        loaded = load(path)
    except CourseError as error:
        assert error.problems and error.next_action
        assert all(path.name in p and len(p) < 2000 for p in error.problems)
        return False
    assert loaded
    for scenario in loaded:
        found = [*derive_metrics(scenario).figures.values(), *derive_metrics(scenario, "tool").figures.values()]
        assert all(math.isfinite(m.value) and str(m) for m in found) and scenario_id(scenario)
        assert all(m.reShare is None or 0 <= m.reShare <= 100 for m in scenario.milestones)
        assert {m.unit for x in scenario.milestones for m in [x.capacity] if m} <= {"MW"}
    return True


@pytest.mark.parametrize(("kind", "count"), [("json", 800), ("old", 600), ("template", 400), ("splat", 200)])
def test_two_thousand_damaged_files(kind: str, count: int, tmp_path: Path) -> None:
    path = tmp_path / f"mine-{kind}.txt"
    path.write_bytes(encoded(BASES[kind]))
    whole, loaded = content(path), 0
    for number in range(count):
        damage, rng = DAMAGES[number % len(DAMAGES)], random.Random(f"{kind}-{number}")
        path.write_bytes(damage(BASES[kind], rng))
        began = time.perf_counter()
        fine = checked(path)
        assert time.perf_counter() - began < 10, f"{damage.__name__} {number}"
        loaded += fine
        if damage is another_dress:
            assert content(path) == whole
        if damage is truncated and kind in ("json", "old"):
            assert not fine
    assert 0.12 * count <= loaded <= 0.88 * count  # neither everything passes nor everything fails


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "a",
        '"',
        "a,b\n1,2",
        "\x00",
        ",,,\n,,,",
        "\ufeff",
        "[[]]",
        "[1]",
        '["a"]',
        "country,scenario,year,quantity,value,unit\n",
        '{"capacity": {"byYear": 5}}',
        '{"capacity": 5}',
        '{"capacity": {"byYear": {"2030": {}}}}',
    ],
)
def test_almost_nothing_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "little.csv"
    path.write_bytes(encoded(text))
    assert not checked(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CourseError, match="cannot be read"):
        load(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [False, True], ids=["right", "all wrong"])
def test_a_million_rows(bad: bool, tmp_path: Path) -> None:
    head, _, body = text_of(kestrelia()).partition("\n")
    copies = 1_000_000 // body.count("\n") + 1
    body = body.replace(",m$,", ",pesos,") if bad else body
    path = tmp_path / "big.csv"
    with path.open("w", encoding="utf-8", newline="") as out:
        out.write(head + "\n")
        for number in range(copies):
            out.write(body.replace("base,", f"case {number % 40},"))
    began = time.perf_counter()
    assert checked(path) is not bad
    assert time.perf_counter() - began < 120  # a hang, not a benchmark
