"""A container's changes as a layer: tar (OCI image-spec layer.md), gzip, both digests, in one pass. Runs in the worker process only.

Names are relative, deletions are ``.wh.<name>``, a directory that hides the image's has ``.wh..wh..opq`` as its first entry. Left out is
what a layer can't have: sockets, and what's called like a whiteout, with all below it. A file has the size its header says, whatever
happens to it meanwhile: what shrinks is filled with zeros, what grows is cut.

The tar is made and digested in one thread, compressed and written in another.
"""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import select
import stat
import tarfile
import threading
from collections.abc import Callable, Iterable

from isal import isal_zlib

from .difference import DELETED, Change, attributes
from .extract import LimitError, Limits

_CHUNK = 256 << 10
_QUEUE = 16  # chunks between the threads
_ATOMIC = 4096  # bytes a pipe takes without waiting once it's said to be writable: PIPE_BUF of pipe(7)
_LOOK_BYTES = 16 << 20  # between two looks at the free space
_LEVEL = 1  # of isal: 2 makes nothing smaller, 3 takes several times as long
_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
}


class Blob:
    """A file that gets what's written, compressed; ``sha256`` of the plain bytes, and what ``finish`` gives of the others."""

    def __init__(self, path: str, limits: Limits) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._limits = limits
        self._deflater = isal_zlib.compressobj(_LEVEL, isal_zlib.DEFLATED, 31)
        self._buffer = bytearray()
        self._chunks: queue.Queue[bytes | None] = queue.Queue(_QUEUE)
        self._failure: BaseException | None = None
        self._written = 0
        self._next_look = 0
        self._compressed = hashlib.sha256()
        self.sha256 = hashlib.sha256()
        self.size = 0
        self._thread = threading.Thread(target=self._produce, daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Errors: OSError (the disk), LimitError."""
        self._buffer += data
        if len(self._buffer) >= _CHUNK:
            self._flush()

    def _flush(self) -> None:
        if self._failure is not None:
            raise self._failure
        data = bytes(self._buffer)
        self._buffer.clear()
        self.size += len(data)
        if self.size > self._limits.max_bytes:
            raise LimitError(f"the container's changes are more than {self._limits.max_bytes} bytes")
        self.sha256.update(data)
        self._chunks.put(data)

    def finish(self) -> tuple[str, int]:
        """(sha256 of the file, its size). imaged makes it durable before it counts."""
        self._flush()
        self._chunks.put(None)
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        os.close(self._fd)
        return self._compressed.hexdigest(), self._written

    def _produce(self) -> None:
        while (chunk := self._chunks.get()) is not None:
            self._put(self._deflater.compress, chunk)
        self._put(lambda _: self._deflater.flush(), b"")

    def _put(self, work: Callable[[bytes], bytes], chunk: bytes) -> None:
        if self._failure is not None:
            return  # the other thread is about to hear of it; until then it mustn't wait for room
        try:
            self._write_out(work(chunk))
        except BaseException as error:
            self._failure = error

    def _write_out(self, data: bytes) -> None:
        self._compressed.update(data)
        self._written += len(data)
        if self._written >= self._next_look:
            self._next_look = self._written + _LOOK_BYTES
            status = os.fstatvfs(self._fd)
            if status.f_bavail * status.f_frsize < self._limits.min_free_bytes:
                raise OSError(errno.ENOSPC, "no space left for the layer")
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]


class Packer:
    """Writes changes as a tar. ``entries`` is how many it has, ``left_out`` how many it couldn't have."""

    def __init__(self, blob: Blob, limits: Limits) -> None:
        self._blob, self._limits = blob, limits
        self._links: dict[tuple[int, int], str] = {}
        self.entries = 0
        self.left_out = 0

    def run(self, changes: Iterable[Change]) -> None:
        for change in changes:
            parent, slash, base = change.path.rpartition("/")
            if "/" + _WHITEOUT in "/" + change.path:
                self.left_out += 1
            elif change.kind == DELETED:
                self._mark(f"{parent}{slash}{_WHITEOUT}{base}")
            else:
                self._add(change)
                if change.opaque:
                    self._mark(f"{change.path}/{_OPAQUE}")
        self._blob.write(bytes(2 * tarfile.BLOCKSIZE))

    def _mark(self, path: str) -> None:
        self._header(tarfile.TarInfo(path))

    def _header(self, info: tarfile.TarInfo) -> None:
        self.entries += 1
        if self.entries > self._limits.max_entries:
            raise LimitError(f"the container has more than {self._limits.max_entries} changes")
        self._blob.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))

    def _add(self, change: Change) -> None:
        kind = _TYPES.get(stat.S_IFMT(change.status.st_mode))
        if kind is None:
            self.left_out += 1
            return
        try:
            if kind == tarfile.REGTYPE:
                self._file(change)
            else:
                self._special(change, kind)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EINVAL):
                raise  # else it's gone, or something else by now

    def _special(self, change: Change, kind: bytes) -> None:
        info = _info(change.path or ".", kind, change.status)
        if kind == tarfile.SYMTYPE:
            info.linkname = os.readlink(change.name, dir_fd=change.directory)
        elif kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
            info.devmajor, info.devminor = os.major(change.status.st_rdev), os.minor(change.status.st_rdev)
        elif kind == tarfile.DIRTYPE:
            fd = os.open(change.name, _FILE | os.O_DIRECTORY, dir_fd=change.directory)
            try:
                _keep_attributes(info, fd)
            finally:
                os.close(fd)
        if kind == tarfile.DIRTYPE or not self._linked(change):
            self._header(info)

    def _linked(self, change: Change) -> bool:
        """Whether it's another name of something that's in the tar already, and is told as such."""
        status = change.status
        if status.st_nlink < 2:
            return False
        place = (status.st_dev, status.st_ino)
        if place not in self._links:
            self._links[place] = change.path
            return False
        info = _info(change.path, tarfile.LNKTYPE, status)
        info.linkname = self._links[place]
        self._header(info)
        return True

    def _file(self, change: Change) -> None:
        fd = os.open(change.name, _FILE, dir_fd=change.directory)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                return  # replaced between the two looks
            change.status = status
            info = _info(change.path, tarfile.REGTYPE, status)
            _keep_attributes(info, fd)
            if self._linked(change):
                return
            info.size = status.st_size
            if info.size > self._limits.max_bytes:
                raise LimitError(f"the container has a file of {info.size} bytes")
            self._header(info)
            self._data(fd, info.size)
        finally:
            os.close(fd)

    def _data(self, fd: int, size: int) -> None:
        left = size
        while left:
            data = os.read(fd, min(left, _CHUNK))
            if not data:  # it has become shorter
                data = bytes(min(left, _CHUNK))
            left -= len(data)
            self._blob.write(data)
        self._blob.write(bytes(-size % tarfile.BLOCKSIZE))


