"""From adapter to files that run elsewhere: merged folder, GGUF, quantised GGUF, Modelfile; each hop measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stakelib.export.fused import fuse, must_fuse, trained_in_mlx
from stakelib.export.gguf_files import converter, quantise, to_gguf
from stakelib.export.merged import check_folder, merge
from stakelib.export.ollama import modelfile
from stakelib.models import BaseModel, Rendered, base_model, bits_per_byte, engine, gguf_base, load_tokenizer, nll
from stakelib.models.mlx_models import BITS, mlx_folder, mlx_nll
from stakelib.run import CourseError, Run

__all__ = [
    "QUANTISATIONS",
    "check_folder",
    "converter",
    "export",
    "fuse",
    "gguf_file",
    "merge",
    "modelfile",
    "parity",
    "quantise",
    "to_gguf",
    "trained_in_mlx",
]

QUANTISATIONS = {"f16": None, "q8": "Q8_0", "q4": "Q4_0"}  # name in the file -> type in the GGUF


def gguf_file(run: Run, quantisation: str) -> Path:
    """models/stakeholder-<base>-<f16|q8|q4>.gguf of this run."""
    return run.path("models", f"stakeholder-{base_model(run.profile.model).short_name}-{quantisation}.gguf")


def export(run: Run, adapter: Path) -> dict[str, Any]:
    """Adapter -> merged folder -> f16, q8, q4 GGUF -> Modelfile; the untouched base likewise. Skipped if unchanged.

    Returns file sizes in bytes by name.
    """
    base = base_model(run.profile.model)
    merged = run.path("models", f"stakeholder-{base.short_name}-merged")
    files = {q: gguf_file(run, q) for q in QUANTISATIONS}
    target = run.path("Modelfile")

    def work() -> dict[str, Any]:
        (fuse if must_fuse(adapter) else merge)(base, adapter, merged)
        _ladder(merged, files)
        ensure_base_gguf(base)
        modelfile(load_tokenizer(base.folder), files["q8"], target)
        return {"bytes": {q: f.stat().st_size for q, f in files.items()}}

    source = base.folder / "source.json"
    return run.stage(
        "export", {"quantisations": list(files)}, [adapter, source], [merged, *files.values(), target], work
    )


def ensure_base_gguf(base: BaseModel) -> dict[str, Path]:
    """The untouched base as GGUF at every quantisation, kept in the cache: the fair opponent of the tuned model."""
    files = {q: gguf_base(base, q) for q in QUANTISATIONS}
    if not all(f.exists() for f in files.values()):
        _ladder(base.folder, files)
    return files


def _ladder(folder: Path, files: dict[str, Path]) -> None:
    print(f"export: {folder.name} -> {', '.join(f.name for f in files.values())}", flush=True)
    to_gguf(folder, files["f16"])
    for name, kind in QUANTISATIONS.items():
        if kind:
            quantise(files["f16"], files[name], kind)


def parity(run: Run, adapter: Path, rows: Sequence[Rendered], prompt: str) -> dict[str, Any]:
    """Prove each hop: mean negative log-likelihood (nats per token) of `rows` under base, adapter, merged, f16, q8, q4.

    Also in bits per byte, and whether llama.cpp makes the same token ids of `prompt` as training did. Raises
    CourseError if a hop up to f16 undoes more than a tenth of what training changed (q8, which ships: a quarter, or
    0.02 nats), if training changed nothing, or if the ids differ.
    """
    base = base_model(run.profile.model)
    merged = run.path("models", f"stakeholder-{base.short_name}-merged")
    files = {q: gguf_file(run, q) for q in QUANTISATIONS}

    def work() -> dict[str, Any]:
        precision = trained_in_mlx(adapter)
        if precision in BITS:  # measured where it was trained: on the packed weights
            packed = mlx_folder(base, precision)
            losses = {"base": mlx_nll(packed, rows), "adapter": mlx_nll(packed, rows, adapter / "mlx")}
        else:
            losses = {"base": nll(base.folder, rows), "adapter": nll(base.folder, rows, adapter)}
        losses["merged"] = nll(merged, rows)
        for name, file in files.items():
            print(f"parity: {', '.join(f'{k} {v:.4f}' for k, v in losses.items())}", flush=True)
            losses[name] = nll(file, rows)
        same = _same_ids(base, files["q8"], prompt)
        _judge(losses, same)
        tokenizer = load_tokenizer(base.folder)
        bits = {k: round(bits_per_byte(v, rows, tokenizer), 5) for k, v in losses.items()}
        return {"nll": {k: round(v, 5) for k, v in losses.items()}, "bits_per_byte": bits, "same_ids": same,
                "rows": len(rows)}

    settings = {"rows": [r.ids for r in rows], "prompt": prompt}
    return run.stage("parity", settings, [adapter, merged, *files.values()], [], work)


def _same_ids(base: BaseModel, gguf: Path, prompt: str) -> bool:
    from stakelib.models import render

    with engine(gguf, base.folder) as llama:
        return llama.tokenize(prompt) == render(llama.tokenizer, prompt).ids


def _judge(losses: dict[str, float], same_ids: bool) -> None:
    moved = abs(losses["adapter"] - losses["base"])
    problems = [  # written so that a loss that is not a number fails too
        f"{hop}: {losses[hop]:.4f} nats per token, the adapter has {losses['adapter']:.4f}"
        for hop, allowed in (("merged", 0.1 * moved), ("f16", 0.1 * moved), ("q8", max(0.25 * moved, 0.02)))
        if not abs(losses[hop] - losses["adapter"]) <= allowed
    ]
    if not moved >= 1e-4 or not abs(losses["merged"] - losses["base"]) >= 1e-4:
        problems.append(f"the merged model equals its base ({losses['base']:.4f} nats per token)")
    if not same_ids:
        problems.append("llama.cpp makes other token ids of the prompt than training did")
    if problems:
        raise CourseError(problems, "do not ship these files; report the model and these lines")
