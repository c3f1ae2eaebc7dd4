"""What this computer is: refusals name figures, and the precision follows the measured speed, not a name."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stakelib import machine
from stakelib.run import CourseError, PeakMemory, anonymous_mb


def test_describe_measures_this_machine(tmp_path: Path) -> None:
    here = machine.describe(tmp_path / "not" / "made" / "yet")
    assert 1 <= here["cores"] <= os.cpu_count()
    assert 0 < here["ram_free_gb"] <= here["ram_gb"]
    assert here["disk_free_gb"] == pytest.approx(shutil.disk_usage(tmp_path).free / 2**30, abs=2)
    assert here["python"] == ".".join(map(str, sys.version_info[:3]))
    assert not (tmp_path / "not").exists()


class Groups:
    """A computer of 16 cores (8 physical) and 32 GiB, 20 of them free, whose control groups are files of the test."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import psutil

        self.root, self.which = place / "cgroup", place / "self"
        memory = SimpleNamespace(total=32 * 2**30, available=20 * 2**30)
        monkeypatch.setattr(machine, "CONTROL_GROUPS", self.root)
        monkeypatch.setattr(machine, "OUR_GROUPS", self.which)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
        monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 16 if logical else 8)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def write(self, lines: str, files: dict[str, str]) -> None:
        self.which.write_text(lines, encoding="utf-8")
        for name, text in files.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text(text, encoding="utf-8")


@pytest.fixture()
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    return Groups(tmp_path, monkeypatch)


V1 = "5:memory:/docker/a1\n4:cpu,cpuacct:/docker/a1\n0::/\n"


@pytest.mark.parametrize(
    ("lines", "files", "cores", "threads"),
    [
        ("", {}, 16, 8),  # no control groups, as on a Mac or on Windows
        ("0::/\n", {"cpu.max": "max 100000\n"}, 16, 8),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3, 3),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1, 1),  # half a core
        ("0::/\n", {"cpu.max": "1200000 100000\n"}, 12, 8),
        ("0::/job/task\n", {"job/cpu.max": "200000 100000\n", "job/task/cpu.max": "max 100000\n"}, 2, 2),
        ("0::/not/visible\n", {"cpu.max": "200000 100000\n"}, 2, 2),
        (V1, {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4, 4),
        (V1, {"cpu/docker/a1/cpu.cfs_quota_us": "50000\n", "cpu/docker/a1/cpu.cfs_period_us": "50000\n"}, 1, 1),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16, 8),
        ("0::/\n", {"cpu.max": "nonsense"}, 16, 8),
        ("torn", {"cpu.max": "300000 100000\n"}, 16, 8),
    ],
)
def test_cores_follow_a_containers_share(
    lines: str, files: dict[str, str], cores: int, threads: int, groups: Groups
) -> None:
    groups.write(lines, files)
    assert (machine.describe()["cores"], machine.threads()) == (cores, threads)


@pytest.mark.parametrize(("allowed", "threads"), [(1, 1), (3, 3), (16, 8)])
def test_threads_follow_the_allowed_cores(allowed: int, threads: int, groups: Groups, monkeypatch: Any) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
    assert (machine.cores(), machine.threads()) == (allowed, threads)


@pytest.mark.parametrize(
    ("value", "threads"),
    [("2", 2), (" 2", 2), ("2,1", 2), ("8", 8), ("64", 8), ("99999999999999999999", 8)]
    + [(bad, 8) for bad in ("0", "-1", "auto", "", " ", ",", "2.5", "two", "²", "0,2", "1e1")],
)
def test_a_bad_number_of_threads_is_passed_over(value: str, threads: int, groups: Groups, monkeypatch: Any) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert machine.threads() == threads


GIB = 2**30


@pytest.mark.parametrize(
    ("lines", "files", "total", "free"),
    [
        ("", {}, 32, 20),
        ("0::/\n", {"memory.max": "max\n", "memory.current": "5\n"}, 32, 20),
        ("0::/\n", {"memory.max": f"{8 * GIB}\n", "memory.current": f"{3 * GIB}\n"}, 8, 5),
        (
            "0::/\n",
            {
                "memory.max": f"{8 * GIB}\n",
                "memory.current": f"{7 * GIB}\n",
                "memory.stat": f"anon 5\ninactive_file {4 * GIB}\n",
            },
            8,
            5,
        ),
        ("0::/\n", {"memory.max": f"{2 * GIB}\n", "memory.current": f"{3 * GIB}\n"}, 2, 0),
        ("0::/\n", {"memory.max": f"{30 * GIB}\n", "memory.current": f"{1 * GIB}\n"}, 30, 20),
        (
            V1,
            {
                "memory/memory.limit_in_bytes": f"{6 * GIB}\n",
                "memory/memory.usage_in_bytes": f"{3 * GIB}\n",
                "memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB}\n",
            },
            6,
            4,
        ),
        (
            V1,  # no limit, as version 1 writes it
            {"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": "5\n"},
            32,
            20,
        ),
    ],
)
def test_memory_follows_a_containers_limit(
    lines: str, files: dict[str, str], total: int, free: int, groups: Groups
) -> None:
    groups.write(lines, files)
    here = machine.describe()
    assert (here["ram_gb"], here["ram_free_gb"]) == (total, free)


