"""Training on the tiny model: what is refused, what is learned, and that a killed run ends like one that was not."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stakelib import machine
from stakelib.models import BaseModel, Rendered, load_tokenizer, load_weights, nll, render
from stakelib.run import CourseError, Run, sha256
from stakelib.training import RECIPES, Recipe, adapter_folder, adapter_parameters, load_rows, render_rows, train
from stakelib.training.recipe import rate_for
from stakelib.training.rows import checked_rows

# A high rate, so that a few steps on random weights show; 8 steps, a checkpoint every 2
FAST = Recipe(
    name="fast",
    rank=4,
    alpha=8,
    learning_rate=0.02,
    tuned_width=None,
    accumulate=2,
    validate_per_epoch=4,
    max_length=96,
)
VOICES = ("grid operator", "bank", "ministry", "village", "factory", "university", "charity", "agency")


def some_rows(count: int) -> list[dict[str, str]]:
    return [
        {"id": f"r{i}", "prompt": f"Who speaks? {i}", "completion": f"The {VOICES[i % 8]} speaks, {i} times."}
        for i in range(count)
    ]


def write_rows(run: Run, part: str, rows: list[Any]) -> Path:
    file = run.path("training_data", f"{part}.jsonl")
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return file


def run_with_rows(folder: Path, count: int = 16) -> Run:
    run = Run.open(folder, "smoke")
    write_rows(run, "train", some_rows(count))
    write_rows(run, "valid", some_rows(count + 4)[-4:])
    return run


def tensors(run: Run) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(adapter_folder(run) / "adapter_model.safetensors")


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[k].float() - b[k].float()).abs().max().item() for k in a)


@pytest.fixture(scope="module")
def whole(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One uninterrupted training; no test may change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAKE_CACHE", str(tiny_cache))
        run = run_with_rows(tmp_path_factory.mktemp("whole"))
        return SimpleNamespace(run=run, result=train(run, FAST), tensors=tensors(run))


# ------------------------------------------------------------------------------------------------- before training


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("shape", ["tiny", "llama", "gemma 3"])
def test_the_parameter_formula_counts_what_peft_makes(recipe: Recipe, shape: str, tiny: BaseModel) -> None:
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

    from stakelib.training.peft_backend import lora_config

    common = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 18}
    config = {
        "tiny": AutoConfig.from_pretrained(tiny.folder),
        "llama": LlamaConfig(**common, num_attention_heads=6, num_key_value_heads=2),  # no head_dim: 48 / 6
        "gemma 3": Gemma3TextConfig(**common, num_attention_heads=4, num_key_value_heads=1, head_dim=32),
    }[shape]
    model = AutoModelForCausalLM.from_config(config)
    tuned = get_peft_model(model, lora_config(recipe, config))
    counted = tuned.get_nb_trainable_parameters()[0]
    assert adapter_parameters(config, recipe) == counted
    assert adapter_parameters(config, replace(recipe, rank=recipe.rank + 1)) != counted
    learning = {int(n.split("layers.")[1].split(".")[0]) for n, p in tuned.named_parameters() if p.requires_grad}
    every = config.num_hidden_layers
    last = {"course": every // 2, "guide-pc": every, "guide-mlx": min(16, every)}[recipe.name]
    assert learning == set(range(every)[-last:])
    assert adapter_parameters(config, replace(recipe, layers=0.01)) <= counted / last


def test_a_wider_model_bears_a_lower_rate() -> None:
    from transformers import LlamaConfig

    course, guide = RECIPES["course"], RECIPES["guide-pc"]
    assert rate_for(LlamaConfig(hidden_size=576), course) == course.learning_rate
    assert rate_for(LlamaConfig(hidden_size=2048), course) == pytest.approx(0.371 * course.learning_rate, rel=0.01)
    assert rate_for(LlamaConfig(hidden_size=2048), guide) == guide.learning_rate


GOOD = b'{"prompt": "a", "completion": "b"}'
BAD_LINES = {  # every way we know to spoil a line, and what must be said of it
    2: (b'{"id": "r2", "prompt": "a", "completion": " "}', "(row r2): 'completion' is empty, missing or no text"),
    4: (b'{"prompt": "a"}', "'completion' is empty"),
    5: (b'{"completion": "b"}', "'prompt' is empty"),
    6: (b'{"prompt": ["a"], "completion": "b"}', "'prompt' is empty"),
    8: (b"[1, 2]", "not a JSON object"),
    9: (b'{"prompt": "a", "compl', "not a JSON object"),
    11: (b'{"prompt": "\xe9", "completion": "b"}', "not UTF-8 (invalid continuation byte)"),
    12: (b'{"prompt": "\\ud800", "completion": "b"}', "not UTF-8 (surrogates not allowed)"),
    13: (b'{"prompt": "a <end_of_turn> b", "completion": "c"}', "holds <end_of_turn>, a control token of this model"),
    10: (b"[" * 100_000, "not a JSON object"),
    14: (b'{"id": "r14", "prompt": "' + b"energy " * 200 + b'", "completion": "b"}', "tokens, at most 96 allowed"),
}


def bad_file(run: Run, part: str) -> Path:
    lines = [BAD_LINES.get(n, (GOOD, ""))[0] for n in range(1, 16)]
    file = run.path("training_data", f"{part}.jsonl")
    file.write_bytes(codecs.BOM_UTF8 + b"\n".join([*lines[:6], b"", *lines[6:]]))
    return file


def test_bad_rows_of_both_files_are_listed_all_at_once_before_a_weight_is_loaded(
    tiny: BaseModel, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("loaded the weights"))
    run = run_with_rows(home / "run")
    parts = ("train", "valid")
    for part in parts:
        bad_file(run, part)
    with pytest.raises(CourseError, match="mend these lines or run notebook 01") as problem:
        train(run, FAST)
    said = problem.value.problems
    for part in parts:
        own = [p for p in said if p.startswith(f"{part}.jsonl, line ")]
        assert "begins with a byte order mark" in own.pop(0)
        wanted = {n + (n > 6): text for n, (_, text) in BAD_LINES.items()}  # after the blank line 7 one higher
        named = {int(p.split("line ")[1].split(":")[0].split(" ")[0]): p for p in own}
        assert len(own) == len(named) and named.keys() == wanted.keys()
        assert [n for n, text in wanted.items() if text not in named[n]] == []
    assert len(said) == 2 * (len(BAD_LINES) + 1)
    assert not adapter_folder(run).exists()
    with pytest.raises(pytest.fail.Exception, match="loaded the weights"):  # the twin: good rows get that far
        train(run_with_rows(home / "good"), FAST)


def test_a_row_whose_answer_makes_no_token_is_listed(tokenizer: Any, tmp_path: Path) -> None:
    class Deaf:
        """The tiny model's tokenizer, to which "..." is nothing at all."""

        def __call__(self, text: str, **more: Any) -> Any:
            return SimpleNamespace(input_ids=[]) if text == "..." else tokenizer(text, **more)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    file = tmp_path / "train.jsonl"
    file.write_bytes(GOOD + b"\n" + GOOD.replace(b"b", b"..."))
    with pytest.raises(CourseError) as problem:
        checked_rows(Deaf(), [file], 96)
    assert problem.value.problems == ["train.jsonl, line 2: the completion is empty: nothing to learn"]
    (rows,) = checked_rows(tokenizer, [file], 96)
    assert [r.where for r in rows] == ["train.jsonl, line 1", "train.jsonl, line 2"]
    assert all(r.mask[-1] == 1 and sum(r.mask[: len(r.prompt_ids)]) == 0 for r in rows)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_files_that_hold_no_rows_are_refused(encoding: str, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_bytes(("" if encoding == "utf-16" else "\ufeff").encode(encoding) + GOOD.decode().encode(encoding))
    with pytest.raises(CourseError, match=r"other\.jsonl is UTF-16: save it as UTF-8"):
        load_rows(other)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n", encoding="utf-8")
    with pytest.raises(CourseError, match=r"empty\.jsonl has no rows"):
        load_rows(empty)
    row = json.loads(GOOD.decode().splitlines()[0])
    for text in (json.dumps(row, indent=2), json.dumps([row, row]), json.dumps([row, row], indent=2)):
        empty.write_text(text, encoding="utf-8")
        with pytest.raises(CourseError, match="one object on a line of its own") as caught:
            load_rows(empty)
        assert len(caught.value.problems) == 1


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\u0085", "\x1c", "\x0c"])
def test_a_row_may_hold_any_line_separator_of_unicode(sign: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"a{sign}b", "completion": f"c{sign}d"}] * 2
    file.write_text("\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8", newline="")
    assert load_rows(file) == rows


