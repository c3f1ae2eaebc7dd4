"""What a run needs, before it starts: shapes without weights, memory by formula, precision, checkpointing, refusal."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import FAST, run_with_rows

from stakelib import machine, plots
from stakelib.models import MODELS, BaseModel, Rendered, config_of, load_weights
from stakelib.run import CourseError
from stakelib.training import RECIPES, Recipe, adapter_folder, memory, plan, preflight, train
from stakelib.training.plan import FULL, kept_bytes, need_gb, settle

ROWS = [Rendered(list(range(110, 110 + n)), [0] * (n - 20) + [1] * 20) for n in (40, 60, 90)]
COURSE = replace(RECIPES["course"], precision="float32", checkpointing="off")


@pytest.fixture(autouse=True)
def no_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of a PC on a Mac too, but where a test says otherwise."""
    monkeypatch.setattr(machine, "metal", lambda: (False, "for this test"))


# ------------------------------------------------------------------------------------------------- shapes

PUBLISHED = {
    "gemma-2b": 2_506_172_416,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "gemma-3-270m": 268_098_176,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_number_of_parameters(name: str, home: Path) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config_of(name))
    assert sum(p.numel() for p in built.parameters()) == PUBLISHED[name]
    assert not (home / "cache").exists()  # nothing was fetched for it


def test_every_model_of_the_catalogue_has_a_shape(tiny: BaseModel) -> None:
    kinds = {name: str(config_of(name).dtype) for name in MODELS}
    assert kinds["smollm2-135m"] == "torch.float32"  # unpacked from a package
    assert kinds["gemma-2b-it"] == kinds["gemma-3-270m-it"] == "torch.bfloat16"  # as the hub has it
    assert config_of(str(tiny.folder)).hidden_size == config_of("tiny-gemma").hidden_size == 64


# ------------------------------------------------------------------------------------------------- memory

