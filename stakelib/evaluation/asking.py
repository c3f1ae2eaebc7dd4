"""Which prompts are asked of which system: held-out rows through the shipped GGUF, general ones, the guide's."""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from functools import partial
from importlib.resources import files
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import yaml

from stakelib.dialogues import build, guide_test_prompts
from stakelib.dialogues.classifier import listener
from stakelib.evaluation.answers import answers
from stakelib.evaluation.measures import score
from stakelib.evaluation.statistics import compare
from stakelib.export import QUANTISATIONS, check_exported, ensure_base_gguf, gguf_file, trained_in_mlx
from stakelib.models import base_model, engine
from stakelib.models.mlx_models import mlx_folder
from stakelib.run import CourseError, Run
from stakelib.scenarios import country_key, sample, scenario_id
from stakelib.training import adapter_folder, load_rows
from stakelib.voices import STAKEHOLDERS

if TYPE_CHECKING:
    import pandas as pd

SYSTEMS = {  # what is asked, and as what it stands in tables
    "base": "the untouched base model",
    "prompted": "the base model with a good instruction and two worked examples",
    "tuned": "the fine-tuned model at 8 bits, as it ships",
    "tuned-q4": "the fine-tuned model at 4 bits",
    "rules": "the rule text of the row itself: no model, no cost",
}
SHIPPED = {"temperature": 0.7, "top_p": 0.9}  # the Modelfile's sampling
SEEN_TOGETHER = 4096  # tokens of a prompt with two examples, and its answer


@functools.cache
def texts() -> dict[str, Any]:
    """Prompts of the evaluation (prompts.yaml): the instruction, other wordings, general questions."""
    return yaml.safe_load(files(__package__).joinpath("prompts.yaml").read_text(encoding="utf-8"))


