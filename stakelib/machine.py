"""What this computer is: cores, memory, disk, and which precision it multiplies fast. Measured, not guessed."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stakelib.run import CourseError

CONTROL_GROUPS = Path("/sys/fs/cgroup")  # Linux: what a container or a batch system may use
OUR_GROUPS = Path("/proc/self/cgroup")  # and which of these groups this process belongs to


def describe(folder: Path | None = None) -> dict[str, Any]:
    """System, processor, cores, memory (GB: total, free) and free disk (GB) at `folder`. Loads no heavy library.

    Cores and memory are those that this process may use: a container or a list of allowed cores may give it fewer.
    """
    total, free = memory_bytes()
    place = (folder or Path.cwd()).resolve()
    place = next(p for p in (place, *place.parents) if p.exists())
    return {
        "system": _system(),
        "processor": _processor(),
        "cores": cores(),
        "ram_gb": round(total / 2**30, 1),
        "ram_free_gb": round(free / 2**30, 1),
        "disk_free_gb": round(shutil.disk_usage(place).free / 2**30, 1),
        "python": platform.python_version(),
    }


def cores() -> int:
    """Logical cores that this process may use: its allowed cores, and a container's share of time in whole cores."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [quota / period for quota, period in _cpu_quotas() if quota > 0 and period > 0]
    return max(1, min([allowed, *map(int, shares)]))


def threads() -> int:
    """Threads to compute with: physical cores that this process may use, or fewer where OMP_NUM_THREADS says so.

    A value of OMP_NUM_THREADS that is no whole number above 0 counts as not set; of a list ("2,1") the first counts.
    """
    import psutil

    most = min(psutil.cpu_count(logical=False) or cores(), cores())
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return min(int(wanted), most) if wanted.isdecimal() and int(wanted) > 0 else most


def memory_bytes() -> tuple[int, int]:
    """(total, free) memory in bytes that this process may use; a container's limit counts where it is smaller."""
    import psutil

    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit, used in _memory_limits():
        total, free = min(total, limit), min(free, max(limit - used, 0))
    return total, free


def _groups(kind: str) -> list[Path]:
    """Folders of this process's control group of version 1 (`kind`: "cpu", "memory") or 2 (""), and of those above it.

    Inside a container its own group is the root, so the path that the host knows may not be there.
    """
    try:
        lines = [line.split(":", 2) for line in OUR_GROUPS.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError):
        return []
    folders: list[Path] = []
    for _, kinds, path in (line for line in lines if len(line) == 3):
        if kind in kinds.split(","):
            root = CONTROL_GROUPS / kind
            place = root / path.strip("/")
            folders += [folder for folder in (place, *place.parents) if folder.is_relative_to(root)]
    return folders


def _numbers(file: Path) -> list[int] | None:
    """The whole numbers in a control group's file, "max" being 0 (no limit); None where there is no such file."""
    try:
        return [0 if word == "max" else int(word) for word in file.read_text(encoding="utf-8").split()]
    except (OSError, ValueError):
        return None


def _cpu_quotas() -> list[tuple[int, int]]:
    """(quota, period) in microseconds of processor time, of each control group; a quota of 0 or -1 is no limit."""
    quotas = [_numbers(folder / "cpu.max") for folder in _groups("")]
    for folder in _groups("cpu"):
        pair = (_numbers(folder / "cpu.cfs_quota_us"), _numbers(folder / "cpu.cfs_period_us"))
        quotas.append([*(pair[0] or []), *(pair[1] or [])])
    return [(quota[0], quota[1]) for quota in quotas if quota and len(quota) == 2]


def _memory_limits() -> list[tuple[int, int]]:
    """(limit, used) in bytes of each control group with a limit; file caches that can be given back are not counted."""
    limits = []
    for kind, limit, used, inactive in (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        for folder in _groups(kind):
            most, now = _numbers(folder / limit), _numbers(folder / used)
            if most and now and most[0] > 0:
                limits.append((most[0], now[0] - _statistic(folder / "memory.stat", inactive)))
    return limits


def _statistic(file: Path, name: str) -> int:
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
        return next((int(line[1]) for line in lines if line[:1] == [name]), 0)
    except (OSError, ValueError, IndexError):
        return 0


def is_apple_silicon() -> bool:
    """True on an M-series Mac, where MLX can use the graphics cores."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def metal() -> tuple[bool, str]:
    """(can MLX use this machine's graphics cores, why)."""
    if not is_apple_silicon():
        return False, f"this is {platform.system()} on {platform.machine()}, no Mac with Apple silicon"
    if not find_spec("mlx"):
        return False, "MLX is not installed"
    from mlx.core import metal as graphics

    return graphics.is_available(), "MLX was asked"


def mlx() -> tuple[str, str]:
    """("metal", "cpu" or "none", why): what MLX can do here. On a processor it is slow: enough for a tiny model."""
    if not (find_spec("mlx") and find_spec("mlx_lm")):
        return "none", f"MLX is not installed; its packages are made for Macs and for newer Linux, this is {_system()}"
    try:
        fast, why = metal()
        import mlx.core
    except (ImportError, OSError) as problem:  # a processor or a C library that is too old for the package
        return "none", f"MLX is installed and does not load: {problem}"
    return ("metal", why) if fast else ("cpu", f"{why}; MLX {mlx.core.__version__} runs on the processor")


def require(*, ram_gb: float, disk_gb: float, folder: Path) -> None:
    """Refuse early: raise CourseError if free memory or disk (GB) is below what the work ahead needs."""
    here = describe(folder)
    problems = []
    if here["ram_free_gb"] < ram_gb:
        problems.append(f"memory: {here['ram_free_gb']} GB free, {ram_gb} GB needed")
    if here["disk_free_gb"] < disk_gb:
        problems.append(f"disk at {folder}: {here['disk_free_gb']} GB free, {disk_gb} GB needed")
    if problems:
        raise CourseError(problems, "close other programs or free disk space, or choose a smaller model with --model")


@cache
def precision() -> tuple[str, str]:
    """("bfloat16" | "float32", the reason), from a short matmul in both.

    On a CPU without bf16 units a bf16 matmul is tens to hundreds of times slower than fp32 (pytorch#146508), so the
    measured speed decides, not the name of the processor.
    """
    full, half = matmul_gflops("float32"), matmul_gflops("bfloat16")
    if half > 1.5 * full:
        times = f"{half / full:.1f}x as fast as fp32"
        return "bfloat16", f"this machine multiplies bf16 {times} ({half:.0f} against {full:.0f} GFLOP/s)"
    return "float32", f"bf16 brings nothing here ({half:.0f} against {full:.0f} GFLOP/s for fp32)"


def matmul_gflops(dtype: str, size: int = 768, seconds: float = 0.3) -> float:
    """Speed of a square matrix product on this CPU (10^9 floating-point operations per second; 2 n^3 each).

    The fastest of those done within `seconds`: other programs can only slow one down.
    """
    import torch

    a = torch.ones(size, size).to(getattr(torch, dtype))  # a probe must not move a training's random numbers
    a @ a
    fastest, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or fastest == float("inf"):
        a @ a
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest / 1e9


def _system() -> str:
    return f"{platform.system()} {platform.machine()}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
