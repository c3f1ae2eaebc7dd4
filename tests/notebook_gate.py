"""Static gate for notebooks: reads, never runs. Each gate takes a path and returns a list of problems, empty if none.

python tests/notebook_gate.py [notebook ...]          print every problem, exit 1 if there is one
python tests/notebook_gate.py --adopt runs/quick      take the outputs of an executed run into notebooks/
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
PARAMETERS = {"profile", "model", "out"}
COMMITTED_PROFILES = ("quick", "report")  # outputs in the repository come from real weights
HEAD_WORDS = ("Goals", "You need", "Time", "You will have")
CHECK = "# NBVAL_CHECK_OUTPUT"
MACHINE_PATH = re.compile(r"(?<![\w.\]])/(?:home|Users|root|work|tmp|private|var/folders)/|\b[A-Z]:\\{1,2}\w{2,}")
IPYTHON_NAMES = {"display", "get_ipython", "In", "Out", "_", "__", "___", "__name__", "__file__", "__doc__"}


def read(path: Path) -> dict[str, Any]:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def source(cell: dict[str, Any]) -> str:
    return text_of(cell["source"])


def text_of(value: str | list[str]) -> str:
    return value if isinstance(value, str) else "".join(value)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == kind]


def tags(cell: dict[str, Any]) -> list[str]:
    return cell.get("metadata", {}).get("tags", [])


def python_of(cell: dict[str, Any]) -> str:
    """Source without magics and shell lines, line numbers kept."""
    return "\n".join("" if re.match(r"\s*[%!]", line) else line for line in source(cell).split("\n"))


def sources_sha256(notebook: dict[str, Any]) -> str:
    """Hex digest of the code sources, the parameters that papermill injected left out."""
    code = [c for c in notebook["cells"] if c["cell_type"] == "code" and "injected-parameters" not in tags(c)]
    return hashlib.sha256("\0".join(source(c) for c in code).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------- form


def is_valid(path: Path) -> list[str]:
    """The file is a notebook by nbformat's schema, and every code cell is Python."""
    import nbformat

    problems = []
    try:
        nbformat.validate(read(path))
    except Exception as problem:  # nbformat raises errors of several libraries
        return [f"not a valid notebook: {str(problem).splitlines()[0]}"]
    for number, cell in enumerate(cells(path, "code"), 1):
        try:
            ast.parse(python_of(cell))
        except SyntaxError as problem:
            problems.append(f"code cell {number} is not Python: {problem}")
    return problems


