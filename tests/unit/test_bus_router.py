"""The broker's decisions, on recording peers: routing, answers only to the asked, gaps, nonsense."""

from __future__ import annotations

import os
from typing import Any

import pytest
from msgpack import packb, unpackb

from pyx_bus import wire
from pyx_bus.journal import Journal
from pyx_bus.router import MAX_QUEUED_BYTES, Peer, Router
from pyx_bus.wire import Decoder, Frame, ProtocolError


class Recorder(Peer):
    """A peer that keeps what it's sent."""

    def __init__(self) -> None:
        super().__init__(0, 0, 1)
        self.data = b""
        self.fds: list[int] = []
        self.gone = ""
        self.backlog = 0

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        self.data += data
        self.fds += fds or []

    @property
    def queued_bytes(self) -> int:
        return self.backlog

    def disconnect(self, reason: str) -> None:
        self.gone = reason

    def take(self) -> list[Frame]:
        frames = Decoder().feed(self.data, self.fds)
        self.data, self.fds = b"", []
        return frames


class Bench:
    def __init__(self) -> None:
        self.router = Router(Journal("j"), lambda: 1)

    def peer(self, name: str = "p", *, service: str = "") -> Recorder:
        peer = Recorder()
        self.router.add(peer)
        hello = {"version": 1, "name": name, "publisher": name}
        self.router.receive(peer, Frame(wire.HELLO, b"", packb(hello)))
        if service:
            self.router.receive(peer, Frame(wire.REGISTER, service.encode(), serial=1))
        peer.take()
        return peer

    def call(self, peer: Recorder, method: bytes, serial: int, **kwargs: Any) -> None:
        self.router.receive(peer, Frame(wire.CALL, method, b"\x80", serial=serial, **kwargs))

    def subscribe(self, peer: Recorder, patterns: list[str], since: int | str | None = None) -> None:
        body = packb({"patterns": patterns, "since": since})
        self.router.receive(peer, Frame(wire.SUBSCRIBE, b"", body, peer=1, serial=99))

    def publish(self, peer: Recorder, topic: bytes, sequence: int) -> None:
        self.router.receive(peer, Frame(wire.PUBLISH, topic, packb({"id": str(sequence)}), arg=sequence))


def errors_in(frames: list[Frame]) -> list[str]:
    return [unpackb(f.body)["code"] for f in frames if f.kind == wire.ERROR]


def test_call_and_answer_are_routed_by_caller_and_serial() -> None:
    bench = Bench()
    service, caller = bench.peer(service="toy"), bench.peer()
    bench.call(caller, b"toy.x", 5, arg=1000)
    (call,) = service.take()
    assert (call.peer, call.serial, call.arg & 0xFFFFFFFF, call.route) == (caller.id, 5, 1000, b"toy.x")
    bench.router.receive(service, Frame(wire.RESULT, b"", b"\x81\xa1a\x01", peer=call.peer, serial=5))
    (result,) = caller.take()
    assert (result.kind, result.serial, result.body) == (wire.RESULT, 5, b"\x81\xa1a\x01")
    assert not caller.calls
    assert not service.incoming


def test_a_service_cannot_answer_what_it_was_not_asked() -> None:
    bench = Bench()
    service, other, caller = bench.peer(service="toy"), bench.peer(service="other"), bench.peer()
    bench.call(caller, b"toy.x", 5)
    bench.router.receive(other, Frame(wire.RESULT, b"", b"\x80", peer=caller.id, serial=5))
    assert caller.take() == []
    (call,) = service.take()
    for _ in range(2):  # the second answer is nobody's
        bench.router.receive(service, Frame(wire.RESULT, b"", b"\x80", peer=call.peer, serial=5))
    assert len(caller.take()) == 1


def test_leaving_caller_cancels_and_leaving_service_fails() -> None:
    bench = Bench()
    service, first, second = bench.peer(service="toy"), bench.peer(), bench.peer()
    bench.call(first, b"toy.x", 1)
    bench.call(second, b"toy.x", 1)
    service.take()
    bench.router.drop(first)
    assert [(f.kind, f.peer) for f in service.take()] == [(wire.CANCEL, first.id)]
    bench.router.drop(service)
    assert errors_in(second.take()) == ["unavailable"]
    bench.call(second, b"toy.x", 2)
    assert errors_in(second.take()) == ["unavailable"]


