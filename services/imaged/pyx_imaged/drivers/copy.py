"""Snapshots by copying: for hosts where overlayfs can't be mounted on the data directory (itself an overlay, or without xattrs).

Each container gets a whole copy of the image, its layers merged. File systems that can share blocks (FICLONE: btrfs, xfs) do.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path

from pyx_bus.contract.imaged import Mount

from .. import kernel


class Copy:
    name = "copy"
    instant = False
    overlay = False

    def probe(self, scratch: Path) -> None:
        (scratch / "source").write_text("x")
        with open(scratch / "source", "rb") as source, open(scratch / "target", "wb") as target:
            kernel.copy_data(source.fileno(), target.fileno(), 1)

    def prepare(self, directory: Path, layers: Sequence[Path]) -> None:
        root = directory / "fs"
        os.mkdir(root, 0o755)
        kernel.give_to_root(root)
        for layer in layers:
            _Merge(str(layer), str(root)).run()

    def mounts(self, directory: Path, layers: Sequence[Path]) -> list[Mount]:
        return [Mount(type="bind", source=str(directory / "fs"), options=["rbind", "rw"])]

    def writable(self, directory: Path) -> Path:
        return directory / "fs"


class _Merge:
    """One layer put on top of what's in ``target``, as overlayfs would show it. Nobody else writes to either."""

    def __init__(self, source: str, target: str) -> None:
        self._source, self._target = source, target
        self._linked: dict[tuple[int, int], str] = {}  # first copy of each file that has several names

    def run(self) -> None:
        self._directory("", os.lstat(self._source))

    def _directory(self, path: str, status: os.stat_result) -> None:
        source, target = self._source + path, self._target + path
        with os.scandir(source) as entries:
            for entry in entries:
                below = f"{path}/{entry.name}"
                found = entry.stat(follow_symlinks=False)
                if kernel.is_whiteout(found):
                    self._remove(self._target + below)
                elif stat.S_ISDIR(found.st_mode):
                    self._make_directory(below)
                    self._directory(below, found)
                else:
                    self._other(below, found)
        self._attributes(source, target, status)

    def _make_directory(self, path: str) -> None:
        target = self._target + path
        try:
            status = os.lstat(target)
        except FileNotFoundError:
            pass
        else:
            if stat.S_ISDIR(status.st_mode) and not kernel.is_opaque(self._source + path):
                return
            self._remove(target)
        os.mkdir(target, 0o700)

    def _other(self, path: str, status: os.stat_result) -> None:
        source, target = self._source + path, self._target + path
        self._remove(target)
        identity = (status.st_dev, status.st_ino)
        if status.st_nlink > 1:
            if identity in self._linked:
                os.link(self._linked[identity], target, follow_symlinks=False)
                return
            self._linked[identity] = target
        if stat.S_ISREG(status.st_mode):
            flags = os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(source, os.O_RDONLY | flags)
            try:
                copy = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o600)
                try:
                    kernel.copy_data(fd, copy, status.st_size)
                finally:
                    os.close(copy)
            finally:
                os.close(fd)
        elif stat.S_ISLNK(status.st_mode):
            os.symlink(os.readlink(source), target)
        else:
            os.mknod(target, status.st_mode, status.st_rdev)
        self._attributes(source, target, status)

    def _attributes(self, source: str, target: str, status: os.stat_result) -> None:
        os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode):
            os.chmod(target, stat.S_IMODE(status.st_mode))
        kernel.copy_xattrs(source, target)
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)

    @staticmethod
    def _remove(path: str) -> None:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except IsADirectoryError:
            shutil.rmtree(path)
