"""The client's side of a connection, without I/O: what is said in which frame, which calls are open, what an arriving frame means.

The functions are shared by the async client and the blocking one; ``Session`` and ``Incoming`` are the blocking one's, which imports
nothing more: it's what the command line starts with.
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
    HEARTBEAT,
    HELLO,
    ITEM,
    PONG,
    PROTOCOL_VERSION,
    RESULT,
    STREAM_WINDOW,
    SUBSCRIBE,
    UNSUBSCRIBE,
    WELCOME,
    Frame,
    ProtocolError,
    encode,
    split_events,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    Since = int | str | datetime | None
    Filters = Mapping[str, str | Sequence[str]]

# A durable subscription's place moves on with heartbeats, too: with narrow filters there may be nothing else for long.
DURABLE_HEARTBEAT_S = 10.0

_KINDS = {RESULT: "result", ERROR: "error", ITEM: "item"}


class Incoming:
    """What arrived for the user of a connection.

    ``kind`` is item, result, error (for the call ``serial``), event, gap or heartbeat (for the subscription ``serial``). ``raw`` is
    the msgpack of the body, or of the event's payload; ``body`` decodes it. ``offset`` is the event's, of a gap the last one lost, of
    a heartbeat the last one before it: whatever it is, up to there everything has come, and the next is at ``offset + 1``.
    ``source`` is the service that published the event, ``time_ns`` when the broker got it. Of a result ``offset`` is where to subscribe
    for what happened after the state it tells (0: not known). ``fds`` belong to whoever has the object.
    """

    __slots__ = ("fds", "kind", "offset", "raw", "serial", "source", "time_ns", "topic")

    def __init__(
        self,
        kind: str,
        serial: int,
        raw: bytes,
        fds: list[int],
        topic: str = "",
        offset: int = 0,
        source: str = "",
        time_ns: int = 0,
    ) -> None:
        self.kind = kind
        self.serial = serial
        self.raw = raw
        self.fds = fds
        self.topic = topic
        self.offset = offset
        self.source = source
        self.time_ns = time_ns

    @property
    def payload(self) -> dict[str, object]:
        """The decoded payload of an event or gap, the decoded body of anything else. Raises ``ProtocolError`` if it isn't a map."""
        try:
            value = unpackb(self.raw) if self.raw else {}
        except ValueError as error:  # the base of msgpack's own
            raise ProtocolError(f"body of a {self.kind} is not msgpack: {error}") from error
        if not isinstance(value, dict):
            raise ProtocolError(f"body of a {self.kind} is not a map")
        return value

    @property
    def body(self) -> dict[str, object]:
        """As ``payload``; of an event ``source``, ``time_ns`` and ``payload``."""
        if self.kind == "event":
            return {"source": self.source, "time_ns": self.time_ns, "payload": self.payload}
        return self.payload

    def error(self) -> errors.BusError:
        return errors.from_body(self.body)


def hello(name: str, publisher: str = "") -> bytes:
    body = {"version": PROTOCOL_VERSION, "oldest": PROTOCOL_VERSION, "name": name, "publisher": publisher}
    return encode(HELLO, b"", packb(body))


def subscribe_body(
    patterns: Sequence[str],
    since: Since = None,
    *,
    filters: Filters | None = None,
    durable: str = "",
    heartbeat_s: float | None = None,
) -> bytes:
    """SUBSCRIBE's body. ``since``: an offset, "beginning", a ``datetime``, "@" and a wall clock time in ns, None for now.

    Raises ``InvalidArgument``.
    """
    body: dict[str, object] = {"patterns": list(patterns)}
    if since is None or since == "beginning" or (isinstance(since, int) and not isinstance(since, bool) and since >= 0):
        body["since"] = since
    elif isinstance(since, str) and since[:1] == "@" and since[1:].isdecimal():
        body["since_ns"] = int(since[1:])
    elif not isinstance(since, int | str) and hasattr(since, "timestamp"):  # the command line doesn't import datetime
        body["since_ns"] = round(since.timestamp() * 1_000_000) * 1000
    else:
        raise errors.InvalidArgument(f'since must be an offset, "beginning", a datetime or None, not {since!r}')
    if filters:
        body["filters"] = {field: [values] if isinstance(values, str) else list(values) for field, values in filters.items()}
    if durable:
        body["durable"] = durable
    if heartbeat_s is not None:
        body["heartbeat_ms"] = int(heartbeat_s * 1000)
    data: bytes = packb(body)
    return data


def begins_in(since: Since, journal: str) -> str:
    """The journal that ``since`` was given with. Raises ``InvalidArgument``: only offsets belong to one."""
    if journal and (not isinstance(since, int) or isinstance(since, bool)):
        raise errors.InvalidArgument(f"a journal is only of use with an offset, not with {since!r}")
    return journal


