"""The client's side of a connection, without I/O: which calls are open, what an arriving frame means.

Shared by the async client and the blocking one. Frames to send come back as bytes; frames received become ``Incoming`` objects.
"""

from __future__ import annotations

from msgpack import packb, unpackb

from . import errors
from .wire import (
    ACK,
    CALL,
    CANCEL,
    CREDIT,
    ERROR,
    EVENT,
    GAP,
    HELLO,
    ITEM,
    PING,
    PONG,
    PROTOCOL_VERSION,
    REGISTER,
    RESULT,
    STREAM_WINDOW,
    SUBSCRIBE,
    UNSUBSCRIBE,
    WELCOME,
    Frame,
    ProtocolError,
    encode,
)

_KINDS = {RESULT: "result", ERROR: "error", ITEM: "item", EVENT: "event", GAP: "gap"}


class Incoming:
    """What arrived for the user of a connection.

    ``kind`` is item, result, error (for the call ``serial``), event or gap (for the subscription ``serial``). ``raw`` is the
    body's msgpack; ``body`` decodes it. ``fds`` belong to whoever has the object.
    """

    __slots__ = ("fds", "kind", "offset", "raw", "serial", "topic")

    def __init__(self, kind: str, serial: int, raw: bytes, fds: list[int], topic: str = "", offset: int = 0) -> None:
        self.kind = kind
        self.serial = serial
        self.raw = raw
        self.fds = fds
        self.topic = topic
        self.offset = offset

    @property
    def body(self) -> dict[str, object]:
        """The decoded body. Of an event: ``source``, ``time_ns`` and ``payload``."""
        if self.kind == "event":
            source, time_ns, payload = unpackb(self.raw)
            return {"source": source, "time_ns": time_ns, "payload": payload}
        value = unpackb(self.raw) if self.raw else {}
        if not isinstance(value, dict):
            raise ProtocolError(f"body of a {self.kind} is not a map")
        return value

    def error(self) -> errors.BusError:
        return errors.from_body(self.body)


class Session:
    """State of one connection. Serial numbers grow and aren't reused within it."""

    __slots__ = ("_consumed", "_serial", "_subscription", "bus_id", "calls", "connection_id", "welcomed")

    def __init__(self) -> None:
        self._serial = 0
        self._subscription = 0
        self._consumed: dict[int, int] = {}
        self.calls: set[int] = set()
        self.bus_id = ""
        self.connection_id = 0
        self.welcomed = False

    def hello(self, name: str, publisher: str = "") -> bytes:
        body = {"version": PROTOCOL_VERSION, "oldest": PROTOCOL_VERSION, "name": name, "publisher": publisher}
        return encode(HELLO, b"", packb(body))

    def call(self, method: str, body: bytes, fds: int = 0, timeout_ms: int = 0) -> tuple[int, bytes]:
        self._serial += 1
        serial = self._serial
        self.calls.add(serial)
        return serial, encode(CALL, method.encode(), body, 0, serial, timeout_ms, fds)

    def register(self, name: str) -> tuple[int, bytes]:
        self._serial += 1
        self.calls.add(self._serial)
        return self._serial, encode(REGISTER, name.encode(), b"", 0, self._serial)

    def subscribe(self, patterns: list[str], since: int | str | None) -> tuple[int, int, bytes]:
        """(serial of the answer, subscription ID, frame)."""
        self._serial += 1
        self._subscription += 1
        self.calls.add(self._serial)
        body = packb({"patterns": patterns, "since": since})
        return self._serial, self._subscription, encode(SUBSCRIBE, b"", body, self._subscription, self._serial)

    def unsubscribe(self, subscription: int) -> bytes:
        return encode(UNSUBSCRIBE, b"", b"", subscription)

    def cancel(self, serial: int) -> bytes:
        """Give up a call: its answer, if one is under way, will be ignored."""
        self.calls.discard(serial)
        self._consumed.pop(serial, None)
        return encode(CANCEL, b"", b"", 0, serial)

    def item_consumed(self, serial: int) -> bytes | None:
        """To be told of every item taken off a stream: now and then a frame to send that gives the service more credit."""
        count = self._consumed.get(serial, 0) + 1
        if count < STREAM_WINDOW // 2 or serial not in self.calls:
            self._consumed[serial] = count
            return None
        self._consumed[serial] = 0
        return encode(CREDIT, b"", b"", 0, serial, count)

    def receive(self, frame: Frame) -> Incoming | None:
        """What the frame means to the user; None if it's no longer of interest (its descriptors are then the caller's to close).

        CALL, CANCEL, CREDIT and ACK frames concern a service or publisher and are not for this method.
        """
        kind = frame.kind
        if kind == EVENT or kind == GAP:
            return Incoming(_KINDS[kind], frame.peer, frame.body, frame.fds, frame.route.decode(), frame.arg)
        if kind == RESULT or kind == ERROR or kind == ITEM:
            serial = frame.serial
            if serial not in self.calls:
                if kind == ERROR and serial == 0:  # the broker refuses the connection as a whole
                    raise errors.from_body(unpackb(frame.body))
                return None
            if kind != ITEM:
                self.calls.discard(serial)
                self._consumed.pop(serial, None)
            return Incoming(_KINDS[kind], serial, frame.body, frame.fds)
        if kind == WELCOME:
            body = unpackb(frame.body)
            self.bus_id = str(body["bus"])
            self.connection_id = int(body["connection"])
            self.welcomed = True
            return None
        if kind in (ACK, PONG):
            return None
        raise ProtocolError(f"unexpected {frame!r}")


def pong(frame: Frame) -> bytes:
    return encode(PONG, b"", b"", 0, frame.serial)


__all__ = ["PING", "Incoming", "Session", "pong"]
