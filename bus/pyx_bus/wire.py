"""The frames of the bus: bytes in, frames out. No socket, no event loop (docs/bus.md is the specification).

A frame is a fixed header of 24 bytes, a short routing text, and a body of msgpack::

    offset  size  field
    0       4     size      of the whole frame in bytes, header included
    4       1     kind      one of the constants below
    5       1     flags     FLAG_MONITOR in a call to a service, else 0
    6       1     fds       number of descriptors that travel with the frame
    7       1     route     length of the routing text
    8       4     peer      connection ID (calls to and answers from a service), subscription ID (events)
    12      4     serial    the call's number, chosen by the caller
    16      8     arg       deadline, offset, sequence number or credit, by kind

all little endian, then ``route`` bytes of UTF-8 (method, service name or topic), then the body. The broker routes by header and
routing text and never decodes the body of a call, so that it costs the same whatever is in it.

Events travel to subscribers in batches: an EVENT frame holds PUBLISH frames exactly as they came. So what a publisher sends in one
go is one slice of memory on its way into the journal and to every subscriber, whatever their number.

Imports are the bare minimum: the command line starts with this module.
"""

from __future__ import annotations

from _struct import Struct

PROTOCOL_VERSION = 2

HEADER = Struct("<IBBBBIIQ")
HEADER_SIZE = HEADER.size

# A frame holds messages, never bulk: 4 MiB is a `ps` of some 8,000 containers. It bounds what one peer makes another allocate.
MAX_FRAME = 4 << 20
# An event's topic and payload: the broker puts a header, the source and the time before them, and the whole must still fit a frame.
MAX_EVENT = MAX_FRAME - 1024
# Events are passed on in batches of about this size: a batch is what a reader gets at once, and what waits for it.
MAX_BATCH = 128 << 10
# Before the handshake nothing longer than a HELLO is acceptable.
MAX_HELLO = 4096
# The kernel allows 253 (SCM_MAX_FD); nobody needs more than stdio and a few.
MAX_FDS = 16
MAX_ROUTE = 255
# Items a service may send before the caller gives more credit.
STREAM_WINDOW = 64

HELLO = 1
WELCOME = 2
CALL = 3
RESULT = 4
ERROR = 5
ITEM = 6
CANCEL = 7
CREDIT = 8
REGISTER = 9
SUBSCRIBE = 10
UNSUBSCRIBE = 11
PUBLISH = 12
ACK = 13
EVENT = 14
GAP = 15
PING = 16
PONG = 17
HEARTBEAT = 18

# In a CALL to a service: the caller may only look (group pyx-monitor), and gets secrets masked.
FLAG_MONITOR = 1

KIND_NAMES = {
    HELLO: "HELLO",
    WELCOME: "WELCOME",
    CALL: "CALL",
    RESULT: "RESULT",
    ERROR: "ERROR",
    ITEM: "ITEM",
    CANCEL: "CANCEL",
    CREDIT: "CREDIT",
    REGISTER: "REGISTER",
    SUBSCRIBE: "SUBSCRIBE",
    UNSUBSCRIBE: "UNSUBSCRIBE",
    PUBLISH: "PUBLISH",
    ACK: "ACK",
    EVENT: "EVENT",
    GAP: "GAP",
    PING: "PING",
    PONG: "PONG",
    HEARTBEAT: "HEARTBEAT",
}


class ProtocolError(Exception):
    """The peer broke the protocol; the connection can't go on."""


class Frame:
    """One frame. ``fds`` belong to whoever holds the frame, until it takes them out."""

    __slots__ = ("arg", "body", "fds", "flags", "kind", "peer", "route", "serial")

    def __init__(
        self,
        kind: int,
        route: bytes = b"",
        body: bytes = b"",
        peer: int = 0,
        serial: int = 0,
        arg: int = 0,
        flags: int = 0,
        fds: list[int] | None = None,
    ) -> None:
        self.kind = kind
        self.route = route
        self.body = body
        self.peer = peer
        self.serial = serial
        self.arg = arg
        self.flags = flags
        self.fds = fds if fds is not None else []

    def encode(self) -> bytes:
        return encode(self.kind, self.route, self.body, self.peer, self.serial, self.arg, len(self.fds), self.flags)

    def __repr__(self) -> str:
        kind = KIND_NAMES.get(self.kind, str(self.kind))
        return f"<{kind} {self.route!r} peer={self.peer} serial={self.serial} arg={self.arg} body={len(self.body)} fds={self.fds}>"


