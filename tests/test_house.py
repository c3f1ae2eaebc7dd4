"""The rules that keep the house in order, checked without running a notebook or loading a heavy library.

Every rule is a function that returns problems; a planted violation shows that it can fail.
"""

from __future__ import annotations

import ast
import copy
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import notebook_gate as gate
import pytest
import yaml

import course

ROOT = Path(__file__).resolve().parents[1]
STAKELIB = ROOT / "stakelib"
ORDER = (
    "run",
    "sheets",
    "carry",
    "plots",
    "machine",
    "models",
    "scenarios",
    "voices",
    "dialogues",
    "training",
    "export",
    "evaluation",
)
LAST = ("widgets",)  # after every stage
# whole modules that need a heavy library: they are only imported inside functions
BACKENDS = ("peft_backend.py", "mlx_backend.py")
HEAVY = {
    *("torch", "transformers", "datasets", "peft", "accelerate", "bitsandbytes", "mlx", "mlx_lm", "xllamacpp", "gguf"),
    *("sentencepiece", "pandas", "matplotlib", "scipy", "statsmodels", "sklearn", "krippendorff", "sacrebleu"),
    *("datasketch", "ipywidgets", "openpyxl"),
}
PYTHON_FILES = [*sorted(STAKELIB.rglob("*.py")), ROOT / "course.py", *sorted((ROOT / "tests").rglob("*.py"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PICTURE = {"output_type": "display_data", "data": {"image/png": "A" * 500_001}, "metadata": {}}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


# ------------------------------------------------------------------------------------------------------- rules


def rank(module: str) -> int | None:
    """Place of a stakelib module in the order of data flow; None for the package itself or an unknown stage."""
    stage = module.split(".")[1] if "." in module else ""
    return len(ORDER) if stage in LAST else ORDER.index(stage) if stage in ORDER else None


def wrong_way_imports(path: Path, package: Path = STAKELIB) -> list[str]:
    """Imports, anywhere in the file, of a stage that comes later than the file's own."""
    parts = ("stakelib", *path.relative_to(package).with_suffix("").parts)
    own, problems = rank(".".join(parts)), []
    if own is None:
        return [] if parts == ("stakelib", "__init__") else [f"{path.name}: stage '{parts[1]}' is not in the order"]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: -node.level]) if node.level else ""
            module = ".".join(x for x in (base, node.module) if x)
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "stakelib" else [module]
        else:
            continue
        late = [n for n in names if n.startswith("stakelib.") and (rank(n) or 0) > own]
        problems += [f"{'/'.join(parts)}, line {node.lineno}: imports {n}, a later stage" for n in late]
    return problems


def heavy_imports(path: Path) -> list[str]:
    """Imports of heavy libraries and back-ends that run when the module is imported (so: not inside a function)."""
    if path.name in BACKENDS:
        return []

    def at_import(nodes: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in nodes:
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not typing_only:
                yield node
                yield from at_import([n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)])

    problems = []
    for node in at_import(ast.parse(path.read_text(encoding="utf-8")).body):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        heavy = [n for n in names if n.split(".")[0] in HEAVY or n.split(".")[-1] + ".py" in BACKENDS]
        problems += [f"{name_of(path)}, line {node.lineno}: {n} belongs in the function that needs it" for n in heavy]
    return problems


def nameless_encodings(path: Path) -> list[str]:
    """Text files opened without saying which encoding; the default differs on Windows."""
    problems = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        builtin = isinstance(node.func, ast.Name) and node.func.id == "open"
        keywords = {k.arg: k.value for k in node.keywords}
        place = {"read_text": 0, "write_text": 1, "open": 0}.get(method, 1)  # of the encoding, or of open's mode
        first = node.args[place] if len(node.args) > place else keywords.get("mode")
        mode = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else "r"
        is_text = method in ("read_text", "write_text") and len(node.args) <= place
        is_open = builtin or (method == "open" and not node.args) or (method == "open" and set(mode) <= set("rwaxbt+"))
        if method == "open" and node.args and first is not None and not isinstance(first, ast.Constant):
            is_open = False  # tarfile.open(path), Run.open(folder, ...): not Path.open(mode)
        if (is_text or (is_open and "b" not in mode)) and "encoding" not in keywords and None not in keywords:
            problems.append(f"{name_of(path)}, line {node.lineno}: names no encoding")
    return problems


def forks(path: Path) -> list[str]:
    """Uses of fork, which Windows does not have and which breaks threads elsewhere."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("fork", "forkpty")]
    used += [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Call) for a in n.args if _is_fork(a)]
    return [f"{name_of(path)}, line {line}: fork" for line in used]


def _is_fork(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value in ("fork", "forkserver")


def _checks(node: ast.AST, helpers: set[str]) -> bool:
    """True if a failing result makes this code fail: assert, raise, pytest.raises or a helper that does so."""
    for part in ast.walk(node):
        if isinstance(part, ast.Assert):
            return True
        if isinstance(part, ast.Call):
            name = part.func.attr if isinstance(part.func, ast.Attribute) else getattr(part.func, "id", "")
            if name in ("raises", "fail", "warns") or name.startswith("assert_") or name in helpers:
                return True
    return False


def assertless_tests(path: Path) -> list[str]:
    """Test functions that can only fail by crashing. A helper of the same file that asserts counts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    helpers = {f.name for f in functions if not f.name.startswith("test") and _checks(f, set())}
    empty = [f for f in functions if f.name.startswith("test_") and not _checks(f, helpers)]
    return [f"{name_of(path)}: {f.name} asserts nothing" for f in empty]


def undeclared_marks(path: Path, declared: set[str]) -> list[str]:
    """pytest marks that pyproject.toml does not list; a misspelt `slow` would run, or hide, a test."""
    known = declared | {"parametrize", "skipif", "xfail", "usefixtures", "filterwarnings"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    marks = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "pytest.mark"]
    return [f"{name_of(path)}, line {m.lineno}: mark '{m.attr}'" for m in marks if m.attr not in known]


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins(text: str) -> dict[str, str]:
    """Requirement lines as {name: version}; options and comments left out."""
    lines = [line.split("#")[0].split(";")[0].strip() for line in text.splitlines()]
    named = [line.partition("==")[::2] for line in lines if line and not line.startswith("-")]
    return {name.partition("[")[0]: version for name, version in named}


# ------------------------------------------------------------------------------------------------- the house itself


@pytest.mark.parametrize("rule", [nameless_encodings, forks])
def test_python_files_keep_the_rules(rule: Callable[[Path], list[str]]) -> None:
    assert [problem for path in PYTHON_FILES for problem in rule(path)] == []


@pytest.mark.parametrize("rule", [wrong_way_imports, heavy_imports])
def test_stages_import_one_way_and_lazily(rule: Callable[[Path], list[str]]) -> None:
    assert [problem for path in sorted(STAKELIB.rglob("*.py")) for problem in rule(path)] == []


def test_import_is_fast_and_light() -> None:
    light = "import time; t = time.perf_counter(); import stakelib; s = time.perf_counter() - t; import sys; "
    every = "import pkgutil, importlib; [importlib.import_module(m.name) for m in pkgutil.walk_packages("
    every += "stakelib.__path__, 'stakelib.') if not m.name.endswith('_backend')]; "
    tell = "print(s, sorted(m for m in ('torch', 'transformers', 'datasets', 'xllamacpp') if m in sys.modules))"
    for code in (light + tell, light + every + tell):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        seconds, _, loaded = done.stdout.strip().splitlines()[-1].partition(" ")
        assert float(seconds) < 1
        assert loaded == "[]"


def test_ruff_passes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "."],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout


