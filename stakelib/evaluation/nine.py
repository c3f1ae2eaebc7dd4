"""One for all against one each: the same prompts, the same base file, only the adapters laid over it differ."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from stakelib import machine, plots
from stakelib.dialogues import build
from stakelib.dialogues.classifier import heard
from stakelib.evaluation.answers import answers
from stakelib.evaluation.report import template
from stakelib.export import ensure_base_gguf, merge, to_gguf, trained_in_mlx
from stakelib.export.adapter_files import ALL, adapter_to_gguf, nine_files
from stakelib.models import base_model, engine
from stakelib.models.mlx_models import mlx_folder
from stakelib.run import Run, anonymous_mb, atomic_write_text
from stakelib.training.nine import voice_adapters
from stakelib.voices import STAKEHOLDERS

if TYPE_CHECKING:
    import pandas as pd

PAIR = ("one", "nine")  # one adapter for all nine voices; an adapter for each
FROM_ONE = "nine-from-one"  # an adapter for each that went on from the one for all
JUDGED = ("identity", "grounded_share", "has_sections", "stopped")  # what is compared for each stakeholder


def ask_voices(
    run: Run, system: str, rows: Sequence[Mapping[str, Any]], voices: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Answers to `rows` through the base's q8 file with adapters laid over it; greedy, saved as they come.

    `system`: "one" (the adapter for all), "nine" or "nine-from-one" (each row's own voice answers), or another name
    with `voices`, the stakeholder id whose adapter answers each row. All prompts are in flight together.
    """
    base = base_model(run.profile.model)
    files = nine_files(run, "one" if system == FROM_ONE else "base")
    own = [ALL if system == PAIR[0] else row["stakeholder_id"] for row in rows]
    factory = partial(engine, tokenizer=base.folder, adapters=files)
    return answers(
        run,
        system,
        ensure_base_gguf(base)["q8"],
        rows,
        engine_factory=factory,
        adapters=files,
        tokenizer=base.folder,
        max_new_tokens=run.profile.max_new_tokens,
        voices=list(voices or own),
    )


def exchanged(run: Run, rows: Sequence[Mapping[str, Any]], listener: Any) -> pd.DataFrame:
    """Every adapter asked as every stakeholder, one prompt each: what the classifier `listener` heard.

    One line for each pair: "adapter", "asked as", "heard" (ids; "" for an answer without words).
    """
    import pandas as pd

    firsts = {row["stakeholder_id"]: row for row in reversed(rows)}
    pairs = [(who, firsts[other]) for who in STAKEHOLDERS for other in STAKEHOLDERS if other in firsts]
    asked = [row for _, row in pairs]
    said = ask_voices(run, "exchanged", asked, [who for who, _ in pairs])
    verdicts = heard(listener, [answer["text"] for answer in said], asked)
    return pd.DataFrame(
        [
            {"adapter": who, "asked as": row["stakeholder_id"], "heard": verdict}
            for (who, row), verdict in zip(pairs, verdicts, strict=True)
        ]
    )


def engines_here(run: Run) -> list[str]:
    """Engines that can switch on this computer in good time: on a processor MLX crawls, but for the tiny model."""
    kind = machine.mlx()[0]
    slow = kind == "cpu" and base_model(run.profile.model).parameters_m > 1
    return ["llama.cpp", "transformers", *([] if kind == "none" or slow else ["mlx"])]