def _info(path: str, kind: bytes, status: os.stat_result) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.type, info.mode, info.uid, info.gid = kind, stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid
    seconds, fraction = divmod(status.st_mtime_ns, 10**9)
    info.mtime = seconds
    if fraction and seconds >= 0:  # before 1970 the fraction would have to be counted the other way round
        info.pax_headers = {"mtime": f"{seconds}.{fraction:09d}".rstrip("0")}
    return info


def _keep_attributes(info: tarfile.TarInfo, fd: int) -> None:
    found = {f"SCHILY.xattr.{name}": value.decode("utf-8", "surrogateescape") for name, value in attributes(fd).items()}
    info.pax_headers = {**info.pax_headers, **found}


class Pipe:
    """A descriptor somebody gave us. Errors: BrokenPipeError when they have let go of it, or take nothing for ``patience_s``: whoever
    may only look shall not hold a worker for good."""

    def __init__(self, fd: int, patience_s: float) -> None:
        self._fd, self._patience_s = fd, patience_s
        self._buffer = bytearray()
        self._poller = select.poll()
        self._poller.register(fd, select.POLLOUT)

    def write(self, data: bytes) -> None:
        self._buffer += data
        if len(self._buffer) >= 1 << 16:
            self.flush()

    def flush(self) -> None:
        view = memoryview(bytes(self._buffer))
        self._buffer.clear()
        while view:
            if not self._poller.poll(self._patience_s * 1000):
                raise BrokenPipeError
            try:
                view = view[os.write(self._fd, view[:_ATOMIC]) :]
            except BlockingIOError:
                pass  # theirs is non-blocking, and somebody else was faster
