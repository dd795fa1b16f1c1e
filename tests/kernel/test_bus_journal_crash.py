"""The journal of events against the kernel: a writer that's killed at any moment, and file systems that are full."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyx_bus.broker.journal import Hole, Journal, JournalError, Limits, Record
from pyx_bus.broker.positions import Positions
from pyx_bus.errors import ResourceExhausted
from pyx_bus.wire import PUBLISH, encode

KILLS = 24
LIMITS = Limits(segment_bytes=1 << 20, max_bytes=16 << 20, sync_interval_s=0.01)
_libc = ctypes.CDLL(None, use_errno=True)
_ACK = struct.Struct("<QQ")

# Appends runs of all sizes as fast as it can and says of each that's kept: (offset after it, sequence number). Also acknowledges it for
# a durable subscription.
_WRITER = """
import os, random, struct, sys, time
from pathlib import Path
from pyx_bus.broker.journal import Journal, Limits
from pyx_bus.broker.positions import Positions
from pyx_bus.wire import PUBLISH, encode
directory, seed = Path(sys.argv[1]), int(sys.argv[2])
journal = Journal(directory / "journal", Limits(1 << 20, 16 << 20, sync_interval_s=0.01))
position = Positions(directory / "positions", journal.id).open("reader", 0, 1)
rng = random.Random(seed)
ack = struct.Struct("<QQ")
while True:
    first = journal.next_offset
    count = rng.choice((1, 1, 1, 10, 500))
    size = rng.choice((8, 300, 3000))
    data = b"".join(encode(PUBLISH, b"a.b", b"%0*d" % (size, n), arg=n) for n in range(first, first + count))
    last, _ = journal.published(b"writer")
    assert journal.append(b"src", b"writer", data, count, last + count, time.time_ns() * int(sys.argv[3])) == first
    position.ack(first)
    os.write(1, ack.pack(first + count, last + count))
"""


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    assert _libc.mount(b"tmpfs", str(tmp_path).encode(), b"tmpfs", 0, b"size=2m") == 0
    yield tmp_path
    _libc.umount2(str(tmp_path).encode(), 2)


def _read(journal: Journal, since: int) -> list[Record | Hole]:
    cursor = journal.seek(since)
    found = journal.read(cursor)
    while not cursor.at_end:
        found += journal.read(cursor)
    return found


def _check(found: list[Record | Hole], since: int, until: int) -> None:
    """Every event from ``since`` to ``until`` is there, and is what was written under its offset."""
    for item in found:
        assert isinstance(item, Record), item
        assert item.first_offset == since
        size = len(item.frames) // item.count - 27
        assert item.frames == b"".join(
            encode(PUBLISH, b"a.b", b"%0*d" % (size, number), arg=number) for number in range(since, since + item.count)
        )
        since += item.count
    assert since == until


@pytest.mark.parametrize("timely", [1, 0], ids=["kept", "expired"])  # expired: of what's full, nothing is kept
def test_what_was_acknowledged_survives_a_kill_at_any_moment(tmp_path: Path, timely: int) -> None:
    rng = random.Random(1)
    checked, sequence, identity = 1, 0, ""
    for kill in range(KILLS):
        command = [sys.executable, "-c", _WRITER, str(tmp_path), str(kill), str(timely)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        reports = rng.randrange(1, 400)
        data = writer.stdout.read(_ACK.size * reports)
        writer.send_signal(signal.SIGKILL)
        data += writer.stdout.read()
        assert writer.wait() == -signal.SIGKILL
        writer.stdout.close()
        acknowledged, acknowledged_sequence = _ACK.unpack_from(data, len(data) // _ACK.size * _ACK.size - _ACK.size)
        journal = Journal(tmp_path / "journal", LIMITS)
        assert journal.id == (identity or journal.id)
        identity = journal.id
        assert journal.next_offset >= acknowledged > checked
        last, after = journal.published(b"writer")
        assert after == journal.next_offset
        assert last >= acknowledged_sequence > sequence
        assert last == journal.next_offset - 1  # no event twice, none left out
        oldest = journal.oldest_offset
        assert oldest == 1 or not timely or journal.size_bytes > LIMITS.max_bytes // 2
        _check(_read(journal, max(checked, oldest)), max(checked, oldest), journal.next_offset)
        position = Positions(tmp_path / "positions", identity).get(0, "reader")
        assert position is not None
        assert checked < position.offset <= journal.next_offset
        checked, sequence = journal.next_offset, last
        if kill % 3:
            journal.close()
        else:
            del journal  # nobody says that it's closed; the lock goes with its descriptor
            os.close(_descriptor(tmp_path / "journal" / "state"))


def _descriptor(path: Path) -> int:
    """The one this process has open."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == str(path):
                return int(name)
        except OSError:
            continue
    raise AssertionError(f"{path} isn't open")


