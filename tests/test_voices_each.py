"""One voice each: nine adapters trained one after the other, and one base that answers as whoever is asked for."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from exported import PROMPT, adapter_for
from exported import some_rows as rows_of
from test_endpoint import ASK, send
from test_evaluation import FakeEngine, answer, row, scored
from test_mlx import random_adapter
from test_report import HOSTILE, Tags
from test_training import FAST, furthest, some_rows, tensors, write_rows
from toy_models import shaped_model

from stakelib import machine
from stakelib.evaluation import answers, compare, compare_each, nine
from stakelib.export import adapter_files, ensure_base_gguf, merge, to_gguf
from stakelib.export.adapter_files import ALL, adapter_to_gguf, export_nine, nine_files
from stakelib.export.serve import serving
from stakelib.models import BaseModel, base_model, engine, load_tokenizer
from stakelib.models.adapters import to_mlx
from stakelib.models.mlx_models import mlx_folder
from stakelib.run import CourseError, Run, sha256
from stakelib.scenarios import sample
from stakelib.training import Recipe, adapter_folder, train
from stakelib.training.nine import plan_nine, split_rows, train_nine, voice_adapters, voice_run
from stakelib.voices import STAKEHOLDERS

PROMPTS = [PROMPT, "What about solar?", "As a bank: speak."]
NINE = list(STAKEHOLDERS)
BRIEF = replace(FAST, name="brief", accumulate=1, validate_per_epoch=2)


@pytest.fixture(autouse=True)
def own_cache(tiny_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAKE_CACHE", str(tiny_cache))
    monkeypatch.setattr(machine, "precision", lambda: ("float32", "the same in every run of these tests"))


# ---------------------------------------------------------------------------------------------- switched at run time


def said(path: Path, base: BaseModel, prompts: list[str], **more: Any) -> list[list[int]]:
    """Ids of greedy answers through llama.cpp, all prompts in flight together."""
    voices = more.pop("voices", None)
    with engine(path, base.folder, **more) as llama:
        replies = dict(llama.ask(prompts, max_new_tokens=16, ids=True, voices=voices))
    return [replies[i].ids for i in range(len(prompts))]


def test_concurrent_requests_get_each_the_voice_they_asked_for(made: SimpleNamespace, tmp_path: Path) -> None:
    base, gguf = made.base, ensure_base_gguf(made.base)
    files = {"bank": tmp_path / "bank.gguf", "village": tmp_path / "village.gguf"}
    for file, adapter in zip(files.values(), (made.adapter, made.other), strict=True):
        adapter_to_gguf(adapter, gguf["f16"], file, None)
    wanted = {
        "bank": said(made.files["f16"], base, PROMPTS),
        "village": said(made.wrong["f16"], base, PROMPTS),
        None: said(gguf["f16"], base, PROMPTS),
    }
    assert wanted["bank"] != wanted["village"] != wanted[None]
    voices = ["bank", "village", None] * 3 * 2
    prompts = [PROMPTS[i // 3 % 3] for i in range(18)]
    found = said(gguf["f16"], base, prompts, voices=voices, adapters=files)
    assert found == [wanted[v][PROMPTS.index(p)] for p, v in zip(prompts, voices, strict=True)]
    assert said(gguf["f16"], base, PROMPTS, adapters=files) == wanted[None]  # unasked, an adapter is silent
    small = tmp_path / "small.gguf"
    adapter_to_gguf(made.adapter, gguf["q8"], small)
    assert small.stat().st_size < 0.6 * files["bank"].stat().st_size
    packed = said(gguf["q8"], base, PROMPTS, voices=["bank"] * 3, adapters={"bank": small})
    assert packed == said(made.files["q8"], base, PROMPTS) != wanted[None]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3_text"])
def test_an_adapter_is_its_merged_model_in_every_family(
    kind: str, tiny: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_model(str(shaped_model(tiny.folder, tmp_path / kind, kind)))
    adapter = adapter_for(base, rows_of(load_tokenizer(base.folder), "bank"), tmp_path / "adapter", steps=6)
    merge(base, adapter, tmp_path / "merged")
    to_gguf(tmp_path / "merged", tmp_path / "merged.gguf")
    to_gguf(base.folder, tmp_path / "base.gguf")
    asked, voices = [PROMPT] * 4, ["x", None, "x", None]  # learned well, so that no rounding decides between two words
    wanted, plain = (said(tmp_path / f"{name}.gguf", base, asked[:2]) for name in ("merged", "base"))

    def found(name: str) -> list[list[int]]:
        adapter_to_gguf(adapter, tmp_path / "base.gguf", tmp_path / name, None)
        return said(tmp_path / "base.gguf", base, asked, voices=voices, adapters={"x": tmp_path / name})

    assert found("right.gguf")[::2] == wanted != plain
    if kind == "llama":  # rows of queries and keys not turned: another model
        monkeypatch.setattr(adapter_files, "_turned", lambda rows, _: rows)
        assert found("wrong.gguf")[::2] != wanted


def texts(model: Any, prompts: list[str], voices: list[str | None] | None = None) -> list[str]:
    found = dict(model.ask(prompts, max_new_tokens=12, **({"voices": voices} if voices else {})))
    return [found[i].text for i in range(len(prompts))]


@pytest.mark.parametrize("kind", ["transformers", "mlx"])
def test_one_loaded_base_speaks_as_each_adapter_and_as_itself(kind: str, made: SimpleNamespace, tmp_path: Path) -> None:
    if kind == "mlx" and machine.mlx()[0] == "none":
        pytest.skip(machine.mlx()[1])
    base, adapters = made.base, {"bank": made.adapter, "village": made.other}
    folder = mlx_folder(base, "float32") if kind == "mlx" else base.folder
    if kind == "mlx":
        adapters = {who: to_mlx(shutil.copytree(adapter, tmp_path / who)) for who, adapter in adapters.items()}
    alone: dict[str | None, list[str]] = {}
    for who, adapter in {**adapters, None: None}.items():
        with engine(folder, base.folder, kind, adapter) as model:
            alone[who] = texts(model, PROMPTS)
    assert len({str(t) for t in alone.values()}) == 3
    with engine(folder, base.folder, kind, adapters=adapters) as model:
        for voices in (["bank", "village", None], [None, "bank", "village"], ["village"] * 3):
            assert texts(model, PROMPTS, voices) == [alone[v][i] for i, v in enumerate(voices)]
        with pytest.raises(CourseError, match="no adapter for voice 'mayor'"):
            texts(model, PROMPTS, ["mayor"] * 3)


def test_a_base_that_refuses_adapters_names_the_way_out(made: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"no adapter")
    gguf = ensure_base_gguf(made.base)["q8"]
    with pytest.raises(CourseError, match=r"with 2 adapters") as problem:
        said(gguf, made.base, PROMPTS, adapters=dict.fromkeys("ab", tmp_path / "broken.gguf"))
    assert re.search(r"merge each .* 2 x \d+ MB", problem.value.next_action)
    odd = tmp_path / "odd"
    random_adapter(made.base, odd, Recipe(rank=4, alpha=4, targets=("q_proj",)))
    from safetensors.torch import load_file, save_file

    weights = {n.replace("q_proj", "new_proj"): t for n, t in load_file(odd / "adapter_model.safetensors").items()}
    save_file(weights, odd / "adapter_model.safetensors")
    with pytest.raises(CourseError, match="new_proj.* is no low-rank matrix of a layer"):
        adapter_to_gguf(odd, gguf, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_the_endpoint_picks_the_adapter_by_the_models_name(made: SimpleNamespace, tmp_path: Path) -> None:
    gguf, files = ensure_base_gguf(made.base)["f16"], {}
    for name, adapter in (("stakeholder-tiny-finance", made.adapter), ("stakeholder-tiny-public", made.other)):
        files[name] = tmp_path / f"{name}.gguf"
        adapter_to_gguf(adapter, gguf, files[name], None)
    with engine(gguf, made.base.folder, adapters=files) as llama:
        wanted = dict(
            zip(
                [*files, None],
                [a.text for _, a in sorted(llama.ask(["hello"] * 3, max_new_tokens=8, voices=[*files, None]))],
                strict=True,
            )
        )
    assert len(set(wanted.values())) == 3
    with serving(gguf, made.base.folder, adapters=files, alias="gemma2:2b") as address:
        listed = [m["name"] for m in send(address, "/api/tags")[2]["models"]]
        replies = {name: send(address, "/api/generate", {**ASK, "model": name})[2]["response"] for name in listed}
        assert send(address, "/api/generate", {**ASK, "model": "stakeholder-tiny-industry"})[0] == 404
    assert [name.removesuffix(":latest") for name in listed] == [gguf.stem.rpartition("-")[0], *files, "gemma2:2b"]
    assert list(replies.values()) == [wanted[None], *(wanted[name] for name in files), wanted[next(iter(files))]]


# ------------------------------------------------------------------------------------------- trained one by one


def nine_rows(run: Run, each: int = 4) -> Run:
    """A few rows for each of the nine, in turn, as in a file of real rows."""
    rows = [{**r, "stakeholder_id": NINE[i % 9]} for i, r in enumerate(some_rows(9 * (each + 1)))]
    write_rows(run, "train", rows[: 9 * each])
    write_rows(run, "valid", rows[9 * each :])
    return run


def test_every_row_goes_to_its_own_voice_and_no_other(
    tiny: BaseModel, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = nine_rows(Run.open(home / "run", "smoke"))
    own = {
        who: [json.loads(line) for line in r.path("training_data", "train.jsonl").read_text("utf-8").splitlines()]
        for who, r in split_rows(run).items()
    }
    assert list(own) == NINE
    assert all({r["stakeholder_id"] for r in rows} == {who} for who, rows in own.items())
    assert sorted(r["id"] for rows in own.values() for r in rows) == sorted(f"r{i}" for i in range(36))
    left = [{**r, "stakeholder_id": NINE[i % 7]} for i, r in enumerate(some_rows(14))]
    write_rows(run, "valid", left)
    voices, told = split_rows(run), f"none of their own: {', '.join(NINE[7:])}"
    counts = [len(r.path("training_data", "valid.jsonl").read_text("utf-8").splitlines()) for r in voices.values()]
    assert counts == [2] * 7 + [14] * 2 and told in capsys.readouterr().out
    write_rows(run, "train", left)
    with pytest.raises(CourseError) as problem:
        split_rows(run)
    assert problem.value.problems == [f"train.jsonl holds no row of '{who}'" for who in NINE[7:]]


def test_the_plan_says_time_memory_and_disk_before_anything_is_trained(
    tiny: BaseModel, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stakelib.training.nine.hours", lambda *_: 0.5)
    monkeypatch.setattr(machine, "metal", lambda: (False, "for this test"))
    run = nine_rows(Run.open(home / "run", "smoke"))
    table = plan_nine(run, BRIEF).set_index("voice")
    assert list(table.index) == [*NINE, "all nine"]
    assert table.loc["all nine", "rows"] == 36 == table.loc[NINE, "rows"].sum()
    assert table.loc["all nine", "learned tokens"] == table.loc[NINE, "learned tokens"].sum()
    assert table.loc["all nine", "minutes"] == pytest.approx(30) == pytest.approx(table.loc[NINE, "minutes"].sum())
    assert table.loc["all nine", "MB"] == pytest.approx(9 * table.loc["finance", "MB"])
    assert table.loc["all nine", "GB"] == table.loc[NINE, "GB"].max() > 0.3
    assert not (run.folder / "voices" / "finance" / "models").exists()


IN_THE_FIFTH = """
import os, signal, sys
sys.path[:0] = {path!r}
from test_voices_each import BRIEF
from stakelib import machine
from stakelib.run import Run
from stakelib.training import peft_backend
from stakelib.training.nine import train_nine

