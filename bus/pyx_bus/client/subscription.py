"""Subscriptions of the async client: events in order, none twice, none missed without a word, over reconnections and one's own slowness.

A subscriber that doesn't keep up isn't sent more than ``MAX_BUFFERED_EVENTS`` or ``MAX_BUFFERED_BYTES`` ahead: the subscription is
ended, and made again at the first offset that isn't here, once half of it was taken. The broker's journal holds the rest. So this
process drops nothing, and the only gaps are those that the journal's retention makes.

It's the subscriber's own task that subscribes again: when it looks for the next event and there's no subscription. While it's busy
with other things there's nothing to do.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

from .. import errors
from ..session import (
    DURABLE_HEARTBEAT_S,
    acknowledge,
    begins_in,
    clip_gap,
    gap_body,
    next_offset,
    refusal,
    subscribe_body,
)
from ..transport import close_fds
from ..wire import ERROR, EVENT, GAP, HEARTBEAT, SUBSCRIBE, UNSUBSCRIBE, Frame, encode, split_events
from .link import FIRST_RETRY_S, LAST_RETRY_S, WAIT_FOR_BUS_S
from .payloads import Gap, Heartbeat, decode_payload

if TYPE_CHECKING:
    from types import TracebackType

    from ..session import Filters, Since
    from ..wakeup import Timer
    from .bus import Bus

MAX_BUFFERED_EVENTS = 16_384
MAX_BUFFERED_BYTES = 8 << 20
# A durable subscriber's position goes to the broker after so many events, so much time, or when there's nothing more to take.
ACK_EVENTS = 64
ACK_S = 0.1
# An iteration that never has to wait lets others run after so many events.
EVENTS_PER_TURN = 64
# A broker that has just come back may still know our last connection (``conflict`` of a durable name), or have no room yet.
RETRY_FOR_S = 10.0


class ReceivedEvent:
    """An event as a subscriber gets it.

    ``offset`` in the journal ``journal``; ``source`` is the service that published it, ``time_ns`` the broker's clock when it took it.
    ``payload`` is the contract's event class for the topic (``pyx_bus.contract``), or a dict if there's none; ``raw`` is its msgpack. Two
    topics are the client's own: ``bus.gap`` with a ``Gap``, and, if asked for, ``bus.heartbeat`` with a ``Heartbeat``. A gap's offset is
    the last one lost, a heartbeat's the last one before it: whatever it is, up to there everything has come, and the next is at
    ``offset + 1``.
    """

    __slots__ = ("_payload", "_subscription", "journal", "offset", "raw", "source", "time_ns", "topic")

    def __init__(
        self,
        topic: str,
        offset: int,
        source: str,
        time_ns: int,
        raw: bytes,
        journal: str,
        subscription: Subscription,
        payload: Any = None,
    ) -> None:
        self.topic = topic
        self.offset = offset
        self.source = source
        self.time_ns = time_ns
        self.raw = raw
        self.journal = journal
        self._subscription = subscription
        self._payload = payload

    @property
    def payload(self) -> Any:
        value = self._payload
        if value is None:
            value = self._payload = decode_payload(self.topic, self.raw)
        return value

    @property
    def id(self) -> str:
        """Docker's actor: the container's or image's ID, the network's, volume's or service's name. Whatever the payload's type."""
        return str(_field(self.payload, "id", ""))

    @property
    def attributes(self) -> dict[str, str]:
        """Docker's attributes of the actor. Whatever the payload's type."""
        value = _field(self.payload, "attributes", {})
        return value if isinstance(value, dict) else {}

    def ack(self) -> None:
        """This event and all before it are processed (durable subscriptions with ``auto_ack=False``)."""
        self._subscription.ack(self.offset, self.journal)

    def __repr__(self) -> str:
        return f"<event {self.offset} {self.topic} of {self.source}: {self.payload!r}>"


def _field(payload: Any, name: str, default: object) -> object:
    return payload.get(name, default) if isinstance(payload, dict) else getattr(payload, name, default)