def test_long_rows_are_named_and_never_cut(tokenizer: Any) -> None:
    rows = [
        {"id": i, "prompt": "a", "completion": "energy " * n} for i, n in (("short", 3), ("long", 50), ("more", 60))
    ]
    lengths = [len(render(tokenizer, r["prompt"], r["completion"]).ids) for r in rows]
    assert [len(r.ids) for r in render_rows(tokenizer, rows, max(lengths))] == lengths
    with pytest.raises(CourseError, match="shorten these rows") as problem:
        render_rows(tokenizer, rows, lengths[1] - 1)
    said = [
        f"row {r}: {n} tokens, at most {lengths[1] - 1} allowed"
        for r, n in zip(("long", "more"), lengths[1:], strict=True)
    ]
    assert problem.value.problems == said


def test_an_unknown_back_end_is_refused(tiny: BaseModel, home: Path) -> None:
    with pytest.raises(CourseError, match="back-end 'cuda' is unknown"):
        train(run_with_rows(home / "run"), FAST, backend="cuda")


# ------------------------------------------------------------------------------------------------- loss


@pytest.fixture(scope="module")
def rendered(tokenizer: Any) -> list[Rendered]:
    return [render(tokenizer, r["prompt"], r["completion"]) for r in some_rows(4)]


def test_the_fast_way_in_bf16_gives_the_loss_of_the_plain_way(
    whole: SimpleNamespace, tiny: BaseModel, rendered: list[Rendered]
) -> None:
    from stakelib.training.peft_backend import collate, row_loss

    def mean(model: Any) -> float:
        with torch.inference_mode():
            parts = [row_loss(model, collate([r])) for r in rendered]
        return float(sum(t for t, _ in parts)) / sum(n for _, n in parts)

    adapter = adapter_folder(whole.run)
    plain, half = (load_weights(tiny.folder, adapter, dtype) for dtype in ("float32", "bfloat16"))
    without = load_weights(tiny.folder, dtype="float32")
    assert {p.dtype for n, p in half.named_parameters() if "lora_" in n} == {torch.float32}
    assert half.dtype == torch.bfloat16
    assert mean(half) == pytest.approx(mean(plain), abs=1e-2)
    assert abs(mean(plain) - mean(without)) > 0.1  # the adapter is no bystander
    total, count = row_loss(plain, collate(rendered[:1]))
    row = rendered[0]
    logits = plain(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
    wanted = -sum(logits[i - 1, row.ids[i]] for i, m in enumerate(row.mask) if m)
    assert (float(total), count) == (pytest.approx(float(wanted), abs=1e-3), sum(row.mask))


def test_collate_marks_what_is_not_learned() -> None:
    from stakelib.training.peft_backend import collate

    batch = collate([Rendered([5, 6, 7], [0, 1, 1])])
    assert batch["labels"].tolist() == [[-100, 6, 7, *[-100] * 61]]  # lengths are multiples of 64
    assert batch["input_ids"].tolist()[0][:3] == [5, 6, 7]
    assert collate([Rendered([5] * 64, [1] * 64)])["input_ids"].shape == (1, 64)


def test_the_padding_changes_no_loss(tiny: BaseModel) -> None:
    from peft import LoraConfig, get_peft_model

    from stakelib.models import row_nll
    from stakelib.training.peft_backend import collate, row_loss

    row = Rendered(list(range(110, 150)), [0] * 20 + [1] * 20)
    model = get_peft_model(load_weights(tiny.folder, dtype="float32"), LoraConfig(target_modules=["q_proj"]))
    total, count = row_loss(model, collate([row]))
    assert count == 20
    assert total.item() == pytest.approx(row_nll(model, row), rel=1e-5)
    other = Rendered(row.ids[:-1] + [151], row.mask)
    assert total.item() != pytest.approx(row_nll(model, other), rel=1e-5)


# ------------------------------------------------------------------------------------------------- training


def test_training_lowers_the_loss_and_says_the_truth_about_it(whole: SimpleNamespace, tiny: BaseModel) -> None:
    tokenizer = load_tokenizer(tiny.folder)
    valid = render_rows(tokenizer, load_rows(whole.run.path("training_data", "valid.jsonl")), 96)
    before, after = nll(tiny.folder, valid), nll(tiny.folder, valid, adapter_folder(whole.run))
    assert after < before - 0.2
    assert whole.result["best_valid_loss"] == pytest.approx(after, abs=0.02)  # of the adapter that was saved
    history = whole.result["valid_loss"]
    assert [step for step, _ in history] == [2, 4, 6, 8]
    assert whole.result["best_valid_loss"] == min(loss for _, loss in history)
    learned = render_rows(tokenizer, load_rows(whole.run.path("training_data", "train.jsonl")), 96)
    assert whole.result["learned_tokens"] == sum(sum(r.mask) for r in learned)
    assert whole.result["trainable_parameters"] == sum(t.numel() for t in whole.tensors.values())
    assert (whole.result["rows"], whole.result["valid_rows"], whole.result["resumed_at"]) == (16, 4, 0)


def test_the_adapter_folder_is_complete_and_names_no_machine(whole: SimpleNamespace, tiny: BaseModel) -> None:
    folder = adapter_folder(whole.run)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], set(config["target_modules"])) == (4, 8, set(FAST.targets))
    assert config["base_model_name_or_path"] == tiny.origin
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"validation loss {whole.result['best_valid_loss']:.3f} nats" in card
    assert f"Training loss {whole.result['train_loss'][0][1]:.3f} at first" in card
    here = machine.describe()
    assert "Rules made the rows\n  of that file." in card  # nobody rewrote one
    wanted = ["learning_rate 0.02", sha256(whole.run.path("training_data", "train.jsonl")), tiny.licence]
    wanted += [here["processor"], here["system"], f"torch {metadata.version('torch')}"]
    assert [text for text in wanted if text not in card] == []
    written = "".join(f.read_text(encoding="utf-8") for f in folder.iterdir() if f.suffix in (".json", ".md"))
    assert str(tiny.folder.parents[1]) not in written
    left = [p for p in (whole.run.folder / "training").rglob("*") if p.is_file()]
    assert [(p.suffix, p.stat().st_size) for p in left] == [(".lock", 0)]  # checkpoints are gone


