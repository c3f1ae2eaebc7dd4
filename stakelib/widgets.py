"""Widgets for the notebooks. Texts of rows are data: they are shown in text fields only, never as HTML."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stakelib.dialogues.review import STATES, Review
from stakelib.evaluation.rating import CHOICES, CRITERIA, Rating
from stakelib.run import CourseError
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
        self.filters = {
            "stakeholder": w.Dropdown(options=names, description="stakeholder"),
            "task": w.Dropdown(options=tasks, description="task"),
            "state": w.Dropdown(options=[("all", ""), *((s, s) for s in STATES)], description="state"),
        }
        buttons = {name: w.Button(description=name) for name in ("accept", "reject", "undo")}
        for name, button in buttons.items():
            button.on_click(lambda _, name=name: self.decide(name))
        for box in self.filters.values():
            box.observe(lambda _: self.filter(), "value")
        self.text.observe(self.typed, "value")
        self.pager = Pager([], self.show)
        sides = w.GridBox(
            [self.prompt, self.facts, self.text], layout=w.Layout(grid_template_columns="4fr 2fr 4fr", width="100%")
        )
        self.box = w.VBox(
            [
                w.HBox([*self.filters.values()]),
                self.pager.box,
                sides,
                self.verdict,
                w.HBox([*buttons.values()]),
                self.progress,
            ]
        )
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


def rate(rating: Rating) -> ipywidgets.VBox:
    """Blind comparison, pair by pair: three buttons for each criterion (Tab, Space); a vote is at once on disk."""
    return _Ballot(rating).box


class _Ballot:
    def __init__(self, rating: Rating) -> None:
        import ipywidgets as w

        self.rating, self.loading = rating, False
        self.head, self.progress = (w.Text(disabled=True, layout=w.Layout(width="99%")) for _ in range(2))
        self.prompt = w.Textarea(disabled=True, layout=w.Layout(width="99%"))
        self.sides = {s: w.Textarea(disabled=True, layout=w.Layout(width="98%")) for s in "AB"}
        labels = {"A": "A is better", "same": "no difference", "B": "B is better"}
        self.votes = {
            c: w.ToggleButtons(options=[(labels[x], x) for x in CHOICES], index=None, tooltips=[asks] * 3)
            for c, asks in CRITERIA.items()
        }
        for criterion, buttons in self.votes.items():
            buttons.observe(lambda change, c=criterion: self.voted(c, change["new"]), "value")
        pair = w.GridBox(
            [w.VBox([w.Label(s), box]) for s, box in self.sides.items()],
            layout=w.Layout(grid_template_columns="1fr 1fr", width="100%"),
        )
        asked = [w.VBox([w.Label(f"{c}: {asks}"), self.votes[c]]) for c, asks in CRITERIA.items()]
        self.pager = Pager([], self.show)
        self.box = w.VBox([self.head, self.prompt, pair, *asked, self.pager.box, self.progress])
        self.pager.take(list(rating.rows))

    def show(self, row_id: str | None) -> None:
        shown = self.rating.shown(row_id) if row_id else dict.fromkeys(("stakeholder", "prompt", *"AB"), "no pair")
        self.loading = True  # filling the buttons is not voting
        self.head.value, self.prompt.value = f"How would {shown['stakeholder']} answer?", shown["prompt"]
        self.prompt.rows = _lines(shown["prompt"], 90)  # all in sight: what is disabled cannot be scrolled by keys
        for side, box in self.sides.items():
            box.value, box.rows = shown[side], max(_lines(shown[s], 42) for s in "AB")
        for criterion, buttons in self.votes.items():
            buttons.value = self.rating.choice(row_id, criterion) if row_id else None
            buttons.disabled = row_id is None
        self.loading, self.progress.value = False, self.rating.progress()

    def voted(self, criterion: str, choice: str | None) -> None:
        if not self.loading and choice and self.pager.current:
            self.rating.vote(self.pager.current, criterion, choice)
            self.progress.value = self.rating.progress()


def _lines(text: str, wide: int) -> int:
    """Lines that a field needs to show a text, at `wide` letters each."""
    return sum(1 + len(line) // wide for line in text.split("\n")) + 1


def chat(rows: Sequence[Mapping[str, Any]], ask: Callable[..., list[dict[str, Any]]]) -> ipywidgets.VBox:
    """A prompt box, and what base, tuned and the rules say side by side; `rows` are prompts to begin with.

    `ask(system, rows)`: `evaluation.ask` with the run filled in. The rules speak from a whole scenario, so they answer
    a row's own prompt only.
    """
    import ipywidgets as w

    rules = {row["prompt"]: row["completion"] for row in rows}
    starts = w.Dropdown(
        options=[(f"{r['stakeholder']}: {r['scenario']}, {r['country']}", r["prompt"]) for r in rows],
        description="begin with",
        layout=w.Layout(width="99%"),
    )
    prompt = w.Textarea(starts.value or "", layout=w.Layout(width="99%", height="220px"))
    tall = w.Layout(width="100%", height="420px")
    said = {s: w.Textarea(disabled=True, layout=tall) for s in ("base", "tuned", "rules")}
    button = w.Button(description="ask")

    def reply(_: Any) -> None:
        button.disabled = True  # a second click while the models write would only wait
        said["rules"].value = rules.get(prompt.value, "(the rules answer only a prompt of the list, left as it is)")
        try:
            for system in ("base", "tuned"):
                said[system].value = "(writing)"
                said[system].value = ask(system, [{"id": "chat", "prompt": prompt.value}])[0]["text"].strip()
        except CourseError as problem:
            said[system].value = str(problem)
        finally:
            button.disabled = False

    starts.observe(lambda change: setattr(prompt, "value", change["new"]), "value")
    button.on_click(reply)
    columns = w.GridBox(
        [w.VBox([w.Label(s), box]) for s, box in said.items()],
        layout=w.Layout(grid_template_columns="1fr 1fr 1fr", width="100%"),
    )
    return w.VBox([starts, prompt, button, columns])
