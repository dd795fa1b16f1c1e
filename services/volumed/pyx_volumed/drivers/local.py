"""The ``local`` driver: a directory on the host, or anything mount(2) can mount there.

``<root>/volumes/<name>/`` has ``_data``, the files, and for a moment one of

- ``.unsettled``: the volume isn't recorded yet, or its record is about to go. At the start, with no record, it's deleted.
- ``.fill``: being filled. At the start it's deleted.
- ``.ready``: a whole copy, its entries being moved into ``_data``. At the start the rest is moved too; what the volume has got
  meanwhile stays.

The options are Docker's: ``type``, ``device`` and ``o`` as of mount(8); with ``o=bind`` the device is a directory of the host.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Collection
from pathlib import Path

from pyx_bus.errors import FailedPrecondition, InvalidArgument, Unimplemented

from .. import kernel
from ..copyup import TreeCopy
from ..model import VolumeRecord

_UNSETTLED, _FILL, _READY, _TRASH = ".unsettled", ".fill", ".ready", ".trash-"

_DELETE_DEPTH = 100
"""Directories open at once, and calls on Python's stack."""


class Local:
    """Volumes under ``root``/volumes."""

    def __init__(self, root: Path) -> None:
        self._volumes = root / "volumes"
        self._volumes.mkdir(mode=0o701, exist_ok=True)

    def check(self, options: dict[str, str]) -> None:
        for option in options:
            if option == "size":
                raise Unimplemented('option "size" (a quota) of the local volume driver isn\'t implemented')
            if option not in ("type", "device", "o"):
                raise InvalidArgument(f'invalid option: "{option}"', hint="the local volume driver knows type, device and o")
        flags = options.get("o", "").split(",")
        if options and not options.get("device"):
            raise InvalidArgument('missing required option: "device"')
        if options and not options.get("type") and not {"bind", "rbind"} & set(flags):
            raise InvalidArgument('missing required option: "type"')
        if any("\0" in value for value in options.values()):
            raise InvalidArgument("a volume's option contains a null character")

    def mountpoint(self, name: str) -> str:
        return str(self._volumes / name / "_data")

    def prepare(self, volume: VolumeRecord) -> None:
        directory = self._volumes / volume.name
        try:
            directory.mkdir(mode=0o701)
        except FileExistsError:
            self.delete(volume.name)
            directory.mkdir(mode=0o701)
        (directory / _UNSETTLED).touch(0o600)
        self._make_data(directory)
        _sync(directory)
        _sync(self._volumes)

    @staticmethod
    def _make_data(directory: Path) -> None:
        """What the containers see: root's, whoever we are and whatever the umask."""
        data = directory / "_data"
        data.mkdir()
        data.chmod(0o755)
        if (os.geteuid(), os.getegid()) != (0, 0):
            os.chown(data, 0, 0)

    def settle(self, name: str) -> None:
        (self._volumes / name / _UNSETTLED).unlink(missing_ok=True)

    def withdraw(self, name: str) -> None:
        directory = self._volumes / name
        if directory.is_dir():
            (directory / _UNSETTLED).touch(0o600)
            _sync(directory)

    def delete(self, name: str) -> None:
        directory = self._volumes / name
        kernel.unmount(str(directory / "_data"))  # what's mounted there isn't ours to delete
        trash = self._volumes / f"{_TRASH}{uuid.uuid4().hex}"
        try:
            directory.rename(trash)
        except FileNotFoundError:
            return
        _delete_tree(trash)

    def mount(self, volume: VolumeRecord) -> str:
        mountpoint = self.mountpoint(volume.name)
        if volume.options and not kernel.is_mounted(mountpoint):
            options = [option for option in volume.options.get("o", "").split(",") if option]
            device = volume.options["device"]
            try:
                kernel.mount(device, mountpoint, volume.options.get("type", ""), options)
            except OSError as error:
                raise FailedPrecondition(
                    f'cannot mount volume "{volume.name}" (device "{device}"): {error.strerror}',
                    details={"errno": errno.errorcode.get(error.errno or 0, "")},
                ) from error
        return mountpoint

    def unmount(self, volume: VolumeRecord) -> None:
        if volume.options:
            kernel.unmount(self.mountpoint(volume.name))

    def fill(self, volume: VolumeRecord, source_fd: int) -> bool:
        data = Path(self.mountpoint(volume.name))
        if any(data.iterdir()):
            return False
        if volume.options:
            self._fill_mounted(data, source_fd)
            return True
        directory = data.parent
        fill = directory / _FILL
        _delete_tree(fill)
        fill.mkdir(mode=0o700)
        fd = os.open(fill, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            copy = TreeCopy(source_fd, fd)
            copy.run()
            if copy.files:
                kernel.sync_filesystem(fd)  # else a power cut could leave the names without their content
        except BaseException:
            _delete_tree(fill)
            raise
        finally:
            os.close(fd)
        fill.rename(directory / _READY)
        _sync(directory)
        self._move_ready(directory)
        return True

    @staticmethod
    def _fill_mounted(data: Path, source_fd: int) -> None:
        """Into a file system of its own, so without the directory beside it; undone on a failure, though not after a kill."""
        fd = os.open(data, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            TreeCopy(source_fd, fd).run()
        except BaseException:
            for entry in list(data.iterdir()):
                _delete_tree(entry)
            raise
        finally:
            os.close(fd)

    @staticmethod
    def _move_ready(directory: Path) -> None:
        """Into place, entry by entry: the volume may be mounted in a container already, so the directory itself must stay."""
        ready, data = directory / _READY, directory / "_data"
        for entry in list(ready.iterdir()):
            target = data / entry.name
            if not os.path.lexists(target):
                # moving a directory changes its "..", so it must be writable for us: root is exempt
                entry.rename(target)
        info = ready.stat()
        os.chown(data, info.st_uid, info.st_gid)
        os.chmod(data, stat.S_IMODE(info.st_mode))
        for name in os.listxattr(ready):
            try:
                os.setxattr(data, name, os.getxattr(ready, name))
            except OSError:  # a kind that only the copy's own place has
                continue
        os.utime(data, ns=(info.st_atime_ns, info.st_mtime_ns))
        _delete_tree(ready)

    def recover(self, recorded: Collection[VolumeRecord]) -> list[str]:
        known = {volume.name for volume in recorded}
        unknown: list[str] = []
        for directory in list(self._volumes.iterdir()):
            name = directory.name
            if name.startswith(_TRASH):
                with contextlib.suppress(OSError):  # it was told when it was removed; the other volumes are worth more
                    _delete_tree(directory)
            elif name not in known and (directory / _UNSETTLED).exists():
                self.delete(name)
            elif name in known or (directory / "_data").is_dir():
                _delete_tree(directory / _FILL)
                if (directory / _READY).is_dir():
                    self._move_ready(directory)
                self.settle(name)
                if name not in known:
                    unknown.append(name)
            elif directory.is_dir() and not any(directory.iterdir()):
                directory.rmdir()  # made so far that not even its mark was; with anything in it, it's somebody else's
        for name in known:  # somebody deleted it by hand: whoever refers to it finds it empty
            if not (self._volumes / name / "_data").is_dir():
                (self._volumes / name).mkdir(mode=0o701, exist_ok=True)
                self._make_data(self._volumes / name)
        return unknown


def _delete_tree(path: Path) -> None:
    """``path`` and all below, never across a mount; nothing there is fine. Goes on past failures, and raises the first one.

    Containers can nest directories without end: below some depth they're moved up, beside ``path``, and gone through later.
    """
    failures: list[OSError] = []
    waiting = [path]
    while waiting:
        top = waiting.pop()
        try:
            if top.is_symlink() or not top.is_dir():
                top.unlink()
                continue
            _empty(_open_directory(top), 0, path.parent, waiting, failures)
            top.rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def _empty(directory: int, depth: int, aside: Path, waiting: list[Path], failures: list[OSError]) -> None:
    """Delete what's in ``directory``, a descriptor, and close it."""
    try:
        with os.scandir(directory) as found:
            entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in found]
        for name, is_directory in entries:
            try:
                if not is_directory:
                    os.unlink(name, dir_fd=directory)
                elif not _remove_empty(name, directory):
                    if depth >= _DELETE_DEPTH:
                        waiting.append(aside / f"{_TRASH}{uuid.uuid4().hex}")
                        os.rename(name, waiting[-1], src_dir_fd=directory)
                    else:
                        _empty(_open_directory(name, directory), depth + 1, aside, waiting, failures)
                        os.rmdir(name, dir_fd=directory)
            except OSError as error:
                failures.append(error)
    finally:
        os.close(directory)


def _open_directory(path: str | Path, parent: int | None = None) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)


def _remove_empty(name: str, parent: int) -> bool:
    """Whether it was empty, and so is gone. Raises OSError, EBUSY if something is mounted there: that isn't ours to delete."""
    try:
        os.rmdir(name, dir_fd=parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
