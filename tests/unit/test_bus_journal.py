"""The journal of events on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyx_bus.journal import Cursor, Hole, Journal, JournalError, Limits, Record
from pyx_bus.wire import PUBLISH, encode

SMALL = Limits(segment_bytes=4096, max_bytes=16384)


def frames(first: int, count: int = 1, size: int = 20) -> bytes:
    """``count`` PUBLISH frames, whose payloads say which they are."""
    return b"".join(encode(PUBLISH, b"a.b", b"%0*d" % (size, number), arg=number) for number in range(first, first + count))


def put(journal: Journal, count: int = 1, time_ns: int = 0, size: int = 20, publisher: bytes = b"p") -> int:
    first = journal.next_offset
    return journal.append(b"src", publisher, frames(first, count, size), count, first + count - 1, time_ns or first)


def drain(journal: Journal, cursor: Cursor, max_bytes: int = 1000) -> list[Record | Hole]:
    found = journal.read(cursor, max_bytes)
    while not cursor.at_end:
        found += journal.read(cursor, max_bytes)
    return found


def offsets(found: list[Record | Hole], size: int = 20) -> list[int]:
    """All offsets, those of a hole negative; checks that each event is the one of its offset."""
    result: list[int] = []
    for item in found:
        if isinstance(item, Hole):
            result += range(-item.first_offset, -item.last_offset - 1, -1)
        else:
            assert item.source == b"src"
            assert item.frames == frames(item.first_offset, item.count, size)
            result += range(item.first_offset, item.first_offset + item.count)
    return result


def test_events_come_back_as_they_were_given_from_any_offset(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    assert (journal.next_offset, journal.oldest_offset) == (1, 1)
    assert [put(journal, 3), put(journal), put(journal, 6)] == [1, 4, 5]
    for start in range(12):
        assert offsets(drain(journal, journal.seek(start))) == list(range(max(start, 1), 11))
    journal.close()


def test_a_reader_at_the_end_gets_what_comes(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    cursor, later = journal.tail(), journal.seek(5)
    assert journal.read(cursor) == [] and cursor.at_end
    put(journal, 3)
    assert offsets(drain(journal, journal.seek(0))) == [1, 2, 3]
    assert offsets(journal.read(cursor)) == [1, 2, 3]
    assert journal.read(later) == []
    put(journal, 3)
    assert offsets(journal.read(later)) == [5, 6]
    journal.close()


def test_it_goes_on_after_a_restart(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    put(journal, 3, publisher=b"one")
    put(journal, 2, publisher=b"two")
    identity = journal.id
    journal.close()
    journal = Journal(tmp_path)
    assert (journal.id, journal.next_offset) == (identity, 6)
    assert journal.published(b"one") == (3, 4)
    assert journal.published(b"two") == (5, 6)
    assert journal.published(b"three") == (0, 0)
    put(journal)
    assert offsets(drain(journal, journal.seek(0))) == [1, 2, 3, 4, 5, 6]
    journal.close()


def test_the_oldest_segments_go_by_size_and_a_reader_is_told(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SMALL)
    cursor = journal.seek(0)
    assert offsets(journal.read(cursor)) == []
    put(journal)
    assert offsets(journal.read(cursor)) == [1]
    for _ in range(300):
        put(journal, 2)
        assert journal.size_bytes <= SMALL.max_bytes
    assert journal.oldest_offset > 2
    assert offsets(drain(journal, cursor)) == [*range(-2, -journal.oldest_offset, -1), *range(journal.oldest_offset, 602)]
    journal.close()


def test_only_one_may_have_it_open(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(JournalError, match="in use by another broker"):
        Journal(tmp_path)
    journal.close()
    Journal(tmp_path).close()
