"""Every figure that the fine-tuning guide promises, beside what this run measured (claims.json names both)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from statistics import median
from typing import Any

from stakelib.run import clock

UNKNOWN = "not measured yet"
MACHINES = {"M1": "Apple M1", "i7": "i7"}  # what stands in the record's name of the processor
LATER = ("voices", "tool", "page")  # stages of the notebooks after the report: the same model, the same report


def claims(
    record: Mapping[str, Any],
    model: str,
    answers: Sequence[Mapping[str, Any]],
    comparison: Sequence[Mapping[str, Any]],
    people: Sequence[Mapping[str, Any]],
) -> list[dict[str, str]]:
    """Lines of about, where, guide and ours; a figure for a computer that this is not reads UNKNOWN.

    `record`: the run's; `comparison`: lines of `compare`; `people`: lines of `preferences`.
    """
    here, lines = trained_on(record).get("processor", ""), []
    own = [a for a in answers if a.get("processor", here) == here]  # a run may have been carried to another computer
    found = {**_costs(record, model, own), **{p["criterion"]: people_say(p) for p in people}}
    checks = {c["measure"]: check_says(c) for c in comparison}
    for claim in json.loads(files(__package__).joinpath("claims.json").read_text(encoding="utf-8")):
        ours = [found.get(claim["ours"]), *(checks.get(name) for name in claim.get("checks", []))]
        elsewhere = MACHINES.get(claim["where"], here) not in here
        said = "" if elsewhere else "; ".join(filter(None, ours))
        lines.append({**{k: claim[k] for k in ("about", "where", "guide")}, "ours": said or UNKNOWN})
    return lines


def trained_on(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The computer that trained the run's adapter; a later trial elsewhere does not count."""
    train = record.get("stages", {}).get("train", {}).get("result") or {}
    return train.get("machine") or record.get("machine") or {}


def people_say(line: Mapping[str, Any]) -> str:
    """One line of `preferences` in words."""
    share = "" if line["share"] is None else f": {line['share']:.0%} [{line['low']:.0%}, {line['high']:.0%}]"
    won = f"tuned {line['tuned']} times, base {line['base']}, neither {line['same']}"
    return f"people ({line['raters']}) preferred {won}{share}"


def check_says(line: Mapping[str, Any]) -> str:
    """One line of `compare` in words; from 0 there is no percentage of improvement, so both values are told."""
    shown = ("{:.1f}" if line["kind"] == "number" else "{:.0%}").format
    return f'check "{line["label"]}": {shown(line["base"])} to {shown(line["tuned"])}, {line["verdict"]}'


def _costs(record: Mapping[str, Any], model: str, answers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What the record tells of time, memory and size, as text by the names that claims.json uses."""
    stages = record.get("stages", {})
    # what notebooks 07 and 08 make comes after this report, or lies there from the run before
    own = [stage["seconds"] for name, stage in stages.items() if not name.startswith(LATER)]
    said = {"total_time": clock(sum(own))} if own else {}
    if seconds := [a["seconds"] for a in answers if a["system"] == "tuned" and a["seconds"]]:
        tokens = median(a["new_tokens"] for a in answers if a["system"] == "tuned")
        said["answer_time"] = f"{median(seconds):.1f} s ({model}, llama.cpp, {tokens:.0f} tokens, several at once)"
    train = stages.get("train", {})
    told = train.get("result") or {}
    if "rows" in told:
        about = f"{model}, {told['rows']} rows, {told['precision']}"
        said |= {
            "train_time": f"{clock(train['seconds'])} ({about})",
            # MLX counts what it gives the graphics cores; of that the system may count nothing to its process
            "train_memory": f"{max(train['peak_mb'] / 1024, told.get('mlx_peak_gb', 0)):.1f} GB ({about})",
        }
        if model.startswith("gemma-2b"):
            said[f"memory_{told['precision']}"] = said["train_memory"]
        if weights := stages.get("export", {}).get("result", {}).get("bytes", {}).get("f16"):
            said["trainable"] = f"{told['trainable_parameters'] / (weights / 2):.1%} ({model})"  # two bytes a weight
    return said