def _put(journal: Journal, size: int = 10_000) -> int:
    first = journal.next_offset
    return journal.append(b"src", b"p", encode(PUBLISH, b"a.b", b"%0*d" % (size, first), arg=first), 1, first, 0)


def test_a_full_disk_costs_the_oldest_events_then_publishers_wait(small: Path) -> None:
    directory = small / "journal"
    limits = Limits(segment_bytes=200_000, max_bytes=4_000_000)
    journal = Journal(directory, limits, now_ns=lambda: 0)
    for _ in range(500):  # five megabytes on a disk of two
        _put(journal)
    oldest = journal.oldest_offset
    assert 300 < oldest < 400
    found = _read(journal, 1)
    assert isinstance(found[0], Hole)
    assert (found[0].first_offset, found[0].last_offset) == (1, oldest - 1)
    _check(found[1:], oldest, 501)
    with open(small / "fill", "wb", buffering=0) as file:
        while True:  # somebody else takes all there is, also what the journal gives up for it
            try:
                file.write(bytes(4096))
            except OSError:
                try:
                    _put(journal)
                except JournalError as e:
                    assert e.errno == 28
                    break
    before, size = journal.next_offset, journal.size_bytes
    assert limits.floor_bytes <= size < limits.floor_bytes + 2 * limits.segment_bytes
    for _ in range(30):
        try:
            _put(journal)
        except JournalError as e:
            assert "no space left on device" in str(e)
            break
    else:
        pytest.fail("the disk wasn't full")
    full_at = journal.next_offset
    for _ in range(3):
        with pytest.raises(JournalError, match="no space left"):
            _put(journal)
    assert journal.next_offset == full_at >= before
    assert journal.size_bytes >= size
    with pytest.raises(ResourceExhausted, match="no space left"):
        Positions(small / "positions").open("new", 0, 1)
    assert not list((small / "positions").glob("*"))
    os.unlink(small / "fill")
    assert _put(journal) == full_at
    _check(_read(journal, 0), journal.oldest_offset, full_at + 1)
    journal.close()
    journal = Journal(directory, now_ns=lambda: 0)
    assert journal.next_offset == full_at + 1
    _check(_read(journal, 0), journal.oldest_offset, full_at + 1)
    journal.close()


def test_a_full_disk_never_takes_the_last_two_segments(small: Path) -> None:
    journal = Journal(small / "journal", Limits(segment_bytes=200_000, max_bytes=400_000), now_ns=lambda: 0)
    for _ in range(30):
        _put(journal)
    assert journal.segment_count == 2
    oldest, size = journal.oldest_offset, journal.size_bytes
    with open(small / "fill", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    with pytest.raises(JournalError, match="no space left"):
        for _ in range(5):
            _put(journal)
    assert journal.oldest_offset == oldest and journal.segment_count == 2 and journal.size_bytes >= size
    journal.close()


def test_it_opens_and_closes_on_a_disk_that_is_full(small: Path) -> None:
    directory = small / "journal"
    journal = Journal(directory, now_ns=lambda: 0)
    for _ in range(3):
        _put(journal)
    with open(small / "fill", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(bytes(4096))
    for _ in range(2):
        journal.close()
        journal = Journal(directory, now_ns=lambda: 0)
        assert journal.next_offset == 4
        _check(_read(journal, 0), 1, 4)
    with pytest.raises(JournalError):
        _put(journal)
    journal.close()
    os.unlink(small / "fill")
    journal = Journal(directory, now_ns=lambda: 0)
    assert _put(journal) == 4
    journal.close()


def test_two_processes_cannot_have_it_open(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    code = "import sys; from pathlib import Path; from pyx_bus.broker.journal import Journal; Journal(Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path / "journal")]
    second = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert second.returncode == 1
    assert "JournalError: the journal in" in second.stderr and "is in use by another broker" in second.stderr
    journal.close()
    assert subprocess.run(command, capture_output=True, timeout=30).returncode == 0