def profile_faults(readme: str) -> list[str]:
    """Rows of the README's table of profiles that differ from the profiles themselves."""
    from stakelib.run import PROFILES

    cells = [[c.strip() for c in line.strip("| ").split("|")] for line in readme.splitlines() if line.startswith("| `")]
    told = {row[0].split("`")[1]: row for row in cells if row[0].split("`")[1] in PROFILES}
    wrong = []
    for name, p in PROFILES.items():
        wanted = [f"`{p.model}`", f"{p.rows} + {p.asked} + 2 x {p.thin}", p.epochs, p.test_prompts, p.max_new_tokens]
        said = [told[name][1].split(" (")[0], *told[name][2:6]] if name in told else []
        wrong += [] if said == list(map(str, wanted)) else [f"{name}: README says {said}, it is {wanted}"]
    return wrong


def test_readme_tells_the_profiles() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not profile_faults(readme)
    assert len(profile_faults(readme.replace("| 360 |", "| 100 |"))) == 1


def test_no_symlinks() -> None:
    skip = {".venv", ".git", "runs", ".cache"}
    folders = [p for p in ROOT.iterdir() if p.name not in skip]
    links = [name_of(p) for top in folders for p in [top, *top.rglob("*")] if p.is_symlink()]
    assert links == []


def test_every_pin_is_exact_and_the_same_everywhere() -> None:
    cpu, m1 = (pins((ROOT / f"requirements-{x}.txt").read_text(encoding="utf-8")) for x in ("cpu", "m1"))
    assert all(re.fullmatch(r"[0-9][0-9.]*", version) for version in m1.values()), m1  # so no +cpu either
    assert m1.keys() - cpu.keys() == set()
    assert cpu.keys() - m1.keys() == {"bitsandbytes"}
    assert [name for name in m1.keys() & cpu.keys() if m1[name] != cpu[name]] == []
    assert f"torch=={cpu['torch']}" == course.TORCH
    lines = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"][-1]["pip"]
    marker, elsewhere = 'sys_platform == "darwin" and platform_machine == "arm64"', 'sys_platform != "darwin"'
    linux = 'sys_platform == "linux"'
    split = [line.partition("; ")[::2] for line in lines if not line.startswith("-")]
    assert pins("\n".join(line for line, _ in split)) == m1 | cpu
    assert {line.partition("==")[0] for line, only in split if only == marker} == {"mlx", "mlx-lm"}
    assert {line.partition("==")[0] for line, only in split if only == elsewhere} == {"bitsandbytes"}
    # on Linux to prove the Mac's back-end; a marker also says that set-up goes on where it cannot be had
    assert {line.partition("==")[0] for line, only in split if only == linux} == {"mlx[cpu]", "mlx-lm"}
    assert {only for _, only in split} == {"", marker, elsewhere, linux}
    text = (ROOT / "requirements-cpu.txt").read_text(encoding="utf-8")
    assert [line.split("==")[0] for line in text.splitlines() if f"; {linux}" in line] == ["mlx[cpu]", "mlx-lm"]
    low, high = (".".join(map(str, v)) for v in (course.PYTHON_FROM, course.PYTHON_BELOW))
    assert pyproject()["project"]["requires-python"] == f">={low},<{high}"