class Run(Frame):
    """PUBLISH frames that came one after the other, with sequence numbers that do too: one slice of what was read, in ``body``.

    ``frames`` are (where a frame begins in ``body``, where its payload begins, where it ends); ``first`` and ``arg`` the sequence
    numbers of the first and the last.
    """

    __slots__ = ("first", "frames")

    def __init__(self, data: bytes, frames: list[tuple[int, int, int]], first: int, last: int) -> None:
        super().__init__(PUBLISH, b"", data, arg=last)
        self.frames = frames
        self.first = first


def encode(
    kind: int, route: bytes, body: bytes, peer: int = 0, serial: int = 0, arg: int = 0, fds: int = 0, flags: int = 0
) -> bytes:
    """The frame's bytes. Raises ``ProtocolError`` if it would break a limit."""
    size = HEADER_SIZE + len(route) + len(body)
    if size > MAX_FRAME:
        raise ProtocolError(f"frame of {size} bytes is larger than the limit of {MAX_FRAME}")
    if len(route) > MAX_ROUTE or fds > MAX_FDS:
        raise ProtocolError(
            f"route of {len(route)} bytes or {fds} descriptors are over the limits {MAX_ROUTE} and {MAX_FDS}"
        )
    return HEADER.pack(size, kind, flags, fds, len(route), peer, serial, arg) + route + body


def encode_batch_head(source: bytes, subscription: int, count: int, offset: int, time_ns: int, size: int) -> bytes:
    """What comes before the ``count`` PUBLISH frames of ``size`` bytes in an EVENT frame."""
    whole = HEADER_SIZE + len(source) + _TIME_SIZE + size
    return (
        HEADER.pack(whole, EVENT, 0, 0, len(source), subscription, count, offset)
        + source
        + time_ns.to_bytes(_TIME_SIZE, "little")
    )


_TIME_SIZE = 8


def frame_bounds(data: bytes | memoryview, start: int = 0) -> list[tuple[int, int, int]]:
    """Where each of the PUBLISH frames in ``data`` begins, where its payload begins, where it ends. Raises ``ProtocolError``."""
    bounds = []
    unpack = HEADER.unpack_from
    end = len(data)
    while start < end:
        if end - start < HEADER_SIZE:
            raise ProtocolError("a batch of events ends in the middle of a frame")
        size, kind, _, nfds, route_size, _, _, _ = unpack(data, start)
        if kind != PUBLISH or nfds or size < HEADER_SIZE + route_size or size > end - start:
            raise ProtocolError(f"a batch of events holds a bad frame: kind {kind}, size {size}")
        bounds.append((start, start + HEADER_SIZE + route_size, start + size))
        start += size
    return bounds


def split_events(body: bytes) -> tuple[int, list[tuple[bytes, bytes]]]:
    """An EVENT frame's body: the broker's time in ns, and (topic, payload) of each event. Raises ``ProtocolError``."""
    if len(body) < _TIME_SIZE:
        raise ProtocolError("an EVENT frame without a time")
    time_ns = int.from_bytes(body[:_TIME_SIZE], "little")
    bounds = frame_bounds(body, _TIME_SIZE)
    return time_ns, [(body[start + HEADER_SIZE : payload], body[payload:end]) for start, payload, end in bounds]


