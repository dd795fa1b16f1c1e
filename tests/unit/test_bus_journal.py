"""The journal of events on disk: what it keeps, what it loses, and that it never says anything else."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyx_bus.broker import journal as journal_module
from pyx_bus.broker import keeper, recovery, segment
from pyx_bus.broker.journal import Cursor, Hole, Journal, JournalError, Limits, Record
from pyx_bus.broker.segment import HEAD_SIZE, RECORD_SIZE
from pyx_bus.wire import PUBLISH, encode

SMALL = Limits(segment_bytes=4096, max_bytes=16384)
SECOND = 1_000_000_000


def frames(first: int, count: int = 1, size: int = 20) -> bytes:
    """``count`` PUBLISH frames, whose payloads say which they are."""
    return b"".join(encode(PUBLISH, b"a.b", b"%0*d" % (size, number), arg=number) for number in range(first, first + count))


def put(journal: Journal, count: int = 1, time_ns: int | None = None, size: int = 20, publisher: bytes = b"p") -> int:
    first = journal.next_offset
    time_ns = time.time_ns() if time_ns is None else time_ns
    return journal.append(b"src", publisher, frames(first, count, size), count, first + count - 1, time_ns)


def drain(journal: Journal, cursor: Cursor, max_bytes: int = 1000) -> list[Record | Hole]:
    found = journal.read(cursor, max_bytes)
    while not cursor.at_end:
        found += journal.read(cursor, max_bytes)
    return found


def offsets(found: list[Record | Hole]) -> list[int]:
    """All offsets, those of a hole negative; checks that each event is the one of its offset."""
    result: list[int] = []
    for item in found:
        if isinstance(item, Hole):
            assert item.lost == item.last_offset - item.first_offset + 1 > 0
            result += range(-item.first_offset, -item.last_offset - 1, -1)
        else:
            assert item.source == b"src"
            assert item.frames == frames(item.first_offset, item.count, len(item.frames) // item.count - 27)
            result += range(item.first_offset, item.first_offset + item.count)
    return result


def everything(journal: Journal) -> list[int]:
    return offsets(drain(journal, journal.seek(0)))


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.seg"))


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


_quiet = threading.Lock()
_once = keeper.Keeper._once


@pytest.fixture(autouse=True, scope="module")
def _hold_the_thread_while_files_are_copied() -> Iterator[None]:
    def once(self: keeper.Keeper) -> None:
        with _quiet:
            _once(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeper.Keeper, "_once", once)
        yield


def copy_files(source: Path, target: Path) -> None:
    with _quiet:
        shutil.copytree(source, target)


@contextmanager
def killed(journal: Journal, directory: Path) -> Iterator[Path]:
    """What there would be if the broker were killed now: a copy of all files."""
    with tempfile.TemporaryDirectory(dir=directory.parent) as name:
        copy = Path(name) / "copy"
        copy_files(directory, copy)
        yield copy


# What's put in comes out


def test_events_come_back_as_they_were_given_from_any_offset(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    assert (journal.next_offset, journal.oldest_offset, journal.segment_count, journal.size_bytes) == (1, 1, 0, 0)
    assert [put(journal, 3), put(journal), put(journal, 6)] == [1, 4, 5]
    for start in range(12):
        assert offsets(drain(journal, journal.seek(start))) == list(range(max(start, 1), 11))
    assert (tmp_path / "j").stat().st_mode & 0o777 == 0o700
    journal.close()


def test_a_memoryview_will_do(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    data = bytearray(b"x" + frames(1, 2) + b"y")
    journal.append(b"src", b"", memoryview(data)[1:-1], 2, 2, 0)
    data[:] = bytes(len(data))
    assert everything(journal) == [1, 2]
    assert journal.published(b"") == (0, 0)
    journal.close()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.tuples(st.integers(1, 30), st.integers(1, 400)), st.sampled_from(["restart", "kill"])), max_size=40),
    st.integers(0, 400),
    st.integers(1, 20_000),
)
def test_round_trip(steps: list[tuple[int, int] | str], start: int, max_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "0"
        journal = Journal(directory, Limits(segment_bytes=4096, max_bytes=1 << 20))
        identity = journal.id
        expected = 1
        reader = journal.seek(0)
        seen: list[int] = []
        for step in steps:
            if isinstance(step, tuple):
                assert put(journal, step[0], size=step[1]) == expected
                expected += step[0]
                seen += offsets(journal.read(reader, max_bytes))
                continue
            old = journal
            if step == "restart":
                journal.close()
            else:
                copy = directory.with_name(str(int(directory.name) + 1))
                copy_files(directory, copy)
                directory = copy
            journal = Journal(directory, old.limits)
            old.close()
            reader = journal.seek(reader.offset)
            assert (journal.next_offset, journal.id) == (expected, identity)
            assert journal.published(b"p") == ((expected - 1, expected) if expected > 1 else (0, 0))
        seen += offsets(drain(journal, reader, max_bytes))
        assert seen == list(range(1, expected))
        assert offsets(drain(journal, journal.seek(start), max_bytes)) == list(range(max(start, 1), expected))
        journal.close()


def test_a_reader_at_the_end_gets_what_comes(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SMALL)
    cursor, later = journal.tail(), journal.seek(5)
    assert journal.read(cursor) == [] and cursor.at_end
    put(journal, 3)
    assert offsets(journal.read(cursor)) == [1, 2, 3]
    assert journal.read(later) == []
    put(journal, 3)
    assert offsets(journal.read(later)) == [5, 6]
    assert journal.read(cursor, 1) and not cursor.at_end
    assert journal.read(cursor) == [] and cursor.at_end
    cursor = journal.tail()
    put(journal, 60, size=100)  # a segment of its own
    assert offsets(journal.read(cursor)) == list(range(7, 67))
    journal.close()


def test_a_record_larger_than_a_segment_and_than_a_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SMALL)
    for _ in range(3):
        put(journal, 1)
        put(journal, 2, size=5000)
    put(journal)
    assert everything(journal)[-1] == 10
    assert journal.size_bytes <= SMALL.max_bytes
    cursor = journal.seek(9)
    assert offsets(journal.read(cursor, 1)) == [9]  # the second half of one
    journal.close()


def test_a_read_looks_at_no_more_than_it_was_told_to(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for offset in range(1, 1001):
        put(journal, time_ns=offset)
    for cursor in (journal.seek(1000), journal.seek_time(1000)):
        assert journal.read(cursor, 4096) == []
        assert not cursor.at_end
    assert offsets(drain(journal, journal.seek(1000))) == [1000]
    journal.close()


def test_the_time_never_goes_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for time_ns in (50, 40, 60):
        put(journal, time_ns=time_ns)
    assert journal.last_time_ns == 60
    journal.close()
    journal = Journal(tmp_path)
    put(journal, time_ns=10)
    assert [record.time_ns for record in drain(journal, journal.seek(0)) if isinstance(record, Record)] == [50, 50, 60, 60]
    journal.close()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=200), st.integers(0, 650))
def test_a_reader_by_time_begins_with_the_first_that_is_not_older(steps: list[int], wanted: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        journal = Journal(Path(name), Limits(segment_bytes=400, max_bytes=1 << 20), now_ns=lambda: 0)
        time_ns, times = 1, []
        for step in steps:
            time_ns += step
            put(journal, 1, time_ns)
            times.append(time_ns)
        expected = [offset for offset, its in enumerate(times, 1) if its >= wanted]
        cursor = journal.seek_time(wanted)
        assert offsets(drain(journal, cursor, 100)) == expected
        put(journal, 1, wanted)
        assert offsets(journal.read(cursor)) == [len(times) + 1]
        journal.close()


def test_a_reader_by_time_of_a_journal_with_nothing_in_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    cursor = journal.seek_time(100)
    assert journal.read(cursor) == [] and cursor.at_end
    put(journal, time_ns=99)
    put(journal, time_ns=100)
    assert offsets(journal.read(cursor)) == [2]
    journal.close()


# Limits


def test_the_oldest_segments_go_by_size_and_a_reader_is_told(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SMALL)
    never_read, reader = journal.seek(0), journal.seek(0)
    put(journal, 2)
    assert offsets(journal.read(reader, 1)) == [1, 2]
    for _ in range(300):
        put(journal, 2)
        assert journal.size_bytes <= SMALL.max_bytes
    oldest = journal.oldest_offset
    assert 400 < oldest < 600
    left = list(range(oldest, 603))
    assert offsets(drain(journal, reader)) == [*range(-3, -oldest, -1), *left]
    assert offsets(drain(journal, never_read)) == [*range(-1, -oldest, -1), *left]
    assert offsets(drain(journal, journal.seek(5)))[:2] == [-5, -6]
    assert everything(journal) == left
    journal.close()
    assert sum(path.stat().st_size for path in segments(tmp_path)) <= SMALL.max_bytes
    journal = Journal(tmp_path, SMALL)
    assert (journal.oldest_offset, everything(journal)) == (oldest, left)
    journal.close()
    journal = Journal(tmp_path, Limits(segment_bytes=4096, max_bytes=8192))  # less is to be kept from now on
    assert journal.size_bytes <= 8192
    assert len(segments(tmp_path)) == journal.segment_count
    journal.close()


def test_what_is_too_old_goes_even_if_nothing_new_comes(tmp_path: Path) -> None:
    limits = Limits(segment_bytes=4096, max_bytes=1 << 20, max_age_s=100)
    journal = Journal(tmp_path, limits, now_ns=lambda: 0)
    for second in range(100):
        put(journal, 2, second * SECOND)
    cursor, count = journal.seek(0), journal.segment_count
    assert count > 3
    journal.expire(99 * SECOND)
    assert journal.segment_count == count
    journal.expire(150 * SECOND)
    assert 1 < journal.segment_count < count
    oldest = drain(journal, journal.seek(0))[0]
    assert isinstance(oldest, Record)
    assert oldest.time_ns <= 50 * SECOND < oldest.time_ns + 30 * SECOND  # but for the rest of its segment
    journal.expire(300 * SECOND)
    assert (journal.segment_count, journal.size_bytes, journal.first_time_ns) == (0, 0, 0)
    assert (journal.oldest_offset, journal.next_offset) == (201, 201)
    assert offsets(drain(journal, cursor)) == list(range(-1, -201, -1))
    deadline = time.monotonic() + 10
    while segments(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    with killed(journal, tmp_path) as copy:  # no file says any more how far offsets had got, but for the state
        after = Journal(copy, limits, now_ns=lambda: 0)
        assert after.next_offset == 201
        after.close()
    put(journal, 1, 300 * SECOND)
    assert offsets(journal.read(cursor)) == [201]
    journal.close()


def test_publishers_are_known_without_reading_every_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, SMALL)
    for number in range(300):
        put(journal, publisher=b"p%d" % (number % 7))
    expected = [journal.published(b"p%d" % number) for number in range(7)]
    assert expected[300 % 7 - 1] == (300, 301)
    journal.close()
    scanned: list[str] = []

    def record(found: segment.Segment, since: int, table: OrderedDict[bytes, tuple[int, int]]) -> segment.Scan:
        scanned.append(found.path.name)
        return scan(found, since, table)

    scan = recovery.scan_segment
    monkeypatch.setattr(recovery, "scan_segment", record)
    journal = Journal(tmp_path, SMALL)
    assert [journal.published(b"p%d" % number) for number in range(7)] == expected
    assert len(scanned) == 1
    with killed(journal, tmp_path) as copy:  # without the table, or with one that's damaged, from what there is of events
        flip(copy / "publishers", 60)
        after = Journal(copy, SMALL)
        assert [after.published(b"p%d" % number) for number in range(7)] == expected
        after.close()
    journal.close()


def test_when_a_file_goes_others_say_what_only_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill may come right after: the table must have its publishers then, and something must say how far offsets had got."""
    unlink = Path.unlink
    gone: list[int] = []
    missing: list[object] = []

    def check(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        if path.suffix != ".seg":
            return
        first = int(path.stem)
        gone.append(first)
        offset, table = segment.read_table(tmp_path / "publishers", journal.id.encode())
        missing.extend(number for number in range(first, offset) if table.get(b"%d" % (number % 500), (0, 0))[0] < number)
        state = journal._state_file.read()
        known = max([0 if state is None else state.next_offset, *(int(other.stem) for other in segments(tmp_path))])
        if not first < offset <= known:
            missing.append((first, offset, known))

    journal = Journal(tmp_path, SMALL)  # of which nothing is kept that isn't being written: its times are too old
    monkeypatch.setattr(Path, "unlink", check)
    for number in range(1, 2000):
        put(journal, 1, 0, publisher=b"%d" % (number % 500))
        journal.expire(time.time_ns() if number % 50 == 0 else 0)
    journal.close()
    assert len(gone) > 20
    assert not missing


def test_the_table_of_publishers_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "MAX_PUBLISHERS", 10)
    journal = Journal(tmp_path)
    for number in range(20):
        put(journal, publisher=b"%d" % number)
        put(journal, publisher=b"0")
    assert [bool(journal.published(b"%d" % number)[0]) for number in range(20)] == [True] + [False] * 10 + [True] * 9
    with killed(journal, tmp_path) as copy:
        after = Journal(copy)
        assert [after.published(b"%d" % number) for number in range(20)] == [journal.published(b"%d" % n) for n in range(20)]
        after.close()
    journal.close()


