"""Voices that differ: no sentence too often, no text like another, and a group and a stance that can be told apart.

Names and numbers are masked, and country, scenario and pool; the classifier sees only texts about other countries.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable
from itertools import groupby
from operator import attrgetter
from pathlib import Path

import pytest
import yaml
from scipy.stats import binom
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

from stakelib.dialogues import Dialogue, build, check, completion_text, prompt_text
from stakelib.dialogues.check import sections
from stakelib.dialogues.numbers import mentions, ungrounded
from stakelib.evaluation.measures import different
from stakelib.scenarios import Scenario, country_profile, sample
from stakelib.voices import CONTEXTS, STAKEHOLDERS, VARIANTS, respond
from stakelib.voices.profiles import parse_profile

DATA = Path(__file__).parents[1] / "stakelib" / "voices" / "data"
MOST_OFTEN, BLEU, GROUP, STANCE = 0.08, 0.35, 0.97, 0.75  # what 300 scenarios must keep
SIZES = [pytest.param(18, id="18"), pytest.param(300, id="300", marks=pytest.mark.slow)]


def every_voice(scenarios: list[Scenario]) -> list[Dialogue]:
    """One row per scenario, stakeholder and stance, each from a brief of a few figures, as in training."""
    rows = build(scenarios, {name: 3 * len(scenarios) for name in STAKEHOLDERS})
    assert len({(r.scenario_id, r.stakeholder_id, r.variant) for r in rows}) == 27 * len(scenarios)
    return rows


def from_all_figures(scenarios: list[Scenario]) -> list[Dialogue]:
    """The same, told every figure of the scenario."""
    rows = every_voice(scenarios)
    known = {(s.metadata.country, s.metadata.scenarioName): s for s in scenarios}
    out = []
    for i, row in enumerate(rows):
        scenario, context = known[row.country, row.scenario], CONTEXTS[i % 3]
        said = respond(scenario, row.stakeholder_id, context=context, variant=row.variant)
        text, prompt = completion_text(said), prompt_text(scenario, row.stakeholder_id, context, row.variant)
        out.append(
            row.model_copy(update={"completion": text, "prompt": prompt, "facts": said.facts, "context": context})
        )
    return out


def masked(text: str, row: Dialogue) -> str:
    names = (row.scenario, row.country, country_profile(row.country).get("pool", row.country))
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(name, "NAME")
    return re.sub(r"\d[\d,.]*\d|\d", "#", text)


def sentences(row: Dialogue) -> set[str]:
    """Masked sentences; of a concern the headline and the reason apart, without severity."""
    found = sections(row.completion)
    assert found is not None
    parts = [
        part
        for items in found.values()
        for item in items
        for part in re.split(r"(?<=[.!?]) |(?<=\w): (?=[A-Z])", re.sub(r"^\[\w+\] ", "", item))
    ]
    return {masked(part, row) for part in parts}


def most_often(rows: list[Dialogue]) -> tuple[float, str]:
    counts = Counter(sentence for row in rows for sentence in sentences(row))
    sentence, times = counts.most_common(1)[0]
    return times / len(rows), sentence


def grams(row: Dialogue) -> list[Counter[tuple[str, ...]]]:
    words = re.findall(r"\w+|[^\w\s]", masked(row.completion, row))
    return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in (1, 2, 3, 4)]


def bleu(one: list[Counter[tuple[str, ...]]], other: list[Counter[tuple[str, ...]]]) -> float:
    """Sentence BLEU-4 with sacrebleu's exponential smoothing (0 to 1)."""
    logs, smooth = 0.0, 1.0
    for mine, theirs in zip(one, other, strict=True):
        same = float((mine & theirs).total())
        if not same:
            smooth *= 2
            same = 1 / smooth
        logs += math.log(same / max(1, mine.total())) / 4
    return math.exp(logs) * min(1.0, math.exp(1 - other[0].total() / one[0].total()))


def mean_bleu(rows: list[Dialogue], pairs: int = 400) -> float:
    rng, texts = random.Random(0), [grams(row) for row in rows]
    return sum(bleu(*rng.sample(texts, 2)) for _ in range(pairs)) / pairs