def cells_are_short(path: Path) -> list[str]:
    """Code cells: median at most 5 lines, 90th percentile at most 15, none over 25 (blank lines do not count)."""
    sizes = sorted(len([x for x in source(c).split("\n") if x.strip()]) for c in cells(path, "code"))
    if not sizes:
        return ["no code cell"]
    ninety = sizes[-(-9 * len(sizes) // 10) - 1]  # nearest rank
    figures = ((statistics.median(sizes), 5, "median"), (ninety, 15, "90th percentile"), (sizes[-1], 25, "longest"))
    return [f"code cells: {name} {value} lines, at most {limit}" for value, limit, name in figures if value > limit]


def has_prose(path: Path) -> list[str]:
    """At least as many markdown cells as code cells."""
    prose, code = len(cells(path, "markdown")), len(cells(path, "code"))
    return [] if prose >= code else [f"{prose} markdown cells for {code} code cells: say what each shows"]


def has_parameters(path: Path) -> list[str]:
    """Exactly one cell tagged `parameters`; it assigns profile, model and out, and else only switches that are off."""
    tagged = [cell for cell in cells(path, "code") if "parameters" in tags(cell)]
    if len(tagged) != 1:
        return [f"{len(tagged)} cells are tagged 'parameters', exactly one is needed"]
    names: list[str] = []
    for statement in ast.parse(python_of(tagged[0])).body:
        if isinstance(statement, ast.Assign):
            off = isinstance(statement.value, ast.Constant) and statement.value.value is False
            names += [t.id for t in statement.targets if isinstance(t, ast.Name) and not off]
        elif not isinstance(statement, ast.Import | ast.ImportFrom):
            names.append(type(statement).__name__)
    good = sorted(names) == sorted(PARAMETERS)
    return [] if good else [f"the parameters cell sets {', '.join(names) or 'nothing'}; wanted: model, out, profile"]


def has_checked_cells(path: Path) -> list[str]:
    """At least two cells whose output is the same in every profile and is compared by nbval."""
    marked = sum(CHECK in source(cell) for cell in cells(path, "code"))
    return [] if marked >= 2 else [f"{marked} cells are marked {CHECK}, at least two are needed"]


def has_head(path: Path) -> list[str]:
    """The first cell is prose with Goals, You need, Time and You will have as headings or in bold."""
    first = read(path)["cells"][:1]
    text = source(first[0]) if first and first[0]["cell_type"] == "markdown" else ""
    marks = [m.group(1) or m.group(2) for m in re.finditer(r"^#+ *(.+)$|\*\*(.+?)\*\*", text, re.MULTILINE)]
    missing = [w for w in HEAD_WORDS if not any(m.strip().lower().startswith(w.lower()) for m in marks)]
    return [f"the first cell has no heading or bold word '{word}'" for word in missing]


def sections_say_what_to_see(path: Path) -> list[str]:
    """Each `## ` section with code says "You should see" in its last prose cell, after its first code cell.

    The opening cell is no section, and sections of exercises are exempt: their check cell says it.
    """
    sections: list[tuple[str, list[tuple[str, str]]]] = []
    for cell in read(path)["cells"][1:]:
        text = source(cell)
        heading = re.search(r"^## +(.+)$", text, re.MULTILINE) if cell["cell_type"] == "markdown" else None
        if heading:
            before = text[: heading.start()].strip()
            if before and sections:
                sections[-1][1].append(("markdown", before))
            sections.append((heading.group(1).strip(), []))
        if sections:
            sections[-1][1].append((cell["cell_type"], text))
    problems = []
    for title, parts in sections:
        kinds = [kind for kind, _ in parts]
        if "code" not in kinds or title.lower().startswith("exercise"):
            continue
        after = [text for kind, text in parts[kinds.index("code") :] if kind == "markdown"]
        if not after or "you should see" not in after[-1].lower():
            problems.append(f"section '{title}' does not end with a sentence 'You should see ...'")
    return problems


# ------------------------------------------------------------------------------------------------------- names


class _Names(ast.NodeVisitor):
    """Walks a cell in the order it runs; function bodies are looked at when the cell is over."""

    def __init__(self, bound: set[str]) -> None:
        self.scopes, self.later, self.unbound = [bound], [], []

    def bind(self, name: str | None) -> None:
        if name:
            self.scopes[-1].add(name)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.bind(node.id)
        elif not any(node.id in scope for scope in self.scopes):
            self.unbound.append(f"'{node.id}' (line {node.lineno})")

    def visit_in_order(self, *parts: Any) -> None:
        for part in parts:
            for node in part if isinstance(part, list) else [part]:
                if isinstance(node, ast.AST):
                    self.visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit_in_order(node.value, node.targets)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            self.visit(ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target))
        self.visit_in_order(node.value, node.target)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.visit_in_order(node.annotation, node.value)
        if node.value is not None:
            self.visit(node.target)

    def visit_For(self, node: ast.For) -> None:
        self.visit_in_order(node.iter, node.target, node.body, node.orelse)

    def visit_alias(self, node: ast.alias) -> None:
        self.bind(node.asname or node.name.split(".")[0])

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        self.bind(node.name)
        self.generic_visit(node)

    def visit_MatchAs(self, node: ast.MatchAs) -> None:
        self.bind(node.name)
        self.generic_visit(node)

    def visit_MatchStar(self, node: ast.MatchStar) -> None:
        self.bind(node.name)

    def visit_comprehension_like(self, node: Any) -> None:
        self.scopes.append(set())
        for part in node.generators:
            self.visit_in_order(part.iter, part.target, part.ifs)
        self.visit_in_order(*(getattr(node, field, None) for field in ("key", "value", "elt")))
        self.scopes.pop()

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_comprehension_like  # noqa: N815

    def visit_function(self, node: Any) -> None:
        arguments = node.args
        self.visit_in_order(getattr(node, "decorator_list", []), arguments.defaults, arguments.kw_defaults)
        self.bind(getattr(node, "name", None))
        own = {a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]}
        own |= {a.arg for a in (arguments.vararg, arguments.kwarg) if a}
        body = node.body if isinstance(node.body, list) else [node.body]
        inside = [n for part in body for n in ast.walk(part) if isinstance(n, ast.Name)]
        own |= {n.id for n in inside if isinstance(n.ctx, ast.Store)}
        self.later.append(([*self.scopes, own], body))

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_function  # noqa: N815

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.visit_in_order(node.decorator_list, node.bases, node.keywords)
        self.scopes.append(set())
        self.visit_in_order(node.body)
        self.scopes.pop()
        self.bind(node.name)

    def finish(self) -> list[str]:
        while self.later:
            self.scopes, body = self.later.pop(0)
            self.visit_in_order(body)
        return self.unbound


