"""What the Scenario Dialogue Tool makes of the model's replies: accepted or not, points kept, in time."""

from __future__ import annotations

import difflib
import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stakelib.dialogues import Dialogue, build
from stakelib.dialogues.check import ECHO, base_of, row_gates
from stakelib.dialogues.prepare import SETTINGS
from stakelib.dialogues.tasks import KEYS
from stakelib.evaluation.answers import answers
from stakelib.evaluation.statistics import clustered_wilson
from stakelib.export import check_exported, ensure_base_gguf, gguf_file
from stakelib.export.local_http import call_json
from stakelib.export.serve import model_name, serving
from stakelib.machine import describe
from stakelib.models import Answer, base_model
from stakelib.run import CourseError, Run
from stakelib.scenarios import Scenario, scenario_id
from stakelib.training import load_rows

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 300  # characters that the tool shows of a reply which is no JSON
LIMIT = 3.0  # seconds, the tool's ollamaTimeout
TEMPERATURE = 0.7  # the tool's own, with num_predict 400
SEVERITIES = ("low", "medium", "high")


def tool_requests(run: Run, enhance: int = 90, voice: int = 9, tool: str | Path | None = None) -> list[dict[str, Any]]:
    """Rows of the tool's requests about held-out scenarios, as many for each stakeholder: first enhance, then voice.

    `tool`: folder of a checkout of the tool, for its exact words in the enhance prompt; else those of training.
    """
    made_with = json.loads(run.path("training_data", SETTINGS).read_text(encoding="utf-8"))
    held_out = {row["scenario_id"] for row in load_rows(run.path("training_data", "test.jsonl"))}
    scenarios = [s for s in map(Scenario.model_validate, made_with["scenarios"]) if scenario_id(s) in held_out]
    wanted = {"enhance": math.ceil(enhance / 9), "voice": math.ceil(voice / 9)}
    counts = {task: 10 * each for task, each in wanted.items()}  # of ten, the guide's mix gives each at least one
    more = {"reply": made_with["more"]["reply"], "tool": tool or made_with["more"]["tool"]}
    taken: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(build(scenarios, {}, made_with["seed"], **counts, **more), key=lambda row: row.task):
        taken[row.task, row.stakeholder_id].append(row.model_dump())
    return [row for (task, _), rows in taken.items() for row in rows[: wanted[task]]]


def ask_as_tool(
    address: str, model: str, prompt: str, temperature: float = TEMPERATURE, tokens: int = 400, seed: int | None = None
) -> dict[str, Any]:
    """The tool's own request to Ollama or to this course's endpoint: the reply, with its `seconds` added."""
    options = {"temperature": temperature, "num_predict": tokens} | ({} if seed is None else {"seed": seed})
    body = {"model": model, "prompt": prompt, "stream": False, "options": options}
    start = time.perf_counter()
    reply = call_json(f"{address}/api/generate", body)
    return {**reply, "seconds": time.perf_counter() - start}


class Caller:
    """An engine for `answers` that asks as the tool does: through an endpoint of its own, one request at a time."""

    def __init__(self, gguf: Path, tokenizer: Path) -> None:
        self.gguf, self.tokenizer = gguf, tokenizer

    def __enter__(self) -> Caller:
        self.open = ExitStack()
        self.address = self.open.enter_context(serving(self.gguf, self.tokenizer, seconds=600))
        return self

    def __exit__(self, *_: object) -> None:
        self.open.close()

    def ask(
        self, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, seed: int, top_p: float = 1.0
    ) -> Iterator[tuple[int, Answer]]:
        """As other engines do; `top_p` is not sent, because the tool sends none: the Modelfile's 0.9 holds."""
        for i, prompt in enumerate(prompts):
            said = ask_as_tool(self.address, model_name(self.gguf), prompt, temperature, max_new_tokens, seed)
            yield (
                i,
                Answer(
                    said["response"],
                    said["done_reason"] == "stop",
                    said["eval_count"],
                    said["prompt_eval_count"],
                    said["seconds"],
                ),
            )


