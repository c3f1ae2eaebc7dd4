"""Every notebook, opened in JupyterLab in a real Chromium and run from top to bottom; the report, opened from disk.

Pictures of what a person sees go to $STAKE_SHOTS if that is set.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from test_report import HOSTILE, make

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p.name for p in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
TOKEN = "stakeholders"

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def chromium() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None and os.environ.get("CI"):
        pytest.fail("no Chromium or Chrome on this machine: CI must have one")
    if found is None:
        pytest.skip("no Chromium or Chrome on this machine")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=found, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """JupyterLab on a copy of the notebooks, in the smoke profile; yields its address and the run root."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"STAKE_PROFILE": "smoke", "STAKE_RUN_ROOT": str(folder / "runs"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root"]
    command += [f"--IdentityProvider.token={TOKEN}", "--LabApp.expose_app_in_browser=True", str(folder / "notebooks")]
    with (folder / "lab.log").open("w", encoding="utf-8") as log:
        server = subprocess.Popen(command, env={**os.environ, **settings}, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(f"http://127.0.0.1:{port}/api?token={TOKEN}", server, folder / "lab.log")
            yield f"http://127.0.0.1:{port}", folder / "runs"
        finally:
            server.terminate()
            server.wait(60)


def wait_for(address: str, server: subprocess.Popen, log: Path, seconds: float = 60) -> None:
    for _ in range(int(seconds * 5)):
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(address, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not answer:\n{log.read_text(encoding='utf-8')[-2000:]}")


def shot(page: object, name: str) -> None:
    if folder := os.environ.get("STAKE_SHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


RUN_ALL = """async () => {
  const app = window.jupyterapp;
  const panel = app.shell.currentWidget;
  await panel.context.ready;
  await panel.sessionContext.ready;
  await app.commands.execute('notebook:run-all-cells');
  return panel.content.model.toJSON();
}"""


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_top_to_bottom_in_jupyterlab(name: str, chromium, lab: tuple[str, Path]) -> None:
    address, _ = lab
    page = chromium.new_page(viewport={"width": 1280, "height": 1600})
    page.set_default_timeout(240_000)
    loads: list[str] = []
    page.on("request", lambda request: loads.append(request.url))
    page.goto(f"{address}/lab/tree/{name}?token={TOKEN}&reset")
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell")
    page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.context?.isReady")
    notebook = page.evaluate(RUN_ALL)
    shot(page, Path(name).stem)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    errors = [o for cell in code for o in cell["outputs"] if o["output_type"] == "error"]
    assert [f"{o['ename']}: {o['evalue']}" for o in errors] == []
    assert all(cell["execution_count"] for cell in code), "a cell did not run"
    broken = "() => [...document.querySelectorAll('.jp-MarkdownOutput img')].filter(i => !i.naturalWidth).length"
    assert page.evaluate(broken) == 0
    outside = [url for url in loads if not url.startswith((address, "data:", "blob:"))]
    assert outside == [], "something came from outside"
    page.close()


def test_report_opens_from_disk_and_loads_nothing(chromium, lab: tuple[str, Path]) -> None:
    """After the notebooks above: the report they made, by double-click, on a phone's width too."""
    report = lab[1] / "smoke" / "report.html"
    assert report.exists(), "notebook 06 leaves it"
    page = chromium.new_page(viewport={"width": 375, "height": 800})
    loads: list[str] = []
    page.on("request", lambda request: loads.append(request.url))
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= 375, "wider than a phone"
    assert all(url.startswith(("file:", "data:")) for url in loads)
    assert page.locator("h1").count() == 1 and page.locator("img, svg").count() >= 2
    shot(page, "report-phone")
    page.close()


def test_the_page_answers_for_two_stakeholders_without_a_network(chromium, lab: tuple[str, Path]) -> None:
    """The page that notebook 08 made of the tiny model: what it says is noise, but it must say it token by token."""
    from playwright.sync_api import expect

    from stakelib.export.serve import serving
    from stakelib.models import base_model

    run = lab[1] / "smoke"
    assert (run / "page" / "prompts.json").exists(), "notebook 08 leaves it; its first start needs a network"
    gguf = run / "models" / "stakeholder-tiny-gemma-q8.gguf"
    with serving(gguf, base_model("tiny-gemma").folder, page=run / "page") as address:
        context = chromium.new_context(viewport={"width": 375, "height": 900})
        page, loads, said = context.new_page(), [], set()
        page.on("request", lambda request: loads.append(request.url))
        page.goto(address)
        expect(page.locator("#status")).to_have_text(re.compile("^Ready"), timeout=60_000)
        assert page.evaluate("crossOriginIsolated")
        for number, name in enumerate(("Financial", "Public")):
            choice = next(o for o in page.locator("#stakeholder option").all_inner_texts() if name in o)
            page.get_by_label("Stakeholder").select_option(choice)
            assert choice in page.locator("#prompt").text_content()
            page.evaluate(
                "seen = []; new MutationObserver(() => seen.push(document.getElementById('answer')"
                ".textContent.length)).observe(document.getElementById('answer'), {childList: true})"
            )
            page.get_by_role("button", name="Ask").click()
            expect(page.locator("#status")).to_have_text(re.compile("^Done"), timeout=120_000)
            assert len(page.evaluate("[...new Set(seen)]")) > 3, "tokens come in one by one"
            said.add(page.locator("#answer").text_content())
            if number == 0:
                context.set_offline(True)  # the model is there now: not even its own address is needed
        assert len(page.locator("#answer *").all()) == 0, "text, never markup"
        outside = [url for url in loads if not url.startswith((address, f"blob:{address}"))]
        assert outside == [] and all(said)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, "wider than a phone"
        shot(page, "08-page-phone")
        context.close()


def test_a_report_about_a_hostile_scenario_does_nothing(chromium, tmp_path: Path) -> None:
    made, name = make(tmp_path, HOSTILE, ("Ada",)), "alert(1)"
    page = chromium.new_page()
    seen: list[str] = []
    page.on("dialog", lambda dialog: (seen.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: seen.append(request.url))
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_timeout(500)
    assert [x for x in seen if not x.startswith(("file:", "data:"))] == []
    assert page.locator("script").count() == 0 and page.locator("main").inner_text().count(name) > 3 and name in made[0]
    (tmp_path / "twin.html").write_text(f"<p>{HOSTILE}", encoding="utf-8")  # not escaped: this test sees it
    page.goto((tmp_path / "twin.html").as_uri())
    page.wait_for_timeout(500)
    assert "1" in seen
    page.close()


def open_and_run(page: object, address: str, name: str) -> None:
    page.goto(f"{address}/lab/tree/{name}?token={TOKEN}&reset")
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell")
    page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.context?.isReady")
    page.evaluate(RUN_ALL)


def test_an_edit_in_the_pager_outlives_the_page_and_a_killed_kernel(chromium, lab: tuple[str, Path]) -> None:
    address, runs = lab
    edits, said = runs / "smoke" / "training_data" / "edits.jsonl", "Bring the village map."
    assert not edits.exists()
    page = chromium.new_page(viewport={"width": 1280, "height": 1600})
    page.set_default_timeout(120_000)
    open_and_run(page, address, "02_review_and_enhance.ipynb")
    field = page.locator(".jp-OutputArea textarea:not([disabled])").first
    text = field.input_value()
    assert text.startswith("**Initial Reaction**")
    field.fill(text[: text.rindex("- ")] + f"- {said}")
    for _ in range(60):  # half a second each; a busy computer is slow
        page.wait_for_timeout(500)
        if edits.exists() and said in edits.read_text(encoding="utf-8"):
            break
    assert said in edits.read_text(encoding="utf-8"), "an edit goes to disk while it is typed"
    field.scroll_into_view_if_needed()
    shot(page, "02-pager")
    kernels = [p for p in psutil.process_iter(["cmdline"]) if "ipykernel_launcher" in " ".join(p.info["cmdline"] or ())]
    ours = [p for p in kernels if any(str(os.getpid()) == str(a.pid) for a in p.parents())]
    assert ours
    for process in ours:
        process.kill()
    page.reload()
    open_and_run(page, address, "02_review_and_enhance.ipynb")
    again = page.locator(".jp-OutputArea textarea:not([disabled])").first
    assert again.input_value().endswith(f"- {said}")
    assert "1 edited" in page.locator(".jp-NotebookPanel").inner_text()
    page.close()


BALLOT = """
from pathlib import Path
from stakelib import widgets
from stakelib.evaluation import Rating
rows = [{"id": f"r{i}", "stakeholder": "Grid Operators", "prompt": "<img src=x onerror=alert(1)>"} for i in range(2)]
said = [{"row_id": f"r{i}", "system": s, "text": f"{s} <script>alert({i})</script>" + " and so on" * 120}
        for i in range(2) for s in ("base", "tuned")]
widgets.rate(Rating(Path("votes"), rows, said, "Ada"))
"""


def press(page: object, *keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)
        page.wait_for_timeout(150)


def test_two_pairs_are_rated_with_the_keyboard_alone(chromium, lab: tuple[str, Path]) -> None:
    import nbformat

    address, folder = lab[0], lab[1].parent / "notebooks"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}  # without it JupyterLab asks for one
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(BALLOT)], metadata=kernel)
    nbformat.write(made, folder / "ballot.ipynb")
    page = chromium.new_page(viewport={"width": 1280, "height": 1600})
    page.set_default_timeout(120_000)
    alerts: list[str] = []
    page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
    open_and_run(page, address, "ballot.ipynb")
    hidden = "t => [...document.querySelectorAll(t)].filter(x => x.scrollHeight > x.clientHeight + 1).length"
    assert page.evaluate(hidden, ".jp-OutputArea textarea") == 0, "text that only a mouse can scroll to"
    page.locator(".jp-OutputArea button:has-text('A is better')").first.focus()
    for _ in range(2):  # accuracy A, naturalness same, relevance B, specificity A; then next, and back to the first
        for tabs, key in ((0, "Space"), (4, "Space"), (4, "Enter"), (1, "Space"), (4, "Space")):
            press(page, *["Tab"] * tabs, key)
        press(page, *["Shift+Tab"] * 13)
    page.wait_for_timeout(1000)
    votes = [json.loads(x) for x in (folder / "votes" / "ratings-ada.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [v["choice"] for v in votes] == ["A", "same", "B", "A"] * 2
    assert len({v["row_id"] for v in votes}) == 2 and len({v["criterion"] for v in votes}) == 4
    assert page.locator(".jp-Notebook .jp-Cell").count() == 1, "a key that a button takes must not move or add cells"
    assert alerts == [] and page.locator(".jp-OutputArea img").count() == 0
    shot(page, "06-ballot")
    page.close()
