"""Make requirements-*.txt and environment.yml from pyproject.toml: python tests/lock.py [--upgrade]   (needs a network)

uv resolves the whole tree for each system and each Python of the course, and takes only what has a wheel there.
A line gets a marker where some of them need it and others do not. Versions of the last time stay; --upgrade takes new.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# MLX's build for processors needs this new a glibc. Set-up goes on without it, and all else has wheels for glibc 2.28.
PLATFORMS = {"linux": "x86_64-manylinux_2_35", "win32": "x86_64-pc-windows-msvc", "darwin": "aarch64-apple-darwin"}
OLD_LINUX = "x86_64-manylinux_2_28"
MACOS = "14.0"  # the oldest that MLX is made for
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
CUDA = re.compile(r"(nvidia|cuda)-|triton==")  # torch's build for NVIDIA cards needs them, its build for CPUs does not
HEAD = "# Made by `python tests/lock.py` from pyproject.toml: change a version there, then run it again.\n"
NOTES = {
    "cpu": "# PC with an Intel or AMD processor (Windows, Linux), no GPU needed. `python3 course.py run` installs it.\n"
    "-c requirements-cuda.txt\n",
    "m1": "# Mac with Apple silicon (M1 or later) and macOS 14 or later. `python3 course.py run` installs it.\n",
    "dev": "# What the tests and the maintainer need on top. `python3 course.py test` installs it.\n",
    "cuda": "# Versions only. On Linux torch asks for these packages where it is not the build for CPUs.\n",
}
CONDA = """# For conda users on every machine; the markers choose.
# conda env create -f environment.yml && conda activate stakelib && python course.py run
name: stakelib
channels:
  - conda-forge
dependencies:
  - python{python}
  - pip
  - pip:
      - --extra-index-url https://download.pytorch.org/whl/cpu
      - -c requirements-cuda.txt
      - -e .
"""
Tree = dict[tuple[str, str], set[str]]  # (system, Python): all that it needs, as in numpy==2.4.6


def uv(*options: str, requirements: list[str] | None = None) -> list[str]:
    """The lines that `uv pip compile` finds; ends the program with uv's own words where there is no solution."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", *options]
    text = None if requirements is None else "\n".join(requirements)
    env = os.environ | {"MACOSX_DEPLOYMENT_TARGET": MACOS}
    done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", cwd=ROOT, env=env)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout.splitlines()


def choose_versions(lock: Path, upgrade: bool) -> None:
    """Write to `lock` one version of each package for all extras, systems and Pythons, or as few as can be."""
    files = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("requirements-*.txt"))]
    lock.write_text("\n".join(sorted({x for text in files for x in text.splitlines() if x[:1].isalnum()})), "utf-8")
    options = ["--all-extras", "--universal", "--python-version", PYTHONS[0], "--fork-strategy", "fewest"]
    uv("pyproject.toml", *options, *(["--upgrade"] if upgrade else []), "--output-file", str(lock))


def resolve(requirements: list[str], platforms: dict[str, str], lock: Path) -> Tree:
    """What each of the systems needs on each Python, at the versions of `lock`; a missing wheel ends the program."""
    fixed = ["-", "--only-binary", ":all:", "--constraints", str(lock)]
    return {
        (system, python): set(
            uv(*fixed, "--python-platform", platforms[system], "--python-version", python, requirements=requirements)
        )
        for system, python in product(platforms, PYTHONS)
    }


def python_condition(pythons: tuple[str, ...]) -> str:
    if pythons == PYTHONS:
        return ""
    if pythons == PYTHONS[: len(pythons)]:
        return f'python_version <= "{pythons[-1]}"'
    if pythons == PYTHONS[-len(pythons) :]:
        return f'python_version >= "{pythons[0]}"'
    return " or ".join(f'python_version == "{python}"' for python in pythons)


def marker(cases: set[tuple[str, str]], systems: set[str]) -> str:
    """The condition that is true in `cases` (system, Python) and in no other case of `systems`; "" if all are meant."""
    pythons = {s: tuple(p for p in PYTHONS if (s, p) in cases) for s in sorted(systems) if s in {c[0] for c in cases}}
    alternatives = []
    for these in sorted(set(pythons.values())):
        alike = [system for system in pythons if pythons[system] == these]
        where = "" if set(alike) == systems else " or ".join(f'sys_platform == "{system}"' for system in alike)
        parts = [part for part in (where, python_condition(these)) if part]
        alternatives.append(" and ".join(f"({part})" if " or " in part and len(parts) > 1 else part for part in parts))
    return " or ".join(f"({x})" if " and " in x and len(alternatives) > 1 else x for x in alternatives)


def lines(tree: Tree) -> list[str]:
    """Requirement lines that give each case of the tree exactly its own, sorted by name."""
    systems = {system for system, _ in tree}
    conditions = {
        pin: marker({case for case in tree if pin in tree[case]}, systems) for pin in set().union(*tree.values())
    }
    return [f"{pin}; {conditions[pin]}" if conditions[pin] else pin for pin in sorted(conditions)]


def without(tree: Tree, cuda: bool) -> Tree:
    return {case: {pin for pin in pins if bool(CUDA.match(pin)) != cuda} for case, pins in tree.items()}


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base, extras = project["dependencies"], project["optional-dependencies"]
    pc, mac = ({s: p for s, p in PLATFORMS.items() if (s == "darwin") == apple} for apple in (False, True))
    with tempfile.TemporaryDirectory() as folder:
        lock = Path(folder) / "lock.txt"
        choose_versions(lock, "--upgrade" in sys.argv)
        trees = {"cpu": resolve(base + extras["cpu"], pc, lock), "m1": resolve(base + extras["m1"], mac, lock)}
        trees["dev"] = resolve(extras["dev"], PLATFORMS, lock)
        resolve(base + [line for line in extras["cpu"] if "mlx" not in line], {"linux": OLD_LINUX}, lock)  # wheels?
    trees["cuda"] = without(trees["cpu"], cuda=False)
    trees["cpu"] = without(trees["cpu"], cuda=True)
    for name, note in NOTES.items():
        pins = sorted(set().union(*trees[name].values())) if name == "cuda" else lines(trees[name])
        (ROOT / f"requirements-{name}.txt").write_text(HEAD + note + "\n".join(pins) + "\n", encoding="utf-8")
        print(f"requirements-{name}.txt: {len(pins)} lines")
    every = [f"      - {line}\n" for line in lines(trees["cpu"] | trees["m1"])]
    text = HEAD + CONDA.format(python=project["requires-python"]) + "".join(every)
    (ROOT / "environment.yml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
