"""The async client: calls, streams, events, and serving methods. Written on anyio, for tools on asyncio or trio.

A ``Bus`` keeps itself connected: when the broker goes away, open calls fail with ``unavailable`` (idempotent ones are made again),
calls being served are cancelled, and as soon as the broker is back the name is registered, subscriptions go on at the offset after
the last event seen, and events that were not acknowledged are published again.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import anyio
import msgspec
from msgpack import packb

from .. import errors
from ..contract.base import Event, Message, Method
from ..server import Call, Service
from ..session import pong, refusal
from ..sync import default_path
from ..transport import close_fds
from ..wakeup import Group, current_loop
from ..wire import (
    ACK,
    CALL,
    CANCEL,
    CREDIT,
    ERROR,
    EVENT,
    GAP,
    HEARTBEAT,
    ITEM,
    MAX_EVENT,
    PING,
    REGISTER,
    RESULT,
    Frame,
    ProtocolError,
    encode,
)
from .calls import MAX_SERIAL, Calls
from .link import FIRST_RETRY_S, LAST_RETRY_S, Link
from .pending import Answer, Pending, Stream, decode_body
from .publisher import Publisher
from .spool import Spool, claim
from .subscription import Events, ReceivedEvent, Subscription

if TYPE_CHECKING:
    from ..session import Filters, Since

log = logging.getLogger("pyx_bus.client")  # not structlog: this is a library, its user decides where it logs

Req = TypeVar("Req", bound=Message)
Res = TypeVar("Res", bound=Message)

FLUSH_S = 1.0
# How long until the file of a process that still lives is looked at again, doubled each time.
FIRST_LOOK_S = 1.0
LAST_LOOK_S = 60.0
_NO_NUMBER = 1 << 62  # no event has it
# A list whose place among the events can't be told is asked for again: its service has events that the broker doesn't have yet.
WATCH_ATTEMPTS = 12

_encode_body = msgspec.msgpack.Encoder().encode


class Bus(Calls):
    """A connection to the broker that renews itself. Make one with ``connect``."""

    def __init__(self, path: str, name: str, spool: Spool | None = None) -> None:
        """``spool``: where events are kept until they're acknowledged; without one that's this process's memory."""
        self.path = path
        self.name = name
        loop = current_loop()
        publisher = spool.publisher if spool is not None else secrets.token_hex(8)
        super().__init__(Link(path, name, publisher, loop, self._dispatch, self._connected, self._disconnected), loop)
        self.subscriptions: dict[int, Subscription] = {}
        self._spool = spool
        self._publisher = Publisher(self.link.send_and_gather, spool)
        self._held = False  # events wait for those of a predecessor to be published first
        self._told_dropped = 0
        self._acknowledged: anyio.Event | None = None  # if somebody waits for it
        self._subscription = 0
        self._service: Service | None = None
        self._connections = 0
        self._registering = False
        self._served: dict[tuple[int, int], Call] = {}
        self._group: Group | None = None

    @property
    def connected(self) -> bool:
        return self.link.up

    @property
    def bus_id(self) -> str:
        """The identity of the broker's journal: offsets are comparable within one."""
        return self.link.bus_id

    @property
    def events_dropped(self) -> int:
        """Events that were too large or too many to be kept until the broker takes them."""
        return self._publisher.dropped

    @property
    def events_refused(self) -> int:
        """Events the broker wouldn't take: this user may not publish their topic, or they break a rule."""
        return self._publisher.refused

    # --- events ------------------------------------------------------------------------------------------------------

    def publish(self, event: Event) -> None:
        """Publish an event. Kept and repeated until the broker has acknowledged it; ``events_dropped`` counts what the bounds cost, and
        ``events_refused`` what the broker wouldn't take.

        Never fails: what has happened has happened, whether or not it can be told.
        """
        publisher = self._publisher
        topic, body = type(event).topic.encode(), _encode_body(event)
        if len(topic) + len(body) > MAX_EVENT:
            log.error("an event is too large to be told: %s of %s, %d bytes", event.topic, event.id, len(body))
            publisher.dropped += 1
            return
        publisher.publish(topic, body)
        if publisher.dropped > self._told_dropped and publisher.dropped >= 2 * self._told_dropped:
            self._told_dropped = publisher.dropped
            log.error("%d events were dropped: the broker doesn't take them", publisher.dropped)

    async def flush(self) -> None:
        """Wait until the broker has acknowledged (or refused) every event published so far: they're in the journal then."""
        target = self._publisher.sequence
        while self._publisher.oldest <= target:
            self._acknowledged = self._acknowledged or anyio.Event()
            await self._acknowledged.wait()

    def events(
        self,
        *patterns: str,
        since: Since = None,
        journal: str = "",
        filters: Filters | None = None,
        durable: str = "",
        heartbeat_s: float | None = None,
        auto_ack: bool = True,
    ) -> Events:
        """Subscribe to topics: ``async for event in bus.events("container.*")``; see ``Events`` and ``ReceivedEvent``.

        ``since``: an offset, a time (``datetime``; without a zone it's local), "beginning" (the oldest kept), None for what comes from
        now on. With an offset ``journal``, the one it was told with: if the broker has another one now, there's a ``bus.gap`` whose
        ``lost`` is -1, and then everything from its beginning, as if that had happened while this ran. ``filters`` as Docker's:
        ``{"type": ["container"], "label": ["a=b"], "event!": ["exec_die"]}``: type, event, container, image, label, network, volume,
        service; with ``!`` what must not be.

        ``durable`` names a subscription whose position the broker keeps; it begins at ``since`` only the first time. An event is
        acknowledged when the next one is asked for, or when the ``async with`` block ends without an exception; with ``auto_ack=False``
        by ``event.ack()``. What wasn't acknowledged comes again the next time.

        ``heartbeat_s``: an event ``bus.heartbeat`` whenever there was nothing else for so long (at least 0.1 s).
        """
        return Events(Subscription(self, patterns, since, filters, durable, heartbeat_s, auto_ack, journal))

    @asynccontextmanager
    async def watch(
        self,
        method: Method[Req, Res],
        request: Req,
        *patterns: str,
        filters: Filters | None = None,
        heartbeat_s: float | None = None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[tuple[Res, Events]]:
        """State now, then everything after: a list and the events since, without gap or overlap.

        ``async with bus.watch(containerd.LIST, ListContainers(), "container.>") as (state, events): ...``

        ``method`` has to be one whose service tells which events its answer includes; for others, and while a service can't publish,
        it's ``Unavailable`` after some attempts. ``timeout_s`` is of each.
        """
        pause = FIRST_RETRY_S
        for _ in range(WATCH_ATTEMPTS):
            journal = self.bus_id
            frame = await self._call(method, request, (), timeout_s)
            close_fds(frame.fds)
            if frame.arg and journal == self.bus_id:
                subscription = Subscription(self, patterns, frame.arg, filters, "", heartbeat_s, True, journal)
                async with Events(subscription) as events:
                    if subscription.journal == journal:
                        yield decode_body(method.result, frame.body), events
                        return
            await anyio.sleep(pause)
            pause = min(LAST_RETRY_S, pause * 2)
        raise errors.Unavailable(f"{method.name} doesn't say which events its answer includes")

    def subscribing(self, subscription: Subscription) -> tuple[int, int]:
        """(an ID for the subscription, the serial its answer will have)."""
        self._subscription = self._subscription + 1 if self._subscription < MAX_SERIAL else 1
        serial = self._next_serial()
        self.subscriptions[self._subscription] = subscription
        self._pending[serial] = Answer(subscription.answered)
        return self._subscription, serial

    def unsubscribed(self, subscription: int, serial: int) -> None:
        self.subscriptions.pop(subscription, None)
        self._pending.pop(serial, None)

    # --- serving -----------------------------------------------------------------------------------------------------

    async def serve(self, service: Service) -> None:
        """Register a name and serve its methods from now on, over reconnects.

        Raises ``AlreadyExists`` if the name is taken, ``Unavailable``; then it isn't served, and one may try again.
        """
        await self.link.wait_up()
        connection, before = self._connections, self._service
        self._service, self._registering = service, True
        try:
            await self._register(service)
        except BaseException:
            self._service = before
            raise
        finally:
            self._registering = False
        if connection != self._connections:  # it broke just then
            self._begin_to_register(service)

    async def _register(self, service: Service) -> None:
        serial = self._next_serial()
        pending = self._pending[serial] = Pending(serial, self.loop.wakeup())
        body = packb({"methods": service.verbs(), "version": service.version})
        self.link.send(encode(REGISTER, service.name.encode(), body, 0, serial))
        try:
            await pending.pop()
        finally:
            self._forget(pending)

    def _begin_to_register(self, service: Service) -> None:
        assert self._group is not None
        self._registering = True
        self._group.start_soon(self._register_again, service)

    async def _register_again(self, service: Service) -> None:
        """The old connection's end may reach the broker after our new one: try until the name is free."""
        pause, told = FIRST_RETRY_S, ""
        try:
            while self.link.up:  # else the connection that comes next begins anew
                connection = self._connections
                try:
                    await self._register(service)
                    if connection == self._connections:
                        return
                except errors.BusError as error:
                    if connection != self._connections or not self.link.up:
                        continue  # it broke meanwhile
                    if not isinstance(error, errors.AlreadyExists) and error.message != told:
                        told = error.message
                        log.error("the bus doesn't let us serve %s any more: %s", service.name, told)
                    await anyio.sleep(pause)
                    pause = min(LAST_RETRY_S, pause * 2)
        finally:
            self._registering = False

    def _serve(self, frame: Frame) -> bool:
        """A call came. Whether a task was started for it."""
        call = Call(self.link.send, frame, self._published)
        if self._service is None:
            call.fail(errors.Unimplemented("this connection serves nothing"))
            return False
        work = self._service.begin(call, frame)
        if work is None:
            return False
        key = (frame.peer, frame.serial)
        if key in self._served:
            self._served[key].abandon()  # its caller broke the rules, and gets the answer to its second call only
        self._served[key] = call
        assert self._group is not None
        self._group.start_soon(self._finish, call, work, key)
        return True

    async def _finish(self, call: Call, work: object, key: tuple[int, int]) -> None:
        assert self._service is not None
        try:
            await self._service.finish(call, work, self.loop)
        finally:
            if self._served.get(key) is call:  # else it was cancelled, and the caller has used its number again
                del self._served[key]

    def _published(self) -> int:
        # The state may know of what a predecessor left, which none of our numbers stands for until one has been published after it.
        return self._publisher.sequence or (_NO_NUMBER if self._held else 0)

    # --- what predecessors left --------------------------------------------------------------------------------------

    async def _take_over(self, spool: Spool) -> None:
        """Publish what processes that have ended left in their files; then what this one holds back meanwhile, so that order is kept.

        One that still lives publishes its events itself; should it end before it's done they're taken over then.
        """
        pause = FIRST_LOOK_S
        while True:
            left, lingering = claim(spool.place, spool.publisher)
            try:
                for each in left:
                    await self._publish_left(each)
            finally:
                for each in left:
                    each.close(empty=False)
            if self._held:
                self._held = False
                if self.link.up:
                    self._publisher.connected()
            if not lingering:
                return
            await anyio.sleep(pause)
            pause = min(LAST_LOOK_S, pause * 2)

    async def _publish_left(self, spool: Spool) -> None:
        """On a connection of its own: a connection has one publisher ID."""
        try:
            events = spool.load()
        except OSError as error:
            log.error("can't read the events that publisher %s left: %s", spool.publisher, error)
            return
        bus = Bus(self.path, self.name, spool)
        bus._publisher.restore(events)
        if events:
            async with bus.loop.group() as group:
                group.start_soon(bus.run, group)
                await bus.flush()
                group.cancel_scope.cancel()
            log.info("published %d events that a predecessor had left", len(events) - bus.events_refused)
        bus.close()

    def close(self) -> None:
        """Nothing is published any more. What wasn't acknowledged stays in the file, if there's one, for a successor."""
        if self._spool is not None:
            self._spool.close(empty=not len(self._publisher))

    # --- the connection ----------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Before ``run``: predecessors may have left events, which come first."""
        self._held = True

    async def run(self, group: Group) -> None:
        """Keep connected until cancelled."""
        self._group = group
        group.start_soon(self.deadlines.run)
        if self._held:
            assert self._spool is not None
            group.start_soon(self._take_over, self._spool)
        try:
            await self.link.run(group)
        finally:
            self._disconnected()

    def _dispatch(self, frame: Frame) -> bool:
        """Act on a frame. Whether that woke a task."""
        kind = frame.kind
        if kind == RESULT or kind == ERROR:
            pending = self._pending.pop(frame.serial, None)
            if pending is not None:
                if pending.timer is not None:
                    self.deadlines.cancel(pending.timer)
                return pending.push(frame)
            if kind == ERROR and not frame.serial:
                self._refused(frame)
        elif kind == CALL:
            return self._serve(frame)
        elif kind == EVENT or kind == GAP or kind == HEARTBEAT:
            subscription = self.subscriptions.get(frame.peer)
            return subscription is not None and subscription.push(frame)
        elif kind == ITEM:
            pending = self._pending.get(frame.serial)
            if pending is not None:
                return pending.push(frame)
        elif kind == CANCEL or kind == CREDIT:
            call = self._served.get((frame.peer, frame.serial))
            if call is not None:
                if kind == CREDIT:
                    call.add_credit(frame.arg)
                else:
                    del self._served[frame.peer, frame.serial]
                    call.abandon()
                return True
        elif kind == ACK:
            self._publisher.acknowledged(frame.arg)
            return self._tell_flushers()
        elif kind == PING:
            self.link.send(pong(frame))
        if frame.fds:
            close_fds(frame.fds)  # nobody's any more
        return False

    def _tell_flushers(self) -> bool:
        acknowledged, self._acknowledged = self._acknowledged, None
        if acknowledged is None:
            return False
        acknowledged.set()
        return True

    def _refused(self, frame: Frame) -> None:
        """An event was refused, or the connection is."""
        error = refusal(frame)
        if not frame.arg:
            raise ProtocolError(error.message)
        if isinstance(error, errors.PermissionDenied | errors.InvalidArgument):
            self._publisher.refuse(frame.arg)
            self._tell_flushers()
            log.error("the bus doesn't take an event: %s", error.message)
            return
        pause_s = self._publisher.pause(frame.arg)
        if pause_s is not None:
            log.warning("the bus can't take events now: %s", error.message)
            self.deadlines.at(self.loop.now() + pause_s, self._publisher.resume)

    def _connected(self) -> None:
        """Take up where the last connection ended. (Subscriptions do it themselves: they have been waiting for the link.)"""
        if not self._held:
            self._publisher.connected()
        self._connections += 1
        if self._service is not None and not self._registering:
            self._begin_to_register(self._service)

    def _disconnected(self) -> None:
        self._publisher.disconnected()
        served, self._served = self._served, {}
        for call in served.values():
            call.abandon()
        self._fail_all(errors.Unavailable("lost the connection to the bus during the call"))
        subscriptions, self.subscriptions = self.subscriptions, {}
        for subscription in subscriptions.values():
            subscription.lost()


@asynccontextmanager
async def connect(
    path: str | None = None, name: str = "client", *, wait: bool = True, spool: Path | None = None
) -> AsyncIterator[Bus]:
    """A connected ``Bus`` for the length of the block. Raises ``Unavailable`` if the bus isn't there within 5 s.

    With ``wait=False`` the block is entered at once and calls wait for the connection. At the end of the block what was published gets
    a second to be acknowledged.

    With ``spool``, what was published survives this process's end at any moment: it's also in a file that begins with this path and is
    this process's own, and the next that connects with the same ``spool`` publishes what wasn't acknowledged.
    """
    bus = Bus(path or default_path(), name, Spool(spool) if spool is not None else None)
    if spool is not None:
        bus.hold()
    failure: BaseException | None = None
    try:
        async with bus.loop.group() as group:
            group.start_soon(bus.run, group)
            try:
                if wait:
                    await bus.link.wait_up()
                yield bus
                if bus.connected:
                    with anyio.move_on_after(FLUSH_S):
                        await bus.flush()
            except (Exception, KeyboardInterrupt, SystemExit) as error:
                failure = error
            finally:
                bus.link.close()
                group.cancel_scope.cancel()
    finally:
        bus.close()
    if failure is not None:
        raise failure  # as it is: that there are tasks of ours beside the block, which make groups of exceptions, is nobody's concern


__all__ = ["Bus", "Events", "ReceivedEvent", "Stream", "connect"]