def test_a_second_call_skips_and_a_changed_row_does_not(
    whole: SimpleNamespace, tiny: BaseModel, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(whole.run, FAST) == whole.result
    assert "train: up to date" in capsys.readouterr().out
    run = run_with_rows(home / "run", 4)
    train(run, FAST)
    first = sha256(adapter_folder(run))
    write_rows(run, "train", [*some_rows(3), {"prompt": "x", "completion": "y"}])
    train(run, FAST)
    assert "up to date" not in capsys.readouterr().out
    assert sha256(adapter_folder(run)) != first


def test_trials_leave_the_real_adapter_alone(whole: SimpleNamespace, tiny: BaseModel, home: Path) -> None:
    before = sha256(adapter_folder(whole.run))
    trial = train(whole.run, FAST, rows=4)
    assert (trial["rows"], trial["steps"], trial["valid_rows"]) == (4, 2, 4)
    assert sha256(adapter_folder(whole.run)) == before
    assert (whole.run.folder / "training" / "trials" / "trial-fast-4" / "adapter_model.safetensors").exists()
    run = run_with_rows(home / "run", 4)
    train(run, FAST, rows=2)
    assert not adapter_folder(run).exists()


def test_a_larger_trial_holds_the_rows_of_a_smaller_one(
    tiny: BaseModel, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stakelib.training import peft_backend

    asked: list[list[str]] = []

    def train_peft(*arguments: Any) -> Any:
        asked.append([row.where for row in arguments[3]])
        raise KeyboardInterrupt

    monkeypatch.setattr(peft_backend, "train_peft", train_peft)
    run = run_with_rows(home / "run", 40)
    for recipe, rows in ((FAST, 8), (FAST, 16), (replace(FAST, seed=1), 8), (FAST, None)):
        with pytest.raises(KeyboardInterrupt):
            train(run, recipe, rows=rows)
    few, more, others, every = asked
    assert [len(a) for a in asked] == [8, 16, 8, 40]
    assert few == more[:8] != others
    assert few != every[:8] and set(few) <= set(every)  # the file is sorted by voice: its first rows would be one


def test_the_seed_decides(whole: SimpleNamespace, tiny: BaseModel, home: Path) -> None:
    same, other = (run_with_rows(home / name) for name in ("same", "other"))
    train(same, FAST)
    train(other, replace(FAST, seed=FAST.seed + 1))
    assert furthest(tensors(same), whole.tensors) < 1e-6
    assert furthest(tensors(other), whole.tensors) > 1e-2


def test_a_loss_that_is_no_number_stops_with_what_to_do(tiny: BaseModel, home: Path) -> None:
    run = run_with_rows(home / "run")
    with pytest.raises(CourseError, match="is not a number at step(.|\n)*lower learning_rate"):
        train(run, replace(FAST, learning_rate=1e30, warmup=0.0))
    assert not adapter_folder(run).exists()
    assert "train" not in Run.open(home / "run", "smoke").record["stages"]


# ------------------------------------------------------------------------------------------------- kill and go on

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
from test_training import FAST
from stakelib import machine
from stakelib.run import Run
from stakelib.training import peft_backend, train

machine.precision = lambda: {precision!r}

class Watch(peft_backend.Watch):
    def on_step_end(self, args, state, control, **more):
        if state.global_step == {step}:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().on_step_end(args, state, control, **more)

peft_backend.Watch = Watch
train(Run.open(Path({run!r}), "smoke"), FAST, backend="peft")
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_killed_training_goes_on_and_ends_the_same(
    whole: SimpleNamespace,
    tiny: BaseModel,
    home: Path,
    repository: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = run_with_rows(home / "run")
    path = [str(repository), str(repository / "tests")]
    code = KILLED.format(path=path, step=7, run=str(run.folder), precision=machine.precision())
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: another number of threads adds up in another order
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", env=env)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not adapter_folder(run).exists()
    (kept,) = (run.folder / "training").glob("checkpoints-*")
    assert sorted(c.name for c in kept.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]  # and 6 is the best
    with (kept / "checkpoint-6" / "optimizer.pt").open("r+b") as stream:
        stream.truncate(100)  # as a power cut may leave it
    other = {"float32": "bfloat16", "bfloat16": "float32"}[whole.result["precision"]]
    monkeypatch.setattr(machine, "precision", lambda: (other, "a busy machine measures something else"))
    result = train(Run.open(run.folder, "smoke"), FAST)
    assert result["precision"] == whole.result["precision"]  # it goes on as it began
    assert "going on from checkpoint-4 of 8" in capsys.readouterr().out
    assert result["resumed_at"] == 4
    assert furthest(tensors(run), whole.tensors) < 1e-4
    assert sum(result["valid_loss"], []) == pytest.approx(sum(whole.result["valid_loss"], []), abs=1e-4)
    assert result["best_step"] == whole.result["best_step"]


def test_only_whole_checkpoints_count_and_numbers_are_numbers(tmp_path: Path) -> None:
    from stakelib.training.keep import last_checkpoint

    assert last_checkpoint(tmp_path) is None
    whole = {"adapter_model.safetensors": hashlib.sha256(b"x").hexdigest()}
    marks = {9: whole, 10: whole, 11: {}, 12: None, 13: {"adapter_model.safetensors": "0"}, 14: {"gone.pt": "0"}}
    for step, mark in marks.items():
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"x")
        if mark is not None:
            (folder / "complete.json").write_text(json.dumps(mark), encoding="utf-8")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert sorted(c.name for c in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]


def test_checkpoints_of_other_rows_or_settings_are_not_continued(
    tiny: BaseModel, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stakelib.training import peft_backend

    step_end = peft_backend.Watch.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **more: Any) -> Any:
        if state.global_step == 5:
            raise KeyboardInterrupt
        return step_end(self, args, state, control, **more)

    run = run_with_rows(home / "run")
    with monkeypatch.context() as patch:
        patch.setattr(peft_backend.Watch, "on_step_end", stop)
        with pytest.raises(KeyboardInterrupt):
            train(run, FAST)
        assert "interrupted; started again, it goes on from its last checkpoint" in capsys.readouterr().out
        with pytest.raises(KeyboardInterrupt):
            train(run, replace(FAST, seed=3))
        write_rows(run, "train", some_rows(15))
        with pytest.raises(KeyboardInterrupt):
            train(run, FAST)
    assert "going on from" not in capsys.readouterr().out
    write_rows(run, "train", some_rows(16))
    assert train(run, FAST)["resumed_at"] == 4  # the twin: back to the same rows and settings


def test_a_finished_training_removes_the_checkpoints_of_settings_that_were_given_up(
    tiny: BaseModel, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with_rows(home / "run")
    given_up, trial = "checkpoints-0123456789ab", "checkpoints-trial-fast-4-0123456789ab"
    for name in (given_up, trial, "checkpoints-of-mine"):
        run.path("training", name, "checkpoint-3", "optimizer.pt").write_bytes(b"x" * 1000)

    def there() -> list[str]:
        return sorted(p.name for p in (run.folder / "training").glob("checkpoints-*"))

    train(run, FAST)
    assert there() == ["checkpoints-of-mine", trial]  # a trial has a lock of its own: it may be running
    assert "removed checkpoints of 1 earlier settings" in capsys.readouterr().out
    run.path("training", given_up, "checkpoint-3", "optimizer.pt").write_bytes(b"x")
    train(run, FAST)  # nothing was trained now: the other settings may be what a person is at
    assert given_up in there() and "removed" not in capsys.readouterr().out
    train(run, FAST, rows=4)
    assert there() == [given_up, "checkpoints-of-mine"]


def test_a_run_goes_on_where_the_folder_of_its_base_lies_elsewhere(
    tiny: BaseModel, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from stakelib.models import preflight

    for place in ("a", "b", "c"):
        shutil.copytree(tiny.folder, home / place / "mine", ignore=shutil.ignore_patterns("source.json"))
    weights = home / "c" / "mine" / "model.safetensors"
    with weights.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"\x3c")
    run = Run.open(home / "run", "smoke", str(home / "a" / "mine"))
    write_rows(run, "train", some_rows(4))
    write_rows(run, "valid", some_rows(2))
    first = train(run, FAST)
    shutil.rmtree(home / "a")  # and the cache may be another computer's
    for model in (home / "b" / "mine", f"{home / 'b' / 'mine'}{os.sep}", home / "b" / ".." / "b" / "mine"):
        capsys.readouterr()
        again = Run.open(home / "run", "smoke", str(model))
        assert preflight(str(model), again.folder).name == "mine"
        assert train(again, FAST) == first
        assert "up to date" in capsys.readouterr().out
    other = Run.open(home / "run", "smoke", str(home / "c" / "mine"))
    for start in (lambda: train(other, FAST), lambda: preflight(str(home / "c" / "mine"), other.folder)):
        with pytest.raises(CourseError, match="holds another model than"):
            start()
    renamed = (home / "b" / "mine").rename(home / "b" / "yours")  # the run's files carry the name
    with pytest.raises(CourseError, match="run.json: model is '.*mine', you asked for '.*yours'"):
        Run.open(home / "run", "smoke", str(renamed))
    with pytest.raises(CourseError, match="model is"):
        Run.open(home / "run", "smoke", "tiny-gemma")


def test_rows_come_in_an_order_fixed_by_the_seed() -> None:
    from stakelib.training.keep import row_order

    order = row_order(20, 3, seed=1)
    assert [sorted(order[i : i + 20]) for i in (0, 20, 40)] == [list(range(20))] * 3
    assert order[:20] != order[20:40] != list(range(20))
    assert row_order(20, 3, seed=1) == order != row_order(20, 3, seed=2)


def test_the_chosen_precision_stands_in_the_result(
    whole: SimpleNamespace, tiny: BaseModel, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (whole.result["precision"], whole.result["precision_why"]) == machine.precision()
    results = {}
    for kind in ("float32", "bfloat16"):
        monkeypatch.setattr(machine, "precision", lambda kind=kind: (kind, f"{kind} for this test"))
        results[kind] = train(run_with_rows(home / kind), FAST)
        assert results[kind]["precision_why"] == f"{kind} for this test"
        assert results[kind]["best_valid_loss"] == pytest.approx(whole.result["best_valid_loss"], abs=0.1)


def test_the_best_adapter_is_kept_not_the_last(tiny: BaseModel, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stakelib.training.peft_backend import RowTrainer

    seen: dict[int, dict[str, torch.Tensor]] = {}

    def evaluate(self: Any, *_: Any, **__: Any) -> dict[str, float]:
        """As the real one, but step 4 of 8 always wins."""
        step = self.state.global_step
        weights = {n.replace(".default", ""): p for n, p in self.model.named_parameters() if "lora_" in n}
        seen[step] = {n: p.detach().clone() for n, p in weights.items()}
        metrics = {"eval_loss": 1.0 + abs(step - 4)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    monkeypatch.setattr(RowTrainer, "evaluate", evaluate)
    run = run_with_rows(home / "run")
    result = train(run, FAST)
    assert (result["best_step"], result["best_valid_loss"], list(seen)) == (4, 1.0, [2, 4, 6, 8])
    assert furthest(tensors(run), seen[4]) < 1e-6
    assert furthest(tensors(run), seen[8]) > 1e-3
