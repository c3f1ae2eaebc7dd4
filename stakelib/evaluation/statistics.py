"""How sure: intervals and paired tests that hold for a few dozen prompts from a handful of scenarios."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from math import ceil, log2, sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from stakelib.evaluation.measures import MEASURES
from stakelib.run import CourseError

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

DRAWS = 2000  # bootstrap draws: the 2.5 % tail then rests on 50 of them
ALPHA = 0.05
JUDGED = sum(m.direction != "none" for m in MEASURES.values())
ICC = 0.1  # least correlation assumed between answers about one scenario: rates near 0 or 1 hide theirs


def wilson(k: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval for k successes of n; (0, 1), nothing known, for n = 0."""
    from statsmodels.stats.proportion import proportion_confint

    if n == 0:
        return 0.0, 1.0
    low, high = proportion_confint(k, n, alpha=ALPHA, method="wilson")
    return float(low), float(high)


def smallest_visible_difference(n: int, discordant: float = 0.3, tests: int = JUDGED) -> float:
    """Difference of two paired rates (0-1) that n pairs show with 80 % chance at the 5 % level; 1.0 if none.

    Solves Connor's (1987) sample size for McNemar's test, assuming that `discordant` of the pairs differ, at the level
    that Holm's correction asks of the first of `tests` measures. Pairs from the same scenario carry less than n
    separate ones, so this is a best case.
    """
    sure = NormalDist().inv_cdf(1 - ALPHA / 2 / tests)
    for points in range(1, 100):
        d = points / 100
        spread = max(discordant, d)
        if (sure * sqrt(spread) + 0.84 * sqrt(max(spread - d * d, 0))) ** 2 / d**2 <= n:
            return min(1.0, max(d, ceil(1 + log2(tests / ALPHA)) / n))  # the fewest pairs that the exact test can call
    return 1.0


def clustered_means(values: np.ndarray, clusters: Sequence[Any], seed: int = 0) -> np.ndarray:
    """DRAWS bootstrap means of each column of `values` (n, k), whole clusters drawn; shape (DRAWS, k).

    Spread is widened by sqrt(G/(G-1)) * t(G-1)/z: few clusters otherwise give intervals that are too short.
    """
    import numpy as np
    from scipy.stats import norm, t

    names, index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    groups = len(names)
    sums = np.zeros((groups, values.shape[1]))
    np.add.at(sums, index, values)
    picked = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=DRAWS)
    means = picked @ sums / (picked @ np.bincount(index))[:, None]
    if groups < 2:
        return np.full_like(means, np.nan)
    widen = sqrt(groups / (groups - 1)) * t.ppf(1 - ALPHA / 2, groups - 1) / norm.ppf(1 - ALPHA / 2)
    centre = values.mean(axis=0)
    return centre + (means - centre) * widen


def clustered_wilson(values: np.ndarray, clusters: Sequence[Any]) -> tuple[float, float]:
    """95 % Wilson interval of a rate whose values (0-1) share clusters: n shrinks by the design effect, z grows to t.

    The design effect is at least that of ICC; simulated worlds near 0 or 1 are then covered too (tests). Shares, which
    spread less than yes/no, get an interval that is too wide: a bootstrap near 1 has next to no width, and lies.
    """
    import numpy as np
    from scipy.stats import norm, t
    from statsmodels.stats.proportion import proportion_confint

    _, index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    n, groups, rate = len(values), index.max() + 1, values.mean()
    if groups < 2:
        return 0.0, 1.0
    variance = (np.bincount(index, values - rate) ** 2).sum() * groups / (groups - 1) / n**2
    seen = variance * n / (rate * (1 - rate)) if 0 < rate < 1 else 1.0
    effect = max(seen, 1 + ICC * (n / groups - 1))
    wider = 2 * norm.sf(t.ppf(1 - ALPHA / 2, groups - 1))
    low, high = proportion_confint(values.sum() / effect, n / effect, alpha=wider, method="wilson")
    return float(low), float(high)


