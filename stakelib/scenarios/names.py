"""Names of countries and scenarios: what counts as the same name, and what is known of a country."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files
from typing import Any

# Listed here, because each Python has another Unicode table; a name may not change with it.
CONTROLS = "\x00-\x1f\x7f-\x9f\u2028\u2029"
UNSEEN = (
    "\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
)
UNSEEN += "\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\U000e0000-\U000e0fff"
_BLANK, _GONE = re.compile(f"[{CONTROLS}]"), re.compile(f"[{UNSEEN}]")
_APOSTROPHES = dict.fromkeys(map(ord, "’‘ʼʻʹ´`′＇‛"), "'")


def plain(text: str) -> str:
    """The text without control characters, marks of direction and other characters that no reader sees."""
    return _GONE.sub("", _BLANK.sub(" ", text))


def one_line(text: str) -> str:
    """A name as one line: `plain`, every run of blanks one blank; ValueError where nothing is left."""
    text = " ".join(plain(text).split())
    if not text:
        raise ValueError("must not be empty")
    return text


def name_key(text: str) -> str:
    """Equal for two spellings of one name: Unicode form, blanks, case, apostrophes and accents do not count."""
    text = plain(text.translate(_APOSTROPHES))
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(re.sub("[\u0300-\u036f]", "", text).translate(_APOSTROPHES).split())


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(files(__package__).joinpath("countries.json").read_text(encoding="utf-8"))


def countries() -> dict[str, dict[str, Any]]:
    """The profiles of countries.json, by name."""
    return _table()["countries"]


def _words(text: str) -> str:
    """The key of a country's name, in which points, commas, hyphens, apostrophes and a first "the" do not count."""
    return " ".join(re.findall(r"\w+", name_key(text).replace("'", " "))).removeprefix("the ")


@functools.cache
def _known_countries() -> dict[str, str]:
    """Key of every known spelling -> key of the country."""
    others = {_words(name): _words(country) for country, names in _table()["other names"].items() for name in names}
    return others | {_words(name): _words(name) for name in countries()}


@functools.lru_cache(maxsize=4096)
def country_key(country: str) -> str:
    """`name_key` of a country; other names of it (countries.json) have the same key."""
    words = _words(country)
    return _known_countries().get(words, words or name_key(country))


@functools.cache
def _profiles() -> dict[str, dict[str, Any]]:
    return {country_key(name): row for name, row in countries().items()}


def country_profile(country: str) -> dict[str, Any]:
    """Region, pool or regional body, island and context of a country; empty when it is not in countries.json."""
    return _profiles().get(country_key(country), {})


def usual_spellings(names: Iterable[str], key: Callable[[str], str]) -> dict[str, str]:
    """Each spelling -> the one used in its place: the most frequent of those with its key, of equals the first."""
    groups: dict[str, Counter[str]] = {}
    for name, count in Counter(names).items():
        groups.setdefault(key(name), Counter())[name] = count
    return {name: group.most_common(1)[0][0] for group in groups.values() for name in group}


def respelt(what: str, usual: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """A warning for each of the names that is read as another spelling."""
    return [f"{what} {n[:60]!r} is read as {usual[n][:60]!r}" for n in dict.fromkeys(names) if n != usual[n]]
