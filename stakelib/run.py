"""One run is one folder: its settings, its files, and a record of what made each of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib import metadata
from pathlib import Path
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


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file or folder to; it takes the place of `path` only if all went well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _hidden(path)
    try:
        yield part
        if part.is_dir():
            old = part.with_suffix(".old")
            if path.exists():
                move(path, old)
            try:
                move(part, path)
            except OSError:  # Windows: another program holds a file in it; the old folder goes back to its place
                if old.exists():
                    move(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            move(part, path)
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _hidden(path: Path) -> Path:
    """A name beside `path` that says which process writes there."""
    return path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")


def discard(folder: Path) -> None:
    """Remove a folder that another process may look for: hidden first, so that no half of it is ever seen."""
    hidden = _hidden(folder)
    move(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written anywhere in `folder`; those of living ones stay."""
    import psutil

    for place, folders, files in os.walk(folder):
        for left in (Path(place, n) for n in (*folders, *files) if n[0] == "." and n.endswith((".part", ".old"))):
            writer = left.name.split(".")[-2].split("-")[0]
            if writer.isdigit() and not psutil.pid_exists(int(writer)):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


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
    with writing(path) as part, part.open("wb", buffering=0) as stream:
        stream.write(text.encode("utf-8"))
        os.fsync(stream.fileno())
    return Path(path)


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
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()}\0{sha256(file)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


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
        folder = Path(out) if out else default_folder(profile, model)
        sweep(folder)
        record_file = folder / "run.json"
        fresh = {"format": FORMAT, "profile": asdict(chosen), "stages": {}}
        record = _read_record(record_file, fresh) if record_file.exists() else fresh
        return cls(folder, chosen, {**record, "stakelib": __version__, "versions": versions()})

    def path(self, *parts: str) -> Path:
        """A path inside the run folder; its parent folder is created."""
        path = self.folder.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def remember(self, **facts: Any) -> None:
        """Put facts (the machine, the base model) into the record."""
        self._take_in()
        self.record.update(facts)
        if is_main():
            atomic_write_json(self.path("run.json"), self.record)

    def _take_in(self) -> None:
        """Stages that another notebook or process has finished since run.json was read are neither redone nor lost."""
        if (file := self.folder / "run.json").exists():
            self.record["stages"] |= json.loads(file.read_text(encoding="utf-8"))["stages"]

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
        recorded sha256, so a file that was edited or cut short is made again. Seconds and peak anonymous memory (MB)
        go into the record; a helper process only works. Raises CourseError if an input is missing or `work` did not
        leave an output.
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
        with PeakMemory() as memory:
            result = work()
        absent = [f"{self._name(p)} was not written" for p in outputs if not Path(p).exists()]
        if absent:
            raise CourseError(absent, f"run stage '{name}' again; if it happens twice, please report it")
        self._take_in()
        self.record["stages"][name] = {
            **wanted,
            "outputs": {self._name(p): {"sha256": sha256(p), "bytes": size(p)} for p in outputs},
            "result": json.loads(json.dumps(result, allow_nan=False)),
            "seconds": round(time.monotonic() - started, 1),
            "peak_mb": round(memory.peak_mb),
            "versions": versions(),
            "finished": datetime.now().isoformat(sep=" ", timespec="minutes"),
        }
        atomic_write_json(self.path("run.json"), self.record)
        return self.record["stages"][name]["result"]

    def finished(
        self, name: str, settings: dict[str, Any], inputs: Iterable[Path], outputs: Iterable[Path]
    ) -> dict[str, Any] | None:
        """The record of stage `name` if it made these outputs, unchanged since, of the same settings and inputs."""
        saved = self.record["stages"].get(name)
        if not saved or not all(Path(p).exists() for p in inputs):
            return None
        same = all(saved[k] == v for k, v in self._wanted(settings, inputs).items())
        return saved if same and self._intact(saved["outputs"], outputs) else None

    def recorded(self, stage: str, path: Path, kind: str = "outputs") -> str | None:
        """sha256 of `path` as stage `stage` left it (`kind` "outputs") or read it ("inputs"); None if not on record."""
        self._take_in()
        about = self.record["stages"].get(stage, {}).get(kind, {}).get(self._name(path))
        return about["sha256"] if isinstance(about, dict) else about

    def _wanted(self, settings: dict[str, Any], inputs: Iterable[Path]) -> dict[str, Any]:
        """What a record must say to be of these settings and inputs, as it comes back from JSON."""
        inputs = {self._name(p): sha256(p) for p in inputs}
        return json.loads(json.dumps({"settings": settings, "inputs": inputs}))

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
    root = Path(os.environ.get("STAKE_RUN_ROOT", REPOSITORY / "runs"))
    other = model and model != PROFILES[profile].model
    return root / (f"{profile}-{Path(model).name}" if other else profile)


def _read_record(file: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    another = "choose another folder with --out, or move this one away"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        made_by, kept = record["format"], dict(record["profile"])
        dict(record["stages"])
    except (ValueError, KeyError, TypeError) as problem:
        what = f"{problem} is missing" if isinstance(problem, KeyError) else problem
        raise CourseError(f"{file} cannot be read ({what})", f"restore it from a copy, or {another}") from problem
    if made_by != FORMAT:
        raise CourseError(f"{file} has format {made_by}, this version of stakelib writes format {FORMAT}", another)
    differ = [
        f"{file}: {k} is {kept.get(k)!r}, you asked for {v!r}" for k, v in fresh["profile"].items() if kept.get(k) != v
    ]
    if differ:
        raise CourseError(differ, another)
    return record


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
    """Memory of this process that the system cannot drop (MB): RssAnon on Linux, unique set size elsewhere.

    Mapped weight files count as resident but can be dropped, so resident size misleads.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) / 1024
    import psutil

    return psutil.Process().memory_full_info().uss / 2**20


class PeakMemory:
    """Context manager that samples `anonymous_mb` five times a second; `.peak_mb` afterwards."""

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
