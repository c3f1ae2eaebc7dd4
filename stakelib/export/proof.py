"""Is it still the same model? Every form of it on the same held-out rows, every file through llama.cpp; then a gate."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stakelib.export.fused import trained_in_mlx
from stakelib.export.gguf_files import gguf_files
from stakelib.export.merged import check_folder
from stakelib.export.ollama import as_trained, rendered_by
from stakelib.models import BaseModel, Rendered, base_model, engine, load_tokenizer, load_weights, render, template
from stakelib.models.likelihood import Reading, Reference, bits_per_byte, read, reference
from stakelib.models.mlx_models import BITS, mlx_folder, mlx_nll
from stakelib.run import CourseError, Run

F16, Q8 = 0.005, 0.01  # how far the loss may be off, as a share of the merged model's
SMALL = 0.002  # nats per token: below it such a share measures rounding
TOP = 0.98  # share of places at which f16's likeliest token must be the merged model's
CHOSEN = 0.95  # share of llama.cpp's own tokens that must be the merged model's likeliest
STOPS = 0.75  # share of answers that must end by themselves
START = 64  # tokens of an answer that are compared
COLUMNS = {  # of the table
    "nll": "nats/token",
    "kl": "KL from f16",
    "top": "same top token",
    "mb": "MB",
    "same_ids": "same ids",
    "agree": "llama.cpp agrees",
    "same_start": "same first 64",
    "prefix": "same for",
    "stopped": "stopped",
    "tokens_per_s": "tokens/s",
}


def parity(run: Run, adapter: Path, rows: Sequence[Rendered], prompts: Sequence[str]) -> dict[str, Any]:
    """Prove each hop on held-out `rows`, and each GGUF in llama.cpp on `prompts`. Skipped if nothing changed.

    "hops", for base, adapter, merged and each GGUF: `nll` (nats per learned token), `kl` (KL divergence from f16, nats
    per token), `top` (share of places with the merged model's likeliest token). "engine", for each GGUF: see `_asked`
    and `_agreement`. One model is in memory at a time, in float32, beside f16's output layer.
    Raises CourseError with every reason not to ship these files, see `_judge`; what 4 bits cost is shown, not judged.
    """
    base, files = base_model(run.profile.model), gguf_files(run)
    merged, recipe = run.path("models", f"stakeholder-{base.short_name}-merged"), run.path("Modelfile")
    judged = base.source != "made here"
    why = "a random model's answers mean nothing, nor whether they end" if not judged else "judged"

    def work() -> dict[str, Any]:
        faults = _folder_faults(merged, base, recipe, prompts)
        found, answers = {}, {}
        for name, file in files.items():
            print(f"parity: {file.name} answers {len(prompts)} prompts in llama.cpp", flush=True)
            found[name], answers[name] = _asked(file, base, prompts, run.profile.max_new_tokens)
        hops = _hops(base, adapter, merged, files, rows, answers, found)
        tokenizer = load_tokenizer(base.folder)
        result = {
            "hops": hops,
            "engine": found,
            "nll": {k: h["nll"] for k, h in hops.items()},
            "rows": len(rows),
            "bits_per_byte": {k: round(bits_per_byte(h["nll"], rows, tokenizer), 5) for k, h in hops.items()},
            "prompts": len(prompts),
            "same_ids": all(f["same_ids"] for f in found.values()),
            "answers": why,
        }
        _judge(result, faults, judged)
        return result

    settings = {
        "rows": [r.ids for r in rows],
        "prompts": list(prompts),
        "max_new_tokens": run.profile.max_new_tokens,
        "engine": version("xllamacpp"),
    }
    return run.stage("parity", settings, [adapter, merged, *files.values(), recipe], [], work)


def table(proof: Mapping[str, Any]) -> Any:
    """The parity table as a pandas DataFrame, one line per form of the model; empty where a column has no meaning."""
    import pandas

    hops, files = (pandas.DataFrame.from_dict(proof[part], orient="index") for part in ("hops", "engine"))
    shown = hops.join(files)[list(COLUMNS)].rename(columns=COLUMNS)
    return shown.astype(object).where(shown.notna(), "")


def _folder_faults(merged: Path, base: BaseModel, recipe: Path, prompts: Sequence[str]) -> list[str]:
    """What is wrong with the merged folder, and with the Modelfile's TEMPLATE, before any weight is loaded."""
    faults: list[str] = []
    try:
        check_folder(merged, base)
    except CourseError as problem:
        faults += problem.problems
    tokenizer, text = load_tokenizer(base.folder), recipe.read_text(encoding="utf-8")
    if any(rendered_by(text, p.strip(), s) != as_trained(tokenizer, p, s) for p in prompts for s in ("", "Be brief.")):
        faults.append(f"{recipe.name}: its TEMPLATE wraps a prompt otherwise than training did")
    return faults


def _asked(file: Path, base: BaseModel, prompts: Sequence[str], limit: int) -> tuple[dict[str, Any], list[Rendered]]:
    """What llama.cpp makes of one GGUF, and the first tokens of its greedy answers.

    `same_ids`: it splits the prompts as training did; `same_template`: the file's own chat template wraps them alike;
    `stopped`: share of answers that end within `limit` tokens; `unused`: answers with tokens that no text holds;
    `tokens_per_s`: all answers at once, reading of the prompts included; `mb`: 10^6 bytes.
    """
    with engine(file, base.folder) as llama:
        tokenizer, start = llama.tokenizer, time.perf_counter()
        replies = dict(llama.ask(prompts, max_new_tokens=limit, ids=True))
        seconds = time.perf_counter() - start
        asked = [render(tokenizer, p).ids for p in prompts]
        same_ids = all(llama.tokenize(p) == ids for p, ids in zip(prompts, asked, strict=True))
    answers = [replies[i] for i in range(len(prompts))]
    starts = [
        Rendered(p + a.ids[:START], [0] * len(p) + [1] * len(a.ids[:START]))
        for p, a in zip(asked, answers, strict=True)
    ]
    return {
        "mb": round(file.stat().st_size / 1e6, 1),
        "same_ids": same_ids,
        "same_template": all(_own_template(file, tokenizer, p) for p in prompts),
        "stopped": round(sum(a.stopped for a in answers) / len(answers), 3),
        "unused": sum("<unused" in a.text for a in answers),
        "tokens_per_s": round(sum(a.new_tokens for a in answers) / seconds, 1),
    }, starts


def _own_template(file: Path, tokenizer: Any, prompt: str) -> bool:
    """Does the chat template inside the GGUF, which llama.cpp's chat and other programs use, wrap as training did?"""
    from gguf import GGUFReader

    field, around = GGUFReader(file).get_field("tokenizer.chat_template"), template(tokenizer)
    if field is None:
        return False
    turns = [{"role": "user", "content": prompt.strip()}]
    try:
        text = tokenizer.apply_chat_template(
            turns, chat_template=field.contents(), tokenize=False, add_generation_prompt=True
        )
    except Exception:  # whatever a broken template raises, it does not wrap as training did
        return False
    return text == around.before + prompt.strip() + around.between


def _hops(
    base: BaseModel,
    adapter: Path,
    merged: Path,
    files: dict[str, Path],
    rows: Sequence[Rendered],
    answers: dict[str, list[Rendered]],
    found: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Loss, KL and likeliest tokens of each form; `found` learns how far llama.cpp's answers are the merged model's."""
    kept, exact = _reference(files["f16"], rows)
    precision, readings = trained_in_mlx(adapter), {}
    if precision in BITS:  # measured where it was trained: on the packed weights, by MLX, which gives the loss alone
        packed = mlx_folder(base, precision)
        losses = {"base": mlx_nll(packed, rows), "adapter": mlx_nll(packed, rows, adapter / "mlx")}
        readings = {name: Reading(loss, None, []) for name, loss in losses.items()}
    forms = {"base": (base.folder, None), "adapter": (base.folder, adapter), "merged": (merged, None)}
    for name, (source, laid) in (forms | {q: (f, None) for q, f in files.items()}).items():
        if name in readings:
            continue
        readings[name] = exact if name == "f16" else _read(source, laid, rows, kept, answers, found, name == "merged")
        print(f"parity: {', '.join(f'{k} {r.nll:.4f}' for k, r in readings.items())}", flush=True)
    best = readings["merged"].top
    return {
        name: {
            "nll": round(r.nll, 5),
            "kl": None if r.kl is None else round(r.kl, 7),
            "top": round(_equal(r.top, best), 4) if r.top else None,
        }
        for name, r in readings.items()
    }


def _reference(f16: Path, rows: Sequence[Rendered]) -> tuple[Reference, Reading]:
    model = load_weights(f16, dtype="float32")
    kept = reference(model, rows)
    return kept, read(model, rows, kept)


def _read(
    source: Path,
    adapter: Path | None,
    rows: Sequence[Rendered],
    kept: Reference,
    answers: dict[str, list[Rendered]],
    found: dict[str, dict[str, Any]],
    is_merged: bool,
) -> Reading:
    """Load one form and measure it; the model is gone when this returns, before the next is loaded."""
    model = load_weights(source, adapter, dtype="float32")
    for name, starts in answers.items() if is_merged else ():
        found[name] |= _agreement(model, starts)
    return read(model, rows, kept)


def _agreement(merged: Any, starts: Sequence[Rendered]) -> dict[str, float]:
    """How far llama.cpp's greedy answers are those of the merged model in transformers, without generating any.

    The merged model reads each answer and says at every place which token it would have taken. `prefix`: how many
    tokens its own greedy answer has in common with this one (mean; 64 at most), `same_start`: share of answers in which
    that is all of them. Two sound programs part for good at the first near-tie, so these two are shown and not judged;
    `agree`, the share of all places, goes on counting behind one.
    """
    same = [
        [a == b for a, b in zip(read(merged, [row]).top, row.ids[len(row.prompt_ids) :], strict=True)]
        for row in starts
        if sum(row.mask)
    ]
    prefixes = [s.index(False) if False in s else len(s) for s in same] or [0]
    return {
        "agree": round(sum(map(sum, same)) / max(1, sum(map(len, same))), 4),
        "prefix": round(sum(prefixes) / len(prefixes), 1),
        "same_start": round(sum(map(all, same)) / max(1, len(same)), 3),
    }


def _equal(ours: list[int], theirs: list[int]) -> float:
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(theirs)


def _judge(found: Mapping[str, Any], faults: Sequence[str], judged: bool) -> None:
    """Raise CourseError with every reason not to ship: comparisons are written so that "not a number" fails too.

    A merge may undo a tenth of what training changed; f16 and q8 may be 0.5 and 1 % off the merged model. Answers are
    judged unless the model is random: those of f16 and q8 must end and hold no unused token, and f16's must be the
    merged model's. Of the smaller files only ids and template are judged; the table shows what else they cost.
    """
    problems, loss = list(faults), found["nll"]
    moved, best = abs(loss["adapter"] - loss["base"]), loss["merged"]
    if not moved >= 1e-4 or not abs(best - loss["base"]) >= 1e-4:
        problems.append(f"the merged model equals its base ({loss['base']:.4f} nats per token)")
    if not abs(best - loss["adapter"]) <= 0.1 * moved:
        problems.append(f"merged: {best:.4f} nats per token, the adapter has {loss['adapter']:.4f}")
    for name, share in (("f16", F16), ("q8", Q8)):
        if not abs(loss[name] - best) <= max(share * best, SMALL):
            problems.append(f"{name}: {loss[name]:.4f} nats per token, the merged model has {best:.4f}")
    if not found["hops"]["f16"]["top"] >= TOP:
        problems.append(f"f16: {found['hops']['f16']['top']:.1%} of its likeliest tokens are the merged model's")
    for name, said in found["engine"].items():
        problems += [f"{name}: {p}" for p in _answer_faults(name, said, judged and name in ("f16", "q8"))]
    if problems:
        raise CourseError(problems, "do not ship these files; report the model and these lines")


def _answer_faults(name: str, said: Mapping[str, Any], judged: bool) -> list[str]:
    checks = [
        (said["same_ids"], "llama.cpp makes other token ids of a prompt than training did"),
        (said["same_template"], "its own chat template wraps a prompt otherwise than training did"),
        (not judged or said["unused"] == 0, f"{said['unused']} answers hold <unused> tokens"),
        (not judged or said["stopped"] >= STOPS, f"only {said['stopped']:.0%} of the answers end by themselves"),
        (
            not judged or name != "f16" or said["agree"] >= CHOSEN,
            f"{said['agree']:.1%} of llama.cpp's tokens are those that the merged model would take",
        ),
    ]
    return [what for good, what in checks if not good]
