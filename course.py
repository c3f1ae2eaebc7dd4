"""The only launcher of the course: python3 course.py run | test | lab | serve | doctor | pack | unpack  (any system).

Standard library only. It makes .venv beside itself, installs the pinned libraries and starts itself again inside.
The syntax is old and annotations are quoted on purpose: an old Python must read this file to say it is too old.
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "set-up-finished.txt"  # a copy of the requirements, written last: set-up was finished
APPLE = (sys.platform, platform.machine()) == ("darwin", "arm64")
REQUIREMENTS = ROOT / ("requirements-m1.txt" if APPLE else "requirements-cpu.txt")
TEST_TOOLS = ROOT / "requirements-dev.txt"
CUDA = ROOT / "requirements-cuda.txt"
MLX = re.compile("mlx(-cpu|-lm)?==")  # on a PC to try the Mac's back-end; a Linux that is older than MLX does without
PYTHON_FROM, PYTHON_BELOW = (3, 11), (3, 15)
DISK_GB = 6.0  # libraries about 3 GB, the rest for pip's downloads, the model and one run
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# A line in site-packages, so that an editor or a Jupyter of one's own finds stakelib. It is relative: plain ASCII
# whatever the folder is called, since some Pythons read it in the system's code page, and it moves with the folder.
LINK = """import os, sys, sysconfig
place = sysconfig.get_path("purelib")
with open(os.path.join(place, "stakelib-course.pth"), "w", encoding="utf-8") as stream:
    stream.write(os.path.relpath(sys.argv[1], place) + "\\n")"""
SILENCE = 60.0  # seconds without output after which a line says that work goes on
PARENT = "STAKE_COURSE_PARENT"  # process id of the launcher that started us inside the environment
AGAIN = "run the same command again: finished stages are kept"
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
say = functools.partial(print, flush=True)


class Stop(Exception):
    """What is wrong and what to do next; printed without a traceback."""

    def __init__(self, problem: str, next_action: str, code: int = 1) -> None:
        super().__init__(f"- {problem}\nWhat to do next: {next_action}")
        self.code = code


def check_python(version: "tuple[int, ...]") -> None:
    """Stop unless the pinned libraries are made for this `version` of Python."""
    if not PYTHON_FROM <= tuple(version[:2]) < PYTHON_BELOW:
        problem = "this is Python {}.{}; the course needs {}.{} or later, below {}.{}"
        action = "install Python 3.12 from https://www.python.org/downloads/ and start with: python3.12 course.py"
        raise Stop(problem.format(*(tuple(version[:2]) + PYTHON_FROM + PYTHON_BELOW)), action)


def check_disk() -> None:
    free = shutil.disk_usage(str(ROOT)).free / 2**30
    if free < DISK_GB:
        problem = f"{free:.1f} GB free on the disk of {ROOT}, set-up needs about {DISK_GB:.0f} GB"
        raise Stop(problem, "free some disk space, or move the course to a bigger disk; nothing was changed")


def pins(file: Path) -> "list[str]":
    """The lines of a requirements file that name a package, with their markers."""
    lines = [line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("-")]


def unmet(lines: "list[str]") -> "list[str]":
    """Those of the pins that hold on this machine and that this interpreter does not satisfy.

    A local version such as 2.13.0+cpu satisfies ==2.13.0. Before set-up `packaging`, itself pinned, may be missing."""
    from importlib import metadata

    try:
        from packaging.requirements import Requirement
    except ImportError:
        return lines
    missing = []
    for wanted in map(Requirement, lines):
        if wanted.marker is not None and not wanted.marker.evaluate():
            continue
        try:
            here = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            here = None
        if here is None or here.split("+")[0] not in wanted.specifier:
            missing.append(f"{wanted.name}{wanted.specifier} (here: {here})")
    return missing


def needed() -> "list[str]":
    """The pins without which the course does not work here."""
    return [line for line in pins(REQUIREMENTS) if APPLE or not MLX.match(line)]


def in_an_environment() -> bool:
    return sys.prefix != sys.base_prefix or os.path.isdir(os.path.join(sys.prefix, "conda-meta"))


def in_own_environment() -> bool:
    """True inside a virtual or conda environment that already holds every pinned library."""
    return in_an_environment() and not unmet(needed())


def is_set_up() -> bool:
    return PYTHON.exists() and STAMP.exists() and STAMP.read_bytes() == REQUIREMENTS.read_bytes()


def environment() -> str:
    """The Python to work with; sets .venv up first if need be."""
    if in_own_environment():
        say(f"Using the environment you are in ({sys.prefix}): every pinned library is there.")
        return sys.executable
    if not is_set_up():
        if in_an_environment():
            differs = unmet(needed())
            more = f" and {len(differs) - 3} more" if len(differs) > 3 else ""
            say(f"Not using the environment you are in ({sys.prefix}): {', '.join(differs[:3])}{more}.")
        set_up()
    return str(PYTHON)


def set_up() -> None:
    """Make .venv and install the pinned libraries. The stamp comes last, so a broken set-up is done again."""
    say(f"Setting up (once, some minutes, needs a network): the pinned Python libraries, into {VENV}")
    check_disk()
    STAMP.unlink(missing_ok=True)
    make_venv()
    code, found = quiet([str(PYTHON), "-c", "from importlib.metadata import version as v; print(v('torch'))"])
    gpu = shutil.which("nvidia-smi") is not None
    torch = next(line.split(";")[0].strip() for line in pins(REQUIREMENTS) if line.startswith("torch=="))
    plan = torch_plan("" if code else found.strip(), sys.platform, platform.machine(), gpu, torch)
    install_torch(str(PYTHON), plan)
    say(f"Installing what {REQUIREMENTS.name} pins")
    try:
        pip(str(PYTHON), ["-r", str(REQUIREMENTS)])
    except Stop:
        if not sys.platform.startswith("linux"):
            raise
        say("  trying again without MLX: notebook 03 will say so and skip, nothing else needs it")
        pip(str(PYTHON), ["-c", str(CUDA)] + needed())
    say("Fetching llama.cpp's converter and registering the notebooks' kernel: later runs need no network")
    kernel = ["-m", "ipykernel", "install", "--prefix", str(VENV), "--name", "python3", "--display-name", "stakelib"]
    for step in (["-c", "from stakelib.export import converter; converter()"], ["-c", LINK, str(ROOT)], kernel):
        code, output = quiet([str(PYTHON)] + step)
        if code:
            raise Stop("set-up stopped near its end:\n" + output.strip()[-400:], "check the network, then try again")
    spec = VENV / "share" / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel_json = json.loads(spec.read_text(encoding="utf-8"))
    kernel_json["argv"].append("--IPKernelApp.log_level=40")  # errors only: each start warns of TCP, here on 127.0.0.1
    spec.write_text(json.dumps(kernel_json, indent=1), encoding="utf-8")
    shutil.copyfile(str(REQUIREMENTS), str(STAMP))
    say("Set-up finished.")


def add_test_tools(python: str) -> None:
    """Install what only the tests need into the environment of `python`, unless all of it is there."""
    ask = "import sys, course; sys.exit(1 if course.unmet(course.pins(course.TEST_TOOLS)) else 0)"
    if quiet([python, "-c", ask])[0]:
        say(f"Adding the tools of the tests (once): {TEST_TOOLS.name}, into the same environment")
        pip(python, ["-r", str(TEST_TOOLS)])


def make_venv() -> None:
    """Create .venv, or keep that of an interrupted set-up if its pip works: what it installed is then not lost."""
    if PYTHON.exists() and quiet([str(PYTHON), "-m", "pip", "--version"])[0] == 0:
        return
    code, output = quiet([sys.executable, "-m", "venv", "--clear", str(VENV)])
    if code:
        action = "on Debian or Ubuntu: sudo apt install python3-venv; elsewhere: reinstall Python from python.org"
        raise Stop(f"no virtual environment could be made:\n{output.strip()[-300:]}", action)


def torch_plan(
    installed: str, system: str, machine: str, nvidia: bool, torch: str, cpu_index: str = CPU_INDEX
) -> "list[list[str]]":
    """pip arguments to try in turn until one works; empty if a suitable torch is there.

    On Linux the default index serves several GB of CUDA libraries, so without a GPU PyTorch's CPU index comes first,
    with a short time-out and no retries for those behind a firewall."""
    if installed.split("+")[0] == torch.partition("==")[2]:
        return []
    plan = [["--no-deps", torch]]
    if system.startswith("linux") and machine.lower() in ("x86_64", "amd64") and not nvidia:
        plan.insert(0, ["--no-deps", "--index-url", cpu_index, "--timeout", "8", "--retries", "0", torch])
    return plan


def install_torch(python: str, plan: "list[list[str]]") -> None:
    for arguments in plan:
        say(f"Installing {arguments[-1]}" + (", the small build for CPUs" if "--index-url" in arguments else ""))
        try:
            return pip(python, arguments)
        except Stop:
            if arguments is plan[-1]:
                raise
            say("  not to be had from PyTorch's own index: taking the default one (on Linux several GB)")


def pip(python: str, arguments: "list[str]") -> None:
    """pip install, its progress as short plain lines. Raises Stop with pip's own error and the next action."""
    command = [python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    lines = []
    with subprocess.Popen(command + arguments, env=child_environment(), **PIPES) as process:
        for line in process.stdout:
            lines.append(line.strip())
            if re.match("Downloading.* MB|Installing|Building", lines[-1]):  # the many small files go unsaid
                say("  " + lines[-1][:110])
    if process.returncode:
        errors = "\n".join([line for line in lines if line.startswith("ERROR")] or lines[-3:])
        action = "free some disk space" if "No space left" in errors else "check the network (or proxy)"
        raise Stop(f"pip could not install {arguments[-1]}:\n{errors[-800:]}", action + ", then try again")


def child_environment() -> "dict[str, str]":
    """For children and kernels: stakelib importable, this Python's own kernels first, UTF-8 everywhere."""
    env = {name: value for name, value in os.environ.items() if name not in ("JUPYTER_PATH", "PYTHONHOME", PARENT)}
    others = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder not in ("", str(ROOT))]
    env.update(PYTHONPATH=os.pathsep.join([str(ROOT)] + others), PYTHONUTF8="1", JUPYTER_PREFER_ENV_PATH="1")
    if {"http_proxy", "all_proxy"} & {name.lower() for name in env}:  # a proxy must not get what stays on this computer
        for name in {"NO_PROXY"} | ({"no_proxy"} & set(env)):
            env[name] = ",".join(([env[name]] if env.get(name) else []) + ["127.0.0.1", "localhost"])
    return env


