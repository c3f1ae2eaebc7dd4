"""Small figures a planner reads at a glance. Each returns a Chart: a matplotlib Figure that carries its alt text.

No pyplot, so nothing is global and nothing opens a window; a notebook shows a Chart as it is. base is always a grey
hollow circle and tuned a blue filled one, so that shape tells them apart without colour.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

INK, GREY, BASE, TUNED, WARN, GREEN = "#1b1f24", "#d5d9de", "#6b7280", "#0072B2", "#D55E00", "#007a5a"  # Okabe-Ito
FLEET = {
    "coal": "#3a3a3a",
    "gas": "#8c8c8c",
    "diesel": "#b08a5b",
    "hfo": "#7d5a3c",
    "nuclear": "#CC79A7",
    "hydro": "#0072B2",
    "geothermal": "#b5463c",
    "biomass": "#5a7d2a",
    "wind": "#56B4E9",
    "solarPV": "#E69F00",
    "solarCSP": "#D55E00",
    "battery": "#009E73",
    "pumpStorage": "#66c2a5",
    "interconnector": "#d5d9de",
}
NATS = "nats per token\n(lower is better)"
LOOKS = ({"color": BASE, "markerfacecolor": "white"}, {"color": TUNED, "markerfacecolor": TUNED})  # of base, of tuned
PAIR = ("base", "tuned")


@cache
def chart_class() -> type:
    """The Figure class of this module, made on first use because matplotlib is slow to import."""
    from matplotlib.figure import Figure

    class Chart(Figure):
        alt = ""

        def __repr__(self) -> str:
            return self.alt or super().__repr__()

        def _repr_png_(self) -> bytes:
            out = io.BytesIO()
            self.savefig(out, format="png", dpi=110)
            return out.getvalue()

    return Chart


def _chart(title: str, alt: str, cols: int = 1, size: tuple = (7, 3.2), **kw: Any) -> tuple[Any, list[Any]]:
    """A Chart with a left-aligned title and quiet axes; returns (chart, its axes)."""
    chart = chart_class()(figsize=size, layout="constrained")
    chart.alt = f"{title}. {alt}"
    lines = textwrap.fill(title, int(11 * size[0]))
    money = {"parse_math": False}  # a "$" in a scenario name is money, not mathematics
    chart.suptitle(lines, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK, **money)
    axes = list(chart.subplots(1, cols, squeeze=False, **kw).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(GREY)
        axis.tick_params(colors=INK, labelsize=9, length=0)
    return chart, axes


def _grid(axis: Axes, counts: Sequence[Sequence[int]], most: float, across: Sequence[str], down: Sequence[str]) -> None:
    """Counts as a field of blues, the darkest at `most`; the numbers in it are left to the caller."""
    axis.imshow(counts, cmap="Blues", vmin=0, vmax=most, aspect="auto")
    axis.set_xticks(range(len(across)), across)
    axis.set_yticks(range(len(down)), down)


def loss_curve(result: Mapping[str, Any]) -> Any:
    """Training and validation loss (nats per token) per optimiser step, the best validation marked.

    `result`: what train() returns, with "train_loss" and "valid_loss" as lists of (step, loss); either may be empty.
    """
    points = {k: list(result.get(k, ())) for k in ("train_loss", "valid_loss")}
    best = min(points["valid_loss"], key=lambda p: p[1], default=None)
    first = points["valid_loss"][0] if best else None
    title = f"Validation loss went from {first[1]:.2f} to {best[1]:.2f}" if best else "Training loss"
    chart, (axis,) = _chart(title, f"Best at step {best[0]}." if best else "No validation yet.")
    lines = (
        ("train_loss", "training", {"color": BASE, "lw": 1}),
        ("valid_loss", "validation", {"color": TUNED, "lw": 2, "marker": "o", "ms": 4}),
    )
    for key, label, style in lines:
        axis.plot([step for step, _ in points[key]], [loss for _, loss in points[key]], label=label, **style)
    if best:
        axis.plot(*best, marker="o", ms=11, mfc="none", mec=WARN, mew=2, ls="none", label=f"best, step {best[0]}")
    axis.set(xlabel="optimiser step", ylabel="loss (nats per token)", ylim=(0, None))
    axis.grid(axis="y", color=GREY, lw=0.6)
    axis.legend(frameon=False, fontsize=9)
    return chart


def trend(values: Mapping[float, float], what: str) -> Any:
    """Best validation loss (nats per token) over settings that differ by factors; `what` names them ("rows")."""
    best = min(values, key=values.__getitem__)
    told = "; ".join(f"{x:g}: {loss:.2f}" for x, loss in values.items())
    chart, (axis,) = _chart(f"Lowest validation loss: {values[best]:.2f}, with {what} {best:g}", told, size=(7, 2.8))
    axis.plot(list(values), list(values.values()), marker="o", lw=2, color=TUNED, clip_on=False)
    axis.set(xscale="log", xlabel=what)
    axis.set_xticks(list(values), [f"{x:g}" for x in values])
    axis.minorticks_off()
    axis.set_ylabel(NATS, fontsize=9)
    return chart


def lengths(counts: Sequence[int], limit: int) -> Any:
    """Histogram of row lengths in tokens with the limit; `counts` is one token count per row."""
    over = sum(n > limit for n in counts)
    title = (
        f"{over} of {len(counts)} rows are longer than {limit:,} tokens"
        if over
        else (f"All {len(counts)} rows fit: the longest has {max(counts):,} of {limit:,} tokens")
    )
    chart, (axis,) = _chart(title, f"Histogram of tokens per row, from {min(counts)} to {max(counts)}.", size=(7, 2.8))
    steps = range(math.ceil(max(*counts, limit) / limit * 40) + 1)  # 40 bars up to the limit, which is an edge
    _, edges, bars = axis.hist(counts, bins=[limit * i / 40 for i in steps], color=TUNED, edgecolor="white", lw=0.5)
    for edge, bar in zip(edges, bars, strict=False):
        if edge >= limit:
            bar.set_color(WARN)
    axis.axvline(limit, color=WARN, lw=2, ls="--")
    axis.annotate(
        f"limit {limit:,}",
        (limit, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 2),
        color=WARN,
        ha="right",
        va="bottom",
        textcoords="offset points",
        fontsize=9,
    )
    axis.set(xlim=(0, max(limit, *counts) * 1.03), xlabel="tokens per row (prompt and reply)", ylabel="rows")
    return chart


def coverage(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Grid of row counts, stakeholder by split; empty cells stand out, because a gap is what to look for."""
    found = Counter((r["stakeholder"], r["split"]) for r in rows)
    down = list(dict.fromkeys(name for name, _ in found))
    right = [s for s in ("train", "valid", "test") if any(split == s for _, split in found)]
    counts = [[found[name, split] for split in right] for name in down]
    empty = sum(n == 0 for line in counts for n in line)
    title = f"{len(rows)} rows: " + (f"{empty} empty cells" if empty else "every stakeholder in every split")
    told = "; ".join(f"{name}: " + ", ".join(f"{found[name, s]} {s}" for s in right) for name in down)
    chart, (axis,) = _chart(title, told, size=(min(3 + 1.1 * len(right), 12), 1 + 0.32 * len(down)))
    most = max(found.values())
    _grid(axis, counts, most * 1.4, right, down)
    for (y, name), (x, split) in product(enumerate(down), enumerate(right)):
        n = found[name, split]
        style = {"color": "white" if n > 0.85 * most else INK} if n else {"color": WARN, "fontweight": "bold"}
        axis.text(x, y, n, ha="center", va="center", fontsize=9, **style)
    axis.xaxis.tick_top()
    axis.spines[:].set_visible(False)
    return chart


