"""One run is one folder: its settings, its files, and a record of what made each of them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import platform
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib import metadata
from pathlib import Path, PureWindowsPath
from typing import Any

from stakelib import __version__


class CourseError(Exception):
    """Everything that is wrong, at once, and what to do about it.

    `problems`: one line each, naming file, row or field. `next_action`: one sentence.
    """

    def __init__(self, problems: list[str] | str, next_action: str) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.next_action = next_action
        super().__init__("\n".join([*(f"- {p}" for p in self.problems), f"What to do next: {next_action}"]))


FULL_ERRORS = (errno.ENOSPC, errno.EDQUOT)
FULL_WORDS = (
    "No space left on device",
    "not enough space on the disk",
    "Disk quota exceeded",
    "os error 28",
    "Errno 28",
)
MAKE_ROOM = "make room on that disk (old folders in runs/ and packed runs are large)"
FULL_MB = 1.0  # less than this much free: the disk is full, whatever the error says
NO_TEXT = (".safetensors", ".gguf", ".pt", ".pth", ".arrow", ".wasm")  # files of numbers, which nobody edits


def disk_full(problem: BaseException, place: Path) -> CourseError | None:
    """What to raise instead of `problem` if it came from a full disk, that of `place` or of temporary files; else None.

    torch, safetensors and converters lose the system's error number ("unexpected pos", "iostream error"), so the free
    space counts too. Ask before half-written files are removed.
    """
    causes = [e for e in (problem, problem.__cause__, problem.__context__) if e is not None]
    numbered = [e for e in causes if isinstance(e, OSError) and e.errno in FULL_ERRORS]
    said = bool(numbered) or any(words in str(problem) for words in FULL_WORDS)
    named = [Path(os.path.abspath(e.filename)) for e in numbered if isinstance(e.filename, str)]
    places = [_existing(p) for p in (*named, Path(os.path.abspath(place)), Path(tempfile.tempdir or place))]
    free = {p: _free_mb(p) for p in places}
    full = next((p for p in places if free[p] < FULL_MB), places[0] if said else None)
    told_before = any(isinstance(e, CourseError) and MAKE_ROOM in e.next_action for e in causes)  # by a child, too
    if full is None or told_before:
        return None
    what = f"the disk of {full} is full, with {free[full]:.1f} MB free now"
    if isinstance(problem, CourseError):
        action = MAKE_ROOM if said else f"{MAKE_ROOM}; then {problem.next_action}"
        return CourseError([*problem.problems, what], action)
    return CourseError(f"{what} ({str(problem)[:200] or type(problem).__name__})", MAKE_ROOM)


def _existing(path: Path) -> Path:
    """`path` or the nearest folder above it that is there."""
    return next(p for p in (path, *path.parents) if p.exists())


def _free_mb(place: Path) -> float:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(place).free / 1e6
    return float("inf")


@contextlib.contextmanager
def telling_full_disk(place: Path) -> Iterator[None]:
    """Errors that come from a full disk leave as a CourseError that names the disk of `place`."""
    try:
        yield
    except Exception as problem:
        if told := disk_full(problem, place):
            raise told from problem
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file or folder to; it takes the place of `path` only if all went well.

    It is on the disk before that, so a power cut leaves the old one or the new one. Raises CourseError if the disk is
    full.
    """
    path = Path(path)
    part = _hidden(path)
    with telling_full_disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with telling_full_disk(path.parent):
            yield part
            _flush(part)
            _take_place(part, path)
    finally:
        with contextlib.suppress(OSError):  # Windows: still open elsewhere; the next run sweeps it away
            shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


def _take_place(part: Path, path: Path) -> None:
    """Rename `part` to `path`. A folder takes two renames: a power cut between them is mended by `sweep`."""
    old = part.with_suffix(".old")
    if part.is_dir() and path.exists():
        move(path, old)
    try:
        move(part, path)
    except OSError:  # Windows: another program holds a file in it; the old folder goes back to its place
        if old.exists():
            move(old, path)
        raise
    try:
        if os.name != "nt":
            _fsync(path.parent)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _flush(part: Path) -> None:
    """Everything in `part` to the disk, its folders' lists of names too where the system can."""
    inside = [*part.rglob("*"), part] if part.is_dir() else [part]
    for path in inside:
        if path.is_file() or os.name != "nt":
            _fsync(path)


