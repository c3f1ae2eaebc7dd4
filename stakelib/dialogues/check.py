"""The gates: what a training row must satisfy before a model sees it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from stakelib.dialogues.build import Dialogue
from stakelib.dialogues.formats import HEADINGS
from stakelib.dialogues.numbers import YEAR, mentions, ungrounded, without_names
from stakelib.run import CourseError
from stakelib.voices import STAKEHOLDERS

MAX_COMPLETION, MAX_ROW = 400, 1536  # tokens
COUNTS = {"Appreciates": (2, 4), "Concerns": (2, 4), "Questions": (3, 5), "Engagement Tips": (2, 3)}
CONTROL = re.compile(r"<\|[^<>|]*\|>|</?s>|<(?:bos|eos|pad|unk|mask)>|<(?:start|end)_of_turn>|<unused\d+>|\[/?INST\]"
                     r"|<</?SYS>>", re.I)
BANNED = re.compile(r"\bLCOE\b|levelised cost|levelized cost|\btariffs?\b|\breserve margins?\b", re.I)
# a word of these needs a line of data in the prompt; a question may ask about the second kind without
FUELS = {"coal": "Coal", "gas": "Gas", "diesel": "Diesel", "fuel oil": "Fuel Oil", "geothermal": "Geothermal",
         "biomass": "Biomass", "hydro": "Hydro", "wind": "(?:Wind|Solar and Wind)",
         "solar": "(?:Solar PV|Solar and Wind)", "nuclear": "Nuclear"}
ASKABLE = {"storage": "Storage", "interconnect(?:or|ors|ion|ions)": "Interconnector", "peak demand": "Peak Demand",
           "jobs": "(?:Jobs|Permanent Jobs)", "emissions": "Emissions", "investment of": "(?:Yearly )?Investment",
           "imports of": "Imports", "land of": "New Land"}


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


def _grounded(row: Dialogue) -> list[str]:
    misses = [f"{m.mention.text!r}: {m.reason}"
              + (f" (nearest: {m.nearest.text!r}, {m.nearest.year})" if m.nearest else "")
              for m in ungrounded(row.completion, row.prompt)]
    said, held = ({m.group()[:4] for m in YEAR.finditer(text)} for text in (row.completion, row.prompt))
    years = said - held
    return misses + [f"year {year} is not in the prompt" for year in sorted(years)]


def _facts(row: Dialogue) -> list[str]:
    held = {(fact.unit, round(fact.value, 6)) for fact in row.facts}
    return [f"{m.text!r} is not among the row's facts" for m in mentions(without_names(row.completion, row.prompt))
            if m.unit and (m.unit, round(m.value, 6)) not in held]


def _structure(row: Dialogue) -> list[str]:
    found = sections(row.completion)
    if found is None:
        return ["the five sections are not there, in order, as bullet lists"]
    out = [f"{len(found[h])} items under {h}, want {low} to {high}" for h, (low, high) in COUNTS.items()
           if not low <= len(found[h]) <= high]
    out += [] if 2 <= len(found[HEADINGS[0]]) <= 3 else [f"{len(found[HEADINGS[0]])} sentences in {HEADINGS[0]}"]
    out += [f"concern without severity and reason: {c[:40]!r}" for c in found["Concerns"]
            if not re.fullmatch(r"\[(low|medium|high)\] [^:]+: .+", c)]
    return out + [f"not a question: {q[:40]!r}" for q in found["Questions"] if not q.endswith("?")]


def _conditioned(row: Dialogue) -> list[str]:
    """All that decides the wording stands in the prompt."""
    profile = STAKEHOLDERS[row.stakeholder_id]
    wanted = {"stakeholder": f"simulating a {profile.name} stakeholder", "country": f"- Country: {row.country}",
              "scenario": f"- Scenario: {row.scenario}", "context": f"- Development Context: {row.context}",
              "variant": f"- Stakeholder Stance: {row.variant}", "priorities": ", ".join(profile.priorities)}
    return [f"the prompt lacks its {what}" for what, text in wanted.items() if text not in row.prompt]


def _claims(row: Dialogue) -> list[str]:
    """No word about a technology or figure that the prompt has no data on."""
    found = sections(row.completion) or {"": [row.completion]}
    said = " ".join(text for heading, items in found.items() if heading != "Questions" for text in items)
    said = said.replace(row.scenario, "").replace(row.country, "")
    asked = " ".join(found.get("Questions", [])).replace(row.scenario, "")

    def missing(words: dict[str, str], text: str) -> list[str]:
        return [f"speaks of {word!r} without data" for word, label in words.items()
                if re.search(rf"\b{word}\b", text, re.I) and not re.search(rf"^- {label}\b", row.prompt, re.M)]

    return missing({**FUELS, **ASKABLE}, said) + missing(FUELS, asked)


def _language(row: Dialogue) -> list[str]:
    text = f"{row.prompt}\n{row.completion}"
    return [f"control-token text {m.group()!r}" for m in CONTROL.finditer(text)] + [
        f"banned term {m.group()!r}" for m in BANNED.finditer(row.completion)] + (
        ["unfilled template"] if re.search(r"[{}]|\bNone\b|\bUndefined\b", row.completion) else [])


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
    """A scenario in one split only; a test country in test only."""
    splits: dict[str, set[str]] = {}
    homes: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row.scenario_id, set()).add(row.split)
        homes.setdefault(row.country, set()).add(row.split)
    out = [(r, f"scenario in {sorted(splits[r.scenario_id])}") for r in rows if len(splits[r.scenario_id]) > 1]
    return out + [(r, f"test country also in {sorted(homes[r.country] - {'test'})}") for r in rows
                  if r.split == "test" and homes[r.country] != {"test"}]


def check(rows: Sequence[Dialogue], tokenizer: Any = None) -> list[dict[str, Any]]:
    """Run every gate; returns [{"gate", "rows", "failures"}] or raises CourseError with each failing row and reason.

    `tokenizer`: a Hugging Face tokenizer; adds the gate on token lengths.
    """
    gates: dict[str, Callable[[Dialogue], list[str]]] = {
        "figures in prompt": _grounded, "figures in facts": _facts, "sections and items": _structure,
        "wording decided by prompt": _conditioned, "no claim without data": _claims, "language": _language}
    if tokenizer is not None:
        gates["token lengths"] = _lengths(tokenizer)
    failed = {name: [(row, why) for row in rows for why in gate(row)] for name, gate in gates.items()}
    failed |= {"duplicates": _duplicates(rows), "leakage": _leakage(rows)}
    problems = [f"{row.id}: {name}: {why}" for name, found in failed.items() for row, why in found]
    problems += [] if rows else ["there are no rows"]
    if problems:
        raise CourseError(problems, "mend the phrase or the row named above, build again, check again.")
    return [{"gate": name, "rows": len(rows), "failures": len(found)} for name, found in failed.items()]
