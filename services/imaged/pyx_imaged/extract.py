"""Unpacking a layer's tar into a directory: the hostile input's last door. Runs in the worker process only.

Theory of operation. The root is a descriptor, and every path is walked from it one component at a time, never following a link
by the kernel (O_NOFOLLOW). Where a component is a symbolic link *of the layer*, the walk reads it and goes on from the layer's root
(absolute target) or from the directory it lies in, and refuses as soon as ``..`` would leave the root. Nobody else writes below the
root, so what was walked stays true. Files are made with O_EXCL; an entry that's already there is removed first, as Docker does.
Names that are absolute or contain ``..`` are refused.

Whiteouts (OCI image-spec layer.md) become overlayfs's own: a character device 0:0, ``trusted.overlay.opaque`` on a directory.
A layer can't bring overlayfs's attributes itself: they're dropped, since they could redirect into other directories.

Errors: ``LayerError`` for a bad archive; OSError from the file system (disk full) goes up as it is.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass, field

from . import kernel, tarstream
from .tarstream import Entry, Read

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LINKS_LIMIT = 40  # the kernel's own MAXSYMLINKS
_SPARE_DESCRIPTORS = 100  # of the process's limit that aren't for the cache: a path's own walk, the file, the archive
_IMPLIED_LIMIT = 32 << 20  # bytes of names of directories that are only implied: they're remembered and reported
_TIMES_LIMIT = 256 << 20  # bytes of names of directories: they're remembered until the end, for their times
_LOOK_EVERY = 10_000  # entries: a directory takes a block, everything takes an inode
_MIN_FREE_INODES = 10_000
_COPY = 1 << 20
_PATH_LIMIT = 4096
_WHITEOUT, _OPAQUE, _META = b".wh.", b".wh..wh..opq", b".wh..wh."


class LayerError(ValueError):
    """The archive is bad: an entry that leaves the root, or one that can't be. The message is for people."""


class LimitError(ValueError):
    """The archive is larger than this host's configuration allows."""


@dataclass(slots=True)
class Limits:
    """Bounds against bombs. Bytes are of file data; ``min_free_bytes`` is what must stay free on the file system."""

    max_bytes: int = 64 << 30
    max_entries: int = 4_000_000
    min_free_bytes: int = 64 << 20


@dataclass(slots=True)
class Unpacked:
    """What came out. ``implied`` are directories that the archive put something into without having them itself."""

    entries: int = 0
    size_bytes: int = 0
    implied: set[bytes] = field(default_factory=set)
    skipped_xattrs: int = 0


