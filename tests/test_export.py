"""From adapter to shipped files: every hop does what it says, and a hop that does not is caught."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from stakelib.export import QUANTISATIONS, check_folder, export, gguf_file, merge, modelfile, quantise, to_gguf
from stakelib.export.merged import TOKENIZER_FILES
from stakelib.models import BaseModel, Rendered, base_model, load_tokenizer, load_weights, nll, render, template
from stakelib.run import CourseError, Run, sha256

PROMPT = "Country: Kenya\n- Renewable Share 2030: 64.2%"


def some_rows(tokenizer: Any, who: str) -> list[Rendered]:
    return [render(tokenizer, PROMPT, f"The {who} likes {n} MW of solar energy.") for n in range(8)]


def adapter_for(base: BaseModel, rows: list[Rendered], folder: Path, steps: int = 12) -> Path:
    """A PEFT folder trained on `rows` until they are no surprise; with 0 steps every lora_B is still zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    model = get_peft_model(load_weights(base.folder, dtype="float32"), lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for row in rows * steps:
        labels = torch.tensor([[i if m else -100 for i, m in zip(row.ids, row.mask, strict=True)]])
        model(input_ids=torch.tensor([row.ids]), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def logits(source: Path, ids: list[int], adapter: Path | None = None) -> torch.Tensor:
    model = load_weights(source, adapter, dtype="float32")
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids])).logits[0]


@pytest.fixture(scope="module")
def made(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A run whose export is done: two adapters, the first of them exported; rows to measure. Nobody changes it."""
    place = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAKE_CACHE", str(tiny_cache))
        run, base = Run.open(place / "run", "smoke"), base_model("tiny-gemma")
        tokenizer = load_tokenizer(base.folder)
        rows = some_rows(tokenizer, "bank")
        adapter = adapter_for(base, rows, run.path("models", "adapter"))
        other = adapter_for(base, some_rows(tokenizer, "village"), run.path("models", "other"), steps=2)
        sizes = export(run, adapter)["bytes"]
        files = {q: gguf_file(run, q) for q in QUANTISATIONS}
        merged = run.path("models", "stakeholder-tiny-gemma-merged")
        merge(base, other, place / "wrong")
        wrong = {"f16": place / "f16.gguf", "q8": place / "q8.gguf"}  # of the other adapter
        to_gguf(place / "wrong", wrong["f16"])
        quantise(wrong["f16"], wrong["q8"], "Q8_0")
        yield SimpleNamespace(
            run=run, base=base, adapter=adapter, other=other, sizes=sizes, rows=rows, files=files, merged=merged,
            tokenizer=tokenizer, wrong=wrong,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------- merge


def test_the_merged_model_speaks_as_base_and_adapter_do(made: SimpleNamespace) -> None:
    ids = made.rows[0].ids
    merged, together = logits(made.merged, ids), logits(made.base.folder, ids, made.adapter)
    assert (merged - together).abs().max() < 2e-3  # float16 rounding of the weights
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
}  # fmt: skip


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


# ------------------------------------------------------------------------------------------------- Modelfile


SYSTEM = "{{ if .System }}{{ .System }}\n\n{{ end }}"


def ollama_renders(text: str, prompt: str) -> str:
    """What Ollama makes of a prompt without a system message, before llama.cpp puts its BOS in front."""
    (wrapped,) = re.findall(r'^TEMPLATE """(.*?)"""$', text, re.MULTILINE | re.DOTALL)
    assert wrapped.count(SYSTEM) == 1 and wrapped.count("{{ .Prompt }}") == 1
    return wrapped.replace(SYSTEM, "").replace("{{ .Prompt }}", prompt)


def test_the_modelfile_wraps_a_prompt_as_training_did(made: SimpleNamespace) -> None:
    text = (made.run.folder / "Modelfile").read_text(encoding="utf-8")
    turns = [{"role": "user", "content": PROMPT}]
    trained = made.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert "<bos>" + ollama_renders(text, PROMPT) == trained
    assert ollama_renders(text, PROMPT).count("<bos>") == 0
    assert made.tokenizer(trained, add_special_tokens=False).input_ids == render(made.tokenizer, PROMPT).ids


def test_the_modelfile_stops_and_points_to_the_file_beside_it(made: SimpleNamespace) -> None:
    lines = (made.run.folder / "Modelfile").read_text(encoding="utf-8").splitlines()
    (source,) = [line.split(" ", 1)[1] for line in lines if line.startswith("FROM ")]
    assert source == "./models/stakeholder-tiny-gemma-q8.gguf"
    assert (made.run.folder / source).resolve() == made.files["q8"].resolve()
    assert f'PARAMETER stop "{template(made.tokenizer).end}"' in lines
    assert {"PARAMETER num_ctx 2048", "PARAMETER num_predict 400"} <= set(lines)
    assert not any(re.match(r"\s*(ADAPTER|SYSTEM)\b", line) for line in lines)


def test_a_chatml_template_keeps_its_own_first_token(made: SimpleNamespace, tmp_path: Path) -> None:
    """SmolLM2's BOS is the sign that opens every turn: it belongs to the template and must stay."""
    tokenizer = load_tokenizer(made.base.folder)
    tokenizer.bos_token = "<start_of_turn>"
    tokenizer.chat_template = (
        "<start_of_turn>system\nYou help.<end_of_turn>\n{% for m in messages %}<start_of_turn>{{ m['role'] }}\n"
        "{{ m['content'] }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
    )
    (tmp_path / "models").mkdir()
    text = modelfile(tokenizer, tmp_path / "models" / "x.gguf", tmp_path / "Modelfile")
    turns = [{"role": "user", "content": PROMPT}]
    assert ollama_renders(text, PROMPT) == tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )
