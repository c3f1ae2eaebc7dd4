"""A run as one file, for the way between two machines: `course.py pack` here, `course.py unpack` there."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import zipfile
from pathlib import Path, PurePosixPath

from stakelib.run import REPOSITORY, CourseError, sha256, writing

LIST = "packed.json"  # sha256 of every file, by its path inside the run
DENSE = (".safetensors", ".gguf", ".pt")  # numbers that no zip makes smaller


def pack(folder: Path, file: Path) -> int:
    """Write the run in `folder` into one zip file, with the sha256 of each of its files; returns their number.

    Left out is what belongs to one machine or is half-written: everything whose name begins with a dot. Paths are
    relative, so the record fits wherever the run is unpacked. Raises CourseError if `folder` is no run.
    """
    if not (folder / "run.json").exists():
        raise CourseError(f"{folder} holds no run: it has no run.json", "give the run's folder, as in runs/quick")
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    names = [n for n in names if not any(part.startswith(".") for part in PurePosixPath(n).parts)]
    with writing(file) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(LIST, json.dumps({n: sha256(folder / n) for n in names}, indent=1))
        for name in names:
            archive.write(folder / name, name, zipfile.ZIP_STORED if name.endswith(DENSE) else None)
    return len(names)


def unpack(file: Path, folder: Path) -> int:
    """Unpack a run into the new folder `folder`, checking every sha256; returns the number of files.

    Raises CourseError, and leaves nothing behind, if the file is damaged, holds paths that lead out of the folder, or
    `folder` is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CourseError(f"{folder} is not empty", "give another folder with --out, or move this one away")
    try:
        with zipfile.ZipFile(file) as archive, writing(folder) as part:
            wanted = json.loads(archive.read(LIST))
            if problems := _strange(archive, wanted):
                raise CourseError([f"{file.name}: {p}" for p in problems], "do not use this file; pack the run again")
            for name in wanted:
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, (part / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
            changed = [f"{file.name}: {n} is not what was packed" for n, h in wanted.items() if sha256(part / n) != h]
            if changed:
                raise CourseError(changed, "copy the file again; if that does not help, pack the run again")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as problem:
        raise CourseError(f"{file.name} cannot be read: {problem}", "copy it again, or pack the run again") from problem
    return len(wanted)


def _strange(archive: zipfile.ZipFile, wanted: dict[str, str]) -> list[str]:
    """Names that no packed run has: outside the folder, or on one of the two lists only."""
    bad = [f"{n!r} leads out of the folder" for n in wanted if _leads_out(n)]
    return bad + [f"{n!r} is not on its own list" for n in sorted({*archive.namelist()} ^ {*wanted, LIST})]


def _leads_out(name: str) -> bool:
    return ".." in name.split("/") or name.startswith("/") or any(sign in name for sign in ("\\", ":"))


def main() -> int:
    """`pack FOLDER` or `unpack FILE`, each with `--out`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="course.py")
    parser.add_argument("command", choices=("pack", "unpack"))
    parser.add_argument("place", type=Path, help="the run folder, as in runs/quick, or the packed file")
    parser.add_argument("--out", type=Path, help="where to write it")
    options = parser.parse_args()
    given, packing = options.place.resolve(), options.command == "pack"
    out = options.out or (given.with_name(given.name + ".zip") if packing else REPOSITORY / "runs" / given.stem)
    try:
        count = (pack if packing else unpack)(given, out)
    except CourseError as problem:
        print(f"\n{problem}", flush=True)
        return 2
    print(f"{count} files: {given.name} -> {out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
