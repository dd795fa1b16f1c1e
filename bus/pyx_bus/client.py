"""The async client: calls, streams, events, and serving methods. Written on anyio, for tools on asyncio or trio.

A ``Bus`` keeps itself connected: when the broker goes away, open calls fail with ``unavailable`` (idempotent ones are made again),
calls being served are cancelled, and as soon as the broker is back the name is registered, subscriptions go on at the offset after
the last event seen, and events that were not acknowledged are published again.

Nothing here blocks the loop: the socket is non-blocking and written at once; only what the kernel doesn't take waits.
"""

from __future__ import annotations

import errno
import logging
import secrets
import socket
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio
import anyio.abc
import msgspec

from . import errors
from .contract.base import Event, Message, Method
from .pending import Pending, ReceivedEvent, Stream, Subscription
from .server import Call, Service, serve_call
from .session import Session, pong
from .sync import connect_unix, default_path
from .transport import Transport, close_fds
from .wire import ACK, CALL, CANCEL, CREDIT, MAX_EVENT, PING, PUBLISH, Frame, ProtocolError, encode

log = logging.getLogger("pyx_bus.client")  # not structlog: this is a library, its user decides where it logs

Req = TypeVar("Req", bound=Message)
Res = TypeVar("Res", bound=Message)

FIRST_RETRY_S = 0.01
LAST_RETRY_S = 0.5
RETRY_FOR_S = 30.0
# Events not yet acknowledged by the broker. At about 300 bytes each this is 20 MB, some hours of a busy host without its broker.
MAX_UNACKNOWLEDGED = 65_536

# What sendmsg(2) and dup(2) say of the descriptors that shall travel; the connection is well.
_NOT_THE_SOCKETS = (errno.EBADF, errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS)

_encode_body = msgspec.msgpack.encode


