"""The browser page: a folder with the model, llama.cpp as WebAssembly (wllama) and prompts; needs no network."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from stakelib.dialogues import brief, prompt_text
from stakelib.dialogues.prepare import LOADED
from stakelib.export import gguf_file
from stakelib.export.ollama import as_trained
from stakelib.models import base_model, load_tokenizer, render, template
from stakelib.models.catalog import cache_folder
from stakelib.run import CourseError, Run, atomic_write_json, link, sha256, writing
from stakelib.scenarios import Scenario, country_profile
from stakelib.voices import STAKEHOLDERS

WLLAMA = "@wllama/wllama@3.8.1"
WLLAMA_SHA256 = "bbe65fcc6d128d7853aed6d1699db7541e51a0363dc0135b8b68153acbf74670"
PARTS = {
    "package/esm/index.min.js": "wllama.js",
    "package/esm/wasm/wllama.wasm": "wllama.wasm",
    "package/LICENCE": "wllama-licence.txt",
}
LARGEST = 2 * 10**9  # bytes that a browser holds in one piece; beyond, wllama wants pieces of 512 MB
SPLITTER = "llama-gguf-split"


def wllama(package: str = WLLAMA, digest: str = WLLAMA_SHA256) -> Path:
    """wllama's three files in a folder of the course's cache; fetched once (6 MB) by npm, Node.js' client, and checked.

    Raises CourseError without npm or a network, and if the package is not the pinned one.
    """
    folder, npm = cache_folder() / package.rpartition("/")[2].replace("@", "-"), shutil.which("npm")
    if all((folder / name).exists() for name in PARTS.values()):
        return folder
    elsewhere = "or copy the .cache folder from a computer that has it; only the browser page needs it"
    if npm is None:
        raise CourseError("npm, which fetches wllama, is not installed", f"install Node.js (nodejs.org), {elsewhere}")
    with writing(folder) as part:
        part.mkdir(parents=True)
        done = subprocess.run(
            [npm, "pack", package, "--silent", "--fetch-retries=0", "--pack-destination", str(part)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        archive = next(part.glob("*.tgz"), None)
        if done.returncode or archive is None:
            raise CourseError(
                [f"npm could not fetch {package}", *done.stderr.strip().splitlines()[-2:]],
                f"check the network and try again, {elsewhere}",
            )
        if (found := sha256(archive)) != digest:
            problem = f"wllama: sha256 is {found}, {digest} was expected"
            raise CourseError(problem, "the download was changed on its way: try another network; nothing was kept")
        with tarfile.open(archive) as packed:
            for name, ours in PARTS.items():
                packed.extract(name, part, filter="data")
                (part / name).rename(part / ours)
        shutil.rmtree(part / "package")
        archive.unlink()
    return folder


def page(run: Run, scenarios: Sequence[Scenario], variant: str = "pragmatic") -> Path:
    """Build `page/` in the run folder and return it: index.html, app.js, wllama, the q8 model, prompts.json.

    Each scenario gets one prompt per stakeholder, inside the text that surrounded it in training. Skipped if unchanged.
    Raises CourseError if wllama cannot be had, if a model too large for one piece cannot be split, or if a scenario's
    text holds a control token of the model: wllama reads text only, so it could not be told apart.
    """
    base, gguf, target = base_model(run.profile.model), gguf_file(run, "q8"), run.folder / "page"
    web, own = files(__package__).joinpath("web"), ("index.html", "app.js")
    texts = {name: web.joinpath(name).read_text(encoding="utf-8") for name in own}

    def work() -> dict[str, Any]:
        runtime, tokenizer = wllama(), load_tokenizer(base.folder)
        with writing(target) as part:
            part.mkdir(parents=True)
            for name, text in texts.items():
                (part / name).write_text(text, encoding="utf-8", newline="\n")
            for name in PARTS.values():
                shutil.copyfile(runtime / name, part / name)  # no link: an edit here must not reach the cache
            asked = [_prompts(tokenizer, scenario, variant) for scenario in scenarios]
            about = {"name": gguf.stem, "tokens": run.profile.max_new_tokens, "files": _model(gguf, part)}
            about["sha256"] = sha256(gguf)
            atomic_write_json(part / "prompts.json", {**about, "scenarios": asked})
        return {"scenarios": len(asked), "files": about["files"]}

    settings = {
        "texts": texts,
        "wllama": WLLAMA,
        "rules": LOADED,
        "variant": variant,
        "scenarios": [s.model_dump() for s in scenarios],
    }
    run.stage("page", settings, [gguf, base.source_json], [target], work)
    return target


def _prompts(tokenizer: Any, scenario: Scenario, variant: str) -> dict[str, Any]:
    context = country_profile(scenario.metadata.country).get("context", "emerging")
    around, prompts = template(tokenizer), {}
    name = f"{scenario.metadata.scenarioName} ({scenario.metadata.country})"
    for who, profile in STAKEHOLDERS.items():
        text = prompt_text(scenario, who, context, variant, brief(scenario, who, context, variant, seed=0))
        whole = f"{around.before}{text.strip()}{around.between}"
        if tokenizer(whole, add_special_tokens=False).input_ids != render(tokenizer, text).ids:
            raise CourseError(f"{name}: its text holds a control token of the model", "rename it in your file")
        prompts[profile.name] = {"text": text, "whole": as_trained(tokenizer, text)}
    return {"name": name, "prompts": prompts}


def _model(gguf: Path, part: Path) -> list[str]:
    """Put the model beside the page; returns its file names. A second name of the same bytes where the disk can."""
    if gguf.stat().st_size <= LARGEST:
        link(gguf, part / "model.gguf")
        return ["model.gguf"]
    tool = shutil.which(SPLITTER)
    if tool is None:
        raise CourseError(
            f"{gguf.name} has {gguf.stat().st_size / 1e9:.1f} GB, a browser takes {LARGEST / 1e9:.0f} in one piece",
            f"install llama.cpp (brew, winget and conda-forge have it), so that {SPLITTER} is found, and try again",
        )
    subprocess.run([tool, "--split", "--split-max-size", "512M", str(gguf), str(part / "model")], check=True)
    return sorted(p.name for p in part.glob("model-*.gguf"))