SMALL = {
    "vocab_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_size": 96,
    "intermediate_size": 256,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def saved_bytes(config: Any, recipe: Recipe, tokens: int, dtype: str) -> int:
    """What autograd really keeps from the forward pass of a row, frozen weights left out."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from stakelib.training.peft_backend import collate, row_loss

    lora = LoraConfig(r=recipe.rank, target_modules=list(recipe.targets), task_type="CAUSAL_LM")
    net = get_peft_model(AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)), lora).train()
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        row_loss(net, collate([Rendered([5] * tokens, [0] * (tokens - 8) + [1] * 8)]))
    return sum(s.nbytes() for s in kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "gemma", "gemma2", "gemma3_text"])
def test_the_formula_counts_what_a_layer_keeps(kind: str, dtype: str) -> None:
    from transformers import AutoConfig

    recipe = replace(COURSE, rank=4)
    more = {"sliding_window": 128} if kind in ("gemma2", "gemma3_text") else {}
    one, two = (AutoConfig.for_model(kind, **{**SMALL, **more, "num_hidden_layers": n}) for n in (1, 2))
    for tokens in (64, 256):
        counted = saved_bytes(two, recipe, tokens, dtype) - saved_bytes(one, recipe, tokens, dtype)
        copies = adapter_copies(one, recipe) if dtype == "bfloat16" else 0
        said = kept_bytes(one, recipe, tokens, 2 if dtype == "bfloat16" else 4)
        assert said + copies == pytest.approx(counted, rel=0.05)
        assert said + copies != pytest.approx(saved_bytes(two, recipe, tokens + 64, dtype), rel=0.05)


def adapter_copies(config: Any, recipe: Recipe) -> int:
    """Bytes of the adapter's bf16 copy in one layer, which the formula counts with the adapter."""
    from stakelib.training import adapter_parameters

    return 2 * adapter_parameters(config, recipe) // config.num_hidden_layers


def test_memory_grows_with_what_it_should_and_shrinks_with_what_it_should() -> None:
    config = config_of("gemma-2b")
    base = memory(config, COURSE, 704, 352)
    peaks = {p: memory(config, replace(COURSE, precision=p, checkpointing="on"), 704, 352) for p in ("int8", "nf4")}
    assert base["weights"] == pytest.approx(4 * 2.506e9 / 2**30, rel=0.01)
    assert memory(config, replace(COURSE, precision="bfloat16"), 704, 352)["weights"] == 0  # stays in the file
    assert memory(config, replace(COURSE, precision="bfloat16"), 704, 352)["mapped"] == pytest.approx(4.67, rel=0.01)
    assert base["weights"] > 2 * peaks["int8"]["weights"] > 2 * peaks["nf4"]["weights"]
    assert base["activations"] > 10 * peaks["nf4"]["activations"]
    assert peaks["int8"]["activations"] > 5 * peaks["nf4"]["activations"]  # bitsandbytes keeps what enters its matrices
    words = base["weights"]
    config.tie_word_embeddings = False  # the output layer is then a matrix of its own
    own = memory(config, COURSE, 704, 352)["weights"] - words
    assert own == pytest.approx(4 * config.vocab_size * config.hidden_size / 2**30)
    config.tie_word_embeddings = True
    assert memory(config, COURSE, 1408, 352)["activations"] == pytest.approx(2 * base["activations"])
    assert memory(config, replace(COURSE, precision=FULL), 704, 352)["learning"] > 25  # GB: gradient and two moments
    half, whole = (memory(config, replace(COURSE, precision="bfloat16", layers=n), 650, 352) for n in (0.5, None))
    assert whole["activations"] == pytest.approx(2 * half["activations"])
    assert whole == memory(config, replace(COURSE, precision="bfloat16", layers=None), 704, 352)  # padded to 64


# ------------------------------------------------------------------------------------------------- what train does


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_checkpointing_runs_the_learning_layers_twice_and_learns_the_same(
    precision: str, tiny: BaseModel, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.gemma.modeling_gemma import GemmaMLP

    calls, forward = [], GemmaMLP.forward
    monkeypatch.setattr(GemmaMLP, "forward", lambda self, x: calls.append(x.requires_grad) or forward(self, x))
    results, counts = {}, {}
    for way in ("off", "on"):
        calls.clear()
        results[way] = train(run_with_rows(home / way), replace(FAST, precision=precision, checkpointing=way))
        counts[way] = len(calls)
    losses = {way: [loss for _, loss in r["valid_loss"]] for way, r in results.items()}
    assert losses["on"] == pytest.approx(losses["off"], abs=1e-5)
    assert counts["on"] == counts["off"] + 16  # for each row the upper of two layers once more; the lower one is frozen
    assert (results["on"]["checkpointing"], results["off"]["checkpointing"]) == ("on", "off")


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_packed_weights_learn_and_still_do_after_a_validation(
    precision: str, tiny: BaseModel, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    plain = train(run_with_rows(home / "plain"), replace(FAST, precision="float32"))
    result = train(run_with_rows(home / precision), replace(FAST, precision=precision))
    assert result["precision"] == precision
    assert f"{precision} weights: chosen in the recipe" in capsys.readouterr().out
    assert result["best_valid_loss"] == pytest.approx(plain["best_valid_loss"], abs=0.1)
    assert result["best_valid_loss"] < plain["valid_loss"][0][1] - 0.1


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_packed_weights_answer_alike_in_both_modes_and_pass_gradients(precision: str, tiny: BaseModel) -> None:
    from peft import LoraConfig, get_peft_model

    from stakelib.training.peft_backend import collate, row_loss

    pytest.importorskip("bitsandbytes")
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    net = get_peft_model(load_weights(tiny.folder, dtype=precision), lora)
    packed = [m for m in net.modules() if type(m).__module__.startswith("bitsandbytes")]
    assert len(packed) == 14
    assert {p.dtype for m in packed for p in m.parameters()} == {torch.int8 if precision == "int8" else torch.uint8}
    net.eval()
    with torch.inference_mode():
        before = row_loss(net, collate(ROWS[:1]))[0].item()
    net.train()
    loss = row_loss(net, collate(ROWS[:1]))[0]
    loss.backward()
    assert loss.item() == pytest.approx(before, rel=1e-6)
    first = net.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.grad
    assert first.abs().max() > 0  # through the packed matrices of the second layer


def test_packed_weights_without_bitsandbytes_say_what_to_do(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a))
    with pytest.raises(CourseError, match="'nf4' needs bitsandbytes(.|\n)*float32"):
        load_weights(tiny.folder, dtype="nf4")


def test_a_run_that_cannot_fit_is_refused_before_a_weight_is_loaded(
    tiny: BaseModel, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stakelib.training import peft_backend

    monkeypatch.setattr(peft_backend, "load_weights", lambda *_, **__: pytest.fail("loaded the weights"))
    here = machine.describe()
    monkeypatch.setattr(machine, "describe", lambda *_: here | {"ram_free_gb": 0.3})
    run = run_with_rows(home / "run")
    with pytest.raises(CourseError, match=r"tiny-gemma in .*: 0\.[4-7] GB needed, 0\.3 GB free(.|\n)*close other"):
        train(run, FAST)
    assert not adapter_folder(run).exists()


PLAN = sys.modules[settle.__module__]


def with_packing(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    """As if bitsandbytes were installed, or not: a Mac has none."""
    monkeypatch.setattr(PLAN, "find_spec", lambda _: object() if there else None)


def test_refusal_names_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Rendered([5] * 700, [0] * 350 + [1] * 350)]
    with_packing(monkeypatch, True)
    with pytest.raises(CourseError, match="9 GB free") as refused:
        settle("gemma-2b-it", replace(COURSE, checkpointing="auto"), rows, 9)
    said = refused.value.next_action
    assert "gemma-2b-it with precision 'int8'" in said and "tiny" not in said
    with_packing(monkeypatch, False)
    with pytest.raises(CourseError) as refused:
        settle("gemma-2b-it", replace(COURSE, checkpointing="auto"), rows, 6)
    found = re.findall(r"(\S+) with precision '(\w+)'", refused.value.next_action)
    sizes = [MODELS[name].parameters_m for name, _ in found]
    assert len(found) > 1 and sizes == sorted(sizes, reverse=True), "the largest first"
    assert {kind for _, kind in found}.isdisjoint({"int8", "nf4"})


# ------------------------------------------------------------------------------------------------- one truth


@pytest.fixture()
def i7(home: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A PC without bf16 and with so much free memory; the hub lets everybody in."""
    from stakelib.models import catalog

    def free(gb: float) -> None:
        monkeypatch.setattr(machine, "describe", lambda *_: {"ram_free_gb": gb, "disk_free_gb": 99.0})

    monkeypatch.setattr(machine, "precision", lambda: ("float32", "for this test"))
    monkeypatch.setattr(catalog, "check_access", lambda model: "main")
    with_packing(monkeypatch, True)
    return free


KNOWN = [name for name in MODELS if name != "tiny-gemma"]
MEMORY_GB = (0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 5.3, 6, 7, 8, 9, 10, 11, 12.4, 14, 16, 32)


def ways_of(recipe: Recipe, kinds: tuple[str, ...]) -> list[Recipe]:
    """Every way that a recipe leaves open."""
    kinds = kinds if recipe.precision == "auto" else (recipe.precision,)
    on_off = ("off", "on") if recipe.checkpointing == "auto" else (recipe.checkpointing,)
    return [replace(recipe, precision=kind, checkpointing=c) for kind in kinds for c in on_off]


@pytest.mark.parametrize("checkpointing", ["auto", "on", "off"])
@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16", "int8", "nf4"])
@pytest.mark.parametrize("place", ["PC, fp32", "PC, bf16", "PC without bitsandbytes", "Mac"])
def test_what_fits_is_taken_and_only_that(
    place: str, precision: str, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every model, memory, precision and back-end: refused where no way fits, and nowhere else."""
    from stakelib.training.mlx_memory import mlx_memory

    fast = "bfloat16" if place == "PC, bf16" else "float32"
    with_packing(monkeypatch, place != "PC without bitsandbytes")
    monkeypatch.setattr(machine, "precision", lambda: (fast, "for this test"))
    monkeypatch.setattr(machine, "metal", lambda: (place == "Mac", "for this test"))
    kinds = {"Mac": ("bfloat16", "nf4"), "PC without bitsandbytes": (fast,)}.get(place, (fast, "int8", "nf4"))
    recipe = replace(RECIPES["course"], precision=precision, checkpointing=checkpointing)
    formula, rows, counted = (mlx_memory if place == "Mac" else memory), [PLAN.LONGEST], {True: 0, False: 0}
    for model in KNOWN:
        least = min(need_gb(model, way, rows, formula) for way in ways_of(recipe, kinds))
        for free_gb in MEMORY_GB:
            counted[least <= free_gb] += 1
            if least > free_gb:
                with pytest.raises(CourseError, match=f"memory: {model}"):
                    PLAN.settle_here(model, recipe, rows, free_gb)
                continue
            way, why, used = PLAN.settle_here(model, recipe, rows, free_gb)
            assert used is formula and need_gb(model, way, rows, formula) <= free_gb and why
            assert way in ways_of(recipe, kinds)
    assert counted[True] > 20 < counted[False]


@pytest.mark.parametrize("packing", [True, False])
def test_the_table_of_notebook_00_and_the_training_agree(packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PLAN, "hours", lambda *_: 1.0)
    monkeypatch.setattr(machine, "precision", lambda: ("float32", "for this test"))
    with_packing(monkeypatch, packing)
    for free_gb in MEMORY_GB:
        table = PLAN.what_fits(RECIPES["course"], [PLAN.LONGEST], free_gb, (), 1, KNOWN)
        fits = table[table.fits & (table.precision != FULL)]
        for model in KNOWN:
            try:
                taken = settle(model, RECIPES["course"], [PLAN.LONGEST], free_gb)[0].precision
            except CourseError:
                taken = None
            kinds = list(fits[fits.model == model].precision)
            assert (taken in kinds) if kinds else taken is None


def test_a_pc_that_can_train_a_model_can_export_it_and_ask_it(i7: Any) -> None:
    """So the table, which speaks of training, says no less than `preflight`."""
    for model in KNOWN:
        nf4 = replace(RECIPES["course"], precision="nf4", checkpointing="on")
        assert max(PLAN.use_gb(config_of(model)).values()) <= need_gb(model, nf4, [PLAN.LONGEST])


def test_the_need_of_an_export_is_what_was_measured(repository: Path) -> None:
    record = json.loads((repository / "benchmarks" / "records" / "export.json").read_text(encoding="utf-8"))
    for line in record:
        measured = max(step["peak_gb"] for step in line["steps"].values())
        said = PLAN.use_gb(config_of(line["shape"]))["export"] - PLAN.PROGRAM_GB[4]
        assert said == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ("free_gb", "precision"), [(16.0, "float32"), (11.0, "int8"), (8.0, "int8"), (6.0, "nf4"), (5.0, "")]
)
def test_preflight_takes_the_precision_that_fits(
    free_gb: float, precision: str, i7: Any, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    i7(free_gb)
    if precision:
        assert preflight("gemma-2b-it", home).name == "gemma-2b-it"
        assert f"trains in {precision}" in capsys.readouterr().out
    else:
        with pytest.raises(CourseError, match=r"gemma-2b-it in nf4(.|\n)*5\.4 GB needed, 5\.0 GB free"):
            preflight("gemma-2b-it", home)


def test_preflight_counts_what_comes_after_the_training(i7: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Mac the graphics cores' share may be there while the converter has no room."""
    monkeypatch.setattr(machine, "metal", lambda: (True, "for this test"))
    monkeypatch.setattr(sys.modules["stakelib.training.mlx_memory"], "limit_gb", lambda: (5.3, "for this test"))
    i7(4.5)
    assert preflight("gemma-2b-it", home).name == "gemma-2b-it"
    i7(2.0)
    with pytest.raises(CourseError) as refused:
        preflight("gemma-2b-it", home)
    assert [p.split()[1] for p in refused.value.problems] == ["export", "answering"]


@pytest.mark.parametrize(("free_gb", "wanted"), [(64.0, 8), (7.0, 8), (4.5, 3), (1.0, 1)])
def test_so_many_prompts_are_answered_at_once_as_memory_bears(free_gb: float, wanted: int, i7: Any) -> None:
    from stakelib.models.answering_memory import answering_gb, prompts_at_once

    i7(free_gb)
    config, file_gb = config_of("gemma-2-2b-it"), 2.6
    assert prompts_at_once(config, file_gb, 4096) == wanted
    assert free_gb < 3.5 or answering_gb(config, file_gb, 4096, wanted) <= free_gb
    assert answering_gb(config, 0, 4096, 8) - answering_gb(config, 0, 4096, 0) == pytest.approx(3.25)  # keys and values


def test_auto_keeps_checkpointing_off_where_the_run_fits() -> None:
    rows = [Rendered([5] * 700, [0] * 350 + [1] * 350)]
    recipe = replace(COURSE, checkpointing="auto")
    off, on = (need_gb("smollm2-135m", replace(COURSE, checkpointing=c), rows) for c in ("off", "on"))
    assert off > on + 0.3
    assert settle("smollm2-135m", recipe, rows, off + 0.01)[0].checkpointing == "off"
    assert settle("smollm2-135m", recipe, rows, off - 0.01)[0].checkpointing == "on"
    with pytest.raises(CourseError, match="checkpointing off"):
        settle("smollm2-135m", COURSE, rows, off - 0.01)


def test_auto_precision_follows_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("float32", "bfloat16"):
        monkeypatch.setattr(machine, "precision", lambda kind=kind: (kind, "for this test"))
        recipe, why = settle("smollm2-135m", Recipe(), ROWS, 16)
        assert (recipe.precision, why) == (kind, "for this test")
        assert settle("smollm2-135m", Recipe(precision="nf4"), ROWS, 16)[0].precision == "nf4"


# ------------------------------------------------------------------------------------------------- plan


def test_the_plan_of_the_tiny_model(tiny: BaseModel) -> None:
    recipe = Recipe(rank=4)
    made = plan("tiny-gemma", recipe, ROWS, {"ram_free_gb": 8.0}, valid=ROWS[:1], models=("tiny-gemma",))
    assert made.recipe.precision == machine.precision()[0]
    assert 0.4 < made.peak_gb < 0.6
    assert 0 < made.hours < 0.1
    assert list(made.table.precision)[-1] == FULL
    assert made.table.fits.all()
    assert made.table.hours.notna().tolist() == [True] * (len(made.table) - 1) + [False]
    assert made.choice["model"] == "tiny-gemma" and "tiny-gemma in" in made.advice
    twice = plan("tiny-gemma", recipe, ROWS * 2, {"ram_free_gb": 8.0}, valid=ROWS[:1] * 2, models=("tiny-gemma",))
    assert twice.hours == pytest.approx(2 * made.hours)  # the probe of these shapes is kept


def test_a_plan_says_when_no_model_fits(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["stakelib.training.plan"], "hours", lambda *_: 11.0)
    made = plan("tiny-gemma", Recipe(), ROWS, {"ram_free_gb": 2.0}, models=("tiny-gemma", "gemma-2b-it"))
    assert made.choice == {}
    assert made.table[made.table.model == "gemma-2b-it"].fits.tolist().count(True) == 0
    assert "nothing" in made.advice


def test_probes_leave_the_random_numbers_of_a_training_alone(tiny: BaseModel) -> None:
    from stakelib.training.plan import _probe

    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    machine.matmul_gflops("float32", 64, 0.01)
    _probe("tiny-gemma", replace(COURSE, rank=2, checkpointing="on"), 64, 8)
    assert torch.equal(torch.rand(4), wanted)


def test_on_a_mac_the_plan_is_that_of_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 GB of memory free on an M1 of 8 GB, where PEFT could not hold gemma-2b-it and MLX can."""
    from stakelib.training.mlx_memory import M1_LIMIT_GB, mlx_memory

    rows = [Rendered([5] * 700, [0] * 350 + [1] * 350)]
    with pytest.raises(CourseError, match="2.0 GB free"):
        plan("gemma-2b-it", RECIPES["course"], rows, {"ram_free_gb": 2.0}, models=("gemma-2b-it",))
    monkeypatch.setattr(machine, "metal", lambda: (True, "for this test"))
    limit = (M1_LIMIT_GB, "what this Mac gives its graphics cores")
    monkeypatch.setattr(sys.modules["stakelib.training.mlx_memory"], "limit_gb", lambda: limit)
    monkeypatch.setattr(sys.modules["stakelib.training.plan"], "_probe", lambda *_: pytest.fail("PyTorch was timed"))
    names = ("smollm2-135m", "gemma-2b-it")
    made = plan("gemma-2b-it", RECIPES["course"], rows, models=names)
    assert (made.recipe.precision, made.recipe.checkpointing) == ("nf4", "on") and "of 5.3 GB" in made.why
    assert made.peak_gb == pytest.approx(sum(mlx_memory(config_of("gemma-2b-it"), made.recipe, 700, 350).values()))
    assert made.peak_gb <= M1_LIMIT_GB and made.parts_gb["mapped"] == 0 and math.isnan(made.hours)
    assert made.table.precision.tolist() == ["bfloat16", "int8", "nf4"] * 2 and made.table.hours.isna().all()
    assert made.table.fits.tolist() == [True] * 3 + [False, True, True]
    assert made.advice.startswith("gemma-2b-it in nf4: the largest that fits into 5.3 GB here; how long")
    plots.fits(made.table, M1_LIMIT_GB)
    small = plan("smollm2-135m", replace(RECIPES["course"], checkpointing="off"), rows, models=names)
    assert small.recipe.checkpointing == "off" and small.advice.startswith("gemma-2b-it in nf4")
    with pytest.raises(CourseError, match="but 2.0 GB is all"):
        plan("gemma-2b-it", RECIPES["course"], rows, {"ram_free_gb": 2.0}, models=names)
