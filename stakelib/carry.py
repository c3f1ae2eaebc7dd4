"""A run as one file, for the way between two machines: `course.py pack` here, `course.py unpack` there."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

from stakelib.run import REPOSITORY, CourseError, as_folder, link, sha256, writing

LIST = "packed.json"  # sha256 of every file, by its path inside the run
DENSE = (".safetensors", ".gguf", ".pt")  # numbers that no zip makes smaller


def pack(folder: Path, file: Path) -> int:
    """Write the run in `folder` into one zip file, with the sha256 of each of its files; returns their number.

    A content that several files have (the model in models/, product/ and page/) is in it once. Left out is what belongs
    to one machine or is half-written (names that begin with a dot, locks) and the checkpoints of abandoned settings.
    Paths are relative, so the record fits wherever the run is unpacked. Raises CourseError if `folder` is no run or
    `file` cannot be written.
    """
    if not (folder / "run.json").exists():
        raise CourseError(f"{folder} holds no run: it has no run.json", "give the run's folder, as in runs/quick")
    try:
        left_out = _abandoned(folder)
        names = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and not left_out & {*p.parents}]
        kept = [n for n in names if n.suffix != ".lock" and not any(part.startswith(".") for part in n.parts)]
        sums = {n.as_posix(): sha256(folder / n) for n in sorted(kept, key=lambda n: n.parts)}
        once = {digest: name for name, digest in sums.items()}
        with (
            writing(file) as part,
            zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive,
        ):
            archive.writestr(LIST, json.dumps(sums, indent=1))
            for name in once.values():
                archive.write(folder / name, name, zipfile.ZIP_STORED if name.endswith(DENSE) else None)
    except OSError as problem:
        action = "give another place with --out; a USB stick with the FAT system holds no file above 4 GB"
        raise CourseError(f"{file} cannot be written: {problem}", action) from problem
    return len(sums)


def _abandoned(folder: Path) -> set[Path]:
    """Checkpoint folders of a training that was started again with other settings: all but its newest one."""
    newest: dict[tuple[Path, str], tuple[float, Path]] = {}
    folders = [p for p in folder.rglob("checkpoints-*") if p.is_dir()]
    for place in folders:
        begun = place / "begun.json"
        when = (begun if begun.exists() else place).stat().st_mtime
        training = place.parent, place.name.rpartition("-")[0]  # the last part is the digest of its settings
        newest[training] = max(newest.get(training, (when, place)), (when, place))
    return {*folders} - {place for _, place in newest.values()}


def unpack(file: Path, folder: Path) -> int:
    """Unpack a run into the new folder `folder`, checking every sha256; returns the number of files.

    Weights that lie in several places become hard links again, or copies where the disk has none. Raises CourseError,
    and leaves nothing behind, if the file is damaged, holds paths that lead out of the folder, `folder` is not empty,
    or the disk is full.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CourseError(f"{folder} is not empty", "give another folder with --out, or move this one away")
    try:
        with zipfile.ZipFile(file) as archive, writing(folder) as part:
            wanted = json.loads(archive.read(LIST))
            if problems := _strange(archive, wanted):
                raise CourseError([f"{file.name}: {p}" for p in problems], "do not use this file; pack the run again")
            packed = {wanted[n]: n for n in archive.namelist() if n != LIST}
            for name in wanted:
                (part / name).parent.mkdir(parents=True, exist_ok=True)
            for name in packed.values():
                with archive.open(name) as source, (part / name).open("wb") as target:
                    shutil.copyfileobj(source, target)
            for name, digest in wanted.items():
                if (first := packed[digest]) != name and not (part / name).exists():  # texts may be edited: no links
                    (link if name.endswith(DENSE) else shutil.copyfile)(part / first, part / name)
            changed = [f"{file.name}: {n} is not what was packed" for n, h in wanted.items() if sha256(part / n) != h]
            if changed:
                raise CourseError(changed, "copy the file again; if that does not help, pack the run again")
    except CourseError:
        raise
    except Exception as problem:  # zipfile, zlib and json each have their own for a damaged file
        raise CourseError(f"{file.name} cannot be read: {problem}", "copy it again, or pack the run again") from problem
    return len(wanted)


def _strange(archive: zipfile.ZipFile, wanted: dict[str, str]) -> list[str]:
    """Names that no packed run has: outside the folder, not on its list, or on it without their content."""
    names = {*archive.namelist()} - {LIST}
    contents = {wanted.get(n) for n in names}
    bad = [f"{n!r} leads out of the folder" for n in wanted if _leads_out(n)]
    lost = [n for n, digest in wanted.items() if digest not in contents]
    return bad + [f"{n!r} is not on its own list" for n in sorted({*lost, *(names - wanted.keys())})]


def _leads_out(name: str) -> bool:
    return ".." in name.split("/") or name.startswith("/") or any(sign in name for sign in ("\\", ":"))


def main() -> int:
    """`pack FOLDER` or `unpack FILE`, each with `--out`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="course.py")
    parser.add_argument("command", choices=("pack", "unpack"))
    parser.add_argument(
        "place", type=lambda text: as_folder(text or "."), help="the run folder, as in runs/quick, or the packed file"
    )
    parser.add_argument("--out", type=as_folder, help="where to write it")
    options = parser.parse_args()
    given, packing = options.place, options.command == "pack"
    runs = as_folder(os.environ.get("STAKE_RUN_ROOT")) or REPOSITORY / "runs"
    out = options.out or (given.with_name(given.name + ".zip") if packing else runs / given.stem)
    try:
        count = (pack if packing else unpack)(given, out)
    except CourseError as problem:
        print(f"\n{problem}", flush=True)
        return 2
    print(f"{count} files: {given.name} -> {out}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
