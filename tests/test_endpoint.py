"""The local endpoint: Ollama's own client, the tool's own request, and callers that mean harm or hang up."""

from __future__ import annotations

import http.client
import json
import logging
import os
import random
import shutil
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

import endpoint_fuzz
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_models import chain_model, lively_model

from stakelib.evaluation.tool import ask_as_tool
from stakelib.export import quantise, to_gguf
from stakelib.export.serve import BODY, _listen, serving
from stakelib.models import engine, engines, render
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
        allowed = {name.strip().lower() for name in reply.headers["Access-Control-Allow-Headers"].split(",")}
        assert {"content-type", "accept", "user-agent"} <= allowed  # what Ollama's JavaScript client sends


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
        ([], 400, "object"),
        (b"[" * 5000, 400, ""),
        ({"prompt": "hello"}, 400, "model"),
        ({**ASK, "prompt": 7}, 400, "prompt"),
        ({**ASK, "options": {"temperature": "hot"}}, 400, "temperature"),
        ({**ASK, "raw": True}, 400, "not supported here: raw"),
        ({**ASK, "format": "json"}, 400, "format"),
        ({**ASK, "prompt": "word " * 4000}, 400, "tokens"),
        ({**ASK, "model": "100% other %s"}, 404, "model '100% other %s' not found"),
        ({**ASK, "options": {"stop": "50%", "top_p": "50%%"}}, 400, "options.top_p"),
        ({**ASK, "options": {"stop": [None]}}, 400, "options.stop"),
        ({**ASK, "model": None}, 400, "model"),
        (b'{"model": "stakeholder-toy", "options": {"temperature": NaN}}', 400, "NaN"),
        ({**ASK, "options": {"top_k": 2**70}}, 400, "top_k"),
        ({**ASK, "images": ["aGk="]}, 400, "not supported here: images"),
        ({**ASK, "messages": [{"role": "user", "content": "a", "images": ["aGk="]}]}, 400, "here: messages.images"),
        ({**ASK, "messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, 400, "messages.tool_calls"),
        ({**ASK, "messages": [{"role": "user", "content": "a"}] * 2}, 400, "one user message"),
    ],
)
def test_bad_requests_get_ollamas_kind_of_error(body: Any, status: int, words: str, chain: str) -> None:
    found, _, reply = send(chain, "/api/generate", body)
    assert found == status
    assert words in reply["error"]
    assert send(chain, "/api/generate", ASK)[0] == 200


@pytest.mark.parametrize(
    "given",
    [
        *(
            {key: None}
            for key in ("options", "system", "stream", "messages", "prompt", "format", "think", "keep_alive")
        ),
        *({"options": {**ASK["options"], key: None}} for key in ("temperature", "stop", "seed", "top_p", "top_k")),
        {"options": {"num_predict": None, "temperature": 0}},
        *({"options": {**ASK["options"], "stop": stop}} for stop in ("", [""], [], ["", "never said"])),
        *({"images": [], "context": [], "tools": []}, {"raw": False, "suffix": "", "template": ""}),
        {"messages": [{"role": "user", "content": "a", "images": None}, None][:1]},
    ],
    ids=str,
)
def test_null_and_empty_count_as_not_given(given: dict[str, Any], chain: str) -> None:
    status, _, reply = send(chain, "/api/generate", {**ASK, **given})
    assert status == 200, reply
    if "prompt" in given:
        assert reply["done_reason"] == "load"
    elif "stream" in given:
        assert (reply["response"], reply["done_reason"]) == ("", "stop")  # the last line: without a word it streams
    else:
        assert reply["response"] == " energy grid"


@pytest.mark.parametrize("half", ["\ud83d hello", "hello \udc00", "\udc00\ud800", "a\ud83d"])
def test_half_an_emoji_is_read_as_the_mark_for_no_letter(half: str, chain: str) -> None:
    whole = "".join("\ufffd" if "\ud800" <= letter <= "\udfff" else letter for letter in half)
    options = {**ASK["options"], "stop": [half]}
    for field in ("prompt", "system"):
        replies = [send(chain, "/api/generate", {**ASK, "options": options, field: text}) for text in (half, whole)]
        assert [status for status, *_ in replies] == [200, 200]
        assert replies[0][2]["prompt_eval_count"] == replies[1][2]["prompt_eval_count"]
    talk = [{"role": "user", "content": half}]
    assert send(chain, "/api/chat", {"model": MODEL, "messages": talk, "stream": False})[0] == 200
    assert send(chain, "/api/generate", {**ASK, "model": half})[0] == 404
    assert send(chain, "/api/generate", {**ASK, "prompt": "\U0001f600"})[0] == 200  # a whole pair stays


@pytest.mark.parametrize("served", ["chain", "lively"])  # with a page and without
def test_wrong_methods_and_paths_are_told(served: str, request: pytest.FixtureRequest) -> None:
    address = request.getfixturevalue(served)
    for path, good in (("tags", "GET"), ("version", "GET"), ("generate", "POST"), ("chat", "POST"), ("show", "POST")):
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
            if method != good:
                status, reply = by(address, method, f"/api/{path}")
                assert (status, bool(json.loads(reply)["error"])) == (405, True), (method, path)
        assert by(address, "HEAD", f"/api/{path}") == (200 if good == "GET" else 405, "")
    for path in ("/api/pull", "/api/", "/api/generate/x", "/nothing%20%s"):
        status, reply = by(address, "GET", path)
        assert (status, bool(json.loads(reply)["error"])) == (404, True), path


