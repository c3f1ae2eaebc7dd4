"""One adapter, two forms: PEFT's is the canonical one, MLX's lies in its `mlx/` folder; either is made of the other."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from stakelib.run import CourseError, atomic_write_json, writing

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
MLX_FILES = ("adapter_config.json", "adapters.safetensors")
MATRICES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}  # of a layer, that may learn
# Settings of PEFT that change nothing about what the matrices of a finished adapter mean; others must be empty or plain
HARMLESS = {
    *(
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "layers_to_transform",
        "init_lora_weights",
        "inference_mode",
    ),
    *("base_model_name_or_path", "peft_version", "revision", "auto_mapping", "megatron_core", "qalora_group_size"),
}
PLAIN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "layers_pattern": "layers"}


def to_mlx(adapter: Path, precision: str | None = None) -> Path:
    """Write the MLX form of the PEFT adapter in folder `adapter` to its `mlx/`, which is returned.

    A [rank, inputs] and B [outputs, rank] become lora_a [inputs, rank] and lora_b [rank, outputs]; alpha becomes
    scale = alpha / rank. `precision`: that of the base which MLX trained it on, see `mlx_folder`.
    """
    from safetensors.torch import load_file, save_file

    check_adapter(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    rank, tensors = config["r"], load_file(adapter / "adapter_model.safetensors")
    layers = sorted({int(n.split("layers.")[1].split(".")[0]) for n in tensors})
    keys = sorted({n.split("layers.")[1].split(".", 1)[1].rsplit(".lora_", 1)[0] for n in tensors})
    with writing(adapter / "mlx") as part:
        part.mkdir()
        turned = {_other(n): t.float().T.contiguous() for n, t in tensors.items()}
        save_file(turned, part / MLX_FILES[1], {"format": "mlx"})
        parameters = {"rank": rank, "scale": config["lora_alpha"] / rank, "dropout": config["lora_dropout"]}
        atomic_write_json(
            part / MLX_FILES[0],
            {
                "fine_tune_type": "lora",
                "num_layers": len(layers),
                "lora_parameters": {**parameters, "keys": keys},
                "model": config["base_model_name_or_path"],
                "base_precision": precision,
            },
        )
    return adapter / "mlx"


def to_peft(mlx: Path, adapter: Path) -> Path:
    """Write the PEFT form of the MLX adapter in folder `mlx` into folder `adapter`, which is returned."""
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file

    check_adapter(mlx)
    config = json.loads((mlx / "adapter_config.json").read_text(encoding="utf-8"))
    ours, tensors = config["lora_parameters"], load_file(mlx / MLX_FILES[1])
    numbers = sorted({int(n.split("layers.")[1].split(".")[0]) for n in tensors})
    adapter.mkdir(parents=True, exist_ok=True)
    LoraConfig(
        r=ours["rank"],
        lora_alpha=_whole(ours["scale"] * ours["rank"]),
        lora_dropout=ours["dropout"],
        bias="none",
        target_modules=sorted({n.split(".")[-2] for n in tensors}),
        layers_to_transform=numbers,
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.get("model"),
        inference_mode=True,
    ).save_pretrained(adapter)
    save_file({_other(n): t.float().T.contiguous() for n, t in tensors.items()}, adapter / PEFT_FILES[1])
    return adapter


def _whole(alpha: float) -> float:
    """alpha as an int where it is one, up to rounding."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-6 else alpha


def _other(name: str) -> str:
    """A tensor's name in the other form."""
    if found := re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name):
        return f"{found[1]}.lora_{found[2].lower()}"
    module, _, letter = name.rpartition(".lora_")
    return f"base_model.model.{module}.lora_{letter.upper()}.weight"


def check_adapter(folder: Path, base: Path | None = None) -> None:
    """Raise CourseError listing what keeps a folder from being a LoRA adapter, of the model in folder `base` if given.

    Knows the old example's npz file, a missing half, kinds of LoRA that PEFT, MLX and GGUF do not all have in one
    meaning, and an adapter whose matrices do not fit the model's.
    """
    folder = Path(folder)
    here = {p.name for p in folder.glob("*")} if folder.is_dir() else set()
    old = [folder.name] if folder.suffix == ".npz" else [n for n in here if n.endswith(".npz")]
    form = MLX_FILES if MLX_FILES[1] in here else PEFT_FILES
    problems = []
    if old and form[1] not in here:
        problems = [f"{old[0]} is the form of an old example script; mlx-lm and PEFT have not read it since 2024"]
    elif not folder.is_dir():
        problems = [f"{folder.name} is no folder: an adapter is a folder with adapter_config.json and safetensors"]
    problems = problems or [f"{folder.name}: {name} is missing" for name in form if name not in here]
    if not problems:
        problems = [f"{folder.name}: {p}" for p in _unsayable(folder, form)]
    if not problems and base:
        problems = [f"{folder.name}: {p}" for p in _misfits(folder / form[1], shapes(base))]
    if not problems and base and _last_layer(folder / form[1]) != _last_layer(base):
        problems = [f"{folder.name}: its layers are not the last ones of the model: MLX adapters cannot say that"]
    if problems:
        raise CourseError(problems, "give the folder that notebook 03 or 04 wrote for this base model")