class Bus:
    """A connection to the broker that renews itself. Make one with ``connect``."""

    def __init__(self, path: str, name: str) -> None:
        self.path = path
        self.name = name
        self._publisher = secrets.token_hex(8)
        self._sequence = 0
        self._unacknowledged: deque[tuple[int, bytes]] = deque()
        self.events_dropped = 0
        self._session = Session()
        self._transport: Transport | None = None
        self._up = anyio.Event()
        self._pending: dict[int, Pending] = {}
        self._subscriptions: dict[int, Subscription] = {}
        self._service: Service | None = None
        self._served: dict[tuple[int, int], Call] = {}
        self._group: anyio.abc.TaskGroup | None = None
        self._flushing = False
        self._failure: errors.BusError | None = None

    @property
    def connected(self) -> bool:
        return self._up.is_set()

    # --- calls -------------------------------------------------------------------------------------------------------

    async def call(
        self, method: Method[Req, Res], request: Req, *, fds: Sequence[int] = (), timeout_s: float | None = None
    ) -> Res:
        """Call and wait for the result; a stream's items are passed over.

        Raises ``BusError``s; ``DeadlineExceeded`` after ``timeout_s``. Cancelling cancels the callee. An idempotent method is
        called again when the connection broke or the service was away, until the deadline (if there's none, while it has been away for
        less than ``RETRY_FOR_S``); ``fds`` stay yours.
        """
        result, received = await self.call_fds(method, request, fds=fds, timeout_s=timeout_s)
        close_fds(received)
        return result

    async def call_fds(
        self, method: Method[Req, Res], request: Req, *, fds: Sequence[int] = (), timeout_s: float | None = None
    ) -> tuple[Res, list[int]]:
        """As ``call``, with the descriptors that came with the result; they're yours."""
        end = None if timeout_s is None else anyio.current_time() + timeout_s
        pause = FIRST_RETRY_S
        give_up = anyio.current_time() + RETRY_FOR_S
        while True:
            started = anyio.current_time()
            try:
                async with self.stream(method, request, fds=fds, timeout_s=timeout_s) as stream:
                    result = await stream.result()
                    return result, stream.take_fds()
            except errors.Unavailable:
                failed = anyio.current_time()
                if failed - started > pause:  # it was under way: what broke it is news, and has its own time to mend
                    give_up, pause = failed + RETRY_FOR_S, FIRST_RETRY_S
                if not method.idempotent or failed + pause > (give_up if end is None else end):
                    raise
            await anyio.sleep(pause)
            pause = min(LAST_RETRY_S, pause * 2)

    @asynccontextmanager
    async def stream(
        self, method: Method[Req, Res], request: Req, *, fds: Sequence[int] = (), timeout_s: float | None = None
    ) -> AsyncIterator[Stream[Res]]:
        """Start a call and take its items as they come. Leaving the block before the end cancels the call."""
        body = _encode_body(request)
        timeout_ms = 0 if timeout_s is None else max(1, int(timeout_s * 1000))
        serial = 0
        pending = Pending()
        try:
            with anyio.fail_after(timeout_s):
                await self._wait_up(timeout_s)
                serial, data = self._session.call(method.name, body, len(fds), timeout_ms)
                self._pending[serial] = pending
                session = self._session
                self._send(data, fds)
                yield Stream(self._item_consumed, serial, pending, method.item or Message, method.result)
        except TimeoutError as error:
            raise errors.DeadlineExceeded(f"{method.name} didn't answer within {timeout_s} s") from error
        finally:
            if self._pending.get(serial) is pending:
                del self._pending[serial]
                pending.close()
                if serial in session.calls and session is self._session:
                    self._send(session.cancel(serial))

    async def _wait_up(self, timeout_s: float | None) -> None:
        if self._up.is_set():
            return
        with anyio.move_on_after(5.0 if timeout_s is None else timeout_s):
            await self._up.wait()
        if self._failure is not None:
            raise self._failure
        if not self._up.is_set():
            raise errors.Unavailable(f"no connection to the bus at {self.path}")

    def _item_consumed(self, serial: int) -> None:
        credit = self._session.item_consumed(serial)
        if credit is not None:
            self._send(credit)

    # --- events ------------------------------------------------------------------------------------------------------

    def publish(self, event: Event) -> None:
        """Publish an event. Kept and repeated until the broker has acknowledged it; ``events_dropped`` counts what the bounds cost.

        Never fails: what has happened has happened, whether or not it can be told.
        """
        topic, body = type(event).topic.encode(), _encode_body(event)
        if len(topic) + len(body) > MAX_EVENT:
            log.error("an event is too large to be told: %s of %s, %d bytes", event.topic, event.id, len(body))
            self.events_dropped += 1
            return
        self._sequence += 1
        data = encode(PUBLISH, topic, body, 0, 0, self._sequence)
        if len(self._unacknowledged) >= MAX_UNACKNOWLEDGED:
            self._unacknowledged.popleft()
            self.events_dropped += 1
        self._unacknowledged.append((self._sequence, data))
        if self._up.is_set():
            self._send(data)

    @asynccontextmanager
    async def events(
        self, *patterns: str, since: int | str | None = None
    ) -> AsyncIterator[AsyncIterator[ReceivedEvent]]:
        """Subscribe: ``async with bus.events("container.*") as events: async for event in events``.

        Subscribed when the block is entered. ``since``: an offset, "beginning" (the oldest kept), None for what comes from now on.
        """
        subscription = Subscription(list(patterns), since)
        await self._wait_up(None)
        session = self._session
        subscription_id, serial, pending = self._subscribe(subscription)
        try:
            answer = await pending.pop()
            if subscription.since is None and session is self._session:
                # From now on: also if the connection breaks before the first event.
                subscription.since = int(str(answer.body["next_offset"]))
            if session is self._session:
                del self._pending[serial]
            yield self._iterate(subscription)
        finally:
            if session is self._session:
                self._pending.pop(serial, None)
            for key, value in list(self._subscriptions.items()):
                if value is subscription:
                    subscription_id = key
                    del self._subscriptions[key]
            if self._up.is_set():
                self._send(self._session.unsubscribe(subscription_id))

    def _subscribe(self, subscription: Subscription) -> tuple[int, int, Pending]:
        """(its ID, the serial of the answer, the answer)."""
        if subscription.bus_id and subscription.bus_id != self._session.bus_id:
            subscription.since = "beginning"  # another journal: its offsets mean nothing here
        subscription.bus_id = self._session.bus_id
        serial, subscription_id, data = self._session.subscribe(subscription.patterns, subscription.since)
        pending = self._pending[serial] = Pending()
        self._subscriptions[subscription_id] = subscription
        self._send(data)
        return subscription_id, serial, pending

    async def _iterate(self, subscription: Subscription) -> AsyncIterator[ReceivedEvent]:
        while True:
            while not subscription.events:
                subscription.wake = anyio.Event()
                await subscription.wake.wait()
            if subscription.dropped:
                lost = {"lost": subscription.dropped, "first_offset": subscription.first_dropped}
                lost["last_offset"] = subscription.events[0].offset - 1
                subscription.dropped = subscription.first_dropped = 0
                yield ReceivedEvent("bus.gap", lost["last_offset"], "bus", 0, lost)
            message = subscription.events.popleft()
            body = message.body
            if message.kind == "gap":
                yield ReceivedEvent("bus.gap", message.offset, "bus", 0, body)
                continue
            payload: Any = body["payload"]
            time_ns: Any = body["time_ns"]
            yield ReceivedEvent(message.topic, message.offset, str(body["source"]), time_ns, payload)

    # --- serving -----------------------------------------------------------------------------------------------------

    async def serve(self, service: Service) -> None:
        """Register a name and serve its methods from now on, over reconnects. Raises ``AlreadyExists`` if the name is taken."""
        await self._wait_up(None)
        self._service = service
        await self._register(service)

    async def _register(self, service: Service) -> None:
        serial, data = self._session.register(service.name)
        pending = self._pending[serial] = Pending()
        self._send(data)
        try:
            await pending.pop()
        finally:
            self._pending.pop(serial, None)

    # --- the connection ----------------------------------------------------------------------------------------------

    async def run(self, group: anyio.abc.TaskGroup) -> None:
        """Keep connected until cancelled."""
        self._group = group
        try:
            while True:
                transport = await self._dial()
                try:
                    await self._converse(transport)
                except (OSError, ProtocolError, anyio.ClosedResourceError) as error:
                    log.warning("lost the bus at %s: %s", self.path, error)
                finally:
                    self._disconnected()
        finally:
            self._failure = self._failure or errors.Unavailable("the connection was closed")

    async def _dial(self) -> Transport:
        pause = FIRST_RETRY_S
        while True:
            try:
                # A unix socket connects at once or fails at once; a full backlog blocks for as long as the broker takes to accept.
                transport = Transport(socket.socket(fileno=connect_unix(self.path).detach()))
            except OSError:
                await anyio.sleep(pause)
                pause = min(LAST_RETRY_S, pause * 2)
                continue
            self._transport = transport
            self._session = Session()
            self._flushing = False
            return transport

    async def _converse(self, transport: Transport) -> None:
        self._send(self._session.hello(self.name, self._publisher))
        while True:
            await anyio.wait_readable(transport.sock)
            try:
                frames = transport.receive()
            except BlockingIOError:
                continue
            if frames is None:
                raise ProtocolError("closed by the broker")
            for frame in frames:
                self._dispatch(frame)

    def _dispatch(self, frame: Frame) -> None:
        kind = frame.kind
        if kind == CALL:
            self._serve(frame)
        elif kind == CANCEL or kind == CREDIT:
            call = self._served.get((frame.peer, frame.serial))
            if call is not None:
                if kind == CANCEL:
                    call.abandon()
                else:
                    call.add_credit(frame.arg)
        elif kind == ACK:
            while self._unacknowledged and self._unacknowledged[0][0] <= frame.arg:
                self._unacknowledged.popleft()
        elif kind == PING:
            self._send(pong(frame))
        else:
            self._receive(frame)

    def _receive(self, frame: Frame) -> None:
        welcomed = self._session.welcomed
        try:
            message = self._session.receive(frame)
        except errors.BusError as error:  # refused
            self._failure = error
            self._up.set()
            raise ProtocolError(error.message) from error
        if message is None:
            close_fds(frame.fds)
            if self._session.welcomed and not welcomed:
                self._connected()
            return
        if message.kind in ("event", "gap"):
            subscription = self._subscriptions.get(message.serial)
            if subscription is not None:
                subscription.push(message)
            return
        pending = self._pending.get(message.serial)
        if pending is None:
            close_fds(message.fds)
            return
        pending.push(message)

    def _connected(self) -> None:
        """Take up where the last connection ended."""
        assert self._group is not None
        subscriptions, self._subscriptions = self._subscriptions, {}
        for subscription in subscriptions.values():
            _, serial, _ = self._subscribe(subscription)
            del self._pending[serial]  # it was accepted before: nobody waits for the answer
        for _, data in self._unacknowledged:
            self._send(data)
        self._failure = None
        self._up.set()
        if self._service is not None:
            self._group.start_soon(self._register_again, self._service)

    async def _register_again(self, service: Service) -> None:
        """The old connection's end may reach the broker after our new one: try until the name is free."""
        session = self._session
        pause = FIRST_RETRY_S
        while session is self._session:
            try:
                await self._register(service)
                return
            except errors.AlreadyExists:
                await anyio.sleep(pause)
                pause = min(LAST_RETRY_S, pause * 2)
            except errors.Unavailable:
                return

    def _disconnected(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None:
            anyio.notify_closing(transport.sock)
            transport.close()
        if self._up.is_set():
            self._up = anyio.Event()
        for call in self._served.values():
            call.scope.cancel()
        pending, self._pending = self._pending, {}
        for waiter in pending.values():
            waiter.push(errors.Unavailable("lost the connection to the bus during the call"))

    def _send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        transport = self._transport
        if transport is None or transport.closed:
            return  # whoever waits has been told, or will be by _disconnected
        try:
            if transport.send(data, fds) or self._flushing:
                return
        except OSError as error:
            if fds and error.errno in _NOT_THE_SOCKETS:
                raise errors.Internal(f"can't pass descriptors over the bus: {error}") from error
            return  # the reader sees the same, and handles it
        assert self._group is not None
        self._flushing = True
        self._group.start_soon(self._flush, transport)

    async def _flush(self, transport: Transport) -> None:
        try:
            while not transport.closed:
                await anyio.wait_writable(transport.sock)
                if transport.flush():
                    break
        except (OSError, anyio.ClosedResourceError):
            pass
        finally:
            if transport is self._transport:
                self._flushing = False

    def _serve(self, frame: Frame) -> None:
        assert self._group is not None
        call = Call(self._reply, frame)
        if self._service is None:
            call.fail(errors.Unimplemented("this connection serves nothing"))
            return
        key = (frame.peer, frame.serial)
        self._served[key] = call
        session = self._session

        def done() -> None:
            if self._served.get(key) is call:  # else it was cancelled, and the caller has used its number again
                del self._served[key]

        def send(data: bytes, fds: Sequence[int] = ()) -> None:
            if session is self._session:  # an answer over another connection would be somebody else's
                self._send(data, fds)

        call.reply = send
        self._group.start_soon(serve_call, self._service, call, frame, done)

    def _reply(self, data: bytes, fds: Sequence[int] = ()) -> None:
        self._send(data, fds)


@asynccontextmanager
async def connect(path: str | None = None, name: str = "client", *, wait: bool = True) -> AsyncIterator[Bus]:
    """A connected ``Bus`` for the length of the block. Raises ``Unavailable`` if the bus isn't there within 5 s.

    With ``wait=False`` the block is entered at once and calls wait for the connection.
    """
    bus = Bus(path or default_path(), name)
    async with anyio.create_task_group() as group:
        group.start_soon(bus.run, group)
        try:
            if wait:
                await bus._wait_up(None)
            yield bus
        finally:
            group.cancel_scope.cancel()


