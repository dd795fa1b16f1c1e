"""What a publisher keeps, sends, sends again and gives up, without a broker."""

from __future__ import annotations

import os
from pathlib import Path
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyx_bus.client import publisher, spool
from pyx_bus.client.publisher import Publisher
from pyx_bus.client.spool import Spool, claim, head, parse
from pyx_bus.wire import HEADER, PUBLISH, encode


class Wire:
    """What was sent, as sequence numbers."""

    def __init__(self, spool: Spool | None = None) -> None:
        self.sent: list[int] = []
        self.publisher = Publisher(self._send, spool)

    def _send(self, data: bytes) -> None:
        self.sent.append(HEADER.unpack_from(data)[7])

    def publish(self, count: int = 1, size: int = 10) -> None:
        for _ in range(count):
            self.publisher.publish(b"a.b", b"x" * size)

    def take(self) -> list[int]:
        sent, self.sent = self.sent, []
        return sent


def test_nothing_is_sent_before_there_is_a_connection_and_all_of_it_then() -> None:
    wire = Wire()
    wire.publish(3)
    assert wire.take() == []
    wire.publisher.connected()
    wire.publish()
    assert wire.take() == [1, 2, 3, 4]


def test_what_is_not_acknowledged_is_sent_over_the_next_connection() -> None:
    wire = Wire()
    wire.publisher.connected()
    wire.publish(5)
    wire.publisher.acknowledged(2)
    wire.publisher.disconnected()
    wire.publish()
    wire.take()
    wire.publisher.connected()
    assert wire.take() == [3, 4, 5, 6]
    wire.publisher.acknowledged(6)
    assert len(wire.publisher) == 0


def test_the_window_bounds_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "WINDOW_BYTES", 300)
    wire = Wire()
    wire.publisher.connected()
    wire.publish(10, size=100 - 24 - 3)
    assert wire.take() == [1, 2, 3]
    wire.publisher.acknowledged(1)
    assert wire.take() == [4]
    wire.publisher.acknowledged(4)
    assert wire.take() == [5, 6, 7]
    wire.publish(size=1)
    assert wire.take() == [], "an event passed those that wait"
    wire.publisher.acknowledged(10)
    assert wire.take() == [8, 9, 10]
    wire.publisher.acknowledged(10)
    assert wire.take() == [11]


def test_a_refused_event_is_dropped_alone() -> None:
    wire = Wire()
    wire.publisher.connected()
    wire.publish(4)
    wire.publisher.refuse(2)
    wire.publisher.refuse(2)
    wire.publisher.refuse(77)
    assert (wire.publisher.refused, len(wire.publisher)) == (1, 3)
    wire.take()
    wire.publisher.disconnected()
    wire.publisher.connected()
    assert wire.take() == [1, 3, 4]


def test_a_refusal_for_the_time_being_pauses_and_repeats_from_there() -> None:
    wire = Wire()
    wire.publisher.connected()
    wire.publish(4)
    wire.publisher.acknowledged(1)
    assert wire.publisher.pause(2) == publisher.FIRST_PAUSE_S
    assert wire.publisher.pause(3) is None, "one pause at a time"
    wire.publish()
    assert wire.take() == [1, 2, 3, 4]
    wire.publisher.resume()
    assert wire.take() == [2, 3, 4, 5]
    pauses = []
    for _ in range(6):
        pauses.append(wire.publisher.pause(2))
        wire.publisher.resume()
    assert pauses == [0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    wire.publisher.acknowledged(2)
    assert wire.publisher.pause(3) == publisher.FIRST_PAUSE_S, "it went on meanwhile"
    wire.take()
    wire.publisher.disconnected()
    wire.publisher.connected()
    assert wire.take() == [3, 4, 5]
    wire.publisher.resume()
    assert wire.take() == [], "the new connection has ended the pause already"


@pytest.mark.parametrize("connected", [True, False])
def test_bounds_drop_the_oldest_that_is_not_under_way(monkeypatch: pytest.MonkeyPatch, connected: bool) -> None:
    monkeypatch.setattr(publisher, "MAX_UNACKNOWLEDGED", 10)
    monkeypatch.setattr(publisher, "WINDOW_BYTES", 100)
    wire = Wire()
    if connected:
        wire.publisher.connected()
    wire.publish(14, size=100 - 24 - 3)
    assert (wire.publisher.dropped, len(wire.publisher)) == (4, 10)
    wire.publisher.connected()
    while len(wire.publisher):
        wire.publisher.acknowledged(wire.sent[-1])
    assert sorted(set(wire.sent)) == ([1, *range(6, 15)] if connected else list(range(5, 15)))


def test_bytes_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher, "MAX_UNACKNOWLEDGED_BYTES", 1000)
    wire = Wire()
    wire.publish(20, size=100 - 24 - 3)
    assert (wire.publisher.dropped, len(wire.publisher)) == (10, 10)


