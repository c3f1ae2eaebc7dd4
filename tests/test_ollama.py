"""The Modelfile wraps a prompt as training did, by Go's own template engine; and Ollama, played by a fake one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from exported import PROMPT

from stakelib.dialogues.check import MAX_COMPLETION, MAX_ROW
from stakelib.export import modelfile, ollama, ollama_hop
from stakelib.export.ollama import (
    ANSWER_TOKENS,
    _template_of,
    as_trained,
    model_name,
    ollama_name,
    rendered_by,
    server_address,
)
from stakelib.models import engine, load_tokenizer, render, template
from stakelib.run import CourseError

# SmolLM2's own: its BOS opens every turn, and a system turn stands in front when none is given
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
).replace("\n", "\\n")
ASKED = [
    (PROMPT, ""),
    (PROMPT, "Answer as a grid operator."),
    ("{{ .System }} {{ if }} {{/* x */}} {% raw %} $x", ""),
    ("Prompt", "{{ .Prompt }} {{ end }}"),
    ("Île de Gorée · 電力 · ⚡ 64,2 %\u00a0\u2028MW", "Répondez."),
    ("<b>bold</b> & <script>\"quoted\" 'x'</script> \\n \\u0041", "a < b && c > d"),
    ("first\n\n\nthird\r\n\ttabbed\n- item", "one\ntwo\n"),
    ('three quotes """ inside', '"""'),
]


@pytest.fixture(scope="module")
def smollm(tiny_cache: Path) -> Any:
    """The tiny model's tokenizer with SmolLM2's chat template and its two marks."""
    tokenizer = load_tokenizer(tiny_cache / "models" / "tiny-gemma")
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    tokenizer.chat_template = CHATML
    return tokenizer


def text_for(tokenizer: Any, place: Path) -> str:
    (place / "models").mkdir(exist_ok=True)
    return modelfile(tokenizer, place / "models" / "x-q8.gguf", place / "Modelfile")


def by_go(text: str, asked: list[tuple[str, str]], place: Path) -> list[str]:
    go = shutil.which("go")
    if go is None:
        pytest.skip("Go is not installed: only the Python twin of its template engine was tested")
    order = {"template": _template_of(text), "asked": [{"Prompt": p, "System": s} for p, s in asked]}
    env = {**os.environ, "GOCACHE": str(place / "go"), "GO111MODULE": "off", "GOFLAGS": ""}
    done = subprocess.run(
        [go, "run", str(Path(__file__).parent / "data" / "template.go")],
        env=env,
        input=json.dumps(order),
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_go_itself_renders_as_training_did(tokenizer: Any, smollm: Any, tmp_path: Path) -> None:
    for own in (tokenizer, smollm):
        text = text_for(own, tmp_path)
        assert by_go(text, ASKED, tmp_path) == [as_trained(own, p, s) for p, s in ASKED]
        wrong = text.replace("{{ .System }}\n\n", "{{ .System }}\n")  # the twin that must differ, where there is one
        same = [a == as_trained(own, p, s) for a, (p, s) in zip(by_go(wrong, ASKED, tmp_path), ASKED, strict=True)]
        assert same == [not s for _, s in ASKED]


def test_the_python_twin_renders_as_go_does(tokenizer: Any, smollm: Any, tmp_path: Path) -> None:
    for own in (tokenizer, smollm):
        text = text_for(own, tmp_path)
        assert [rendered_by(text, p, s) for p, s in ASKED] == [as_trained(own, p, s) for p, s in ASKED]
    assert rendered_by("FROM ./x.gguf\n", PROMPT) == PROMPT  # without a TEMPLATE Ollama sends the bare prompt


def test_as_trained_is_what_the_tokenizer_was_given(tokenizer: Any, smollm: Any) -> None:
    """The text gives the ids of `render`, a system text folded into the user's turn, and one BOS where there is one."""
    for own in (tokenizer, smollm):
        bos = own.bos_token if own is tokenizer else ""  # llama.cpp writes Gemma's; SmolLM2's is part of the template
        for system, folded in (("", PROMPT), ("Answer briefly.", f"Answer briefly.\n\n{PROMPT}")):
            text = bos + as_trained(own, PROMPT, system)
            assert own(text, add_special_tokens=False).input_ids == render(own, folded).ids
            turns = [{"role": "user", "content": folded}]
            assert text == own.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert as_trained(tokenizer, PROMPT).count("<bos>") == 0
    assert as_trained(smollm, PROMPT).startswith("<|im_start|>system\nYou are a helpful AI")


def test_the_modelfile_stops_and_points_to_the_file_beside_it(made: SimpleNamespace) -> None:
    lines = (made.run.folder / "Modelfile").read_text(encoding="utf-8").splitlines()
    (source,) = [line.split(" ", 1)[1] for line in lines if line.startswith("FROM ")]
    assert source == "./models/stakeholder-tiny-gemma-q8.gguf"
    assert (made.run.folder / source).resolve() == made.files["q8"].resolve()
    assert f'PARAMETER stop "{template(made.tokenizer).end}"' in lines
    assert not any(re.match(r"\s*(ADAPTER|SYSTEM)\b", line) for line in lines)


