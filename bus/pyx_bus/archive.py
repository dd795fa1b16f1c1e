"""Trees as tar streams: what ``cp`` and ``export`` pass through their pipes, written and read without ever following a link.

Both sides work from directory descriptors, one component at a time, so that whoever changes the tree meanwhile, or made the archive,
leads nobody elsewhere. The format is POSIX pax: nanoseconds, sizes and names without bounds, extended attributes as
``SCHILY.xattr.<name>`` (security.capability and user.*). Sockets are left out, as Docker does.

Blocking, and of no use to a process that serves others: call it in one of its own.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
import tarfile
from collections.abc import Callable, Iterator
from typing import BinaryIO

_XATTR = "SCHILY.xattr."
_BLOCK = 1 << 20
_DEVICES = {tarfile.CHRTYPE: stat.S_IFCHR, tarfile.BLKTYPE: stat.S_IFBLK}


class ArchiveError(Exception):
    """The archive, or what it meets where it's unpacked, isn't as it must be."""


class _Padded:
    """A file of the size its header says: what shrank meanwhile is filled with zeros, what grew is cut."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self, size: int) -> bytes:
        data = os.read(self._fd, min(size, _BLOCK))
        while len(data) < size:
            more = os.read(self._fd, min(size - len(data), _BLOCK))
            if not more:
                return data + bytes(size - len(data))
            data += more
        return data


def pack(out: BinaryIO, directory: int, name: str, arcname: str) -> None:
    """Write ``name`` of ``directory`` (with what's below, if it's one itself) to ``out``, as ``arcname``. "." is the directory itself;
    with an empty ``arcname`` only what's in it is written.

    Stays yours: ``directory``. Errors: OSError; what vanishes meanwhile is left out.
    """
    with tarfile.open(mode="w|", fileobj=out, format=tarfile.PAX_FORMAT, bufsize=_BLOCK) as tar:
        links: dict[tuple[int, int], str] = {}
        stack: list[tuple[int, Iterator[str], str]] = []
        try:
            if arcname:
                child = _add(tar, links, directory, name, arcname)
            else:
                child = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            if child >= 0:
                stack.append((child, iter(sorted(os.listdir(child))), arcname))
            while stack:
                current, names, prefix = stack[-1]
                inner = next(names, None)
                if inner is None:
                    os.close(stack.pop()[0])
                    continue
                path = f"{prefix}/{inner}" if prefix else inner
                try:
                    child = _add(tar, links, current, inner, path)
                except FileNotFoundError:
                    continue
                if child >= 0:
                    stack.append((child, iter(sorted(os.listdir(child))), path))
        finally:
            for fd, _, _ in stack:
                os.close(fd)


def _add(tar: tarfile.TarFile, links: dict[tuple[int, int], str], directory: int, name: str, arcname: str) -> int:
    """Add one entry. A directory's descriptor, for what's in it, else -1."""
    status = os.stat(name, dir_fd=directory, follow_symlinks=False)
    kind = stat.S_IFMT(status.st_mode)
    if kind == stat.S_IFSOCK:
        return -1
    info = tarfile.TarInfo(arcname)
    info.mode, info.uid, info.gid = stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid
    info.mtime = status.st_mtime_ns // 10**9
    info.pax_headers = {"mtime": f"{status.st_mtime_ns // 10**9}.{status.st_mtime_ns % 10**9:09d}"} if status.st_mtime_ns % 10**9 else {}
    if kind == stat.S_IFLNK:
        info.type, info.linkname = tarfile.SYMTYPE, os.readlink(name, dir_fd=directory)
    elif kind == stat.S_IFIFO:
        info.type = tarfile.FIFOTYPE
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        info.type = tarfile.CHRTYPE if kind == stat.S_IFCHR else tarfile.BLKTYPE
        info.devmajor, info.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
    elif kind == stat.S_IFDIR:
        info.type = tarfile.DIRTYPE
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        info.pax_headers |= _attributes(fd)
        tar.addfile(info)
        return fd
    else:
        place = (status.st_dev, status.st_ino)
        if status.st_nlink > 1 and place in links:
            info.type, info.linkname = tarfile.LNKTYPE, links[place]
            tar.addfile(info)
            return -1
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                return -1  # replaced between the two looks
            info.size = found.st_size
            info.pax_headers |= _attributes(fd)
            tar.addfile(info, _Padded(fd))  # type: ignore[arg-type]  # it has the one method that's used
        finally:
            os.close(fd)
        if status.st_nlink > 1:
            links[place] = arcname
        return -1
    tar.addfile(info)
    return -1


def _attributes(fd: int) -> dict[str, str]:
    try:
        names = [name for name in os.listxattr(fd) if name == "security.capability" or name.startswith("user.")]
        return {_XATTR + name: os.getxattr(fd, name).decode("utf-8", "surrogateescape") for name in names}
    except OSError:  # a file system without, or an attribute that's just gone
        return {}


OpenDirectory = Callable[[str, bool], int]
"""Open a directory below the place, by its path there ("" is the place itself); the flag: make it where it's missing. OSError."""


