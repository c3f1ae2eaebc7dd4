"""PEFT adapter -> GGUF adapter: a few megabytes that llama.cpp lays over a quantised base, chosen by each request."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from stakelib.export import ensure_base_gguf
from stakelib.models import base_model
from stakelib.models.adapters import PEFT_FILES, check_adapter
from stakelib.run import CourseError, Run, sha256, writing
from stakelib.training import adapter_folder
from stakelib.training.nine import PLACES, voice_adapters, voice_run
from stakelib.voices import STAKEHOLDERS

ALL = "all"  # the name of the one adapter for all nine, beside the stakeholder ids


def export_nine(run: Run, start: str = "base") -> dict[str, Path]:
    """The nine adapters, and first the one for all, as GGUF adapters for the base's q8 file; skipped if unchanged.

    Returns name (ALL or a stakeholder id) -> file; a file is called after the model that the endpoint serves,
    voices/stakeholder-<base>-finance.gguf. The record keeps bytes, training seconds and peak memory of each. What MLX
    trained on packed weights is laid over the same file, whose 8 bits are a little nearer to the whole ones.
    """
    adapters, files = {ALL: adapter_folder(run), **voice_adapters(run, start)}, _files(run, start)
    gguf = ensure_base_gguf(base_model(run.profile.model))["q8"]

    def work() -> dict[str, Any]:
        for who, adapter in adapters.items():
            adapter_to_gguf(adapter, gguf, files[who])
        told = {who: (run if who == ALL else voice_run(run, who, start)).record["stages"]["train"] for who in adapters}
        return {
            "bytes": {who: file.stat().st_size for who, file in files.items()},
            **{k: {who: about[k] for who, about in told.items()} for k in ("seconds", "peak_mb")},
        }

    run.stage(PLACES[start], {"kind": "Q8_0"}, [*adapters.values(), gguf], list(files.values()), work)
    return files


def nine_files(run: Run, start: str = "base") -> dict[str, Path]:
    """What `export_nine` wrote, by the same names.

    Raises CourseError listing each file that is missing, changed, or of an adapter that was trained anew since.
    """
    files, problems = _files(run, start), []
    for who, file in files.items():
        adapter = adapter_folder(run if who == ALL else voice_run(run, who, start))
        if not file.exists():
            problems.append(f"{file.name} is missing")
        elif run.recorded(PLACES[start], file) != sha256(file):
            problems.append(f"{file.name} is not the file that export_nine wrote")
        elif not adapter.exists() or run.recorded(PLACES[start], adapter, "inputs") != sha256(adapter):
            problems.append(f"{file.name} is of another adapter than {adapter.name} as it is now")
    if problems:
        raise CourseError(problems, "run export_nine(run), as in notebook 07")
    return files


def _files(run: Run, start: str) -> dict[str, Path]:
    return {who: run.path(PLACES[start], f"{served_name(run, who)}.gguf") for who in (ALL, *STAKEHOLDERS)}


def served_name(run: Run, who: str = ALL) -> str:
    """The name under which an adapter answers at the endpoint: stakeholder-<base>-finance, without an id for all."""
    name = f"stakeholder-{base_model(run.profile.model).short_name}"
    return name if who == ALL else f"{name}-{who}"


def adapter_to_gguf(adapter: Path, base: Path, target: Path, kind: str | None = "Q8_0") -> None:
    """Write the PEFT adapter in folder `adapter` as a GGUF adapter for the GGUF file `base`, whatever its quantisation.

    `kind`: "Q8_0" halves the file, in blocks of 32 numbers (a matrix whose rows are no multiple of it stays float16);
    None keeps float32. Raises CourseError listing the matrices that this architecture has no name for.
    """
    import gguf
    from safetensors.numpy import load_file

    check_adapter(adapter)
    header = gguf.GGUFReader(base)
    name = header.get_field("general.architecture").contents()
    heads = [header.get_field(f"{name}.attention.{k}").contents() for k in ("head_count", "head_count_kv")]
    known = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[name], header.get_field(f"{name}.block_count").contents())
    config = json.loads((adapter / PEFT_FILES[0]).read_text(encoding="utf-8"))
    parts = {
        tuple(re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", n).groups()): t
        for n, t in load_file(adapter / PEFT_FILES[1]).items()
    }
    if lost := sorted({module for module, _ in parts if names.get_name(module) is None}):
        raise CourseError(
            [f"{adapter.name}: llama.cpp has no name for {module} in a {name}" for module in lost],
            "merge each adapter into a file of its own: export(voice_run, adapter)",
        )
    with writing(target) as part:
        writer = gguf.GGUFWriter(part, name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, config["lora_alpha"])
        for (module, letter), tensor in parts.items():
            values = tensor.astype("float32")
            if name == "llama" and letter == "B" and module.endswith(("q_proj", "k_proj")):
                values = _turned(values, heads[module.endswith("k_proj")])
            data, stored = _packed(values, kind)
            writer.add_tensor(f"{names.get_name(module)}.weight.lora_{letter.lower()}", data, raw_dtype=stored)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:  # Windows removes no file that is open
            writer.close()


def _turned(rows: Any, heads: int) -> Any:
    """Rows of a query or key matrix in the order in which llama.cpp's Llama turns them (its converter: permute)."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _packed(values: Any, kind: str | None) -> tuple[Any, Any]:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if kind is None:
        return values, None
    if values.shape[1] % 32:
        return values.astype("float16"), None
    return quantize(values, GGMLQuantizationType[kind]), GGMLQuantizationType[kind]
