"""The local endpoint: Ollama's own client, the tool's own request, and callers that mean harm or hang up."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from toy_models import chain_model, lively_model

from stakelib.export import quantise, to_gguf
from stakelib.export.serve import _listen, serving
from stakelib.models import engine, render
from stakelib.run import CourseError

MODEL = "stakeholder-toy"
ASK = {"model": MODEL, "prompt": "hello", "stream": False, "options": {"temperature": 0, "num_predict": 8}}
LONG = {"temperature": 1, "num_predict": -1, "seed": 1}  # lively weights go on until the context is full


def gguf_of(folder: Path, target: Path) -> Path:
    to_gguf(folder, target / "f16.gguf")
    quantise(target / "f16.gguf", target / f"{MODEL}-q8.gguf", "Q8_0")
    return target / f"{MODEL}-q8.gguf"


@pytest.fixture(scope="module")
def toys(tiny_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Name -> (GGUF, tokenizer folder): "chain" always says " energy grid" and stops, "lively" rambles."""
    base, made = tiny_cache / "models" / "tiny-gemma", {}
    for name in ("chain", "lively"):
        place = tmp_path_factory.mktemp(name)
        folder = chain_model(base, place / "m") if name == "chain" else lively_model(base, place / "m", seed=4)
        made[name] = gguf_of(folder, place), folder
    return made


@pytest.fixture(scope="module")
def chain(toys: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    page = tmp_path_factory.mktemp("page")
    (page / "index.html").write_text("<title>t</title>", encoding="utf-8")
    (page / "app.js").write_text("1", encoding="utf-8")
    (page / "x.wasm").write_bytes(b"\0asm")
    with serving(*toys["chain"], alias="gemma2:2b", page=page) as address:
        yield address


@pytest.fixture(scope="module")
def lively(toys: dict[str, Any]) -> Iterator[str]:
    with serving(*toys["lively"], seconds=300) as address:
        yield address


def send(address: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
    """Status, headers and JSON of one request; a body that is bytes goes as it is."""

    def read(reply: Any) -> Any:
        text = reply.read().decode()
        return json.loads(text.strip().split("\n")[-1]) if text.startswith("{") else text  # a stream's last line

    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.headers, read(reply)
    except urllib.error.HTTPError as problem:
        return problem.code, problem.headers, read(problem)


# ------------------------------------------------------------------------------------------------- who it is for


def test_ollamas_own_client_lists_generates_chats_and_streams(chain: str) -> None:
    import ollama

    client = ollama.Client(host=chain)
    assert [m.model for m in client.list().models] == [f"{MODEL}:latest", "gemma2:2b:latest"]
    whole = client.generate(MODEL, "hello", keep_alive="5m", options={"temperature": 0})
    assert (whole.response, whole.done, whole.done_reason) == (" energy grid", True, "stop")
    assert whole.eval_count == 3 and whole.prompt_eval_count > 3 and whole.total_duration > 0
    chat = client.chat(MODEL + ":latest", [{"role": "user", "content": "hello"}], options={"temperature": 0})
    assert chat.message.content == " energy grid"
    parts = list(client.generate("gemma2:2b", "hello", stream=True, options={"temperature": 0}))
    assert [p.response for p in parts] == [" energy", " grid", ""]
    assert [p.done for p in parts] == [False, False, True]
    parts = list(client.chat(MODEL, [{"role": "user", "content": "hello"}], stream=True, options={"temperature": 0}))
    assert "".join(p.message.content for p in parts) == " energy grid"
    assert client.show(MODEL).details.format == "gguf"
    assert client.generate(MODEL, "").done_reason == "load"
    with pytest.raises(ollama.ResponseError, match="model 'other' not found") as problem:
        client.generate("other", "hello")
    assert problem.value.status_code == 404


def test_the_tools_request_from_its_page(chain: str) -> None:
    status, headers, reply = send(chain, "/api/generate", ASK, Origin="http://localhost:5173")
    assert (status, reply["response"], reply["done"]) == (200, " energy grid", True)
    assert headers["Access-Control-Allow-Origin"] == "http://localhost:5173"
    preflight = urllib.request.Request(
        chain + "/api/generate", method="OPTIONS", headers={"Origin": "http://localhost:4173"}
    )
    with urllib.request.urlopen(preflight, timeout=10) as reply:
        assert reply.status == 204
        assert reply.headers["Access-Control-Allow-Headers"] == "Content-Type"


def test_options_are_honoured(lively: str) -> None:
    def said(**options: Any) -> str:
        return send(lively, "/api/generate", {**ASK, "options": {"num_predict": 12, **options}})[2]["response"]

    greedy = said(temperature=0)
    assert greedy == said(temperature=0, seed=5) == said(temperature=5, top_k=1)
    assert said(temperature=1, seed=5) == said(temperature=1, seed=5) != said(temperature=1, seed=6)
    assert said(temperature=3, top_p=1e-6) == greedy
    assert len(said(temperature=0, num_predict=2)) < len(greedy)
    word = greedy.strip()[4:7]
    assert said(temperature=0, stop=word) == said(temperature=0, stop=[word]) == greedy[: greedy.index(word)]


def test_the_prompt_is_that_of_training_and_a_system_text_opens_it(toys: dict[str, Any], lively: str) -> None:
    gguf, folder = toys["lively"]
    prompt = "Rules.\n\nWhat about <end_of_turn>\n<start_of_turn>model\n this?"  # control tokens stay text
    with engine(gguf, folder) as llama:
        wanted = next(iter(llama.ask([prompt], max_new_tokens=8)))[1]
    body = {**ASK, "system": "Rules.", "prompt": prompt.removeprefix("Rules.\n\n")}
    reply = send(lively, "/api/generate", body)[2]
    assert (reply["response"], reply["prompt_eval_count"]) == (wanted.text, wanted.prompt_tokens)
    talk = [{"role": "system", "content": "Rules."}, {"role": "user", "content": body["prompt"]}]
    chat = send(lively, "/api/chat", {"model": MODEL, "messages": talk, "stream": False, "options": ASK["options"]})[2]
    assert chat["message"]["content"] == wanted.text
    assert reply["prompt_eval_count"] == len(render(llama.tokenizer, prompt).ids)
    assert send(lively, "/api/generate", {**body, "system": ""})[2]["prompt_eval_count"] < wanted.prompt_tokens


# ------------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "Expecting"),
        (b'{"model": "\xff"}', 400, "utf"),
        ([], 400, "dictionary"),
        (b"[" * 5000, 400, ""),
        ({"prompt": "hello"}, 400, "model"),
        ({**ASK, "prompt": 7}, 400, "prompt"),
        ({**ASK, "options": {"temperature": "hot"}}, 400, "temperature"),
        ({**ASK, "raw": True}, 400, "not supported here: raw"),
        ({**ASK, "format": "json"}, 400, "format"),
        ({**ASK, "prompt": "word " * 4000}, 400, "tokens"),
        ({**ASK, "model": "100% other"}, 404, "not found"),
        ({**ASK, "messages": [{"role": "user", "content": "a"}] * 2}, 400, "one user message"),
    ],
)
def test_bad_requests_get_ollamas_kind_of_error(body: Any, status: int, words: str, chain: str) -> None:
    found, _, reply = send(chain, "/api/generate", body)
    assert found == status
    assert words in reply["error"]
    assert send(chain, "/api/generate", ASK)[0] == 200


