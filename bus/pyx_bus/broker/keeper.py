"""What the journal of events does beside its events: keep its state, bring it to the disk, remove what's too old.

One thread does what takes milliseconds (fdatasync, unlink), so that an append doesn't wait for a disk. It's started when there's
something to do. The journal's thread only sets what's to be done and wakes it; the order is: first the mark, then the event.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from logging import getLogger
from pathlib import Path
from threading import Event, Lock, Thread

from .segment import RESERVE_MAX, Segment, State, StateFile, synchronise, write_table

_log = getLogger(__name__)

# Offsets are reserved at least this far ahead; farther, up to RESERVE_MAX, while they're used up in less than two seconds.
RESERVE = 65_536

Table = OrderedDict[bytes, tuple[int, int]]


class Keeper:
    """``reserved``: offsets below it may be given out. ``low``: it's to be woken, by `hurry`, when the next offset has reached this."""

    def __init__(
        self,
        directory: Path,
        state_file: StateFile,
        state: State,
        interval_s: float,
        progress: Callable[[], tuple[int, int, Segment | None]],
    ) -> None:
        """``progress`` tells the next offset, the time of the last event, and the segment that's written. Raises ``OSError``."""
        self._directory = directory
        self._file = state_file
        self._id = state.journal_id
        self._boot_id = state.boot_id
        self._generation = state.generation
        self._interval_s = interval_s
        self._progress = progress
        self._sealed: deque[Path] = deque()
        self._doomed: deque[Path] = deque()
        self._table: tuple[int, Table] | None = None
        self._listed = 0  # the segment whose name is known to be on the disk
        self._work = Event()
        self._hurry = Event()
        self._closing = False
        self._failing = False
        self._thread: Thread | None = None
        self._lock = Lock()  # of the state
        self._block = RESERVE
        self._extended_at = 0.0
        self.dirty = False
        self._write_state(state.next_offset + RESERVE, sync=True)
        self._set_reserved(state.next_offset + RESERVE)

    # What's to be done

    def touched(self) -> None:
        """There's an event that isn't on the disk. To be called if it isn't ``dirty``."""
        self.dirty = True
        self._wake()

    def seal(self, path: Path, offset: int, table: Table) -> None:
        """A segment is full; ``table`` says what publishers have published up to ``offset``."""
        self._sealed.append(path)
        self._table = (offset, table)
        self.hurry()

    def doom(self, path: Path) -> None:
        """Remove a file, soon."""
        self._doomed.append(path)

    @property
    def doomed(self) -> int:
        """How many files wait to be removed."""
        return len(self._doomed)

    def hurry(self) -> None:
        """Do now what's to be done."""
        if not self._hurry.is_set():
            self._hurry.set()
            self._wake()

    def _wake(self) -> None:
        if self._thread is None:  # not before there's something to do: a process with threads can't fork
            self._thread = Thread(target=self._run, name="journal", daemon=True)
            self._thread.start()
        self._work.set()

    # Doing it

    def _run(self) -> None:
        while not self._closing:
            self._work.wait()
            self._hurry.wait(self._interval_s)
            self._work.clear()
            self._hurry.clear()
            try:
                self._once()
            except OSError as e:
                if not self._failing:
                    _log.error("can't put the journal of events on the disk, will try again: %s", e)
                self._failing = True
                self.dirty = True
                self._work.set()
            else:
                self._failing = False

    def _once(self) -> None:
        """Raises ``OSError``, the first that comes; the rest is done next time."""
        self.dirty = False
        next_offset, _, active = self._progress()
        if next_offset >= self.low:
            self.extend(next_offset)
        # What's only in a segment that goes must be in the table before: of each that's doomed now, a table was made when it was sealed.
        doomed = len(self._doomed)
        table, self._table = self._table, None
        try:
            if table is not None:
                write_table(self._directory / "publishers", self._id, *table)
        except OSError:
            self._table = self._table or table
            raise
        finally:  # if there's no room for it, this makes some
            self.unlink(doomed)
        directory = bool(self._sealed)
        while self._sealed:
            synchronise(self._sealed.popleft())
        if active is not None:
            synchronise(active.path)
            directory = directory or active.first_offset != self._listed
        if directory:
            synchronise(self._directory)
            self._listed = active.first_offset if active is not None else 0

    def settle(self, table: Table) -> None:
        """Write the table and remove what's doomed, at once."""
        try:
            write_table(self._directory / "publishers", self._id, self._progress()[0], table)
        except OSError as e:
            _log.error("can't write the journal's table of publishers: %s", e)
        self.unlink(len(self._doomed))

    def unlink(self, count: int) -> bool:
        """Remove the first ``count`` of what's doomed, at once. Whether there was anything."""
        any_there = False
        for _ in range(count):
            try:
                path = self._doomed.popleft()
            except IndexError:  # the other thread was quicker
                break
            try:
                path.unlink(missing_ok=True)
                any_there = True
            except OSError as e:
                _log.error("can't remove an old segment of the journal of events: %s", e)
        return any_there

    # The state

    def extend(self, at_least: int) -> None:
        """Let offsets go on, after the disk knows of it. Raises ``OSError``: then they don't."""
        with self._lock:
            if at_least <= self.reserved and at_least < self.low:
                return  # the other thread was quicker
            now = time.monotonic()
            self._block = min(self._block * 2, RESERVE_MAX) if now - self._extended_at < 2 else RESERVE
            self._extended_at = now
            reserved = at_least + self._block
            self._write_state(reserved, sync=True)
            self._set_reserved(reserved)

    def _set_reserved(self, reserved: int) -> None:
        self.low = reserved - self._block // 2
        self.reserved = reserved

    def save(self) -> bool:
        """Write down how far offsets have got, when no segment is to say it any more. Whether that went well."""
        with self._lock:
            try:
                self._write_state(self.reserved, sync=False)
            except OSError as e:
                _log.error("can't write the journal's state: %s", e)
                return False
            return True

    def _write_state(self, reserved: int, *, sync: bool, clean: bool = False) -> None:
        self._generation += 1
        next_offset, time_ns, _ = self._progress()
        state = State(self._id, self._boot_id, self._generation, next_offset, reserved, time_ns, clean)
        self._file.write(state, sync=sync)

    def close(self, table: Table) -> None:
        """Put everything on the disk, and say that it's all there. ``table``: what publishers have published."""
        self._closing = True
        if self._thread is not None:
            self._hurry.set()
            self._work.set()
            self._thread.join()
        try:
            self._once()
            write_table(self._directory / "publishers", self._id, self._progress()[0], table)
            self._write_state(self.reserved, sync=True, clean=True)
        except OSError as e:
            _log.error("can't put the journal of events on the disk: %s", e)