def laid_over(reply: str, base: Mapping[str, Any]) -> tuple[str, dict[str, Any], list[str]]:
    """What the tool does with a reply: its form, the response then shown, and what is wrong with it on the screen.

    JSON is laid over the base, one level deep: form "full" (all five parts), "short" (the first reaction and not all
    others) or "other". Everything else is "text", whose first 300 characters become the first reaction.
    """

    def refuse(name: str) -> None:  # Python reads NaN, JSON.parse does not
        raise ValueError(name)

    try:
        found = json.loads(reply, parse_constant=refuse)
    except (ValueError, RecursionError):
        return "text", {**base, KEYS[0]: reply[:SHOWN]}, ["no JSON, so it is shown as it is, up to 300 characters"]
    if isinstance(found, str | list):  # what JavaScript's spread makes of them
        found = {str(i): item for i, item in enumerate(found)}
    found = found if isinstance(found, dict) else {}
    shown = {**base, **found, "generationType": "ai-enhanced"}
    form = "full" if all(key in found for key in KEYS) else "short" if KEYS[0] in found else "other"
    wrong = [f"'{key}' is ignored" for key in found if key not in base]
    first = shown.get(KEYS[0])
    if not isinstance(first, str) or not first.strip():
        wrong.append("no first reaction")
    elif first.split() == str(base.get(KEYS[0])).split():
        wrong.append("the first reaction is the old one")
    for key in KEYS[1:]:
        fits = _is_concern if key == "concerns" else _is_text
        if not isinstance(shown.get(key), list) or not all(map(fits, shown[key])):
            wrong.append(f"{key} would break the page or show empty lines")
    return form, shown, wrong


def _is_text(item: Any) -> bool:
    return isinstance(item, str) and bool(item.strip())


def _is_concern(item: Any) -> bool:
    good = isinstance(item, dict) and item.get("severity") in SEVERITIES
    return good and _is_text(item.get("text")) and _is_text(item.get("explanation"))