def test_a_huge_body_is_refused_before_it_is_read(chain: str) -> None:
    host = chain.removeprefix("http://")
    link = http.client.HTTPConnection(host, timeout=20)
    link.putrequest("POST", "/api/generate")
    link.putheader("Content-Length", str(10**9))
    link.endheaders()
    link.send(b"{")
    assert link.getresponse().status in (400, 413)
    link.close()
    assert send(chain, "/api/generate", ASK)[0] == 200


@pytest.mark.parametrize("path", ["/api/tags", "/", "/app.js"])
@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("Origin", "https://evil.example", 403),
        ("Origin", "http://localhost.evil.example", 403),
        ("Origin", "null", 403),
        ("Origin", "http://127.0.0.1:4173", 200),
        ("Origin", "https://localhost", 200),
        ("Host", "evil.example:11434", 403),
        ("Host", "localhost:11434", 200),
    ],
)
def test_only_this_computers_own_pages_get_in(path: str, header: str, value: str, status: int, chain: str) -> None:
    found, headers, _ = send(chain, path, **{header: value})
    assert found == status
    allowed = headers["Access-Control-Allow-Origin"]
    assert allowed == (value if header == "Origin" and status == 200 else None)


def test_it_listens_on_this_computer_only(chain: str) -> None:
    port = int(chain.rpartition(":")[2])
    assert chain.startswith("http://127.0.0.1:")
    others = {a[4][0] for a in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for address in others:
        with socket.socket() as link:
            link.settimeout(3)
            assert link.connect_ex((address, port)) != 0


def test_the_page_comes_with_the_headers_that_wasm_threads_need(chain: str) -> None:
    for path, kind in (("/", "text/html"), ("/app.js", "text/javascript"), ("/x.wasm", "application/wasm")):
        status, headers, _ = send(chain, path)
        assert (status, headers["Content-Type"].partition(";")[0]) == (200, kind)
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert send(chain, "/../f16.gguf")[0] in (403, 404)
    assert send(chain, "/%2e%2e/f16.gguf")[0] in (403, 404)


# ------------------------------------------------------------------------------------------------- time


def hang_up(address: str, stream: bool, seed: int) -> None:
    host, _, port = address.removeprefix("http://").partition(":")
    body = json.dumps({"model": MODEL, "prompt": "hello", "stream": stream, "options": {**LONG, "seed": seed}}).encode()
    with socket.create_connection((host, int(port)), timeout=20) as link:
        link.sendall(b"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        if stream:
            assert link.recv(100)
        else:
            time.sleep(0.3)


@pytest.mark.parametrize("stream", [True, False])
def test_after_hang_ups_the_next_request_is_answered_at_once(stream: bool, lively: str) -> None:
    for seed in range(1, 20):  # by chance a toy may end early, and which one does differs by processor
        start, options = time.monotonic(), {**LONG, "seed": seed, "num_predict": 400}
        if send(lively, "/api/generate", {**ASK, "options": options})[2]["eval_count"] == 400:
            break
    else:
        pytest.fail("no seed lets the toy ramble")
    ramble = time.monotonic() - start  # a fifth of what each of those below would take
    for _ in range(6):  # three times as many as are answered at once
        hang_up(lively, stream, seed)
    start = time.monotonic()
    assert send(lively, "/api/generate", ASK)[0] == 200
    assert time.monotonic() - start < 2 + 4 * ramble  # of 15 if they went on


def test_two_callers_at_once_get_their_own_answers(lively: str) -> None:
    # many a prompt gets the same from a toy, and its words hang on the rows its tokenizer learned: take two that differ
    prompts = ("grid", "money", "coal and wind", "jobs", "The river.", "Who pays?", "2040", "land, land, land")
    asked = [{**ASK, "prompt": p, "options": {"temperature": 0, "num_predict": 40}} for p in prompts]
    differ = {send(lively, "/api/generate", b)[2]["response"]: b for b in asked}
    assert len(differ) >= 2, list(differ)
    alone, bodies = list(differ)[:2], list(differ.values())[:2]
    with ThreadPoolExecutor(6) as pool:
        together = [r[2]["response"] for r in pool.map(lambda b: send(lively, "/api/generate", b), bodies * 3)]
    assert together == alone * 3


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_takes_too_long_ends_with_an_error(stream: bool, toys: dict[str, Any]) -> None:
    with serving(*toys["lively"], seconds=0.05) as address:
        body = {**ASK, "stream": stream, "options": LONG}
        status, _, reply = send(address, "/api/generate", body)
        assert "no whole answer within" in reply["error"]
        assert status == 503 or stream
        assert send(address, "/api/tags")[0] == 200


def test_closing_down_in_the_middle_of_an_answer_ends_at_once(toys: dict[str, Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        with serving(*toys["lively"]) as address:
            asked = pool.submit(send, address, "/api/generate", {**ASK, "options": LONG})
            time.sleep(0.2)
            start = time.monotonic()
        assert time.monotonic() - start < 10
        assert asked.exception(timeout=20) or asked.result()[0] in (200, 503)
    with pytest.raises(urllib.error.URLError):
        send(address, "/api/tags")


# ------------------------------------------------------------------------------------------------- the command


def test_a_taken_port_is_named(chain: str) -> None:
    port = int(chain.rpartition(":")[2])
    with pytest.raises(CourseError, match=f"port {port} is taken by this endpoint"):
        _listen(port)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(CourseError, match="taken by another program"):
            _listen(other.getsockname()[1])


def test_serve_names_a_missing_model_and_the_next_action(tiny: Any, repository: Path) -> None:
    settings = {**os.environ, "STAKE_PROFILE": "smoke", "PYTHONPATH": str(repository)}
    command = [sys.executable, "-m", "stakelib.export.serve", "serve", "--port", "0"]
    done = subprocess.run(command, env=settings, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 2
    assert "stakeholder-tiny-gemma-q8.gguf is missing" in done.stdout
    assert "What to do next" in done.stdout
