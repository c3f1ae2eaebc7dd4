"""course.py: the set-up decisions with fake package indexes, and headless runs of small notebooks of our own."""

from __future__ import annotations

import ast
import base64
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest

import course
from stakelib import run as run_module
from stakelib.run import hold

LINUX = ("linux", "x86_64")
TORCH = "torch==2.13.0"


# ------------------------------------------------------------------------------------------------- before set-up


def test_old_pythons_can_read_the_file() -> None:
    text = Path(course.__file__).read_text(encoding="utf-8")
    tree = ast.parse(text, feature_version=(3, 6))
    allowed = {"str", "int", "float", "bool", "None", "Path"}
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    notes = [a.annotation for f in functions for a in [*f.args.args, f.args.kwarg] if a]
    notes += [f.returns for f in functions]
    bare = {ast.unparse(n) for n in notes if n is not None and not isinstance(n, ast.Constant)}
    assert bare <= allowed | {"argparse.Namespace"}  # everything newer is quoted, so it is never evaluated
    with pytest.raises(SyntaxError):
        ast.parse("if (x := 1): pass", feature_version=(3, 6))


def test_only_standard_library_at_the_top() -> None:
    tree = ast.parse(Path(course.__file__).read_text(encoding="utf-8"))
    names = [a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom)]
    assert "argparse" in names
    assert [name for name in names if name.split(".")[0] not in sys.stdlib_module_names] == []


@pytest.mark.parametrize("version", [(3, 11, 0), (3, 12, 4), (3, 14, 9)])
def test_supported_pythons_pass(version: tuple[int, ...]) -> None:
    assert course.check_python(version) is None


@pytest.mark.parametrize("version", [(3, 6, 9), (3, 10, 14), (3, 15, 0), (2, 7, 18), (4, 0, 0)])
def test_other_pythons_are_refused_with_the_next_action(version: tuple[int, ...]) -> None:
    words = rf"Python {version[0]}\.{version[1]}; .*3\.11(.|\n)*next: install"
    with pytest.raises(course.Stop, match=words) as problem:
        course.check_python(version)
    assert problem.value.code == 1


def test_a_full_disk_stops_set_up_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(course, "in_own_environment", lambda: False)
    monkeypatch.setattr(course, "STAMP", tmp_path / "no stamp")
    monkeypatch.setattr(course, "make_venv", lambda: pytest.fail("set-up went on"))
    monkeypatch.setattr(course.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 2 * 2**30))
    assert course.main(["run"]) == 1
    assert "2.0 GB free" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- torch


def test_torch_plan_by_machine() -> None:
    first, second = course.torch_plan("", *LINUX, nvidia=False, torch=TORCH)
    assert first[:3] == ["--no-deps", "--index-url", "https://download.pytorch.org/whl/cpu"]
    assert first[-1] == second[-1] == TORCH
    assert "--timeout 8 --retries 0" in " ".join(first)
    others = (("linux", "aarch64", False), ("darwin", "arm64", False), ("win32", "AMD64", False), (*LINUX, True))
    for elsewhere in others:
        assert course.torch_plan("", *elsewhere, torch=TORCH) == [second]


@pytest.mark.parametrize(("installed", "kept"), [("2.13.0", 1), ("2.13.0+cpu", 1), ("2.13.0+cu130", 1), ("2.12.0", 0)])
def test_a_suitable_torch_is_kept(installed: str, kept: int) -> None:
    assert (course.torch_plan(installed, *LINUX, nvidia=False, torch=TORCH) == []) == bool(kept)


