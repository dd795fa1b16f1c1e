"""The files of the journal of events: what a segment, a record, the state and the table of publishers look like on disk.

All numbers are little endian; every checksum is CRC-32 (zlib's) over what follows it.

*Segment*, ``<offset of its first event, 20 digits>.seg``: a head, then records, one after the other. Nothing is ever changed in it::

    head:    magic 8 bytes · crc32 u32 · version u32 · journal's identity 16 bytes · first offset u64 · time of the first event u64
    record:  size u32 (of all of it) · crc32 u32 · first offset u64 · time_ns u64 · last sequence number u64 · count u32
             · length of source u8 · length of publisher u8 · 2 bytes 0 · source · publisher · `count` PUBLISH frames (wire.py) verbatim

Offsets in a segment grow; where they leave some out, those are lost. A file whose head names another journal is never read.

*State*, ``state``: two slots of 512 bytes, written in turn and told apart by a generation, so that one of them is always whole::

    magic 8 bytes · crc32 u32 · version u32 · identity 16 bytes · boot's identity 36 bytes · generation u64 · next offset u64
    · reserved u64 · time_ns u64 · clean u8

*Publishers*, ``publishers``: what the journal keeps of every publisher up to an offset, replaced as a whole::

    magic 8 bytes · crc32 u32 · version u32 · identity 16 bytes · offset u64 · count u32, then of each, the latest to publish last:
    last sequence number u64 · offset after that event u64 · length u8 · publisher
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections import OrderedDict
from pathlib import Path
from struct import Struct
from typing import NamedTuple
from zlib import crc32

VERSION = 1
SUFFIX = ".seg"

HEAD = Struct("<8sII16sQQ")
HEAD_SIZE = HEAD.size
_HEAD_MAGIC = b"pyxevent"
_HEAD_REST = Struct("<I16sQQ")

RECORD = Struct("<IIQQQIBB2x")
RECORD_SIZE = RECORD.size
RECORD_REST = Struct("<QQQIBB2x")
CHECKED_FROM = 8  # the checksum is over what follows it

_STATE = Struct("<8sII16s36sQQQQB")
_STATE_REST = Struct("<I16s36sQQQQB")
_STATE_MAGIC = b"pyxstate"
_SLOT_SIZE = 512  # a disk writes a sector as a whole

_TABLE = Struct("<8sII16sQI")
_TABLE_REST = Struct("<I16sQI")
_TABLE_MAGIC = b"pyxpubls"
_TABLE_ENTRY = Struct("<QQB")

SCAN_BYTES = 256 << 10
# Offsets are never reserved farther ahead at a time.
RESERVE_MAX = 1 << 22


class JournalError(Exception):
    """The journal can't be opened, or an event couldn't be written (then nothing of it is there). ``errno`` if the kernel said no."""

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message)
        self.errno = errno


class Segment:
    """One file. ``size`` is up to where it's good: what may be read."""

    __slots__ = ("damaged", "fd", "first_offset", "first_time_ns", "path", "removed", "size")

    def __init__(self, path: Path, first_offset: int, first_time_ns: int, size: int) -> None:
        self.path = path
        self.first_offset = first_offset
        self.first_time_ns = first_time_ns
        self.size = size
        self.fd = -1
        self.removed = False
        self.damaged = False  # told of, once

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def segment_name(first_offset: int) -> str:
    return f"{first_offset:020}{SUFFIX}"


def create_segment(directory: Path, journal_id: bytes, first_offset: int, time_ns: int) -> Segment:
    """A new file with its head, open for reading and writing. Raises ``OSError``; then there's no file."""
    path = directory / segment_name(first_offset)
    segment = Segment(path, first_offset, time_ns, HEAD_SIZE)
    segment.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        rest = _HEAD_REST.pack(VERSION, journal_id, first_offset, time_ns)
        write_all(segment.fd, _HEAD_MAGIC + crc32(rest).to_bytes(4, "little") + rest, 0)
    except BaseException:
        segment.close()
        os.unlink(path)
        raise
    return segment


