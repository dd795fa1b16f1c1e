"""The journal of events on disk: offsets that only grow, across restarts, crashes and power cuts.

*Files* (segment.py says what's in them): events are appended to the newest segment; when it's full a new one begins, and the oldest
go when the whole is larger or older than `Limits` say. Only whole segments go, never the one that's written.

*What's sure.* `append` returns when the kernel has the events (one write), and the broker tells nobody of them before that: what was
acknowledged survives the broker's being killed at any moment. A record that was written in part is cut off when the journal is opened.
Every record carries a checksum, so that what a disk got wrong is never read as an event; it's a `Hole`.

*Power cuts.* A thread calls fdatasync `sync_interval_s` after the first event that isn't on the disk yet, and at once when a segment is
full or the journal is closed. A power cut costs at most what was acknowledged since the last of these that came to its end began; on
a disk that keeps up, that's the last `sync_interval_s`. Offsets that were lost so are never given out again: how far they may go is on
the disk before they get there (`State.reserved`), and after a power cut the journal goes on from there. Readers get a `Hole` for what's
between.

*A full disk.* The oldest segments make room; if there's none left, the append fails, leaves nothing behind, and the next one tries again.

Every call is short: `append` is a checksum and a write, `read` takes about as many bytes as asked for. Not for several threads.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from bisect import bisect_left, bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable
from logging import getLogger
from pathlib import Path
from threading import Event, Lock, Thread
from typing import NamedTuple
from zlib import crc32

from .segment import (
    CHECKED_FROM,
    HEAD_SIZE,
    RECORD,
    RECORD_REST,
    RECORD_SIZE,
    SUFFIX,
    JournalError,
    Scan,
    Segment,
    State,
    StateFile,
    create_segment,
    load_segment,
    next_good,
    read_table,
    scan_segment,
    write_table,
)

__all__ = ["Cursor", "Hole", "Journal", "JournalError", "Limits", "Record"]

_log = getLogger(__name__)

# Publishers whose last sequence number is kept; those that haven't published for longest go.
MAX_PUBLISHERS = 65_536
# Offsets are reserved at least this far ahead; farther, up to the second, while they're used up in less than two seconds.
_RESERVE = 65_536
_RESERVE_MAX = 1 << 22
# The state was lost, so nobody knows what was given out: more than any broker appends between two synchronisations.
_RESERVE_UNKNOWN = 1 << 32
# Descriptors of old segments kept open for readers.
_OPEN_SEGMENTS = 16
_READ_AT_LEAST = 4096


class Limits(NamedTuple):
    """How much is kept, and how long a power cut may cost. ``max_bytes`` is for all segments, ``segment_bytes`` for one; a single
    record that's larger gets a segment of its own. An event may be kept longer than ``max_age_s`` by the time its segment spans."""

    segment_bytes: int = 8 << 20
    max_bytes: int = 256 << 20
    max_age_s: float = 30 * 86400
    sync_interval_s: float = 1.0


class Record:
    """Events that were appended in one go, or the end of them. ``frames``: ``count`` PUBLISH frames as they were given."""

    __slots__ = ("count", "first_offset", "frames", "source", "time_ns")

    def __init__(self, first_offset: int, count: int, time_ns: int, source: bytes, frames: bytes) -> None:
        self.first_offset = first_offset
        self.count = count
        self.time_ns = time_ns
        self.source = source
        self.frames = frames

    def __repr__(self) -> str:
        return f"<Record {self.first_offset}+{self.count} from {self.source!r}, {len(self.frames)} bytes>"


class Hole:
    """Offsets whose events aren't there any more: ``lost`` is how many at most (after a power cut some were never given out)."""

    __slots__ = ("first_offset", "last_offset")

    def __init__(self, first_offset: int, last_offset: int) -> None:
        self.first_offset = first_offset
        self.last_offset = last_offset

    @property
    def lost(self) -> int:
        return self.last_offset - self.first_offset + 1

    def __repr__(self) -> str:
        return f"<Hole {self.first_offset}..{self.last_offset}>"


