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


def describe(folder: Path | None = None) -> dict[str, Any]:
    """System, processor, cores, memory (GB: total, free) and free disk (GB) at `folder`. Loads no heavy library."""
    import psutil

    memory, place = psutil.virtual_memory(), (folder or Path.cwd()).resolve()
    place = next(p for p in (place, *place.parents) if p.exists())
    return {
        "system": _system(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_gb": round(memory.total / 2**30, 1),
        "ram_free_gb": round(memory.available / 2**30, 1),
        "disk_free_gb": round(shutil.disk_usage(place).free / 2**30, 1),
        "python": platform.python_version(),
    }


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
