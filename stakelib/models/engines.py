"""Engines that answer prompts: llama.cpp on a GGUF (what is shipped) and transformers on a folder (before export)."""

from __future__ import annotations

import http.client
import json
import logging
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from stakelib import machine
from stakelib.models.answering_memory import prompts_at_once
from stakelib.models.chat import render, stop_ids, template
from stakelib.models.gguf_weights import architecture, load_gemma
from stakelib.run import CourseError

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it advises to fetch compiled code when peft imports it


KINDS = ("llama.cpp", "transformers", "mlx")
LONGEST_SOCKET = 100  # bytes in the path of a Unix socket: macOS takes 103, Linux 107


@dataclass(frozen=True)
class Answer:
    """One reply: `stopped` is False where it was cut at the token limit; `seconds` from request to last token."""

    text: str
    stopped: bool
    new_tokens: int
    prompt_tokens: int
    seconds: float
    ids: list[int] = field(default_factory=list)  # of the new tokens, where they were asked for


def engine(
    path: Path,
    tokenizer: Path,
    kind: str = "llama.cpp",
    adapter: Path | None = None,
    context: int = 2048,
    adapters: Mapping[str, Path] | None = None,
) -> Any:
    """A context manager whose `ask(prompts)` yields (index, Answer) as they finish.

    `path`: a GGUF file ("llama.cpp") or a model folder ("transformers" or "mlx", where `adapter` may name a LoRA
    folder in that form).
    `tokenizer`: the base model's folder; ids are made by the same `render` as in training. `context`: tokens of one
    prompt and its answer in llama.cpp. `adapters`: LoRA by the name of its voice, in the engine's own form (in
    llama.cpp GGUF adapters); `ask(prompts, voices=[...])` then switches, None being the base. Raises CourseError for
    another kind, and where `path` is missing.
    """
    if kind not in KINDS:
        raise CourseError(f"there is no engine of kind '{kind}'", f"choose one of: {', '.join(KINDS)}")
    if not Path(path).exists():
        raise CourseError(f"{path} is missing", "run notebooks 04 and 05 first")
    if kind == "mlx":
        from stakelib.models.mlx_models import Mlx

        return Mlx(path, tokenizer, adapter, adapters)
    if kind == "llama.cpp":
        at_once = prompts_at_once(load_config(tokenizer), Path(path).stat().st_size / 2**30, context)
        return LlamaCpp(path, tokenizer, at_once, context, adapters)
    return Transformers(path, tokenizer, adapter, adapters)


def known_voices(
    voices: Sequence[str | None] | None, prompts: Sequence[str], adapters: Mapping[str, Path]
) -> list[str | None]:
    """One voice for each prompt, None being the base; CourseError for voices without an adapter."""
    if unknown := {str(v) for v in voices or () if v is not None and v not in adapters}:
        raise CourseError(
            [f"no adapter for voice '{v}'" for v in sorted(unknown)],
            f"choose one of: {', '.join(adapters) or 'none is loaded'}",
        )
    return list(voices or [None] * len(prompts))