machine.precision = lambda: ("float32", "the same in every run of these tests")

class Watch(peft_backend.Watch):
    trainings = 0

    def on_train_begin(self, *arguments, **more):
        Watch.trainings += 1
        return super().on_train_begin(*arguments, **more)

    def on_step_end(self, args, state, control, **more):
        if Watch.trainings == 5 and state.global_step == 3:  # there is a checkpoint of step 2
            os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        return super().on_step_end(args, state, control, **more)

peft_backend.Watch = Watch
train_nine(Run.open({run!r}, "smoke"), BRIEF, backend="peft")
"""


@pytest.fixture(scope="module")
def trained(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The nine and the one for all; the first start is killed (SIGKILL) in the fifth voice, the second goes on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STAKE_CACHE", str(tiny_cache))
        patch.setattr(machine, "precision", lambda: ("float32", "the same in every run of these tests"))
        run = nine_rows(Run.open(tmp_path_factory.mktemp("nine"), "smoke"))
        train(run, BRIEF)
        here = Path(__file__).resolve().parents
        code = IN_THE_FIFTH.format(path=[str(here[1]), str(here[0])], run=str(run.folder))
        env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # as here, or sums add up differently
        killed = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, encoding="utf-8")
        assert killed.returncode in (-9, 15), killed.stdout
        before = {who: hashes(voice_run(run, who).folder) for who in NINE}
        stages = [who for who in NINE if "train" in voice_run(run, who).record["stages"]]
        result = train_nine(run, BRIEF)
        export_nine(run)
        yield SimpleNamespace(run=run, before=before, stages=stages, result=result)


def hashes(folder: Path) -> dict[str, tuple[str, int]]:
    """sha256 and time of every file: one written again, even with the same bytes, is seen."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".lock"]
    return {p.relative_to(folder).as_posix(): (sha256(p), p.stat().st_mtime_ns) for p in files}