# Damage


def test_only_one_may_have_it_open(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(JournalError, match="in use by another broker"):
        Journal(tmp_path)
    put(journal)
    journal.close()
    journal.close()
    Journal(tmp_path).close()


def test_a_torn_tail_is_cut_wherever_it_is_torn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "j"
    journal = Journal(directory)
    put(journal, 3)
    good = journal.size_bytes
    put(journal, 2)
    whole = journal.size_bytes
    with killed(journal, directory) as copy:
        (last,) = segments(copy)
        data = last.read_bytes()
        state = (copy / "state").read_bytes()
        for cut in range(good, whole):
            caplog.clear()
            last.write_bytes(data[:cut])
            (copy / "state").write_bytes(state)
            after = Journal(copy)
            assert (after.next_offset, after.published(b"p")) == (4, (3, 4))
            assert (f"cut {cut - good} bytes" in caplog.text) == (cut > good)
            assert put(after) == 4
            assert everything(after) == [1, 2, 3, 4]
            after.close()
            (copy / "publishers").unlink()
    journal.close()


def test_a_segment_whose_head_was_not_finished_is_begun_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", SMALL)
    for _ in range(100):
        put(journal, 2)
    expected = everything(journal)
    for size in range(HEAD_SIZE + 1):
        with killed(journal, tmp_path / "j") as copy:
            head = segments(copy)[-1].read_bytes()[:size]
            (copy / f"{journal.next_offset:020}.seg").write_bytes(head)
            after = Journal(copy, SMALL)
            assert after.next_offset == journal.next_offset
            put(after)
            assert everything(after) == [*expected, 201]
            after.close()
    journal.close()


def test_what_is_wrong_at_the_end_but_not_torn_costs_its_offsets(tmp_path: Path) -> None:
    """Events that may have been acknowledged are gone: their offsets mustn't be given to others."""
    directory = tmp_path / "j"
    journal = Journal(directory)
    put(journal, 3)
    good = journal.size_bytes
    put(journal, 2)
    put(journal, 2)
    for position in (good, good + 2, good + 5, good + RECORD_SIZE + 30, journal.size_bytes - 1):
        with killed(journal, directory) as copy:
            flip(segments(copy)[0], position, 6)
            after = Journal(copy)
            found = everything(after)
            assert found[:3] == [1, 2, 3]
            assert after.next_offset >= 8
            first = put(after)
            assert offsets(drain(after, after.seek(first))) == [first]
            assert [abs(offset) for offset in everything(after)] == list(range(1, first + 1))
            after.close()
    journal.close()


def test_what_a_disk_got_wrong_in_an_old_segment_is_a_hole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "j"
    journal = Journal(directory, SMALL)
    for _ in range(80):
        put(journal, 2)
    second, third = (int(path.stem) for path in segments(directory)[1:3])
    record = RECORD_SIZE + 4 + 2 * 47
    at = HEAD_SIZE + 5 * record
    lost = second + 10
    for position, upto in ((at + 4, lost + 2), (at + 50, lost + 2), (at + record - 1, lost + 2), (at + 1, third)):
        with killed(journal, directory) as copy:
            caplog.clear()
            flip(segments(copy)[1], position)
            after = Journal(copy, SMALL)
            holes = list(range(-lost, -upto, -1))
            expected = [*range(1, lost), *holes, *range(upto, 161)]
            assert everything(after) == expected
            assert everything(after) == expected
            assert caplog.text.count("is damaged") == 1
            assert offsets(drain(after, after.seek(lost + 1))) == [*holes[1:], *range(upto, 161)]
            assert offsets(drain(after, after.seek(upto))) == list(range(upto, 161))
            after.close()
    with killed(journal, directory) as copy:
        flip(segments(copy)[1], 30)  # its head: nothing in it can be trusted
        after = Journal(copy, SMALL)
        assert everything(after) == [*range(1, second), *range(-second, -third, -1), *range(third, 161)]
        assert (copy / f"{second:020}.seg.bad").exists()
        after.close()
    journal.close()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=60),
    st.booleans(),
    st.integers(0, 5),
    st.floats(0, 1),
    st.one_of(st.integers(0, 7), st.floats(0, 1)),
)
def test_no_damage_makes_it_read_something_else_or_give_an_offset_twice(
    counts: list[int], closed: bool, file: int, where: float, what: int | float
) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "j"
        journal = Journal(directory, SMALL)
        for count in counts:
            put(journal, count)
        with killed(journal, directory) as copy:
            if closed:
                Journal(copy, SMALL).close()
            files = sorted(path for path in copy.iterdir() if path.stat().st_size)
            path = files[file % len(files)]
            size = path.stat().st_size
            start = int(where * (size - 1))
            if isinstance(what, int):
                flip(path, start, what)
            else:  # part of it was never written
                length = int(what * (size - start))
                content = path.read_bytes()
                path.write_bytes(content[:start] + bytes(length) + content[start + length :])
            after = Journal(copy, SMALL)
            assert after.next_offset >= journal.next_offset
            found = drain(after, after.seek(0))
            first = put(after)
            found += drain(after, after.seek(first))
            position = after.oldest_offset
            for item in found:  # checked without writing out all offsets of a hole: there may be 2**32
                assert item.first_offset == position
                if isinstance(item, Record):
                    offsets([item])
                    position += item.count
                else:
                    position = item.last_offset + 1
            assert position == after.next_offset == first + 1
            after.close()
        journal.close()


