"""The gates: what a training row must satisfy before a model sees it."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import yaml

from stakelib.dialogues.build import Dialogue
from stakelib.dialogues.formats import HEADINGS
from stakelib.dialogues.numbers import mentions, ungrounded, without_names, years
from stakelib.dialogues.tasks import BASE, END, KEYS
from stakelib.run import CourseError
from stakelib.scenarios import country_key
from stakelib.voices import STAKEHOLDERS

MAX_COMPLETION, MAX_ROW = 400, 1536  # tokens
MAX_WORDS = 200  # of an enhanced response: the tool's prompt asks for it
NEAR, SHORT = 0.8, 60  # share of common runs of three words (Jaccard) that makes two texts one; runs in a short text
COUNTS = {"Appreciates": (2, 4), "Concerns": (2, 4), "Questions": (3, 5), "Engagement Tips": (2, 3)}
_TABLES = yaml.safe_load(files(__package__).joinpath("check.yaml").read_text(encoding="utf-8"))
CONTROL, BANNED, ECHO = (re.compile(_TABLES[name], re.I) for name in ("control", "banned", "echo"))
FUELS, ASKABLE, DECIDING = (_TABLES[name] for name in ("fuels", "askable", "deciding"))
BACKED = {**FUELS, **ASKABLE}


def sections(completion: str) -> dict[str, list[str]] | None:
    """Heading -> its items (the first heading: its sentences); None unless all five stand there once, in order."""
    parts = re.split(r"^\*\*([^*\n]+)\*\*:", completion, flags=re.M)
    if parts[0].strip() or tuple(parts[1::2]) != HEADINGS:
        return None
    found = {}
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        lines = [line for line in body.strip().split("\n") if line]
        if heading == HEADINGS[0]:
            found[heading] = re.split(r"(?<=[.!?])\s+", body.strip())
        elif all(line.startswith("- ") and len(line) > 7 for line in lines):
            found[heading] = [line[2:] for line in lines]
        else:
            return None
    return found


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict | list):
        return [text for item in (value.values() if isinstance(value, dict) else value) for text in _strings(item)]
    return [value] if isinstance(value, str) else []


def _object(text: str) -> dict[str, Any]:
    """The JSON object that `text` is, all of it; empty when it is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def base_of(prompt: str) -> dict[str, Any]:
    """The response that an enhance prompt asks to improve; empty when there is none."""
    after = prompt.partition(BASE)[2]
    return _object(after[: after.rfind("}") + 1].strip())


def said(row: Dialogue) -> str:
    """What a completion says: of a JSON object its texts, line by line."""
    return "\n".join(_strings(_object(row.completion))) if row.task == "enhance" else row.completion


def given(row: Dialogue) -> str:
    """What a prompt gives as data: no rules, no worked examples, no time stamps."""
    if row.task == "enhance":
        base = {key: value for key, value in base_of(row.prompt).items() if key in KEYS}
        return "\n".join([row.prompt.partition("\nTASK:")[0], *_strings(base)])
    return row.prompt.rpartition(END)[2]


def _grounded(row: Dialogue) -> list[str]:
    text, prompt = said(row), given(row)
    misses = [
        f"{m.mention.text!r}: {m.reason}" + (f" (nearest: {m.nearest.text!r}, {m.nearest.year})" if m.nearest else "")
        for m in ungrounded(text, prompt)
    ]
    return misses + [f"year {year} is not in the prompt" for year in sorted(years(text) - years(prompt))]


def _facts(row: Dialogue) -> list[str]:
    if row.source != "rules":
        return []  # a person may cite any figure of the prompt; the row's facts are those of the rules
    held = {(fact.unit, round(fact.value, 6)) for fact in row.facts}
    return [
        f"{m.text!r} is not among the row's facts"
        for m in mentions(without_names(said(row), row.prompt))
        if m.unit and (m.unit, round(m.value, 6)) not in held
    ]


def _figures(text: str) -> Counter[tuple[float, str]]:
    return Counter((m.value, m.unit) for m in mentions(text))