def load_segment(path: Path) -> tuple[bytes, Segment] | None:
    """The journal's identity and the segment, as its head says; None if that can't be trusted. Raises ``JournalError``: another version."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            head = os.pread(file.fileno(), HEAD_SIZE, 0)
        except OSError as e:
            if e.errno == errno.EIO:
                return None
            raise
    if len(head) < HEAD_SIZE:
        return None
    magic, crc, version, journal_id, first_offset, time_ns = HEAD.unpack(head)
    if magic != _HEAD_MAGIC or crc != crc32(head[HEAD_SIZE - _HEAD_REST.size :]):
        return None
    if version != VERSION:
        raise JournalError(f"'{path}' was written by another version of pyx (format {version}, not {VERSION})")
    if path.name != segment_name(first_offset):
        return None
    return journal_id, Segment(path, first_offset, time_ns, size)


class RecordHead(NamedTuple):
    """Where a good record is, and what its header says."""

    position: int
    size: int
    first_offset: int
    time_ns: int
    last_sequence: int
    events: int
    source_size: int
    publisher_size: int


def check_record(fd: int, position: int, end: int) -> RecordHead | None:
    """The record at ``position`` of a file that's good up to ``end``, or None if what's there isn't a whole and good one."""
    if end - position < RECORD_SIZE:
        return None
    head = os.pread(fd, RECORD_SIZE, position)
    if len(head) < RECORD_SIZE:
        return None
    size, crc, first, time_ns, sequence, count, source_size, publisher_size = RECORD.unpack(head)
    if size < RECORD_SIZE + source_size + publisher_size or size > end - position or not count:
        return None
    data = os.pread(fd, size - CHECKED_FROM, position + CHECKED_FROM)
    if len(data) != size - CHECKED_FROM or crc32(data) != crc:
        return None
    return RecordHead(position, size, first, time_ns, sequence, count, source_size, publisher_size)


class Scan(NamedTuple):
    """What's in a segment: up to where it's good, what comes after its last event, and whether what's after that was once whole."""

    end: int
    next_offset: int
    last_time_ns: int
    damaged: bool


def scan_segment(segment: Segment, since: int, table: OrderedDict[bytes, tuple[int, int]]) -> Scan:
    """Go through all records, and note in ``table`` (publisher → last sequence number, offset after it) what's at ``since`` or after."""
    fd = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _scan(fd, segment, since, table)
    finally:
        os.close(fd)


def _scan(fd: int, segment: Segment, since: int, table: OrderedDict[bytes, tuple[int, int]]) -> Scan:
    position, end = HEAD_SIZE, segment.size
    wanted, last_time = segment.first_offset, segment.first_time_ns
    base, data = 0, b""
    while position < end:
        # Most records lie whole in what was read last; the others are looked at on their own.
        at = position - base
        size = int.from_bytes(data[at : at + 4], "little") if len(data) - at >= RECORD_SIZE else 0
        if size < RECORD_SIZE or size > len(data) - at:
            base, data, at = position, os.pread(fd, SCAN_BYTES, position), 0
        record = _record_in(data, at, position) or check_record(fd, position, end)
        if record is None or record.first_offset < wanted:
            after = next_good(fd, position, end, wanted)
            if after is None:
                return Scan(position, wanted, last_time, not _is_torn(fd, position, end))
            position = after
            continue
        wanted = record.first_offset + record.events
        last_time = record.time_ns
        if wanted > since and record.publisher_size:
            start = position + RECORD_SIZE + record.source_size
            publisher = data[start - base : start - base + record.publisher_size]
            if len(publisher) < record.publisher_size:
                publisher = os.pread(fd, record.publisher_size, start)
            table[publisher] = (record.last_sequence, wanted)
            table.move_to_end(publisher)
        position += record.size
    return Scan(position, wanted, last_time, False)


def _record_in(data: bytes, at: int, position: int) -> RecordHead | None:
    """As ``check_record``, of a record that lies in ``data`` as a whole; None if it doesn't."""
    if len(data) - at < RECORD_SIZE:
        return None
    size, crc, first, time_ns, sequence, count, source_size, publisher_size = RECORD.unpack_from(data, at)
    if size < RECORD_SIZE + source_size + publisher_size or size > len(data) - at or not count:
        return None
    if crc32(memoryview(data)[at + CHECKED_FROM : at + size]) != crc:
        return None
    return RecordHead(position, size, first, time_ns, sequence, count, source_size, publisher_size)


def next_good(fd: int, position: int, end: int, wanted: int) -> int | None:
    """Where the record after a bad one is, if the bad one's size can be believed: that is, if a good one begins there."""
    head = os.pread(fd, 4, position)
    size = int.from_bytes(head, "little")
    if len(head) < 4 or size < RECORD_SIZE or size >= end - position:
        return None
    after = check_record(fd, position + size, end)
    return after.position if after is not None and after.first_offset >= wanted else None


def _is_torn(fd: int, position: int, end: int) -> bool:
    """Whether what's at the end is the beginning of a record whose rest was never written: nobody was told of it then.

    Both the record's size and those of its events must say that there was to be more: one of them may be what's wrong.
    """
    data = os.pread(fd, end - position, position)
    if len(data) < RECORD_SIZE:
        return True
    whole: int = RECORD.unpack_from(data)[0]
    if whole <= len(data):
        return False
    count: int = RECORD.unpack_from(data)[5]
    at: int = RECORD_SIZE + data[RECORD_SIZE - 4] + data[RECORD_SIZE - 3]
    while count and len(data) - at >= 4:
        size = int.from_bytes(data[at : at + 4], "little")
        if size < 4:
            return False
        at += size
        count -= 1
    return at > len(data) or count > 0