def judge(row: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
    """One line about one reply. What is not accepted counts as failed in `kept` and `grounded` too.

    `accepted`: for "enhance", JSON that shows a new first reaction and breaks nothing; for "voice", passes the tool's
    echo filter. `kept`: form and points as the data gate wants them (items, metric, severity, length). `grounded`:
    every figure stands in the prompt. `lost`: characters behind the 300th of a reply that is no JSON.
    """
    text, gates = answer["text"], row_gates()
    row_said = Dialogue.model_validate({**row, "completion": text.strip(), "source": "imported"})
    echo = ECHO.search(text) is not None
    form, wrong, lost = "voice", ["echo of the prompt"] if echo else [] if text.strip() else ["empty"], 0
    if row["task"] == "enhance":
        form, _, wrong = laid_over(text, base_of(row["prompt"]))
        lost = max(0, len(text) - SHOWN) if form == "text" else 0
    accepted = not wrong
    about = {key: row[key] for key in ("id", "stakeholder", "scenario_id", "task")}
    return {
        **about,
        "system": answer["system"],
        "form": form,
        "accepted": accepted,
        "kept": accepted and not gates["sections and items"](row_said),
        "grounded": accepted and not gates["figures in prompt"](row_said),
        "echo": echo,
        "lost": lost,
        "seconds": answer["seconds"],
        "in_time": answer["seconds"] <= LIMIT,
        "tokens": answer["new_tokens"],
        "wrong": "; ".join(wrong),
        "text": text,
        "prompt": row["prompt"],
    }


def try_in_tool(
    run: Run, rows: Sequence[Mapping[str, Any]], system: str = "tuned", temperature: float = TEMPERATURE
) -> pd.DataFrame:
    """Ask "tuned" or "base" (q8) for `rows` through an endpoint, one by one; one line per reply, see `judge`.

    Replies are saved as they come, so what is asked again costs nothing; those of another computer do not count.
    `temperature` 0 is greedy.
    """
    import pandas as pd

    base = base_model(run.profile.model)
    if system == "tuned":
        check_exported(run)
    gguf = gguf_file(run, "q8") if system == "tuned" else ensure_base_gguf(base)["q8"]
    replies = answers(
        run,
        f"tool-{system}",
        gguf,
        rows,
        engine_factory=partial(Caller, tokenizer=base.folder),
        tokenizer=base.folder,
        timed=True,
        max_new_tokens=run.profile.max_new_tokens,
        temperature=temperature,
        seed=run.profile.seed,
    )
    return pd.DataFrame([judge(row, {**reply, "system": system}) for row, reply in zip(rows, replies, strict=True)])


def accepted_share(table: pd.DataFrame) -> pd.DataFrame:
    """What the tool would accept: one line per system and measure with n, value (0-1) and its 95 % interval.

    All replies are in every denominator; intervals are Wilson's, clustered by scenario.
    """
    import pandas as pd

    lines = []
    for (task, system), rows in table.groupby(["task", "system"], sort=False):
        good, kept = rows["accepted"], rows["kept"] & rows["grounded"]
        measures = {
            "JSON accepted, short": good & (rows["form"] == "short"),
            "JSON accepted, full": good & (rows["form"] == "full"),
            "points kept": rows["kept"],
            "every figure from the prompt": rows["grounded"],
            "free of echo": ~rows["echo"] & (rows["text"].str.strip() != ""),
            "accepted within 3 s": good & rows["in_time"],
        }
        if task == "voice":
            measures = {"voice passes the echo filter": good, "voice of 2-3 sentences, figures right": kept}
        for name, values in measures.items():
            low, high = clustered_wilson(values.to_numpy(float), list(rows["scenario_id"]))
            lines.append(
                {
                    "system": system,
                    "measure": name,
                    "n": len(rows),
                    "value": float(values.mean()),
                    "low": low,
                    "high": high,
                }
            )
    return pd.DataFrame(lines)


def waiting(run: Run, table: pd.DataFrame, times: int = 3) -> pd.DataFrame:
    """Seconds until the reply is there (median, 95th percentile) by form, warm; and cold: loading and one answer.

    Cold is the tuned model started `times` times, its file already in the system's memory; after a restart of the
    computer it takes longer. In `run.json` as stage "tool".
    """
    import pandas as pd

    base, gguf = base_model(run.profile.model), gguf_file(run, "q8")
    tuned = table[table["system"] == "tuned"]
    prompt = tuned["prompt"].iloc[0]

    def work() -> dict[str, Any]:
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            with Caller(gguf, base.folder) as caller:
                next(iter(caller.ask([prompt], max_new_tokens=run.profile.max_new_tokens, temperature=0.0, seed=0)))
                seconds.append(time.perf_counter() - start)
        share = {f"{x['system']}, {x['measure']}": x["value"] for x in accepted_share(table).to_dict("records")}
        return {"cold": seconds, "share": share}

    settings = {"prompt": prompt, "replies": [list(table["id"]), list(table["text"])], "times": times}
    settings["processor"] = describe()["processor"]
    cold = run.stage("tool", settings, [gguf], [], work)["cold"]
    groups = {f"warm, {form}": part["seconds"] for form, part in tuned.groupby("form")}
    lines = [
        {
            "request": name,
            "n": len(s),
            "p50": pd.Series(s).median(),
            "p95": pd.Series(s).quantile(0.95),
            "within 3 s": float((pd.Series(s) <= LIMIT).mean()),
        }
        for name, s in {**groups, "cold": cold}.items()
    ]
    return pd.DataFrame(lines)


def tool_patch(run: Run, table: pd.DataFrame, tool: str | Path | None = None) -> str:
    """The change of the tool's DEFAULT_AI_CONFIG for this model, computed from the measured replies; writes nothing.

    ollamaTimeout is the 95th percentile of the tuned model's warm replies and half as much again, in whole seconds:
    the tool's laptop may be busier than this one. With `tool`, a checkout's folder, the result is a unified diff of
    its stakeholder-ai.ts; raises CourseError unless there is exactly one with these settings.
    """
    asked = table[(table["system"] == "tuned") & (table["task"] == "enhance")]
    timeout = 1000 * max(3, math.ceil(1.5 * asked["seconds"].quantile(0.95)))
    values = {"ollamaModel": f"'{model_name(gguf_file(run, 'q8'))}'", "ollamaTimeout": str(timeout)}
    if tool is None:
        lines = [f"  {key}: {value}," for key, value in values.items()]
        why = f"95 % of the replies took {asked['seconds'].quantile(0.95):.1f} s here, and half as much again"
        lines[1] += f"  // {why}"
        off = [
            "  // and set the switch of WebLLM in this block to false: it is asked before Ollama,",
            "  // and first downloads another model of 1.77 GB",
        ]
        return "\n".join(
            [
                "// src/utils/stakeholder-ai.ts: change these, leave the others",
                "export const DEFAULT_AI_CONFIG: AIConfig = {",
                *lines,
                *off,
                "};",
            ]
        )
    files = [p for p in sorted(Path(tool).rglob("stakeholder-ai.ts")) if "node_modules" not in p.parts]
    texts = {p: p.read_text(encoding="utf-8") for p in files}
    texts = {p: text for p, text in texts.items() if re.search(r"DEFAULT_AI_CONFIG\b[^=]*=\s*\{", text)}
    if len(texts) != 1:
        raise CourseError(
            f"{tool}: {len(texts)} files stakeholder-ai.ts with a DEFAULT_AI_CONFIG, one is needed",
            "name the folder of a Scenario Dialogue Tool checkout, or leave the tool out",
        )
    ((file, text),) = texts.items()
    head, start, rest = re.split(r"(DEFAULT_AI_CONFIG\b[^=]*=\s*\{)", text, maxsplit=1)
    block, end, after = rest.partition("\n}")
    for key, value in values.items():
        block = re.sub(rf"(\b{key}\s*:\s*)('[^']*'|\"[^\"]*\"|\d+)", lambda m, v=value: m[1] + v, block)
    block = re.sub(r"(?i)(\w*web_?llm\w*\s*:\s*)true\b", r"\1false", block)
    name = file.relative_to(tool).as_posix()
    return "".join(
        difflib.unified_diff(
            text.splitlines(True), (head + start + block + end + after).splitlines(True), f"a/{name}", f"b/{name}"
        )
    )
