"""Widgets for the notebooks. Texts of rows are data: they are shown in text fields only, never as HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from stakelib.dialogues.review import STATES, Review
from stakelib.voices import STAKEHOLDERS

if TYPE_CHECKING:
    import ipywidgets


class Pager:
    """Pages through ids with buttons and a page number; calls `show(id)`, or `show(None)` when there are none."""

    def __init__(self, ids: Sequence[str], show: Callable[[str | None], None]) -> None:
        import ipywidgets as w

        self.show, self.ids = show, list(ids)
        self.page = w.BoundedIntText(1, min=1, max=1, description="row", layout=w.Layout(width="150px"))
        self.total = w.Text(disabled=True, layout=w.Layout(width="120px"))
        back, on = (w.Button(description=text, layout=w.Layout(width="90px")) for text in ("previous", "next"))
        back.on_click(lambda _: self.turn(-1))
        on.on_click(lambda _: self.turn(1))
        self.page.observe(lambda _: self._show(), "value")
        self.box = w.HBox([back, on, self.page, self.total])

    @property
    def current(self) -> str | None:
        return self.ids[self.page.value - 1] if self.ids else None

    def turn(self, step: int) -> None:
        self.page.value = min(max(self.page.value + step, 1), max(len(self.ids), 1))

    def take(self, ids: Sequence[str]) -> None:
        """Page through other ids, from the first one."""
        self.ids = list(ids)
        self.page.max, self.page.value = max(len(self.ids), 1), 1
        self._show()

    def _show(self) -> None:
        self.total.value = f"of {len(self.ids)}"
        self.show(self.current)


def review(review: Review) -> ipywidgets.VBox:
    """Page through rows and accept, reject or rewrite them; every key stroke is on disk at once."""
    return _Board(review).box


class _Board:
    def __init__(self, review: Review) -> None:
        import ipywidgets as w

        self.review, self.loading = review, False
        tall = w.Layout(width="100%", height="420px")
        self.prompt, self.text = w.Textarea(disabled=True, layout=tall), w.Textarea(layout=tall)
        self.facts = w.Textarea(disabled=True, layout=w.Layout(width="100%", height="420px"))
        self.verdict = w.Textarea(disabled=True, layout=w.Layout(width="99%", height="76px"))
        self.progress = w.Text(disabled=True, layout=w.Layout(width="99%"))
        names = [("all", ""), *((p.name, i) for i, p in STAKEHOLDERS.items())]
        tasks = [("all", ""), *((t, t) for t in sorted({r.task for r in review.rows.values()}))]
        self.filters = {"stakeholder": w.Dropdown(options=names, description="stakeholder"),
                        "task": w.Dropdown(options=tasks, description="task"),
                        "state": w.Dropdown(options=[("all", ""), *((s, s) for s in STATES)], description="state")}
        buttons = {name: w.Button(description=name) for name in ("accept", "reject", "undo")}
        for name, button in buttons.items():
            button.on_click(lambda _, name=name: self.decide(name))
        for box in self.filters.values():
            box.observe(lambda _: self.filter(), "value")
        self.text.observe(self.typed, "value")
        self.pager = Pager([], self.show)
        sides = w.GridBox([self.prompt, self.facts, self.text],
                          layout=w.Layout(grid_template_columns="4fr 2fr 4fr", width="100%"))
        self.box = w.VBox([w.HBox([*self.filters.values()]), self.pager.box, sides, self.verdict,
                           w.HBox([*buttons.values()]), self.progress])
        self.filter()

    def filter(self) -> None:
        self.pager.take(self.review.select(**{name: box.value for name, box in self.filters.items()}))

    def show(self, row_id: str | None) -> None:
        self.review.refresh()
        self.loading = True  # filling the field is not typing
        row = self.review.current(row_id) if row_id else None
        self.prompt.value, self.text.value = (row.prompt, row.completion) if row else ("no such row", "")
        facts = [f"{f.metric} {f.year}: {f.value:g} {f.unit}" for f in row.facts] if row else []
        self.facts.value = "\n".join([f"{row.country}: {row.scenario}", "", *facts] if row else [])
        self.loading = False
        self.tell()

    def tell(self) -> None:
        """What the gates say now, and how far the review is."""
        at = self.pager.current
        lines = [f"{at}: {self.review.state(at)}", *(self.review.problems(at) or ["no gate objects"])] if at else []
        self.verdict.value, self.progress.value = "\n".join(lines), self.review.progress()

    def typed(self, change: dict[str, Any]) -> None:
        if not self.loading and self.pager.current:
            self.review.decide(self.pager.current, "edit", change["new"])
            self.tell()

    def decide(self, name: str) -> None:
        at = self.pager.current
        if at is None:
            return
        if name == "undo":
            self.review.reset(at)
        elif name == "reject" or self.review.current(at).source == "rules":
            self.review.decide(at, name)
        self.show(at)
