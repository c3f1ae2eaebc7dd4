"""A local endpoint with the part of Ollama's API that the Scenario Dialogue Tool uses; it also serves the page.

A stand-in for a laptop without Ollama, not a server: one model, two callers at a time, this computer only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from tornado.web import HTTPError, RequestHandler, StaticFileHandler

from stakelib import __version__
from stakelib.models import render

CONTEXT = 2048  # tokens of prompt and answer together, as in the Modelfile
HOST = re.compile(r"(?:localhost|127\.0\.0\.1)(?::\d+)?", re.IGNORECASE)
ORIGIN = re.compile("https?://" + HOST.pattern, re.IGNORECASE)
HEADERS = "Authorization, Content-Type, User-Agent, Accept, X-Requested-With"  # those that Ollama's clients may send
NOT_HERE = ("raw", "format", "images", "tools", "suffix", "template", "context", "think")
NOT_IN_MESSAGES = ("images", "tool_calls")
LARGEST = 2**31 - 1  # of llama.cpp's whole numbers
KINDS = {".js": "text/javascript", ".wasm": "application/wasm"}  # Windows may say otherwise, and a browser then refuses


def _valid_unicode(value: Any) -> Any:
    """Text with U+FFFD for half a surrogate pair, which JavaScript's slice leaves of an emoji; as Ollama does."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else value


def _stops(value: Any) -> Any:
    """A list without empty texts: the answer would stop at once."""
    listed = [value] if isinstance(value, str) else value
    return [item for item in listed if item != ""] if isinstance(listed, list) else value


Text = Annotated[str, BeforeValidator(_valid_unicode)]


class Options(BaseModel):
    """Ollama's options that are honoured, with the Modelfile's values; others are passed over, as Ollama does."""

    temperature: float = Field(0.7, ge=0, le=10)
    top_p: float = Field(0.9, gt=0, le=1)
    top_k: int = Field(40, ge=0, le=LARGEST)
    num_predict: int = Field(400, ge=-2)
    stop: Annotated[list[Text], BeforeValidator(_stops)] = []
    seed: int | None = None


class Message(BaseModel):
    role: Literal["system", "user"]
    content: Text


class Ask(BaseModel):
    """The body of /api/generate or /api/chat; `keep_alive` is accepted, the model stays loaded anyway."""

    model: Text
    prompt: Text = ""
    system: Text = ""
    messages: list[Message] = []
    stream: bool = True
    options: Options = Options()

    def turn(self) -> str:
        """The one user turn; a system text opens it, as in the Modelfile. Raises ValueError for a longer talk."""
        if [m.role for m in self.messages] not in ([], ["user"], ["system", "user"]):
            raise ValueError("give one user message, with at most one system message before it")
        texts = [m.content for m in self.messages] or [self.system, self.prompt]
        return "\n\n".join(filter(None, texts))


def name_of(ask: Ask) -> str:
    """The name of the model that is asked, without the tag that Ollama adds."""
    return ask.model.removesuffix(":latest")


def read_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a request without what is null: that counts as not given, as in Ollama.

    Raises ValueError for anything else, RecursionError for one that is nested too deeply.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    given = json.loads(
        body,
        object_pairs_hook=lambda pairs: {key: value for key, value in pairs if value is not None},
        parse_constant=refuse,  # NaN and Infinity, which only Python reads
    )
    if not isinstance(given, dict):
        raise ValueError("the body must be a JSON object")
    return given


def in_words(problem: Exception) -> str:
    """What is wrong with a request, one field after the other."""
    if not isinstance(problem, ValidationError):
        return str(problem) or "the JSON is nested too deeply"
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in problem.errors(include_input=False))


class Refused(HTTPError):
    """An error for the caller: its status and its words. (Tornado's own would double the percent signs in them.)"""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(status, "%s", words)
        self.words = words


