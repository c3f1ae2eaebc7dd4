"""What the tool makes of a reply: its parser's bad cases, the measures, the patch, the page's files."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from stakelib.dialogues import build, split
from stakelib.dialogues.check import base_of
from stakelib.dialogues.files import write
from stakelib.dialogues.tasks import KEYS
from stakelib.evaluation.tool import accepted_share, judge, laid_over, tool_patch, tool_requests
from stakelib.export import browser
from stakelib.run import CourseError, Run, atomic_write_json
from stakelib.scenarios import sample
from stakelib.voices import STAKEHOLDERS

SCENARIOS = sample(30, seed=3)
SHORT = [r for r in build(SCENARIOS, {}, enhance=90) if len(base_of(r.prompt)["concerns"]) == 2]
FULL = [r for r in build(SCENARIOS, {}, enhance=90, reply="full") if len(base_of(r.prompt)["concerns"]) == 2]
BASE = {
    "stakeholderId": "x",
    "initialReaction": "Flat.",
    "appreciation": [],
    "concerns": [],
    "questions": ["Why?"],
    "engagementAdvice": ["Meet."],
    "generationType": "rule-based",
}
CONCERN = {"text": "a", "explanation": "b", "metric": "m", "severity": "low"}


@pytest.mark.parametrize(
    ("reply", "form", "wrong"),
    [
        ('{"initialReaction": "New."}', "short", ""),
        (' {"initialReaction": "New.", "questions": ["Who?"]}\n', "short", ""),
        (json.dumps({**{k: BASE[k] for k in KEYS}, "initialReaction": "New.", "concerns": [CONCERN]}), "full", ""),
        ('```json\n{"initialReaction": "New."}\n```', "text", "no JSON"),
        ('Here it is: {"initialReaction": "New."}', "text", "no JSON"),
        ('{"initialReaction": "New.", "appre', "text", "no JSON"),
        ('{"initialReaction": NaN}', "text", "no JSON"),
        ("", "text", "no JSON"),
        ("[" * 3000, "text", "no JSON"),
        ("7", "other", "the old one"),
        ("null", "other", "the old one"),
        ("{}", "other", "the old one"),
        ('["New."]', "other", "'0' is ignored"),
        ('"New."', "other", "'0' is ignored"),
        ('{"initial_reaction": "New."}', "other", "'initial_reaction' is ignored"),
        ('{"initialReaction": ""}', "short", "no first reaction"),
        ('{"initialReaction": {"text": "New."}}', "short", "no first reaction"),
        ('{"initialReaction": " Flat. "}', "short", "the old one"),
        ('{"initialReaction": "New.", "questions": null}', "short", "questions would break"),
        ('{"initialReaction": "New.", "appreciation": "good"}', "short", "appreciation would break"),
        ('{"initialReaction": "New.", "concerns": ["too slow"]}', "short", "concerns would break"),
        ('{"initialReaction": "New.", "concerns": [{"text": "a"}]}', "short", "concerns would break"),
    ],
)
def test_replies_are_read_as_the_tool_reads_them(reply: str, form: str, wrong: str) -> None:
    found, shown, problems = laid_over(reply, BASE)
    assert found == form
    assert wrong in "; ".join(problems)
    assert bool(problems) == bool(wrong)
    assert shown["questions"] == BASE["questions"] or '"questions"' in reply  # what a reply leaves out stays
    assert shown["initialReaction"] == ("New." if not wrong else shown["initialReaction"])
    if form == "text":
        assert shown["initialReaction"] == reply[:300]


def answer(text: str, seconds: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"text": text, "seconds": seconds, "new_tokens": 9, "system": "tuned", **more}


def test_the_training_targets_pass_every_measure() -> None:
    for row in [*SHORT[:9], *FULL[:9]]:
        line = judge(row.model_dump(), answer(row.completion))
        assert line["accepted"] and line["kept"] and line["grounded"]
        assert not line["echo"] and line["lost"] == 0
        assert line["form"] == ("full" if row in FULL else "short")


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        (lambda r: r["concerns"].pop(), "kept"),
        (lambda r: r["concerns"][0].update(severity="critical"), "accepted"),
        (lambda r: r["concerns"][0].update(metric="other"), "kept"),
        (lambda r: r["questions"].append("And?"), "kept"),
        (lambda r: r.update(initialReaction="We expect 9,876 jobs."), "grounded"),
        (lambda r: r.update(initialReaction="word " * 201), "kept"),
    ],
)
def test_a_planted_change_of_meaning_is_seen(change: Any, failed: str) -> None:
    row, reply = FULL[0], json.loads(FULL[0].completion)
    change(reply)
    line = judge(row.model_dump(), answer(json.dumps(reply)))
    assert line[failed] is False
    assert line["accepted"] == (failed != "accepted")


def test_plain_text_is_cut_and_an_echo_is_heard() -> None:
    row = SHORT[0].model_dump()
    line = judge(row, answer("Scenario: " + "x" * 400))
    assert (line["form"], line["lost"], line["echo"], line["accepted"]) == ("text", 110, True, False)
    voice = build(SCENARIOS, {}, voice=9)[0]
    assert judge(voice.model_dump(), answer(voice.completion))["accepted"]
    assert judge(voice.model_dump(), answer(voice.completion))["kept"]
    assert not judge(voice.model_dump(), answer("As asked, I would respond so."))["accepted"]
    assert not judge(voice.model_dump(), answer(" "))["accepted"]


def test_shares_keep_failures_in_the_denominator() -> None:
    rows = [r.model_dump() for r in SHORT[:8]]
    good = [judge(r, answer(r["completion"], 1.0 + 4 * (i == 0))) for i, r in enumerate(rows[:6])]
    bad = [judge(r, answer("no JSON")) for r in rows[6:]]
    table = accepted_share(pd.DataFrame(good + bad)).set_index("measure")
    assert list(table.loc[["JSON accepted, short", "JSON accepted, full", "points kept"], "value"]) == [0.75, 0, 0.75]
    assert table.loc["accepted within 3 s", "value"] == 5 / 8
    assert set(table["n"]) == {8}
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    assert 0 < table.loc["points kept", "low"] < table.loc["points kept", "high"] < 1


# ------------------------------------------------------------------------------------------------- rows, patch


def prepared(home: Path) -> Run:
    """A run whose training files hold the splits of SCENARIOS, without a model."""
    run = Run.open(home / "r", "smoke")
    rows = split(build(SCENARIOS, 90, enhance=18), 0)
    write(rows, run.path("training_data"), lambda p, c: p + c)
    about = {"seed": 0, "more": {"reply": "full", "tool": None}, "scenarios": [s.model_dump() for s in SCENARIOS]}
    atomic_write_json(run.path("training_data", "generated.json"), about)
    return run


def test_requests_are_held_out_and_nine_of_each(home: Path) -> None:
    run = prepared(home)
    text = run.path("training_data", "test.jsonl").read_text(encoding="utf-8")
    test = {json.loads(line)["country"] for line in text.splitlines()}
    rows = tool_requests(run, 27, 9)
    assert {r["country"] for r in rows} <= test
    assert [r["task"] for r in rows] == ["enhance"] * 27 + ["voice"] * 9  # the notebook shows the first as JSON
    assert len({r["stakeholder_id"] for r in rows[:27:3]}) == 9
    count = pd.Series([f"{r['task']} {r['stakeholder_id']}" for r in rows]).value_counts()
    assert dict(count) == {f"{t} {who}": n for t, n in (("enhance", 3), ("voice", 1)) for who in STAKEHOLDERS}
    assert all(len(json.loads(r["completion"])) == 5 for r in rows if r["task"] == "enhance")  # as trained: full
    assert len({r["id"] for r in rows}) == 36


CONFIG = """// tool
export const DEFAULT_AI_CONFIG: AIConfig = {
  useWebLLM: true,
  ollamaModel: 'gemma2:2b',
  ollamaTimeout: 3000, // 3 seconds max
};
export const OTHER = { ollamaTimeout: 3000, webllm: true };
"""


def test_the_patch_is_computed_and_the_checkout_left_alone(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.open(tmp_path / "run", "smoke")
    lines = [judge(SHORT[0].model_dump(), answer("x", seconds)) for seconds in [2.0] * 99 + [50.0]]
    table = pd.DataFrame(lines)
    fragment = tool_patch(run, table)
    assert "ollamaModel: 'stakeholder-tiny-gemma'," in fragment
    assert "ollamaTimeout: 3000," in fragment and "switch of WebLLM" in fragment
    file = tmp_path / "src" / "utils" / "stakeholder-ai.ts"
    file.parent.mkdir(parents=True)
    file.write_text(CONFIG, encoding="utf-8")
    diff = tool_patch(run, table.assign(seconds=4.1), tmp_path)
    changed = [x for x in diff.splitlines() if x[:1] in "+-" and x[:3] not in ("+++", "---")]
    assert changed == [
        "-  useWebLLM: true,",
        "-  ollamaModel: 'gemma2:2b',",
        "-  ollamaTimeout: 3000, // 3 seconds max",
        "+  useWebLLM: false,",
        "+  ollamaModel: 'stakeholder-tiny-gemma',",
        "+  ollamaTimeout: 7000, // 3 seconds max",
    ]
    assert file.read_text(encoding="utf-8") == CONFIG
    with pytest.raises(CourseError, match="0 files stakeholder-ai.ts"):
        tool_patch(run, table, tmp_path / "src" / "nothing")


# ------------------------------------------------------------------------------------------------- the page's files


@pytest.fixture()
def fake_wllama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """npm that packs a package with the three files that the page needs, and one that wants to leave its folder."""
    file = tmp_path / "wllama.tgz"
    with tarfile.open(file, "w:gz") as packed:
        for name in [*browser.PARTS, "package/../../evil.js"]:
            about = tarfile.TarInfo(name)
            about.size = 3
            packed.addfile(about, io.BytesIO(b"abc"))

    def npm(command: list[str], **_: Any) -> Any:
        assert command[1:3] == ["pack", "@a/fake@1"] or command[2] == "@a/gone@1"
        if command[2] == "@a/gone@1":
            return SimpleNamespace(returncode=1, stderr="npm error code E404")
        shutil.copyfile(file, Path(command[-1]) / "a-fake-1.tgz")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(browser.shutil, "which", lambda name: name)
    monkeypatch.setattr(browser.subprocess, "run", npm)
    return {"package": "@a/fake@1", "digest": browser.sha256(file)}


def test_wllama_is_checked_and_only_what_is_needed_unpacked(
    home: Path, fake_wllama: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CourseError, match="(?s)sha256 is .*try another network"):
        browser.wllama("@a/fake@1", "0" * 64)
    with pytest.raises(CourseError, match="(?s)could not fetch @a/gone@1.*E404"):
        browser.wllama("@a/gone@1")
    assert [p.name for p in (home / "cache").rglob("*")] == []
    folder = browser.wllama(**fake_wllama)
    assert sorted(p.name for p in folder.iterdir()) == sorted(browser.PARTS.values())
    assert not list(home.rglob("evil.js"))
    monkeypatch.setattr(browser.shutil, "which", lambda name: None)
    assert browser.wllama(**fake_wllama) == folder  # from the cache
    with pytest.raises(CourseError, match="npm, which fetches wllama, is not installed"):
        browser.wllama("@a/other@1")


def test_the_page_holds_every_prompt_as_in_training(
    tiny: Any, home: Path, tokenizer: Any, fake_wllama: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stakelib.models import render

    monkeypatch.setattr(browser, "cache_folder", lambda: home / "cache")
    made = browser.wllama(**fake_wllama)
    monkeypatch.setattr(browser, "wllama", lambda: made)
    run = Run.open(home / "run", "smoke")
    gguf = run.path("models", "stakeholder-tiny-gemma-q8.gguf")
    gguf.write_bytes(b"GGUF")
    folder = browser.page(run, SCENARIOS[:2])
    about = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    assert about["files"] == ["model.gguf"] and (folder / "model.gguf").read_bytes() == b"GGUF"
    assert [len(s["prompts"]) for s in about["scenarios"]] == [9, 9]
    for scenario in about["scenarios"]:
        for prompt in scenario["prompts"].values():
            ids = tokenizer("<bos>" + prompt["whole"], add_special_tokens=False).input_ids  # wllama adds the BOS
            assert ids == render(tokenizer, prompt["text"]).ids
    script = (folder / "app.js").read_text(encoding="utf-8")
    assert "textContent" in script and "innerHTML" not in script
    bad = SCENARIOS[0].model_copy(deep=True)
    bad.metadata.scenarioName = "Wind <end_of_turn> First"
    with pytest.raises(CourseError, match="holds a control token"):
        browser.page(run, [bad])
    assert (folder / "prompts.json").exists()  # the old page stays whole


PAGE = """
import { readFile } from 'node:fs/promises';
const parts = {};
const part = () => ({ textContent: '', value: 'Public', selectedIndex: 0, disabled: false, on: {},
  replaceChildren() {}, addEventListener(name, does) { this.on[name] = does; } });