def _preserved(row: Dialogue) -> list[str]:
    """One bare JSON object that keeps every item of the base, in order, with its figures, metric and severity."""
    base, new = base_of(row.prompt), _object(row.completion)
    if not base or not new or row.completion[:1] + row.completion[-1:] != "{}":
        return ["prompt and completion are not one bare JSON object each"]
    if tuple(new) not in (KEYS[:1], KEYS):
        return [f"keys {', '.join(new)}; wanted initialReaction alone, or {', '.join(KEYS)}"]
    out = [] if isinstance(new[KEYS[0]], str) and new[KEYS[0]].strip() else ["initialReaction is no text"]
    words, prose = len(said(row).split()), {"text": "", "explanation": ""}
    out += [f"{words} words, limit {MAX_WORDS}"] if words > MAX_WORDS else []
    for key in new:
        old, now = base.get(key), new[key]
        pairs = [(old, now)] if isinstance(old, str) else list(zip(old, now, strict=False)) if type(now) is list else []
        if type(old) is not type(now) or (isinstance(old, list) and len(old) != len(now)):
            out.append(f"{key}: not the same number of items as the base")
        told = [(a, *(_figures(without_names("\n".join(_strings(x)), row.prompt)) for x in (a, b))) for a, b in pairs]
        out += [f"{key}: drops the figures of {str(a)[:40]!r}" for a, before, after in told if before - after]
        if key == "concerns":
            out += [
                f"{key}: {str(b)[:40]!r} has another metric, severity or shape"
                for a, b in pairs
                if not isinstance(b, dict)
                or {**b, **prose} != {**a, **prose}
                or not all(isinstance(b.get(k), str) and b[k].strip() for k in prose)
            ]
        elif key != KEYS[0]:
            out += [f"{key}: {str(b)[:40]!r} is no text" for _, b in pairs if not isinstance(b, str) or not b.strip()]
    return out


def _spoken(row: Dialogue) -> list[str]:
    """Two or three sentences that cite the scenario, copy no example and would pass the tool's echo filter."""
    text, examples = without_names(row.completion, row.prompt), row.prompt.rpartition(END)[0]
    count = len(re.split(r"(?<=[.!?])\s+", text.strip()))
    out = [] if 2 <= count <= 3 else [f"{count} sentences, want 2 or 3"]
    out += ["labels, quotes or several lines"] if re.search(r'"|\n|\*\*|^\w+( \w+)?:', text) else []
    out += [f"echo of the prompt: {m.group()!r}" for m in ECHO.finditer(text)]
    out += ["repeats an example"] if any(s in examples for s in re.split(r"(?<=[.!?])\s+", text) if len(s) > 30) else []
    return out + (["cites no figure"] if mentions(given(row)) and not mentions(without_names(text, row.prompt)) else [])


def _structure(row: Dialogue) -> list[str]:
    if row.task != "dialogue":
        return (_preserved if row.task == "enhance" else _spoken)(row)
    found = sections(without_names(row.completion, row.prompt))  # a full stop in a name ends no sentence
    if found is None:
        return ["the five sections are not there, in order, as bullet lists"]
    out = [
        f"{len(found[h])} items under {h}, want {low} to {high}"
        for h, (low, high) in COUNTS.items()
        if not low <= len(found[h]) <= high
    ]
    out += [] if 2 <= len(found[HEADINGS[0]]) <= 3 else [f"{len(found[HEADINGS[0]])} sentences in {HEADINGS[0]}"]
    out += [
        f"concern without severity and reason: {c[:40]!r}"
        for c in found["Concerns"]
        if not re.fullmatch(r"\[(low|medium|high)\] [^:]+: .+", c)
    ]
    return out + [f"not a question: {q[:40]!r}" for q in found["Questions"] if not q.endswith("?")]


