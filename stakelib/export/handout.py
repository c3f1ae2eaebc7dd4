"""The model as a product: one folder to hand on, with the file, how to use it, what it is, and sums to check it by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stakelib.export.gguf_files import gguf_file
from stakelib.export.ollama import model_name
from stakelib.models import base_model
from stakelib.run import CourseError, Run, atomic_write_text, link, sha256, versions, writing

LIMITS_GB = {"a laptop (Ollama)": 4, "a USB stick (browser page)": 2, "workshop Wi-Fi": 1}  # of the dialogue tool


def product(run: Run, quantisation: str = "q8") -> Path:
    """Write runs/<name>/product/: GGUF, Modelfile, README.md (model card), HOW-TO-USE.md, SHA256SUMS; returns it.

    The GGUF is a hard link where the disk allows it, else a copy, so it takes no room twice. The figures come from the
    record and from evaluation/evaluation.json if that is there. Raises CourseError listing missing files, and if the
    proof of notebook 05 is not in the record: what was not proved is not handed on.
    """
    base, gguf, recipe = base_model(run.profile.model), gguf_file(run, quantisation), run.path("Modelfile")
    stages = run.record["stages"]
    problems = [f"{f.relative_to(run.folder).as_posix()} is missing" for f in (gguf, recipe) if not f.exists()]
    problems += [f"the record has no stage '{s}'" for s in ("export", "parity") if s not in stages]
    if not problems and _recorded(stages["parity"], gguf) != sha256(gguf):
        problems = [f"{gguf.name} is not the file that was proved"]
    if problems:
        raise CourseError(problems, "run notebook 05 to its end first")
    with writing(run.path("product")) as part:
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


def _recorded(stage: dict[str, Any], gguf: Path) -> str | None:
    return next((h for name, h in stage["inputs"].items() if Path(name).name == gguf.name), None)


def _source(recipe: Path) -> str:
    lines = recipe.read_text(encoding="utf-8").splitlines()
    return next(line.split(" ", 1)[1] for line in lines if line.startswith("FROM "))


def _facts(run: Run, base: Any, gguf: Path) -> dict[str, Any]:
    """All that the two pages say."""
    stages, file = run.record["stages"], run.folder / "evaluation" / "evaluation.json"
    size = gguf.stat().st_size
    return {
        "name": model_name(gguf),
        "base": base,
        "gguf": gguf.name,
        "bytes": size,
        "run": run.profile,
        "limits": {place: (gb, size < gb * 1e9) for place, gb in LIMITS_GB.items()},
        "data": stages.get("data", {}).get("result", {}),
        "train": stages.get("train", {}).get("result", {}),
        "recipe": stages.get("train", {}).get("settings", {}).get("recipe", {}),
        "proof": stages["parity"]["result"],
        "evaluation": json.loads(file.read_text(encoding="utf-8")) if file.exists() else None,
        "gemma": "gemma" in base.licence.lower() or "gemma" in base.name.lower(),
        "machine": run.record.get("machine") or {},
        "versions": versions(),
        "quantisation": gguf.stem.rpartition("-")[2],
    }


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