class Decoder:
    """Cuts a byte stream into frames; with ``runs`` events come as ``Run`` objects, many at a time.

    Descriptors arrive with or before the last byte of the frame they belong to, in order (unix(7): a read never goes past the data
    a set of descriptors was sent with, but may begin before it), so a queue is enough: a frame takes as many as its header says.
    """

    __slots__ = ("_buffer", "_fds", "_limit", "_needed", "_runs")

    def __init__(self, first_frame_limit: int = MAX_FRAME, *, runs: bool = False) -> None:
        self._buffer = bytearray()
        self._needed = (
            0  # bytes the frame in the buffer will have: till then arriving data is only appended, never looked through
        )
        self._fds: list[int] = []
        self._limit = first_frame_limit
        self._runs = runs

    @property
    def buffered_bytes(self) -> int:
        """What has come of a frame that isn't complete."""
        return len(self._buffer)

    def feed(self, data: bytes, fds: list[int] | None = None) -> list[Frame]:
        """All frames that ``data`` completes. Raises ``ProtocolError``; the connection is to be closed then, and ``take_fds`` to be
        closed by the caller."""
        if fds:
            self._fds.extend(fds)
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._needed and len(self._fds) <= MAX_FDS:
                return []
            data = bytes(self._buffer)
            self._buffer = bytearray()
        frames: list[Frame] = []
        offset = 0
        end = len(data)
        self._needed = HEADER_SIZE
        unpack = HEADER.unpack_from
        while end - offset >= HEADER_SIZE:
            size, kind, flags, nfds, route_size, peer, serial, arg = unpack(data, offset)
            if size < HEADER_SIZE + route_size or size > self._limit or nfds > MAX_FDS:
                self._drop(frames)
                raise ProtocolError(f"bad frame header: size {size}, route {route_size}, {nfds} descriptors")
            if size > end - offset:
                self._needed = size
                break
            if kind == PUBLISH and self._runs and not nfds:
                offset = self._run(data, offset, end, frames)
                self._limit = MAX_FRAME
                continue
            start = offset + HEADER_SIZE
            offset += size
            split = start + route_size
            frame = Frame(kind, data[start:split], data[split:offset], peer, serial, arg, flags)
            if nfds:
                if nfds > len(self._fds):
                    self._drop(frames)
                    raise ProtocolError(f"frame announces {nfds} descriptors, {len(self._fds)} came")
                frame.fds = self._fds[:nfds]
                del self._fds[:nfds]
            frames.append(frame)
            self._limit = MAX_FRAME
        if offset < end:
            self._buffer = bytearray(data[offset:])
        if self._fds and (not self._buffer or len(self._fds) > MAX_FDS):
            self._drop(frames)
            raise ProtocolError(f"{len(self._fds)} descriptors came with no frame to hold them")
        return frames

    def _run(self, data: bytes, start: int, end: int, frames: list[Frame]) -> int:
        """Take the PUBLISH frames from ``start`` on, the first of which is known to be whole and good. Where they end."""
        unpack = HEADER.unpack_from
        found: list[tuple[int, int, int]] = []
        add = found.append
        size: int
        route_size: int
        size, _, _, _, route_size, _, _, first = unpack(data, start)
        last = first
        offset = 0  # from here on from the start of the run
        room = min(end - start, MAX_BATCH)
        while True:
            add((offset, offset + HEADER_SIZE + route_size, offset + size))
            offset += size
            if room - offset < HEADER_SIZE:
                break
            size, kind, _, nfds, route_size, _, _, sequence = unpack(data, start + offset)
            if (
                kind != PUBLISH
                or sequence != last + 1
                or size > room - offset
                or nfds
                or size < HEADER_SIZE + route_size
            ):
                break
            last = sequence
        frames.append(Run(data[start : start + offset], found, first, last))
        return start + offset

    def _drop(self, frames: list[Frame]) -> None:
        """Give the descriptors of frames that nobody will see back to the queue, so that ``take_fds`` finds all of them."""
        for frame in frames:
            self._fds.extend(frame.fds)

    def take_fds(self) -> list[int]:
        """Descriptors that belong to no delivered frame; the caller closes them when the connection ends."""
        fds, self._fds = self._fds, []
        return fds


def topic_matches(pattern: str, topic: str) -> bool:
    """``*`` stands for one word, ``>`` at the end for one word or more: ``container.*``, ``container.exec.>``, ``>``."""
    if pattern == topic or pattern == ">":
        return True
    wanted = pattern.split(".")
    words = topic.split(".")
    if wanted[-1] == ">":
        wanted.pop()
        if len(words) <= len(wanted):
            return False
        words = words[: len(wanted)]
    return len(wanted) == len(words) and all(w in ("*", t) for w, t in zip(wanted, words, strict=True))
