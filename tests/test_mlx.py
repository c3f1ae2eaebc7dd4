"""Training with MLX means the same as with PEFT: rows, parameters, logits, losses, and both forms of an adapter.

On Linux MLX runs on the processor and is slow, so all models here are tiny; the same tests run on a Mac.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from test_training import FAST, furthest, run_with_rows, some_rows, write_rows
from toy_models import shaped_model

from stakelib import machine
from stakelib.models import BaseModel, Rendered, base_model, load_tokenizer, load_weights, nll, render
from stakelib.models.adapters import check_adapter, shapes, to_mlx, to_peft
from stakelib.models.mlx_models import mlx_folder
from stakelib.run import CourseError, Run
from stakelib.training import RECIPES, Recipe, adapter_parameters, train

KINDS = ("gemma", "gemma2", "gemma3_text", "llama")
HAS_MLX = machine.mlx()[0] != "none"
needs_mlx = pytest.mark.skipif(not HAS_MLX, reason=machine.mlx()[1])
PRECISE = replace(FAST, precision="float32", checkpointing="off")


def test_mlx_is_here_where_its_packages_are_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or every test below would be skipped and nobody would know."""
    if os.environ.get("CI") and sys.platform == "linux" and platform.machine() == "x86_64":
        assert HAS_MLX, machine.mlx()[1]
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    kind, why = machine.mlx()
    assert kind == "none" and "MLX is not installed" in why and platform.system() in why


@pytest.fixture(scope="module")
def families(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseModel]:
    """A small model of every family on the list, by its name."""
    place, tiny = tmp_path_factory.mktemp("families"), tiny_cache / "models" / "tiny-gemma"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAKE_CACHE", str(tiny_cache))
        return {kind: base_model(str(shaped_model(tiny, place / kind, kind))) for kind in KINDS}


@pytest.fixture()
def cache(tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAKE_CACHE", str(tiny_cache))


def config_of(base: BaseModel) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base.folder)