def switching(run: Run, kind: str = "llama.cpp", times: int = 90, prompt: str = "Who speaks?") -> dict[str, Any]:
    """Switch the nine adapters `times` times in one process; and, beside it, one adapter alone that stays.

    "ms one", "ms nine": median time of an answer of 16 tokens; "switch ms": of the switch, in llama.cpp, where it is
    part of the request, the difference of the two; "MB one", "MB nine": memory of this process that the system cannot
    drop, with one and with nine loaded; "different": how many of the voices' answers differ; "same every time":
    whether each voice answered alike at each of its turns.
    """
    base, files = base_model(run.profile.model), voice_adapters(run)
    source = base.folder
    if kind == "llama.cpp":
        source, files = ensure_base_gguf(base)["q8"], {k: f for k, f in nine_files(run).items() if k != ALL}
    elif kind == "mlx":
        precision = trained_in_mlx(next(iter(files.values()))) or "float32"
        source, files = mlx_folder(base, precision), {who: folder / "mlx" for who, folder in files.items()}
    found: dict[str, Any] = {"engine": kind}
    for name, count, turns in (("one", 1, -(-times // 3)), ("nine", len(files), times)):
        gc.collect()
        some = dict(list(files.items())[:count])
        seconds, switched, said = [], [], {who: set() for who in some}
        with engine(source, base.folder, kind, adapters=some) as model:
            for who in (list(some) * (turns + 1))[: count + turns]:  # a first round warms up
                start = time.perf_counter()
                if kind != "llama.cpp":
                    model.speak(who)
                switched.append(time.perf_counter() - start)
                ((_, answer),) = model.ask([prompt], max_new_tokens=16, voices=[who])
                seconds.append(time.perf_counter() - start)
                said[who].add(answer.text)
            found |= {f"ms {name}": 1000 * median(seconds[count:]), f"MB {name}": anonymous_mb()}
    added = found["ms nine"] - found["ms one"] if kind == "llama.cpp" else 1000 * median(switched[count:])
    return found | {
        "switch ms": max(0.0, added),
        "different": len({min(t) for t in said.values()}),
        "same every time": all(len(texts) == 1 for texts in said.values()),
    }


def proved(run: Run, who: str, prompt: str, tokens: int = 64) -> dict[str, int]:
    """One voice's adapter against its merged model, both in 16 bits through llama.cpp, while another voice speaks too.

    Returns "tokens" of the merged model's greedy answer, and how many of the adapter's are "equal" before the first
    that is not. Near-ties of a real model may part the two; a wrong adapter parts them at once.
    """
    base, adapters = base_model(run.profile.model), voice_adapters(run)
    other = next(name for name in adapters if name != who)
    with TemporaryDirectory(ignore_cleanup_errors=True) as place:
        folder, files = Path(place), {name: Path(place, f"{name}.gguf") for name in (who, other)}
        merge(base, adapters[who], folder / "merged")
        to_gguf(folder / "merged", folder / "merged.gguf")
        for name, file in files.items():
            adapter_to_gguf(adapters[name], ensure_base_gguf(base)["f16"], file, None)
        with engine(folder / "merged.gguf", base.folder) as model:
            ((_, wanted),) = model.ask([prompt], max_new_tokens=tokens, ids=True)
        with engine(ensure_base_gguf(base)["f16"], base.folder, adapters=files) as model:
            found = dict(model.ask([prompt] * 2, max_new_tokens=tokens, ids=True, voices=[who, other]))[0]
    pairs = zip(wanted.ids, found.ids, strict=False)
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(wanted.ids), len(found.ids)))
    return {"tokens": len(wanted.ids), "equal": equal}


def costs(run: Run, said: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """What each way takes: MB on disk beside the base, minutes of training, seconds of an answer (median of `said`).

    "nine merged" is what nine files without adapters would take, were an engine to refuse them.
    """
    import pandas as pd

    files = nine_files(run)
    record, mb = run.record["stages"]["voices"]["result"], {who: f.stat().st_size / 1e6 for who, f in files.items()}
    base_mb = ensure_base_gguf(base_model(run.profile.model))["q8"].stat().st_size / 1e6
    nine = [who for who in files if who != ALL]
    waits = {s: median([a["seconds"] for a in said if a["system"] == s] or [float("nan")]) for s in PAIR}
    minutes = [sum(record["seconds"][who] for who in some) / 60 for some in ([ALL], nine)]
    sizes = (base_mb + mb[ALL], base_mb + sum(mb[who] for who in nine), len(nine) * base_mb)
    names = ("one adapter on the base", "nine adapters on the base", "nine merged files")
    return pd.DataFrame(
        {
            "way": names,
            "MB": sizes,
            "training minutes": [*minutes, minutes[1]],
            "seconds an answer": [waits["one"], waits["nine"], waits["one"]],
        }
    )


def advice(comparison: pd.DataFrame, each: pd.DataFrame, cost: pd.DataFrame) -> str:
    """When to prefer which, in one sentence that follows from the figures alone."""
    judged = comparison[comparison["direction"] != "none"]
    named = {v: ", ".join(judged[judged["verdict"] == v]["label"].str.lower()) for v in ("better", "worse")}
    single = each[each["verdict"].isin(["better", "worse"])]
    who = "; ".join(f"{x.stakeholder} {x.verdict} on {x.label.lower()}" for x in single.itertuples())
    one, nine = cost["MB"].iloc[0], cost["MB"].iloc[1]
    found = {
        (True, True): f"One each is better on {named['better']} and worse on {named['worse']}: choose by which matters",
        (True, False): f"Prefer one each: better on {named['better']}, worse on none",
        (False, True): f"Prefer one for all: one each is worse on {named['worse']}, better on none",
        (False, False): "Prefer one for all, the simpler: these prompts show no difference on any measure; one each "
        "pays where single voices must be changed without touching the others",
    }[bool(named["better"]), bool(named["worse"])]
    return (
        f"{found} ({nine:,.1f} MB against {one:,.1f}; {judged['n'].max()} prompts; single stakeholders: "
        f"{who or 'none that can be told apart'})."
    )


def panel_rows(scenario: Any, seed: int = 0) -> list[dict[str, Any]]:
    """One prompt of each stakeholder about one scenario: rows to ask."""
    return [row.model_dump() for row in build([scenario], dict.fromkeys(STAKEHOLDERS, 1), seed)]


def hand_out(run: Run, rows: Sequence[Mapping[str, Any]], said: Sequence[Mapping[str, Any]]) -> Path:
    """Write panel.html into the run folder: one scenario, its voices side by side, on one page that loads nothing.

    `rows`: of `panel_rows`; `said`: their answers. Scenario and answers are text: the template escapes them.
    The page names the sha256 of the file, and of each adapter over it, that wrote these answers.
    """
    texts = {row["stakeholder"]: answer["text"] for row, answer in zip(rows, said, strict=True)}
    cards = Markup(plots.panel(texts))  # which escapes them
    files = sorted({(a["gguf"], a["sha256"], a.get("adapter_sha256")) for a in said if a.get("sha256")}, key=str)
    page = template("panel.html.j2").render(rows=rows, cards=cards, model=run.profile.model, files=files)
    return atomic_write_text(run.path("panel.html"), page)
