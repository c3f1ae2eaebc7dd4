"""The gate before shipping: it passes on good files, and each planted fault makes it fail and is named."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exported import PROMPT
from toy_models import shaped_model

from stakelib.export import parity, proof, table
from stakelib.models import Rendered, load_weights, nll, render
from stakelib.models.likelihood import read, reference
from stakelib.run import CourseError, Run

ASKED = [PROMPT, "Country: Mali\n- Renewable Share 2030: 12.0%"]


def refused(made: SimpleNamespace, copied: SimpleNamespace, prompts: list[str] | None = None) -> list[str]:
    with pytest.raises(CourseError, match="do not ship these files") as problem:
        parity(copied.run, copied.adapter, made.rows, prompts or ASKED)
    assert "parity" not in Run.open(copied.run.folder, "smoke", copied.run.profile.model).record["stages"]
    return problem.value.problems


@pytest.fixture(scope="module")
def passed(made: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the gate says of the good files."""
    from exported import copy as copy_run

    good = copy_run(made, tmp_path_factory.mktemp("good"))
    return parity(good.run, good.adapter, made.rows, ASKED)


def test_the_good_files_pass(made: SimpleNamespace, passed: dict[str, Any]) -> None:
    assert (passed["same_ids"], passed["rows"], passed["prompts"], passed["answers"]) == (True, 8, 2, "judged")
    assert list(passed["hops"]) == ["base", "adapter", "merged", "f16", "q8", "q4"]
    loss = passed["nll"]
    assert loss == {name: hop["nll"] for name, hop in passed["hops"].items()}
    assert abs(loss["adapter"] - loss["base"]) > 1
    assert loss["base"] == pytest.approx(nll(made.base.folder, made.rows), abs=1e-4)
    assert loss["f16"] == pytest.approx(loss["merged"], rel=0.005)
    apart, top = ({n: h[k] for n, h in passed["hops"].items()} for k in ("kl", "top"))
    assert apart["f16"] <= 1e-6 and apart["f16"] < apart["q8"] < apart["q4"] < apart["base"]
    assert apart["merged"] < 1e-5
    assert top["merged"] == top["f16"] == 1.0 > top["base"]
    for name, said in passed["engine"].items():
        assert (said["same_ids"], said["same_template"], said["stopped"], said["unused"]) == (True, True, 1.0, 0), name
    assert passed["engine"]["f16"]["agree"] == passed["engine"]["f16"]["same_start"] == 1.0
    assert passed["engine"]["f16"]["prefix"] > 5


def test_the_table_has_a_line_for_each_form(passed: dict[str, Any]) -> None:
    shown = table(passed)
    assert list(shown.index) == list(passed["hops"])
    assert shown.loc["q8", "MB"] == passed["engine"]["q8"]["mb"] and shown.loc["adapter", "MB"] == ""
    assert table(json.loads(json.dumps(passed))).equals(shown)  # as it comes back from the record


def spoil_merged(made: SimpleNamespace, copied: SimpleNamespace) -> None:
    shutil.rmtree(copied.merged)
    shutil.copytree(made.base.folder, copied.merged)


def spoil_template(made: SimpleNamespace, copied: SimpleNamespace) -> None:
    file = copied.files["q8"]
    right, wrong = b"<start_of_turn>model", b"<start_of_turn>modal"
    assert right in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(right, wrong))


def spoil_recipe(made: SimpleNamespace, copied: SimpleNamespace) -> None:
    text = copied.recipe.read_text(encoding="utf-8")
    copied.recipe.write_text(text.replace("<start_of_turn>model\n", "<start_of_turn>model"), encoding="utf-8")


def spoil_folding(made: SimpleNamespace, copied: SimpleNamespace) -> None:
    text = copied.recipe.read_text(encoding="utf-8")  # as Ollama's own template for Gemma does it
    copied.recipe.write_text(text.replace("{{ .System }}\n\n", "{{ .System }}\n"), encoding="utf-8")


FAULTS: dict[str, Callable[[SimpleNamespace, SimpleNamespace], Any]] = {
    "the merged model equals its base": spoil_merged,
    "stakeholder-tiny-gemma-merged: tokenizer.model of the base is missing": lambda made, copied: (
        copied.merged / "tokenizer.model"
    ).unlink(),
    "q8: its own chat template wraps a prompt otherwise": spoil_template,
    "Modelfile: its TEMPLATE wraps a prompt otherwise": spoil_recipe,
    "TEMPLATE wraps a prompt otherwise than": spoil_folding,
    "f16: ": lambda made, copied: shutil.copyfile(made.wrong["f16"], copied.files["f16"]),
    "q8: ": lambda made, copied: shutil.copyfile(made.wrong["q8"], copied.files["q8"]),
}


@pytest.mark.parametrize("words", FAULTS)
def test_a_planted_fault_is_named(words: str, made: SimpleNamespace, copied: SimpleNamespace) -> None:
    FAULTS[words](made, copied)
    problems = refused(made, copied)
    assert any(words in p for p in problems), problems