def by(address: str, method: str, path: str) -> tuple[int, str]:
    link = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    link.request(method, path)
    reply = link.getresponse()
    status, text = reply.status, reply.read().decode()
    link.close()
    return status, text


def test_without_a_page_it_says_what_ollama_says(chain: str, lively: str) -> None:
    assert by(lively, "GET", "/") == (200, "Ollama is running")
    assert by(lively, "HEAD", "/") == (200, "")
    assert by(chain, "GET", "/") == (200, "<title>t</title>")
    assert by(chain, "HEAD", "/") == (200, "")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_whatever_comes_gets_a_right_status_and_words(seed: int, chain: str, toys: Any, caplog: Any) -> None:
    asked = endpoint_fuzz.random_request(random.Random(seed))
    if asked.path in ("/", "/x?y=%"):
        asked.path = "/api/tags"  # `chain` serves a page there
    caplog.clear()
    files = {file: file.stat().st_mtime_ns for file in toys["chain"][0].parent.rglob("*")}
    status, text = endpoint_fuzz.send(chain, asked)
    assert endpoint_fuzz.faults(asked, status, text, BODY) == [], asked
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []  # it would be on the screen
    assert files == {file: file.stat().st_mtime_ns for file in toys["chain"][0].parent.rglob("*")}


def test_the_rules_of_the_fuzzing_can_fail() -> None:
    good = endpoint_fuzz.Request("POST", "/api/show", json.dumps({"model": MODEL}).encode())
    assert endpoint_fuzz.faults(good, 200, "{}", BODY) == []
    assert endpoint_fuzz.faults(good, 500, '{"error": "x"}', BODY) != []
    assert endpoint_fuzz.faults(endpoint_fuzz.Request("POST", "/api/show", b"{"), 400, "<html>", BODY) != []
    assert endpoint_fuzz.faults(endpoint_fuzz.Request("GET", "/api/show"), 200, "{}", BODY) != []


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
        ("Host", "LOCALHOST:11434", 200),
        ("Host", "localhost.evil.example", 403),
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


# ------------------------------------------------------------------------------------------------- ports


def listening() -> set[int]:
    """TCP ports on which this process and its children listen."""
    here = psutil.Process()
    links = [link for process in (here, *here.children(recursive=True)) for link in process.net_connections("tcp")]
    return {link.laddr.port for link in links if link.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("sockets", [True, False], ids=["unix socket", "port"])
def test_no_port_of_serve_answers_strangers(sockets: bool, toys: dict[str, Any], monkeypatch: Any) -> None:
    if sockets and not hasattr(socket, "AF_UNIX"):
        pytest.skip("Python has no Unix sockets here")
    if not sockets:
        monkeypatch.setattr(engines, "LONGEST_SOCKET", 0)
    before = listening()
    with serving(*toys["chain"]) as address:
        ports = listening() - before
        assert int(address.rpartition(":")[2]) in ports
        assert len(ports) == (1 if sockets else 2)  # Windows: llama.cpp's own too, which wants a key
        for port in ports:
            for path in ("/", "/api/tags", "/api/version", "/health", "/v1/models", "/props", "/slots"):
                for header, value in (("Origin", "https://evil.example"), ("Host", "evil.example")):
                    assert send(f"http://127.0.0.1:{port}", path, **{header: value})[0] in (401, 403, 404)
    assert listening() == before


def test_a_port_is_free_again_after_a_model_that_cannot_be_loaded(toys: dict[str, Any], tmp_path: Path) -> None:
    bad = tmp_path / f"{MODEL}-q8.gguf"
    bad.write_bytes(b"GGUF, but no model")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for _ in range(2):
        with pytest.raises(CourseError, match="cannot load"), serving(bad, toys["chain"][1], port):
            pass
    with serving(*toys["chain"], port) as address:
        assert send(address, "/api/tags")[0] == 200


def test_an_endpoint_that_fails_to_start_says_so(toys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no more file handles")

    monkeypatch.setattr("stakelib.export.serve.HTTPServer", broken)
    before = listening()
    with pytest.raises(CourseError, match="no more file handles"), serving(*toys["chain"]):
        pass
    assert listening() == before


def test_a_proxy_is_passed_by(chain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody is there
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert ask_as_tool(chain, MODEL, "hello", temperature=0)["response"] == " energy grid"
    with pytest.raises(CourseError, match="taken by this endpoint"):
        _listen(int(chain.rpartition(":")[2]))


def test_models_are_served_under_names_that_ollama_takes(toys: dict[str, Any], tmp_path: Path) -> None:
    odd = tmp_path / "stakeholder-My Modèle (v1)-q8.gguf"
    shutil.copyfile(toys["chain"][0], odd)
    with serving(odd, toys["chain"][1], alias="gemma2:latest") as address:
        names = [model["name"] for model in send(address, "/api/tags")[2]["models"]]
        assert names == ["stakeholder-my-modele-v1:latest", "gemma2:latest"]
        for name in (*names, "gemma2"):
            assert send(address, "/api/generate", {**ASK, "model": name})[0] == 200


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