def quiet() -> None:
    """Turn off transformers' bars and advice: this course prints its own plain lines."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; no code from the folder is run."""
    from transformers import AutoTokenizer

    quiet()

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def load_config(folder: Path) -> Any:
    """The transformers config of a model folder."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True)


class LlamaCpp:
    """llama.cpp in this process, answering several prompts at once (continuous batching)."""

    def __init__(
        self,
        gguf: Path,
        tokenizer: Path,
        at_once: int = 8,
        context: int = 2048,
        adapters: Mapping[str, Path] | None = None,
    ) -> None:
        self.gguf, self.at_once, self.context, self.adapters = Path(gguf), at_once, context, dict(adapters or {})
        self.tokenizer = load_tokenizer(tokenizer)

    def __enter__(self) -> LlamaCpp:
        import xllamacpp

        self.place = tempfile.TemporaryDirectory(prefix="stakelib-", ignore_cleanup_errors=True)
        self.key = secrets.token_urlsafe()
        params = xllamacpp.CommonParams()
        params.model.path = str(self.gguf)
        params.n_parallel, params.n_ctx = self.at_once, self.at_once * self.context
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = machine.threads()
        # xllamacpp always listens: on a socket in a folder of this user alone, or (Windows) on a port. No page of a
        # browser may read it, and without the key and the key's path it answers nobody.
        params.hostnames = [_socket(Path(self.place.name)) or "127.0.0.1"]
        params.api_keys, params.api_prefix, params.cors_origins = [self.key], f"/{self.key}", ""
        params.cors_credentials = params.endpoint_slots = params.endpoint_props = params.endpoint_metrics = False
        params.ui, params.warmup, params.verbosity = False, False, -1
        params.lora_adapters = [_lora(file) for file in self.adapters.values()]
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError as problem:
            self.place.cleanup()
            if self.adapters:
                raise self._refused(problem) from problem
            raise CourseError(
                f"llama.cpp cannot load {self.gguf.name}: {problem}", "delete it and run notebook 05 again"
            ) from problem
        # One token, so that the server's loop has begun: closed before that, it would never end (xllamacpp 2026.10).
        self.server.handle_completions({"prompt": stop_ids(self.tokenizer)[:1], "n_predict": 1})
        return self

    def __exit__(self, *_: object) -> None:
        del self.server
        self.place.cleanup()

    def _refused(self, problem: Exception) -> CourseError:
        """The way out where llama.cpp takes no adapters: a merged file each, as large as the base."""
        count, mb = len(self.adapters), self.gguf.stat().st_size / 1e6
        return CourseError(
            f"llama.cpp cannot load {self.gguf.name} with {count} adapters: {problem}",
            f"merge each into a file of its own, export(voice_run, adapter): {count} x {mb:,.0f} MB instead of one",
        )

    def lora(self, voice: str | None) -> dict[str, Any]:
        """What a request must say to be answered by this voice's adapter, or by the base alone."""
        on = [{"id": i, "scale": 1.0} for i, name in enumerate(self.adapters) if name == voice]
        return {"lora": on} if self.adapters else {}

    def ask(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 400,
        temperature: float = 0.0,
        seed: int = 0,
        top_p: float = 1.0,
        ids: bool = False,
        voices: Sequence[str | None] | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """Yield (index, Answer) in the order in which answers finish. Temperature 0 is greedy.

        With `ids`, answers hold the ids of their tokens too (the end-of-turn token may be among them). `voices`: for
        each prompt the adapter that answers, or None for the base.
        """
        voices = known_voices(voices, prompts, self.adapters)
        settings = {"n_predict": max_new_tokens, "temperature": temperature, "seed": seed, "cache_prompt": False}
        settings |= {"top_p": top_p} if temperature else {}
        settings |= {"logprobs": 1} if ids else {}  # the only place where the reply tells them
        pool = ThreadPoolExecutor(self.at_once)
        try:
            waiting = {
                pool.submit(self._one, render(self.tokenizer, p).ids, settings | self.lora(v)): i
                for i, (p, v) in enumerate(zip(prompts, voices, strict=True))
            }
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _one(self, ids: list[int], settings: dict[str, Any]) -> Answer:
        if len(ids) + settings["n_predict"] > self.context:
            raise CourseError(
                f"{len(ids)} prompt tokens and {settings['n_predict']} new ones exceed the context of {self.context}",
                "shorten the prompt",
            )
        start = time.perf_counter()
        reply = self.server.handle_completions({"prompt": ids, **settings})
        if "choices" not in reply:
            raise CourseError(f"llama.cpp answered {reply}", "check that the GGUF was made by notebook 05")
        choice, usage = reply["choices"][0], reply["usage"]
        seconds = time.perf_counter() - start
        return Answer(
            choice["text"],
            choice["finish_reason"] == "stop",
            usage["completion_tokens"],
            usage["prompt_tokens"],
            seconds,
            [token["id"] for token in (choice.get("logprobs") or {}).get("content", [])],
        )

    def tokenize(self, prompt: str) -> list[int]:
        """The ids that llama.cpp itself makes of a prompt inside the chat template (BOS written by the template)."""
        around = template(self.tokenizer)
        text = around.before + prompt.strip() + around.between
        body = json.dumps({"content": text, "add_special": False, "parse_special": True})
        kind, _, address = self.server.listening_address.partition("://")
        # http.client knows no proxy: no setting of the system may lead this request away from this computer
        link = http.client.HTTPConnection(address if kind == "http" else "localhost", timeout=30)
        try:
            if kind == "unix":
                link.sock = socket.socket(socket.AF_UNIX)
                link.sock.connect(address)
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
            link.request("POST", f"/{self.key}/tokenize", body, headers)
            return json.load(link.getresponse())["tokens"]
        finally:
            link.close()


def _socket(folder: Path) -> str:
    """The path of a Unix socket in `folder`; empty where Python has none or the path is too long for one."""
    path = str(folder / "llama.sock")
    return path if hasattr(socket, "AF_UNIX") and len(os.fsencode(path)) <= LONGEST_SOCKET else ""


def _lora(file: Path) -> Any:
    from xllamacpp import CommonAdapterLoraInfo

    info = CommonAdapterLoraInfo()
    info.path, info.scale = str(file), 0.0  # silent until a request asks for it
    return info


class Transformers:
    """A model folder in transformers, with a LoRA adapter on top if one is given; greedy, prompts of a voice at once.

    With `adapters` the base is loaded once, and `speak(voice)` switches between them.
    """

    def __init__(
        self, folder: Path, tokenizer: Path, adapter: Path | None = None, adapters: Mapping[str, Path] | None = None
    ) -> None:
        self.folder, self.adapter, self.tokenizer = Path(folder), adapter, load_tokenizer(tokenizer)
        self.adapters = dict(adapters or {})

    def __enter__(self) -> Self:
        self.model = self.load()
        return self

    def speak(self, voice: str | None) -> None:
        """Let the adapter of `voice` answer from now on; None: the base alone."""
        if voice:
            self.model.set_adapter(voice)
        self.model.base_model.enable_adapter_layers() if voice else self.model.base_model.disable_adapter_layers()

    def __exit__(self, *_: object) -> None:
        del self.model

    def ask(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 400,
        temperature: float = 0.0,
        seed: int = 0,
        voices: Sequence[str | None] | None = None,
    ) -> Iterator[tuple[int, Answer]]:
        """Yield (index, Answer), voice by voice; only new tokens are decoded.

        Sampling is llama.cpp's job: temperature must be 0. `voices`: the adapter of each prompt, None for the base.
        """
        if temperature:
            raise CourseError("this engine is greedy", "use temperature 0, or the llama.cpp engine")
        rows, stops = [render(self.tokenizer, p).ids for p in prompts], stop_ids(self.tokenizer)
        voices = known_voices(voices, prompts, self.adapters)
        for voice in dict.fromkeys(voices):
            if self.adapters:
                self.speak(voice)
            places = [i for i, v in enumerate(voices) if v == voice]
            said = self.generate([rows[i] for i in places], stops, max_new_tokens)
            for i, (new, seconds) in zip(places, said, strict=True):
                stop = next((k for k, t in enumerate(new) if t in stops), None)
                text = self.tokenizer.decode(new[:stop], skip_special_tokens=True)
                yield i, Answer(text, stop is not None, len(new) if stop is None else stop + 1, len(rows[i]), seconds)

    def load(self) -> Any:
        """The model, ready to be asked; of several adapters each lies beside the others, in the base's own format."""
        first, *others = self.adapters or [None]
        model = load_weights(self.folder, self.adapters.get(first, self.adapter), name=first or "default")
        for voice in others:
            model.load_adapter(self.adapters[voice], voice, autocast_adapter_dtype=False)
        return model

    def generate(
        self, rows: Sequence[list[int]], stops: Sequence[int], max_new_tokens: int
    ) -> Iterator[tuple[list[int], float]]:
        """(new token ids, seconds) for each row of prompt ids, in order; what follows a stop token does not count."""
        import torch

        start, width, pad = time.perf_counter(), max(map(len, rows)), self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(r)) + r for r in rows])
        attend = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
        with torch.inference_mode():
            whole = self.model.generate(
                input_ids=ids,
                attention_mask=attend,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=pad,
            )
        seconds = time.perf_counter() - start
        yield from ((new, seconds) for new in whole[:, width:].tolist())


