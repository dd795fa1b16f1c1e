"""What logd keeps on disk.

``<root>/<container ID>/`` has the driver's files and ``log.json``, what `Meta` says; ``<run dir>/<container ID>/<run>-<stream>`` are
the windows of streams being read (see `window`). A directory that is being deleted is called ``.trash-…``. No database: a log is
found by its container's ID and goes with one directory.
"""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import msgspec

from .model import ContainerID, is_container_id

_TRASH = ".trash-"


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """How a log is kept. ``run`` is the latest, ``tty`` whether that one has a terminal."""

    driver: str = "json-file"
    options: dict[str, str] = {}
    tty: bool = False
    run: int = 0
    created_ns: int = 0


class Store:
    """The directories of all logs."""

    def __init__(self, root: Path, run: Path) -> None:
        self._root = root
        self._run = run
        self._numbers = itertools.count()

    def directory(self, container: ContainerID) -> Path:
        return self._root / container

    def containers(self) -> list[ContainerID]:
        """Whose logs are here. What can't be a container's directory isn't ours: ``lost+found`` of a file system of its own."""
        return [ContainerID(entry.name) for entry in os.scandir(self._root) if entry.is_dir() and is_container_id(entry.name)]

    def load(self, container: ContainerID) -> Meta | None:
        """None: there's no log. A log whose description was lost in a crash of the host is taken for an ordinary one."""
        try:
            return msgspec.json.decode((self.directory(container) / "log.json").read_bytes(), type=Meta)
        except (FileNotFoundError, msgspec.DecodeError):
            try:
                stat = self.directory(container).stat()
            except FileNotFoundError:
                return None
            return Meta(created_ns=stat.st_mtime_ns)

    def save(self, container: ContainerID, meta: Meta) -> None:
        """Whole or not at all. Not synced: without it a log is still read, and this is on the path of every start."""
        directory = str(self.directory(container))
        try:
            os.mkdir(directory, 0o710)
        except FileExistsError:
            pass
        fresh = f"{directory}/.log.json"
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, msgspec.json.encode(meta))
        finally:
            os.close(fd)
        os.rename(fresh, f"{directory}/log.json")

    def window(self, container: ContainerID, run: int, stream: str) -> Path:
        directory = self._run / container
        directory.mkdir(mode=0o700, exist_ok=True)
        return directory / f"{run}-{stream}"

    def windows(self, container: ContainerID) -> list[tuple[int, str, Path]]:
        """Run, stream and path of the windows that are there."""
        found: list[tuple[int, str, Path]] = []
        try:
            entries = sorted(os.listdir(self._run / container))
        except FileNotFoundError:
            return []
        for name in entries:
            run, _, stream = name.partition("-")
            if run.isdigit() and stream in ("stdout", "stderr"):
                found.append((int(run), stream, self._run / container / name))
        return found

    def drop_windows(self, container: ContainerID) -> None:
        """The directory of a container's windows, if none is left."""
        try:
            (self._run / container).rmdir()
        except OSError:
            pass

    def discard(self, container: ContainerID) -> Path:
        """Take the log away at once; `delete` what is returned, which may take long."""
        shutil.rmtree(self._run / container, ignore_errors=True)
        trash = self._root / f"{_TRASH}{container}-{os.getpid()}-{next(self._numbers)}"
        try:
            self.directory(container).rename(trash)
        except FileNotFoundError:
            pass
        return trash

    def leftovers(self) -> list[Path]:
        """What an earlier process didn't come to delete."""
        return [Path(entry.path) for entry in os.scandir(self._root) if entry.name.startswith(_TRASH)]

    @staticmethod
    def delete(trash: Path) -> None:
        """Blocking."""
        shutil.rmtree(trash, ignore_errors=True)