class Guarded(RequestHandler):
    """Only for programs and pages of this computer: a foreign Host (DNS rebinding) or Origin gets 403."""

    def set_default_headers(self) -> None:
        origin = self.request.headers.get("Origin", "")
        if ORIGIN.fullmatch(origin):
            self.set_header("Access-Control-Allow-Origin", origin)
            self.set_header("Access-Control-Allow-Headers", HEADERS)
            self.set_header("Access-Control-Allow-Methods", "GET, HEAD, POST, OPTIONS")
            self.set_header("Vary", "Origin")

    def prepare(self) -> None:
        origin = self.request.headers.get("Origin")
        if not HOST.fullmatch(self.request.host) or not (origin is None or ORIGIN.fullmatch(origin)):
            raise Refused(403, "this endpoint answers its own computer only")

    def options(self, *_: str) -> None:
        self.set_status(204)

    def log_exception(self, kind: Any, value: Any, trace: Any) -> None:
        if not isinstance(value, HTTPError):  # the caller was told; the screen may be a notebook
            super().log_exception(kind, value, trace)

    def write_error(self, status_code: int, exc_info: Any = (None, None), **_: Any) -> None:
        self.finish({"error": getattr(exc_info[1], "words", None) or self._reason})


class Running(Guarded):
    """/ where no page is served: what Ollama answers there, which some programs look for."""

    def get(self) -> None:
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish("Ollama is running")

    head = get


class NotHere(Guarded):
    """Every other path: 404, whatever the method."""

    def prepare(self) -> None:
        super().prepare()
        if self.request.method != "OPTIONS":
            raise Refused(404, f"{self.request.path} not found")


class Page(Guarded, StaticFileHandler):
    """The browser page; the two isolation headers let WebAssembly use several threads."""

    def set_extra_headers(self, path: str) -> None:
        self.set_header("Cross-Origin-Opener-Policy", "same-origin")
        self.set_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.set_header("Cache-Control", "no-cache")

    def compute_etag(self) -> None:
        """None: tornado would hash each file for one, and log that the model is too large for that."""

    def get_content_type(self) -> str:
        return KINDS.get(Path(self.absolute_path).suffix) or super().get_content_type()


class Facts(Guarded):
    """GET and HEAD: tags, version. `about` (see serve.py) is the same for every request."""

    def initialize(self, **about: Any) -> None:
        self.about, self.llama = about, about["llama"]

    def get(self, what: str) -> None:
        if what == "version":
            return self.finish({"version": f"0.0.0-stakelib-{__version__}"})
        file = self.llama.gguf.stat()
        changed = datetime.fromtimestamp(file.st_mtime, UTC).isoformat()
        facts = {"modified_at": changed, "size": file.st_size, "digest": "", "details": {"format": "gguf"}}
        names = [f"{name}:latest" for name in self.about["names"]]
        return self.finish({"models": [{"name": name, "model": name, **facts} for name in names]})

    head = get