def _dumbbell(axis: Axes, y: float, pair: Mapping[str, tuple[float, float | None, float | None]]) -> None:
    """Two systems, the first drawn as base is, with their intervals on one line of a percent axis."""
    for offset, look, (system, (value, low, high)) in zip((0.14, -0.14), LOOKS, pair.items(), strict=False):
        if low is not None and not math.isnan(low):
            axis.plot([100 * low, 100 * high], [y + offset] * 2, color=look["color"], lw=1.6, alpha=0.6)
        axis.plot(100 * value, y + offset, "o", ms=7, mew=1.6, clip_on=False, zorder=3, label=system, **look)


def _percent_axis(axis: Axes, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), names)
    axis.set(xlim=(0, 100), ylim=(len(names) - 0.5, -0.5))
    axis.set_xticks([0, 50, 100], ["0", "50", "100 %"])
    axis.tick_params(axis="y", pad=9)  # room for a marker that sits on 0 %
    axis.grid(axis="x", color=GREY, lw=0.6)
    axis.spines["left"].set_visible(False)


def base_vs_tuned(comparison: pd.DataFrame, pair: tuple[str, str] = PAIR) -> Any:
    """Base (hollow) and tuned (filled) with 95 % intervals, for the measures that are percentages and are judged.

    `pair`: any other two systems of the comparison.
    """
    judged, (first, second) = comparison[(comparison["kind"] != "number") & (comparison["direction"] != "none")], pair
    lines = judged.to_dict("records")
    tally = {v: sum(c["verdict"] == v for c in lines) for v in ("better", "worse", "cannot tell")}
    title = "{} against {}, in percent: better on {better}, worse on {worse}, unclear on {cannot tell}"
    title = title.format(second.capitalize(), first, **tally)
    told = "; ".join(f"{c['label']}: {c[first]:.0%} to {c[second]:.0%}, {c['verdict']}" for c in lines)
    chart, (axis,) = _chart(title, told, size=(7.5, 1.1 + 0.5 * len(lines)))
    for y, c in enumerate(lines):
        _dumbbell(axis, y, {s: (c[s], c[f"{s}_low"], c[f"{s}_high"]) for s in pair})
        colour, at = {"better": GREEN, "worse": WARN}.get(c["verdict"], BASE), ("axes fraction", "data")
        axis.annotate(c["verdict"], (1.03, y), xycoords=at, va="center", fontsize=9, color=colour)
    arrow = {"higher": "(more is better)", "lower": "(less is better)"}
    _percent_axis(axis, [f"{c['label']}\n{arrow.get(c['direction'], '')}" for c in lines])
    axis.legend(*_one_each(axis), frameon=False, fontsize=9, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    return chart


def _one_each(axis: Axes) -> tuple[list, list]:
    found = {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    return list(found.values()), list(found)


def per_stakeholder(table: pd.DataFrame, pair: tuple[str, str] = PAIR) -> Any:
    """Small multiples, one panel per measure, one line per stakeholder; `table` is evaluation.by_stakeholder's."""
    names, labels = list(dict.fromkeys(table["stakeholder"])), list(dict.fromkeys(table["label"]))
    worst = table[table["system"] == pair[1]].groupby("stakeholder")["value"].mean()
    chart, axes = _chart(
        f"By stakeholder: at most {int(table['n'].max())} prompts each, so single voices are uncertain",
        f"Lowest {pair[1]} average over the panels: {worst.idxmin()}." if len(worst) else "",
        len(labels),
        size=(2.2 + 1.9 * len(labels), 3.6),
        sharey=True,
    )
    for axis, label in zip(axes, labels, strict=True):
        for y, name in enumerate(names):
            part = table[(table["label"] == label) & (table["stakeholder"] == name)].set_index("system")
            known = [s for s in pair if s in part.index]
            _dumbbell(axis, y, {s: tuple(part.loc[s, ["value", "low", "high"]]) for s in known})
        axis.set_title(textwrap.fill(label, 17), fontsize=9.5, loc="left", color=INK)
        _percent_axis(axis, names)
    chart.get_layout_engine().set(wspace=0.08)
    chart.legend(*_one_each(axes[0]), loc="outside lower right", ncols=2, frameon=False, fontsize=9)
    return chart


def fits(table: pd.DataFrame, free_gb: float) -> Any:
    """Memory that each model and precision of a plan's table needs, against what it may use; hours where known."""
    names = [f"{x.model} · {x.precision}" for x in table.itertuples()]
    title = f"{int(table.fits.sum())} of {len(table)} ways fit into {free_gb:.0f} GB"
    told = "Bars of GB needed: " + "; ".join(map("{} {:.1f}".format, names, table.GB)) + "."
    chart, (axis,) = _chart(title, told, size=(7, 1 + 0.24 * len(table)))
    axis.barh(range(len(table)), table.GB, color=[TUNED if ok else GREY for ok in table.fits])
    for y, (gb, time_h) in enumerate(zip(table.GB, table.hours, strict=True)):
        told = f" {gb:.1f} GB" + (f", {time_h:.1f} h" if time_h == time_h else "")  # no hours: NaN
        axis.annotate(told, (min(gb, 2 * free_gb), y), va="center", fontsize=8, color=INK)
    axis.axvline(free_gb, color=WARN, lw=2, ls="--")
    axis.set_yticks(range(len(table)), names)
    axis.set(xlim=(0, 2.4 * free_gb), xlabel="GB needed for the longest row (dashed: what it may use here)")
    axis.invert_yaxis()
    return chart


def sizes(files: Mapping[str, int]) -> Any:
    """Horizontal bars of file sizes in MB (10^6 bytes), largest first; `files` maps name to bytes."""
    ordered = sorted(files.items(), key=lambda f: -f[1])
    told = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in ordered)
    (big, most), (small, least) = ordered[0], ordered[-1]
    title = f"{small} is {least / most:.0%} of {big}" if least < most else "File sizes"
    chart, (axis,) = _chart(title, told, size=(7, 0.9 + 0.38 * len(ordered)))
    bars = axis.barh([n for n, _ in ordered], [s / 1e6 for _, s in ordered], color=TUNED, height=0.6)
    told_mb = [f"{s / 1e6:,.{0 if s >= 1e7 else 1}f} MB" for _, s in ordered]
    axis.bar_label(bars, told_mb, padding=4, fontsize=9, color=INK)
    axis.set(xlim=(0, most / 1e6 * 1.15), xlabel="megabytes")
    axis.invert_yaxis()
    return chart


def hops(nll: Mapping[str, float]) -> Any:
    """Mean negative log-likelihood (nats per token) of the same answers under each form of the model, in order."""
    told = ", ".join(f"{name} {value:.3f}" for name, value in nll.items())
    moved = {name: abs(value - nll["adapter"]) for name, value in nll.items()}
    title = f"Up to q8, which ships, the model moved by {max(moved['merged'], moved['f16'], moved['q8']):.3f} nats"
    chart, (axis,) = _chart(f"{title}; q4 by {moved['q4']:.3f}", told, size=(7, 2.8))
    places = range(len(nll))
    axis.plot(places, list(nll.values()), marker="o", lw=2, color=TUNED, clip_on=False)
    axis.set_xticks(places, list(nll), fontsize=9)
    axis.set_ylabel(NATS, fontsize=9)
    axis.set_ylim(0, max(nll.values()) * 1.2)
    for place, value in zip(places, nll.values(), strict=True):
        aside = (0, -14 if place else 7)  # the line falls from the first point to the second
        axis.annotate(f"{value:.3f}", (place, value), aside, textcoords="offset points", ha="center", fontsize=8)
    return chart


def cells(scenarios: Sequence[Any]) -> Any:
    """How many sampled scenarios lie in each cell of mix and ambition (rows) and geography (columns)."""
    found = [s.metadata.cell for s in scenarios if s.metadata.cell]
    if not found:
        return _chart("Your own scenarios: they are not sampled from cells", "no cells", size=(7, 0.6))[0]
    counts = Counter(((c["mix"], c["ambition"]), c["geography"]) for c in found)
    down, across = (sorted({at[axis] for at in counts}) for axis in (0, 1))
    told = f"{len(found)} scenarios fill {len(counts)} of {len(down) * len(across)} cells"
    chart, (axis,) = _chart(told, told, size=(7, 0.6 + 0.24 * len(down)))
    table = [[counts[row, place] for place in across] for row in down]
    _grid(axis, table, max(5, *counts.values()), [textwrap.fill(g, 14) for g in across], list(map(", ".join, down)))
    axis.tick_params(labelsize=8)
    for (row, place), n in counts.items():
        x, y, colour = across.index(place), down.index(row), INK if n < 3 else "white"
        axis.text(x, y, n, ha="center", va="center", fontsize=8, color=colour)
    return chart


def fleet(scenario: Any) -> Any:
    """Installed capacity (MW) per technology and milestone; empty where the scenario has no fleet table."""
    fleets = (scenario.detailedTech or {}).items()
    table = {year: {t: mw for t, mw in row if mw} for year, row in fleets}
    techs = [t for t in FLEET if any(t in row for row in table.values())]
    told = "; ".join(f"{y}: " + ", ".join(f"{t} {row[t]:,.0f}" for t in techs if t in row) for y, row in table.items())
    chart, (axis,) = _chart(f"The fleet of {scenario.metadata.country}, MW", told or "no fleet table", size=(7, 2.8))
    below = [0.0] * len(table)
    for tech in techs:
        height = [row.get(tech, 0.0) for row in table.values()]
        axis.bar([str(y) for y in table], height, bottom=below, color=FLEET[tech], label=tech, width=0.6)
        below = [b + h for b, h in zip(below, height, strict=True)]
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    return chart


@cache
def _html() -> Any:
    """The macros of plots.html.j2: what they are given is escaped, and **headings** become bold."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    pages.filters["bold"] = lambda text: Markup(re.sub(r"\*\*([^*\n]+)\*\*", r"<b>\1</b>", str(escape(text))))
    return pages.get_template("plots.html.j2").module


def panel(texts: Mapping[str, str]) -> str:
    """HTML: one card per title with its text, escaped; line breaks are kept, and **headings** are bold."""
    return str(_html().panel(texts))


def side_by_side(asked: Sequence[Mapping[str, str]]) -> str:
    """HTML: each prompt, then the base model's answer beside the tuned one's."""
    return str(_html().side_by_side(asked))


def tokens_html(pieces: Sequence[str], mask: Sequence[int]) -> str:
    """The text of one row as tokens, those the model is trained on (mask 1) green and underlined; HTML is escaped."""
    return str(_html().tokens(list(zip(pieces, mask, strict=True)), sum(map(bool, mask))))


def emissions_and_share(scenario: Any) -> Any:
    """A scenario's renewable share of generation (%) and emissions (Mt CO2) over its milestones; gaps stay gaps."""
    years = [m.year for m in scenario.milestones]
    share = [math.nan if m.reShare is None else m.reShare for m in scenario.milestones]
    carbon = [getattr(m.emissions, "total", math.nan) for m in scenario.milestones]
    name = f"{scenario.metadata.country}, {scenario.metadata.scenarioName}"
    points = [f"{y}: {s:g} %, {c:g} Mt CO2" for y, s, c in zip(years, share, carbon, strict=True)]
    told = "; ".join(points).replace("nan", "unknown")
    chart, axes = _chart(name, told, 2, size=(7, 2.8))
    panels = (("renewable share of generation (%)", share, GREEN, 100), ("emissions (Mt CO2)", carbon, WARN, None))
    for axis, (label, values, colour, top) in zip(axes, panels, strict=True):
        axis.plot(years, values, marker="o", lw=2, color=colour, clip_on=False)
        axis.set_title(label, fontsize=9.5, loc="left", color=INK, pad=12)
        known, pad = [v for v in values if not math.isnan(v)], 0.16 * (max(years) - min(years) or 1)
        axis.set(xticks=years, xlim=(min(years) - pad, max(years) + pad), ylim=(0, top or max([*known, 1e-9]) * 1.15))
        side = -1 if known and known[-1] >= known[0] else 1  # labels go where the line is not
        where = {"xytext": (5 * side, 5), "ha": "right" if side < 0 else "left", "textcoords": "offset points"}
        for year, value in zip(years, values, strict=True):
            if not math.isnan(value):
                axis.annotate(f"{value:g}", (year, value), fontsize=8, **where)
    return chart
