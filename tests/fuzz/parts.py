"""The parts of the bus's core that take what a peer sent, one by one: whatever it is, an error of theirs at worst.

The decoder is also held against itself: whatever the pieces, with runs of events or without, the same frames come out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgpack import packb, unpackb
from tests.fuzz.world import PATTERNS, PAYLOADS, TOPICS, VALUES, Data

from pyx_bus import errors, filters, session, wire
from pyx_bus.client import payloads
from pyx_bus.wire import HEADER, HEADER_SIZE, Decoder, Frame, ProtocolError, Run, encode

KINDS = tuple(wire.KIND_NAMES)
Fields = tuple[int, bytes, bytes, int, int, int, int, int]


def stream(data: Data) -> bytes:
    """Frames, most of them good; events with sequence numbers that mostly grow."""
    said = []
    sequence = data.byte()
    while data and len(said) < 40:
        choice = data.byte()
        if choice < 150:
            sequence += choice % 16 != 0
            said.append(encode(wire.PUBLISH, data.one(TOPICS), data.one(PAYLOADS), 0, 0, sequence & (1 << 64) - 1))
        elif choice < 240:
            route, body = data.some(data.below(9)), data.some(data.below(60))
            size, fds = HEADER_SIZE + len(route) + len(body), data.byte() // 250
            said.append(HEADER.pack(size, data.one(KINDS), data.byte(), fds, len(route), data.byte(), data.byte(), 7) + route + body)
        elif choice < 250:
            said.append(data.some(data.below(40)))
        else:
            sequence = (1 << 64) - 2
    return b"".join(said)


def feed(decoder: Decoder, data: Data, said: bytes) -> tuple[list[Fields], bool]:
    """What came out before an error, and whether there was one. Every descriptor comes out, or is given back."""
    seen: list[Fields] = []
    given = 0
    while said:
        size = max(1 + data.byte() * (1 if data.byte() < 128 else 50), len(said) // 40)
        fds = [given + index for index in range(data.byte() // 100)]
        given += len(fds)
        try:
            frames = decoder.feed(said[:size], fds)
        except ProtocolError:
            assert len(decoder.take_fds()) + sum(fields[3] for fields in seen) == given
            return seen, True
        for frame in frames:
            seen.extend(flat(frame))
        said = said[size:]
        assert decoder.buffered_bytes < wire.MAX_FRAME
    assert len(decoder.take_fds()) + sum(fields[3] for fields in seen) == given
    return seen, False


def flat(frame: Frame) -> list[Fields]:
    if not isinstance(frame, Run):
        return [(frame.kind, frame.route, frame.body, len(frame.fds), frame.flags, frame.peer, frame.serial, frame.arg)]
    found: list[Fields] = []
    assert len(frame.body) <= wire.MAX_BATCH or len(frame.frames) == 1
    assert frame.frames == wire.frame_bounds(frame.body)
    for index, (start, payload, end) in enumerate(frame.frames):
        _, kind, flags, fds, _, peer, serial, arg = HEADER.unpack_from(frame.body, start)
        assert arg == frame.first + index <= frame.arg
        found.append((kind, frame.body[start + HEADER_SIZE : payload], frame.body[payload:end], fds, flags, peer, serial, arg))
    return found


def decoder(data: Data) -> None:
    rest = data.some(data.byte())
    said = stream(data)
    limit = wire.MAX_FRAME if rest[:1] < b"\x80" else 200
    results = [feed(Decoder(limit, runs=runs), Data(rest), said) for runs in (False, True)]
    assert results[0] == results[1]


def batches(data: Data) -> None:
    said = stream(data) if data.below(2) else data.some(400)
    try:
        _, events = wire.split_events(said)
    except ProtocolError:
        return
    assert sum(HEADER_SIZE + len(topic) + len(payload) for topic, payload in events) == len(said) - 8


def any_value(data: Data, depth: int = 0) -> Any:
    choice = data.below(12)
    if choice == 0 and depth < 4:
        return [any_value(data, depth + 1) for _ in range(data.below(5))]
    if choice == 1 and depth < 4:
        return {data.one(filters.FIELDS) + ("!" if data.below(2) else ""): any_value(data, depth + 1) for _ in range(data.below(4))}
    values = (None, True, 1, -1, 1 << 63, float("inf"), "", data.one(PATTERNS), data.one(VALUES), b"\xff")
    return values[choice % len(values)]


def filtering(data: Data) -> None:
    try:
        made = filters.parse(any_value(data), any_value(data))
    except errors.InvalidArgument:
        made = filters.Filter([data.one(PATTERNS)], {data.one(filters.FIELDS): [data.one(VALUES)]})
    for _ in range(3):
        topic = data.one(TOPICS).decode(errors="replace")
        passes = made.topic(topic, data.one(VALUES))
        if passes is None:
            raw = packb({"id": any_value(data), "attributes": any_value(data)}) if data.below(2) else data.one(PAYLOADS)
            passes = made.payload(topic, raw)
        assert passes in (True, False)


def client(data: Data) -> None:
    """A client whose broker is the liar."""
    session_ = session.Session()
    for _ in range(data.below(6)):
        session_.call("a.b", b"")
        session_.subscribe(b"")
    odd = (1, 1.5, float("inf"), float("nan"), None, "x", "9" * 5000, -1, [], b"")
    while data:
        keys = data.one((("lost", "first_offset", "last_offset"), ("next_offset",), ("bus", "connection"), ("code", "details")))
        body = data.one((packb(any_value(data)), data.one(PAYLOADS), packb({key: data.one(odd) for key in keys})))
        frame = Frame(
            data.one((*KINDS, 99)), data.one(TOPICS), body, peer=data.byte(), serial=data.below(16), arg=data.number()
        )
        try:
            payloads.decode_payload(data.one(TOPICS).decode(errors="replace"), body)
            for incoming in session_.receive(frame):
                assert incoming.serial is not None
                if incoming.kind == "error":
                    assert incoming.error().code
                else:
                    assert isinstance(incoming.body, dict)
            if frame.kind == wire.GAP:
                session.gap_body(frame)
            elif frame.kind == wire.RESULT:
                session.next_offset(frame.body)
        except (ProtocolError, errors.BusError):
            continue


def error_bodies(data: Data) -> None:
    body = {"code": any_value(data), "message": any_value(data), "hint": any_value(data), "details": any_value(data)}
    error = errors.from_body(unpackb(packb(body)))
    assert errors.from_body(unpackb(packb(errors.to_body(error)))).code == error.code


PARTS: tuple[Callable[[Data], None], ...] = (decoder, batches, filtering, client, error_bodies)


def run(program: bytes) -> None:
    """The first byte says which part gets the rest."""
    data = Data(program)
    data.one(PARTS)(data)
