"""From adapter to files that run elsewhere: merged folder, GGUF, quantised GGUF, Modelfile; each hop measured."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from stakelib.export.fused import fuse, must_fuse, trained_in_mlx
from stakelib.export.gguf_files import QUANTISATIONS, converter, gguf_file, gguf_files, k_quants, quantise, to_gguf
from stakelib.export.handout import product
from stakelib.export.merged import check_folder, merge
from stakelib.export.ollama import modelfile, ollama_hop
from stakelib.export.proof import parity, table
from stakelib.machine import require
from stakelib.models import BaseModel, base_model, gguf_base, load_tokenizer
from stakelib.models.adapters import shapes
from stakelib.models.catalog import cache_folder
from stakelib.run import CourseError, Run
from stakelib.training import adapter_folder

__all__ = [
    "QUANTISATIONS",
    "check_exported",
    "check_folder",
    "converter",
    "disk_for",
    "export",
    "fuse",
    "gguf_file",
    "merge",
    "modelfile",
    "ollama_hop",
    "parity",
    "product",
    "quantise",
    "table",
    "to_gguf",
    "trained_in_mlx",
]


def export(run: Run, adapter: Path) -> dict[str, Any]:
    """Adapter -> merged folder -> f16, q8, q4 GGUF -> Modelfile; the untouched base likewise. Skipped if unchanged.

    Q4_K_M and Q5_K_M too where llama-quantize is on the PATH. Returns "bytes", file sizes by name, and "k_quants", one
    line that says whether they were made. Raises CourseError before any work if the disk is too full.
    """
    base = base_model(run.profile.model)
    merged = run.path("models", f"stakeholder-{base.short_name}-merged")
    files = {q: gguf_file(run, q) for q in QUANTISATIONS}
    target = run.path("Modelfile")

    def work() -> dict[str, Any]:
        disk_for(base, run.folder)
        (fuse if must_fuse(adapter) else merge)(base, adapter, merged)
        _ladder(merged, files)
        ensure_base_gguf(base)
        modelfile(load_tokenizer(base.folder), files["q8"], target)
        return {"bytes": {q: f.stat().st_size for q, f in files.items()}}

    source = base.source_json
    run.stage("export", {"quantisations": list(files)}, [adapter, source], [merged, *files.values(), target], work)
    return {"k_quants": k_quants(run), "bytes": {q: f.stat().st_size for q, f in gguf_files(run).items()}}


def check_exported(run: Run) -> None:
    """Raise CourseError if the record says that the adapter was trained anew after its GGUF files were made."""
    adapter = adapter_folder(run)
    trained, exported = run.recorded("train", adapter), run.recorded("export", adapter, "inputs")
    if trained and exported and trained != exported:
        raise CourseError(f"the GGUF files are of another adapter than {adapter.name} as it is now", "run notebook 05")


def disk_for(base: BaseModel, folder: Path) -> None:
    """Raise CourseError if the files to be made do not fit on the disk.

    2 bytes a weight for the merged folder and for f16, 1.07 at most for each quantised file (the embeddings stay at 8
    bits), two of them made by llama-quantize where it is; the base's own three in the cache, if they are not there.
    """
    weights = sum(math.prod(size) for size in shapes(base.folder).values())
    ladder = 2 + 1.07 * (4 if shutil.which("llama-quantize") else 2)
    cached = all(gguf_base(base, q).exists() for q in QUANTISATIONS)
    for place, bytes_each in ((folder, 2 + ladder), (cache_folder(), 0 if cached else 2 + 1.07 * 2)):
        require(ram_gb=0, disk_gb=round(weights * bytes_each / 2**30, 1), folder=place)


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
