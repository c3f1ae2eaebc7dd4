"""report.html: one self-contained file for a planner, and evaluation.json with the same figures for machines."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stakelib import plots
from stakelib.evaluation.claims import LATER, claims, trained_on
from stakelib.evaluation.measures import MEASURES
from stakelib.evaluation.rating import preferences
from stakelib.evaluation.statistics import by_stakeholder, clustered_wilson, compare, gate, smallest_visible_difference
from stakelib.export.handout import renew
from stakelib.run import CourseError, atomic_write_json, atomic_write_text, clock, sha256
from stakelib.training import load_rows

if TYPE_CHECKING:
    import pandas as pd

NOT_MEASURED = {  # what is missing: the measure, system or "people" whose figures would fill it
    "Whether people find the answers accurate, natural, relevant and specific: nobody has rated these yet.": "people",
    "The base model with a better prompt and examples, as a further rival.": "prompted",
    "The rule text, as a further rival.": "rules",
    "Whether an answer sounds like its own stakeholder and no other.": "identity",
    "Whether words such as rise and fall agree with the scenario.": "right_direction",
    "Whether claims without a figure agree with the scenario.": "keeps_to_data",
    "The same question in other words.": "consistency",
    "The file at 4 bits.": "tuned-q4",
    "How natural the answers sound to another model.": "perplexity",
    "Answers drawn at the temperature that Ollama and the tool use: notebook 06 asks some, this page counts none.": "",
    "What the model forgot: anything outside this task.": "knows",
    "Speed and memory on computers other than the one named under Cost.": "",
}
FIGURE_PANELS = ("has_sections", "stopped", "cites_three", "grounded_share")


def report(
    run: Any,
    scores: pd.DataFrame,
    comparison: pd.DataFrame,
    rows: Sequence[Mapping[str, Any]],
    answers: Sequence[Mapping[str, Any]],
    guide_answers: Sequence[Mapping[str, str]] | None = None,
) -> Path:
    """Write report.html and evaluation/evaluation.json into the run folder, and renew the card in product/.

    evaluation.json keeps under "sha256" what it describes: the model file of each system, the rows, the answers, and
    the page. Returns the page's path. Raises CourseError if base or tuned was not asked, or if the answers of one
    system are of two files.
    `guide_answers`: one dict per test prompt of the guide with "prompt", "base" and "tuned" (texts). Everything that
    comes from scenarios or models is escaped by the template; figures are embedded, nothing is loaded or run.
    """
    texts = {(a["row_id"], a["system"]): a["text"] for a in answers}
    made_of = digests(rows, answers)
    if missing := [s for s in ("base", "tuned") if scores.empty or s not in set(scores["system"])]:
        raise CourseError([f"no answers of '{s}'" for s in missing], "ask both systems, then score() their answers")
    totals = {s: _totals(part) for s, part in scores.groupby("system")}
    others = [s for s in totals if s not in ("base", "tuned")]
    people = preferences(run.path("evaluation"), rows, answers)
    split = by_stakeholder(scores, FIGURE_PANELS)
    facts = {
        "profile": run.profile.name,
        "model": run.profile.model,
        "files": dict(sorted((a["system"], a.get("gguf", "no model")) for a in answers)),
        "sha256": made_of,
        "prompts": int(scores["row_id"].nunique()),
        "scenarios": int(scores["scenario_id"].nunique()),
        "seen_in_training": seen_in_training(run, rows),
        "answered_on": sorted({a["processor"] for a in answers if a.get("processor")}),
        "smallest_visible_difference": smallest_visible_difference(int(scores["row_id"].nunique())),
        "comparison": comparison.to_dict("records"),
        "rivals": {s: {m["measure"]: m for m in compare(scores, pair=(s, "tuned")).to_dict("records")} for s in others},
        "people": people,
        "guide": claims(run.record, run.profile.model, answers, comparison.to_dict("records"), people),
        "totals": totals,
        "by_stakeholder": split.to_dict("records"),
        "worst": worst(scores),
        "measures": {name: vars(m) for name, m in MEASURES.items()},
        "machine": trained_on(run.record),
        "versions": run.record.get("versions") or {},
    }
    known = {*comparison["measure"], *scores.columns[scores.notna().any()], *totals, *(["people"] if people else [])}
    facts["not_measured"] = [text for text, name in NOT_MEASURED.items() if name not in known]
    facts |= {"verdict": verdict(facts), "below_bar": []}
    try:
        gate(scores)
    except CourseError as below:
        facts["below_bar"] = below.problems
    facts = finite(facts)
    voices = [row["stakeholder"] for row in rows]
    page = template("report.html.j2").render(
        facts=facts,
        figures=[embed(plots.base_vs_tuned(comparison)), embed(plots.per_stakeholder(split))],
        bad=[{**w, "segments": marked(scores, texts, w["row_id"], "tuned")} for w in facts["worst"]],
        pairs=[
            {"row": row, "said": {s: marked(scores, texts, row["id"], s) for s in ("base", "tuned", *others)}}
            for i, row in enumerate(rows)
            if row["stakeholder"] not in voices[:i]
        ],
        guide=guide_answers or [],
        cost=_cost(run.record),
        settings=run.record.get("profile") or {},
    )
    target = atomic_write_text(run.path("report.html"), page)
    facts["sha256"]["report.html"] = sha256(target)
    atomic_write_json(run.path("evaluation", "evaluation.json"), facts)
    renew(run)
    return target


def digests(rows: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """sha256 of each system's model file, of the rows asked ("rows") and of all answers ("answers").

    Raises CourseError if one system's answers come from two files.
    """
    files = {(a["system"], a["sha256"]) for a in answers if a.get("sha256")}
    systems = [s for s, _ in files]
    if mixed := sorted({s for s in systems if systems.count(s) > 1}):
        raise CourseError([f"the answers of '{s}' are of two model files" for s in mixed], "ask it again, then score()")
    told = {
        "rows": [[r["id"], r["prompt"], r.get("completion", "")] for r in rows],
        "answers": sorted([a["system"], a["row_id"], a["text"]] for a in answers),
    }
    return dict(sorted(files)) | {k: hashlib.sha256(json.dumps(v).encode()).hexdigest() for k, v in told.items()}


def seen_in_training(run: Any, rows: Sequence[Mapping[str, Any]]) -> int | None:
    """How many scenarios of `rows` stand in the rows that the adapter learned from; None if these are not there."""
    learned = run.record.get("stages", {}).get("train", {}).get("inputs", {})
    files = [run.path("training_data", f"{part}.jsonl") for part in ("train", "valid")]
    if not all(f.exists() and learned.get(f"training_data/{f.name}") == sha256(f) for f in files):
        return None
    return len({r["scenario_id"] for r in rows} & {r["scenario_id"] for f in files for r in load_rows(f)})


def verdict(facts: Mapping[str, Any]) -> list[str]:
    """The findings in five plain sentences, each one following from figures of the report."""
    lines = [c for c in facts["comparison"] if c["direction"] != "none"]
    named = {v: [c["label"].lower() for c in lines if c["verdict"] == v] for v in ("better", "worse")}
    unclear = [c["label"].lower() for c in lines if c["verdict"] == "cannot tell" and c["n"] == facts["prompts"]]
    good = _list(named["better"], "clearly better than its base on", "on no measure clearly better than its base")
    both = [facts["totals"][s] for s in ("tuned", "base")]
    right = [f"{t['grounded']} of {t['numbers']}" for t in both]
    figures = f"Of the figures that it wrote, {right[0]} are as the prompt has them" if both[0]["numbers"] else ""
    theirs = f"of the base model's, {right[1]}" if both[1]["numbers"] else "the base model wrote none"
    low, high = both[0]["faultless_interval"]
    unseen = _list(unclear, "; these prompts cannot tell the two apart on", "")
    blind = ", ".join(f"{p['criterion']} {p['tuned']} against {p['base']}" for p in facts["people"])
    return [
        f"The tuned model is {good}; it is {_list(named['worse'], 'clearly worse on', 'clearly worse on none')}.",
        f"{figures or 'It wrote no figure'}; {theirs}.",
        f"{both[0]['faultless']} of its {both[0]['answers']} answers passed every check (95 % interval: {low:.0%} to "
        f"{high:.0%}), of the base model's {both[1]['faultless']}.",
        f"This run used {facts['prompts']} prompts from {facts['scenarios']} scenarios, so a true difference under "
        f"about {100 * facts['smallest_visible_difference']:.0f} points would often stay unseen, and single "
        f"stakeholders are less certain still{unseen}.",
        f"{f'Compared blind, tuned won against base: {blind}' if blind else 'Nobody has rated these answers yet'}; the "
        "checks see form and figures, and whether an answer is wise or useful, only people can say.",
    ]


def _list(names: Sequence[str], some: str, none: str) -> str:
    return f"{some}: {', '.join(names)}" if names else none


def faults(line: Mapping[str, Any]) -> list[str]:
    """Why an answer is not good, in words, gravest first; empty for an answer without a fault."""
    said = [] if line["words"] else ["the answer is empty"]
    for m in line["invented"]:
        near = f"; nearest in the prompt: {m['nearest']}" if m["nearest"] else ""
        said.append(f"states {m['text']}: {m['reason']}{near}")
    said += [f"speaks of {about} without data" for about in line.get("claims") or []]
    said += [f"says the wrong direction: {words}" for words in line.get("wrong_way") or []]
    said += [f"section missing or empty: {', '.join(line['missing'])}"] if line["missing"] else []
    said += ["sections repeated or out of order"] if not line["missing"] and not line["has_sections"] else []
    few = [f"{name} {n}" for name, n in line["items"].items() if name not in line["missing"]]
    said += [f"wrong number of points ({', '.join(few)})"] if few and not line["items_ok"] else []
    said += ["did not stop by itself"] if not line["stopped"] and line["words"] else []
    said += ["copies the prompt"] if line["copied_prompt"] and line["words"] else []
    said += ["holds an echo, for which the tool throws it away"] if not line["echo_free"] and line["words"] else []
    heard = line.get("heard")
    said += [f"sounds like {heard}"] if heard and heard != line["stakeholder_id"] else []
    often = line["words"] and line["repeated"] > 0.2
    said += [f"repeats itself ({line['repeated']:.0%} of four-word runs)"] if often else []
    return said + (["uses fewer than three scenario figures"] if not line["cites_three"] else [])


def worst(scores: pd.DataFrame, most: int = 10) -> list[dict[str, Any]]:
    """The tuned answers with the most faults (an empty one first), with their reasons; faultless ones never."""
    lines = [{**s, "faults": faults(s)} for s in scores[scores["system"] == "tuned"].to_dict("records")]
    ranked = sorted((s for s in lines if s["faults"]), key=lambda s: (s["words"] > 0, -len(s["faults"]), s["row_id"]))
    return [{k: s[k] for k in ("row_id", "stakeholder", "scenario", "country", "faults")} for s in ranked[:most]]


def _totals(part: pd.DataFrame) -> dict[str, Any]:
    """Counts over all answers of one system, and the 95 % interval of the share without any fault."""
    import numpy as np

    clean = np.array([not faults(line) for line in part.to_dict("records")], dtype=float)
    numbers, grounded = int(part["numbers"].sum()), int(part["grounded"].sum())
    return {
        "answers": len(part),
        "numbers": numbers,
        "grounded": grounded,
        "faultless": int(clean.sum()),
        "faultless_interval": list(clustered_wilson(clean, list(part["scenario_id"]))),
    }


def marked(scores: pd.DataFrame, texts: Mapping, row_id: str, system: str) -> list[tuple[str, str]]:
    """An answer as (text, reason) pieces; the reason is empty but for figures that the prompt does not hold."""
    text = texts.get((row_id, system), "")
    found = scores[(scores["row_id"] == row_id) & (scores["system"] == system)]
    pieces, at = [], 0
    for miss in sorted(found["invented"].iloc[0], key=lambda m: m["start"]) if len(found) else []:
        pieces += [(text[at : miss["start"]], ""), (text[miss["start"] : miss["end"]], miss["reason"])]
        at = miss["end"]
    return [*pieces, (text[at:], "")]


def _cost(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line per stage before this report: seconds, peak memory (MB) and what it wrote (name, MB, sha256)."""
    return [
        {
            "stage": name,
            "time": clock(s["seconds"]),
            "peak_mb": s.get("peak_mb"),
            "files": [
                (file, about["bytes"] / 1e6, about.get("sha256")) for file, about in s.get("outputs", {}).items()
            ],
        }
        for name, s in record.get("stages", {}).items()
        if not name.startswith(LATER)
    ]


def embed(chart: Any) -> dict[str, str]:
    """A chart as a data URI (SVG, text as outlines so no font is needed) with its alt text; equal every time."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "stakelib", "svg.fonttype": "path"}):
        chart.savefig(out, format="svg", metadata={"Date": None})
    return {"src": f"data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode()}", "alt": chart.alt}


def finite(value: Any) -> Any:
    """`value` as plain JSON types; NaN and infinities become None, which means unknown."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def template(name: str) -> Any:
    """A page of this folder's templates; what it is given is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent / "templates"
    env = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    env.filters["shown"] = _shown
    return env.get_template(name)


def _shown(value: float | None, kind: str) -> str:
    """A value of the table: percent for yes/no and shares, else a number; a dash where unknown."""
    if value is None:
        return "–"
    return (f"{value:,.1f}" if kind == "number" else f"{100 * value:.0f}").replace("-", "\u2212")
