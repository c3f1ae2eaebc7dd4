"""The Modelfile: how Ollama must wrap a prompt, when it stops, how much it remembers; and Ollama itself, if it runs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import unicodedata
import urllib.error
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stakelib.export.gguf_files import gguf_file
from stakelib.export.local_http import call_json
from stakelib.models import base_model, engine, load_tokenizer, render, template
from stakelib.run import CourseError, Run, atomic_write_text

SYSTEM, PROMPT = "{{ if .System }}{{ .System }}\n\n{{ end }}", "{{ .Prompt }}"  # of Go's template language
ANSWER_TOKENS = 400  # as in training: the longest answer of a row
PORT = 11434  # Ollama's own, where the tool looks
LONGEST_NAME = 72  # letters; Ollama takes 80, and room is left for an ending
# Greedy, and everything else that could move a token off: Ollama's defaults differ from version to version
GREEDY = {
    "temperature": 0,
    "seed": 0,
    "top_k": 1,
    "top_p": 1.0,
    "min_p": 0.0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "num_predict": ANSWER_TOKENS,
}


def ollama_name(text: str) -> str:
    """`text` as Ollama takes it for a model's name: a-z, 0-9 and ._- alone, accents left out, at most 72 letters.

    A longer one loses its middle: the beginning names the base, the end tells nine voices apart.
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"-{2,}", "-", re.sub(r"[^a-z0-9._-]+", "-", plain)).strip("._-") or "model"
    return name if len(name) <= LONGEST_NAME else f"{name[:43].rstrip('._-')}-{name[-28:].lstrip('._-')}"


def model_name(gguf: Path) -> str:
    """The name of the model in a GGUF, here and in Ollama: its file's, without the quantisation."""
    return ollama_name(Path(gguf).stem.rpartition("-")[0])


def server_address() -> str:
    """Where Ollama listens: OLLAMA_HOST in each form that Ollama itself reads, else this computer's port 11434."""
    kind, _, place = os.environ.get("OLLAMA_HOST", "").strip().strip("\"'").rpartition("://")
    try:
        parts = urlsplit(f"//{place}")
        host, port = parts.hostname, parts.port
    except ValueError:  # a port that is none
        host, port = place.rpartition(":")[0].strip("[]"), None
    host = "127.0.0.1" if host in (None, "", "0.0.0.0", "::") else host  # noqa: S104 - asked there, it listens here
    port = port or {"http": 80, "https": 443}.get(kind, PORT)
    return f"{kind or 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def modelfile(tokenizer: Any, gguf: Path, target: Path, context: int = 2048) -> str:
    """Write a Modelfile beside the GGUF's run and return its text.

    TEMPLATE is the training template itself, taken from the tokenizer, so that a prompt reaches the model exactly as
    in training; the BOS is left to llama.cpp. There is no SYSTEM line: the model was trained without one, and an
    unseen line in front of every prompt would only move it away from what it learned. ADAPTER is never used.
    `context`: tokens of prompt and answer together; longer prompts would silently lose their beginning.
    """
    around = template(tokenizer)
    before, between = _before(tokenizer, around), around.between
    if "{{" in before + between or '"""' in before + between:
        raise CourseError("the chat template holds {{ or three quotes, which a Modelfile cannot", "report this model")
    lines = [
        f"# ollama create {model_name(gguf)} -f {target.name}",
        f"FROM ./{gguf.relative_to(target.parent).as_posix()}",
        f'TEMPLATE """{before}{SYSTEM}{PROMPT}{between}"""',  # a system text, if there is one, opens the user's turn
        f'PARAMETER stop "{around.end}"',
        f"PARAMETER num_ctx {context}",
        f"PARAMETER num_predict {ANSWER_TOKENS}",
        "PARAMETER temperature 0.7",
        "PARAMETER top_p 0.9",
    ]
    text = "\n".join(lines) + "\n"
    atomic_write_text(target, text)
    return text


def as_trained(tokenizer: Any, prompt: str, system: str = "") -> str:
    """The text in front of an answer as training had it, a system text folded into the user's turn; without the BOS."""
    around = template(tokenizer)
    return _before(tokenizer, around) + _folded(prompt, system).strip() + around.between


def rendered_by(text: str, prompt: str, system: str = "") -> str:
    """What Ollama makes of a prompt with the Modelfile `text`; the tests let Go evaluate the same template."""
    before, _, between = _template_of(text).partition(PROMPT)
    return before.replace(SYSTEM, f"{system}\n\n" if system else "") + prompt + between


def _template_of(text: str) -> str:
    found = re.search(r'^TEMPLATE """(.*?)"""$', text, re.MULTILINE | re.DOTALL)
    return found[1] if found else PROMPT  # without one, Ollama sends the bare prompt


def _folded(prompt: str, system: str) -> str:
    return f"{system}\n\n{prompt}" if system else prompt


