"""The Modelfile wraps a prompt as training did, by Go's own template engine; and Ollama, played by a fake one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from exported import PROMPT

from stakelib.dialogues.check import MAX_COMPLETION, MAX_ROW
from stakelib.export import modelfile, ollama_hop
from stakelib.export.ollama import ANSWER_TOKENS, _template_of, as_trained, rendered_by
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
    """Answers as Ollama's API does; what it says is set on the class."""

    said: dict[str, Any] = {}
    calls: list[tuple[str, str]] = []

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.calls.append((self.command, self.path))
        warm = body and json.loads(body).get("prompt") == ""
        reply = json.dumps(self.said["warm" if warm else self.path]).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply)

    do_GET = do_POST = do_DELETE = answer

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture()
def server(made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fake Ollama that runs the model rightly, and an `ollama` on the PATH that accepts the Modelfile."""
    with engine(made.files["q8"], made.base.folder) as llama:
        ((_, ours),) = llama.ask([PROMPT], max_new_tokens=ANSWER_TOKENS)
    counts = {"prompt_eval_count": ours.prompt_tokens, "eval_count": ours.new_tokens, "eval_duration": 10**9}
    shown = _template_of((made.run.folder / "Modelfile").read_text(encoding="utf-8"))
    FakeOllama.calls = []
    FakeOllama.said = {
        "/api/version": {"version": "0.99.0"},
        "/api/show": {"template": shown},
        "warm": {"load_duration": 5 * 10**8},
        "/api/generate": {"response": " " + ours.text, **counts},
        "/api/delete": {},
    }
    tool = tmp_path / "bin" / "ollama"
    tool.parent.mkdir()
    check = "sys.exit(sys.argv[1] + sys.argv[3] != 'create-f' or not pathlib.Path(sys.argv[4]).exists())"
    tool.write_text(f"#!{sys.executable}\nimport pathlib, sys\n{check}\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent))
    fake = HTTPServer(("127.0.0.1", 0), FakeOllama)
    thread = threading.Thread(target=fake.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{fake.server_port}"
    fake.shutdown()
    fake.server_close()
    thread.join()


@pytest.mark.skipif(os.name == "nt", reason="a script is no program there")
def test_ollama_says_what_llama_cpp_says(made: SimpleNamespace, server: str) -> None:
    found = ollama_hop(made.run, PROMPT, server)
    assert (found["version"], found["same_template"], found["same_tokens"], found["same_text"]) == (
        "0.99.0",
        True,
        True,
        True,
    )
    assert found["load_s"] == 0.5 and found["tokens_per_s"] > 1
    assert FakeOllama.calls[-1] == ("DELETE", "/api/delete")
    FakeOllama.said["/api/generate"] |= {"response": "something else"}
    assert ollama_hop(made.run, PROMPT, server)["same_text"] is False


@pytest.mark.skipif(os.name == "nt", reason="a script is no program there")
def test_an_ollama_that_asks_otherwise_is_refused_and_cleaned(made: SimpleNamespace, server: str) -> None:
    FakeOllama.said["/api/show"] = {"template": "{{ .Prompt }}"}
    FakeOllama.said["/api/generate"] |= {"prompt_eval_count": 3}
    with pytest.raises(CourseError, match="is not the Modelfile's TEMPLATE(.|\n)*Ollama reads 3 prompt tokens"):
        ollama_hop(made.run, PROMPT, server)
    assert FakeOllama.calls[-1] == ("DELETE", "/api/delete")


def test_without_ollama_the_two_commands_are_told(made: SimpleNamespace) -> None:
    found = ollama_hop(made.run, PROMPT, "http://127.0.0.1:9")
    assert found["why"].startswith("no Ollama answers at http://127.0.0.1:9")
    assert found["commands"][0] == "ollama create stakeholder-tiny-gemma -f Modelfile"
    assert found["commands"][1].startswith("ollama run stakeholder-tiny-gemma ")