def newcombe(base: np.ndarray, tuned: np.ndarray, clusters: Sequence[Any]) -> tuple[float, float]:
    """95 % interval of tuned - base of paired values 0-1 (Newcombe 1998, method 10, with limits that know clusters)."""
    import numpy as np

    p, q = base.mean(), tuned.mean()
    (p_low, p_high), (q_low, q_high) = clustered_wilson(base, clusters), clustered_wilson(tuned, clusters)
    phi = 0.0 if base.std() == 0 or tuned.std() == 0 else float(np.corrcoef(base, tuned)[0, 1])
    down = (q - q_low) ** 2 - 2 * phi * (q - q_low) * (p_high - p) + (p_high - p) ** 2
    up = (q_high - q) ** 2 - 2 * phi * (q_high - q) * (p - p_low) + (p - p_low) ** 2
    return float(q - p - sqrt(max(down, 0))), float(q - p + sqrt(max(up, 0)))


def _compare_one(
    first: np.ndarray, second: np.ndarray, clusters: Sequence[Any], kind: str, names: Sequence[str]
) -> dict[str, Any]:
    """Values, intervals, difference and p of one measure; rates with score intervals, numbers by bootstrap."""
    import numpy as np
    from statsmodels.stats.contingency_tables import mcnemar

    draws = clustered_means(np.column_stack([first, second, second - first]), clusters)
    low, high = np.quantile(draws, [ALPHA / 2, 1 - ALPHA / 2], axis=0)
    if kind != "number":
        (low[0], high[0]), (low[1], high[1]) = (clustered_wilson(x, clusters) for x in (first, second))
        d_low, d_high = newcombe(first, second, clusters)
        low[2], high[2] = np.fmin(low[2], d_low), np.fmax(high[2], d_high)  # whichever is wider
        low, high = np.maximum(low, [0, 0, -1]), np.minimum(high, [1, 1, 1])
    tail = min((draws[:, 2] <= 0).sum(), (draws[:, 2] >= 0).sum())
    p = float(min(1.0, 2 * (tail + 1) / (DRAWS + 1))) if np.isfinite(draws).all() else 1.0
    if kind == "yes/no":
        table = [[np.sum((first == i) & (second == j)) for j in (1, 0)] for i in (1, 0)]
        p = max(p, float(mcnemar(table, exact=True).pvalue))  # which takes answers about one scenario for separate ones
    line = {"n": len(first), "scenarios": len(set(clusters))}
    for i, (name, value) in enumerate(zip((*names, "difference"), (first, second, second - first), strict=True)):
        line |= {name: float(value.mean()), f"{name}_low": float(low[i]), f"{name}_high": float(high[i])}
    return {**line, "p": p}


def compare(
    scores: pd.DataFrame, measures: Sequence[str] | None = None, pair: tuple[str, str] = ("base", "tuned")
) -> pd.DataFrame:
    """The first system of `pair` against the second, paired by row: one line per measure that both have.

    Columns carry the systems' names; values as 0-1 (yes/no, share) or in their own unit. p: bootstrap clustered by
    scenario, for yes/no exact McNemar where that is larger; p_holm: corrected over all judged measures.
    verdict on the second: "better" or "worse" only if p_holm < 0.05 and the interval of the difference leaves out 0.
    """
    import pandas as pd

    if missing := set(pair) - set(scores["system"]):
        raise CourseError([f"no answers of '{s}'" for s in sorted(missing)], "ask both systems with answers() first")
    lines = []
    for name in measures or [m for m in MEASURES if m in scores]:
        about = MEASURES[name]
        wide = scores.pivot(index=["row_id", "scenario_id"], columns="system", values=name)
        wide = wide[list(pair)].astype(float).dropna()
        if len(wide):
            values = (wide[system].to_numpy() for system in pair)
            found = _compare_one(*values, list(wide.index.get_level_values("scenario_id")), about.kind, pair)
            lines.append(
                {
                    "measure": name,
                    "label": about.label,
                    "kind": about.kind,
                    "unit": about.unit,
                    "direction": about.direction,
                    **found,
                }
            )
    if not lines:
        raise CourseError(f"no row has {', '.join(measures or MEASURES)} of both systems", "score() them first")
    return _judged(pd.DataFrame(lines))


