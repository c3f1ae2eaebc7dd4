"""The browser page with a tuned model, in a real Chromium whose network is cut off: answers, seconds, a picture.

    python benchmarks/page_answers.py --out runs/quick      # after notebooks 05 and 08; needs Chromium or Chrome

Two stakeholders are asked: the first with the page just loaded, the second with the browser offline. Every answer must
have the five sections. Writes benchmarks/records/page.json and notebooks/figures/page.png, the picture in the README.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
NAMES = ("Financial", "Public")


def ask(page: Any, name: str) -> dict[str, Any]:
    """One stakeholder, first words and whole answer in seconds from the press of the button."""
    from playwright.sync_api import expect

    choice = next(o for o in page.locator("#stakeholder option").all_inner_texts() if name in o)
    page.get_by_label("Stakeholder").select_option(choice)
    start = time.perf_counter()
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#answer")).not_to_be_empty(timeout=600_000)
    first = time.perf_counter() - start
    expect(page.locator("#status")).to_have_text(re.compile("^Done"), timeout=600_000)
    seconds, text = time.perf_counter() - start, page.locator("#answer").text_content()
    return {"stakeholder": choice, "first_words_s": round(first, 1), "seconds": round(seconds, 1), "text": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="a run folder with a page")
    given = parser.parse_args()
    from playwright.sync_api import expect, sync_playwright

    from stakelib import machine
    from stakelib.evaluation.measures import HEADINGS, sections
    from stakelib.export import gguf_file
    from stakelib.export.serve import serving
    from stakelib.models import base_model, load_tokenizer
    from stakelib.run import Run

    told = json.loads((given.out / "run.json").read_text(encoding="utf-8"))["profile"]
    run = Run.open(given.out, told["name"], told["model"])
    base, browser = base_model(run.profile.model), next(filter(None, map(shutil.which, BROWSERS)))
    with sync_playwright() as play, serving(gguf_file(run, "q8"), base.folder, page=run.path("page")) as address:
        chrome = play.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        context = chrome.new_context(viewport={"width": 1000, "height": 1150})
        page, loads = context.new_page(), []
        page.on("request", lambda request: loads.append(request.url))
        page.goto(address)
        expect(page.locator("#status")).to_have_text(re.compile("^Ready"), timeout=120_000)
        answers = []
        for name in NAMES:
            answers.append(ask(page, name))
            context.set_offline(True)  # from here on not even the page's own address
            print({k: v for k, v in answers[-1].items() if k != "text"}, flush=True)
        page.screenshot(path=str(ROOT / "notebooks" / "figures" / "page.png"), full_page=True)
        agent = chrome.version
        chrome.close()
    tokenizer = load_tokenizer(base.folder)
    for answer in answers:
        tokens = len(tokenizer(answer["text"], add_special_tokens=False)["input_ids"])
        answer["tokens_per_s"] = round(tokens / (answer["seconds"] - answer["first_words_s"]), 1)
        answer["sections"] = [name for name, _ in sections(answer["text"])] == HEADINGS
    outside = [url for url in loads if not url.startswith((address, f"blob:{address}"))]
    record = {
        "model": run.profile.model,
        "browser": f"Chromium {agent}",
        "answers": answers,
        "outside": outside,
        "machine": machine.describe(ROOT),
    }
    target = ROOT / "benchmarks" / "records" / "page.json"
    target.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    if outside or not all(answer["sections"] for answer in answers):
        raise SystemExit(f"not as it should be: {outside or 'an answer without its five sections'}")


if __name__ == "__main__":
    main()
