"""What the blocking client iterates over: a call's items, and events over reconnections.

``Events`` keeps to the same rules as the async client's ``subscription`` module: in order, none twice, none missed without a word, and what
this process holds of what nobody took yet is bounded: beyond, the subscription is ended and made again when there's room.
"""

from __future__ import annotations

import time
from collections import deque

from . import errors
from .session import DURABLE_HEARTBEAT_S, Incoming, acknowledge, begins_in, clip_gap
from .transport import close_fds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from .session import Filters, Since
    from .sync import Connection

MAX_BUFFERED_EVENTS = 16_384
MAX_BUFFERED_BYTES = 8 << 20
ACK_EVENTS = 64
ACK_S = 0.1
FIRST_RETRY_S = 0.01
LAST_RETRY_S = 0.5
# A broker that has just come back may still know our last connection (``conflict`` of a durable name), or have no room yet.
REFUSED_FOR_S = 10.0


class Stream:
    """A call's items, as dicts; then its ``result``. Leaving the block before the end cancels the call."""

    def __init__(self, connection: Connection, serial: int, timeout_s: float | None) -> None:
        self._connection = connection
        self._serial = serial
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._result: Incoming | None = None
        self._ended = False
        self._fds: list[int] = []

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        close_fds(self.take_fds())
        if not self._ended and not self._connection.closed:
            self._ended = True
            self._connection.cancel(self._serial)

    def __iter__(self) -> Iterator[dict[str, object]]:
        return self

    def __next__(self) -> dict[str, object]:
        message = self._next()
        if message is None:
            raise StopIteration
        return message.body

    def _next(self) -> Incoming | None:
        if self._ended:
            return None
        close_fds(self.take_fds())
        try:
            message = self._connection.next_answer(self._serial, self._deadline)
        except errors.BusError:
            self._ended = True
            raise
        if message is None:
            self._ended = True
            self._connection.cancel(self._serial)
            raise errors.DeadlineExceeded(f"no answer within {self._timeout_s} s")
        self._fds = message.fds
        if message.kind == "result":
            self._ended = True
            self._result = message
            return None
        return message

    def take_fds(self) -> list[int]:
        """The descriptors of the latest item or of the result; they're yours then."""
        fds, self._fds = self._fds, []
        return fds

    def result(self) -> dict[str, object]:
        """Wait for the end, passing over items not yet taken. Raises the call's error."""
        while self._next() is not None:
            pass
        if self._result is None:
            raise errors.Cancelled("the call has ended without a result")
        return self._result.body