def quiet(command: "list[str]") -> "tuple[int, str]":
    """Exit code and output (both streams) of a child process."""
    done = subprocess.run(command, env=child_environment(), cwd=str(ROOT), **PIPES)
    return done.returncode, done.stdout


def call(command: "list[str]", **more: str) -> int:
    """A child in the foreground; its exit code. Ctrl-C reaches the child too, and we wait until it has tidied up."""
    process = subprocess.Popen(command, env=dict(child_environment(), **more))
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            return process.wait()


def run_course(options: argparse.Namespace) -> int:
    """Execute the notebooks in order with papermill; their copies and the report land in the run folder."""
    from stakelib.export.handout import report_line
    from stakelib.run import CourseError, Run, atomic_write_json, clock, hold

    local = os.path.abspath(os.path.expanduser(options.model or ""))
    model = local if options.model and os.path.isdir(local) else options.model
    notebooks, started = choose_notebooks(options.only), time.monotonic()
    try:
        run = Run.open(options.out, options.profile, model)
    except CourseError as problem:
        raise Stop("\n- ".join(problem.problems), problem.next_action, code=2) from None
    check = [sys.executable, "-m", "stakelib.training", "--check", "--profile", run.profile.name]
    check += ["--model", run.profile.model, "--out", str(run.folder)]  # a child: torch would stay in this process
    code = subprocess.run(check, env=child_environment()).returncode
    if code:
        return code  # the model is unknown, not allowed or not whole, or the run does not fit: the check has said so
    terminal, action = Terminal(), "wait for it, or choose a folder with --out"
    try:
        with hold(run.folder / ".lock", f"another run is using {run.folder}", action):
            say(f"Profile {run.profile.name}, model {run.profile.model}, run folder {run.folder}")
            saved = run.path("notebooks", "timings.json")
            timings = read_timings(saved)
            for number, notebook in enumerate(notebooks):
                title = f"[{number + 1}/{len(notebooks)}] {notebook.stem}"
                left = [timings.get(other.stem) for other in notebooks[number:]]
                eta = "" if None in left else f", about {clock(sum(left))} to the end if all is as last time"
                say("\n{} starts at {}{}".format(title, time.strftime("%H:%M"), eta))
                begun = time.monotonic()
                parameters = {"profile": options.profile, "model": model, "out": str(run.folder)}
                execute(notebook, run.path("notebooks", notebook.name), parameters, terminal)
                timings[notebook.stem] = round(time.monotonic() - begun, 1)
                atomic_write_json(saved, timings)
                say(f"{title} done in {clock(timings[notebook.stem])}")
    except CourseError as problem:
        raise Stop("\n- ".join(problem.problems), f"{problem.next_action}; then {AGAIN}") from None
    say(f"\nAll done in {clock(time.monotonic() - started)}.")
    return say(f"Report: {report_line(run)}") or 0