globalThis.document = { getElementById: (id) => (parts[id] ??= part()) };
globalThis.Option = class {};
const about = { name: 'm', tokens: 9, files: ['model.gguf'],
  scenarios: [{ name: 's', prompts: { Public: { text: 'p', whole: 'w' } } }] };
globalThis.fetch = async () => ({ ok: true, json: async () => about, blob: async () => 'blob' });
const { life } = await import('./wllama.js');
await import('./app.js');
const told = [];
for (const fault of JSON.parse(process.argv[2])) {
  life.fault = fault;
  await parts.ask.on.click();
  told.push([parts.status.textContent, parts.answer.textContent, parts.ask.disabled]);
}
console.log(JSON.stringify({ told, loads: life.loads, exits: life.exits }));
"""
FAKE_WLLAMA = """
export const life = { loads: 0, exits: 0, fault: '' };
export class Wllama {
  broken = false;
  setCompat() {}
  async loadModel() { life.loads += 1; if (life.fault === 'load') throw new Error('out of memory'); }
  async exit() { life.exits += 1; if (this.broken) throw new Error('the worker is gone'); }
  getNumThreads() { return 1; }
  async createCompletion() {
    if (this.broken) throw new Error('memory access out of bounds, again');
    if (life.fault === 'start') { this.broken = true; throw new WebAssembly.RuntimeError('unreachable'); }
    const fault = life.fault, model = this;
    return (async function* () {
      yield { choices: [{ text: 'yes' }] };
      if (fault === 'middle') { model.broken = true; throw new WebAssembly.RuntimeError('out of bounds'); }
      if (fault === 'stop') { const stop = new Error('stopped'); stop.name = 'AbortError'; throw stop; }
    })();
  }
}
"""


@pytest.mark.parametrize(
    ("faults", "loads", "exits"),
    [
        (["", ""], 1, 0),
        (["stop", ""], 1, 0),  # whoever stops an answer need not wait for the model again
        (["", "middle", ""], 2, 1),
        (["start", "start", ""], 3, 2),
        (["load", ""], 2, 0),
    ],
)
def test_the_page_answers_again_after_webassembly_failed(
    faults: list[str], loads: int, exits: int, tmp_path: Path
) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node.js is not installed")
    web = Path(browser.__file__).parent / "web"
    shutil.copyfile(web / "app.js", tmp_path / "app.js")
    for name, text in (("wllama.js", FAKE_WLLAMA), ("page.mjs", PAGE), ("package.json", '{"type": "module"}')):
        (tmp_path / name).write_text(text, encoding="utf-8")
    done = subprocess.run(
        [node, "page.mjs", json.dumps(faults)], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=60
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert (seen["loads"], seen["exits"]) == (loads, exits)
    for fault, (status, answer, disabled) in zip(faults, seen["told"], strict=True):
        assert not disabled
        assert fault or (status.startswith("Done") and answer == "yes")
        assert status.startswith("Stopped") == (fault == "stop")
        assert fault in ("", "stop") or ("did not work" in status and "again" in status)


def test_a_model_too_large_for_one_piece_is_split_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF" * 9)
    monkeypatch.setattr(browser, "LARGEST", 10)
    monkeypatch.setattr(browser.shutil, "which", lambda _: None)
    with pytest.raises(CourseError, match="install llama.cpp"):
        browser._model(gguf, tmp_path)
    monkeypatch.setattr(browser.shutil, "which", lambda _: "splitter")

    def split_it(command: list[str], check: bool) -> Any:
        assert check and command[:4] == ["splitter", "--split", "--split-max-size", "512M"]
        for i in (2, 1):
            Path(f"{command[-1]}-0000{i}-of-00002.gguf").write_bytes(b"x")
        return SimpleNamespace()

    monkeypatch.setattr(browser.subprocess, "run", split_it)
    assert browser._model(gguf, tmp_path) == ["model-00001-of-00002.gguf", "model-00002-of-00002.gguf"]
