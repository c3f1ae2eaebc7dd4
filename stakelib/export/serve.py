"""`course.py serve`: the tuned model for the Scenario Dialogue Tool, and the browser page, until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application

from stakelib.export import ensure_base_gguf, gguf_file
from stakelib.export.adapter_files import nine_files
from stakelib.export.endpoint import CONTEXT, Api, Facts, NotHere, Page, Running
from stakelib.export.local_http import call_json
from stakelib.export.ollama import PORT, model_name, ollama_name
from stakelib.models import base_model
from stakelib.models.engines import LlamaCpp
from stakelib.run import CourseError, Run, as_folder, sha256

CALLERS = 2  # answers written at once; others wait
BODY, SECONDS = 256 * 1024, 120.0  # largest request in bytes; longest that an answer may take


@contextlib.contextmanager
def serving(
    gguf: Path,
    tokenizer: Path,
    port: int = 0,
    *,
    alias: str = "",
    page: Path | None = None,
    seconds: float = SECONDS,
    adapters: Mapping[str, Path] | None = None,
) -> Iterator[str]:
    """Serve the model in `gguf` on 127.0.0.1 while the context lasts; yields the address once it is warm.

    The model's name is that of the file without its quantisation, as `model_name` writes it; `alias` is a second one.
    `adapters`: GGUF adapters by model name: each answers under its own, and `alias` then means the first of them.
    `tokenizer`: the base model's folder, whose template wraps each prompt as in training. `port` 0 takes a free one.
    `page`: a folder to serve at /. An answer ends with an error after `seconds`. Raises CourseError where the port is
    taken or the model cannot be loaded; the port is free again then.
    """
    up, halt, failures = threading.Event(), threading.Event(), []
    files = {ollama_name(name): file for name, file in (adapters or {}).items()}
    names = {model_name(gguf): None, **{name: name for name in files}}
    names |= {alias.removesuffix(":latest"): next(iter(files), None)} if alias else {}

    def answer() -> None:
        try:
            asyncio.run(_loop(routes, sockets, pool, up, halt))
        except BaseException as problem:  # whatever ended it: nobody would wait for it in vain
            failures.append(problem)
        finally:
            up.set()

    with contextlib.ExitStack() as stack:
        sockets = _listen(port)
        for each in sockets:
            stack.callback(each.close)
        llama = stack.enter_context(LlamaCpp(gguf, tokenizer, CALLERS, CONTEXT, files))
        pool = stack.enter_context(ThreadPoolExecutor(CALLERS))
        about = {"llama": llama, "names": names, "pool": pool, "seconds": seconds, "halt": halt}
        routes: list[Any] = [(r"/api/(tags|version)", Facts, about), (r"/api/(show|generate|chat)", Api, about)]
        routes.append((r"/", Running))
        if page:
            routes[-1] = (r"/(.*)", Page, {"path": str(page), "default_filename": "index.html"})
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        up.wait()
        try:
            if failures:
                raise CourseError(f"the endpoint did not start: {failures[0]}", "try another port with --port")
            yield f"http://127.0.0.1:{sockets[0].getsockname()[1]}"
        finally:
            halt.set()
            thread.join()


def page_is_of(page: Path, gguf: Path) -> bool:
    """True if the folder `page` was made for exactly the file `gguf`."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((page / "prompts.json").read_text(encoding="utf-8"))["sha256"] == sha256(gguf)
    return False


def _named(gguf: Path, adapters: Mapping[str, Path]) -> str:
    names = ", ".join(f"'{ollama_name(name)}'" for name in adapters)
    return f"models {names}" if names else f"model '{model_name(gguf)}'"


async def _loop(
    routes: list[Any], sockets: list[Any], pool: ThreadPoolExecutor, up: threading.Event, halt: threading.Event
) -> None:
    app = Application(routes, log_function=lambda _: None, default_handler_class=NotHere)
    server = HTTPServer(app, max_body_size=BODY, body_timeout=10, idle_connection_timeout=60)
    server.add_sockets(sockets)
    up.set()
    while not halt.is_set():
        await asyncio.sleep(0.05)
    server.stop()
    await asyncio.to_thread(pool.shutdown)  # answers under way stop at their next token
    await server.close_all_connections()


def _listen(port: int) -> list[Any]:
    try:
        return bind_sockets(port, "127.0.0.1")
    except OSError as problem:
        who = "another program"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            version = call_json(f"http://127.0.0.1:{port}/api/version", timeout=2)["version"]
            who = "this endpoint, started before" if "stakelib" in version else f"Ollama {version}"
        action = "quit that program, or choose another port with --port (and name it in the tool's ollamaUrl)"
        if who.startswith("Ollama"):
            action = f"use Ollama itself (`ollama create` with the run's Modelfile); or {action}"
        raise CourseError(f"port {port} is taken by {who} ({problem.strerror})", action) from None


def main() -> int:
    """Load, warm up, say so, answer until Ctrl-C; returns the exit code."""
    parser = argparse.ArgumentParser(prog="course.py")
    parser.add_argument("command", choices=("serve",))
    parser.add_argument("--out", type=as_folder, help="run folder (default: runs/<profile>)")
    parser.add_argument("--port", type=int, default=PORT, help="default: %(default)s, Ollama's own")
    parser.add_argument("--alias", default="", help="a second name, as in gemma2:2b, the tool's default")
    parser.add_argument("--voices", action="store_true", help="the nine adapters of notebook 07, each by its own name")
    options = parser.parse_args()
    try:
        run = _opened(options.out)
        base, page = base_model(run.profile.model), run.folder / "page"
        tuned = gguf_file(run, "q8")
        adapters = {file.stem: file for file in nine_files(run).values()} if options.voices else {}
        gguf = ensure_base_gguf(base)["q8"] if adapters else tuned
        if not gguf.exists():
            raise CourseError(f"{gguf} is missing", "run the course up to notebook 05, or name another run with --out")
        print(f"Loading {gguf.name} ...", flush=True)
        shown = page if page_is_of(page, tuned) else None
        missing = "The page in page/ is of another model: notebook 08 makes it again."
        missing = missing if page.exists() else "No page yet: notebook 08 makes it."
        with serving(gguf, base.folder, options.port, alias=options.alias, page=shown, adapters=adapters) as address:
            print(f"Ready: {_named(gguf, adapters)} at {address}, for programs of this computer only.")
            print(f"The page: {address}/" if shown else missing)
            print("To stop: Ctrl-C", flush=True)
            while True:
                time.sleep(1)
    except CourseError as problem:
        print(f"\n{problem}", flush=True)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", flush=True)
        return 0


def _opened(out: Path | None) -> Run:
    """The run; a folder that --out names says itself which profile and model made it."""
    made_with = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        made_with = json.loads((out / "run.json").read_text(encoding="utf-8"))["profile"]
    return Run.open(out, made_with.get("name"), made_with.get("model"))


if __name__ == "__main__":
    sys.exit(main())
