"""The ``json-file`` driver: Docker's default, in Docker's format, rotated as Docker does.

Files: ``<id>-json.log``, being written, then ``.1`` (newer) to ``.<max-file - 1>`` (oldest). Before a record is written to a file
which has reached ``max-size``, a new one is begun; so a file exceeds it by less than a record.
Only whole records are ever in a file, but for the moment of a write and after a kill -9 in it, which `rewind` repairs.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ..jsonfile import encode
from ..model import Chunk, json_file_options
from ..window import Mark
from .base import Segment, Trouble

_TAIL_BYTES = 64 * 1024  # a record is shorter: 16 KiB of text, each byte escaped as six, would be 96 KiB, hence the loop in _repair


class JsonFile:
    """One container's json-file log in ``directory``, which is named by the container's ID."""

    readable = True

    def __init__(self, directory: Path, options: dict[str, str], trouble: Trouble) -> None:
        self._options = json_file_options(options)
        self.path = str(directory / f"{directory.name}-json.log")
        self._trouble = trouble
        self._fd = -1
        self._file = 0
        self._size = 0
        self._listeners: list[Callable[[], None]] = []

    def open(self) -> None:
        if self._fd >= 0:
            return
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        stat = os.fstat(self._fd)
        self._file, self._size = stat.st_ino, stat.st_size
        self._repair()

    def _repair(self) -> None:
        """Cut off a record that was begun and not finished: a host's crash may leave one, and what follows would be lost with it."""
        end = self._size
        while end > 0:
            start = max(0, end - _TAIL_BYTES)
            newline = os.pread(self._fd, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end != self._size:
            os.ftruncate(self._fd, end)
            self._size = end

    def write(self, chunks: Sequence[Chunk]) -> None:
        data = b"".join([encode(chunk) for chunk in chunks])
        limit = self._options.max_size_bytes
        while data and limit and self._size + len(data) > limit:
            if self._size >= limit:
                self._rotate()
            stop = data.find(b"\n", max(0, limit - self._size - 1)) + 1  # the record that reaches the limit still fits
            self._append(data[:stop])
            data = data[stop:]
        if data:
            self._append(data)

    def _append(self, data: bytes) -> None:
        view = memoryview(data)
        size = self._size
        try:
            while view:
                count = os.write(self._fd, view)
                view = view[count:]
                size += count
        except OSError as error:
            size = self._size + data.rfind(b"\n", 0, size - self._size) + 1  # no part of a record stays
            try:
                os.ftruncate(self._fd, size)
            except OSError as further:
                self._trouble(f"cutting {self.path} back", further, 0)
            self._trouble(f"writing {len(data)} bytes to {self.path}", error, len(data) - (size - self._size))
        self._size = size

    def _rotate(self) -> None:
        """Begin a new file. If that fails the old one goes on growing: output is worth more than the limit."""
        fresh = f"{self.path}.new"
        fd = -1
        try:
            # made before any is deleted, so that it can't get the inode number a mark knows the old one by
            fd = os.open(fresh, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
            for number in range(self._options.max_files - 1, 0, -1):
                older = self.path if number == 1 else f"{self.path}.{number - 1}"
                try:
                    os.rename(older, f"{self.path}.{number}")
                except FileNotFoundError:
                    continue
            os.rename(fresh, self.path)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            self._trouble(f"rotating {self.path}", error, 0)
            return
        os.close(self._fd)
        self._fd, self._file, self._size = fd, os.fstat(fd).st_ino, 0
        for listener in list(self._listeners):
            listener()

    async def wait_ready(self) -> None: ...

    def mark(self) -> Mark:
        return self._file, self._size

    def rewind(self, mark: Mark) -> None:
        file, size = mark
        if not file:
            return
        if file != self._file:
            self._undo_rotations(file)
        if file == self._file and size <= os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, size)
            self._size = size
            return
        os.ftruncate(self._fd, 0)  # the marked file is gone, so all that's here came after it
        self._size = 0

    def _undo_rotations(self, file: int) -> None:
        """Make the file with inode ``file`` the current one again, if it's still there; newer ones were begun since."""
        for number in range(1, self._options.max_files):
            try:
                if os.stat(f"{self.path}.{number}").st_ino != file:
                    continue
            except FileNotFoundError:
                return
            for source in range(number, self._options.max_files):
                target = self.path if source == number else f"{self.path}.{source - number}"
                try:
                    os.rename(f"{self.path}.{source}", target)
                except FileNotFoundError:
                    break
            os.close(self._fd)
            self._fd = -1
            self.open()
            return

    def segments(self) -> list[Segment]:
        """Opened all at once: a rotation between them can't happen, the loop being ours, and after it the descriptors still stand."""
        segments: list[Segment] = []
        if not self._options.max_size_bytes:
            names = [self.path]
        else:
            names = [f"{self.path}.{number}" for number in range(self._options.max_files - 1, 0, -1)] + [self.path]
        for name in names:
            try:
                fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    for segment in segments:
                        os.close(segment.fd)
                    raise
                continue
            segments.append(Segment(fd, self._size if name == self.path and self._fd >= 0 else os.fstat(fd).st_size))
        return segments

    def on_rotate(self, listener: Callable[[], None]) -> Callable[[], None]:
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    async def aclose(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