def load_weights(source: Path, adapter: Path | None = None, dtype: str | None = None, name: str = "default") -> Any:
    """A causal language model in evaluation mode, from a folder of safetensors or from a GGUF (de-quantised).

    `dtype` None takes what this machine multiplies fastest; "int8" and "nf4" pack the matrices of the layers
    (bitsandbytes), while embeddings and sums stay in that format. `adapter`: a PEFT folder laid over it; named, it is
    kept in the base's own format, to be one of several.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    quiet()
    packed = dtype in PACKED
    wanted = getattr(torch, machine.precision()[0] if packed or not dtype else dtype)
    source = Path(source)
    if source.suffix == ".gguf" and architecture(source) == "gemma":
        model = load_gemma(source, wanted)
    elif source.suffix == ".gguf":
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype=wanted
        )
    else:
        more = {"quantization_config": packing(dtype, wanted)} if packed else {}
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=wanted, use_safetensors=True, local_files_only=True, **more
        )
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter, name, autocast_adapter_dtype=name == "default")
    for layer in model.eval().modules() if packed else ():
        if type(layer).__module__.startswith("bitsandbytes"):
            # In evaluation mode bitsandbytes rounds what comes in, or packs 4 bits so that no gradient passes any more
            layer.training, layer.train = True, lambda mode=True, layer=layer: layer
    return model


PACKED = ("int8", "nf4")  # 8 and 4 bits: LLM.int8 (arXiv 2208.07339), QLoRA (arXiv 2305.14314)


def packing(dtype: str, compute: Any) -> Any:
    """transformers' settings for weights of 8 or 4 bits; raises CourseError without bitsandbytes."""
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise CourseError(f"precision '{dtype}' needs bitsandbytes, which is not installed", "take precision float32")
    if dtype == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