def test_the_file_of_another_journal_is_never_read(tmp_path: Path) -> None:
    other = Journal(tmp_path / "other")
    for _ in range(4):
        put(other, 10)
    other.close()
    journal = Journal(tmp_path / "j")
    put(journal, 3)
    journal.close()
    state = (tmp_path / "j" / "state").read_bytes()
    for name in ("1".zfill(20), "4".zfill(20), "rubbish", "9".zfill(20)):
        (tmp_path / "j" / "state").write_bytes(state)
        copy = tmp_path / name
        shutil.copytree(tmp_path / "j", copy)
        source = segments(tmp_path / "other")[0]
        if name == "1".zfill(20):
            (copy / f"{name}.seg").rename(copy / "mine")
        shutil.copy(source, copy / f"{name}.seg")
        journal = Journal(copy)
        assert (copy / f"{name}.seg.bad").exists()
        assert offsets(drain(journal, journal.seek(1))) == ([-1, -2, -3] if (copy / "mine").exists() else [1, 2, 3])
        assert journal.next_offset == 4
        journal.close()


def test_another_version_is_refused_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(segment, "VERSION", 7)
        journal = Journal(tmp_path)
        put(journal)
        journal.close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(JournalError, match="format 7, not 1"):
        Journal(tmp_path)
    (tmp_path / "state").rename(tmp_path / "gone")
    with pytest.raises(JournalError, match=r"seg' was written by another version"):
        Journal(tmp_path)
    (tmp_path / "gone").rename(tmp_path / "state")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_its_state_it_keeps_its_events_and_its_name(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    put(journal, 3)
    journal.close()
    (tmp_path / "state").unlink()
    after = Journal(tmp_path)
    assert after.id == journal.id
    assert after.next_offset > 1 << 32
    found = drain(after, after.seek(0))
    assert offsets(found[:1]) == [1, 2, 3]
    assert isinstance(found[1], Hole) and found[1].first_offset == 4
    after.close()


# Power cuts


def test_after_a_power_cut_offsets_go_on_where_none_was_given_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", boot_id="one")
    put(journal, 3)
    with killed(journal, tmp_path / "j") as copy:
        after = Journal(copy, boot_id="two")
        assert after.next_offset == 1 + keeper.RESERVE
        waiting = after.seek(4)
        hole = after.read(waiting)
        assert isinstance(hole[0], Hole)
        assert (hole[0].first_offset, hole[0].last_offset) == (4, keeper.RESERVE)
        assert after.published(b"p") == (3, 4)
        first = put(after)
        assert offsets(after.read(waiting)) == [first]
        after.close()
        again = Journal(copy, boot_id="three")  # it was closed: nothing is missing
        assert again.next_offset == first + 1
        again.close()
    journal.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.floats(0, 1), st.integers(0, 2))