def test_pins_are_what_is_installed_here() -> None:
    assert course.unmet((ROOT / "requirements-cpu.txt").read_text(encoding="utf-8")) == []
    assert course.unmet("psutil==0.0.1\nno-such-package-here==1") == [
        f"psutil==0.0.1 (here: {pins(course.REQUIREMENTS.read_text(encoding='utf-8'))['psutil']})",
        "no-such-package-here==1 (here: None)",
    ]


def test_every_test_runs_in_ci_and_asserts() -> None:
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r"^exec python3 course\.py test --all$", ci, re.MULTILINE)
    units = course.test_commands(True, [])[0]
    assert units[1:4] == ["-m", "pytest", str(ROOT / "tests")]  # the whole folder, nothing left out
    assert units[4:] == ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    settings = pyproject()["tool"]["pytest"]["ini_options"]
    narrowing = ("python_files", "python_functions", "norecursedirs", "collect_ignore")
    assert [key for key in settings if key in narrowing] == []
    assert not re.search(r"--ignore|--deselect|(^| )-[km]\b", settings["addopts"])
    declared = {mark.split(":")[0] for mark in settings["markers"]}
    problems = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        skips = re.search(r"^pytest\.skip\(|^collect_ignore|^pytestmark = pytest\.mark\.skip\b", text, re.MULTILINE)
        problems += [f"{name_of(path)} leaves itself out"] if skips else []
        problems += undeclared_marks(path, declared) + assertless_tests(path)
        if re.search(r"^def test_", text, re.MULTILINE) and not path.name.startswith("test_"):
            problems.append(f"{name_of(path)}: holds tests that pytest does not collect")
    assert problems == []