def test_killed_in_the_fifth_it_goes_on_there_and_leaves_the_first_four_alone(
    trained: SimpleNamespace, home: Path
) -> None:
    assert trained.stages == NINE[:4]
    after = {who: hashes(voice_run(trained.run, who).folder) for who in NINE}
    assert {who: after[who] for who in NINE[:4]} == {who: trained.before[who] for who in NINE[:4]}
    assert after[NINE[4]] != trained.before[NINE[4]]
    resumed = {who: r["resumed_at"] for who, r in trained.result.items()}
    assert resumed == {who: 2 * (who == NINE[4]) for who in NINE}
    whole = nine_rows(Run.open(home / "whole", "smoke"))
    fifth = split_rows(whole)[NINE[4]]
    train(fifth, BRIEF)
    assert furthest(tensors(fifth), tensors(voice_run(trained.run, NINE[4]))) < 1e-6
    assert furthest(tensors(fifth), tensors(voice_run(trained.run, NINE[5]))) > 1e-4


def test_together_the_nine_learn_as_many_tokens_as_the_one(trained: SimpleNamespace) -> None:
    one = trained.run.record["stages"]["train"]["result"]
    for what in ("learned_tokens", "all_tokens", "rows", "steps"):
        assert sum(r[what] for r in trained.result.values()) == one[what]