class State(NamedTuple):
    """What the journal knows of itself beyond its segments.

    ``reserved``: no offset from here on was ever given out. ``next_offset`` and ``time_ns`` are exact if ``clean``, else a lower bound.
    """

    journal_id: bytes
    boot_id: bytes
    generation: int
    next_offset: int
    reserved: int
    time_ns: int
    clean: bool


class StateFile:
    """The two slots. It's also what the journal is locked by: one process has it open at a time."""

    def __init__(self, path: Path) -> None:
        """Raises ``JournalError`` if another has it open, ``OSError``."""
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            os.close(self.fd)
            raise JournalError(f"the journal in '{path.parent}' is in use by another broker", e.errno or 0) from e

    def read(self) -> State | None:
        """The newest whole slot. Raises ``JournalError`` if another version wrote it."""
        newest: State | None = None
        doubtful = False
        for slot in range(2):
            data = os.pread(self.fd, _STATE.size, slot * _SLOT_SIZE).ljust(_STATE.size, b"\0")
            magic, crc, version, journal_id, boot_id, generation, next_offset, reserved, time_ns, clean = _STATE.unpack(
                data
            )
            if magic != _STATE_MAGIC or crc != crc32(data[_STATE.size - _STATE_REST.size :]):
                doubtful = doubtful or data.strip(b"\0") != b""
                continue
            if version != VERSION:
                raise JournalError(
                    f"the journal was written by another version of pyx (format {version}, not {VERSION})"
                )
            state = State(journal_id, boot_id, generation, next_offset, reserved, time_ns, bool(clean))
            if newest is None or state.generation > newest.generation:
                newest = state
        if newest is not None and doubtful:  # the other one may have been newer, by one writing
            newest = newest._replace(boot_id=bytes(36), reserved=newest.reserved + RESERVE_MAX, clean=False)
        return newest

    def write(self, state: State, *, sync: bool) -> None:
        """Raises ``OSError``; what was there before is then still there."""
        rest = _STATE_REST.pack(VERSION, *state)
        write_all(self.fd, _STATE_MAGIC + crc32(rest).to_bytes(4, "little") + rest, state.generation % 2 * _SLOT_SIZE)
        if sync:
            os.fdatasync(self.fd)

    def close(self) -> None:
        os.close(self.fd)


def write_table(path: Path, journal_id: bytes, offset: int, table: OrderedDict[bytes, tuple[int, int]]) -> None:
    """Replace the table of publishers, which holds up to ``offset``. Raises ``OSError``."""
    entries = b"".join(_TABLE_ENTRY.pack(*value, len(publisher)) + publisher for publisher, value in table.items())
    rest = _TABLE_REST.pack(VERSION, journal_id, offset, len(table)) + entries
    new = path.with_suffix(".new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        write_all(fd, _TABLE_MAGIC + crc32(rest).to_bytes(4, "little") + rest, 0)
        os.fdatasync(fd)
    except OSError:
        os.unlink(new)
        raise
    finally:
        os.close(fd)
    os.rename(new, path)


def read_table(path: Path, journal_id: bytes) -> tuple[int, OrderedDict[bytes, tuple[int, int]]]:
    """The offset up to which it holds, and the table; (0, empty) if there's none that can be trusted."""
    table: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return 0, table
    if len(data) < _TABLE.size:
        return 0, table
    magic, crc, version, owner, offset, count = _TABLE.unpack_from(data)
    if (
        magic != _TABLE_MAGIC
        or version != VERSION
        or owner != journal_id
        or crc != crc32(data[_TABLE.size - _TABLE_REST.size :])
    ):
        return 0, table
    at = _TABLE.size
    for _ in range(count):
        sequence, after, size = _TABLE_ENTRY.unpack_from(data, at)
        at += _TABLE_ENTRY.size
        table[data[at : at + size]] = (sequence, after)
        at += size
    return offset, table


def write_all(fd: int, data: bytes, position: int) -> None:
    """``pwrite`` of all of it. Raises ``OSError``, also where a file system that's full takes a part."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:] if done else data, position + done)


def synchronise(path: Path) -> None:
    """fdatasync; a file that's gone meanwhile needs none. Raises ``OSError``."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def failed(what: str, error: OSError) -> JournalError:
    return JournalError(f"{what}: {(error.strerror or str(error)).lower()}", error.errno or 0)