@pytest.fixture()
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 3.5 GB of memory and 2.25 GB of disk left."""
    monkeypatch.setattr(machine, "describe", lambda folder=None: {"ram_free_gb": 3.5, "disk_free_gb": 2.25})


@pytest.mark.parametrize(
    ("ram", "disk", "problems"),
    [
        (3.5, 2.25, []),
        (3.6, 2.0, ["memory: 3.5 GB free, 3.6 GB needed"]),
        (1.0, 2.3, ["disk at here: 2.25 GB free, 2.3 GB needed"]),
        (8.0, 9.0, ["memory: 3.5 GB free, 8.0 GB needed", "disk at here: 2.25 GB free, 9.0 GB needed"]),
    ],
)
def test_require_refuses_with_both_figures(small: None, ram: float, disk: float, problems: list[str]) -> None:
    found: list[str] = []
    try:
        machine.require(ram_gb=ram, disk_gb=disk, folder=Path("here"))
    except CourseError as error:
        found = error.problems
        assert "--model" in error.next_action
    assert found == problems


@pytest.fixture()
def fresh_precision() -> Iterator[Any]:
    """`precision` without what it remembered, before and after."""
    machine.precision.cache_clear()
    yield machine.precision
    machine.precision.cache_clear()


@pytest.mark.parametrize(
    ("half", "kind"), [(610.0, "bfloat16"), (301.0, "bfloat16"), (299.0, "float32"), (3.0, "float32")]
)
def test_precision_follows_the_speed(half: float, kind: str, fresh_precision: Any, monkeypatch: Any) -> None:
    asked: list[str] = []

    def gflops(dtype: str) -> float:
        asked.append(dtype)
        return {"float32": 200.0, "bfloat16": half}[dtype]

    monkeypatch.setattr(machine, "matmul_gflops", gflops)
    chosen, why = fresh_precision()
    assert chosen == kind
    assert {"200", f"{half:.0f}"} <= set(re.findall(r"\d+(?= GFLOP| against)|(?<=against )\d+", why))
    assert fresh_precision() == (chosen, why)
    assert sorted(asked) == ["bfloat16", "float32"]  # measured once, then remembered


class Clock:
    """Its time passes only while matrices are multiplied: each product takes the next of `costs` (s)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, costs: Iterable[float]) -> None:
        clock, self.now, self.products = self, 0.0, []

        class Matrix:
            def to(self, dtype: torch.dtype) -> Matrix:
                self.dtype = dtype
                return self

            def __matmul__(self, other: Matrix) -> None:
                clock.products.append(other.dtype)
                clock.now += next(costs)

        costs = iter(costs)
        monkeypatch.setattr(machine, "time", type(time)("clock"))
        monkeypatch.setattr(machine.time, "perf_counter", lambda: self.now, raising=False)
        monkeypatch.setattr(torch, "ones", lambda *shape: Matrix())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gflops_are_two_n_cubed_per_second_of_the_fastest(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, [9.0, 0.25, 0.125, 0.25])  # the first comes before the clock starts
    assert machine.matmul_gflops(dtype, size=10, seconds=0.5) == pytest.approx(2 * 10**3 / 0.125 / 1e9)
    assert clock.products == [getattr(torch, dtype)] * 4


def test_a_product_slower_than_the_time_given_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, [0.5, 0.5])
    assert machine.matmul_gflops("bfloat16", size=10, seconds=0.3) == pytest.approx(2 * 10**3 / 0.5 / 1e9)
    assert len(clock.products) == 2


def test_other_programs_do_not_change_the_precision(fresh_precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 is 2.5 times as fast here; while it was measured, most products waited for another program."""
    full, half = [0.005] * 61, [0.002, *[0.012, 0.009, 0.002] * 15]
    Clock(monkeypatch, [*full, *half])
    assert fresh_precision()[0] == "bfloat16"


def test_the_kernel_measures_something(fresh_precision: Any) -> None:
    speed = machine.matmul_gflops("float32", size=256, seconds=0.05)
    assert 0.05 < speed < 1e5
    kind, why = fresh_precision()
    assert kind in ("float32", "bfloat16")
    assert "GFLOP/s" in why


def test_apple_silicon_is_a_mac_with_an_m_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    for system, chip, expected in (("darwin", "arm64", True), ("darwin", "x86_64", False), ("linux", "arm64", False)):
        monkeypatch.setattr(machine.sys, "platform", system)
        monkeypatch.setattr(machine.platform, "machine", lambda chip=chip: chip)
        assert machine.is_apple_silicon() is expected


# ------------------------------------------------------------------------------------------------- memory of helpers

HOLD = "import sys; held = bytearray(b'x') * (300 << 20); print('held', flush=True); sys.stdin.read()"


def test_memory_of_a_child_and_of_its_child_is_counted_while_they_live() -> None:
    """As MLX's process and the GGUF converter hold it; the grandchild is what a launcher of Windows makes of each."""
    inner = [sys.executable, "-c", HOLD]
    outer = f"import subprocess, sys; sys.exit(subprocess.run({inner!r}).returncode)"
    before = anonymous_mb()
    for code in (HOLD, outer):
        with PeakMemory() as memory:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
                assert process.stdout.readline().strip() == b"held"
                assert anonymous_mb() > before + 280
                time.sleep(0.5)
        assert process.returncode == 0
        assert before + 280 < memory.peak_mb < before + 600
        assert anonymous_mb() < before + 150  # it has ended, and is counted no more


def test_processes_that_come_and_go_are_no_error() -> None:
    with PeakMemory() as memory:
        for _ in range(20):
            subprocess.run([sys.executable, "-S", "-c", "pass"], check=True)
            assert anonymous_mb() > 0
    assert memory.peak_mb > 0


def test_a_process_that_vanishes_while_it_is_looked_at_counts_nothing() -> None:
    import psutil

    from stakelib.run import _anonymous_mb

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        seen = psutil.Process(process.pid)
        assert _anonymous_mb(seen) > 0
    assert _anonymous_mb(seen) == 0