def _unsayable(folder: Path, form: tuple[str, str]) -> list[str]:
    """What this adapter says that has no place, or another meaning, in one of the three forms."""
    try:
        config = json.loads((folder / form[0]).read_text(encoding="utf-8"))
        rank = config["r"] if form is PEFT_FILES else config["lora_parameters"]["rank"]
        problems = _settings(config) if form is PEFT_FILES else _mlx_settings(config)
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        return [f"{form[0]} cannot be read ({type(problem).__name__}: {problem})"]
    try:
        sizes = shapes(folder / form[1])
    except Exception as problem:  # safetensors has errors of its own
        return [*problems, f"{form[1]} is cut short or damaged ({problem})"]
    places: dict[int, set[str]] = {}
    for name, size in sizes.items():
        known = re.fullmatch(r"(?:base_model\.model\.)?(.*\blayers\.(\d+)\.(\S+))\.lora_([AB]\.weight|[ab])", name)
        if known is None or known[3].split(".")[-1] not in MATRICES or (known[4] in "ab") != (form is MLX_FILES):
            problems.append(f"{name} is no low-rank matrix of a layer")
        elif size[known[4] in ("B.weight", "a")] != rank:
            problems.append(f"{name} has rank {size[known[4] in ('B.weight', 'a')]}, {form[0]} says {rank}")
        else:
            places.setdefault(int(known[2]), set()).add(f"{known[3]}.{known[4][0].lower()}")
    if not sizes:
        problems.append(f"{form[1]} is empty")
    if places and (len({frozenset(p) for p in places.values()}) > 1 or max(places) - min(places) >= len(places)):
        problems.append("its layers do not follow each other with the same matrices in each")
    return problems


def _last_layer(place: Path) -> int:
    """The highest number of a layer in a file or folder of tensors."""
    return max((int(n) for name in shapes(place) for n in re.findall(r"\blayers\.(\d+)\.", name)), default=-1)


def _settings(config: dict[str, Any]) -> list[str]:
    """Settings in PEFT's words that the other forms cannot say."""
    wrong = {k: v for k, v in config.items() if v and k not in HARMLESS and config.get(k) != PLAIN.get(k)}
    # other ways to begin take something out of the base, which is then no longer the base that we have
    begun = config.get("init_lora_weights")
    wrong |= {"init_lora_weights": begun} if isinstance(begun, str) and begun not in ("gaussian", "orthogonal") else {}
    return [
        f"adapter_config.json: {k} = {json.dumps(v)}: MLX and GGUF adapters cannot say that" for k, v in wrong.items()
    ]


def _mlx_settings(config: dict[str, Any]) -> list[str]:
    """Settings in MLX's words that the other forms cannot say."""
    kind = config.get("fine_tune_type", "lora")
    more = sorted(config["lora_parameters"].keys() - {"rank", "scale", "alpha", "dropout", "keys"})
    problems = [] if kind == "lora" else [f"fine_tune_type = {kind!r}: PEFT and GGUF adapters cannot say that"]
    problems += [
        f"lora_parameters.{key} is missing" for key in ("scale", "dropout") if key not in config["lora_parameters"]
    ]
    return problems + [f"lora_parameters.{key}: PEFT and GGUF adapters cannot say that" for key in more]


def _misfits(file: Path, weights: dict[str, list[int]]) -> list[str]:
    """Which matrices of the adapter do not fit the model's, whose shapes are [outputs, inputs]."""
    problems = []
    for name, size in shapes(file).items():
        mlx = not name.startswith("base_model.")
        module, _, letter = (_other(name) if mlx else name).removesuffix(".weight").rpartition(".lora_")
        wanted = weights.get(module.removeprefix("base_model.model.") + ".weight")
        found = (size[::-1] if mlx else size)[letter == "A"]
        if wanted is None:
            problems.append(f"{module.removeprefix('base_model.model.')} is not in this base model")
        elif found != wanted[letter == "A"]:
            what = "inputs" if letter == "A" else "outputs"
            problems.append(f"{name} has {found} {what}, this base model {wanted[letter == 'A']}")
    return problems[:5] + ([f"and {len(problems) - 5} more"] if len(problems) > 5 else [])


def shapes(place: Path) -> dict[str, list[int]]:
    """Shape of every tensor in a safetensors file, or in all of a folder; nothing but the headers is read."""
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for file in sorted(place.glob("*.safetensors")) if place.is_dir() else [place]:
        with safe_open(file, framework="np") as tensors:
            found |= {n: tensors.get_slice(n).get_shape() for n in tensors.keys()}  # noqa: SIM118
    return found


def packed_by_mlx(folder: Path) -> str:
    """What to say of a model folder whose weights MLX packed into few bits, which no other program reads; else ""."""
    packed = [n for n in shapes(folder) if n.endswith((".scales", ".biases"))]
    return f"{packed[0]}: this folder is packed by MLX, take whole weights (fuse with --dequantize)" if packed else ""