class Extractor:
    """Unpacks one archive below ``root`` (an existing, empty directory). ``base``: nothing lies below it, so whiteouts mean nothing."""

    def __init__(self, root: str | int, limits: Limits, *, base: bool = False, allow_absolute: bool = False) -> None:
        self._root = os.open(root, _DIRECTORY) if isinstance(root, str) else os.dup(root)
        self._limits, self._base, self._allow_absolute = limits, base, allow_absolute
        self._cache: dict[tuple[bytes, ...], int] = {}
        self._times: dict[tuple[bytes, ...], int] = {}
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._cache_limit = max(16, min(soft - _SPARE_DESCRIPTORS, 8192))
        self._next_look = 0
        self._implied_bytes = 0
        self._times_bytes = 0
        self._stale = False
        self._self = os.geteuid(), os.getegid()
        self.result = Unpacked(implied={b""})

    def close(self) -> None:
        self._drop_cache()
        os.close(self._root)

    def run(self, read: Read, *, strict_end: bool = False) -> Unpacked:
        """Unpack everything ``read`` gives (exactly n bytes a call, fewer at the end).

        The process's umask must be 0: modes are the archive's.
        """
        for entry in tarstream.entries(read, strict_end=strict_end):
            self.result.entries += 1
            if self.result.entries > self._limits.max_entries:
                raise LimitError(f"archive with more than {self._limits.max_entries} entries")
            if self.result.entries % _LOOK_EVERY == 0:
                self._look(0)
            if self._stale or len(self._cache) >= self._cache_limit:
                self._drop_cache()  # here only: inside an entry its descriptors are in use
            try:
                self._entry(entry, read)
            except OSError as error:
                raise self._explain(error, entry) from error
        for parts, mtime_ns in sorted(self._times.items(), reverse=True):  # last, since entries inside change it
            try:
                os.utime(self._open_directory(parts), ns=(mtime_ns, mtime_ns))
            except (FileNotFoundError, NotADirectoryError, LayerError):
                pass  # removed again under another name
        return self.result

    def _explain(self, error: OSError, entry: Entry) -> Exception:
        name = _show(entry.name)
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            return LayerError(f'archive entry "{name}" lies below something that is no directory')
        if error.errno == errno.ENAMETOOLONG:
            return LayerError(f"archive with a name that is too long: {name[:80]}…")
        if error.errno in (errno.EINVAL, errno.EBUSY, errno.ENOTEMPTY, errno.ENOENT, errno.EMLINK, errno.ENXIO, errno.E2BIG):
            return LayerError(f'archive entry "{name}" can\'t be made: {error.strerror}')
        return error

    # Names

    def _parts(self, name: bytes, what: str = "entry") -> tuple[bytes, ...]:
        parts = tuple(part for part in name.split(b"/") if part not in (b"", b"."))
        if len(name) > _PATH_LIMIT:
            raise LayerError(f"archive with a name of {len(name)} bytes (at most {_PATH_LIMIT})")
        if b".." in parts:
            raise LayerError(f'archive {what} "{_show(name)}" leaves the root (it contains "..")')
        if parts and name.startswith(b"/") and what == "entry" and not self._allow_absolute:
            raise LayerError(f'archive entry "{_show(name)}" has an absolute path')
        return parts

    def _open_directory(self, parts: tuple[bytes, ...], *, make: bool = False) -> int:
        """A descriptor (kept in the cache, not the caller's) of a directory given by the path as archived."""
        if not parts:
            return self._root
        fd = self._cache.get(parts)
        if fd is not None:
            return fd
        known = len(parts) - 1
        while known and parts[:known] not in self._cache:
            known -= 1
        fd = self._cache[parts[:known]] if known else self._root
        for end in range(known + 1, len(parts) + 1):
            fd = self._cache[parts[:end]] = self._step(fd, parts[:end], make)
        return fd

    def _step(self, parent: int, parts: tuple[bytes, ...], make: bool) -> int:
        """From a directory to the one below it named ``parts[-1]``; a new descriptor. A link there is resolved inside the root."""
        part = parts[-1]
        try:
            return os.open(part, _DIRECTORY, dir_fd=parent)
        except FileNotFoundError:
            if not make:
                raise
            self._make_roots_directory(part, parent)
            self._imply(parts)
            return os.open(part, _DIRECTORY, dir_fd=parent)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            status = os.stat(part, dir_fd=parent, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                return self._walk_links(parts)
            if make and kernel.is_whiteout(status):
                self._imply(parts)
                return self._replace_whiteout(part, parent)
            raise

    def _make_roots_directory(self, name: bytes, parent: int) -> None:
        """One that the archive says nothing of is root's, whoever we are."""
        os.mkdir(name, 0o755, dir_fd=parent)
        if self._self != (0, 0):
            os.chown(name, 0, 0, dir_fd=parent, follow_symlinks=False)

    def _imply(self, parts: tuple[bytes, ...]) -> None:
        name = b"/".join(parts)
        self._implied_bytes += len(name)
        if self._implied_bytes > _IMPLIED_LIMIT:
            raise LimitError("archive with too many directories it doesn't name")
        self.result.implied.add(name)

    def _replace_whiteout(self, name: bytes, parent: int) -> int:
        """A directory where the same layer had hidden what's below: it stays hidden."""
        os.unlink(name, dir_fd=parent)
        self._make_roots_directory(name, parent)
        fd = os.open(name, _DIRECTORY, dir_fd=parent)
        os.setxattr(fd, kernel.OVERLAY_OPAQUE, b"y")
        return fd

    def _walk_links(self, parts: tuple[bytes, ...]) -> int:
        """The whole way from the root to a directory with links on the way. ``stack`` is the real way so far: where a link was
        followed, ``..`` isn't the directory its name says."""
        stack: list[int] = []
        todo = list(reversed(parts))
        links = 0
        try:
            while todo:
                part = todo.pop()
                here = stack[-1] if stack else self._root
                if part in (b"", b"."):
                    continue
                if part == b"..":
                    if not stack:
                        raise LayerError(f'archive entry below "{_show(b"/".join(parts))}" leaves the root through a link')
                    os.close(stack.pop())
                    continue
                try:
                    stack.append(os.open(part, _DIRECTORY, dir_fd=here))
                except FileNotFoundError:
                    raise LayerError(
                        f'archive entry below "{_show(b"/".join(parts))}" goes through a link that leads nowhere'
                    ) from None
                except OSError as error:
                    if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                        raise
                    try:
                        target = os.readlink(part, dir_fd=here)
                    except OSError:
                        raise error from None
                    links += 1
                    if links > _LINKS_LIMIT:
                        raise LayerError(f'archive entry below "{_show(b"/".join(parts))}": too many links') from None
                    if target.startswith(b"/"):
                        while stack:
                            os.close(stack.pop())
                    todo += reversed(target.split(b"/"))
            return os.dup(stack[-1] if stack else self._root)
        finally:
            for fd in stack:
                os.close(fd)

    def _drop_cache(self) -> None:
        self._stale = False
        for fd in self._cache.values():
            os.close(fd)
        self._cache.clear()

    # Entries

    def _entry(self, entry: Entry, read: Read) -> None:
        parts = self._parts(entry.name)
        if not parts:
            if entry.kind != tarstream.DIRECTORY:
                raise LayerError(f'archive entry "{_show(entry.name)}" would replace the root')
            self._attributes(self._root, entry)
            self.result.implied.discard(b"")
            self._times[()] = entry.mtime_ns
            self._skip(entry, read)
            return
        parent, base = self._open_directory(parts[:-1], make=True), parts[-1]
        if base.startswith(_WHITEOUT):
            self._whiteout(parts, parent, base)
            self._skip(entry, read)
        elif entry.kind == tarstream.REGULAR:
            self._file(entry, parts, parent, read)
        elif entry.kind == tarstream.DIRECTORY:
            self._directory(entry, parts, parent)
            self._skip(entry, read)
        else:
            self._special(entry, parts, parent)
            self._skip(entry, read)

    def _file(self, entry: Entry, parts: tuple[bytes, ...], parent: int, read: Read) -> None:
        fd = self._make(lambda: os.open(parts[-1], _NEW_FILE, entry.mode & 0o777, dir_fd=parent), parts, parent)
        try:
            self._account(max(entry.size, 0))
            if entry.sparse is None:
                self._data(fd, entry.size, read)
            else:
                self._sparse(fd, entry, read)
            if entry.padding:
                tarstream.exactly(read, entry.padding)
            self._attributes(fd, entry)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)

    def _data(self, fd: int, size: int, read: Read) -> None:
        while size > 0:
            data = memoryview(read(min(size, _COPY)))
            if not data:
                raise tarstream.TarError("truncated tar archive")
            size -= len(data)
            while data:
                data = data[os.write(fd, data) :]

    def _sparse(self, fd: int, entry: Entry, read: Read) -> None:
        if sum(length for _, length in entry.sparse or ()) != entry.size:
            raise tarstream.TarError("damaged tar archive (the sparse map doesn't fit the data)")
        if entry.real_size > self._limits.max_bytes:
            raise LimitError(f"archive with a file of {entry.real_size} bytes")
        for offset, length in entry.sparse or ():
            if offset < 0 or length < 0 or offset + length > entry.real_size:
                raise tarstream.TarError("damaged tar archive (bad sparse map)")
            os.lseek(fd, offset, os.SEEK_SET)
            self._data(fd, length, read)
        os.ftruncate(fd, entry.real_size)

    def _directory(self, entry: Entry, parts: tuple[bytes, ...], parent: int) -> None:
        base = parts[-1]
        fd = None
        try:
            os.mkdir(base, 0o700, dir_fd=parent)
        except FileExistsError:
            status = os.stat(base, dir_fd=parent, follow_symlinks=False)
            if kernel.is_whiteout(status):
                fd = self._replace_whiteout(base, parent)
            elif not stat.S_ISDIR(status.st_mode):
                self._remove(parts, parent)
                os.mkdir(base, 0o700, dir_fd=parent)
        if fd is None:
            fd = os.open(base, _DIRECTORY, dir_fd=parent)
        try:
            self._attributes(fd, entry, always_mode=True)
        finally:
            os.close(fd)
        self.result.implied.discard(b"/".join(parts))
        if parts not in self._times:
            self._times_bytes += len(entry.name)
            if self._times_bytes > _TIMES_LIMIT:
                raise LimitError("archive with too many directories")
        self._times[parts] = entry.mtime_ns

    def _special(self, entry: Entry, parts: tuple[bytes, ...], parent: int) -> None:
        base = parts[-1]
        if entry.kind == tarstream.LINK:
            target = self._parts(entry.link, "link target")
            if not target:
                raise LayerError(f'archive entry "{_show(entry.name)}" is a link to the root')
            if target == parts:
                return  # a link to itself: nothing to do (seen in the wild)
            try:
                source = self._open_directory(target[:-1])
                status = os.stat(target[-1], dir_fd=source, follow_symlinks=False)
            except FileNotFoundError:
                raise LayerError(
                    f'archive entry "{_show(entry.name)}" is a link to "{_show(entry.link)}", which isn\'t in the archive'
                ) from None
            if stat.S_ISDIR(status.st_mode):
                raise LayerError(f'archive entry "{_show(entry.name)}" is a hard link to a directory')
            self._make(
                lambda: os.link(target[-1], base, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False), parts, parent
            )
            return
        if entry.kind == tarstream.SYMLINK:
            if not entry.link or len(entry.link) >= _PATH_LIMIT:
                raise LayerError(f'archive entry "{_show(entry.name)}" is a link of {len(entry.link)} bytes')
            self._make(lambda: os.symlink(entry.link, base, dir_fd=parent), parts, parent)
        else:
            kind = {
                tarstream.CHARACTER: stat.S_IFCHR,
                tarstream.BLOCK_DEVICE: stat.S_IFBLK,
                tarstream.FIFO: stat.S_IFIFO,
            }[entry.kind]
            device = os.makedev(*entry.device) if kind != stat.S_IFIFO else 0
            self._make(lambda: os.mknod(base, kind | (entry.mode & 0o777), device, dir_fd=parent), parts, parent)
        if (entry.uid, entry.gid) != self._self:
            os.chown(base, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        if entry.kind != tarstream.SYMLINK and entry.mode & 0o7000:
            os.chmod(base, entry.mode, dir_fd=parent)  # it was made just now: no link
        os.utime(base, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _whiteout(self, parts: tuple[bytes, ...], parent: int, base: bytes) -> None:
        if base == _OPAQUE:
            if not self._base:
                os.setxattr(parent, kernel.OVERLAY_OPAQUE, b"y")
            return
        if base.startswith(_META):
            return  # aufs's own notes
        hidden = base[len(_WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            raise LayerError(f'archive entry "{_show(b"/".join(parts))}" is no valid whiteout')
        if self._base:
            return
        try:
            os.mknod(hidden, stat.S_IFCHR, 0, dir_fd=parent)
        except FileExistsError:  # of this layer: the whiteout means only what's below it (layer.md, "Whiteouts")
            if stat.S_ISDIR(os.stat(hidden, dir_fd=parent, follow_symlinks=False).st_mode):
                fd = os.open(hidden, _DIRECTORY, dir_fd=parent)
                os.setxattr(fd, kernel.OVERLAY_OPAQUE, b"y")
                os.close(fd)

    # Helpers

    def _make(self, call: Callable[[], int | None], parts: tuple[bytes, ...], parent: int) -> int:
        try:
            return call() or 0
        except FileExistsError:
            self._remove(parts, parent)
            return call() or 0

    def _remove(self, parts: tuple[bytes, ...], parent: int) -> None:
        """Remove what an earlier entry made there, with all that's in it."""
        self._stale = True  # a descriptor in the cache may be of what goes, or have been reached through it
        try:
            os.unlink(parts[-1], dir_fd=parent)
        except IsADirectoryError:
            for known in [known for known in self._times if known[: len(parts)] == parts]:
                del self._times[known]
            try:
                shutil.rmtree(parts[-1], dir_fd=parent)
            except RecursionError:
                raise LayerError("archive that replaces directories nested too deeply") from None
            prefix = b"/".join(parts)
            self.result.implied = {p for p in self.result.implied if p != prefix and not p.startswith(prefix + b"/")}

    def _attributes(self, fd: int, entry: Entry, *, always_mode: bool = False) -> None:
        """Owner, mode and extended attributes, in this order: chown clears set-id bits and capabilities."""
        os.fchown(fd, entry.uid, entry.gid)
        os.fchmod(fd, entry.mode)
        for name, value in entry.xattrs:
            if name.startswith(("trusted.overlay.", "user.overlay.")):
                self.result.skipped_xattrs += 1
                continue
            try:
                os.setxattr(fd, name, value)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EPERM):
                    raise
                self.result.skipped_xattrs += 1

    def _account(self, size: int) -> None:
        self.result.size_bytes += size
        if self.result.size_bytes > self._limits.max_bytes:
            raise LimitError(f"archive of more than {self._limits.max_bytes} bytes")
        if self.result.size_bytes >= self._next_look:
            free = self._look(size)
            self._next_look = self.result.size_bytes + min(64 << 20, max(free >> 3, 1 << 20))

    def _look(self, size: int) -> int:
        """Whether there's room for ``size`` more bytes; how many are free."""
        status = os.fstatvfs(self._root)
        free = status.f_bavail * status.f_frsize
        if free - size < self._limits.min_free_bytes:
            raise OSError(errno.ENOSPC, "no space left for the layer")
        if status.f_files and status.f_favail < _MIN_FREE_INODES:  # a file system that makes them as it goes says 0
            raise OSError(errno.ENOSPC, "no inodes left for the layer")
        return free

    def _skip(self, entry: Entry, read: Read) -> None:
        left = entry.size + entry.padding if entry.kind not in (tarstream.LINK, tarstream.SYMLINK) else 0
        while left > 0:
            left -= len(tarstream.exactly(read, min(left, _COPY)))


def _show(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