def test_no_power_cut_makes_it_give_an_offset_twice(counts: list[int], kept: float, gone: int) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        patch.setattr(keeper, "RESERVE", 8)
        patch.setattr(keeper, "RESERVE_MAX", 32)
        directory = Path(name) / "j"
        journal = Journal(directory, SMALL, boot_id="one")
        for count in counts:
            put(journal, count)
        with killed(journal, directory) as copy:
            for path in segments(copy)[len(segments(copy)) - gone :]:
                path.unlink()
            for last in segments(copy)[-1:]:
                os.truncate(last, int(last.stat().st_size * kept))
            after = Journal(copy, SMALL, boot_id="two")
            assert after.next_offset >= journal.next_offset
            first = put(after)
            found = everything(after)
            assert [abs(offset) for offset in found] == list(range(abs(found[0]), first + 1))
            after.close()
        journal.close()


def test_events_are_brought_to_the_disk_within_the_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    done, failed = threading.Event(), threading.Event()

    def fdatasync(fd: int) -> None:
        if failing:
            failed.set()
            raise OSError(5, "Input/output error")
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        if synced[-1].endswith(wanted):
            done.set()

    failing = False
    wanted = ".seg"
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    journal = Journal(tmp_path, Limits(segment_bytes=4096, max_bytes=1 << 20, sync_interval_s=0.01))
    assert [Path(name).name for name in synced] == ["state", "publishers.new"]
    put(journal)
    assert done.wait(10)
    failing = True
    put(journal)  # a disk that fails now stops nobody
    assert failed.wait(10)
    put(journal)
    done.clear()
    failing = False
    assert done.wait(10)
    wanted = "publishers.new"
    done.clear()
    while journal.segment_count < 2:
        put(journal, 10)
    assert done.wait(10)
    names = {Path(name).name for name in synced}
    assert {path.name for path in segments(tmp_path)[:1]} <= names
    wanted = "state"
    done.clear()
    journal.close()
    assert done.is_set()
    assert str(tmp_path) in synced