class Cursor:
    """Where a reader is. ``offset`` is the next event it wants; ``at_end``: the last `read` gave all there was."""

    __slots__ = ("_position", "_segment", "_since_ns", "at_end", "offset")

    def __init__(self, offset: int, segment: Segment | None = None, position: int = 0, since_ns: int = 0) -> None:
        self.offset = offset
        self.at_end = False
        self._segment = segment
        self._position = position
        self._since_ns = since_ns


class Journal:
    """Attributes: ``id`` names the journal (offsets of two can't be compared), ``next_offset`` is what the next event gets,
    ``last_time_ns`` the time of the last: it never goes back."""

    def __init__(
        self,
        directory: Path,
        limits: Limits = Limits(),  # noqa: B008 - it's immutable
        *,
        boot_id: str | None = None,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """Open the journal in ``directory``, or make it. Raises ``JournalError``: in use, unreadable, of a newer version."""
        if limits.segment_bytes < 1 or limits.max_bytes < 2 * limits.segment_bytes:
            raise ValueError(f"a journal has at least two segments, not {limits}")
        self.limits = limits
        self._directory = directory
        self._now_ns = now_ns
        self._boot_id = (boot_id if boot_id is not None else _boot_id()).encode()[:36].ljust(36, b"\0")
        self._segments: list[Segment] = []
        self._active: Segment | None = None
        self._open: deque[Segment] = deque()
        self._publishers: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        self.size_bytes = 0
        self.last_time_ns = 0
        # What the thread is to do; each is set before the events that wake it.
        self._dirty = False
        self._sealed: deque[Path] = deque()
        self._doomed: deque[Path] = deque()
        self._table: tuple[int, OrderedDict[bytes, tuple[int, int]]] | None = None
        self._work = Event()
        self._hurry = Event()
        self._closing = False
        self._closed = False
        self._thread: Thread | None = None
        self._listed = 0  # the segment whose name is known to be on the disk
        self._state_lock = Lock()
        self._reserve = _RESERVE
        self._reserved_at = 0.0
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
            self._state_file = StateFile(directory / "state")
        except OSError as e:
            raise _failed(f"can't open the journal in '{directory}'", e) from e
        try:
            self._load()
        except BaseException as e:
            self._close_files()
            if isinstance(e, OSError):
                raise _failed(f"can't open the journal in '{directory}'", e) from e
            raise

    # Opening

    def _load(self) -> None:
        state = self._state_file.read()
        journal_id = state.journal_id if state is not None else b""
        unreadable = False  # the newest file
        for path in sorted(self._directory.glob("*" + SUFFIX)):
            found = load_segment(path)
            if found is not None:
                journal_id = journal_id or found[0]
            if found is None or found[0] != journal_id:
                unreadable = self._set_aside(path)
                continue
            unreadable = False
            self._segments.append(found[1])
        self._id = journal_id or secrets.token_hex(8).encode()
        self.id = self._id.decode()
        table_offset, self._publishers = read_table(self._directory / "publishers", self._id)
        scan = self._scan(table_offset)
        next_offset = max(scan.next_offset, state.next_offset if state is not None else 1)
        self.last_time_ns = max(scan.last_time_ns, state.time_ns if state is not None else 0)
        if state is None:
            if self._segments or unreadable:
                _log.error("the journal's state is lost; it goes on at an offset that can't have been given out yet")
                next_offset += _RESERVE_UNKNOWN
        elif not state.clean and (state.boot_id != self._boot_id or scan.damaged or unreadable):
            _log.warning("events may be lost that a power cut or the disk took: offsets %d to %d", next_offset, state.reserved - 1)
            next_offset = max(next_offset, state.reserved)
        if self._segments and not self._drop_empty() and next_offset == scan.next_offset:
            self._active = self._segments[-1]
            self._active.fd = os.open(self._active.path, os.O_RDWR | os.O_CLOEXEC)
        self.next_offset = next_offset
        self._reserved = next_offset
        self._generation = state.generation if state is not None else 0
        if state is not None and not state.clean:
            for segment in self._segments:  # whoever wrote them didn't come to it
                _sync(segment.path)
        self._enforce(self._now_ns(), self.limits.segment_bytes)
        self._unlink_doomed()
        self._write_state(next_offset + self._reserve, sync=True)
        self._reserved = next_offset + self._reserve

    def _scan(self, table_offset: int) -> Scan:
        """Find the end of the newest segment and cut off what isn't good there; read what the table of publishers doesn't have."""
        scan = Scan(0, 1, 0, False)
        for index, segment in enumerate(self._segments):
            last = index == len(self._segments) - 1
            if last or self._segments[index + 1].first_offset > table_offset:
                scan = scan_segment(segment, table_offset, self._publishers)
            if not last:
                self.size_bytes += segment.size
                continue
            if scan.end < segment.size:
                _log.warning("cut %d bytes off the end of %s", segment.size - scan.end, segment.path.name)
                os.truncate(segment.path, scan.end)
                segment.size = scan.end
            self.size_bytes += segment.size
        while len(self._publishers) > MAX_PUBLISHERS:
            self._publishers.popitem(last=False)
        return scan

    def _drop_empty(self) -> bool:
        """Remove the newest segment if there's nothing in it; the one before it isn't written any more."""
        empty = self._segments[-1].size == HEAD_SIZE
        if empty:
            self._remove(self._segments[-1])
        return empty

    def _set_aside(self, path: Path) -> bool:
        """A file that isn't ours or whose head is damaged: never read, never in the way. Whether there were events in it."""
        if path.stat().st_size <= HEAD_SIZE:
            path.unlink()
            return False
        _log.error("%s isn't a segment of this journal, or is damaged: set aside as %s.bad", path.name, path.name)
        path.rename(path.with_name(path.name + ".bad"))
        return True

    # What's there

    @property
    def oldest_offset(self) -> int:
        """The oldest event still here, or the next one's offset if there's none."""
        return self._segments[0].first_offset if self._segments else self.next_offset

    @property
    def first_time_ns(self) -> int:
        """The time of the oldest event still here; 0 if there's none."""
        return self._segments[0].first_time_ns if self._segments else 0

    @property
    def segment_count(self) -> int:
        return len(self._segments)

    def published(self, publisher: bytes) -> tuple[int, int]:
        """The sequence number of the last event kept of this publisher, and the offset after that event; (0, 0) if it isn't known."""
        return self._publishers.get(publisher, (0, 0))

    # Writing

    def append(
        self, source: bytes, publisher: bytes, frames: bytes | memoryview, count: int, last_sequence: int, time_ns: int
    ) -> int:
        """Keep ``count`` events, whose PUBLISH frames are ``frames``; the offset of the first.

        Their time is ``last_time_ns`` afterwards. Raises ``JournalError``: nothing of them was kept.
        """
        first = self.next_offset
        after = first + count
        time_ns = max(time_ns, self.last_time_ns)
        rest = RECORD_REST.pack(first, time_ns, last_sequence, count, len(source), len(publisher)) + source + publisher
        size = CHECKED_FROM + len(rest) + len(frames)
        crc = crc32(frames, crc32(rest))
        parts = (size.to_bytes(4, "little") + crc.to_bytes(4, "little") + rest, frames)
        segment = self._active
        if after > self._reserved:
            self._extend_reserve(after)
        if segment is None or (segment.size + size > self.limits.segment_bytes and segment.size > HEAD_SIZE):
            segment = self._roll(time_ns, size)
        try:
            written = os.pwritev(segment.fd, parts, segment.size)
        except OSError:
            written = 0
        if written != size:
            self._write_again(segment, parts, size)
        segment.size += size
        self.size_bytes += size
        self.next_offset = after
        self.last_time_ns = time_ns
        if publisher:
            publishers = self._publishers
            publishers[publisher] = (last_sequence, after)
            publishers.move_to_end(publisher)
            if len(publishers) > MAX_PUBLISHERS:
                publishers.popitem(last=False)
        if not self._dirty:
            self._dirty = True
            self._wake()
        if self._reserved - after < self._reserve >> 1 and not self._hurry.is_set():
            self._hurry.set()
            self._work.set()
        return first

    def _write_again(self, segment: Segment, parts: tuple[bytes, bytes | memoryview], size: int) -> None:
        """The write failed or took only a part: mostly a full disk. Make room and try again, or cut off what was written."""
        data = b"".join(parts)
        done = 0
        while done < size:
            try:
                done += os.pwrite(segment.fd, data[done:], segment.size + done)
            except OSError as e:
                if e.errno in (errno.ENOSPC, errno.EDQUOT) and self._make_room():
                    continue
                try:
                    os.ftruncate(segment.fd, segment.size)
                except OSError as again:  # the next record goes over it all the same
                    _log.error("can't cut a record off that was written in part: %s", again)
                raise _failed("can't write to the journal of events", e) from e

    def _make_room(self) -> bool:
        """Give up the oldest segment, if that isn't the one that's written."""
        if self._unlink_doomed():
            return True
        if not self._segments or self._segments[0] is self._active:
            return False
        _log.warning("the disk is full: the journal gives up its oldest events, %s", self._segments[0].path.name)
        self._remove(self._segments[0])
        return self._unlink_doomed()

    def _roll(self, time_ns: int, size: int) -> Segment:
        """Begin a new segment, with room for a record of ``size`` bytes. Raises ``JournalError``."""
        self._seal()
        self._enforce(self._now_ns(), max(self.limits.segment_bytes, HEAD_SIZE + size))
        while True:
            try:
                segment = create_segment(self._directory, self._id, self.next_offset, time_ns)
                break
            except OSError as e:
                if e.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._make_room():
                    raise _failed("can't begin a new segment of the journal of events", e) from e
        self._segments.append(segment)
        self._active = segment
        self.size_bytes += segment.size
        return segment

    def _seal(self) -> None:
        """The active segment is full, or too old: it's only read from now on."""
        segment, self._active = self._active, None
        if segment is None:
            return
        segment.close()
        self._sealed.append(segment.path)
        self._table = (self.next_offset, self._publishers.copy())
        self._hurry.set()
        self._wake()

    def _remove(self, segment: Segment) -> None:
        segment.close()
        segment.removed = True
        self._segments.remove(segment)
        if segment is self._active:
            self._active = None
        self.size_bytes -= segment.size
        self._doomed.append(segment.path)

    def _unlink_doomed(self) -> bool:
        """Remove the files of segments that were given up: milliseconds for each, so mostly the thread does it. Whether there were any."""
        any_there = False
        while self._doomed:
            try:
                self._doomed.popleft().unlink(missing_ok=True)
                any_there = True
            except IndexError:  # the other thread was quicker
                break
            except OSError as e:
                _log.error("can't remove an old segment of the journal of events: %s", e)
        return any_there

    def expire(self, now_ns: int) -> None:
        """Remove the oldest segments that are over the limits of size and age. To be called every minute or so."""
        if self._active is not None and self._active.first_time_ns < now_ns - int(self.limits.max_age_s * 1e9):
            self._seal()
        self._enforce(now_ns, self.limits.segment_bytes)
        if self._doomed:
            self._hurry.set()
            self._wake()

    def _enforce(self, now_ns: int, room: int) -> None:
        """Give up old segments until the others are within the limits, with ``room`` set aside for the active one."""
        had = bool(self._segments)
        too_old = now_ns - int(self.limits.max_age_s * 1e9)
        while self._segments and self._segments[0] is not self._active:
            # A segment's last event isn't younger than the next one's first.
            last_time = self._segments[1].first_time_ns if len(self._segments) > 1 else self.last_time_ns
            active = self._active.size if self._active is not None else 0
            if last_time >= too_old and self.size_bytes - active <= self.limits.max_bytes - room:
                break
            self._remove(self._segments[0])
        publishers, oldest = self._publishers, self.oldest_offset
        while publishers and next(iter(publishers.values()))[1] <= oldest and len(publishers) > 1024:
            publishers.popitem(last=False)
        if had and not self._segments:  # nothing else says now how far offsets have got
            self._save_state()

    # Reading

    def tail(self) -> Cursor:
        """Where the next event will be."""
        return self.seek(self.next_offset)

    def seek(self, offset: int) -> Cursor:
        """At an offset: one that's gone gives a `Hole` first, one that isn't there yet waits for it. 0 is the oldest there is."""
        cursor = Cursor(offset or self.oldest_offset)
        self._locate(cursor)
        return cursor

    def seek_time(self, time_ns: int) -> Cursor:
        """At the first event whose time is ``time_ns`` or later."""
        index = max(0, bisect_left(self._segments, time_ns, key=_first_time) - 1)
        if not self._segments:
            return Cursor(self.next_offset, since_ns=time_ns)
        segment = self._segments[index]
        return Cursor(segment.first_offset, segment, HEAD_SIZE, time_ns)

    def read(self, cursor: Cursor, max_bytes: int = 256 << 10) -> list[Record | Hole]:
        """What comes next, at most about ``max_bytes`` (but at least one record), and moves the cursor after it.

        Nothing at the end (``cursor.at_end``), and also when that much was looked through without finding what's wanted.
        """
        found: list[Record | Hole] = []
        cursor.at_end = False
        while max_bytes > 0:
            segment = cursor._segment
            if segment is None or segment.removed:
                segment = self._locate(cursor)
            if segment is not None and cursor._position < segment.size:
                max_bytes -= self._collect(cursor, segment, max_bytes, found)
                continue
            if segment is not None and segment is not self._segments[-1]:
                cursor._segment = self._segments[bisect_right(self._segments, segment.first_offset, key=_first_offset)]
                cursor._position = HEAD_SIZE
                continue
            if cursor.offset < self.next_offset:
                found.append(Hole(cursor.offset, self.next_offset - 1))
                cursor.offset = self.next_offset
            cursor.at_end = True
            break
        return found

    def _locate(self, cursor: Cursor) -> Segment | None:
        """Put the cursor into the segment its offset is in: at the start, or at the end if it isn't there yet."""
        index = bisect_right(self._segments, cursor.offset, key=_first_offset) - 1
        segment = self._segments[max(0, index)] if self._segments else None
        cursor._segment = segment
        cursor._position = HEAD_SIZE
        if segment is not None and cursor.offset >= self.next_offset:
            cursor._position = segment.size
        return segment

    def _collect(self, cursor: Cursor, segment: Segment, budget: int, found: list[Record | Hole]) -> int:
        """Take records from one read of a segment. How many bytes were looked through."""
        position = cursor._position
        room = segment.size - position
        fd = self._readable(segment)
        data = os.pread(fd, min(room, max(budget, _READ_AT_LEAST)), position)
        if len(data) >= 4 and len(data) < (size := int.from_bytes(data[:4], "little")) <= room:
            data = os.pread(fd, size, position)
        view = memoryview(data)
        length = len(data)
        at = 0
        while length - at >= RECORD_SIZE:
            size, crc, first, time_ns, _, count, source_size, publisher_size = RECORD.unpack_from(data, at)
            if length - at < size <= room - at and at:
                break  # not whole in what was read: next time
            names = at + RECORD_SIZE
            frames = names + source_size + publisher_size
            end = at + size
            if end > length or frames > end:
                break
            after = first + count
            if after <= cursor.offset and not cursor._since_ns:
                at = end
                continue
            if crc32(view[at + CHECKED_FROM : end]) != crc:
                break
            if time_ns < cursor._since_ns or after <= cursor.offset:
                cursor.offset = max(after, cursor.offset)
                at = end
                continue
            cursor._since_ns = 0
            if first > cursor.offset:
                found.append(Hole(cursor.offset, first - 1))
            elif first < cursor.offset:
                frames = _skip_frames(data, frames, cursor.offset - first)
                first = cursor.offset
            found.append(Record(first, after - first, time_ns, data[names : names + source_size], data[frames:end]))
            cursor.offset = after
            at = end
        if at:
            cursor._position = position + at
            return at
        # Not even the first is good: go on after it, if it can be told where that is, else after the segment.
        if not segment.damaged:
            segment.damaged = True
            _log.error("%s is damaged at byte %d: events from offset %d on are lost", segment.path.name, position, cursor.offset)
        good = next_good(fd, position, segment.size, segment.first_offset)
        cursor._position = segment.size if good is None else good
        return length

    def _readable(self, segment: Segment) -> int:
        if segment.fd < 0:
            segment.fd = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC)
            self._open.append(segment)
            if len(self._open) > _OPEN_SEGMENTS:
                self._open.popleft().close()
        return segment.fd

    # The thread, and the end

    def _wake(self) -> None:
        if self._thread is None:  # not before there's something to do: a process with threads can't fork
            self._thread = Thread(target=self._synchronise, name="journal", daemon=True)
            self._thread.start()
        self._work.set()

    def _synchronise(self) -> None:
        while not self._closing:
            self._work.wait()
            self._hurry.wait(self.limits.sync_interval_s)
            self._work.clear()
            self._hurry.clear()
            try:
                self._synchronise_once()
            except (JournalError, OSError) as e:
                _log.error("can't put the journal of events on the disk: %s", e)

    def _synchronise_once(self) -> None:
        """Raises ``JournalError`` or ``OSError``, whatever comes first; the rest is to be done next time."""
        self._dirty = False
        if self._reserved - self.next_offset < self._reserve >> 1:
            self._extend_reserve(0)
        self._unlink_doomed()
        directory = bool(self._sealed)
        while self._sealed:
            _sync(self._sealed.popleft())
        active = self._active
        if active is not None:
            _sync(active.path)
            directory = directory or active.first_offset != self._listed
        if directory:
            _sync(self._directory)
            self._listed = active.first_offset if active is not None else 0
        table, self._table = self._table, None
        if table is not None:
            write_table(self._directory / "publishers", self._id, *table)

    def _extend_reserve(self, at_least: int) -> None:
        """Let offsets go on, after the disk knows of it."""
        with self._state_lock:
            if 0 < at_least <= self._reserved:
                return
            now = time.monotonic()
            self._reserve = min(self._reserve * 2, _RESERVE_MAX) if now - self._reserved_at < 2 else _RESERVE
            self._reserved_at = now
            reserved = max(self.next_offset, at_least) + self._reserve
            try:
                self._write_state(reserved, sync=True)
            except OSError as e:
                raise _failed("can't reserve offsets for the journal of events", e) from e
            self._reserved = reserved

    def _write_state(self, reserved: int, *, sync: bool, clean: bool = False) -> None:
        self._generation += 1
        state = State(self._id, self._boot_id, self._generation, self.next_offset, reserved, self.last_time_ns, clean)
        self._state_file.write(state, sync=sync)

    def _save_state(self) -> None:
        with self._state_lock:
            try:
                self._write_state(self._reserved, sync=False)
            except OSError as e:
                _log.error("can't write the journal's state: %s", e)

    def close(self) -> None:
        """Put everything on the disk, and say that it's all there. Closing it again does nothing."""
        if self._closed:
            return
        self._closing = self._closed = True
        if self._thread is not None:
            self._hurry.set()
            self._work.set()
            self._thread.join()
        try:
            self._synchronise_once()
            write_table(self._directory / "publishers", self._id, self.next_offset, self._publishers)
            self._write_state(self._reserved, sync=True, clean=True)
        except (JournalError, OSError) as e:
            _log.error("can't put the journal of events on the disk: %s", e)
        self._close_files()

    def _close_files(self) -> None:
        for segment in self._segments:
            segment.close()
        self._state_file.close()


def _first_offset(segment: Segment) -> int:
    return segment.first_offset


def _first_time(segment: Segment) -> int:
    return segment.first_time_ns


def _skip_frames(data: bytes, start: int, count: int) -> int:
    for _ in range(count):
        start += int.from_bytes(data[start : start + 4], "little")
    return start


def _sync(path: Path) -> None:
    """fdatasync; a file that's gone meanwhile needs none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _failed(what: str, error: OSError) -> JournalError:
    return JournalError(f"{what}: {(error.strerror or str(error)).lower()}", error.errno or 0)