def test_pre_commit_hooks_are_local_and_exist() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repo["repo"] for repo in repos] == ["local"] * len(repos)
    hooks = [hook for repo in repos for hook in repo["hooks"]]
    assert {"ruff", "notebooks"} <= {hook["id"] for hook in hooks}
    for hook in hooks:
        words = hook["entry"].split()
        assert words[0] == "python"
        assert hook["language"] == "system"
        assert all((ROOT / word).exists() for word in words if word.endswith(".py")), hook["entry"]


def test_package_data_covers_every_file_of_stakelib() -> None:
    patterns = pyproject()["tool"]["setuptools"]["package-data"]["*"]
    files = [p for p in STAKELIB.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    assert [name_of(p) for p in files if not any(p.match(pattern) for pattern in patterns)] == []


# ------------------------------------------------------------------------------------------------- planted violations


PLANTED = {
    wrong_way_imports: "def f():\n    from stakelib.evaluation import score\n",
    heavy_imports: "try:\n    import torch.nn\nexcept ImportError:\n    pass\n",
    nameless_encodings: "from pathlib import Path\nPath('x').write_text('a')\n",
    forks: "import os\nos.fork()\n",
    assertless_tests: "def helper():\n    return 1\n\ndef test_x():\n    helper()\n",
}
INNOCENT = {
    wrong_way_imports: "from stakelib.run import CourseError\nfrom ..scenarios import load\nfrom . import numbers\n",
    heavy_imports: "if typing.TYPE_CHECKING:\n    import torch\ndef f():\n    import torch\n",
    nameless_encodings: "open('x', 'rb')\nopen('x', encoding='utf-8')\nRun.open(folder, 'smoke')\np.open('wb')\n",
    forks: "import os\nos.getpid()\n",
    assertless_tests: "def helper():\n    assert 1\n\ndef test_x():\n    helper()\n",
}


@pytest.mark.parametrize("rule", PLANTED, ids=lambda rule: rule.__name__)
def test_rules_see_a_planted_violation(rule: Callable[..., list[str]], tmp_path: Path) -> None:
    path = tmp_path / "dialogues" / "planted.py"
    path.parent.mkdir()
    more = (tmp_path,) if rule is wrong_way_imports else ()
    path.write_text(PLANTED[rule], encoding="utf-8")
    assert len(rule(path, *more)) == 1
    path.write_text(INNOCENT[rule], encoding="utf-8")
    assert rule(path, *more) == []


@pytest.mark.parametrize("call", ["open('x')", "open('x', 'w')", "p.open()", "p.open('a')", "p.read_text()"])
def test_encoding_rule_knows_every_way_to_open(call: str, tmp_path: Path) -> None:
    path = tmp_path / "planted.py"
    path.write_text(call, encoding="utf-8")
    assert len(nameless_encodings(path)) == 1


def test_marks_must_be_declared(tmp_path: Path) -> None:
    path = tmp_path / "test_planted.py"
    path.write_text("import pytest\n@pytest.mark.slwo\ndef test_x():\n    assert 1\n", encoding="utf-8")
    assert len(undeclared_marks(path, {"slow"})) == 1
    assert undeclared_marks(path, {"slow", "slwo"}) == []


# ------------------------------------------------------------------------------------------------------- notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_passes_the_gate(path: Path) -> None:
    assert gate.problems_of(path) == []


def markdown(text: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "id": f"m{abs(hash(text)) % 10**8}", "metadata": {}, "source": text}


def code(text: str, *cell_tags: str, outputs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "id": f"c{abs(hash(text)) % 10**8}",
        "metadata": {"tags": list(cell_tags)},
        "source": text,
        "outputs": outputs or [],
        "execution_count": None,
    }


def printed(text: str) -> list[dict[str, Any]]:
    return [{"output_type": "stream", "name": "stdout", "text": text}]


def good_notebook() -> dict[str, Any]:
    """A notebook that passes every gate; the planted ones differ from it in one place."""
    head = "# A\n**Goals** x\n\n**You need** [this](nearby.txt)\n\n## Time\n5 min\n\n**You will have** y"
    cells = [
        markdown(head),
        code("profile = 'quick'\nmodel = None\nout = None\nextra = False", "parameters"),
        markdown("## One\ntext"),
        code("rows = [n for n in range(3)]\n# NBVAL_CHECK_OUTPUT\nprint(len(rows))", outputs=printed("3\n")),
        code("def twice(x):\n    return helper(x) * 2\n\n\ndef helper(x):\n    return x\n# NBVAL_CHECK_OUTPUT"),
        markdown("A sentence that reads it."),
        markdown("![picture](nearby.png) You should see 3."),
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    notebook = {"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": cells}
    notebook["metadata"]["stakelib"] = {"profile": "quick", "sources_sha256": gate.sources_sha256(notebook)}
    return notebook


def saved(folder: Path, notebook: dict[str, Any], fresh: bool = True) -> Path:
    """Write the notebook and the files it links to; with `fresh`, its hash is made to fit its sources."""
    for name in ("nearby.txt", "nearby.png"):
        (folder / name).write_text("x", encoding="utf-8")
    if fresh:
        notebook["metadata"]["stakelib"]["sources_sha256"] = gate.sources_sha256(notebook)
    path = folder / "01_planted.ipynb"
    path.write_text(json.dumps(notebook), encoding="utf-8")
    return path


def put(index: int, cell: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda notebook: notebook["cells"].__setitem__(index, cell)


def show(output: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    return lambda notebook: notebook["cells"][3]["outputs"].append(output)


def say(text: str) -> Callable[[dict[str, Any]], None]:
    return put(6, markdown(text))


def drop(index: int) -> Callable[[dict[str, Any]], None]:
    return lambda notebook: notebook["cells"].pop(index)


ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "x", "traceback": []}
BAD_NOTEBOOKS = [
    (gate.is_valid, lambda notebook: notebook.pop("nbformat")),
    (gate.is_valid, put(4, code("def (:"))),
    (gate.cells_are_short, put(4, code("x = 1\n" * 26))),
    (gate.cells_are_short, put(4, code("x = 1\n" * 16))),
    (gate.has_prose, put(5, code("x = 3"))),
    (gate.has_parameters, put(1, code("profile = 'quick'\nmodel = None\nout = None"))),
    (gate.has_parameters, put(1, code("profile = 'quick'\nmodel = None\nout = None\nseed = 1", "parameters"))),
    (gate.has_parameters, put(1, code("profile = 'quick'\nmodel = None\nout = None\nextra = True", "parameters"))),
    (gate.has_parameters, put(4, code("profile = 'quick'\nmodel = None\nout = None", "parameters"))),
    (gate.has_checked_cells, put(4, code("x = 1"))),
    (gate.has_head, put(0, markdown("# A\n**Goals** You need Time"))),
    (gate.sections_say_what_to_see, put(6, markdown("Nothing to look at."))),
    (gate.sections_say_what_to_see, lambda notebook: notebook["cells"].append(code("x = 3")) or drop(6)(notebook)),
    (gate.names_are_bound, put(4, code("print(never)"))),
    (gate.names_are_bound, put(3, code("later\nlater = 1"))),
    (gate.names_are_bound, put(4, code("[n for n in range(3)]\nn"))),
    (gate.names_are_bound, put(4, code("def f():\n    return missing"))),
    (gate.names_are_bound, put(4, code("total += 1"))),
    (gate.has_no_machine_paths, put(4, code("x = '/home/ada/runs'"))),
    (gate.has_no_machine_paths, show(printed("saved C:\\Users\\ada\n")[0])),
    (gate.has_no_machine_paths, say("see /Users/ada/x")),
    (gate.links_exist, say("[gone](missing.ipynb#part)")),
    (gate.links_exist, say("![far](https://example.org/a.png)")),
    (gate.links_exist, say("<img src='missing.png'>")),
    (gate.links_exist, say("![pasted](attachment:gone.png)")),
    (gate.has_no_errors, show(ERROR)),
    (gate.outputs_are_small, show(printed("x" * 200_001)[0])),
    (gate.outputs_are_small, show(PICTURE)),
    (gate.outputs_are_fresh, lambda notebook: notebook["metadata"]["stakelib"].update(profile="smoke")),
]


@pytest.mark.parametrize(("rule", "spoil"), BAD_NOTEBOOKS, ids=lambda x: getattr(x, "__name__", ""))
def test_gate_sees_a_planted_fault(rule: Callable[..., list[str]], spoil: Callable[..., Any], tmp_path: Path) -> None:
    assert gate.problems_of(saved(tmp_path, good_notebook())) == []
    notebook = good_notebook()
    spoil(notebook)
    path = saved(tmp_path, notebook)
    assert rule(path) != []
    assert gate.main([str(path)]) == 1


def test_gate_sees_stale_outputs(tmp_path: Path) -> None:
    notebook = good_notebook()
    notebook["cells"][3]["source"] += "\nprint(4)"
    assert gate.outputs_are_fresh(saved(tmp_path, copy.deepcopy(notebook), fresh=False)) != []
    assert gate.outputs_are_fresh(saved(tmp_path, notebook)) == []


def test_names_gate_accepts_ordinary_python(tmp_path: Path) -> None:
    source = """
import os.path as p, json
with open(p.join("a"), encoding="utf-8") as stream: first, *rest = [json.loads(line) for line in stream]
try: total = sum(y := [x * k for x in rest for k in (1, 2) if x])
except ValueError as problem: print(problem, __name__)
class Box(dict):
    size: int = 3
    def get_all(self): return [self.size, later()]
def later(*args, key=lambda v: v, **more): return args, key, more, y
match first:
    case {"a": a, **others}: print(a)
    case [one, *two]: print(one, two)
display(Box(), f"{total:.{len(rest)}f}")
%timeit nothing
"""
    notebook = good_notebook()
    notebook["cells"][4]["source"] = source
    assert gate.names_are_bound(saved(tmp_path, notebook)) == []


def test_adopt_takes_outputs_of_the_same_sources_only(tmp_path: Path) -> None:
    (tmp_path / "run" / "notebooks").mkdir(parents=True)
    here = good_notebook()
    del here["metadata"]["stakelib"]
    here["cells"][3]["outputs"] = []
    executed = copy.deepcopy(here)
    executed["cells"].insert(2, code("profile = 'report'", "injected-parameters"))
    executed["cells"][4]["outputs"] = printed("3\n")
    executed["metadata"]["papermill"] = {"parameters": {"profile": "report"}}
    ran = tmp_path / "run" / "notebooks" / "01_planted.ipynb"
    path = saved(tmp_path, here, fresh=False)
    ran.write_text(json.dumps(executed), encoding="utf-8")
    assert gate.adopt(tmp_path / "run", tmp_path) == []
    assert gate.problems_of(path) == []
    assert gate.read(path)["cells"][3]["outputs"] == printed("3\n")
    executed["cells"][4]["source"] += "\nprint(4)"
    ran.write_text(json.dumps(executed), encoding="utf-8")
    assert len(gate.adopt(tmp_path / "run", tmp_path)) == 1
