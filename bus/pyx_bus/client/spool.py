"""A publisher's unacknowledged events in a file, so that they survive its being killed.

Every process that publishes has a publisher ID and a file of its own, ``<place>-<ID>``, locked (flock(2)) for as long as it lives. What
a process leaves there is published by a later one, under the ID and with the numbers it had: the broker's journal knows by these what
it has already. A number is so never used for two events, whatever became of a file, and a process that lingers shares nothing with its
successor: its file is taken over when its lock is free.

The file::

    magic 8 bytes · time it was begun in ns u64 · settled: a sequence number u64 · crc32 of these 8 bytes u32 · 0 u32
    of each event: crc32 u32 · its PUBLISH frame as it's sent (wire.py)

Events up to ``settled`` have been answered by the broker. A file comes into being whole and locked (it's renamed to its name), and is
replaced in the same way when most of what's in it has been answered.

An event is one write into the page cache: it survives kill -9, but no power cut (the file belongs into the directory that vanishes with
the boot: the container that died has then, too). If it can't be written, events are kept in memory alone until it can again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import time
from collections.abc import Iterable
from pathlib import Path
from struct import Struct
from zlib import crc32

from ..wire import HEADER, HEADER_SIZE, MAX_FRAME, PUBLISH

log = logging.getLogger("pyx_bus.client")

_MAGIC = b"pyxspl1\n"
_HEAD = Struct("<8sQQII")
_SETTLED_AT = 16
_CRC_SIZE = 4
# The file is written anew when it's larger than this and than one and a half times the events that are waiting.
GROWN_BYTES = 256 << 10
# After a failure, doubled each time.
FIRST_PAUSE_S = 1.0
LAST_PAUSE_S = 60.0
# A file without events that its maker didn't live to rename: its age when it's certainly none that is being made.
_STALE_S = 60.0


class Spool:
    """``publisher`` is the ID that belongs to the events in it."""

    def __init__(self, place: Path, publisher: str = "", fd: int = -1, begun_ns: int = 0) -> None:
        """A file that's made with the first event; ``fd``: one that's there, and locked."""
        self.place = place
        self.publisher = publisher or secrets.token_hex(8)
        self.begun_ns = begun_ns or time.time_ns()
        self._path = place.with_name(f"{place.name}-{self.publisher}")
        self._fd = fd
        self._position = 0  # where the next event goes; 0: the file has to be written anew first
        self._last = 0  # the last event in the file
        self._pause_s = 0.0
        self._retry_at = 0.0

    def append(self, sequence: int, frame: bytes, waiting_bytes: int) -> bool:
        """Add an event, ``waiting_bytes`` being the size of all that aren't acknowledged. False if `rewrite` is to do it.

        Never fails: see the module.
        """
        position = self._position
        if not position:
            return time.monotonic() < self._retry_at
        if position > GROWN_BYTES and position > waiting_bytes + (waiting_bytes >> 1):
            return False
        record = crc32(frame).to_bytes(_CRC_SIZE, "little") + frame
        try:
            written = os.pwrite(self._fd, record, position)
        except OSError:
            return False
        if written < len(record):
            return False  # what there is of it is cut off by whoever reads it
        self._position = position + written
        self._last = sequence
        return True

    def rewrite(self, frames: Iterable[bytes], settled: int, last: int) -> None:
        """Replace the file by one with these events, of which ``last`` is the number of the last and ``settled`` lies before the first.

        If that fails the old one stays, and `append` asks for this again after a pause.
        """
        if self._fd >= 0 and settled >= self._last:
            with contextlib.suppress(OSError):  # all that's in it has been answered: the new one may need the room
                os.ftruncate(self._fd, _HEAD.size)
        new = self._path.with_name(self._path.name + ".new")
        fd = -1
        try:
            fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(fd, "wb", closefd=False) as file:
                file.write(head(self.begun_ns, settled))
                for frame in frames:
                    file.write(crc32(frame).to_bytes(_CRC_SIZE, "little") + frame)
            position = os.fstat(fd).st_size
            os.rename(new, self._path)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
                with contextlib.suppress(OSError):
                    os.unlink(new)
            self._failed(error)
            return
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._position, self._last = fd, position, last
        if self._pause_s:
            self._pause_s = 0.0
            log.info("events are kept in %s again", self._path)

    def _failed(self, error: OSError) -> None:
        if not self._pause_s:
            log.error("events can't be kept in %s, and would be lost with this process: %s", self._path, error.strerror)
        self._position = 0
        self._pause_s = min(LAST_PAUSE_S, self._pause_s * 2) or FIRST_PAUSE_S
        self._retry_at = time.monotonic() + self._pause_s

    def settled(self, sequence: int) -> None:
        """Events up to this one have been answered."""
        if self._fd >= 0:
            number = sequence.to_bytes(8, "little")
            try:
                os.pwrite(self._fd, number + crc32(number).to_bytes(_CRC_SIZE, "little"), _SETTLED_AT)
            except OSError:
                pass  # they're published again, and known to the journal

    def load(self) -> list[tuple[int, bytes]]:
        """The events (sequence number, frame) that weren't answered. Raises ``OSError``."""
        data = bytearray()
        while piece := os.pread(self._fd, 1 << 20, len(data)):
            data += piece
        events, end = parse(bytes(data))
        if end < len(data):
            log.warning("the last %d bytes of %s are no whole event: they're cut off", len(data) - end, self._path)
        return events

    def close(self, empty: bool) -> None:
        """``empty``: all events were answered, and the file goes. Closing it again does nothing."""
        self._position, self._retry_at = 0, float("inf")
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        if empty:
            for path in (self._path, self._path.with_name(self._path.name + ".new")):  # which its maker may not have lived to rename
                with contextlib.suppress(OSError):
                    os.unlink(path)
        os.close(fd)


