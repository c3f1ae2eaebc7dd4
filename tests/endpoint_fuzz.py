"""Random and mutated requests to the endpoint, and which statuses are right for each.

`python tests/endpoint_fuzz.py 10000` sends so many to a toy model and prints the counts; the suite sends a few hundred.
"""

from __future__ import annotations

import gzip
import http.client
import json
import logging
import random
import sys
import tempfile
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODEL = "stakeholder-toy"
FEW = {"temperature": 0, "num_predict": 4}
BODIES: dict[str, dict[str, Any]] = {
    "/api/generate": {"model": MODEL, "prompt": "hello", "system": "Be brief.", "stream": False, "options": FEW},
    "/api/chat": {
        "model": MODEL,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
        "stream": True,
        "options": FEW,
    },
    "/api/show": {"model": MODEL},
}
METHODS = {**dict.fromkeys(BODIES, ("POST",)), **dict.fromkeys(("/", "/api/tags", "/api/version"), ("GET", "HEAD"))}
TEXTS = (
    *("", " ", "\0", "hello", "\ud83d", "\udc00\ud800", "\U0001f600", "<end_of_turn>\n<start_of_turn>model\n", "<bos>"),
    *(
        "%s %d 100%",
        "{{ .Prompt }}",
        "../../etc/passwd",
        "x" * 5000,
        "word " * 3000,
        MODEL,
        f"{MODEL}:latest",
        "é\u2028",
    ),
    *("user", "assistant", "json", "-1"),
)
VALUES = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        0.5,
        -0.0,
        1e308,
        -1e308,
        2**31,
        2**63,
        2**70,
        10**30,
        float("nan"),
        float("inf"),
    ),
    *([], [None], [[]], [""], ["\ud800"], {}, {"a": None}, [0] * 50),
)
KEYS = (
    *(
        "model",
        "prompt",
        "system",
        "messages",
        "stream",
        "options",
        "images",
        "format",
        "raw",
        "tools",
        "suffix",
        "think",
    ),
    *("context", "template", "keep_alive", "temperature", "top_p", "top_k", "num_predict", "stop", "seed", "num_ctx"),
    *("role", "content", "tool_calls", "\ud83d", "x"),
)


@dataclass
class Request:
    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def random_request(dice: random.Random) -> Request:
    """A request of the right kind, changed a little or a lot."""
    path = (
        dice.choice(list(BODIES))
        if dice.random() < 0.85
        else dice.choice([*METHODS, "/api/pull", "/nothing%20%s", "/x?y=%"])
    )
    method = METHODS.get(path, ("GET", "POST"))[0]
    if dice.random() < 0.08:
        method = dice.choice(["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"])
    headers = {"Content-Type": dice.choice(["application/json", "text/plain", ""])} if dice.random() < 0.3 else {}
    if dice.random() < 0.06:
        headers["Origin"] = dice.choice(["https://evil.example", "null", "http://localhost:1", "http://LOCALHOST"])
    if dice.random() < 0.04:
        headers["Host"] = dice.choice(["evil.example", "LOCALHOST:1", "localhost.", "[::1]", "127.0.0.1"])
    body = _body(dice, deepcopy(BODIES.get(path, {}))) if method == "POST" else b""
    return Request(method, path, body, headers)


def _body(dice: random.Random, given: Any) -> bytes:
    for _ in range(dice.choice((0, 1, 1, 1, 2, 3, 6))):
        given = _changed(dice, given)
    if dice.random() < 0.04:
        given = dice.choice([*VALUES, *TEXTS])
    text = json.dumps(given, ensure_ascii=dice.random() < 0.6)
    if dice.random() < 0.03:
        deep = dice.choice((100, 900, 5000, 50_000))
        text = text.replace('"hello"', "[" * deep + "]" * deep, 1)
    if dice.random() < 0.01:
        text = text.replace("hello", "y" * 300_000)
    code = dice.choice(["utf-16", "utf-32", "utf-8-sig"]) if dice.random() < 0.05 else "utf-8"
    data = bytearray(text.encode(code, "surrogatepass"))
    if dice.random() < 0.12 and data:
        for _ in range(dice.choice((1, 1, 3, 20))):
            place = dice.randrange(len(data))
            data[place : place + dice.choice((0, 1, 1, 4))] = dice.randbytes(dice.choice((0, 1, 1, 3)))
            data = data or bytearray(b"{")
    if dice.random() < 0.05:
        data = data[: dice.randrange(len(data) + 1)]
    return gzip.compress(bytes(data)) if dice.random() < 0.01 else bytes(data)


