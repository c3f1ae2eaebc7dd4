"""The Modelfile: how Ollama must wrap a prompt, when it stops, how much it remembers; and Ollama itself, if it runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

from stakelib.export.gguf_files import gguf_file
from stakelib.models import base_model, engine, load_tokenizer, render, template
from stakelib.run import CourseError, Run, atomic_write_text

SYSTEM, PROMPT = "{{ if .System }}{{ .System }}\n\n{{ end }}", "{{ .Prompt }}"  # of Go's template language
ANSWER_TOKENS = 400  # as in training: the longest answer of a row
SERVER = "http://127.0.0.1:11434"


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
        f"# ollama create {gguf.stem.rpartition('-')[0]} -f {target.name}",
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


def ollama_hop(run: Run, prompt: str, server: str = SERVER) -> dict[str, Any]:
    """The last hop: the Modelfile in a running Ollama, asked one prompt greedily beside llama.cpp; removed afterwards.

    Returns "version", "same_template" and "same_tokens" (of the prompt), "same_text" (None of it is promised between
    two versions of llama.cpp), "load_s", "tokens_per_s" and "text". Without Ollama: {"why": ..., "commands": [...]}.
    Raises CourseError if Ollama shows another template or counts other prompt tokens than training.
    """
    base = base_model(run.profile.model)
    name = f"stakeholder-{base.short_name}-proof"
    commands = [
        f"ollama create {name.removesuffix('-proof')} -f Modelfile",
        f'ollama run {name.removesuffix("-proof")} "..."',
    ]
    tool = shutil.which("ollama")
    try:
        version = _call(server, "/api/version")["version"]
    except OSError as problem:
        return {"why": f"no Ollama answers at {server}: {problem}", "commands": commands}
    if tool is None:
        return {"why": f"Ollama {version} answers at {server}, but 'ollama' is not on the PATH", "commands": commands}
    made = subprocess.run(
        [tool, "create", name, "-f", "Modelfile"],
        cwd=run.folder,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if made.returncode:
        raise CourseError([f"ollama create failed: {made.stderr.strip()[-300:]}"], "update Ollama and run this again")
    try:
        shown = _call(server, "/api/show", {"model": name})["template"]
        warm = _call(server, "/api/generate", {"model": name, "prompt": "", "stream": False})
        options = {"temperature": 0, "seed": 0, "num_predict": ANSWER_TOKENS}
        said = _call(server, "/api/generate", {"model": name, "prompt": prompt, "stream": False, "options": options})
    finally:
        _call(server, "/api/delete", {"model": name}, "DELETE")
    with engine(gguf_file(run, "q8"), base.folder) as llama:
        ((_, ours),) = llama.ask([prompt], max_new_tokens=ANSWER_TOKENS)
    ids = render(load_tokenizer(base.folder), prompt).ids
    text = run.path("Modelfile").read_text(encoding="utf-8")
    problems = [] if shown == _template_of(text) else ["'ollama show --template' is not the Modelfile's TEMPLATE"]
    if said["prompt_eval_count"] != len(ids):
        problems.append(f"Ollama reads {said['prompt_eval_count']} prompt tokens, training had {len(ids)}")
    if problems:
        raise CourseError(problems, f"report these lines with Ollama's version, {version}")
    return {
        "version": version,
        "same_template": True,
        "same_tokens": True,
        "text": said["response"],
        "same_text": said["response"].strip() == ours.text.strip(),
        "load_s": round(warm.get("load_duration", 0) / 1e9, 2),
        "tokens_per_s": round(said["eval_count"] / max(said["eval_duration"], 1) * 1e9, 1),
    }


def _call(server: str, path: str, body: dict[str, Any] | None = None, method: str | None = None) -> dict[str, Any]:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(server + path, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=600 if body else 3) as reply:
        return json.loads(reply.read() or b"{}")