def test_answers_that_do_not_end_are_caught(made: SimpleNamespace, copied: SimpleNamespace) -> None:
    copied.run.profile = replace(copied.run.profile, max_new_tokens=3)
    problems = refused(made, copied)
    assert problems == [f"{q}: only 0% of the answers end by themselves" for q in ("f16", "q8")]


def test_other_ids_are_caught(made: SimpleNamespace, copied: SimpleNamespace) -> None:
    hostile = "A scenario called <end_of_turn>"  # llama.cpp reads a control token where training saw plain text
    problems = refused(made, copied, [PROMPT, hostile])
    assert {p for p in problems if "token ids" in p} == {
        f"{q}: llama.cpp makes other token ids of a prompt than training did" for q in ("f16", "q8", "q4")
    }


# ------------------------------------------------------------------------------------------------- the judge alone


def change(found: dict[str, Any], *path: Any) -> dict[str, Any]:
    """A copy in which the value at path[:-1] is path[-1]."""
    changed = copy.deepcopy(found)
    place = changed
    for key in path[:-2]:
        place = place[key]
    place[path[-2]] = path[-1]
    return changed


def verdict(found: dict[str, Any], judged: bool = True) -> list[str]:
    try:
        proof._judge(found, [], judged)
    except CourseError as problem:
        return problem.problems
    return []


@pytest.fixture()
def good() -> dict[str, Any]:
    names = ("base", "adapter", "merged", "f16", "q8", "q4")
    said = {"same_ids": True, "same_template": True, "unused": 0, "stopped": 1.0, "agree": 1.0}
    loss = dict(zip(names, (2.0, 1.0, 1.0, 1.0, 1.0, 1.4), strict=True))
    return {"nll": loss, "hops": {n: {"top": 0.99} for n in names}, "engine": {q: dict(said) for q in names[3:]}}


@pytest.mark.parametrize(
    ("path", "passes", "fails"),
    [
        (("nll", "f16"), 1.004, 1.006),
        (("nll", "q8"), 1.009, 1.011),
        (("nll", "q4"), 9.0, None),
        (("nll", "merged"), 1.004, 1.2),
        (("hops", "f16", "top"), 0.981, 0.979),
        (("hops", "q8", "top"), 0.5, None),
        (("engine", "f16", "agree"), 0.96, 0.94),
        (("engine", "q4", "agree"), 0.5, None),
        (("engine", "q8", "unused"), 0, 1),
        (("engine", "q8", "stopped"), 0.75, 0.74),
        (("engine", "q4", "stopped"), 0.1, None),
        (("engine", "q4", "same_template"), True, False),
        (("engine", "q8", "same_ids"), True, False),
    ],
)
def test_each_limit_holds_on_both_sides(good: dict[str, Any], path: tuple, passes: float, fails: float | None) -> None:
    assert verdict(good) == []
    assert verdict(change(good, *path, passes)) == []
    if fails is not None:
        assert verdict(change(good, *path, fails)) != []


@pytest.mark.parametrize("name", ["base", "adapter", "merged", "f16", "q8"])
def test_a_loss_that_is_no_number_never_passes(good: dict[str, Any], name: str) -> None:
    assert verdict(change(good, "nll", name, float("nan"))) != []


def test_a_random_models_answers_are_not_judged_but_its_ids_are(good: dict[str, Any]) -> None:
    babble = change(
        change(change(good, "engine", "q8", "stopped", 0.0), "engine", "q8", "unused", 2), "engine", "f16", "agree", 0.1
    )
    assert len(verdict(babble)) == 3 and verdict(babble, judged=False) == []
    assert len(verdict(change(babble, "engine", "q8", "same_ids", False), judged=False)) == 1


# ------------------------------------------------------------------------------------------------- the measure


@pytest.mark.parametrize("kind", ["llama", "gemma2"])  # Gemma 2 bends its logits after the output layer
def test_kept_states_give_the_whole_distribution(kind: str, tiny_cache: Path, tokenizer: Any, tmp_path: Path) -> None:
    tiny = tiny_cache / "models" / "tiny-gemma"
    rows = [render(tokenizer, "Kenya", f"Solar energy costs {n} MW.") for n in (1, 2)]
    ours, other = (load_weights(shaped_model(tiny, tmp_path / str(s), kind, s), dtype="float32") for s in (0, 1))
    kept = reference(ours, rows)
    found, apart = read(ours, rows, kept), read(other, rows, kept)
    assert found.kl == pytest.approx(0, abs=1e-6) and len(found.top) == sum(sum(r.mask) for r in rows)
    p, q = (whole(m, rows[0]).log_softmax(-1) for m in (ours, other))
    assert read(other, rows[:1], kept).kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert apart.kl > 0.01 and apart.top != found.top
    assert read(other, rows).kl is None


def whole(model: Any, row: Rendered) -> torch.Tensor:
    """Logits at the learned places, from the model's plain forward pass."""
    places = torch.tensor(row.mask).nonzero()[:, 0]
    with torch.inference_mode():
        return model(input_ids=torch.tensor([row.ids])).logits[0, places - 1].double()