def fake_index(folder: Path, version: str) -> str:
    """A package index on disk that serves `faketorch` in one version; its file:// address."""
    wheel = folder / "faketorch" / f"faketorch-{version}-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    info = f"faketorch-{version}.dist-info"
    about = f"Metadata-Version: 2.1\nName: faketorch\nVersion: {version}\nRequires-Dist: no-such-cuda\n"
    files = {
        "faketorch.py": f"version = {version!r}\n",
        f"{info}/METADATA": about,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    hashes = {n: base64.urlsafe_b64encode(hashlib.sha256(t.encode()).digest()).decode() for n, t in files.items()}
    record = "".join(f"{name},sha256={digest.rstrip('=')},{len(files[name])}\n" for name, digest in hashes.items())
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": record + f"{info}/RECORD,,\n"}.items():
            archive.writestr(name, text)
    (wheel.parent / "index.html").write_text(f'<a href="{wheel.name.replace("+", "%2B")}">{wheel.name}</a>', "utf-8")
    return folder.as_uri()


@pytest.fixture(scope="module")
def clean_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A fresh virtual environment's Python."""
    folder = tmp_path_factory.mktemp("venv") / "v"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return str(folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


@pytest.fixture()
def indexes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Two fake indexes; pip knows the default one through its environment and nothing of this machine's set-up."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    default = fake_index(tmp_path / "default", "2.13.0")
    monkeypatch.setenv("PIP_INDEX_URL", default)
    return {"cpu": fake_index(tmp_path / "cpu", "2.13.0+cpu"), "default": default, "dead": "http://127.0.0.1:9/simple"}


def installed(python: str) -> str:
    return subprocess.run([python, "-m", "pip", "list"], capture_output=True, encoding="utf-8", check=True).stdout


@pytest.mark.parametrize(("cpu", "expected"), [("cpu", "2.13.0+cpu"), ("dead", "2.13.0"), ("empty", "2.13.0")])
def test_torch_comes_from_the_cpu_index_or_else_from_the_default(
    cpu: str, expected: str, indexes: dict[str, str], clean_python: str, tmp_path: Path
) -> None:
    subprocess.run([clean_python, "-m", "pip", "uninstall", "-q", "-y", "faketorch"], check=True)
    address = indexes.get(cpu, (tmp_path / "nothing here").as_uri())
    plan = course.torch_plan("", *LINUX, nvidia=False, torch="faketorch==2.13.0", cpu_index=address)
    started = time.monotonic()
    course.install_torch(clean_python, plan)
    code, found = course.quiet([clean_python, "-c", "import faketorch; print(faketorch.version)"])
    assert (code, found.strip()) == (0, expected)
    assert time.monotonic() - started < 20
    assert course.torch_plan(found.strip(), *LINUX, nvidia=False, torch="faketorch==2.13.0") == []


def test_no_index_at_all_ends_set_up_with_one_message(
    indexes: dict[str, str], clean_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run([clean_python, "-m", "pip", "uninstall", "-q", "-y", "faketorch"], check=True)
    monkeypatch.setenv("PIP_INDEX_URL", indexes["dead"])
    monkeypatch.setenv("PIP_RETRIES", "0")
    plan = course.torch_plan("", *LINUX, nvidia=False, torch="faketorch==2.13.0", cpu_index=indexes["dead"])
    with pytest.raises(course.Stop, match="pip could not install faketorch(.|\n)*next: check the network") as problem:
        course.install_torch(clean_python, plan)
    assert "Traceback" not in str(problem.value)


# ------------------------------------------------------------------------------------------------- set-up


@pytest.fixture()
def bare_course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """course.py with an empty folder as its .venv and two requirements; no step touches the network."""
    venv = tmp_path / ".venv"
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"{TORCH}\nno-such-package==1.0\n", encoding="utf-8")
    python = venv / "python"
    monkeypatch.setattr(course, "VENV", venv)
    monkeypatch.setattr(course, "PYTHON", python)
    monkeypatch.setattr(course, "STAMP", venv / "stamp")
    monkeypatch.setattr(course, "REQUIREMENTS", requirements)

    def make() -> None:
        spec = venv / "share" / "jupyter" / "kernels" / "python3" / "kernel.json"
        spec.parent.mkdir(parents=True, exist_ok=True)
        spec.write_text('{"argv": ["python"]}', encoding="utf-8")  # as ipykernel writes it
        python.write_text("", encoding="utf-8")

    monkeypatch.setattr(course, "make_venv", make)
    monkeypatch.setattr(course, "quiet", lambda command: (0, "2.13.0"))
    return tmp_path


def test_a_finished_set_up_is_skipped_until_the_requirements_change(
    bare_course: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(course, "pip", lambda python, arguments: calls.append(arguments))
    assert course.environment() == course.environment() == str(course.PYTHON)
    assert calls == [["-r", str(course.REQUIREMENTS)]]  # torch is there, so once for the rest
    course.REQUIREMENTS.write_text(f"{TORCH}\nno-such-package==2.0\n", encoding="utf-8")
    course.environment()
    assert len(calls) == 2


@pytest.mark.parametrize("system", ["linux", "win32", "darwin"])
def test_set_up_goes_on_without_mlx_on_a_linux_that_is_too_old(
    system: str, bare_course: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Set-up tries everything, then everything but MLX; a second failure is the end, and the first one elsewhere."""
    lines = f'-c {course.CUDA.name}\n{TORCH}\nmlx==9; sys_platform == "linux"\nmlx-cpu==9\nmlxtend==1.0  # needed\n'
    course.REQUIREMENTS.write_text(lines, encoding="utf-8")
    calls: list[list[str]] = []

    def pip(python: str, arguments: list[str]) -> None:
        calls.append(arguments)
        if len(calls) == 1 or fails:
            raise course.Stop("pip could not install mlx", "check the network")

    monkeypatch.setattr(course, "pip", pip)
    monkeypatch.setattr(course, "APPLE", system == "darwin")
    monkeypatch.setattr(course.sys, "platform", system)
    fails = False
    if system != "linux":
        with pytest.raises(course.Stop, match="could not install"):
            course.set_up()
        assert len(calls) == 1
        return
    course.set_up()
    assert calls == [["-r", str(course.REQUIREMENTS)], ["-c", str(course.CUDA), TORCH, "mlxtend==1.0"]]
    assert "without MLX: notebook 03 will say so and skip" in capsys.readouterr().out
    assert course.is_set_up()
    calls.clear()
    fails = True
    with pytest.raises(course.Stop, match="could not install"):
        course.set_up()
    assert not course.is_set_up()


@pytest.mark.parametrize("broken", ["pip", "quiet"])
def test_an_interrupted_set_up_is_done_again(broken: str, bare_course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        if broken == "pip":
            raise KeyboardInterrupt
        return 1, "no network"

    monkeypatch.setattr(course, "pip", lambda python, arguments: None)
    monkeypatch.setattr(course, broken, fail)
    with pytest.raises((KeyboardInterrupt, course.Stop)):
        course.set_up()
    assert not course.is_set_up()
    monkeypatch.setattr(course, "pip", lambda python, arguments: None)
    monkeypatch.setattr(course, "quiet", lambda command: (0, "2.13.0"))
    course.set_up()
    assert course.is_set_up()
    kernel = course.VENV / "share" / "jupyter" / "kernels" / "python3" / "kernel.json"
    assert json.loads(kernel.read_text(encoding="utf-8"))["argv"] == ["python", "--IPKernelApp.log_level=40"]


def test_pins_are_compared_by_marker_and_public_version(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"torch": "2.13.0+cpu", "jinja2": "3.1.6", "six": "1.0"}

    def version(name: str) -> str:
        if name not in here:
            raise metadata.PackageNotFoundError(name)
        return here[name]

    monkeypatch.setattr(metadata, "version", version)
    never, always = 'sys_platform == "no-such-system"', 'python_version >= "3.11"'
    assert course.unmet(["torch==2.13.0", "jinja2==3.1.6", f"gone==1; {never}", f"six==2.0; {never}"]) == []
    assert course.unmet(["torch==2.12.0", f"gone==1; {always}", f"six==2.0; {always}", f"six==1.0; {never}"]) == [
        "torch==2.12.0 (here: 2.13.0+cpu)",
        "gone==1 (here: None)",
        "six==2.0 (here: 1.0)",
    ]


def test_before_set_up_every_pin_is_unmet(clean_python: str) -> None:
    """A bare Python has no library that reads markers; doctor and the first `run` must work there."""
    ask = "import course, json; print(json.dumps([course.unmet(['pip']), course.in_own_environment()]))"
    code, output = course.quiet([clean_python, "-c", ask])
    assert (code, output.strip()) == (0, '[["pip"], false]')


def test_an_environment_that_differs_is_named_before_another_one_is_made(
    bare_course: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(course, "pip", lambda python, arguments: None)
    monkeypatch.setattr(course, "in_an_environment", lambda: True)
    assert course.environment() == str(course.PYTHON)
    said = capsys.readouterr().out
    assert sys.prefix in said and "no-such-package==1.0 (here: None)" in said


def test_the_environment_finds_stakelib_wherever_it_is_asked(clean_python: str, tmp_path: Path) -> None:
    """An editor or a Jupyter of one's own starts kernels without PYTHONPATH; a clone's own files still come first."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def where(folder: Path) -> str:
        ask = [clean_python, "-c", "import stakelib; print(stakelib.__file__)"]
        return subprocess.run(ask, cwd=folder, env=env, capture_output=True, encoding="utf-8").stdout.strip()

    assert where(tmp_path) == ""
    subprocess.run([clean_python, "-c", course.LINK, str(course.ROOT)], check=True)
    assert Path(where(tmp_path)) == course.ROOT / "stakelib" / "__init__.py"
    (tmp_path / "stakelib").mkdir()
    (tmp_path / "stakelib" / "__init__.py").write_text("", encoding="utf-8")
    assert Path(where(tmp_path)).parent == tmp_path / "stakelib"
    links = list(Path(clean_python).parents[1].rglob("stakelib-course.pth"))
    assert [link.read_bytes().isascii() and not Path(link.read_text("ascii").strip()).is_absolute() for link in links]


def test_only_test_adds_the_tools_of_the_tests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tools = tmp_path / "tools.txt"
    installed: list[tuple[str, list[str]]] = []
    monkeypatch.delenv(course.PARENT, raising=False)
    monkeypatch.setattr(course, "TEST_TOOLS", tools)
    monkeypatch.setattr(course, "environment", lambda: sys.executable)
    monkeypatch.setattr(course, "call", lambda command, **more: 0)
    monkeypatch.setattr(course, "pip", lambda *arguments: installed.append(arguments))
    answer = {"missing": 1, "there": 0}
    for state, commands in (("missing", ["run", "lab", "serve", "test"]), ("there", ["test", "test --all"])):
        monkeypatch.setattr(course, "quiet", lambda command, state=state: (answer[state], ""))
        for command in commands:
            assert course.main(command.split()) == 0
    assert installed == [(sys.executable, ["-r", str(tools)])]


def test_tools_that_are_there_are_not_installed_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr(course, "pip", lambda python, arguments: asked.append(arguments[-1]))
    shutil.copy(course.__file__, tmp_path)
    monkeypatch.setattr(course, "ROOT", tmp_path)  # so that this copy is asked, about the file beside it
    for pin, wanted in ((f"pytest=={pytest.__version__}", 0), ("pytest==0.0.1", 1)):
        (tmp_path / "requirements-dev.txt").write_text(f"# tools\n{pin}\n", encoding="utf-8")
        course.add_test_tools(sys.executable)
        assert len(asked) == wanted


def test_children_find_stakelib_and_not_our_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(course.PARENT, "1")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    env = course.child_environment()
    assert env["PYTHONPATH"].split(os.pathsep) == [str(course.ROOT), "elsewhere"]
    assert course.PARENT not in env


def test_a_proxy_is_not_asked_for_this_computer(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = "from urllib.request import getproxies, proxy_bypass as b; "
    ask += "print(getproxies().get('http'), bool(b('127.0.0.1')), bool(b('localhost')), bool(b('intranet.example')))"
    for name in ("HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert not [name for name in course.child_environment() if name.lower() == "no_proxy"]  # nothing to say
    for proxy in ("HTTP_PROXY", "http_proxy"):
        for kept in (None, "NO_PROXY", "no_proxy"):
            with monkeypatch.context() as patch:
                patch.setenv(proxy, "http://proxy.example:3128")
                if kept:
                    patch.setenv(kept, "intranet.example")
                said = course.quiet([sys.executable, "-c", ask])[1].strip()
            assert said == f"http://proxy.example:3128 True True {bool(kept)}", (proxy, kept)


# ------------------------------------------------------------------------------------------------- run


HEAD = "profile = 'quick'\nmodel = None\nout = None"
FIRST = "import sys, pathlib\nprint('kernel', sys.executable)\nprint('parameters', profile, model)\n"
FIRST += "pathlib.Path(out, 'report.html').write_text('x', encoding='utf-8')"
SECOND = "from stakelib.run import CourseError\nraise CourseError(['row 7 is wrong'], 'mend row 7')"


@pytest.fixture()
def small_course(tmp_path: Path) -> Path:
    """A copy of the launcher beside a stub of stakelib and two notebooks, the second of which fails."""
    (tmp_path / "stakelib").mkdir()
    (tmp_path / "notebooks").mkdir()
    shutil.copy(course.__file__, tmp_path / "course.py")
    files = {"stakelib/__init__.py": "__version__ = '0'\n", "stakelib/training.py": "print('it fits')\n"}
    shutil.copy(run_module.__file__, tmp_path / "stakelib" / "run.py")
    pin = f"papermill=={metadata.version('papermill')}\n"
    files |= {"requirements-cpu.txt": pin, "requirements-m1.txt": pin}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "stakelib" / "export").mkdir()
    stub = "def report_line(run):\n    return next(run.folder.glob('report.html'), 'not made yet')\n"
    (tmp_path / "stakelib" / "export" / "handout.py").write_text(stub, encoding="utf-8")
    for name, code in {"01_first": FIRST, "04_second": SECOND}.items():
        write_notebook(tmp_path / "notebooks" / f"{name}.ipynb", code)
    return tmp_path


def write_notebook(path: Path, code: str) -> None:
    head = nbformat.v4.new_code_cell(HEAD, metadata={"tags": ["parameters"]})
    about = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[head, nbformat.v4.new_code_cell(code)], metadata=about)
    path.write_text(nbformat.writes(notebook), encoding="utf-8")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(folder / "course.py"), "run", "--profile", "smoke", "--out", "r", *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores Ctrl-C, and so would
    try:  # everything that it starts
        return subprocess.Popen(command, cwd=folder, start_new_session=True, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=90)
    return process.returncode, output


def test_run_executes_reports_and_stops_at_the_failing_cell(small_course: Path) -> None:
    code, output = finish(start(small_course))
    assert code == 1
    assert f"kernel {sys.executable}" in output
    assert "parameters smoke None" in output
    assert "[1/2] 01_first done in" in output
    assert "04_second.ipynb stopped at cell" in output
    assert "- row 7 is wrong\nWhat to do next: mend row 7; then run the same command again" in output
    assert "Traceback" not in output
    copy = small_course / "r" / "notebooks" / "04_second.ipynb"
    assert str(copy) in output
    assert "row 7 is wrong" in copy.read_text(encoding="utf-8")
    with hold(small_course / "r" / ".lock", "taken", "wait"):
        pass  # the folder is free again
    code, output = finish(start(small_course, "--only", "1"))
    assert code == 0
    assert f"Report: {small_course / 'r' / 'report.html'}" in output
    assert "to the end if all is as last time" in output  # the first run told how long it takes


def test_wrong_names_are_refused_without_a_traceback(small_course: Path) -> None:
    for arguments, words in (
        (("--only", "01,07,9"), "no notebook 07, 09\nWhat to do next: choose from: 01, 04"),
        (("--profile", "huge"), "- profile 'huge' is unknown\nWhat to do next: choose one of: smoke"),
        (("--nonsense",), "unknown: --nonsense"),
    ):
        code, output = finish(start(small_course, *arguments))
        assert code == 2, output
        assert words in output
        assert "Traceback" not in output
    assert not (small_course / "r" / "notebooks").exists()


def wait_for(condition: Any, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.fixture()
def sleeping(small_course: Path) -> Iterator[tuple[Path, subprocess.Popen[str], list[psutil.Process]]]:
    """A run whose first cell sleeps: the launcher and all its descendants (worker, kernel)."""
    code = "import time\nopen('awake', 'w', encoding='utf-8').close()\ntime.sleep(99)"
    write_notebook(small_course / "notebooks" / "01_first.ipynb", code)
    process = start(small_course, "--only", "01")
    assert wait_for((small_course / "notebooks" / "awake").exists)
    family = psutil.Process(process.pid).children(recursive=True)
    yield small_course, process, family
    for member in [*family, process]:
        if member.is_running() if isinstance(member, psutil.Process) else member.poll() is None:
            member.kill()
    process.communicate()


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to consoles, not to processes")
def test_ctrl_c_ends_everything_and_frees_the_folder(sleeping: Any) -> None:
    folder, process, family = sleeping
    code, output = finish(start(folder, "--only", "01"))
    worker = next(member for member in family if "course.py" in " ".join(member.cmdline()))
    assert code == 1 and f"another run is using {folder / 'r'} (process {worker.pid}, since" in output
    os.killpg(process.pid, signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert "Stopped. To go on, run the same command again" in output
    assert wait_for(lambda: not any(member.is_running() for member in family))
    with hold(folder / "r" / ".lock", "taken", "wait"):
        pass


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_killed_launcher_takes_worker_and_kernel_with_it(sleeping: Any) -> None:
    folder, process, family = sleeping
    assert len(family) >= 2
    process.kill()
    gone = [lambda m=m: not m.is_running() or m.status() == psutil.STATUS_ZOMBIE for m in family]
    assert wait_for(lambda: all(test() for test in gone))
    with hold(folder / "r" / ".lock", "taken", "wait"):
        pass  # the system has let go of its lock


def test_a_broken_estimate_of_the_time_stops_no_run(small_course: Path) -> None:
    file = small_course / "r" / "notebooks" / "timings.json"
    file.parent.mkdir(parents=True)
    for broken in ('{"01_first": 3', "[1, 2]", '{"01_first": "long", "04_second": null}', "\0\0\0"):
        file.write_text(broken, encoding="utf-8")
        code, output = finish(start(small_course, "--only", "1"))
        assert (code, "Traceback" in output) == (0, False), output
        assert json.loads(file.read_text(encoding="utf-8"))["01_first"] >= 0


@pytest.mark.parametrize("place", ["with {braces} {out}", "r { "])
def test_braces_in_paths_are_only_letters(small_course: Path, place: str) -> None:
    moved = small_course.parent / f"{small_course.name} {{course}}"
    small_course.rename(moved)
    code, output = finish(start(moved, "--only", "1", "--out", place))
    assert code == 0, output
    assert (moved / place / "notebooks" / "01_first.ipynb").exists()


def test_folders_of_the_environment_are_settled_once(
    small_course: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels work in notebooks/, so a relative folder would be another one there; an empty name is no folder."""
    code = "import os, json\nnames = ('STAKE_CACHE', 'STAKE_RUN_ROOT')\n"
    code += "print('FOLDERS', json.dumps([os.environ.get(n) for n in names]))"
    write_notebook(small_course / "notebooks" / "01_first.ipynb", code)
    home = str(Path.home())
    cases = [("mycache", str(small_course / "mycache")), ("", None), ("  ", None), ("~/x", os.path.join(home, "x"))]
    for given, wanted in cases:
        monkeypatch.setenv("STAKE_CACHE", given)
        monkeypatch.setenv("STAKE_RUN_ROOT", given)
        output = finish(start(small_course, "--only", "1"))[1]
        assert json.loads(output.split("FOLDERS ")[1].splitlines()[0]) == [wanted, wanted]
    assert not (small_course / "~").exists()


def test_an_older_executed_copy_stays_where_the_new_one_cannot_be_written(
    small_course: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import papermill

    copy = small_course / "r" / "04_second.ipynb"
    copy.parent.mkdir()
    copy.write_text("{}", encoding="utf-8")

    def execute(notebook: str, part: str, *_: Any, **__: Any) -> None:
        Path(part).write_text('{"cells": [', encoding="utf-8")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    with pytest.raises(course.Stop, match=r"the disk of .* is full(.|\n)*next: make room"):
        course.execute(small_course / "notebooks" / "04_second.ipynb", copy, {}, course.Terminal())
    assert copy.read_text(encoding="utf-8") == "{}"
    assert [p.name for p in copy.parent.iterdir()] == [copy.name]


@pytest.mark.parametrize(
    "said", ["OSError: [Errno 28] No space left on device", "OSError: There is not enough space on the disk"]
)
def test_a_full_disk_in_a_cell_is_named(small_course: Path, said: str) -> None:
    write_notebook(small_course / "notebooks" / "01_first.ipynb", f"raise RuntimeError({said!r})")
    code, output = finish(start(small_course, "--only", "1"))
    assert code == 1 and f"the disk of {small_course / 'r' / 'notebooks'} is full" in output
    assert "What to do next: make room on that disk" in output and "run the same command again" in output
    write_notebook(small_course / "notebooks" / "01_first.ipynb", "raise RuntimeError('the twin')")
    assert "is full" not in finish(start(small_course, "--only", "1"))[1]


# ------------------------------------------------------------------------------------------------- output


def test_terminal_prints_plain_lines_and_a_sign_of_life(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(course, "SILENCE", 0.4)
    terminal = course.Terminal()
    terminal.begin("04_train")
    for text in ("half ", "a line\n\x1b[31mred\x1b[0m\n", "\r10%", "\r20%", "\r30%"):
        terminal.write(text)
    assert capsys.readouterr().out == "  half a line\n  red\n"
    time.sleep(1.0)
    terminal.begin("")
    time.sleep(0.6)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  ... 04_train still at work, 0 min  30%"
    assert len(lines) <= 3  # silent again once the notebook has ended


def test_output_survives_a_windows_code_page() -> None:
    code = "import course; course.main(['run', '--only', '\\u2192 \\u0634']); course.say('caf\\u00e9 \\u2192')"
    page = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", course.PARENT: "1", "PYTHONPATH": str(course.ROOT)}
    env = {**os.environ, **page}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, timeout=60)
    assert "caf\u00e9 \u2192" in done.stdout.decode("utf-8")
    assert b"UnicodeEncodeError" not in done.stderr


def test_doctor_works_before_set_up(small_course: Path) -> None:
    for name in ("requirements-cpu.txt", "requirements-m1.txt"):
        (small_course / name).write_text("no-such-package==1\n", encoding="utf-8")
    command = [sys.executable, str(small_course / "course.py"), "doctor"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    assert "missing: not set up yet" in done.stdout
    assert "What to do next: python3 course.py run" in done.stdout
    assert not (small_course / ".venv").exists()


def test_pytest_arguments_pass_through_and_slow_is_left_out() -> None:
    assert course.test_commands(False, [])[0][-2:] == ["-m", "not slow"]
    assert "-m" not in course.test_commands(True, [])[0][3:]
    options = course.parse(["test", "-k", "lock", "-x"])
    assert course.test_commands(options.all, options.extra) == [
        [
            sys.executable,
            "-m",
            "pytest",
            str(course.ROOT / "tests"),
            "-n",
            "2",
            "--dist",
            "loadfile",
            "--no-loadscope-reorder",
            "-m",
            "not slow",
            "-k",
            "lock",
            "-x",
        ]
    ]