def test_an_idle_journal_has_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    journal = Journal(tmp_path)
    assert threading.active_count() == before
    put(journal)
    assert threading.active_count() == before + 1
    journal.close()
    assert threading.active_count() == before


# Failing writes


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The kernel takes what fits of a write, and refuses the next."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_leaves_nothing_and_the_next_goes_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pyx_bus.broker.journal")
    journal = Journal(tmp_path)
    put(journal, 30)
    size = journal.size_bytes
    with files_no_larger_than(size + 100):
        for _ in range(2):
            with pytest.raises(JournalError, match="can't write to the journal of events: file too large") as caught:
                put(journal, 4)
            assert caught.value.errno == 27
    assert segments(tmp_path)[0].stat().st_size == size == journal.size_bytes
    assert (journal.next_offset, journal.published(b"p")) == (31, (30, 31))
    assert put(journal, 4) == 31
    assert everything(journal) == list(range(1, 35))
    put(journal)
    assert [record.getMessage() for record in caplog.records] == [
        "can't write to the journal of events: file too large; publishers will try again",
        "events can be written to the journal again",
    ]
    journal.close()


@pytest.mark.parametrize("readable", [0, HEAD_SIZE])
def test_a_disk_that_cannot_be_read_costs_what_is_there(
    tmp_path: Path, readable: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path, SMALL)
    for _ in range(80):
        put(journal, 2)
    first, second, *_, last = (int(path.stem) for path in segments(tmp_path))
    bad = tmp_path / segments(tmp_path)[0].name
    pread = os.pread

    def fails(fd: int, size: int, position: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{fd}") == str(bad) and position >= good:
            raise OSError(5, "Input/output error")
        return pread(fd, size, position)

    good = 0
    monkeypatch.setattr(os, "pread", fails)
    for _ in range(2):
        assert offsets(drain(journal, journal.seek(5))) == [*range(-5, -second, -1), *range(second, 161)]
    assert caplog.text.count("can't be read: Input/output error: events from offset 5 on are lost") == 1
    with killed(journal, tmp_path) as copy:
        bad, good = segments(copy)[-1], readable
        after = Journal(copy, SMALL)  # the newest: nobody knows what was in it
        assert bad.with_name(bad.name + ".bad").exists() == (not readable)
        assert after.next_offset > 160
        new = put(after)
        assert offsets(drain(after, after.seek(last - 1))[:1]) == [last - 1]
        assert offsets(drain(after, after.seek(new))) == [new]
        after.close()
    assert first == 1
    journal.close()


def test_a_reader_waits_for_a_descriptor_and_loses_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SMALL)
    for _ in range(80):
        put(journal, 2)
    cursor = journal.seek(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        found = journal.read(cursor)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found == [] and not cursor.at_end
    assert offsets(drain(journal, cursor)) == list(range(1, 161))
    journal.close()


def test_offsets_that_cannot_be_reserved_are_not_given_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "RESERVE", 8)
    journal = Journal(tmp_path, Limits(sync_interval_s=3600))
    with monkeypatch.context() as patch:
        patch.setattr(segment.StateFile, "write", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        assert put(journal, 8) == 1
        for _ in range(2):
            with pytest.raises(JournalError, match="can't reserve offsets for the journal of events: input/output error"):
                put(journal)
    assert put(journal) == 9
    assert everything(journal) == list(range(1, 10))
    journal.close()


def test_descriptors_are_few_and_go_back(tmp_path: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    journal = Journal(tmp_path, Limits(segment_bytes=1024, max_bytes=1 << 20))
    for _ in range(400):
        put(journal, 4)
    assert journal.segment_count > 60
    assert count() <= before + 4
    cursors = [journal.seek(offset) for offset in range(1, 1600, 10)]
    for cursor in cursors:
        assert offsets(journal.read(cursor, 1))
    assert count() <= before + 20
    assert everything(journal) == list(range(1, 1601))
    journal.close()
    assert count() == before
    with pytest.raises(JournalError, match="can't open the journal in"):
        Journal(tmp_path / "state")
    assert count() == before