def _conditioned(row: Dialogue) -> list[str]:
    """All that decides the wording stands in the prompt; a voice has no stance there, so it is always pragmatic."""
    profile, stance = STAKEHOLDERS[row.stakeholder_id], row.task != "voice" or row.variant != "pragmatic"
    kind = "question" if row.task == "dialogue" and "**Scenario Context**" not in row.prompt else row.task
    told = {
        "row": row,
        "name": profile.name,
        "priorities": ", ".join(profile.priorities),
        "first_two": ", ".join(profile.priorities[:2]),
    }
    return [
        f"the prompt lacks its {what}"
        for what, text in DECIDING[kind].items()
        if (stance or what != "variant") and text.format(**told) not in row.prompt
    ]


def absent(text: str, prompt: str, words: Mapping[str, str] = BACKED) -> list[str]:
    """The words of `text` on a technology or figure of which `prompt` holds no line of data."""
    return [
        word
        for word, label in words.items()
        if re.search(rf"\b{word}\b", text, re.I) and not re.search(rf"(?:^- |with |, |\d ){label}\b", prompt, re.M)
    ]


def _claims(row: Dialogue) -> list[str]:
    """No word about a technology or figure without data on it in the prompt; the tool's own prompts hold the word."""
    data, text = (without_names(part, row.prompt) for part in (given(row), said(row)))
    if row.task == "dialogue":
        parts = re.split(r"^\*\*(Questions|Engagement Tips)\*\*:", text, flags=re.M)
        asked = parts[2] if len(parts) > 2 else ""
        found = absent(text.replace(asked, "") if asked else text, data) + absent(asked, data, FUELS)
    else:
        found = [word for word in absent(text, "", FUELS) if not re.search(rf"\b{word}\b", data, re.I)]
    return [f"speaks of {word!r} without data" for word in found]


def _language(row: Dialogue) -> list[str]:
    """`render` keeps control tokens of user data text, so a prompt may hold them; a completion may not teach them."""
    text = without_names(said(row), row.prompt)  # a plan may be called "Tariff Reform"
    return (
        [f"control-token text {m.group()!r}" for m in CONTROL.finditer(row.completion)]
        + [f"banned term {m.group()!r}" for m in BANNED.finditer(text)]
        + (["unfilled template"] if re.search(r"[{}]|\bNone\b|\bUndefined\b", text) else [])
    )


def _lengths(tokenizer: Any) -> Callable[[Dialogue], list[str]]:
    def gate(row: Dialogue) -> list[str]:
        def count(text: str) -> int:
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        prompt, completion = count(row.prompt), count(row.completion)
        out = [f"completion of {completion} tokens, limit {MAX_COMPLETION}"] if completion > MAX_COMPLETION else []
        # 32: room for the chat template's own tokens
        too_long = prompt + completion + 32 > MAX_ROW
        return out + ([f"row of {prompt + completion} tokens, limit {MAX_ROW}"] if too_long else [])

    return gate


def _duplicates(rows: Sequence[Dialogue]) -> list[tuple[Dialogue, str]]:
    out = []
    for field in ("id", "completion"):
        first: dict[str, str] = {}
        for row in rows:
            if (key := getattr(row, field)) in first:
                out.append((row, f"same {field} as {first[key]}"))
            first.setdefault(key, row.id)
    return out


def _leakage(rows: Sequence[Dialogue]) -> list[tuple[Dialogue, str]]:
    """A scenario in one split only; a test country in test only, under whichever spelling."""
    splits, homes = defaultdict[str, set[str]](set), defaultdict[str, set[str]](set)
    for row in rows:
        splits[row.scenario_id].add(row.split)
        homes[country_key(row.country)].add(row.split)
    out = [(r, f"scenario in {sorted(splits[r.scenario_id])}") for r in rows if len(splits[r.scenario_id]) > 1]
    return out + [
        (r, f"test country also in {sorted(homes[country_key(r.country)] - {'test'})}")
        for r in rows
        if r.split == "test" and homes[country_key(r.country)] != {"test"}
    ]