# --- with a file -----------------------------------------------------------------------------------------------------


def _left(place: Path) -> list[int]:
    """The numbers of what's in the files of publishers that have ended, which is what another would publish."""
    found, lingering = claim(place, "")
    assert not lingering
    numbers = [number for each in found for number, _ in each.load()]
    for each in found:
        each.close(empty=False)
    return numbers


def _end(each: Spool) -> None:
    """As the process's end: nothing more is written, and the lock is gone."""
    each.close(empty=False)


def test_what_is_not_acknowledged_is_left_in_the_file(tmp_path: Path) -> None:
    kept = Spool(tmp_path / "events")
    wire = Wire(kept)
    assert list(tmp_path.iterdir()) == [], "who publishes nothing leaves nothing"
    wire.publish(3)
    assert claim(tmp_path / "events", kept.publisher) == ([], False)
    assert claim(tmp_path / "events", "") == ([], True), "its publisher lives"
    wire.publisher.connected()
    wire.publish(3)
    wire.publisher.acknowledged(2)
    wire.publisher.refuse(3)
    _end(kept)
    assert _left(tmp_path / "events") == [4, 5, 6]
    (again,), _ = claim(tmp_path / "events", "")
    assert again.publisher == kept.publisher
    second = Wire(again)
    second.publisher.restore(again.load())
    assert second.publisher.sequence == 6
    second.publisher.connected()
    assert second.take() == [4, 5, 6]
    second.publisher.acknowledged(5)
    _end(again)
    assert _left(tmp_path / "events") == [6]
    (again,), _ = claim(tmp_path / "events", "")
    again.close(empty=True)
    assert list(tmp_path.iterdir()) == []


def test_the_oldest_process_comes_first(tmp_path: Path) -> None:
    spools = [Spool(tmp_path / "events", f"{number:016x}", begun_ns=100 + (number * 7) % 5) for number in range(5)]
    for each in spools:
        Wire(each).publish()
        _end(each)
    found, _ = claim(tmp_path / "events", "")
    assert [each.begun_ns for each in found] == [100, 101, 102, 103, 104]
    for each in found:
        each.close(empty=True)


def test_the_file_stays_about_as_large_as_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "GROWN_BYTES", 10_000)
    kept = Spool(tmp_path / "events")
    wire = Wire(kept)
    wire.publisher.connected()
    largest = 0
    for number in range(1, 1000):
        wire.publish(size=100)
        wire.publisher.acknowledged(number - 20)  # never all of it
        (path,) = tmp_path.iterdir()
        largest = max(largest, path.stat().st_size)
    assert 10_000 < largest < 10_200
    _end(kept)
    assert _left(tmp_path / "events") == list(range(980, 1000))


