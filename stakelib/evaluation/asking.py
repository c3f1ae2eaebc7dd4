"""Which prompts are asked of which model: held-out rows through the shipped GGUF, the guide's prompts before export."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

from stakelib.dialogues import guide_test_prompts
from stakelib.evaluation.answers import answers
from stakelib.export import ensure_base_gguf, gguf_file, trained_in_mlx
from stakelib.models import base_model, engine
from stakelib.models.mlx_models import mlx_folder
from stakelib.run import Run
from stakelib.training import adapter_folder, load_rows


def held_out(run: Run) -> list[dict[str, Any]]:
    """`run.profile.test_prompts` full dialogues of the test split, the stakeholders in turn: each has its share."""
    by_voice = defaultdict(list)
    for row in load_rows(run.path("training_data", "test.jsonl")):
        if row.get("task", "dialogue") == "dialogue":
            by_voice[row["stakeholder_id"]].append(row)
    rounds = [
        [voice[i] for voice in by_voice.values() if i < len(voice)] for i in range(max(map(len, by_voice.values())))
    ]
    return [row for one_each in rounds for row in one_each][: run.profile.test_prompts]


def ask(run: Run, system: str, rows: list[dict[str, Any]], quantisation: str = "q8") -> list[dict[str, Any]]:
    """Answers of "base" or "tuned" to `rows`, greedy, through llama.cpp at one quantisation; saved as they come."""
    base = base_model(run.profile.model)
    gguf = gguf_file(run, quantisation) if system == "tuned" else ensure_base_gguf(base)[quantisation]
    factory = partial(engine, tokenizer=base.folder)
    return answers(run, system, gguf, rows, engine_factory=factory, max_new_tokens=run.profile.max_new_tokens)


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
    return run.stage(name, settings, [adapter, base.folder / "source.json"], [], work)["asked"]
