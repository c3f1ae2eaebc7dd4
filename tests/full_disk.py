"""A disk that is full from the n-th write, fsync, rename, mkdir or link in a folder on, until there is room again."""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest


class FullDisk:
    """Counts what is done to the disk under `folder`; from number `full_at` on, nothing that takes room works.

    A write is cut short first, as systems do, and fails when it is tried again. A rename fails once: on a real disk it
    needs a new block of names only seldom, and the way back must be open.
    """

    def __init__(self, folder: Path, full_at: int | None = None) -> None:
        self.folder, self.full_at, self.count, self.failed = os.path.abspath(folder), full_at, 0, ""

    def step(self, kind: str, path: Any, once: bool = False) -> None:
        """Count one operation; raise if the disk is full."""
        if not self.is_ours(path):
            return
        self.count += 1
        if self.full_at is not None and (self.count == self.full_at if once else self.count >= self.full_at):
            self.failed = self.failed or f"{kind} {os.path.relpath(path, self.folder)}"
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def is_ours(self, path: Any) -> bool:
        if not isinstance(path, str | os.PathLike):
            return False
        path = os.path.abspath(os.fspath(path))
        return path == self.folder or path.startswith(self.folder + os.sep)

    def plant(self, patch: pytest.MonkeyPatch) -> None:
        """Put the disk in place of the system's functions, until `patch` is undone."""
        disk, real_open, real_os_open, numbers = self, io.open, os.open, {}

        class Raw(io.FileIO):
            def __init__(self, file: Any, mode: str, existed: bool) -> None:
                if not existed:
                    disk.step("create", file)
                super().__init__(file, mode)
                numbers[self.fileno()] = file

            def write(self, data: Any) -> int | None:
                disk_full = disk.full_at is not None and disk.count + 1 == disk.full_at
                if disk_full and len(data) > 1:
                    disk.count += 1
                    disk.failed = f"short write {os.path.relpath(self.name, disk.folder)}"
                    return super().write(memoryview(data).cast("B")[: len(data) // 2])
                disk.step("write", self.name)
                return super().write(data)

        def opened(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wax+") or not disk.is_ours(file):
                return real_open(file, mode, buffering, *args, **kwargs)
            raw = Raw(file, mode.replace("b", "").replace("t", ""), os.path.exists(file))
            if buffering == 0:
                return raw
            binary = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
            return binary if "b" in mode else io.TextIOWrapper(binary, *args, **kwargs)

        def os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & os.O_CREAT and not (isinstance(path, str | os.PathLike) and os.path.exists(path)):
                disk.step("create", path)
            number = real_os_open(path, flags, *args, **kwargs)
            numbers[number] = path
            return number

        def counted(kind: str, function: Any, place: int, once: bool = False) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                disk.step(kind, args[place], once)
                return function(*args, **kwargs)

            return call

        def fsync(number: int) -> None:
            disk.step("fsync", numbers.get(number, ""))  # not done: a test does not outlive a power cut

        def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
            if not os.path.exists(path):
                disk.step("mkdir", path)
            real_mkdir(path, *args, **kwargs)

        real_mkdir = os.mkdir
        patch.setattr(io, "open", opened)
        patch.setattr(builtins, "open", opened)
        patch.setattr(os, "open", os_open)
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "mkdir", mkdir)
        patch.setattr(os, "replace", counted("rename", os.replace, 1, once=True))
        patch.setattr(os, "rename", counted("rename", os.rename, 1, once=True))
        patch.setattr(os, "link", counted("link", os.link, 1))
        patch.setattr(shutil, "_USE_CP_SENDFILE", False, raising=False)  # copies go through `write` here
        patch.setattr(shutil, "_HAS_FCOPYFILE", False, raising=False)
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**8, 10**8))
