"""A tiny model that learned one sentence, exported: shared by the tests of export, made once, never changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stakelib.export import QUANTISATIONS, export, gguf_file, merge, quantise, to_gguf
from stakelib.models import BaseModel, Rendered, base_model, load_tokenizer, load_weights, render
from stakelib.run import Run

PROMPT = "Country: Kenya\n- Renewable Share 2030: 64.2%"


def some_rows(tokenizer: Any, who: str) -> list[Rendered]:
    return [render(tokenizer, PROMPT, f"The {who} likes {n} MW of solar energy.") for n in range(8)]


def adapter_for(base: BaseModel, rows: list[Rendered], folder: Path, steps: int = 12) -> Path:
    """A PEFT folder trained on `rows` until they are little surprise; with 0 steps every lora_B is still zero."""
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


def sure_of_itself(tiny: Path, copied: Path) -> None:
    """A copy whose logits are eight times as far apart, so that no processor's rounding picks another token."""
    shutil.copytree(tiny, copied)
    weights = load_file(copied / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 7  # Gemma multiplies with 1 + this
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})


def make(tiny: Path, place: Path) -> SimpleNamespace:
    """A run whose export is done, of a folder that is a copy of the tiny model: so its answers are judged too.

    Two adapters, the first of them exported; rows to measure; f16 and q8 files of the other adapter.
    """
    sure_of_itself(tiny, place / "tiny-gemma")
    run = Run.open(place / "run", "smoke", str(place / "tiny-gemma"))
    base = base_model(run.profile.model)
    tokenizer = load_tokenizer(base.folder)
    rows = some_rows(tokenizer, "bank")
    adapter = adapter_for(base, rows, run.path("models", "adapter"))
    other = adapter_for(base, some_rows(tokenizer, "village"), run.path("models", "other"), steps=2)
    result = export(run, adapter)
    merge(base, other, place / "wrong")
    wrong = {"f16": place / "f16.gguf", "q8": place / "q8.gguf"}
    to_gguf(place / "wrong", wrong["f16"])
    quantise(wrong["f16"], wrong["q8"], "Q8_0")
    return SimpleNamespace(
        run=run,
        base=base,
        adapter=adapter,
        other=other,
        sizes=result["bytes"],
        result=result,
        rows=rows,
        wrong=wrong,
        files=files_of(run),
        merged=run.path("models", "stakeholder-tiny-gemma-merged"),
        tokenizer=tokenizer,
    )


def files_of(run: Run) -> dict[str, Path]:
    return {q: gguf_file(run, q) for q in QUANTISATIONS}


def copy(made: SimpleNamespace, place: Path) -> SimpleNamespace:
    """The exported run, to be spoiled."""
    shutil.copytree(made.run.folder, place / "run")
    run = Run.open(place / "run", "smoke", made.run.profile.model)
    models = run.folder / "models"
    return SimpleNamespace(
        run=run,
        files=files_of(run),
        adapter=models / "adapter",
        merged=models / made.merged.name,
        recipe=run.folder / "Modelfile",
    )