def names_are_bound(path: Path) -> list[str]:
    """Every name that a cell uses was bound by it or by a cell above, so that the notebook runs top to bottom."""
    bound, problems = set(dir(builtins)) | IPYTHON_NAMES, []
    for number, cell in enumerate(cells(path, "code"), 1):
        names = _Names(bound)
        names.visit(ast.parse(python_of(cell)))
        problems += [f"code cell {number} uses {name} before anything binds it" for name in names.finish()]
    return problems


# ------------------------------------------------------------------------------------------------------- paths, links


def output_texts(cell: dict[str, Any]) -> Iterable[str]:
    """Every piece of text in a cell's outputs; pictures left out."""
    for output in cell.get("outputs", []):
        yield text_of(output.get("text", ""))
        yield "\n".join(output.get("traceback", []))
        for kind, data in output.get("data", {}).items():
            if not kind.startswith("image/"):
                yield text_of(data) if isinstance(data, str | list) else json.dumps(data)


def has_no_machine_paths(path: Path) -> list[str]:
    """No absolute path of somebody's machine, in sources or outputs."""
    problems = []
    for number, cell in enumerate(read(path)["cells"], 1):
        for where, texts in (("source", [source(cell)]), ("output", output_texts(cell))):
            found = [m for text in texts for m in MACHINE_PATH.findall(text)]
            if found:
                problems.append(f"cell {number}, {where}: absolute path of a machine ({found[0]}...)")
    return problems


def links_exist(path: Path) -> list[str]:
    """Relative links and pictures exist; pictures are local, so that the course works without a network."""
    problems = []
    for number, cell in enumerate(read(path)["cells"], 1):
        if cell["cell_type"] != "markdown":
            continue
        text = re.sub(r"```.*?```|`[^`\n]*`", "", source(cell), flags=re.DOTALL)
        found = [(bang == "!", t) for bang, t in re.findall(r"(!?)\[[^\]]*\]\(\s*<?([^)\s>]+)", text)]
        found += [(tag == "img", t) for tag, t in re.findall(r"<(img|a)\b[^>]*?(?:src|href)=[\"']([^\"']+)", text)]
        found += [(False, t) for t in re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)]
        for is_picture, target in found:
            problem = link_problem(path, cell, is_picture, target)
            problems += [f"cell {number}: {problem}"] if problem else []
    return problems


def link_problem(path: Path, cell: dict[str, Any], is_picture: bool, target: str) -> str:
    if re.match(r"(https?:)?//|data:", target):
        return f"picture {target[:60]} is not a local file" if is_picture else ""
    if target.startswith("attachment:"):
        return "" if target[11:] in cell.get("attachments", {}) else f"{target} is not attached"
    if target.startswith(("#", "mailto:")):
        return ""
    file = unquote(target.split("#")[0].split("?")[0])
    return "" if (Path(path).parent / file).exists() and not file.startswith("/") else f"{target} does not exist"