def read_timings(file: Path) -> "dict[str, float]":
    """Seconds of each notebook last time; empty where the file is missing or broken: it only serves an estimate."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found = json.loads(file.read_text(encoding="utf-8")).items()
        return {name: seconds for name, seconds in found if isinstance(seconds, (int, float))}
    return {}


def choose_notebooks(only: "str | None") -> "list[Path]":
    """The notebooks in order, or those whose number stands in `only` ("01,04"). Raises Stop for unknown numbers."""
    found = {path.name[:2]: path for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))}
    wanted = set(found) if only is None else {number.strip().zfill(2) for number in only.split(",") if number.strip()}
    unknown = ", ".join(sorted(wanted - set(found)))
    if unknown or (only is not None and not wanted):
        raise Stop(f"no notebook {unknown}".rstrip(), "choose from: " + ", ".join(sorted(found)), code=2)
    return [found[number] for number in found if number in wanted]


def execute(notebook: Path, copy: Path, parameters: "dict[str, object]", terminal: "Terminal") -> None:
    """Run one notebook in this Python's kernel. Raises Stop: what failed, where to look and what to do.

    The executed copy takes the place of an older one only when it is whole.
    """
    import papermill

    from stakelib.run import disk_full, writing

    terminal.begin(notebook.stem)
    settings = {"kernel_name": "python3", "progress_bar": False, "stdout_file": terminal, "stderr_file": terminal}
    failures, kept = [], "no executed copy could be kept"
    try:
        with writing(copy) as part, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not end in one of")  # the hidden copy's name
            names = [str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, part)]  # papermill fills in
            try:
                papermill.execute_notebook(*names, parameters, cwd=str(notebook.parent), **settings)
            except Exception as failure:  # a cell's error, a dead kernel: the copy shows it
                failures.append(failure)
            json.loads(part.read_text(encoding="utf-8"))
        kept = f"its executed copy: {copy}"
    except Exception as failure:  # a full disk: the copy is not whole, so an older one stays
        failures.append(failure)
    finally:
        terminal.begin("")
    if not failures:
        return
    failure = failures[0]
    name, text = getattr(failure, "ename", type(failure).__name__), getattr(failure, "evalue", str(failure))
    if name != "CourseError":  # our own traceback helps nobody
        text = str(disk_full(Exception(f"{name}: {text}"), copy.parent) or f"- {name}: {text}")
    what, _, action = text.partition("\nWhat to do next: ")  # a CourseError ends with it
    where = f"{notebook.name} stopped at cell {getattr(failure, 'exec_count', '?')}; {kept}"
    raise Stop(f"{where}\n{what}", f"{action or 'mend that'}; then {AGAIN}") from None


class Terminal:
    """Where cells print: plain lines, and a sign of life (with the state of a progress bar) when a cell is silent."""

    name, rest, flush = "", "", staticmethod(sys.stdout.flush)

    def __init__(self) -> None:
        threading.Thread(target=self._watch, args=(int(os.environ.pop(PARENT, 0)),), daemon=True).start()

    def begin(self, name: str) -> None:
        self.write("\n" if self.rest else "")
        self.name, self.begun, self.printed = name, time.monotonic(), time.monotonic()

    def write(self, text: str) -> None:
        *lines, self.rest = (self.rest + text).split("\n")
        self.rest = self.rest[-500:]  # a progress bar redraws itself without ever ending its line
        for line in lines:
            self.printed = time.monotonic()
            say("  " + re.sub("\x1b\\[[0-9;]*[A-Za-z]", "", line.rstrip("\r").split("\r")[-1]))

    def _watch(self, launcher: int) -> None:
        while True:
            time.sleep(min(1.0, SILENCE / 2))
            if launcher and os.name != "nt" and os.getppid() != launcher:
                os._exit(3)  # the launcher was killed: the kernel follows us, and the run folder is free again
            if self.name and time.monotonic() - self.printed > SILENCE:
                bar, self.rest = self.rest.rstrip("\r").split("\r")[-1], ""
                self.write(f"... {self.name} still at work, {(time.monotonic() - self.begun) / 60:.0f} min  {bar}\n")


def test_commands(everything: bool, extra: "list[str]") -> "list[list[str]]":
    """pytest over tests/, two files at a time, then nbval over the notebooks in order, unless arguments narrow it."""
    pytest = [sys.executable, "-m", "pytest"]
    units = pytest + [str(ROOT / "tests"), "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    units += ([] if everything else ["-m", "not slow"]) + extra
    nbval = pytest + ["-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=600"]
    return [units] if extra else [units, nbval + [str(path) for path in choose_notebooks(None)]]


def test_course(options: argparse.Namespace) -> int:
    """Run the tests; the notebooks work in a folder of their own that is thrown away afterwards."""
    worst, started = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for command in test_commands(options.all, options.extra):
            say("Running: python {}".format(" ".join(command[1:])))
            worst = max(worst, abs(call(command, STAKE_PROFILE="smoke", STAKE_RUN_ROOT=folder)))
    say("Tests {} in {:.1f} min.".format("FAILED" if worst else "passed", (time.monotonic() - started) / 60))
    return worst


def lab(options: argparse.Namespace) -> int:
    """JupyterLab on the notebooks. Reachable from this computer only, so root (as in a container) may start it too."""
    command = [sys.executable, "-m", "jupyterlab", "--ServerApp.ip=127.0.0.1", "--allow-root"]
    return call(command + [f"--ServerApp.root_dir={ROOT}", "--LabApp.default_url=/lab/tree/notebooks"] + options.extra)


def doctor(options: argparse.Namespace) -> int:
    """What this machine is, what is missing, and the next action. Works before set-up and changes nothing."""
    ready = is_set_up() or in_own_environment()
    ask = "import json; from stakelib.machine import describe; print(json.dumps(describe()))"
    code, output = quiet([str(PYTHON) if is_set_up() else sys.executable, "-c", ask])
    basics = {"system": platform.platform(), "python": platform.python_version()}
    facts = basics if code else json.loads(output.strip().splitlines()[-1])
    facts["libraries"] = f"as {REQUIREMENTS.name} pins them" if ready else "missing: not set up yet"
    say("\n".join(f"{name:<14} {value}" for name, value in facts.items()))
    if not ready:
        check_disk()
    say("What to do next: python3 course.py {}".format("run, or lab" if ready else "run (it sets itself up first)"))
    return 0


def hand_over(options: argparse.Namespace) -> int:
    """To the part that does it: `serve` answers the tool; pack and unpack, which need no set-up, carry a run."""
    part = "stakelib.export.serve" if options.command == "serve" else "stakelib.carry"
    return call([sys.executable, "-m", part, options.command] + options.extra)


def parse(arguments: "list[str]") -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="course.py", description="Set up, run, test or open the course.")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    run = commands.add_parser("run", help="the whole course, headless, to a report")
    run.add_argument(
        "--profile", default=os.environ.get("STAKE_PROFILE") or "quick", help="smoke, quick, report or full"
    )
    run.add_argument("--model", help="a name from the README's table of models, or a local folder")
    run.add_argument("--only", help="numbers of notebooks, as in 01,04")
    run.add_argument("--out", help="run folder (default: runs/<profile>)")
    test = commands.add_parser("test", help="the tests; further arguments go to pytest", allow_abbrev=False)
    test.add_argument("--all", action="store_true", help="also those that need real weights")
    commands.add_parser("lab", help="JupyterLab; further arguments go to it")
    commands.add_parser("serve", help="the tuned model for the tool and a browser; --out, --port, --alias, --voices")
    commands.add_parser("doctor", help="what this machine is, what is missing")
    commands.add_parser("pack", help="a run folder (as in runs/quick) into one file")
    commands.add_parser("unpack", help="a packed run into runs/, or into a new folder that --out names")
    options, options.extra = parser.parse_known_args(arguments)
    if options.extra and options.command not in ("test", "lab", "serve", "pack", "unpack"):
        parser.error("unknown: {}".format(" ".join(options.extra)))
    return options


def settle_folders() -> None:
    """Make the folders that the environment names absolute: kernels work elsewhere. An empty name is none."""
    for name in ("STAKE_CACHE", "STAKE_RUN_ROOT"):
        given = os.environ.pop(name, "").strip()
        if given:
            os.environ[name] = os.path.abspath(os.path.expanduser(given))


def main(arguments: "list[str]") -> int:
    try:
        check_python(sys.version_info)
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="utf-8", errors="replace")  # a Windows code page must not end a run
        settle_folders()
        options = parse(arguments)
        work = {"run": run_course, "test": test_course, "lab": lab, "doctor": doctor}.get(options.command, hand_over)
        if options.command in ("doctor", "pack", "unpack") or PARENT in os.environ:
            return work(options)
        python = environment()
        if options.command == "test":
            add_test_tools(python)
        return call([python, str(ROOT / "course.py")] + arguments, **{PARENT: str(os.getpid())})
    except Stop as problem:
        say(f"\n{problem}")
        return problem.code
    except KeyboardInterrupt:
        say(f"\nStopped. To go on, {AGAIN}.")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