def accuracy(rows: list[Dialogue], label: str) -> float:
    """Of a plain classifier, on countries it has not seen."""
    texts = []
    for row in rows:
        profile = STAKEHOLDERS[row.stakeholder_id]
        text = re.sub(r"\*\*.*?\*\*:|\[\w+\]", " ", masked(row.completion, row)).lower()
        for words in (*profile.priorities, profile.name, *VARIANTS):
            text = text.replace(words.lower(), " ")
        texts.append(text)
    wanted = [getattr(row, label) for row in rows]
    words = TfidfVectorizer(min_df=2, sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(C=10, max_iter=200, tol=1e-3))
    told = cross_val_predict(model, texts, wanted, groups=[row.country for row in rows], cv=GroupKFold(2))
    return sum(a == b for a, b in zip(told, wanted, strict=True)) / len(rows)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("rows_of", [every_voice, from_all_figures])
def test_texts_are_grounded_rich_and_varied(rows_of: object, n: int, tell: Callable[[str], None]) -> None:
    scenarios = sample(n, seed=23)
    rows = rows_of(scenarios)  # type: ignore[operator]
    assert all(gate["failures"] == 0 for gate in check(rows))  # figures, claims, sections, duplicates
    assert all(ungrounded(row.completion, row.prompt) == [] for row in rows[:: max(1, len(rows) // 200)])
    assert [row.id for row in rows if len(row.facts) < min(3, different(mentions(row.prompt)))] == []
    few = n < 300  # in so few texts a sentence of 8 % comes up this often once in ten thousand times
    often = binom.ppf(0.9999, 3 * n, MOST_OFTEN) / (3 * n) if few else MOST_OFTEN
    alike = 1.05 * BLEU if few else BLEU
    table = {
        name: (most_often(group), mean_bleu(group))
        for name, group in ((k, list(g)) for k, g in groupby(rows, key=attrgetter("stakeholder_id")))
    }
    for name, ((share, sentence), score) in table.items():
        tell(f"{name:21} BLEU-4 {score:.3f}  {share:.3f} {sentence}")
    assert {k: v for k, v in table.items() if v[0][0] > often or v[1] > alike} == {}


@pytest.mark.parametrize("n", SIZES)
def test_group_and_stance_are_heard(n: int) -> None:
    rows = every_voice(sample(n, seed=29))
    assert accuracy(rows, "stakeholder_id") >= GROUP
    assert accuracy(rows, "variant") >= STANCE
    mixed = [row.model_copy(update={"variant": random.Random(i).choice(VARIANTS)}) for i, row in enumerate(rows)]
    assert accuracy(mixed, "variant") < 0.45  # the twin that must fail: stances dealt out by chance


def test_the_measures_see_a_form_letter() -> None:
    rows = build(sample(6, seed=1), {"finance": 18})
    same = rows[:1] * 18
    assert most_often(same)[0] == 1.0
    assert mean_bleu(same, 20) == pytest.approx(1.0)
    assert mean_bleu(rows, 50) < 0.5


def test_a_text_does_not_repeat_its_turns_of_phrase() -> None:
    """A lead into a question comes up once in a text."""
    leads = re.compile(r"^- ([A-Z][^,?\d]+), (?=[a-z])", re.M)
    rows = build(sample(12, seed=3), 240)
    found = [leads.findall(row.completion.split("**Questions**")[1].split("**Engagement")[0]) for row in rows]
    assert sum(map(len, found)) > 100
    assert [lead for row in found for lead, times in Counter(row).items() if times > 1] == []


def test_the_readme_of_the_voices_is_true() -> None:
    """Its example, put into a real file, is accepted, and all the figures and conditions that it names are known."""
    text = (DATA / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```yaml\n(.*?)```", text, re.S)
    assert example is not None
    voice = yaml.safe_load((DATA / "finance.yaml").read_text(encoding="utf-8"))
    voice |= yaml.safe_load(example[1])
    conditions = [
        c
        for c in re.findall(r"`((?:no )?[a-z_]+(?:\.[a-z]+ (?:<|>=) [\d.]+)?)`", text)
        if " " in c or c in ("island", "mainland", "pool")
    ]
    assert len(conditions) >= 6
    voice["advice"].append({"when": conditions, "say": re.findall(r"`(\{[a-z_.]+\})`", text)})
    voice["advice"][-1]["say"] = ["Mind all of " + " ".join(voice["advice"][-1]["say"])]
    profile = parse_profile("finance.yaml", yaml.safe_dump(voice))
    assert profile.concerns[0].metric == "storage" and len(profile.concerns[0].text) == 2
