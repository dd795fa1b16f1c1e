"""Opening the journal of events: what's there, how far it's good, and where offsets go on.

- What a crash of the broker left of a record it hadn't finished is cut off; nobody was told of it, so its offset is given out again.
- After a power cut (another boot, and not closed), or when more than that was cut off, offsets that were given out may be gone. The
  journal goes on where none ever was: at the state's ``reserved``.
- A file that isn't a segment of this journal is set aside as ``.bad``.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from logging import getLogger
from pathlib import Path
from typing import NamedTuple

from .segment import (
    HEAD_SIZE,
    SUFFIX,
    Scan,
    Segment,
    State,
    load_segment,
    read_table,
    scan_segment,
    synchronise,
)

_log = getLogger(__name__)

# The state was lost, so nobody knows what was given out: more than any broker appends between two synchronisations.
_UNKNOWN = 1 << 32


class Recovered(NamedTuple):
    """What was found. ``state`` is as it's to be from now on; the last of ``segments`` is to be written on if ``go_on``."""

    state: State
    segments: list[Segment]
    publishers: OrderedDict[bytes, tuple[int, int]]
    go_on: bool


def recover(directory: Path, state: State | None, boot_id: str) -> Recovered:
    """Make good what's in ``directory``. Raises ``JournalError``: of another version; ``OSError``."""
    segments, journal_id, unreadable = _find(directory, state.journal_id if state is not None else b"")
    table_offset, publishers = read_table(directory / "publishers", journal_id)
    scan = _scan(segments, table_offset, publishers)
    boot = boot_id.encode()[:36].ljust(36, b"\0")
    if state is None:
        next_offset, time_ns = scan.next_offset, scan.last_time_ns
        if segments or unreadable:
            _log.error("the journal's state is lost: it goes on at an offset that can't have been given out yet")
            next_offset += _UNKNOWN
        generation = 0
    else:
        next_offset, time_ns = max(scan.next_offset, state.next_offset), max(scan.last_time_ns, state.time_ns)
        generation = state.generation
        if not state.clean:
            if state.boot_id != boot or scan.damaged or unreadable:
                _log.warning("a power cut or the disk may have taken events, from offset %d on", next_offset)
                next_offset = max(next_offset, state.reserved)
            for segment in segments:  # whoever wrote them didn't come to it
                synchronise(segment.path)
    go_on = bool(segments) and segments[-1].size > HEAD_SIZE and next_offset == scan.next_offset
    if segments and segments[-1].size == HEAD_SIZE:  # its name may not be where the next event belongs
        segments.pop().path.unlink()
    after = State(journal_id, boot, generation, next_offset, next_offset, time_ns, clean=False)
    return Recovered(after, segments, publishers, go_on)


def _find(directory: Path, journal_id: bytes) -> tuple[list[Segment], bytes, bool]:
    """The segments, the journal's identity (a new one if nothing says it), and whether the newest file is unreadable."""
    segments = []
    unreadable = False
    for path in sorted(directory.glob("*" + SUFFIX)):
        found = load_segment(path)
        if found is not None:
            journal_id = journal_id or found[0]
        if found is None or found[0] != journal_id:
            unreadable = _set_aside(path)
            continue
        unreadable = False
        segments.append(found[1])
    return segments, journal_id or os.urandom(8).hex().encode(), unreadable


def _set_aside(path: Path) -> bool:
    """A file that isn't ours or whose head is damaged: never read, never in the way. Whether there may be events in it."""
    if path.stat().st_size <= HEAD_SIZE:
        path.unlink()
        return False
    _log.error("%s isn't a segment of this journal, or is damaged: set aside as %s.bad", path.name, path.name)
    path.rename(path.with_name(path.name + ".bad"))
    return True


def _scan(segments: list[Segment], table_offset: int, publishers: OrderedDict[bytes, tuple[int, int]]) -> Scan:
    """Find the end of the newest segment and cut off what isn't good there; read what the table of publishers doesn't have."""
    scan = Scan(0, 1, 0, False)
    for index, segment in enumerate(segments):
        last = index == len(segments) - 1
        if not last and segments[index + 1].first_offset <= table_offset:
            continue
        try:
            scan = scan_segment(segment, table_offset, publishers)
        except OSError as e:
            if e.errno != errno.EIO:
                raise
            _log.error("%s can't be read: %s", segment.path.name, e.strerror)
            scan = Scan(segment.size, segment.first_offset, segment.first_time_ns, True)
        if last and scan.end < segment.size:
            _log.warning("cut %d bytes off the end of %s", segment.size - scan.end, segment.path.name)
            os.truncate(segment.path, scan.end)
            segment.size = scan.end
    return scan