def _before(tokenizer: Any, around: Any) -> str:
    """What stands before the prompt, without the BOS that llama.cpp adds by itself.

    Gemma's template opens with one; in SmolLM2's the same token opens every turn and must stay.
    """
    bos = tokenizer.bos_token
    return around.before.removeprefix(bos) if bos and around.before.count(bos) == 1 else around.before


def ollama_hop(run: Run, prompt: str, server: str | None = None) -> dict[str, Any]:
    """The last hop: the Modelfile in a running Ollama, asked one prompt greedily beside llama.cpp; removed afterwards.

    `server`: its address, or None for `server_address()`. Returns "version", "same_template" and "same_tokens" (of the
    prompt), "same_text" (None of it is promised between two versions of llama.cpp), "load_s", "tokens_per_s" and
    "text". Where Ollama gave the answer up: "why", what it said, and None for what it did not tell. Without Ollama:
    "why" and "commands". Raises CourseError if Ollama refuses the Modelfile, shows another template, or counts other
    prompt tokens than training.
    """
    server, name = server or server_address(), model_name(gguf_file(run, "q8"))
    commands = [f"ollama create {name} -f Modelfile", f'ollama run {name} "..."']
    tool = shutil.which("ollama")
    version, why = _version(server)
    if not why and tool is None:
        why = f"Ollama {version} answers at {server}, but 'ollama' is not on the PATH (start JupyterLab again)"
    if why:
        return {"why": why, "commands": commands}
    name = f"{name}-proof"
    done = subprocess.run(
        [tool, "create", name, "-f", "Modelfile"],
        cwd=run.folder,
        env={**os.environ, "OLLAMA_HOST": server},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        raise CourseError([f"ollama create failed: {done.stderr.strip()[-300:]}"], "update Ollama and run this again")
    shown, reply = None, {}
    asked = {"model": name, "prompt": prompt, "stream": False, "options": GREEDY}
    try:
        shown = call_json(f"{server}/api/show", {"model": name})["template"]
        reply = dict(call_json(f"{server}/api/generate", asked))
    except (OSError, ValueError, KeyError, TypeError) as problem:
        why = _words_of(problem)
    finally:
        with contextlib.suppress(OSError, ValueError):
            call_json(f"{server}/api/delete", {"model": name}, "DELETE", timeout=60)
    if not why and not reply.get("done"):
        why = "the reply ends unfinished, without counts"  # what older ones do where the newer say 500
    record = _compared(run, prompt, version, shown, reply, ours=not why)
    return {"why": f"Ollama {version} gave the answer up: {why}", **record} if why else record


def _version(server: str) -> tuple[str, str]:
    """(version of the Ollama at `server`, "") or ("", why there is none)."""
    try:
        version = str(call_json(f"{server}/api/version", timeout=3)["version"])
    except urllib.error.HTTPError as problem:
        return "", f"what answers at {server} is no Ollama: {problem}"
    except OSError as problem:
        return "", f"no Ollama answers at {server}: {problem}"
    except (ValueError, KeyError, TypeError):
        return "", f"what answers at {server} is no Ollama: it tells no version"
    if "stakelib" in version:
        return "", f"this course's own endpoint answers at {server}, in Ollama's place: stop it to try Ollama"
    return version, ""


def _words_of(problem: Exception) -> str:
    """What Ollama said in an error, or else the error itself."""
    if isinstance(problem, urllib.error.HTTPError):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads(problem.read())["error"])
    return f"{type(problem).__name__}: {problem}"


def _compared(
    run: Run, prompt: str, version: str, shown: str | None, reply: dict[str, Any], ours: bool
) -> dict[str, Any]:
    """Ollama's template, prompt tokens and text beside ours; with `ours` False no answer of ours is asked for."""
    base = base_model(run.profile.model)
    count, ids = reply.get("prompt_eval_count"), render(load_tokenizer(base.folder), prompt).ids
    wanted = _template_of(run.path("Modelfile").read_text(encoding="utf-8"))
    problems = ["'ollama show --template' is not the Modelfile's TEMPLATE"] if shown not in (None, wanted) else []
    if count not in (None, len(ids)):
        problems.append(f"Ollama reads {count} prompt tokens, training had {len(ids)}")
    if problems:
        raise CourseError(problems, f"report these lines with Ollama's version, {version}")
    text, same = reply.get("response"), None
    if ours:
        with engine(gguf_file(run, "q8"), base.folder) as llama:
            ((_, answer),) = llama.ask([prompt], max_new_tokens=ANSWER_TOKENS)
        same = str(text).strip() == answer.text.strip()
    load, tokens, time = (reply.get(key) for key in ("load_duration", "eval_count", "eval_duration"))
    return {
        "version": version,
        "same_template": None if shown is None else True,
        "same_tokens": None if count is None else True,
        "text": text,
        "same_text": same,
        "load_s": None if load is None else round(load / 1e9, 2),
        "tokens_per_s": round(tokens / time * 1e9, 1) if tokens and time else None,
    }