class Subscription:
    """What was asked for, what has come, and how far the subscriber is. Knows nothing of ``Events``, which ends it."""

    def __init__(
        self,
        bus: Bus,
        patterns: tuple[str, ...],
        since: Since,
        filters: Filters | None,
        durable: str,
        heartbeat_s: float | None,
        auto_ack: bool,
        journal: str = "",
    ) -> None:
        self._bus = bus
        self._beats = bool(heartbeat_s)  # the user wants to see them
        if durable and not heartbeat_s:
            heartbeat_s = DURABLE_HEARTBEAT_S
        self._asked = {"filters": filters, "durable": durable, "heartbeat_s": heartbeat_s}
        self._patterns = patterns
        self._since = since
        self._body(since)  # nonsense is refused at once
        self._durable = bool(durable)
        self._auto_ack = auto_ack and self._durable
        self.id = 0  # 0: not subscribed
        self.serial = 0  # of the answer that's awaited
        self._wakeup = bus.loop.wakeup()
        self._refusal: errors.BusError | None = None
        self._refused_since = 0.0
        self._pause_s = FIRST_RETRY_S
        self.closed = False
        self.abandoned = False
        # What has come and wasn't taken: frames, and events of our own making.
        self._buffer: deque[Frame | ReceivedEvent] = deque()
        self._buffered_events = 0
        self._buffered_bytes = 0
        self._journal = begins_in(since, journal)  # whose offset is ...
        self._resume_at: int | None = None  # ... the first that hasn't come; None: not subscribed yet
        # The batch that is being taken.
        self._batch: list[tuple[bytes, bytes]] = []
        self._index = 0
        self._first = 0
        self._source = ""
        self._time_ns = 0
        self._taken_journal = ""
        self._next = 0  # the first offset not taken yet
        self._turn = 0
        # Acknowledging.
        self._processed = 0
        self._acknowledged = 0
        self._handed_out = 0  # the last offset, in the journal that is taken from
        self._idle = (0, 0)  # when everything up to the first offset is processed, everything up to the second is
        self._timer: Timer | None = None

    def _body(self, since: Since) -> bytes:
        return subscribe_body(self._patterns, since, **self._asked)  # type: ignore[arg-type]

    # --- the reader's side -------------------------------------------------------------------------------------------

    def push(self, frame: Frame) -> bool:
        """An EVENT, GAP or HEARTBEAT came. Whether that woke the subscriber."""
        if self.abandoned:
            self.close()
            return False
        after, count = frame.arg, 0
        if frame.kind == EVENT:
            count = frame.serial
            after += count
        elif frame.kind == GAP:
            after += 1
        if self._resume_at is None:  # before the answer: not as it's specified, and no reason to fail
            self._resume_at = self._next = frame.arg
            self._taken_journal = self._journal
        if after <= self._resume_at and frame.kind != HEARTBEAT:
            return False  # a durable subscription begins again where it's acknowledged, not where we are
        if frame.kind == GAP:
            frame.body = clip_gap(frame.body, self._resume_at)
        elif frame.kind == HEARTBEAT and self._buffer:
            latest = self._buffer[-1]
            if isinstance(latest, Frame) and latest.kind == HEARTBEAT:
                self._buffer.pop()  # nobody has looked for a while: the last one says it all
        self._resume_at = max(after, self._resume_at)
        self._buffer.append(frame)
        self._buffered_events += count
        self._buffered_bytes += len(frame.body)
        if self._buffered_events >= MAX_BUFFERED_EVENTS or self._buffered_bytes >= MAX_BUFFERED_BYTES:
            self._unsubscribe()
        return self._wakeup.wake()

    def answered(self, frame: Frame) -> bool:
        self.serial = 0
        close_fds(frame.fds)
        if frame.kind == ERROR:
            self._bus.subscriptions.pop(self.id, None)
            self.id = 0
            self._refusal = refusal(frame)
            return self._wakeup.wake()
        self._refused_since, self._pause_s = 0.0, FIRST_RETRY_S
        if self._resume_at is None:
            self._resume_at = self._next = next_offset(frame.body)
            self._taken_journal = self._journal
        self._acknowledged = 0  # what was told the last connection may not have arrived
        self._send_ack()
        return self._wakeup.wake()

    def lost(self) -> None:
        """The connection broke."""
        self.id = self.serial = 0
        self._wakeup.wake()

    def _subscribe(self) -> None:
        """Ask for it; ``answered`` or ``lost`` will tell. To be called while connected."""
        bus = self._bus
        since = self._since
        if self._journal and self._journal != bus.bus_id:  # offsets of another journal mean nothing in this one
            if self._resume_at is not None or isinstance(since, int):
                self._buffer.append(
                    ReceivedEvent("bus.gap", 0, "bus", 0, b"", bus.bus_id, self, Gap(lost=-1, journal=bus.bus_id))
                )
                self._resume_at = None if self._resume_at is None else 0
                self._since = since = "beginning"
            # (Who has nothing yet and gave no offset asks for the same again.)
        elif self._resume_at:
            since = self._resume_at
        self._journal = bus.bus_id
        self.id, self.serial = bus.subscribing(self)
        bus.link.send(encode(SUBSCRIBE, b"", self._body(since), self.id, self.serial))

    @property
    def journal(self) -> str:
        """The journal it was last asked for in."""
        return self._journal

    def _unsubscribe(self) -> None:
        if not self.id:
            return
        subscription, self.id = self.id, 0
        self._bus.unsubscribed(subscription, self.serial)
        self.serial = 0
        self._bus.link.send(encode(UNSUBSCRIBE, b"", b"", subscription))

    # --- the subscriber's side ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Until it's subscribed."""
        while self._resume_at is None and not self.closed:
            await self._advance()

    async def _advance(self) -> None:
        """Wait for whatever comes next: an answer, a frame, a connection to subscribe over."""
        if self.id:
            await self._wakeup.wait()
            return
        if self._refusal is not None:
            error, self._refusal = self._refusal, None
            await self._bear(error)
        try:
            await self._bus.link.wait_up(WAIT_FOR_BUS_S if self._resume_at is None else None)
        except errors.BusError as error:
            await self._bear(error)
            return
        if not self.closed:
            self._subscribe()

    async def _bear(self, error: errors.BusError) -> None:
        """A refusal: the subscriber's to know, unless we had a subscription and it may just be early for another."""
        now = self._bus.loop.now()
        self._refused_since = self._refused_since or now
        passing = isinstance(error, errors.Conflict | errors.ResourceExhausted | errors.Unavailable)
        if self._resume_at is None or not passing or now > self._refused_since + RETRY_FOR_S:
            self._refused_since = 0.0
            raise error
        await anyio.sleep(self._pause_s)
        self._pause_s = min(LAST_RETRY_S, self._pause_s * 2)

    async def next(self) -> ReceivedEvent:
        if self._auto_ack:
            self.ack(self._handed_out)
        while True:
            index = self._index
            if index < len(self._batch):
                self._index = index + 1
                offset = self._first + index
                if offset < self._next:
                    continue
                self._next = offset + 1
                self._handed_out = offset
                topic, payload = self._batch[index]
                name = topic.decode("utf-8", "replace")
                return ReceivedEvent(name, offset, self._source, self._time_ns, payload, self._taken_journal, self)
            event = await self._take()
            if event is not None:
                return event

    async def _take(self) -> ReceivedEvent | None:
        """Take the next frame out of the buffer: a batch to iterate over, or an event."""
        while not self._buffer:
            if self.closed:
                raise StopAsyncIteration
            self._turn = 0
            self._send_ack()
            await self._advance()
        if self._turn >= EVENTS_PER_TURN:
            self._turn = 0
            await anyio.lowlevel.checkpoint()
        frame = self._buffer.popleft()
        if isinstance(frame, ReceivedEvent):  # another journal
            self._taken_journal, self._next = frame.journal, 0
            self._processed = self._acknowledged = self._handed_out = 0
            self._idle = (0, 0)
            return frame
        self._buffered_bytes -= len(frame.body)
        if frame.kind == EVENT:
            self._buffered_events -= frame.serial
            self._turn += frame.serial
            self._time_ns, self._batch = split_events(frame.body)
            self._first, self._index = frame.arg, 0
            self._source = frame.route.decode("utf-8", "replace")
        self._resubscribe()
        if frame.kind == GAP:
            lost, first, last = gap_body(frame)
            self._next = max(self._next, last + 1)
            self._handed_out = last
            payload: Any = Gap(lost=lost, first_offset=first, last_offset=last)
            return ReceivedEvent("bus.gap", last, "bus", 0, frame.body, self._taken_journal, self, payload)
        if frame.kind == HEARTBEAT:
            self._turn += 1
            self._next = max(self._next, frame.arg)
            self._idle = (self._handed_out, frame.arg - 1)
            if self._handed_out <= self._processed:
                self.ack(frame.arg - 1)
            if not self._beats:
                return None
            payload = Heartbeat(next_offset=frame.arg)
            return ReceivedEvent("bus.heartbeat", frame.arg - 1, "bus", 0, frame.body, self._taken_journal, self, payload)
        return None

    def _resubscribe(self) -> None:
        """After having been ahead too far, as soon as there's room. (A durable one is sent again what isn't acknowledged: when empty.)"""
        if self.id or self.closed or self._refusal is not None or not self._bus.link.up:
            return
        room = not self._buffer if self._durable else (
            self._buffered_events <= MAX_BUFFERED_EVENTS // 2 and self._buffered_bytes <= MAX_BUFFERED_BYTES // 2
        )
        if room:
            self._subscribe()

    def ack(self, offset: int, journal: str = "") -> None:
        if (journal and journal != self._taken_journal) or not self._durable:
            return
        if offset >= self._next:  # not handed out, and nothing that the broker should hear
            return
        after, upto = self._idle
        if after <= offset < upto:
            offset = upto
        if offset <= self._processed:
            return
        self._processed = offset
        if offset >= self._acknowledged + ACK_EVENTS:
            self._send_ack()
        elif self._timer is None:
            self._timer = self._bus.deadlines.at(self._bus.loop.now() + ACK_S, self._send_ack)

    def _send_ack(self) -> None:
        if self._timer is not None:
            self._bus.deadlines.cancel(self._timer)
            self._timer = None
        if self._processed > self._acknowledged and self.id and not self.serial and self._journal == self._taken_journal:
            self._acknowledged = self._processed
            self._bus.link.send(acknowledge(self.id, self._processed))

    def close(self, *, processed: bool = False) -> None:
        """``processed``: what was handed out last is, too."""
        if self.closed:
            return
        if processed and self._auto_ack:
            self.ack(self._handed_out)
        self.closed = True
        self._send_ack()
        self._unsubscribe()
        self._buffer.clear()
        self._batch = []
        self._wakeup.wake()