def _judged(table: pd.DataFrame) -> pd.DataFrame:
    """The lines of a comparison with p corrected over all of them that are judged, and the verdict."""
    from statsmodels.stats.multitest import multipletests

    judged = table["direction"] != "none"
    table["p_holm"] = float("nan")
    if judged.any():
        table.loc[judged, "p_holm"] = multipletests(table.loc[judged, "p"], method="holm")[1]
    table["verdict"] = [_verdict(line) for line in table.to_dict("records")]
    return table


def compare_each(scores: pd.DataFrame, measures: Sequence[str], pair: tuple[str, str] = ("base", "tuned")) -> Any:
    """`compare` for each stakeholder by itself, with p corrected over all stakeholders and measures together."""
    import pandas as pd

    parts = [compare(part, measures, pair).assign(stakeholder=who) for who, part in scores.groupby("stakeholder")]
    return _judged(pd.concat(parts, ignore_index=True))


def _verdict(line: dict[str, Any]) -> str:
    if line["direction"] == "none":
        return "not judged"
    if not (line["p_holm"] < ALPHA and (line["difference_low"] > 0 or line["difference_high"] < 0)):
        return "cannot tell"
    return "better" if (line["difference"] > 0) == (line["direction"] == "higher") else "worse"


def by_stakeholder(scores: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """Mean of each measure per stakeholder and system with n and its 95 % interval; NaN if from one scenario."""
    import numpy as np
    import pandas as pd

    lines = []
    for name in measures:
        for (who, system), part in scores.groupby(["stakeholder", "system"]):
            values, clusters = part[name].to_numpy(float), list(part["scenario_id"])
            if MEASURES[name].kind == "number":
                low, high = np.quantile(clustered_means(values[:, None], clusters), [ALPHA / 2, 1 - ALPHA / 2])
            else:
                low, high = clustered_wilson(values, clusters)
            about = {"measure": name, "label": MEASURES[name].label, "stakeholder": who, "system": system}
            found = {"n": len(values), "value": float(values.mean()), "low": float(low), "high": float(high)}
            lines.append(about | found)
    return pd.DataFrame(lines)


def gate(scores: pd.DataFrame, system: str = "tuned") -> pd.DataFrame:
    """The means of one system beside the bars of bars.json.

    Raises CourseError listing every measure on the wrong side of its bar, with the bar's reason, or not measured.
    """
    import pandas as pd

    bars = json.loads(files(__package__).joinpath("bars.json").read_text(encoding="utf-8"))
    part = scores[scores["system"] == system]
    if part.empty:
        raise CourseError(f"no answers of '{system}'", "ask it with ask() first")
    lines, problems, nothing = [], [], part.iloc[:0, 0]
    for name, bar in bars.items():
        upward, mean = MEASURES[name].direction == "higher", float(part.get(name, nothing).astype(float).mean())
        lines.append({"measure": name, "value": mean, **bar})
        if not (mean >= bar["bar"] if upward else mean <= bar["bar"]):
            found = "not measured" if mean != mean else f"{mean:.1%}"
            wanted = f"{'at least' if upward else 'at most'} {bar['bar']:.0%}"
            problems.append(f"{MEASURES[name].label}: {found}, wanted {wanted} ({bar['reason']})")
    if problems:
        raise CourseError(problems, "do not ship this model; read the worst answers in the report, then train again")
    return pd.DataFrame(lines)