def head(begun_ns: int, settled: int) -> bytes:
    return _HEAD.pack(_MAGIC, begun_ns, settled, crc32(settled.to_bytes(8, "little")), 0)


def parse(data: bytes) -> tuple[list[tuple[int, bytes]], int]:
    """The unanswered events (sequence number, frame) of a file up to the first that isn't whole and good, and where that is."""
    if len(data) < _HEAD.size:
        return [], 0
    magic, _, settled, crc, _ = _HEAD.unpack_from(data)
    if magic != _MAGIC:
        return [], 0
    if crc32(settled.to_bytes(8, "little")) != crc:
        settled = 0  # the journal knows
    events: list[tuple[int, bytes]] = []
    at, last, end = _HEAD.size, 0, len(data)
    while end - at >= _CRC_SIZE + HEADER_SIZE:
        start = at + _CRC_SIZE
        size, kind, _, fds, route_size, _, _, sequence = HEADER.unpack_from(data, start)
        if kind != PUBLISH or fds or not HEADER_SIZE + route_size <= size <= min(MAX_FRAME, end - start) or sequence <= last:
            break
        frame = data[start : start + size]
        if crc32(frame) != int.from_bytes(data[at:start], "little"):
            break
        at, last = start + size, sequence
        if sequence > settled:
            events.append((sequence, frame))
    return events, at


def claim(place: Path, own: str) -> tuple[list[Spool], bool]:
    """What processes that have ended left at ``place``, the oldest first, and whether there are others that still live.

    ``own``: the publisher whose file isn't looked at.
    """
    found: list[Spool] = []
    lingering = False
    try:
        names = os.listdir(place.parent)
    except OSError:
        return [], False  # there's nothing yet
    pattern = re.compile(re.escape(place.name) + r"-([0-9a-f]{16})(\.new)?")
    for name in names:
        match = pattern.fullmatch(name)
        if match is None or match[1] == own:
            continue
        path = place.with_name(name)
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError as error:
            log.error("can't see what events are in %s: %s", path, error.strerror)
            continue
        kept = False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            status = os.fstat(fd)
            if not status.st_nlink:
                continue  # replaced or removed meanwhile
            if match[2]:
                if time.time() - status.st_mtime > _STALE_S:
                    os.unlink(path)
                continue
            data = os.pread(fd, _HEAD.size, 0)
            begun_ns = _HEAD.unpack(data)[1] if len(data) == _HEAD.size else 0
            found.append(Spool(place, match[1], fd, begun_ns))
            kept = True
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                log.error("can't take over the events in %s: %s", path, error.strerror)
            else:
                lingering = lingering or not match[2]
        finally:
            if not kept:
                os.close(fd)
    return sorted(found, key=lambda spool: spool.begun_ns), lingering


__all__ = ["Spool", "claim", "head", "parse"]