class Events:
    """A subscription to iterate over. Two ways to use it::

        async for event in bus.events("container.*", since=offset): ...

        async with bus.events("container.*") as events:  # subscribed from here on
            async for event in events: ...

    The block ends the subscription when it's left, and is the way to choose where that matters. The bare loop subscribes with its first
    turn; left early, it ends with the iterator, which CPython drops at once unless something refers to it. ``aclose`` ends it any time.

    One task iterates. Iterating raises the ``BusError`` by which the broker refuses the subscription; a connection that breaks is
    waited for, for ever, and nothing is missed meanwhile.
    """

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription
        self._thread = threading.get_ident()

    async def __aenter__(self) -> Events:
        try:
            await self._subscription.start()
        except BaseException:
            self._subscription.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._subscription.close(processed=kind is None)

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> ReceivedEvent:
        return await self._subscription.next()

    def ack(self, offset: int) -> None:
        """Every event up to and including ``offset`` is processed (durable subscriptions with ``auto_ack=False``).

        ``offset`` is that of an event, gap or heartbeat handed out; one that's beyond isn't taken.
        """
        self._subscription.ack(offset)

    async def aclose(self) -> None:
        """End the subscription. A durable one's position is where the last event was that another one was asked for after."""
        self._subscription.close()

    def __del__(self) -> None:
        subscription = self._subscription
        if subscription.closed:
            return
        if self._thread == threading.get_ident():
            subscription.close()
        else:  # dropped by the garbage collector in another thread: the next frame will tell
            subscription.abandoned = True


__all__ = ["MAX_BUFFERED_BYTES", "MAX_BUFFERED_EVENTS", "Events", "ReceivedEvent", "Subscription"]