def _near(rows: Sequence[Dialogue]) -> list[tuple[Dialogue, str]]:
    """Rows of valid or test whose text another split nearly holds: compared exactly, within stakeholder and task."""
    groups: dict[tuple[str, str], list[Dialogue]] = defaultdict(list)
    for row in rows:
        groups[row.stakeholder_id, row.task].append(row)
    return [found for group in groups.values() if len({r.split for r in group}) > 1 for found in _near_in(group)]


def _near_in(group: list[Dialogue]) -> list[tuple[Dialogue, str]]:
    from sklearn.feature_extraction.text import HashingVectorizer

    runs = HashingVectorizer(
        ngram_range=(3, 3),
        token_pattern=r"[^\s]+",
        binary=True,
        norm=None,
        alternate_sign=False,
        n_features=2**22,
        dtype="float32",
    ).transform([said(row) for row in group])
    size, splits = runs.getnnz(axis=1), [row.split for row in group]
    out = []
    held_out = [i for i, name in enumerate(splits) if name != "train"]
    for start in range(0, len(held_out), 256):  # in slices, so that 50,000 rows fit into memory
        some = held_out[start : start + 256]
        common = (runs[some] @ runs.T).tocoo()
        for i, j, both in zip(common.row, common.col, common.data, strict=True):
            mine, other = some[i], int(j)
            near = splits[mine] != splits[other] and both >= NEAR * (size[mine] + size[other] - both)
            # two or three sentences share phrases: with other figures they are another answer
            if near and (size[mine] > SHORT or _figures(said(group[mine])) == _figures(said(group[other]))):
                out.append((group[mine], f"nearly the text of {group[other].id} in {splits[other]}"))
    return out


def _kinds(rows: Sequence[Dialogue]) -> list[tuple[Dialogue, str]]:
    """The enhance prompt cannot say whether a short or a full reply is wanted: one kind per data set."""
    full = {row.id: len(_object(row.completion)) > 1 for row in rows if row.task == "enhance"}
    usual = Counter(full.values()).most_common(1)[0][0] if full else False
    return [
        (row, "a short reply among full ones" if usual else "a full reply among short ones")
        for row in rows
        if full.get(row.id, usual) != usual
    ]


def row_gates(tokenizer: Any = None) -> dict[str, Callable[[Dialogue], list[str]]]:
    """The gates that look at one row: name -> what is wrong with it."""
    gates: dict[str, Callable[[Dialogue], list[str]]] = {
        "figures in prompt": _grounded,
        "figures in facts": _facts,
        "sections and items": _structure,
        "wording decided by prompt": _conditioned,
        "no claim without data": _claims,
        "language": _language,
    }
    return gates if tokenizer is None else gates | {"token lengths": _lengths(tokenizer)}


def problems_of(row: Dialogue, tokenizer: Any = None) -> list[str]:
    """What the gates say against one row, at once; empty when nothing."""
    return [f"{name}: {why}" for name, gate in row_gates(tokenizer).items() for why in gate(row)]


def check(rows: Sequence[Dialogue], tokenizer: Any = None, file: str = "") -> list[dict[str, Any]]:
    """Run every gate; returns [{"gate", "rows", "failures"}] or raises CourseError with each failing row and reason.

    `tokenizer`: a Hugging Face tokenizer; adds the gate on token lengths. `file`: where the rows stand, line by line.
    """
    failed = {name: [(row, why) for row in rows for why in gate(row)] for name, gate in row_gates(tokenizer).items()}
    failed |= {
        "duplicates": _duplicates(rows),
        "near-duplicates across splits": _near(rows),
        "leakage": _leakage(rows),
        "one kind of reply": _kinds(rows),
    }
    line = {id(row): f"{file}:{number}: " if file else "" for number, row in enumerate(rows, 1)}
    problems = [f"{line[id(row)]}{row.id}: {name}: {why}" for name, found in failed.items() for row, why in found]
    problems += [] if rows else ["there are no rows"]
    if problems:
        raise CourseError(problems, "mend the phrase or the row named above, build again, check again.")
    return [{"gate": name, "rows": len(rows), "failures": len(found)} for name, found in failed.items()]