def unpack(
    source: BinaryIO, open_directory: OpenDirectory, *, owner: tuple[int, int] | None = None, keep_owner: bool = False,
    rename: tuple[str, str] = ("", ""), no_devices: bool = False,
) -> int:  # fmt: skip
    """Unpack a tar, compressed or not, and return how many bytes of files it had.

    A directory is kept, and anything else that's there replaced; but never a directory by something else, nor the other way round
    (`ArchiveError`). ``owner`` becomes everybody's, unless ``keep_owner``; neither: whoever we are. ``rename``: (old, new) first
    component. Errors: ArchiveError, OSError.
    """
    total = 0
    late: list[tuple[str, tarfile.TarInfo]] = []
    old, new = rename

    def place_of(text: str) -> str:
        path = posixpath.normpath("/" + text)[1:]
        if ".." in text.split("/"):
            raise ArchiveError(f'the archive has a path that leads out of it: "{text}"')
        if new and old == ".":
            return posixpath.join(new, path) if path else new
        if new and (path == old or path.startswith(old + "/")):
            return new + path[len(old) :]
        return path

    try:
        with tarfile.open(mode="r|*", fileobj=source, bufsize=_BLOCK) as tar:
            for info in tar:
                if no_devices and info.type in _DEVICES:
                    continue
                path = place_of(info.name)
                parent, _, name = path.rpartition("/")
                if not name:
                    if not info.isdir():
                        raise ArchiveError("the archive has a file without a name")
                    continue  # the place itself, which stays as it is
                directory = open_directory(parent, True)
                try:
                    target = place_of(info.linkname) if info.islnk() else ""
                    _extract(tar, info, directory, name, target, open_directory)
                    if info.islnk():
                        continue
                    if keep_owner:
                        os.chown(name, info.uid, info.gid, dir_fd=directory, follow_symlinks=False)
                    elif owner is not None:
                        os.chown(name, *owner, dir_fd=directory, follow_symlinks=False)
                    if info.isdir():
                        late.append((path, info))
                    else:
                        _finish(directory, name, info)
                    total += info.size if info.isreg() else 0
                finally:
                    os.close(directory)
            for path, info in reversed(late):  # after what's in it: its own mode may forbid that, and its time would change
                parent, _, name = path.rpartition("/")
                directory = open_directory(parent, False)
                try:
                    _finish(directory, name, info)
                finally:
                    os.close(directory)
    except (tarfile.TarError, EOFError, UnicodeError) as error:
        raise ArchiveError(f"not a tar archive, or a damaged one: {error}") from None
    return total


def _extract(
    tar: tarfile.TarFile, info: tarfile.TarInfo, directory: int, name: str, target: str, open_directory: OpenDirectory
) -> None:
    try:
        there = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        there = None
    if there is not None:
        if stat.S_ISDIR(there.st_mode) != info.isdir():
            what = ("directory", "non-directory") if stat.S_ISDIR(there.st_mode) else ("non-directory", "directory")
            raise ArchiveError(f'cannot overwrite {what[0]} "{name}" with {what[1]} "{info.name}"')
        if info.isdir():
            return
        if not info.islnk():
            os.unlink(name, dir_fd=directory)
    if info.isdir():
        os.mkdir(name, 0o700, dir_fd=directory)
    elif info.issym():
        os.symlink(info.linkname, name, dir_fd=directory)
    elif info.islnk():
        parent, _, base = target.rpartition("/")
        source = open_directory(parent, False)
        try:
            if there is not None:
                if os.path.samestat(there, os.stat(base, dir_fd=source, follow_symlinks=False)):
                    return
                os.unlink(name, dir_fd=directory)
            os.link(base, name, src_dir_fd=source, dst_dir_fd=directory, follow_symlinks=False)
        finally:
            os.close(source)
    elif info.isfifo():
        os.mkfifo(name, 0o600, dir_fd=directory)
    elif info.type in _DEVICES:
        os.mknod(name, 0o600 | _DEVICES[info.type], os.makedev(info.devmajor, info.devminor), dir_fd=directory)
    else:
        reader = tar.extractfile(info)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=directory)
        with open(fd, "wb", buffering=0) as file:
            while reader is not None and (data := reader.read(_BLOCK)):
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]


def _finish(directory: int, name: str, info: tarfile.TarInfo) -> None:
    """Mode, attributes and time, in this order: a change of the owner before took setuid and capabilities away."""
    seconds, _, fraction = info.pax_headers.get("mtime", "").partition(".")
    mtime_ns = int(info.mtime) * 10**9
    if seconds.isdigit():
        mtime_ns = int(seconds) * 10**9 + int((fraction + "0" * 9)[:9] if fraction.isdigit() else 0)
    if not info.issym():
        # A FIFO or device isn't opened, but named by a descriptor: chmod(2) itself would follow a link put in its place.
        flags = os.O_RDONLY | os.O_NONBLOCK if info.isdir() or info.isreg() else os.O_PATH
        fd = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            if not stat.S_ISLNK(os.fstat(fd).st_mode):
                os.chmod(fd if flags != os.O_PATH else f"/proc/self/fd/{fd}", stat.S_IMODE(info.mode))
            for key, value in info.pax_headers.items() if flags != os.O_PATH else ():
                if key.startswith(_XATTR):
                    _set_attribute(fd, key.removeprefix(_XATTR), value)
        finally:
            os.close(fd)
    os.utime(name, ns=(mtime_ns, mtime_ns), dir_fd=directory, follow_symlinks=False)


def _set_attribute(fd: int, name: str, value: str) -> None:
    if name != "security.capability" and not name.startswith("user."):
        return
    try:
        os.setxattr(fd, name, value.encode("utf-8", "surrogateescape"))
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EPERM):
            raise