def random_adapter(base: BaseModel, folder: Path, recipe: Recipe = PRECISE, spread: float = 0.05) -> Path:
    """A PEFT adapter whose A and B are both random, so that it moves the model (a fresh one has B = 0)."""
    from peft import get_peft_model

    from stakelib.training.peft_backend import lora_config

    torch.manual_seed(3)
    model = get_peft_model(load_weights(base.folder, dtype="float32"), lora_config(recipe, config_of(base)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=spread * (4 if "lora_A" in name else 1))
    model.save_pretrained(folder)
    return folder


def torch_logits(base: BaseModel, ids: list[int], adapter: Path | None = None) -> numpy.ndarray:
    with torch.inference_mode():
        return load_weights(base.folder, adapter, dtype="float32")(input_ids=torch.tensor([ids])).logits[0].numpy()


def mlx_logits(base: BaseModel, ids: list[int], adapter: Path | None = None) -> numpy.ndarray:
    import mlx.core as mx

    from stakelib.models.mlx_models import load_mlx

    return numpy.array(load_mlx(mlx_folder(base, "float32"), adapter)(mx.array([ids]))[0])


# ------------------------------------------------------------------------------------------------- the same adapter


@needs_mlx
@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_adapter_gives_the_same_logits(kind: str, families: Any, cache: None, tmp_path: Path) -> None:
    base, ids = families[kind], list(range(110, 150))
    adapter = random_adapter(base, tmp_path / "adapter")
    plain, tuned = torch_logits(base, ids), torch_logits(base, ids, adapter)
    assert abs(mlx_logits(base, ids) - plain).max() < 1e-3
    assert abs(mlx_logits(base, ids, to_mlx(adapter)) - tuned).max() < 1e-3
    assert abs(tuned - plain).max() > 0.1  # the adapter is no bystander
    back = to_peft(adapter / "mlx", tmp_path / "back")
    assert furthest(load(adapter), load(back)) == 0
    assert abs(torch_logits(base, ids, back) - tuned).max() < 1e-5
    file = adapter / "mlx" / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["lora_parameters"]["scale"] *= 2  # the twin: another alpha
    file.write_text(json.dumps(config), encoding="utf-8")
    assert abs(mlx_logits(base, ids, adapter / "mlx") - tuned).max() > 0.1


def load(adapter: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(adapter / "adapter_model.safetensors")


@needs_mlx
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_as_many_numbers_learn_as_in_peft(kind: str, recipe: Recipe, families: Any, cache: None) -> None:
    from mlx.utils import tree_flatten

    from stakelib.models.mlx_models import load_mlx
    from stakelib.training.mlx_backend import with_lora

    base = families[kind]
    model = with_lora(load_mlx(mlx_folder(base, "float32")), recipe)
    learning = dict(tree_flatten(model.trainable_parameters()))
    assert sum(t.size for t in learning.values()) == adapter_parameters(config_of(base), recipe)
    assert {n.rpartition(".")[2] for n in learning} == {"lora_a", "lora_b"}
    layers = {int(n.split(".")[2]) for n in learning}
    assert layers == (set(range(4)) if recipe.name != "course" else {2, 3})


@needs_mlx
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_packed_base_is_smaller_and_nearly_the_same(precision: str, families: Any, cache: None) -> None:
    import mlx.core as mx

    from stakelib.models.mlx_models import load_mlx

    base, ids = families["llama"], list(range(110, 150))
    folder, whole = mlx_folder(base, precision), mlx_folder(base, "float32")
    size = {f: sum(p.stat().st_size for p in f.glob("*.safetensors")) for f in (folder, whole)}
    assert size[folder] < size[whole] * {"int8": 0.3, "nf4": 0.18}[precision]
    far = abs(numpy.array(load_mlx(folder)(mx.array([ids]))[0].astype(mx.float32)) - mlx_logits(base, ids))
    spread = mlx_logits(base, ids).std()
    assert 0 < far.mean() < {"int8": 0.05, "nf4": 0.5}[precision] * spread


# ------------------------------------------------------------------------------------------------- the same loss


@needs_mlx
def test_both_back_ends_are_given_the_same_ids_and_learn_the_same_places(tokenizer: Any) -> None:
    from stakelib.training.mlx_backend import batch_of
    from stakelib.training.peft_backend import collate

    for row in (render(tokenizer, r["prompt"], r["completion"]) for r in some_rows(4)):
        theirs, (ids, places, wanted, weights) = collate([row]), batch_of(row, sum(row.mask), 1, 64)
        assert ids.tolist() == theirs["input_ids"].tolist()
        learned = (theirs["labels"][0] != -100).nonzero()[:, 0].tolist()
        count = int((weights > 0).sum().item())
        assert [p + 1 for p in places.tolist()[:count]] == learned
        assert wanted.tolist()[:count] == theirs["labels"][0][learned].tolist()
        assert weights.tolist() == pytest.approx([1 / count] * count + [0] * (-count % 64))


@needs_mlx
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_row_is_that_of_torch(kind: str, families: Any, cache: None) -> None:
    from stakelib.models.mlx_models import load_mlx, mlx_nll
    from stakelib.training.mlx_backend import batch_of, row_loss

    base = families[kind]
    tokenizer = load_tokenizer(base.folder)
    rows = [render(tokenizer, r["prompt"], r["completion"]) for r in some_rows(3)]
    assert mlx_nll(mlx_folder(base, "float32"), rows) == pytest.approx(nll(base.folder, rows), abs=1e-4)
    total, count = row_loss(load_mlx(mlx_folder(base, "float32")), *batch_of(rows[0], sum(rows[0].mask), 1, 64))
    assert (total.item(), count.item()) == (pytest.approx(nll(base.folder, rows[:1]), abs=1e-4), sum(rows[0].mask))
    other = Rendered(rows[0].ids[:-1] + [151], rows[0].mask)
    assert nll(base.folder, [other]) != pytest.approx(total.item(), abs=1e-3)


@needs_mlx
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_is_that_of_transformers_at_every_step(schedule: str) -> None:
    import mlx.core as mx
    from transformers import get_scheduler

    from stakelib.training.mlx_backend import rate

    recipe = Recipe(schedule=schedule, warmup=0.1, learning_rate=3e-3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    theirs, ours = get_scheduler(schedule, optimizer, 2, 20), rate(recipe, 20)
    for step in range(20):
        mine = ours if isinstance(ours, float) else float(ours(mx.array(step)))
        assert mine == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9), step
        optimizer.step()
        theirs.step()


# 20 steps of two rows, each logged, that learn three sentences by heart
CURVE = replace(
    PRECISE,
    name="curve",
    rank=8,
    alpha=16,
    layers=None,
    learning_rate=0.01,
    accumulate=2,
    warmup=0.1,
    validate_per_epoch=20,
    patience=99,
)


def loss_curve(run: Run, recipe: Recipe, backend: str, start: Path) -> list[float]:
    """Training loss of each step, from the adapter in folder `start`, put where a first checkpoint would lie."""
    from stakelib.training import mlx_run, peft_backend

    with pytest.MonkeyPatch.context() as patch:
        if backend == "peft":
            made = peft_backend.get_peft_model

            def begin(model: Any, config: Any) -> Any:
                model = made(model, config)
                model.load_adapter(start, "default")
                for name, weight in model.named_parameters():
                    weight.requires_grad_("lora_" in name)
                return model

            patch.setattr(peft_backend, "get_peft_model", begin)
        else:
            follow = mlx_run._follow

            def begin(job: Path, steps: int) -> Any:
                from stakelib.run import atomic_write_json, sha256

                first = job.parent / "checkpoint-0"
                shutil.copytree(start / "mlx", first)
                atomic_write_json(first / "state.json", {"step": 0, "history": [], "best": None})
                atomic_write_json(first / "complete.json", {f.name: sha256(f) for f in first.iterdir()})
                return follow(job, steps)

            patch.setattr(mlx_run, "_follow", begin)
        result = train(run, recipe, backend=backend)
    assert [step for step, _ in result["train_loss"]] == list(range(1, 21))
    return [loss for _, loss in result["train_loss"]]


@needs_mlx
@pytest.mark.parametrize("kind", ["gemma", "llama"])
def test_both_back_ends_walk_down_the_same_curve(kind: str, families: Any, cache: None, tmp_path: Path) -> None:
    base = families[kind]
    start = random_adapter(base, tmp_path / "start", CURVE, spread=0.02)
    to_mlx(start)

    def curve(name: str, backend: str, recipe: Recipe = CURVE) -> numpy.ndarray:
        run = Run.open(tmp_path / name, "smoke", str(base.folder))
        write_rows(run, "train", (some_rows(3) * 14)[:39])  # an odd number: the last step has one row
        write_rows(run, "valid", some_rows(2))
        return numpy.array(loss_curve(run, recipe, backend, start))

    torch_way, mlx_way = curve("peft", "peft"), curve("mlx", "mlx")
    assert torch_way[-1] < 0.7 * torch_way[0]
    assert abs(mlx_way / torch_way - 1).max() < 0.01
    other = curve("other", "mlx", replace(CURVE, alpha=2 * CURVE.alpha))  # the twin
    assert abs(other / torch_way - 1).max() > 0.01


# ------------------------------------------------------------------------------------------------- what cannot be used


def test_an_adapter_that_is_none_is_refused_with_one_clear_sentence(families: Any, tmp_path: Path, cache: None) -> None:
    base = families["gemma"]
    good = random_adapter(base, tmp_path / "good")
    assert check_adapter(good, base.folder) is None
    assert check_adapter(to_mlx(good), base.folder) is None
    old = tmp_path / "old"
    old.mkdir()
    (old / "adapters.npz").write_bytes(b"x")
    for broken in (old, old / "adapters.npz"):
        with pytest.raises(CourseError, match="adapters.npz is the form of an old example script") as problem:
            check_adapter(broken)
        assert len(problem.value.problems) == 1
    half = tmp_path / "half"
    shutil.copytree(good, half)
    (half / "adapter_config.json").unlink()
    with pytest.raises(CourseError, match=r"half: adapter_config\.json is missing\n.*notebook 03 or 04"):
        to_mlx(half)
    with pytest.raises(CourseError, match="models is no folder: an adapter is a folder"):
        check_adapter(tmp_path / "models")


def test_an_adapter_of_another_base_is_named_matrix_by_matrix(families: Any, tmp_path: Path) -> None:
    adapter = random_adapter(families["gemma"], tmp_path / "adapter")
    for form in (adapter, to_mlx(adapter)):
        with pytest.raises(CourseError) as problem:
            check_adapter(form, families["llama"].folder)
        said = problem.value.problems
        # Llama's heads are half as wide: queries, keys and values have other outputs, the attention other inputs
        assert len(said) == 6 and said[-1].endswith("and 3 more")
        assert "has 128 inputs, this base model 64" in "".join(said)
        assert check_adapter(form, families["gemma2"].folder) is None  # the twin: the same sizes


# Kinds of LoRA that people share. Beside each, whether PEFT itself makes another adapter of it.
FOREIGN: dict[str, dict[str, Any]] = {
    "use_rslora": {"use_rslora": True},
    "use_dora": {"use_dora": True},
    "rank_pattern": {"rank_pattern": {"layers.3.mlp.up_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"layers.3.mlp.up_proj": 99}},
    "modules_to_save": {"modules_to_save": ["embed_tokens"]},
    "bias": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "task_type": {"task_type": "SEQ_CLS"},
    "trainable_token_indices": {"trainable_token_indices": {"embed_tokens": [5]}},
    "exclude_modules": {"exclude_modules": ["layers.3.mlp.up_proj"]},
    "layers_pattern": {"layers_pattern": "blocks"},
    "layer_replication": {"layer_replication": [[0, 4], [2, 4]]},
    "target_parameters": {"target_parameters": ["mlp.up_proj.weight"]},
    "peft_type": {"peft_type": "LOHA"},
    "init_lora_weights": {"init_lora_weights": "pissa"},
    "a_setting_of_next_year": {"a_setting_of_next_year": {"on": 1}},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_kind_of_lora_that_one_form_cannot_say_is_refused_by_name(
    name: str, families: Any, cache: None, tmp_path: Path
) -> None:
    from stakelib.export import merge
    from stakelib.export.adapter_files import adapter_to_gguf

    base = families["llama"]
    adapter = random_adapter(base, tmp_path / "adapter")
    check_adapter(adapter, base.folder)
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | FOREIGN[name]), encoding="utf-8")
    for use in (
        lambda: check_adapter(adapter),
        lambda: to_mlx(adapter),
        lambda: merge(base, adapter, tmp_path / "merged"),
        lambda: adapter_to_gguf(adapter, tmp_path / "no.gguf", tmp_path / "adapter.gguf"),
    ):
        with pytest.raises(CourseError, match=f"adapter: adapter_config.json: {name} = "):
            use()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"] and not (adapter / "mlx").exists()


def test_an_adapter_with_odd_tensors_is_refused(families: Any, cache: None, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = families["llama"]
    good = random_adapter(base, tmp_path / "good")
    first = "base_model.model.model.layers.3.mlp.up_proj.lora_"

    def odd(name: str, change: Any) -> Path:
        folder = shutil.copytree(good, tmp_path / name)
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder

    for name, change, words in (
        (
            "embeddings",
            lambda t: t.update({"base_model.model.model.embed_tokens.lora_A.weight": torch.ones(4, 9)}),
            "no low-rank",
        ),
        ("magnitudes", lambda t: t.update({first + "magnitude_vector": torch.ones(9)}), "no low-rank matrix"),
        ("rank", lambda t: t.update({first + "A.weight": torch.ones(3, 64)}), "has rank 3, adapter_config.json says 4"),
        ("half", lambda t: t.pop(first + "B.weight"), "same matrices"),
        ("nothing", lambda t: t.clear(), "is empty"),
    ):
        with pytest.raises(CourseError, match=words):
            check_adapter(odd(name, change))
    cut = odd("cut", lambda t: None) / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(CourseError, match="cut short"):
        check_adapter(cut.parent)

    def lower(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("layers.3", "layers.1").replace("layers.2", "layers.0")] = tensors.pop(key)

    folder = odd("lower", lower)
    check_adapter(folder)
    with pytest.raises(CourseError, match="not the last ones"):
        check_adapter(folder, base.folder)


def untied(base: BaseModel, folder: Path) -> BaseModel:
    """The same model whose output layer is a matrix of its own."""
    shutil.copytree(base.folder, folder)
    model = load_weights(base.folder, dtype="float32")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.5)
    model.save_pretrained(folder)
    return base_model(str(folder))


@pytest.mark.parametrize("kind", [*KINDS, "untied"])
def test_merged_tensor_by_tensor_the_model_is_pefts_own_merge(
    kind: str, families: Any, cache: None, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    from stakelib.export import merge

    base = untied(families["llama"], tmp_path / "untied") if kind == "untied" else families[kind]
    adapter = random_adapter(base, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "merged")
    whole = load_weights(base.folder, adapter, dtype="float32").merge_and_unload().to(torch.float16)
    whole.save_pretrained(tmp_path / "pefts")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "pefts"))
    assert ours.keys() == theirs.keys() and ("lm_head.weight" in ours) == (kind == "untied")
    assert max((ours[n].float() - theirs[n].float()).abs().max().item() for n in ours) < 1e-3
    plain = load_file(base.folder / "model.safetensors")
    assert any((ours[n].float() - plain[n].float()).abs().max() > 0.01 for n in ours)  # the twin: it is not the base


@needs_mlx
def test_a_wrong_back_end_a_missing_file_and_a_machine_without_mlx(
    tiny: BaseModel, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.open(home / "run", "smoke")
    with pytest.raises(CourseError, match=r"training_data/train\.jsonl is missing(.|\n)*run the notebook before"):
        train(run, PRECISE, backend="mlx")
    with pytest.raises(CourseError, match="back-end 'metal' is unknown"):
        train(run, PRECISE, backend="metal")
    monkeypatch.setattr(machine, "mlx", lambda: ("none", "MLX is not installed"))
    with pytest.raises(CourseError, match="MLX is not installed(.|\n)*backend='peft'"):
        train(run_with_rows(home / "here"), PRECISE, backend="mlx")


def test_the_shapes_of_a_folder_are_read_from_headers(families: Any) -> None:
    found = shapes(families["llama"].folder)
    assert found["model.layers.0.mlp.down_proj.weight"] == [64, 128]
    assert len(found) > 4 * 7