def test_a_second_start_trains_nothing(trained: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_nine(trained.run, BRIEF) == trained.result
    assert capsys.readouterr().out.count("train: up to date") == 9


@pytest.mark.parametrize("backend", ["peft", "mlx"])
def test_a_voice_can_go_on_from_the_adapter_for_all(backend: str, trained: SimpleNamespace, home: Path) -> None:
    if backend == "mlx" and machine.mlx()[0] == "none":
        pytest.skip(machine.mlx()[1])
    still, start = replace(BRIEF, name="still", learning_rate=0.0), adapter_folder(trained.run)
    own = split_rows(nine_rows(Run.open(home / "run", "smoke")), "one")["finance"]
    assert own.folder.parent.name == "voices-from-one"
    train(own, still, backend, start=start)
    assert furthest(tensors(own), tensors(trained.run)) == 0
    train(own, still, backend)
    assert furthest(tensors(own), tensors(trained.run)) > 0  # without it, the beginning is the recipe's
    with pytest.raises(CourseError, match="rank 4, alpha 8"):
        train(own, replace(still, rank=8), backend, start=start)


def test_going_on_needs_the_adapter_for_all(tiny: BaseModel, home: Path) -> None:
    with pytest.raises(CourseError, match="is missing") as problem:
        train_nine(nine_rows(Run.open(home / "run", "smoke")), BRIEF, start="one")
    assert "train the adapter for all nine first" in problem.value.next_action
    for missing, count in ((voice_adapters, 9), (nine_files, 10)):
        with pytest.raises(CourseError) as problem:
            missing(Run.open(home / "run", "smoke"))
        assert len(problem.value.problems) == count


def test_nine_small_files_are_made_once(trained: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    files = export_nine(trained.run)
    assert list(files) == [ALL, *NINE]
    assert files["finance"].name == "stakeholder-tiny-gemma-finance.gguf"
    assert files[ALL].name == "stakeholder-tiny-gemma.gguf"
    assert len({sha256(file) for file in files.values()}) == 10
    assert export_nine(trained.run) == files
    assert capsys.readouterr().out.count("voices: up to date") == 2
    assert set(trained.run.record["stages"]["voices"]["result"]["seconds"]) == set(files)


def test_files_of_other_adapters_are_not_served(trained: SimpleNamespace, tmp_path: Path) -> None:
    shutil.copytree(trained.run.folder, tmp_path / "run")
    run = Run.open(tmp_path / "run", "smoke")
    files, adapter = nine_files(run), adapter_folder(voice_run(run, "finance"))
    assert set(files) == {ALL, *NINE}
    (adapter / "README.md").write_text("trained anew", encoding="utf-8")
    files["public"].write_bytes(files["public"].read_bytes() + b"x")
    files["industry"].unlink()
    with pytest.raises(CourseError, match="run export_nine") as problem:
        nine_files(run)
    assert [p.split(".gguf")[0].split("gemma-")[1] for p in problem.value.problems] == ["industry", "public", "finance"]


@pytest.mark.parametrize("kind", ["llama.cpp", "transformers"])
def test_switching_is_measured_and_every_voice_stays_itself(
    kind: str, trained: SimpleNamespace, tell: Callable[[str], None]
) -> None:
    found = nine.switching(trained.run, kind, times=18)
    assert found["same every time"] is True and found["ms nine"] > 0 <= found["switch ms"]
    tell(
        f"tiny model, {kind}: a switch adds {found['switch ms']:.1f} ms, nine take {found['MB nine']:.0f} MB "
        f"where one takes {found['MB one']:.0f}"
    )


@pytest.mark.parametrize("leaks", [False, True])
def test_a_voice_that_changes_between_its_turns_is_seen(
    leaks: bool, trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Leaky(FakeEngine):
        def speak(self, voice: str) -> None:
            self.asked += 1

        def ask(self, prompts: list[str], *, voices: list[str], **_: Any) -> list[tuple[int, Any]]:
            return [(0, SimpleNamespace(text=voices[0] + "!" * (leaks and self.asked > 20)))]

    monkeypatch.setattr(nine, "engine", lambda *_, **__: Leaky())
    found = nine.switching(trained.run, "transformers", times=18)
    assert (found["same every time"], found["different"]) == (not leaks, 9)


# ------------------------------------------------------------------------------------------------- compared, shown


def test_an_answer_is_kept_for_its_adapter_alone(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    class Voiced(FakeEngine):
        def ask(self, prompts: list[str], *, voices: list[str], **more: Any) -> Iterator[Any]:
            asked.extend(zip(prompts, voices, strict=True))
            return super().ask(prompts, **more)

    for name in ("m.gguf", "a.gguf", "b.gguf"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    run, rows = SimpleNamespace(path=lambda *parts: tmp_path.joinpath(*parts)), [row(i, prompt="p") for i in range(3)]
    more = {"engine_factory": Voiced(), "adapters": {v: tmp_path / f"{v}.gguf" for v in "ab"}}

    def ask(*voices: str) -> list[dict[str, Any]]:
        return answers(run, "nine", tmp_path / "m.gguf", rows, voices=voices, progress=lambda _: None, **more)

    assert len(ask("a", "b", "a")) == 3 and asked == [("p", "a"), ("p", "b")]
    ask("b", "b", "a")
    assert len(asked) == 2
    (tmp_path / "b.gguf").write_text("trained again", encoding="utf-8")
    ask("b", "b", "a")
    assert asked[2:] == [("p", "b")]


def test_single_stakeholders_are_compared_with_all_of_them_in_mind() -> None:
    good, bad = [False] * 12, [True] * 12
    parts = [scored(good, bad).assign(stakeholder=who) for who in ("A", "B", "C")]
    table = compare_each(pd.concat(parts), ["has_sections"])
    single = compare(parts[0], ["has_sections"])
    assert list(table["stakeholder"]) == ["A", "B", "C"] and set(table["verdict"]) == {"better"}
    assert table["p_holm"].max() > single["p_holm"].iloc[0] == table["p"].iloc[0]


def test_the_advice_follows_from_the_figures() -> None:
    cost = pd.DataFrame({"MB": [150.0, 190.0, 1300.0]})
    line = {"label": "Stopping", "direction": "higher", "n": 45}
    each = pd.DataFrame([{**line, "verdict": "cannot tell", "stakeholder": "A"}])

    def told(*verdicts: str) -> str:
        return nine.advice(pd.DataFrame([{**line, "verdict": v} for v in verdicts]), each, cost)

    assert told("better", "cannot tell").startswith("Prefer one each: better on stopping")
    assert told("worse", "cannot tell").startswith("Prefer one for all: one each is worse on stopping")
    assert told("cannot tell").startswith("Prefer one for all, the simpler")
    assert "190.0 MB against 150.0; 45 prompts; single stakeholders: none" in told("better", "worse")


def test_every_adapter_is_asked_as_every_stakeholder(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(i, stakeholder_id=who) for i, who in enumerate(NINE * 2)]
    asked: list[tuple[str, str]] = []

    def ask(_: Any, system: str, some: list[dict], voices: list[str]) -> list[dict]:
        asked.extend((who, r["id"]) for who, r in zip(voices, some, strict=True))
        return [answer(who) for who in voices]

    monkeypatch.setattr(nine, "ask_voices", ask)
    monkeypatch.setattr(nine, "heard", lambda _, texts, rows: texts)
    table = nine.exchanged(SimpleNamespace(), rows, None).pivot(index="adapter", columns="asked as", values="heard")
    assert len(set(asked)) == 81 == table.size
    assert all((table.loc[who] == who).all() for who in NINE)  # here the adapter alone decides


def test_the_panel_page_shows_text_as_text(tmp_path: Path) -> None:
    rows = nine.panel_rows(sample(1, seed=3)[0])
    assert [r["stakeholder_id"] for r in rows] == NINE and len({r["scenario_id"] for r in rows}) == 1
    rows = [{**r, "scenario": HOSTILE, "prompt": HOSTILE, "country": "</title><script>"} for r in rows]
    run = SimpleNamespace(profile=SimpleNamespace(model="tiny"), path=lambda *p: tmp_path.joinpath(*p))
    page = nine.hand_out(run, rows, [answer(f"**Concerns** {HOSTILE}") for _ in rows]).read_text(encoding="utf-8")
    said = [{**answer("We agree."), "sha256": "a" * 64, "adapter_sha256": f"{i}" * 64} for i in range(len(rows))]
    named = nine.hand_out(run, rows, said).read_text(encoding="utf-8")
    assert "a" * 64 in named and all(f"{i}" * 64 in named for i in range(len(rows))) and "sha256" not in page
    tags = Tags(page).seen
    assert not {"script", "iframe", "object", "img", "link"} & {tag for tag, _ in tags}
    assert not [a for _, attrs in tags for a in attrs if a.startswith("on") or a in ("src", "href")]
    assert page.count("&lt;script&gt;alert(1)") == 2 * 9 + 2 and "{{ 7*7 }}" in page and "url(" not in page
    assert page.count("<b>Concerns</b>") == 9 and "default-src 'none'" in page
    assert all(STAKEHOLDERS[who].name.replace("&", "&amp;") in page for who in NINE)
