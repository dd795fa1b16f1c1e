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

*A full disk.* The oldest segments make room, down to a quarter of what may be kept (`Limits.floor_bytes`): whoever fills the disk can't
have the history erased. Then the append fails, leaves nothing behind, and the next one tries again.

Every call is short: `append` is a checksum and a write, `read` takes about as many bytes as asked for. Not for several threads.
keeper.py has the thread and the state, recovery.py what happens when a journal is opened.
"""

from __future__ import annotations

import errno
import os
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable
from logging import getLogger
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from .keeper import Keeper
from .recovery import recover
from .segment import (
    CHECKED_FROM,
    HEAD_SIZE,
    RECORD,
    RECORD_REST,
    RECORD_SIZE,
    JournalError,
    Segment,
    StateFile,
    create_segment,
    failed,
    next_good,
)

__all__ = ["Cursor", "Hole", "Journal", "JournalError", "Limits", "Record"]

_log = getLogger(__name__)

# Publishers whose last sequence number is kept; those that haven't published for longest go.
MAX_PUBLISHERS = 65_536
# Descriptors of old segments kept open for readers.
_OPEN_SEGMENTS = 16
_READ_AT_LEAST = 4096
# What a read fails with for a while, though the events are there.
_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Limits(NamedTuple):
    """How much is kept, and how long a power cut may cost. ``max_bytes`` is for all segments, ``segment_bytes`` for one; a single
    record that's larger gets a segment of its own. An event may be kept longer than ``max_age_s`` by the time its segment spans."""

    segment_bytes: int = 8 << 20
    max_bytes: int = 256 << 20
    max_age_s: float = 30 * 86400
    sync_interval_s: float = 1.0

    @property
    def floor_bytes(self) -> int:
        """A full disk takes away what's above this; and never one of the last two segments."""
        return self.max_bytes // 4


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
        """Open the journal in ``directory``, or make it. Raises ``JournalError``: in use, unreadable, of another version."""
        if limits.segment_bytes < 1 or limits.max_bytes < 2 * limits.segment_bytes:
            raise ValueError(f"a journal has at least two segments, not {limits}")
        self.limits = limits
        self._directory = directory
        self._now_ns = now_ns
        self._segments: list[Segment] = []
        self._active: Segment | None = None
        self._open: deque[Segment] = deque()
        self._failing = False
        self._closed = False
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory.chmod(0o700)
            self._state_file = StateFile(directory / "state")
            try:
                self._load(boot_id if boot_id is not None else _boot_id())
            except BaseException:
                self._close_files()
                raise
        except OSError as e:
            raise failed(f"can't open the journal in '{directory}'", e) from e

    def _load(self, boot_id: str) -> None:
        state, self._segments, self._publishers, go_on = recover(self._directory, self._state_file.read(), boot_id)
        self._id = state.journal_id
        self.id = self._id.decode()
        self.next_offset = state.next_offset
        self.last_time_ns = state.time_ns
        self.size_bytes = sum(segment.size for segment in self._segments)
        while len(self._publishers) > MAX_PUBLISHERS:
            self._publishers.popitem(last=False)
        if go_on:
            self._active = self._segments[-1]
            self._active.fd = os.open(self._active.path, os.O_RDWR | os.O_CLOEXEC)
        self._keeper = Keeper(self._directory, self._state_file, state, self.limits.sync_interval_s, self._progress)
        self._enforce(self._now_ns(), self.limits.segment_bytes)
        self._keeper.settle(self._publishers)

    def _progress(self) -> tuple[int, int, Segment | None]:
        return self.next_offset, self.last_time_ns, self._active

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
        if after > self._keeper.reserved:
            self._reserve(after)
        if segment is None or (segment.size + size > self.limits.segment_bytes and segment.size > HEAD_SIZE):
            segment = self._roll(time_ns, size)
        try:
            written = os.pwritev(segment.fd, parts, segment.size)
        except OSError:
            written = 0
        if written != size:
            self._write_again(segment, parts, size)
        elif self._failing:
            self._failing = False
            _log.info("events can be written to the journal again")
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
        keeper = self._keeper
        if not keeper.dirty:
            keeper.touched()
        if after >= keeper.low:
            keeper.hurry()
        return first

    def _reserve(self, after: int) -> None:
        """The thread didn't come to it in time."""
        try:
            self._keeper.extend(after)
        except OSError as e:
            raise self._fail("can't reserve offsets for the journal of events", e) from e

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
                raise self._fail("can't write to the journal of events", e) from e

    def _fail(self, what: str, error: OSError) -> JournalError:
        """The error for the publisher; logged once until it works again."""
        failure = failed(what, error)
        if not self._failing:
            self._failing = True
            _log.error("%s; publishers will try again", failure)
        return failure

    def _make_room(self) -> bool:
        """Give up the oldest segment, if enough is kept without it. What takes the room is mostly somebody else's."""
        if self._keeper.unlink(self._keeper.doomed):
            return True
        if len(self._segments) <= 2 or self.size_bytes - self._segments[0].size < self.limits.floor_bytes:
            return False
        _log.warning("the disk is full: the journal gives up its oldest events, %s", self._segments[0].path.name)
        if not self._remove(self._segments[0]):
            return False
        self._keeper.unlink(self._keeper.doomed)
        return True

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
                    raise self._fail("can't begin a new segment of the journal of events", e) from e
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
        self._keeper.seal(segment.path, self.next_offset, self._publishers.copy())

    def _remove(self, segment: Segment) -> bool:
        """Give up a segment that isn't written any more. False if it has to stay."""
        if len(self._segments) == 1 and not self._keeper.save():
            return False  # it's what says how far offsets have got
        segment.close()
        segment.removed = True
        self._segments.remove(segment)
        self.size_bytes -= segment.size
        self._keeper.doom(segment.path)
        return True

    def expire(self, now_ns: int) -> None:
        """Remove the oldest segments that are over the limits of size and age. To be called every minute or so."""
        if self._active is not None and self._active.first_time_ns < now_ns - int(self.limits.max_age_s * 1e9):
            self._seal()
        if self._enforce(now_ns, self.limits.segment_bytes):
            self._keeper.hurry()

    def _enforce(self, now_ns: int, room: int) -> bool:
        """Give up old segments until the others are within the limits, with ``room`` set aside for the active one. Whether any went."""
        had = len(self._segments)
        too_old = now_ns - int(self.limits.max_age_s * 1e9)
        while self._segments and self._segments[0] is not self._active:
            # A segment's last event isn't younger than the next one's first.
            last_time = self._segments[1].first_time_ns if len(self._segments) > 1 else self.last_time_ns
            active = self._active.size if self._active is not None else 0
            if last_time >= too_old and self.size_bytes - active <= self.limits.max_bytes - room:
                break
            if not self._remove(self._segments[0]):
                break
        publishers, oldest = self._publishers, self.oldest_offset
        while publishers and next(iter(publishers.values()))[1] <= oldest and len(publishers) > 1024:
            publishers.popitem(last=False)
        return len(self._segments) < had

    # Reading

    def tail(self) -> Cursor:
        """Where the next event will be."""
        segment = self._segments[-1] if self._segments else None
        return Cursor(self.next_offset, segment, segment.size if segment is not None else 0)

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

        Nothing at the end (``cursor.at_end``), and also when that much was looked through without finding what's wanted, or the process
        has no descriptor left: to be called again.
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
        try:
            data = self._data(segment, position, min(room, max(budget, _READ_AT_LEAST)))
            if len(data) >= 4 and len(data) < (size := int.from_bytes(data[:4], "little")) <= room:
                data = self._data(segment, position, size)
        except OSError as e:
            if e.errno in _SCARCE:
                return budget  # nothing is lost: the reader comes again
            self._damaged(segment, f"can't be read: {e.strerror}", cursor)
            cursor._position = segment.size
            return budget
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
        self._damaged(segment, f"is damaged at byte {position}", cursor)
        try:
            good = next_good(segment.fd, position, segment.size, segment.first_offset)
        except OSError:
            good = None
        cursor._position = segment.size if good is None else good
        return length

    def _data(self, segment: Segment, position: int, size: int) -> bytes:
        """Some of a segment, which is opened if it isn't. Raises ``OSError``."""
        if segment.fd < 0:
            while len(self._open) >= _OPEN_SEGMENTS:
                self._open.popleft().close()
            segment.fd = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC)
            self._open.append(segment)
        return os.pread(segment.fd, size, position)

    def _damaged(self, segment: Segment, what: str, cursor: Cursor) -> None:
        """Told of once, however many read it."""
        if not segment.damaged:
            segment.damaged = True
            _log.error("%s %s: events from offset %d on are lost", segment.path.name, what, cursor.offset)

    def close(self) -> None:
        """Put everything on the disk, and say that it's all there. Closing it again does nothing."""
        if not self._closed:
            self._closed = True
            self._keeper.close(self._publishers)
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


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