def test_the_context_holds_the_longest_row_and_an_answer(made: SimpleNamespace) -> None:
    """Ollama cuts the front of what does not fit, without a word."""
    text = (made.run.folder / "Modelfile").read_text(encoding="utf-8")
    numbers = {key: int(value) for key, value in re.findall(r"^PARAMETER (num_\w+) (\d+)$", text, re.MULTILINE)}
    assert numbers["num_predict"] == ANSWER_TOKENS == MAX_COMPLETION
    assert numbers["num_ctx"] >= MAX_ROW + numbers["num_predict"]
    assert numbers["num_ctx"] < MAX_ROW + 2 * numbers["num_predict"]  # a larger one would only take memory


def test_a_template_that_a_modelfile_cannot_hold_is_refused(tiny_cache: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_cache / "models" / "tiny-gemma")
    tokenizer.chat_template = "{{ '{{' }}" + tokenizer.chat_template
    with pytest.raises(CourseError, match="which a Modelfile cannot"):
        text_for(tokenizer, tmp_path)


# ------------------------------------------------------------------------------------------------- Ollama, played


class FakeOllama(BaseHTTPRequestHandler):
    """Answers as Ollama's API does; what it says is set on the class: a dict, or (status, text)."""

    said: dict[str, Any] = {}
    calls: list[tuple[str, str]] = []
    asked: dict[str, Any] = {}

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.calls.append((self.command, self.path))
        self.asked[self.path] = json.loads(body or b"{}")
        said = self.said.get(self.path, (404, "404 page not found"))
        status, text = said if isinstance(said, tuple) else (200, json.dumps(said))
        if status:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

    do_GET = do_POST = do_DELETE = answer

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture()
def server(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fake Ollama that runs the model rightly, and an `ollama` on the PATH that accepts the Modelfile."""
    with engine(made.files["q8"], made.base.folder) as llama:
        ((_, ours),) = llama.ask([PROMPT], max_new_tokens=ANSWER_TOKENS)
    counts = {"prompt_eval_count": ours.prompt_tokens, "eval_count": ours.new_tokens, "eval_duration": 10**9}
    shown = _template_of((made.run.folder / "Modelfile").read_text(encoding="utf-8"))
    FakeOllama.calls, FakeOllama.asked = [], {}
    FakeOllama.said = {
        "/api/version": {"version": "0.99.0"},
        "/api/show": {"template": shown},
        "/api/generate": {"response": " " + ours.text, "done": True, "load_duration": 5 * 10**8, **counts},
        "/api/delete": (200, ""),
    }

    def create(command: list[str], cwd: Path, env: dict[str, str], **_: Any) -> SimpleNamespace:
        assert command[0] == "ollama" and command[1] + command[3] == "create-f" and (cwd / command[4]).exists()
        FakeOllama.calls.append(("create", env["OLLAMA_HOST"]))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(ollama.shutil, "which", lambda name: name)
    monkeypatch.setattr(ollama.subprocess, "run", create)
    fake = HTTPServer(("127.0.0.1", 0), FakeOllama)
    thread = threading.Thread(target=fake.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{fake.server_port}"
    fake.shutdown()
    fake.server_close()
    thread.join()


def test_ollama_says_what_llama_cpp_says(made: SimpleNamespace, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", server.removeprefix("http://"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    hop = ollama_hop(made.run, PROMPT)
    assert "why" not in hop
    assert [hop[key] for key in ("version", "same_template", "same_tokens", "same_text")] == [
        "0.99.0",
        True,
        True,
        True,
    ]
    assert hop["load_s"] == 0.5 and hop["tokens_per_s"] > 1
    assert ("create", server) in FakeOllama.calls and FakeOllama.calls[-1] == ("DELETE", "/api/delete")
    assert FakeOllama.calls.count(("POST", "/api/generate")) == 1
    options = FakeOllama.asked["/api/generate"]["options"]  # what Ollama's versions choose differently is said
    assert (options["temperature"], options["repeat_penalty"], options["seed"]) == (0, 1.0, 0)
    assert {"top_k", "top_p", "min_p", "num_predict"} <= set(options)
    FakeOllama.said["/api/generate"] |= {"response": "something else"}
    assert ollama_hop(made.run, PROMPT, server)["same_text"] is False


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"response": "ja ja ja", "done": False}, "unfinished"),
        ((500, '{"error": "prediction aborted, token repeat limit reached"}'), "token repeat limit reached"),
        ((500, "no JSON"), "500"),
        ((503, '{"error": "server busy"}'), "server busy"),
        ((200, "<html>"), "JSON"),
        ((0, ""), ""),  # the connection is closed
    ],
    ids=["aborted", "token repeat limit", "plain 500", "busy", "page", "closed"],
)
def test_an_answer_that_ollama_gives_up_is_told(reply: Any, words: str, made: SimpleNamespace, server: str) -> None:
    FakeOllama.said["/api/generate"] = reply
    hop = ollama_hop(made.run, PROMPT, server)
    assert words in hop["why"] and "0.99.0" in hop["why"]
    assert hop["version"] == "0.99.0" and hop["same_template"] is True
    assert [hop[key] for key in ("same_tokens", "same_text", "load_s", "tokens_per_s")] == [None] * 4
    assert hop["text"] == (reply["response"] if isinstance(reply, dict) else None)
    assert FakeOllama.calls[-1] == ("DELETE", "/api/delete")


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ({"version": "0.0.0-stakelib-1.0"}, "own endpoint"),
        ((200, "<html>"), "no Ollama"),
        ((404, "not found"), "no Ollama"),
        ({}, "no Ollama"),
        ([1], "no Ollama"),
    ],
)
def test_what_is_no_ollama_is_not_taken_for_it(version: Any, words: str, made: SimpleNamespace, server: str) -> None:
    FakeOllama.said["/api/version"] = version
    hop = ollama_hop(made.run, PROMPT, server)
    assert words in hop["why"] and len(hop["commands"]) == 2
    assert FakeOllama.calls == [("GET", "/api/version")]


def test_an_ollama_that_asks_otherwise_is_refused_and_cleaned(made: SimpleNamespace, server: str) -> None:
    FakeOllama.said["/api/show"] = {"template": "{{ .Prompt }}"}
    FakeOllama.said["/api/generate"] |= {"prompt_eval_count": 3}
    with pytest.raises(CourseError, match="is not the Modelfile's TEMPLATE(.|\n)*Ollama reads 3 prompt tokens"):
        ollama_hop(made.run, PROMPT, server)
    assert FakeOllama.calls[-1] == ("DELETE", "/api/delete")


def test_without_ollama_the_two_commands_are_told(
    made: SimpleNamespace, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hop = ollama_hop(made.run, PROMPT, "http://127.0.0.1:9")
    assert hop["why"].startswith("no Ollama answers at http://127.0.0.1:9")
    assert hop["commands"][0] == "ollama create stakeholder-tiny-gemma -f Modelfile"
    assert hop["commands"][1].startswith("ollama run stakeholder-tiny-gemma ")
    monkeypatch.setattr(ollama.shutil, "which", lambda _: None)
    assert "PATH" in ollama_hop(made.run, PROMPT, server)["why"]


@pytest.mark.parametrize(
    ("host", "address"),
    [
        (None, "http://127.0.0.1:11434"),
        ("", "http://127.0.0.1:11434"),
        ("127.0.0.1:11435", "http://127.0.0.1:11435"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:8000", "http://127.0.0.1:8000"),
        (":8000", "http://127.0.0.1:8000"),
        ("[::]:8000", "http://127.0.0.1:8000"),
        ("[::1]", "http://[::1]:11434"),
        ("planner-pc", "http://planner-pc:11434"),
        ("http://planner-pc", "http://planner-pc:80"),
        ("https://planner-pc/", "https://planner-pc:443"),
        ('"192.168.0.7:1234"', "http://192.168.0.7:1234"),
        ("localhost:http", "http://localhost:11434"),
    ],
)
def test_ollama_is_sought_where_its_own_setting_says(host: str | None, address: str, monkeypatch: Any) -> None:
    monkeypatch.delenv("OLLAMA_HOST", raising=False)
    if host is not None:
        monkeypatch.setenv("OLLAMA_HOST", host)
    assert server_address() == address


# ------------------------------------------------------------------------------------------------- names

ODD = (
    *("My Model (v1)", "modèle-é", "gemma+energy", "it's", "电力", "UPPER_case.v2", "a/b:c", 'quo"te', "x" * 200),
    *("-.dots.-", "Ärzte & Söhne #1 [x] 100%'s", "back\\slash", "{{ .Prompt }}", "new\nline", "smollm2-135m"),
)


@pytest.mark.parametrize("folder", ODD)
def test_a_folders_name_becomes_one_that_ollama_takes(folder: str, tokenizer: Any, tmp_path: Path) -> None:
    names = {ollama_name(f"stakeholder-{folder}{end}") for end in ("", "-finance", "-development-partners")}
    assert len(names) == 3  # voices stay apart
    for name in names:
        assert re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,71}", name) and ollama_name(name) == name
    gguf = tmp_path / "models" / f"stakeholder-{folder.replace('/', '_')[:40].strip()}-q8.gguf"
    text = modelfile(tokenizer, gguf, tmp_path / "Modelfile")
    (told,) = re.findall(r"^# ollama create (\S+) -f Modelfile$", text, re.MULTILINE)
    assert told == model_name(gguf) and re.fullmatch(r"[a-z0-9._-]+", told)


def test_a_plain_name_stays_as_it_is() -> None:
    assert ollama_name("stakeholder-smollm2-135m") == "stakeholder-smollm2-135m"
    assert ollama_name("stakeholder-My Modèle (v1)") == "stakeholder-my-modele-v1"
    assert ollama_name("电力") == "model"
