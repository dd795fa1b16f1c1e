"""Filling a new volume with what the image has where it will be mounted.

The image's side is hostile: it's opened inside its root (`kernel.open_in_root`), then walked by descriptors, never following a link.
Kept: owner, mode, times, extended attributes, hard links among what's copied, holes, devices, pipes, sockets. The volume's own
directory gets what the image's has.
"""

from __future__ import annotations

import errno
import os
import stat

from pyx_bus.errors import FailedPrecondition

from .kernel import open_in_root

_DEPTH_MAX = 200
"""Each level holds two descriptors, of the 1024 a process usually may have."""

_BLOCK = 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_source(root_fd: int, target: str) -> int | None:
    """The image's directory at ``target``; None if there's none (nothing there, a file, a link that leads nowhere)."""
    try:
        return open_in_root(root_fd, target, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


class TreeCopy:
    """Copies the directory ``source`` into the empty directory ``destination`` (both descriptors stay the caller's). Blocking.

    ``files`` counts the regular files copied. On an error the destination is left as it is, for the caller to delete.
    """

    def __init__(self, source: int, destination: int) -> None:
        self.files = 0
        self._source = source
        self._destination = destination
        self._links: dict[tuple[int, int], str] = {}

    def run(self) -> None:
        self._directory(self._source, self._destination, "", 0)

    def _directory(self, source: int, destination: int, path: str, depth: int) -> None:
        if depth > _DEPTH_MAX:
            raise FailedPrecondition(f'directories nested too deeply to copy: "{path[:64]}…"')
        with os.scandir(source) as entries:
            names = [entry.name for entry in entries]
        for name in names:
            self._entry(source, destination, name, f"{path}/{name}" if path else name, depth)
        info = os.fstat(source)
        os.fchown(destination, info.st_uid, info.st_gid)
        _copy_xattrs(source, destination)
        os.fchmod(destination, stat.S_IMODE(info.st_mode))
        os.utime(destination, ns=(info.st_atime_ns, info.st_mtime_ns))

    def _entry(self, source: int, destination: int, name: str, path: str, depth: int) -> None:
        info = os.stat(name, dir_fd=source, follow_symlinks=False)
        mode = info.st_mode
        if stat.S_ISDIR(mode):
            os.mkdir(name, 0o700, dir_fd=destination)
            inner_source = os.open(name, _DIRECTORY, dir_fd=source)
            try:
                inner_destination = os.open(name, _DIRECTORY, dir_fd=destination)
                try:
                    self._directory(inner_source, inner_destination, path, depth + 1)
                finally:
                    os.close(inner_destination)
            finally:
                os.close(inner_source)
            return
        identity = (info.st_dev, info.st_ino)
        if info.st_nlink > 1 and identity in self._links:
            os.link(self._links[identity], name, src_dir_fd=self._destination, dst_dir_fd=destination, follow_symlinks=False)
            return
        if stat.S_ISREG(mode):
            self._file(source, destination, name)
        elif stat.S_ISLNK(mode):
            os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=destination)
            os.chown(name, info.st_uid, info.st_gid, dir_fd=destination, follow_symlinks=False)
        else:
            os.mknod(name, mode, info.st_rdev, dir_fd=destination)
            os.chown(name, info.st_uid, info.st_gid, dir_fd=destination, follow_symlinks=False)
            os.chmod(f"/proc/self/fd/{destination}/{name}", stat.S_IMODE(mode))
        os.utime(name, ns=(info.st_atime_ns, info.st_mtime_ns), dir_fd=destination, follow_symlinks=False)
        if info.st_nlink > 1:
            self._links[identity] = path

    def _file(self, source: int, destination: int, name: str) -> None:
        # O_NONBLOCK: should a pipe have taken the name since it was looked at, opening it mustn't wait for ever
        from_fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=source)
        try:
            info = os.fstat(from_fd)
            if not stat.S_ISREG(info.st_mode):
                raise FailedPrecondition(f'"{name}" changed while it was copied')
            to_fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=destination)
            try:
                _copy_data(from_fd, to_fd, info.st_size)
                os.fchown(to_fd, info.st_uid, info.st_gid)
                _copy_xattrs(from_fd, to_fd)  # after the owner: chown drops security.capability
                os.fchmod(to_fd, stat.S_IMODE(info.st_mode))
            finally:
                os.close(to_fd)
        finally:
            os.close(from_fd)
        self.files += 1


def _copy_data(source: int, destination: int, size: int) -> None:
    """Only what's not a hole; the length is set so that one at the end stays."""
    position = 0
    while position < size:
        try:
            start = os.lseek(source, position, os.SEEK_DATA)
            stop = min(os.lseek(source, start, os.SEEK_HOLE), size)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data after here
                break
            if error.errno != errno.EINVAL:  # a file system that doesn't know holes
                raise
            start, stop = position, size
        os.lseek(source, start, os.SEEK_SET)
        os.lseek(destination, start, os.SEEK_SET)
        while start < stop:
            try:
                count = os.copy_file_range(source, destination, min(_BLOCK * 64, stop - start))
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                data = os.read(source, min(_BLOCK, stop - start))
                count = 0
                while count < len(data):
                    count += os.write(destination, data[count:])
            if not count:  # it became shorter
                break
            start += count
        position = stop
    os.ftruncate(destination, size)


def _copy_xattrs(source: int, destination: int) -> None:
    try:
        names = os.listxattr(source)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            return
        raise
    for name in names:
        if name.startswith("trusted.overlay."):  # the snapshot's own bookkeeping
            continue
        try:
            os.setxattr(destination, name, os.getxattr(source, name))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENODATA):  # the volume's file system may not know that kind
                raise