class Events:
    """Iterate over it, or ask it with ``receive``. A ``with`` block ends the subscription; so does ``close``."""

    def __init__(
        self,
        connection: Connection,
        encode: Callable[..., bytes],
        patterns: Sequence[str],
        since: Since,
        journal: str,
        filters: Filters | None,
        durable: str,
        heartbeat_s: float | None,
        *,
        auto_ack: bool,
        retry_for_s: float | None,
    ) -> None:
        self._connection = connection
        self._encode = encode
        self._patterns = patterns
        self._since = since
        self._durable = bool(durable)
        self._beats = bool(heartbeat_s)  # the user wants to see them
        if self._durable and not heartbeat_s:
            heartbeat_s = DURABLE_HEARTBEAT_S
        self._asked = {"filters": filters, "durable": durable, "heartbeat_s": heartbeat_s}
        self._auto_ack = auto_ack and self._durable
        self._retry_for_s = retry_for_s
        self._id = 0
        self._closed = False
        self._buffer: deque[Incoming] = deque()
        self._buffered_bytes = 0
        self._journal = begins_in(since, journal)
        self._resume_at = 0  # the first offset that hasn't come; 0 before the first answer
        self._processed = 0
        self._acknowledged = 0
        self._acknowledged_at = 0.0
        self._handed_out = 0
        self._idle = (0, 0)  # when everything up to the first offset is processed, everything up to the second is
        self._subscribe()

    def __enter__(self) -> Events:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Without an exception the event handed out last counts as processed."""
        if kind is None and self._auto_ack:
            self.ack(self._handed_out)
        self.close()

    def __iter__(self) -> Iterator[Incoming]:
        return self

    def __next__(self) -> Incoming:
        if self._closed:
            raise StopIteration
        message = self.receive()
        if message is None:
            raise StopIteration
        return message

    def pending(self) -> bool:
        """An event is here already: ``receive`` won't block."""
        while self._buffer and self._buffer[0].kind == "heartbeat" and not self._beats:
            self._passed(self._buffer.popleft().offset)
        return bool(self._buffer)

    def receive(self, timeout_s: float | None = None) -> Incoming | None:
        """The next event, gap or heartbeat; None if nothing came within ``timeout_s``.

        Raises ``Unavailable`` if the bus stays away longer than ``retry_for_s``, and the error by which it refuses the subscription.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        if self._auto_ack:
            self.ack(self._handed_out)
        while not self.pending():
            if self._closed:
                return None
            if not self._id and not self._subscribe_again(deadline):
                return None
            try:
                self._send_ack()
                if not self._buffer and not self._connection.read(deadline):
                    return None
            except errors.Unavailable:
                self._id = 0  # the next turn connects again
        message = self._buffer.popleft()
        if message.kind == "heartbeat":
            self._passed(message.offset)
        else:
            self._handed_out = message.offset
        if not self._buffer:
            self._buffered_bytes = 0
        return message

    def ack(self, offset: int) -> None:
        """Every event up to and including ``offset`` is processed (durable subscriptions with ``auto_ack=False``).

        ``offset`` is that of an event, gap or heartbeat handed out; one that's beyond isn't taken.
        """
        after, upto = self._idle
        if not self._durable or offset > max(self._handed_out, upto):
            return
        if after <= offset < upto:
            offset = upto
        if offset <= self._processed:
            return
        self._processed = offset
        if offset >= self._acknowledged + ACK_EVENTS or time.monotonic() >= self._acknowledged_at + ACK_S:
            try:
                self._send_ack()
            except errors.Unavailable:
                self._id = 0

    def _passed(self, upto: int) -> None:
        """A heartbeat: between what was handed out last and ``upto`` there's nothing of ours."""
        self._idle = (self._handed_out, upto)
        if self._handed_out <= self._processed:
            self.ack(upto)

    def close(self) -> None:
        """End the subscription; a durable one goes on from what's acknowledged when somebody subscribes under its name again."""
        if self._closed:
            return
        self._closed = True
        self._buffer.clear()
        if self._connection.closed or not self._id:
            return
        try:
            self._send_ack()
            subscription, self._id = self._id, 0
            self._connection.unsubscribe(subscription)
        except errors.Unavailable:
            pass  # then it has ended with the connection

    # --- what the connection tells -----------------------------------------------------------------------------------

    def push(self, messages: Sequence[Incoming], size: int) -> None:
        for message in messages:
            after = message.offset + 1
            if message.kind == "heartbeat":
                if self._buffer and self._buffer[-1].kind == "heartbeat":
                    self._buffer.pop()  # nobody has looked for a while: the last one says it all
            elif after <= self._resume_at:
                continue  # a durable subscription begins again where it's acknowledged, not where we are
            elif message.kind == "gap":
                message.raw = clip_gap(message.raw, self._resume_at)
            self._resume_at = max(self._resume_at, after)
            self._buffer.append(message)
        self._buffered_bytes += size
        if self._id and (len(self._buffer) >= MAX_BUFFERED_EVENTS or self._buffered_bytes >= MAX_BUFFERED_BYTES):
            subscription, self._id = self._id, 0
            self._connection.unsubscribe(subscription)

    def lost(self) -> None:
        self._id = 0

    # --- subscribing -------------------------------------------------------------------------------------------------

    def _subscribe_again(self, deadline: float | None) -> bool:
        """Connect again if need be, and go on. False at the deadline."""
        give_up = None if self._retry_for_s is None else time.monotonic() + self._retry_for_s
        refused_for = time.monotonic() + REFUSED_FOR_S
        pause = FIRST_RETRY_S
        while True:
            try:
                if self._connection.closed:
                    self._connection.connect()
                self._subscribe()
                return True
            except errors.Unavailable:
                if give_up is not None and time.monotonic() > give_up:
                    raise
            except (errors.Conflict, errors.ResourceExhausted):
                if time.monotonic() > refused_for:
                    raise
            if deadline is not None and time.monotonic() + pause > deadline:
                return False
            time.sleep(pause)  # between two looks at whether the broker is back
            pause = min(LAST_RETRY_S, pause * 2)

    def _subscribe(self) -> None:
        connection = self._connection
        since: Since = self._resume_at or self._since
        if self._journal and self._journal != connection.bus_id:  # offsets of another journal mean nothing in this one
            from msgpack import packb

            self._since = since = "beginning"
            self._resume_at = self._handed_out = self._processed = 0
            self._idle = (0, 0)
            lost = packb({"lost": -1, "first_offset": 0, "last_offset": 0, "journal": connection.bus_id})
            self._buffer.append(Incoming("gap", 0, lost, [], "bus.gap", 0, "bus"))
        self._journal = connection.bus_id
        self._acknowledged = 0
        self._id, answer = connection.ask_to_subscribe(self._encode(self._patterns, since, **self._asked), self)
        if not self._resume_at:
            self._resume_at = int(str(answer["next_offset"]))

    def _send_ack(self) -> None:
        if self._processed > self._acknowledged and self._id and not self._connection.closed:
            self._acknowledged, self._acknowledged_at = self._processed, time.monotonic()
            self._connection.send(acknowledge(self._id, self._processed))
