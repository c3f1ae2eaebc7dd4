"""The model as a product: one folder to hand on, with the file, how to use it, what it is, and sums to check it by."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from stakelib.export.gguf_files import QUANTISATIONS, gguf_file
from stakelib.export.ollama import model_name
from stakelib.models import base_model
from stakelib.run import CourseError, Run, atomic_write_text, link, sha256, writing

LIMITS_GB = {"a laptop (Ollama)": 4, "a USB stick (browser page)": 2, "workshop Wi-Fi": 1}  # of the dialogue tool


def product(run: Run, quantisation: str = "q8") -> Path:
    """Write runs/<name>/product/: GGUF, Modelfile, README.md (model card), HOW-TO-USE.md, SHA256SUMS; returns it.

    The GGUF is a hard link where the disk allows it, else a copy, so it takes no room twice. The card quotes the
    training, the rows and the evaluation only where the record says that they are of this very file. Raises CourseError
    listing missing files, and if the proof of notebook 05 is not in the record: what was not proved is not handed on.
    """
    base, gguf, recipe = base_model(run.profile.model), gguf_file(run, quantisation), run.path("Modelfile")
    stages = run.record["stages"]
    problems = [f"{f.relative_to(run.folder).as_posix()} is missing" for f in (gguf, recipe) if not f.exists()]
    problems += [f"the record has no stage '{s}'" for s in ("export", "parity") if s not in stages]
    if not problems:
        files = (gguf, recipe)
        changed = [f for f in files if run.recorded("parity", f, "inputs") != sha256(f)]
        problems = [f"{f.name} is not the file that was proved" for f in changed]
    if problems:
        raise CourseError(problems, "run notebook 05 to its end first")
    with run.keeping_edits([run.path("product")]), writing(run.path("product")) as part:
        part.mkdir(parents=True)
        link(gguf, part / gguf.name)
        inside = recipe.read_text(encoding="utf-8").replace(_source(recipe), f"./{gguf.name}")
        atomic_write_text(part / "Modelfile", inside)
        facts = _facts(run, base, gguf)
        for name in ("README.md", "HOW-TO-USE.md"):
            atomic_write_text(part / name, _template(f"{name}.j2").render(facts))
        sums = [f"{sha256(f)}  {f.name}" for f in sorted(part.iterdir())]
        atomic_write_text(part / "SHA256SUMS", "\n".join(sums) + "\n")
    return run.path("product")


def renew(run: Run) -> None:
    """Write product/ again where it holds a file of this run, because its card quotes the evaluation; else nothing.

    A folder that holds another model stays as it is: its card is of that model.
    """
    for held in sorted(run.path("product").glob("*.gguf")):
        quantisation = held.stem.rpartition("-")[2]
        gguf = gguf_file(run, quantisation)
        if gguf.name == held.name and gguf.exists() and sha256(gguf) == sha256(held):
            try:
                product(run, quantisation)
            except CourseError as problem:
                print(f"product/ stays as it was:\n{problem}", flush=True)


def evaluation_of(run: Run, gguf: Path) -> dict[str, Any] | None:
    """What evaluation/evaluation.json says, if "tuned" in it is exactly the file `gguf`; else None."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        facts = json.loads((run.folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
        if facts["sha256"]["tuned"] == sha256(gguf):
            return facts
    return None


def report_line(run: Run) -> str:
    """Where report.html lies, if it is of the present q8 file; else what it lacks and how to make it."""
    page, again = run.folder / "report.html", "run notebook 06 (course.py run --only 06)"
    if not page.exists():
        return "not made yet"
    facts = evaluation_of(run, gguf_file(run, "q8"))
    if facts and facts["sha256"].get("report.html") == sha256(page):
        return str(page)
    return f"{page.name} is not of the present q8 file, and executed notebooks may be older too: {again}"


def _source(recipe: Path) -> str:
    lines = recipe.read_text(encoding="utf-8").splitlines()
    return next(line.split(" ", 1)[1] for line in lines if line.startswith("FROM "))


def _facts(run: Run, base: Any, gguf: Path) -> dict[str, Any]:
    """All that the two pages say."""
    stages, size = run.record["stages"], gguf.stat().st_size
    made = _made_by(run, gguf)
    return {
        "name": model_name(gguf),
        "base": base,
        "gguf": gguf.name,
        "bytes": size,
        "run": run.profile,
        "limits": {place: (gb, size < gb * 1e9) for place, gb in LIMITS_GB.items()},
        "sha256": sha256(gguf),
        "data": made.get("data", {}).get("result", {}),
        "train": made.get("train", {}).get("result", {}),
        "recipe": made.get("train", {}).get("settings", {}).get("recipe", {}),
        "proof": stages["parity"]["result"],
        "evaluation": evaluation_of(run, gguf),
        "gemma": "gemma" in base.licence.lower() or "gemma" in base.name.lower(),
        "machine": made.get("train", {}).get("result", {}).get("machine") or {},
        "versions": made.get("train", {}).get("versions", {}),
        "quantisation": gguf.stem.rpartition("-")[2],
    }


def _made_by(run: Run, gguf: Path) -> dict[str, Any]:
    """The stages "train" and "data", each only if the record leads from the file `gguf` back to what it made."""
    stages, name = run.record["stages"], gguf.stem.rpartition("-")[2]
    exported, digest = gguf, sha256(gguf)
    if name not in QUANTISATIONS:  # made from the f16 file, as a stage of its own
        exported = gguf_file(run, "f16")
        digest = run.recorded("k-quants", exported, "inputs") if digest == run.recorded("k-quants", gguf) else None
    adapters = [n for n in stages["export"].get("inputs", {}) if n in stages.get("train", {}).get("outputs", {})]
    if digest is None or digest != run.recorded("export", exported) or not adapters:
        return {}
    adapter, rows = run.folder / adapters[0], run.folder / "training_data" / "train.jsonl"
    if run.recorded("export", adapter, "inputs") != run.recorded("train", adapter):
        return {}
    learned = run.recorded("train", rows, "inputs")
    same = learned is not None and learned == run.recorded("data", rows)
    return {k: stages[k] for k in ("train", *(["data"] if same else []))}


def _template(name: str) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).with_name("templates")
    env = Environment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - Markdown, not HTML
    )
    return env.get_template(name)