def test_what_the_bounds_cost_is_not_kept_in_the_file_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "GROWN_BYTES", 1000)
    monkeypatch.setattr(publisher, "MAX_UNACKNOWLEDGED", 100)
    kept = Spool(tmp_path / "events")
    wire = Wire(kept)
    wire.publish(5000, size=100)
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size < 100 * 131 * 1.6
    _end(kept)
    assert _left(tmp_path / "events")[-100:] == list(range(4901, 5001))


def test_events_stay_in_memory_while_the_file_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spool, "FIRST_PAUSE_S", 1e-9)
    place = tmp_path / "none" / "events"
    kept = Spool(place)
    wire = Wire(kept)
    wire.publisher.connected()
    wire.publish(5)
    assert wire.take() == [1, 2, 3, 4, 5]
    wire.publisher.acknowledged(2)
    assert len([record for record in caplog.records if "can't be kept" in record.message]) == 1
    place.parent.mkdir()
    wire.publish()
    _end(kept)
    assert _left(place) == [3, 4, 5, 6]


def test_a_process_that_died_making_a_replacement_leaves_none_for_good(tmp_path: Path) -> None:
    new = tmp_path / "events-0123456789abcdef.new"
    new.write_bytes(b"x")
    assert claim(tmp_path / "events", "") == ([], False)
    assert new.exists(), "somebody may be about to lock it"
    os.utime(new, (0, 0))
    assert claim(tmp_path / "events", "") == ([], False)
    assert not new.exists()
    kept = Spool(tmp_path / "events", "0123456789abcdef")
    Wire(kept).publish()
    _end(kept)
    new.write_bytes(b"x")
    (left,), _ = claim(tmp_path / "events", "")
    left.close(empty=True)
    assert list(tmp_path.iterdir()) == [], "its maker is known to have ended"


_frames = st.lists(st.binary(max_size=60), max_size=12)


def _file(payloads: list[bytes], settled: int, step: int = 1) -> tuple[bytes, list[tuple[int, bytes]], list[int]]:
    """A file, the events in it, and where each ends."""
    data, events, ends = head(1, settled), [], []
    for index, payload in enumerate(payloads):
        number = 1 + index * step
        frame = encode(PUBLISH, b"a.b", payload, 0, 0, number)
        data += crc32(frame).to_bytes(4, "little") + frame
        ends.append(len(data))
        if number > settled:
            events.append((number, frame))
    return data, events, ends


@given(_frames, st.integers(0, 14), st.integers(1, 3), st.data())
def test_a_file_cut_anywhere_gives_the_whole_events_before(
    payloads: list[bytes], settled: int, step: int, data: st.DataObject
) -> None:
    whole, events, ends = _file(payloads, settled, step)
    cut = data.draw(st.integers(0, len(whole)))
    found, end = parse(whole[:cut])
    assert end == max((e for e in [len(head(0, 0)), *ends] if e <= cut), default=0)
    left = [(1 + i * step) for i, e in enumerate(ends) if e <= cut and 1 + i * step > settled]
    assert found == events[: len(left)]
    assert [number for number, _ in found] == left


@given(_frames, st.integers(0, 14), st.data())
def test_a_damaged_file_gives_no_event_that_never_was(payloads: list[bytes], settled: int, data: st.DataObject) -> None:
    whole, _, _ = _file(payloads, settled)
    _, all_events, _ = _file(payloads, 0)
    at = data.draw(st.integers(0, len(whole) - 1))
    broken = bytearray(whole)
    broken[at] ^= data.draw(st.integers(1, 255))
    found, end = parse(bytes(broken) + data.draw(st.binary(max_size=80)))
    assert all(event in all_events for event in found)
    assert end <= len(whole) + 80
    assert [number for number, _ in found] == sorted({number for number, _ in found})


@given(st.binary(max_size=300))
def test_anything_at_all_can_be_read(data: bytes) -> None:
    assert parse(data)[1] <= len(data)
    found, end = parse(head(1, 0) + data)
    assert end >= len(head(1, 0)) and not found