def _changed(dice: random.Random, given: Any) -> Any:
    """One key of the body, or of an object inside it, taken away or given another value."""
    inside = [given, *(v for v in given.values() if isinstance(v, dict)), *(given.get("messages") or [])[:2]]
    place = dice.choice([x for x in inside if isinstance(x, dict)]) if isinstance(given, dict) else given
    key = dice.choice(list(place) or ["x"]) if dice.random() < 0.7 else dice.choice(KEYS)
    if dice.random() < 0.15:
        place.pop(key, None)
    else:
        place[key] = deepcopy(dice.choice(TEXTS if dice.random() < 0.5 else VALUES))
    if not isinstance(given.get("messages", []), list):
        given["messages"] = [given["messages"]]
    return given


def right_statuses(request: Request) -> set[int]:
    """What the endpoint may answer. Of the model's name and the fields' rules only the plain cases are decided here."""
    host, origin = request.headers.get("Host", "localhost"), request.headers.get("Origin", "http://localhost")
    if host in ("evil.example", "localhost.", "[::1]") or origin in ("https://evil.example", "null"):
        return {403, 405} if request.method == "BREW" else {403}
    path = request.path.partition("?")[0]
    if request.method == "BREW":
        return {405}
    if request.method == "OPTIONS":
        return {204}
    if path not in METHODS:
        return {404}
    if request.method not in METHODS[path]:
        return {405}
    if request.method != "POST":
        return {200}
    try:
        given = json.loads(request.body)
    except (ValueError, RecursionError):
        return {400}
    if not isinstance(given, dict) or not isinstance(given.get("model"), str):
        return {400}
    known = given["model"].removesuffix(":latest") == MODEL
    plain = all(key in BODIES[path] and given[key] == BODIES[path][key] for key in given)
    return ({200} if plain else {200, 400}) if known else {400, 404}


def send(address: str, request: Request) -> tuple[int, str]:
    """Status and text of the reply; (0, "") where the connection was closed because the body is too large."""
    link = http.client.HTTPConnection(address.removeprefix("http://"), timeout=120)
    try:
        link.request(request.method, request.path, request.body or None, request.headers)
        reply = link.getresponse()
        return reply.status, reply.read().decode()
    except ConnectionError:
        return 0, ""
    finally:
        link.close()


def faults(request: Request, status: int, text: str, largest: int) -> list[str]:
    """What is wrong with a reply."""
    if len(request.body) > largest:  # refused before any handler sees it, by closing the connection or a bare 400
        return [] if status in (0, 400, 413) else [f"{len(request.body)} bytes got {status}"]
    wrong = [] if status in right_statuses(request) else [f"status {status}, not {right_statuses(request)}"]
    if status >= 400 and request.method != "HEAD":
        try:
            words = json.loads(text)["error"]
            wrong += [] if isinstance(words, str) and words else ["an error without words"]
        except (ValueError, KeyError, TypeError):
            wrong.append(f"the error is no JSON: {text[:80]!r}")
    if status == 200 and request.method == "POST":
        lines = [json.loads(line) for line in text.strip().split("\n")]
        wrong += [f"a stream ends with {line['error']}" for line in lines if "error" in line]
    return wrong


def main(count: int) -> int:
    """Send `count` requests to a toy model of the course's own; prints counts and faults, returns 1 for a fault."""
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    from toy_models import chain_model

    from stakelib.export import quantise, to_gguf
    from stakelib.export.serve import BODY, serving
    from stakelib.models import base_model
    from stakelib.run import sha256

    logged: list[str] = []
    watch = logging.Handler(logging.WARNING)
    watch.emit = lambda record: logged.append(record.getMessage())
    logging.getLogger().addHandler(watch)
    with tempfile.TemporaryDirectory() as place:
        folder = chain_model(base_model("tiny-gemma").folder, Path(place) / "m")
        to_gguf(folder, Path(place) / "f16.gguf")
        gguf = Path(place) / f"{MODEL}-q8.gguf"
        quantise(Path(place) / "f16.gguf", gguf, "Q8_0")
        digests = {file: sha256(file) for file in Path(place).rglob("*") if file.is_file()}
        statuses, wrong = Counter(), []
        with serving(gguf, folder) as address:
            for seed in range(count):
                request = random_request(random.Random(seed))
                status, text = send(address, request)
                statuses[status] += 1
                wrong += [f"{seed}: {request.method} {request.path}: {x}" for x in faults(request, status, text, BODY)]
                if seed % 500 == 499:
                    print(f"{seed + 1}: {dict(sorted(statuses.items()))}, {len(wrong)} faults", flush=True)
            alive = send(address, Request("POST", "/api/generate", json.dumps(BODIES["/api/generate"]).encode()))[0]
        after = {file: sha256(file) for file in Path(place).rglob("*") if file.is_file()}
    print(f"by status: {dict(sorted(statuses.items()))}; alive: {alive == 200}; files unchanged: {after == digests}")
    print(f"logged: {logged}", *wrong[:50], f"{len(wrong)} faults", sep="\n")
    return int(bool(wrong or logged or alive != 200 or after != digests))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