def acknowledge(subscription: int, offset: int) -> bytes:
    """Everything up to and including ``offset`` is processed."""
    return encode(ACK, b"", b"", subscription, 0, offset)


def clip_gap(body: bytes, offset: int) -> bytes:
    """A GAP's body without what is before ``offset``, for somebody who has had it. Raises ``ProtocolError``.

    How many of the rest were the subscriber's isn't known better than before, but they aren't more than there are numbers.
    """
    try:
        value = unpackb(body)
        first, last, lost = int(value["first_offset"]), int(value["last_offset"]), int(value["lost"])
        if first >= offset:
            return body
        clipped: bytes = packb({**value, "first_offset": offset, "lost": min(lost, last + 1 - offset)})
        return clipped
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ProtocolError(f"bad body of a gap: {error}") from error


def gap_body(frame: Frame) -> tuple[int, int, int]:
    """(events lost, the first one's offset, the last one's). Raises ``ProtocolError``."""
    try:
        body = unpackb(frame.body)
        return int(body["lost"]), int(body["first_offset"]), int(body["last_offset"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ProtocolError(f"bad {frame!r}: {error}") from error


def next_offset(body: bytes) -> int:
    """Where a subscription begins, by the answer to SUBSCRIBE. Raises ``ProtocolError``."""
    try:
        return int(unpackb(body)["next_offset"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ProtocolError(f"bad answer to SUBSCRIBE: {error}") from error


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

    def call(self, method: str, body: bytes, fds: int = 0, timeout_ms: int = 0) -> tuple[int, bytes]:
        self._serial += 1
        serial = self._serial
        self.calls.add(serial)
        return serial, encode(CALL, method.encode(), body, 0, serial, timeout_ms, fds)

    def subscribe(self, body: bytes) -> tuple[int, int, bytes]:
        """(serial of the answer, subscription ID, frame). ``body``: see ``subscribe_body``."""
        self._serial += 1
        self._subscription += 1
        self.calls.add(self._serial)
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

    def receive(self, frame: Frame) -> Sequence[Incoming]:
        """What the frame means to the user; its descriptors are the caller's to close if that's nothing.

        Raises the ``BusError`` by which the broker refuses the connection, ``ProtocolError``. CALL, CANCEL, CREDIT and ACK frames
        concern a service or publisher and are not for this method.
        """
        kind = frame.kind
        if kind == EVENT:
            source = frame.route.decode("utf-8", "replace")
            time_ns, events = split_events(frame.body)
            offset, subscription = frame.arg, frame.peer
            return [
                Incoming("event", subscription, payload, [], topic.decode("utf-8", "replace"), offset + index, source, time_ns)
                for index, (topic, payload) in enumerate(events)
            ]
        if kind == RESULT or kind == ERROR or kind == ITEM:
            serial = frame.serial
            if serial not in self.calls:
                if kind == ERROR and serial == 0 and frame.arg == 0:  # the broker refuses the connection as a whole
                    raise refusal(frame)
                return ()
            if kind != ITEM:
                self.calls.discard(serial)
                self._consumed.pop(serial, None)
            return (Incoming(_KINDS[kind], serial, frame.body, frame.fds, "", frame.arg),)
        if kind == GAP:
            return (Incoming("gap", frame.peer, frame.body, [], "bus.gap", frame.arg, "bus"),)
        if kind == HEARTBEAT:
            beat = packb({"next_offset": frame.arg})
            return (Incoming("heartbeat", frame.peer, beat, [], "bus.heartbeat", frame.arg - 1, "bus"),)
        if kind == WELCOME:
            self.bus_id, self.connection_id = welcome(frame)
            self.welcomed = True
            return ()
        if kind in (ACK, PONG) or kind > HEARTBEAT:  # a newer broker may say more, to be ignored
            return ()
        raise ProtocolError(f"unexpected {frame!r}")


def refusal(frame: Frame) -> errors.BusError:
    """The error in an ERROR frame."""
    try:
        return errors.from_body(unpackb(frame.body))
    except ValueError as error:
        raise ProtocolError(f"bad {frame!r}: {error}") from error


def welcome(frame: Frame) -> tuple[str, int]:
    """(the journal's ID, the connection's ID). Raises ``ProtocolError``."""
    try:
        body = unpackb(frame.body)
        return str(body["bus"]), int(body["connection"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ProtocolError(f"bad {frame!r}: {error}") from error


def pong(frame: Frame) -> bytes:
    return encode(PONG, b"", b"", 0, frame.serial)


