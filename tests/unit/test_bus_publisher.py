"""What a publisher keeps, sends, sends again and gives up, without a broker."""

from __future__ import annotations

import pytest

from pyx_bus.client import publisher
from pyx_bus.client.publisher import Publisher
from pyx_bus.wire import HEADER


class Wire:
    """What was sent, as sequence numbers."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.publisher = Publisher(self._send)

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