# ------------------------------------------------------------------------------------------------------- outputs


def outputs_are_fresh(path: Path) -> list[str]:
    """Where there are outputs, the metadata names the profile and the hash of the sources that made them."""
    notebook = read(path)
    if not any(cell.get("outputs") for cell in notebook["cells"]):
        return []
    stamp, problems = notebook["metadata"].get("stakelib", {}), []
    if stamp.get("sources_sha256") != sources_sha256(notebook):
        problems.append("the code changed after the outputs were made: run it again, then notebook_gate.py --adopt")
    if stamp.get("profile") not in COMMITTED_PROFILES:
        wanted = " or ".join(COMMITTED_PROFILES)
        problems.append(f"outputs come from profile {stamp.get('profile')!r}, wanted: {wanted}")
    return problems


def has_no_errors(path: Path) -> list[str]:
    """No cell ended in an error."""
    failed = [(n, o) for n, c in enumerate(cells(path, "code"), 1) for o in c.get("outputs", [])]
    return [f"code cell {n} shows an error: {o.get('ename')}" for n, o in failed if o["output_type"] == "error"]


def outputs_are_small(path: Path) -> list[str]:
    """A cell's output without pictures stays under 200 kB, a picture under 500 kB."""
    problems = []
    for number, cell in enumerate(cells(path, "code"), 1):
        size = sum(len(text.encode()) for text in output_texts(cell))
        if size > 200_000:
            problems.append(f"code cell {number}: {size // 1000} kB of output, at most 200")
        data = [item for output in cell.get("outputs", []) for item in output.get("data", {}).items()]
        for kind, value in data:
            if kind.startswith("image/") and len(text_of(value)) > 500_000:
                problems.append(f"code cell {number}: a picture of {len(text_of(value)) // 1000} kB, at most 500")
    return problems


GATES: tuple[Callable[[Path], list[str]], ...] = (
    cells_are_short,
    has_prose,
    has_parameters,
    has_checked_cells,
    has_head,
    sections_say_what_to_see,
    names_are_bound,
    has_no_machine_paths,
    links_exist,
    outputs_are_fresh,
    has_no_errors,
    outputs_are_small,
)


def problems_of(path: Path) -> list[str]:
    """Every problem of one notebook; if it cannot be read as a notebook, only that."""
    return is_valid(path) or [problem for gate in GATES for problem in gate(path)]


def adopt(run_folder: Path, notebooks: Path = NOTEBOOKS) -> list[str]:
    """Copy the outputs of `run_folder`/notebooks into the notebooks of the same name, and stamp them.

    Returns problems: copies that failed, or whose sources are not those of today; such a notebook is left alone.
    """
    problems = []
    for copy in sorted((Path(run_folder) / "notebooks").glob("*.ipynb")):
        executed, target = read(copy), read(notebooks / copy.name)
        if sources_sha256(executed) != sources_sha256(target) or has_no_errors(copy):
            problems.append(f"{copy.name}: the run's copy failed, or the notebook changed since: run it again")
            continue
        ran = [c for c in executed["cells"] if c["cell_type"] == "code" and "injected-parameters" not in tags(c)]
        for cell, done in zip((c for c in target["cells"] if c["cell_type"] == "code"), ran, strict=True):
            cell.update(outputs=done["outputs"], execution_count=done["execution_count"])
        profile = executed["metadata"]["papermill"]["parameters"]["profile"]
        target["metadata"]["stakelib"] = {"profile": profile, "sources_sha256": sources_sha256(target)}
        text = json.dumps(target, indent=1, ensure_ascii=False) + "\n"
        (notebooks / copy.name).write_text(text, encoding="utf-8", newline="\n")
    return problems


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--adopt"]:
        found = adopt(Path(arguments[1]))
    else:
        paths = [Path(a) for a in arguments] or sorted(NOTEBOOKS.glob("*.ipynb"))
        found = [f"{path.name}: {problem}" for path in paths for problem in problems_of(path)]
    print("\n".join(found) or "notebooks: no problem")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