def _fsync(path: Path) -> None:
    """Wait until a file or folder is on the disk; some network drives cannot promise that."""
    with contextlib.suppress(PermissionError):  # Windows: a file that may only be read
        number = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(number)
        except OSError as problem:
            if problem.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
        finally:
            os.close(number)


def _hidden(path: Path) -> Path:
    """A name beside `path` that says which process writes there."""
    return path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")


def discard(folder: Path) -> None:
    """Remove a folder that another process may look for: hidden first, so that no half of it is ever seen."""
    hidden = _hidden(folder)
    move(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Put back each folder that a power cut caught between two renames, and remove what killed processes left.

    What living processes are writing stays.
    """
    import psutil

    for place, folders, files in os.walk(folder):
        for left in (Path(place, n) for n in (*folders, *files) if n[0] == "." and n.endswith((".part", ".old"))):
            name, _, writer = left.stem[1:].rpartition(".")
            if not (number := writer.split("-")[0]).isdigit():
                continue
            alive, target = psutil.pid_exists(int(number)), left.with_name(name)
            if left.suffix == ".old" and not target.exists():
                time.sleep(1.5 if alive else 0)  # a living writer is done by then; a number may also be used again
                with contextlib.suppress(OSError):
                    if not target.exists():
                        move(left, target)
            elif not alive:
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


@contextlib.contextmanager
def hold(file: Path, taken: str, next_action: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock `file` for this process; the system lets go of it however the process ends.

    Raises CourseError, which begins with `taken` and names the process, if another one holds it for longer than
    `wait_s` seconds. Where no lock can be made (a read-only folder, some network drives), work goes on and says so.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(file, timeout=wait_s)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        _sign(file, f"process {os.getpid()}, since {datetime.now():%Y-%m-%d %H:%M}")
    except Timeout:
        raise CourseError(f"{taken} ({_holder(file)}; lock {file})", next_action) from None
    except OSError as problem:
        if told := disk_full(problem, file.parent):
            raise told from problem
        print(f"{file} cannot be locked ({problem}); do not start this twice", flush=True)
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                os.truncate(file, 0)
        lock.release()


def _sign(file: Path, text: str) -> None:
    """Write who holds the lock behind its first byte, which is the one that Windows locks."""
    with contextlib.suppress(OSError), file.open("r+b", buffering=0) as stream:
        stream.seek(1)
        stream.write(text.encode())
        stream.truncate()


def _holder(file: Path) -> str:
    with contextlib.suppress(OSError), file.open("rb", buffering=0) as stream:
        stream.seek(1)
        return stream.read(200).decode("utf-8", errors="replace") or "another process"
    return "another process"


def as_folder(text: str | Path | None) -> Path | None:
    """A path as a person gives it: "~" is the home folder, the result is absolute; None for an empty text."""
    return Path(os.path.abspath(os.path.expanduser(text))) if str(text or "").strip() else None


def is_main() -> bool:
    """True unless accelerate or torchrun started this process as a helper of the first, which alone writes."""
    return os.environ.get("RANK", "0") == "0"


def move(source: Path, target: Path) -> None:
    """os.replace; on Windows a reader or a virus scanner may hold a file, or one in the folder, for a moment."""
    for _ in range(20):
        with contextlib.suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.05)
    return os.replace(source, target)


def atomic_write_text(path: Path, text: str) -> Path:
    """Write `text` (UTF-8) so that a reader sees the old file or the new one, never half, after a power cut too."""
    with writing(path) as part:
        part.write_bytes(text.encode("utf-8"))
    return Path(path)


def append_line(path: Path, line: str) -> None:
    """Add a line (UTF-8) to a file, whole or not at all; on the disk before this returns."""
    with telling_full_disk(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab") as stream:
                stream.write(line.encode("utf-8") + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, before)
            raise


def atomic_write_json(path: Path, value: Any) -> Path:
    """Write `value` as indented JSON; floats must be finite, so that every reader can load it."""
    return atomic_write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def link(source: Path, target: Path) -> None:
    """A second name for the same bytes, or a copy where the disk has no hard links (FAT, exFAT, another disk)."""
    with contextlib.suppress(OSError):
        return os.link(source, target)
    shutil.copyfile(source, target)


def sha256(path: Path) -> str:
    """Hex digest of a file, or of a folder's relative names and contents in sorted order."""
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        files = {p.relative_to(path).parts: p for p in path.rglob("*") if p.is_file()}
        for parts in sorted(files):  # sorted paths would be in another order on Windows
            digest.update(f"{'/'.join(parts)}\0{sha256(files[parts])}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


LONGEST = 1000  # characters of one setting in run.json; of longer ones it holds the sha256
FORMAT = 1  # of run.json; raise it when an older folder can no longer be continued
REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Profile:
    """How much work a run does. Times are budgets for two cores; the record holds what was measured."""

    name: str
    model: str  # a name of stakelib.models.MODELS, or a local folder
    rows: int  # full dialogues after the guide's form, all splits together
    asked: int  # and after its free-form question
    thin: int  # rows of each of the tool's two requests: the JSON object, the voice of two or three sentences
    epochs: int
    test_prompts: int  # held-out prompts asked of base and tuned
    max_new_tokens: int
    seed: int = 7


PROFILES = {
    p.name: p
    for p in (
        # 63 rows: seven scenarios for each of the nine voices, enough for three splits; the answers are noise
        Profile("smoke", "tiny-gemma", rows=63, asked=9, thin=9, epochs=1, test_prompts=9, max_new_tokens=24),
        # one epoch over the guide's 500 rows, a free question and the tool's two requests; 45 prompts show large
        # differences only, and the report says so
        Profile("quick", "smollm2-135m", rows=500, asked=18, thin=63, epochs=1, test_prompts=45, max_new_tokens=400),
        # the figures the README quotes: 40 held-out scenarios x 9 voices; two epochs over twice the rows, best one kept
        Profile("report", "smollm2-135m", rows=1000, asked=18, thin=63, epochs=2, test_prompts=360, max_new_tokens=400),
        # the guide's own target; hours on a laptop
        Profile("full", "gemma-2b-it", rows=500, asked=18, thin=63, epochs=3, test_prompts=99, max_new_tokens=400),
    )
}


class Run:
    """A run folder: `run.path(...)` names a file in it, `run.stage(...)` makes files once and remembers them."""

    def __init__(self, folder: Path, profile: Profile, record: dict[str, Any]) -> None:
        self.folder, self.profile, self.record = Path(folder), profile, record

    @classmethod
    def open(cls, out: str | Path | None = None, profile: str | None = None, model: str | None = None) -> Run:
        """Create or continue the run in folder `out` (default: runs/<profile>[-<model>], $STAKE_PROFILE or quick).

        Raises CourseError for an unknown profile, a folder of another format, or one that holds another run.
        """
        profile = profile or os.environ.get("STAKE_PROFILE") or "quick"
        chosen = choose_profile(profile, model)
        folder = as_folder(out) or default_folder(profile, model)
        sweep(folder)
        record_file = folder / "run.json"
        fresh = {"format": FORMAT, "profile": asdict(chosen), "stages": {}}
        record = _read_record(record_file, fresh) if record_file.exists() else fresh
        return cls(folder, chosen, {**record, "stakelib": __version__, "versions": versions()})

    def path(self, *parts: str) -> Path:
        """A path inside the run folder; its parent folder is created."""
        path = self.folder.joinpath(*parts)
        with telling_full_disk(self.folder):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def remember(self, **facts: Any) -> None:
        """Put facts (the machine, the base model) into the record."""
        if not is_main():
            self._take_in()
            self.record.update(facts)
            return
        with self._recording():
            self.record.update(facts)

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        """Change the record as it is on the disk now, one process at a time: other open notebooks write it too."""
        action = "end that process, or wait for it, and run this again"
        with hold(self.path(".run.json.lock"), f"another process is writing {self.folder / 'run.json'}", action, 30.0):
            self._take_in()
            yield
            atomic_write_json(self.folder / "run.json", self.record)

    def _take_in(self) -> None:
        """What another notebook or process has put on record since run.json was read is neither redone nor lost."""
        if not (file := self.folder / "run.json").exists():
            return
        here, saved = self.record, _parse_record(file)
        parts = {part: {**here.get(part, {}), **saved.get(part, {})} for part in ("stages", "written")}
        here.update(saved | parts | {k: here[k] for k in ("stakelib", "versions") if k in here})

    def stage(
        self,
        name: str,
        settings: dict[str, Any],
        inputs: Iterable[Path],
        outputs: Iterable[Path],
        work: Callable[[], dict[str, Any]],
    ) -> dict[str, Any]:
        """Run `work()` unless the record shows these outputs made from the same settings and inputs.

        `work` returns the JSON-able result that a later, skipped call gives back. Outputs are checked against their
        recorded sha256, so a file that was edited or cut short is made again; what a person wrote is kept beside it,
        see `keeping_edits`. Seconds and peak anonymous memory (MB) go into the record; a helper process only works.
        Raises CourseError if an input is missing, `work` did not leave an output, or the disk is full.
        """
        if missing := [f"{self._name(p)} is missing" for p in inputs if not Path(p).exists()]:
            raise CourseError(missing, f"run the notebook before this one first (stage '{name}' needs these files)")
        self._take_in()
        wanted = self._wanted(settings, inputs)
        if saved := self.finished(name, settings, inputs, outputs):
            told = f"up to date (made {saved['finished']} in {saved['seconds']:.0f} s), nothing to do"
            print(f"{name}: {told}", flush=True)
            return saved["result"]
        self.record["stages"].pop(name, None)
        if not is_main():
            return work()
        started = time.monotonic()
        with PeakMemory() as memory, telling_full_disk(self.folder), self.keeping_edits(outputs):
            result = work()
        absent = [f"{self._name(p)} was not written" for p in outputs if not Path(p).exists()]
        if absent:
            raise CourseError(absent, f"run stage '{name}' again; if it happens twice, please report it")
        saved = {
            **wanted,
            "outputs": {self._name(p): {"sha256": sha256(p), "bytes": size(p)} for p in outputs},
            "result": json.loads(json.dumps(result, allow_nan=False)),
            "seconds": round(time.monotonic() - started, 1),
            "peak_mb": round(memory.peak_mb),
            "versions": self.record.get("versions") or versions(),
            "finished": datetime.now().isoformat(sep=" ", timespec="minutes"),
        }
        with self._recording():
            self.record["stages"][name] = saved
        return saved["result"]

    @contextlib.contextmanager
    def keeping_edits(self, outputs: Iterable[Path]) -> Iterator[None]:
        """Around work that writes `outputs`: a text that a person changed is kept as <name>.edited, and that is said.

        Of a folder, its changed texts are kept in <folder>.edited. Weights are not kept: nobody edits them.
        The record holds the sha256 of each text as the course wrote it last.
        """
        outputs = [Path(p) for p in outputs]
        before, kept = self._texts(outputs), {}
        for file, digest in before.items():
            output = next(p for p in outputs if file.is_relative_to(p))
            if self._edited(file, digest, output):
                kept[file] = _keep(file, digest, output)
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):  # the disk may be full; the first problem is the one to tell
                self._note_texts(self._texts(outputs), before, kept)
            raise
        self._note_texts(self._texts(outputs), before, kept, finished=True)

    def _note_texts(
        self, after: dict[Path, str], before: dict[Path, str], kept: dict[Path, Path], finished: bool = False
    ) -> None:
        """Say what was kept, and put on record what the work wrote: all that is there, if it finished."""
        for file, copy in kept.items():
            if after.get(file) == before[file]:
                copy.unlink()
                with contextlib.suppress(OSError):
                    copy.parent.rmdir()  # <folder>.edited, if it is empty now
                continue
            how = "; to change rows so that they stay changed, use notebook 02" if file.suffix == ".jsonl" else ""
            print(f"{self._name(file)} was not as the course wrote it: kept as {self._name(copy)}{how}", flush=True)
        new = {self._name(f): digest for f, digest in after.items() if finished or before.get(f) != digest}
        if not new.items() <= self.record.get("written", {}).items():
            with self._recording():
                self.record.setdefault("written", {}).update(new)

    def _edited(self, file: Path, digest: str, output: Path) -> bool:
        """Somebody else wrote this text of `output` last. A folder that the record does not know is the course's."""
        name, written, stages = self._name(file), self.record.get("written", {}), self.record["stages"].values()
        if name in written:
            return digest != written[name]
        if file == output:
            return digest not in (s["outputs"][name]["sha256"] for s in stages if name in s["outputs"])
        return any(n.startswith(f"{self._name(output)}/") for n in written)

    def _texts(self, outputs: list[Path]) -> dict[Path, str]:
        """sha256 of every file in `outputs` that a person could edit."""
        files = [f for p in outputs for f in (sorted(p.rglob("*")) if p.is_dir() else [p])]
        return {f: sha256(f) for f in files if f.suffix not in NO_TEXT and f.name[0] != "." and f.is_file()}

    def finished(
        self, name: str, settings: dict[str, Any], inputs: Iterable[Path], outputs: Iterable[Path]
    ) -> dict[str, Any] | None:
        """The record of stage `name` if it made these outputs, unchanged since, of the same settings and inputs."""
        saved = self.record["stages"].get(name)
        if not saved or not all(Path(p).exists() for p in inputs):
            return None
        wanted = self._wanted(settings, inputs)
        same = _shortened(saved["settings"]) == wanted["settings"] and saved["inputs"] == wanted["inputs"]
        return saved if same and self._intact(saved["outputs"], outputs) else None

    def recorded(self, stage: str, path: Path, kind: str = "outputs") -> str | None:
        """sha256 of `path` as stage `stage` left it (`kind` "outputs") or read it ("inputs"); None if not on record."""
        self._take_in()
        about = self.record["stages"].get(stage, {}).get(kind, {}).get(self._name(path))
        return about["sha256"] if isinstance(about, dict) else about

    def _wanted(self, settings: dict[str, Any], inputs: Iterable[Path]) -> dict[str, Any]:
        """What a record must say to be of these settings and inputs, as it comes back from JSON."""
        inputs = {self._name(p): sha256(p) for p in inputs}
        return {"settings": _shortened(settings), "inputs": inputs}

    def _name(self, path: Path) -> str:
        """Relative to the run folder, so that a run can move to another machine; outside it, the name alone."""
        path = Path(path).resolve()
        root = self.folder.resolve()
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name

    def _intact(self, saved: dict[str, Any], outputs: Iterable[Path]) -> bool:
        wanted = {self._name(p): Path(p) for p in outputs}
        return set(saved) == set(wanted) and all(
            p.exists() and size(p) == saved[n]["bytes"] and sha256(p) == saved[n]["sha256"] for n, p in wanted.items()
        )


def choose_profile(profile: str, model: str | None = None) -> Profile:
    """The named profile, with another base model if one is given."""
    if profile not in PROFILES:
        raise CourseError(f"profile '{profile}' is unknown", f"choose one of: {', '.join(PROFILES)}")
    return replace(PROFILES[profile], model=model) if model else PROFILES[profile]


def default_folder(profile: str, model: str | None = None) -> Path:
    """runs/<profile>, or runs/<profile>-<model> for a model that is not the profile's own."""
    root = as_folder(os.environ.get("STAKE_RUN_ROOT")) or REPOSITORY / "runs"
    other = model and model != PROFILES[profile].model
    return root / (f"{profile}-{Path(model).name}" if other else profile)


def _shortened(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as the record holds them: of a long one (all scenarios, a page's texts) its size and sha256."""

    def short(value: Any) -> Any:
        text = json.dumps(value, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return json.loads(text) if len(text) <= LONGEST else f"{len(text)} characters, sha256 {digest}"

    return {name: short(value) for name, value in settings.items()}


def _keep(file: Path, digest: str, output: Path) -> Path:
    """Copy an edited text of `output` beside it, under a name that is still free; returns the copy."""
    for number in itertools.count(1):
        place = output.with_name(f"{output.name}.edited" + (f"-{number}" if number > 1 else ""))
        copy = place / file.relative_to(output) if file != output else place
        if not copy.exists():
            with writing(copy) as part:
                shutil.copyfile(file, part)
        if sha256(copy) == digest:
            return copy
    raise AssertionError("unreachable")


ANOTHER = "choose another folder with --out, or move this one away"


def _parse_record(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        _ = record["format"], dict(record["profile"]), dict(record["stages"])
    except (ValueError, KeyError, TypeError) as problem:
        what = f"{problem} is missing" if isinstance(problem, KeyError) else problem
        raise CourseError(f"{file} cannot be read ({what})", f"restore it from a copy, or {ANOTHER}") from problem
    return record


def _read_record(file: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    record, another = _parse_record(file), ANOTHER
    made_by, kept = record["format"], dict(record["profile"])
    if made_by != FORMAT:
        raise CourseError(f"{file} has format {made_by}, this version of stakelib writes format {FORMAT}", another)
    differ = [
        f"{file}: {k} is {kept.get(k)!r}, you asked for {v!r}"
        for k, v in fresh["profile"].items()
        if kept.get(k) != v and not (k == "model" and _same_name(str(kept.get(k)), v))
    ]
    if differ:
        renamed = (
            f"{another}; a base model's folder that was renamed needs its old name"
            if os.path.isdir(fresh["profile"]["model"])
            else another
        )
        raise CourseError(differ, renamed)
    return record


def _same_name(kept: str, asked: str) -> bool:
    """True if `asked` may be the folder of the base model `kept`, at another place, in another spelling.

    Whether the files are the same, `stakelib.models.check_same_base` sees.
    """
    folder = os.path.abspath(os.path.expanduser(asked))
    return os.path.isdir(folder) and PureWindowsPath(kept).name == PureWindowsPath(folder).name  # it knows / and \


def versions() -> dict[str, str]:
    """Python and the libraries whose version can change a result."""
    names = ("torch", "transformers", "peft", "datasets", "gguf", "xllamacpp", "tokenizers", "numpy", "mlx", "mlx-lm")
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return {"python": platform.python_version(), **found}


def size(path: Path) -> int:
    """Bytes in a file or folder."""
    path = Path(path)
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def anonymous_mb() -> float:
    """Memory of this process and of all that it started (MB) which the system cannot drop.

    RssAnon on Linux, unique set size elsewhere: mapped weight files count as resident but can be dropped, so resident
    size misleads. A process that ends meanwhile counts nothing.
    """
    import psutil

    this = psutil.Process()
    return sum(_anonymous_mb(process) for process in (this, *this.children(recursive=True)))


def _anonymous_mb(process: Any) -> float:
    import psutil

    try:
        if not (status := Path(f"/proc/{process.pid}/status")).exists():
            return process.memory_full_info().uss / 2**20
        lines = status.read_text(encoding="utf-8", errors="replace").splitlines()
        return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))
    except (OSError, psutil.Error):  # it has ended, or belongs to somebody else
        return 0.0


class PeakMemory:
    """Context manager that samples `anonymous_mb` five times a second, helpers included; `.peak_mb` afterwards."""

    def __enter__(self) -> PeakMemory:
        self.peak_mb, self._done = anonymous_mb(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            self.peak_mb = max(self.peak_mb, anonymous_mb())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


class Progress:
    """Plain lines with a rate and an ETA: the first within `every` seconds of the first tick, later rarer, up to 60."""

    def __init__(
        self, what: str, total: int, unit: str, every: float = 10.0, say: Callable[[str], None] | None = None
    ) -> None:
        self.what, self.total, self.unit, self.every = what, total, unit, every
        self.say = say or (lambda line: print(line, flush=True))
        self.start, self.last, self.first_done, self.moved = time.monotonic(), 0.0, None, False

    @contextlib.contextmanager
    def heartbeat(self, every: float = 30.0) -> Iterator[None]:
        """Until work has moved on for the first time, say every `every` seconds that it goes on."""
        ended, begun = threading.Event(), time.monotonic()

        def beat() -> None:
            while not ended.wait(every) and not self.moved:
                self.say(f"{self.what}: at work for {clock(time.monotonic() - begun)}, no {self.unit} finished yet")

        threading.Thread(target=beat, daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def tick(self, done: int, note: str = "") -> None:
        """Say where we are, if all is done or the last line is `every` seconds and a quarter of the time so far ago."""
        now = time.monotonic()
        if self.first_done is None:
            self.first_done, self.start = done, now  # work resumed from a checkpoint does not count as speed
        self.moved = done > self.first_done
        if now - self.last < max(self.every, min((now - self.start) / 4, 60)) and done < self.total:
            return
        self.last = now
        rate = (done - self.first_done) / max(now - self.start, 1e-9)
        eta = f", about {clock((self.total - done) / rate)} left" if rate > 0 and done < self.total else ""
        self.say(f"{self.what}: {done}/{self.total} {self.unit}{eta}{'  ' + note if note else ''}")


def clock(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