def held_out(run: Run) -> list[dict[str, Any]]:
    """`run.profile.test_prompts` full dialogues on test countries, the stakeholders in turn: each has its share.

    Profile report gets its own, see `report_prompts`; the others rows of the test split. CourseError if it has none.
    """
    if run.profile.name == "report":
        return report_prompts(run, run.profile.test_prompts // len(STAKEHOLDERS))
    rows = [row for row in load_rows(run.path("training_data", "test.jsonl")) if _full(row)]
    if not rows:
        raise CourseError("test.jsonl holds no full dialogue", "make more rows in notebook 01: there is nothing to ask")
    return _in_turn(rows)[: run.profile.test_prompts]


def _full(row: dict[str, Any]) -> bool:
    return row.get("task", "dialogue") == "dialogue"


def _in_turn(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    voices = defaultdict(list)
    for row in rows:
        voices[row["stakeholder_id"]].append(row)
    rounds = zip_longest(*voices.values())
    return [row for one_each in rounds for row in one_each if row]


def report_prompts(run: Run, scenarios: int = 40) -> list[dict[str, Any]]:
    """`scenarios` x 9 stakeholders, from the test countries and from no scenario of the run's own rows; always equal.

    Raises CourseError if no country was held out.
    """
    parts = {p: load_rows(run.path("training_data", f"{p}.jsonl")) for p in ("train", "valid", "test")}
    seen = {country_key(row["country"]) for p in ("train", "valid") for row in parts[p]}
    countries = {country_key(row["country"]) for row in parts["test"]} - seen
    known = {row["scenario_id"] for rows in parts.values() for row in rows}
    if not countries:
        raise CourseError("the test split has no country of its own", "run notebook 01 again")
    found: dict[str, Any] = {}
    for seed in range(run.profile.seed + 1000, run.profile.seed + 1000 + 50 * scenarios):
        fresh = {scenario_id(s): s for s in sample(80, seed) if country_key(s.metadata.country) in countries}
        found |= {name: s for name, s in fresh.items() if name not in known}
        if len(found) >= scenarios:
            break
    chosen = list(found.values())[:scenarios]
    rows = build(chosen, dict.fromkeys(STAKEHOLDERS, len(chosen)), run.profile.seed)
    return _in_turn([row.model_copy(update={"split": "test"}).model_dump() for row in rows])


def ask(
    run: Run, system: str, rows: list[dict[str, Any]], quantisation: str = "q8", *, sampled: bool = False, seed: int = 0
) -> list[dict[str, Any]]:
    """Answers of one of SYSTEMS to `rows` through llama.cpp at one quantisation; saved as they come.

    Greedy, or with the sampling of the Modelfile (`sampled`, `seed`). "tuned-q4" is "tuned" at q4, and named so.
    Raises CourseError for the tuned model if its files are of an adapter that was trained anew since.
    """
    name, _, bits = system.partition("-")
    quantisation = bits or quantisation
    if name not in SYSTEMS or quantisation not in QUANTISATIONS:
        raise CourseError(
            f"system '{system}' at '{quantisation}' is unknown",
            f"choose one of: {', '.join(SYSTEMS)}; quantisation {', '.join(QUANTISATIONS)}",
        )
    if name == "rules":
        return [
            {
                "row_id": row["id"],
                "system": system,
                "gguf": "none",
                "text": row["completion"],
                "stopped": True,
                "new_tokens": 0,
                "prompt_tokens": 0,
                "seconds": 0.0,
            }
            for row in rows
        ]
    base = base_model(run.profile.model)
    if name == "tuned":
        check_exported(run)
    gguf = gguf_file(run, quantisation) if name == "tuned" else ensure_base_gguf(base)[quantisation]
    context = SEEN_TOGETHER if name == "prompted" else 2048
    factory = partial(engine, tokenizer=base.folder, context=context)
    label = system if bits or quantisation == "q8" else f"{system}-{quantisation}"
    asked = prompted(run, rows) if name == "prompted" else rows
    return answers(
        run,
        label,
        gguf,
        asked,
        engine_factory=factory,
        tokenizer=base.folder,
        max_new_tokens=run.profile.max_new_tokens,
        seed=seed,
        **(SHIPPED if sampled else {}),
    )


def prompted(run: Run, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` with an instruction and two worked examples before each prompt: the same voice, training countries only.

    The shortest two of different scenarios, so that they and the answer fit together.
    """
    examples: dict[str, list[dict[str, Any]]] = defaultdict(list)
    train = [row for row in load_rows(run.path("training_data", "train.jsonl")) if _full(row)]
    for row in sorted(train, key=lambda row: (len(row["prompt"] + row["completion"]), row["id"])):
        some = examples[row["stakeholder_id"]]
        if len(some) < 2 and row["scenario_id"] not in {e["scenario_id"] for e in some}:
            some.append(row)
    shown = {who: "\n\n".join(texts()["example"].format(**e) for e in some) for who, some in examples.items()}
    return [
        {
            **row,
            "prompt": texts()["instruction"].format(
                examples=shown.get(row["stakeholder_id"], ""), prompt=row["prompt"]
            ),
        }
        for row in rows
    ]


def reworded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows in other words around the same data: for score(..., again=ask(run, system, reworded(rows)))."""
    out = []
    for row in rows:
        prompt = row["prompt"]
        for pattern, other in texts()["reworded"]:
            prompt = re.sub(pattern, other, prompt)
        out.append({**row, "prompt": prompt})
    return out


def voices_heard(run: Run) -> Any:
    """The classifier of voices, trained on the run's full training dialogues of rule texts; for score(listener=...)."""
    rows = load_rows(run.path("training_data", "train.jsonl"))
    return listener([r for r in rows if _full(r) and r.get("source", "rules") == "rules"])


def general(run: Run, system: str) -> pd.DataFrame:
    """Sixteen general questions asked of a system: one line each, "knows" if the reply begins with it.

    To begin with it: an accepted answer stands among the first twelve words. Concatenate two systems' tables for
    compare(both, ["knows"]): what training made the model forget.
    """
    import pandas as pd

    rows = [{"id": f"general-{i}", "prompt": q, "accepted": a} for i, (q, *a) in enumerate(texts()["general"])]
    lines = [
        {
            "row_id": row["id"],
            "scenario_id": row["id"],
            "system": answer["system"],
            "question": row["prompt"],
            "answer": answer["text"],
            "knows": any(re.search(rf"\b{a}\b", " ".join(answer["text"].split()[:12]), re.I) for a in row["accepted"]),
        }
        for row, answer in zip(rows, ask(run, system, rows), strict=True)
    ]
    return pd.DataFrame(lines)


def compare_runs(run_a: Run, run_b: Run, measures: list[str] | None = None) -> pd.DataFrame:
    """The tuned models of two runs on the held-out rows that both have: `compare` with the folders' names.

    Raises CourseError if the two share no row.
    """
    import pandas as pd

    names = [run.folder.resolve().name for run in (run_a, run_b)]
    names = [f"{n} ({i})" for i, n in zip("ab", names, strict=True)] if names[0] == names[1] else names
    others = {row["id"]: row["prompt"] for row in held_out(run_b)}
    rows = [row for row in held_out(run_a) if others.get(row["id"]) == row["prompt"]]
    if not rows:
        raise CourseError(
            f"{' and '.join(names)} have no held-out row in common",
            "compare runs of one profile and seed, made from the same scenarios",
        )
    tables = [
        score(rows, ask(run, "tuned", rows)).assign(system=name)
        for run, name in zip((run_a, run_b), names, strict=True)
    ]
    return compare(pd.concat(tables), measures, (names[0], names[1]))


def nine_voices(run: Run) -> dict[str, dict[str, Any]]:
    """One held-out prompt per stakeholder answered by the tuned GGUF: stakeholder's name -> answer."""
    rows = {row["stakeholder"]: row for row in reversed(held_out(run))}
    ordered = [rows[name] for name in sorted(rows)]
    return dict(zip(sorted(rows), ask(run, "tuned", ordered), strict=True))


def ask_guide_prompts(run: Run, kind: str = "transformers") -> list[dict[str, str]]:
    """The guide's three test prompts before export: base and base + adapter in transformers or "mlx", greedy.

    Returns one dict per prompt with "prompt", "base" and "tuned" (texts, new tokens only). Skipped if unchanged.
    """
    base, adapter = base_model(run.profile.model), adapter_folder(run)
    prompts, folder, laid = list(guide_test_prompts().values()), base.folder, adapter
    if kind == "mlx":
        folder, laid = mlx_folder(base, trained_in_mlx(adapter) or "float32"), adapter / "mlx"

    def work() -> dict[str, Any]:
        texts = {}
        for system, laid_over in (("base", None), ("tuned", laid)):
            print(f"guide's prompts: asking {system}, up to {run.profile.max_new_tokens} tokens each", flush=True)
            with engine(folder, base.folder, kind, laid_over) as model:
                replies = dict(model.ask(prompts, max_new_tokens=run.profile.max_new_tokens))
            texts[system] = [replies[i].text for i in range(len(prompts))]
        pairs = zip(prompts, texts["base"], texts["tuned"], strict=True)
        return {"asked": [dict(zip(("prompt", "base", "tuned"), p, strict=True)) for p in pairs]}

    settings = {"prompts": prompts, "max_new_tokens": run.profile.max_new_tokens}
    name = "guide-prompts" if kind == "transformers" else f"guide-prompts-{kind}"
    return run.stage(name, settings, [adapter, base.source_json], [], work)["asked"]