def test_descriptors_of_a_call_to_nobody_are_closed() -> None:
    bench = Bench()
    caller = bench.peer()
    read_end, write_end = os.pipe()
    bench.call(caller, b"nobody.x", 1, fds=[write_end])
    assert os.read(read_end, 1) == b""
    os.close(read_end)


def test_busy_service_and_deaf_caller() -> None:
    bench = Bench()
    service, caller = bench.peer(service="toy"), bench.peer()
    bench.call(caller, b"toy.x", 1)
    service.backlog = MAX_QUEUED_BYTES + 1
    bench.call(caller, b"toy.x", 2)
    assert errors_in(caller.take()) == ["resource_exhausted"]
    caller.backlog = MAX_QUEUED_BYTES + 1
    bench.router.receive(service, Frame(wire.RESULT, b"", b"\x80", peer=caller.id, serial=1))
    assert caller.gone


def test_events_reach_matching_subscribers_with_growing_offsets() -> None:
    bench = Bench()
    publisher, all_of_them, volumes = bench.peer("pub"), bench.peer(), bench.peer()
    bench.subscribe(all_of_them, [">"])
    bench.subscribe(volumes, ["volume.*"])
    all_of_them.take(), volumes.take()
    bench.publish(publisher, b"container.start", 1)
    bench.publish(publisher, b"volume.create", 2)
    assert [f.arg for f in publisher.take() if f.kind == wire.ACK] == [1, 2]
    got = all_of_them.take()
    assert [(f.route, f.peer) for f in got] == [(b"container.start", 1), (b"volume.create", 1)]
    assert got[1].arg == got[0].arg + 1
    (event,) = volumes.take()
    assert unpackb(event.body) == ["pub", 1, {"id": "2"}]


def test_repeated_sequence_number_is_acknowledged_but_not_journalled_twice() -> None:
    bench = Bench()
    publisher, reader = bench.peer("pub"), bench.peer()
    bench.subscribe(reader, [">"])
    reader.take()
    bench.publish(publisher, b"a.b", 1)
    bench.publish(publisher, b"a.b", 1)
    assert len(reader.take()) == 1
    assert [f.arg for f in publisher.take()] == [1, 1]


def test_slow_subscriber_gets_a_gap_with_the_count_and_then_goes_on() -> None:
    bench = Bench()
    publisher, slow = bench.peer("pub"), bench.peer()
    bench.subscribe(slow, [">"])
    slow.take()
    slow.backlog = MAX_QUEUED_BYTES + 1
    for i in range(1, 6):
        bench.publish(publisher, b"a.b", i)
    assert slow.take() == []
    slow.backlog = 0
    bench.router.drained(slow)
    bench.publish(publisher, b"a.b", 6)
    gap, event = slow.take()
    assert gap.kind == wire.GAP
    assert unpackb(gap.body)["lost"] == 5
    assert event.arg == unpackb(gap.body)["last_offset"] + 1


def test_subscription_since_replays_and_tells_what_is_gone() -> None:
    bench = Bench()
    bench.router.journal = Journal("j", max_events=3)
    publisher, reader = bench.peer("pub"), bench.peer()
    for i in range(1, 6):
        bench.publish(publisher, b"a.b", i)
    bench.subscribe(reader, ["a.*"], since=1)
    frames = [f for f in reader.take() if f.kind != wire.RESULT]
    assert [f.kind for f in frames] == [wire.GAP, wire.EVENT, wire.EVENT, wire.EVENT]
    assert unpackb(frames[0].body) == {"lost": 2, "first_offset": 1, "last_offset": 2}
    assert [f.arg for f in frames[1:]] == [3, 4, 5]


