"""An adapter that MLX trained + the weights it was trained on -> the same merged folder, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from stakelib import machine
from stakelib.export.merged import check_folder, copy_texts
from stakelib.models import BaseModel
from stakelib.models.adapters import check_adapter
from stakelib.models.base_folder import no_tokenizer
from stakelib.models.mlx_models import BITS, mlx_folder
from stakelib.run import CourseError, atomic_write_json, writing

SHARD = 8  # tensors held at once, 1.5 GB at most: a merged gemma-2b has 5 GB, an M1 gives its graphics cores 5.3


def trained_in_mlx(adapter: Path) -> str | None:
    """The precision of the base that MLX trained this adapter on; None for one that PEFT trained."""
    file = adapter / "mlx" / "adapter_config.json"
    return json.loads(file.read_text(encoding="utf-8")).get("base_precision") if file.exists() else None


def must_fuse(adapter: Path) -> bool:
    """True where `fuse` makes the merged folder, False where `merge` does: without MLX whole weights are left to it."""
    precision = trained_in_mlx(adapter)
    if machine.mlx()[0] != "none":
        return precision is not None
    if precision in BITS:
        what = f"this adapter was trained by MLX on weights of {BITS[precision]} bits, and {machine.mlx()[1]}"
        raise CourseError(what, "run notebook 05 on the Mac that trained it, then pack the run again")
    return False


def fuse(base: BaseModel, adapter: Path, folder: Path) -> None:
    """Write base + adapter as float16 safetensors, never quantised, with the base's tokenizer files into `folder`.

    The weights are those that MLX trained on, de-quantised; W + scale (A B)^T is made in float32. Raises CourseError
    as `merge` does, and for an adapter of another base.
    """
    import mlx.core as mx

    check_adapter(adapter / "mlx", base.folder)
    if without := no_tokenizer(base.folder):
        raise CourseError(f"{base.folder.name}: {without}", "copy it from the model's page into this folder")
    with writing(folder) as part:
        part.mkdir(parents=True)
        tensors, places = _whole(base, adapter), {}
        while shard := dict(islice(tensors, SHARD)):
            file = f"model-{len(places) // SHARD + 1:05d}.safetensors"
            mx.save_safetensors(str(part / file), shard, {"format": "pt"})
            places |= dict.fromkeys(shard, file)
        atomic_write_json(part / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
        copy_texts(base, part)
        check_folder(part, base)


def _whole(base: BaseModel, adapter: Path) -> Iterator[tuple[str, Any]]:
    """Name and float16 values of each weight, de-quantised, the adapter added, as they are asked for."""
    import mlx.core as mx

    ours = json.loads((adapter / "mlx" / "adapter_config.json").read_text(encoding="utf-8"))
    thin, scale = mx.load(str(adapter / "mlx" / "adapters.safetensors")), ours["lora_parameters"]["scale"]
    if not any(mx.abs(t).sum().item() for n, t in thin.items() if n.endswith("lora_b")):
        raise CourseError(f"{adapter.name}: every lora_B is zero, the merged model would equal its base", "train first")
    source = mlx_folder(base, ours["base_precision"] or "float32")
    packing = json.loads((source / "config.json").read_text(encoding="utf-8")).get("quantization")
    weights = {n: t for f in sorted(source.glob("*.safetensors")) for n, t in mx.load(str(f)).items()}  # not read yet
    for name in [n for n in weights if not n.endswith((".scales", ".biases"))]:
        module, tensor = name.removesuffix(".weight"), weights.pop(name)
        if packing and f"{module}.scales" in weights:
            scales, biases = weights.pop(f"{module}.scales"), weights.pop(f"{module}.biases")
            tensor = mx.dequantize(tensor, scales, biases, packing["group_size"], packing["bits"])
        tensor = tensor.astype(mx.float32)
        if f"{module}.lora_a" in thin:
            tensor = tensor + scale * (thin[f"{module}.lora_a"] @ thin[f"{module}.lora_b"]).T
        tensor = tensor.astype(mx.float16)
        mx.eval(tensor)
        mx.clear_cache()
        yield name, tensor