class Api(Guarded):
    """POST: generate, chat, show. `about` (see serve.py) is the same for every request."""

    gone = False  # the caller hung up

    def initialize(self, **about: Any) -> None:
        self.about, self.llama = about, about["llama"]

    def on_connection_close(self) -> None:
        self.gone = True

    async def post(self, what: str) -> None:
        try:
            body = read_body(self.request.body)
            ask = Ask.model_validate(body)
            refused = [key for key in NOT_HERE if body.get(key)]  # never answer something else than was asked
            refused += [
                f"messages.{key}" for key in NOT_IN_MESSAGES if any(m.get(key) for m in body.get("messages", ()))
            ]
            if refused:
                raise ValueError(f"not supported here: {', '.join(refused)}")
            ids = render(self.llama.tokenizer, ask.turn()).ids
            if len(ids) >= CONTEXT:
                raise ValueError(f"the prompt has {len(ids)} tokens; with the answer {CONTEXT} are the limit")
        except (ValueError, RecursionError) as problem:  # pydantic's and JSON's errors are ValueErrors
            raise Refused(400, in_words(problem)) from None
        if name_of(ask) not in self.about["names"]:
            raise Refused(404, f"model '{ask.model}' not found")
        if what == "show":
            return self.finish({"details": {"format": "gguf"}, "model_info": {}, "capabilities": ["completion"]})
        if not ask.turn():  # an empty prompt asks Ollama to load the model, no more
            return self.say(what, ask, "", done_reason="load")
        try:
            await self.answer(what, ask, ids)
        except Refused as problem:
            if not self._headers_written:
                raise
            self.finish(json.dumps({"error": problem.words}) + "\n")  # within a stream, as Ollama does

    def say(self, what: str, ask: Ask, text: str, **end: Any) -> None:
        """One line in Ollama's form; `end` makes it the last."""
        words = {"response": text} if what == "generate" else {"message": {"role": "assistant", "content": text}}
        now = datetime.now(UTC).isoformat()
        self.set_header("Content-Type", "application/x-ndjson" if ask.stream else "application/json")
        self.write(json.dumps({"model": ask.model, "created_at": now, **words, "done": bool(end), **end}) + "\n")
        self.finish() if end else self.flush()

    async def answer(self, what: str, ask: Ask, ids: list[int]) -> None:
        """Write the answer as it comes, or whole; nothing more once the caller is gone."""
        start, parts, last = time.monotonic(), [], {}
        async for last in self.chunks(ids, ask.options, self.about["names"][name_of(ask)]):
            parts.append(last["choices"][0]["text"])
            if ask.stream and parts[-1]:
                self.say(what, ask, parts[-1])
        if self.gone:
            return
        times, usage = last["timings"], last["usage"]
        self.say(
            what,
            ask,
            "" if ask.stream else "".join(parts),
            done_reason=last["choices"][0]["finish_reason"],
            total_duration=round((time.monotonic() - start) * 1e9),
            load_duration=0,
            prompt_eval_count=usage["prompt_tokens"],
            prompt_eval_duration=round(times["prompt_ms"] * 1e6),
            eval_count=usage["completion_tokens"],
            eval_duration=round(times["predicted_ms"] * 1e6),
        )

    async def chunks(self, ids: list[int], options: Options, voice: str | None) -> AsyncIterator[dict[str, Any]]:
        """What llama.cpp writes, `voice` being the adapter that speaks, if any.

        It stops at the next token once the caller is gone, time is up or we close down.
        """
        queue: asyncio.Queue[Any] = asyncio.Queue()
        loop, until = asyncio.get_running_loop(), time.monotonic() + self.about["seconds"]
        new = options.num_predict if options.num_predict >= 0 else CONTEXT
        settings = options.model_dump(exclude={"num_predict"}, exclude_none=True) | {
            "prompt": ids,
            "n_predict": min(new, CONTEXT - len(ids)),
            "stream": True,
            "cache_prompt": False,
            "min_p": 0.0,
            **self.llama.lora(voice),
        }

        def each(chunk: dict[str, Any]) -> bool:
            loop.call_soon_threadsafe(queue.put_nowait, chunk)
            return self.gone or self.about["halt"].is_set() or time.monotonic() > until

        def work() -> None:
            if not (self.gone or self.about["halt"].is_set()):  # it may have waited long for its turn
                self.llama.server.handle_completions(settings, each)

        job = loop.run_in_executor(self.about["pool"], work)
        job.add_done_callback(lambda _: queue.put_nowait(job.exception() and {"error": str(job.exception())}))
        with contextlib.suppress(TimeoutError):
            while chunk := await asyncio.wait_for(queue.get(), max(until - time.monotonic(), 0)):
                if "choices" not in chunk:
                    raise Refused(500, f"llama.cpp: {chunk}")
                yield chunk
                if "usage" in chunk:
                    return
        if not self.gone:
            raise Refused(503, f"no whole answer within {self.about['seconds']:.0f} seconds")