@pytest.mark.parametrize(
    "frame",
    [
        Frame(wire.HELLO, b"", packb({"version": 1})),  # a second one
        Frame(wire.WELCOME),
        Frame(200),
        Frame(wire.CALL, b"toy.x", serial=0),
        Frame(wire.SUBSCRIBE, b"", b"\xc1", serial=1),
        Frame(wire.SUBSCRIBE, b"", packb([1]), serial=1),
        Frame(wire.PUBLISH, b"a.b", b"\x80", fds=[999]),
    ],
)
def test_nonsense_is_a_protocol_error(frame: Frame) -> None:
    bench = Bench()
    with pytest.raises(ProtocolError):
        bench.router.receive(bench.peer(), frame)


@pytest.mark.parametrize(
    "body",
    [
        {"patterns": []},
        {"patterns": "x"},
        {"patterns": [1]},
        {"patterns": ["a"], "since": "yesterday"},
        {"patterns": ["a"], "since": -1},
        {"patterns": ["a"] * 100},
    ],
)
def test_bad_subscription_is_refused(body: dict[str, object]) -> None:
    bench = Bench()
    peer = bench.peer()
    bench.router.receive(peer, Frame(wire.SUBSCRIBE, b"", packb(body), peer=1, serial=1))
    assert errors_in(peer.take()) == ["invalid_argument"]


@pytest.mark.parametrize("hello", [{}, {"version": "1"}, {"version": 9, "oldest": 2}])
def test_bad_hello(hello: dict[str, object]) -> None:
    router = Router(Journal("j"), lambda: 1)
    peer = Recorder()
    router.add(peer)
    with pytest.raises(ProtocolError):
        router.receive(peer, Frame(wire.HELLO, b"", packb(hello)))


def test_first_frame_must_be_hello() -> None:
    router = Router(Journal("j"), lambda: 1)
    peer = Recorder()
    router.add(peer)
    with pytest.raises(ProtocolError, match="expected HELLO"):
        router.receive(peer, Frame(wire.CALL, b"toy.x", serial=1))


def test_names_are_registered_once() -> None:
    bench = Bench()
    bench.peer(service="toy")
    other = bench.peer()
    for name in (b"toy", b"bus", b"", b"a.b"):
        bench.router.receive(other, Frame(wire.REGISTER, name, serial=1))
    assert errors_in(other.take()) == ["already_exists", "invalid_argument", "invalid_argument", "invalid_argument"]


def test_who_goes_on_asking_without_reading_is_sent_away() -> None:
    bench = Bench()
    deaf = bench.peer()
    deaf.backlog = 2 * MAX_QUEUED_BYTES + 1
    for kind in (wire.PING, wire.PUBLISH, wire.CALL, wire.SUBSCRIBE):
        with pytest.raises(ProtocolError, match="doesn't read"):
            bench.router.receive(deaf, Frame(kind, b"bus.stats", serial=7))
    assert deaf.take() == []


def blob(size: int) -> bytes:
    """A map of exactly so many bytes."""
    return b"\x81\xa0\xc6" + (size - 7).to_bytes(4, "big") + bytes(size - 7)


def test_an_event_nobody_could_read_never_gets_into_the_journal() -> None:
    bench = Bench()
    publisher = bench.peer("publisher")
    for number, payload in enumerate((b"\xc1", b"\x81", b"\x90", b"\x81\xa1\xff\x01", b""), 1):
        with pytest.raises(ProtocolError):
            bench.router.receive(publisher, Frame(wire.PUBLISH, b"service.up", payload, arg=number))
    assert bench.router.journal.oldest_offset == bench.router.journal.next_offset


def test_an_event_too_large_to_be_delivered_never_gets_into_the_journal() -> None:
    bench = Bench()
    publisher, reader = bench.peer("publisher"), bench.peer("reader")
    payload = blob(wire.MAX_FRAME - wire.HEADER_SIZE - len(b"a.b"))
    with pytest.raises(ProtocolError, match="event of"):
        bench.router.receive(publisher, Frame(wire.PUBLISH, b"a.b", payload, arg=1))
    bench.router.receive(publisher, Frame(wire.PUBLISH, b"a.b", blob(wire.MAX_EVENT - 3), arg=2))
    body = packb({"patterns": [">"], "since": "beginning"})
    bench.router.receive(reader, Frame(wire.SUBSCRIBE, b"", body, peer=1, serial=1))
    assert [frame.kind for frame in reader.take()] == [wire.RESULT, wire.EVENT]
