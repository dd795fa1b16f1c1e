"""The async client's connection that renews itself: dials, greets, reads, writes.

Nothing here blocks the loop: the socket is non-blocking and written at once; only what the kernel doesn't take waits. While a read's
frames are acted on, what is written meanwhile is gathered and sent in one go.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable, Sequence

import anyio

from .. import errors
from ..session import hello, pong, refusal, welcome
from ..sync import connect_unix
from ..transport import Transport, close_fds
from ..wakeup import Group, Loop
from ..wire import ERROR, PING, WELCOME, Frame, ProtocolError

log = logging.getLogger("pyx_bus.client")  # not structlog: this is a library, its user decides where it logs

FIRST_RETRY_S = 0.01
LAST_RETRY_S = 0.5
WAIT_FOR_BUS_S = 5.0
# Gathered writes go out at the latest at this size: more would only sit in memory.
MAX_GATHERED = 256 << 10

# What sendmsg(2) and dup(2) say of the descriptors that shall travel; the connection is well.
_NOT_THE_SOCKETS = (errno.EBADF, errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS)


class Link:
    """Tells its owner: ``dispatch`` of every frame (True if that woke a task), ``connected``, ``disconnected``."""

    def __init__(
        self,
        path: str,
        name: str,
        publisher: str,
        loop: Loop,
        dispatch: Callable[[Frame], bool],
        connected: Callable[[], None],
        disconnected: Callable[[], None],
    ) -> None:
        self.path = path
        self.bus_id = ""
        self.up = False
        self._hello = hello(name, publisher)
        self._loop = loop
        self._dispatch = dispatch
        self._connected = connected
        self._disconnected = disconnected
        self._transport: Transport | None = None
        self._news = anyio.Event()  # the connection came up, or was refused
        self._failure: errors.BusError | None = None
        self._group: Group | None = None
        self._gathering = False
        self._blocked = False
        self._gather_end = loop.wakeup()
        self._gather_ends = False

    async def run(self, group: Group) -> None:
        """Keep connected until cancelled."""
        self._group = group
        group.start_soon(self._end_gathering)
        pause = FIRST_RETRY_S
        try:
            while True:
                try:
                    # A unix socket connects at once or fails at once; a full backlog blocks for as long as the broker takes to accept.
                    transport = Transport(socket.socket(fileno=connect_unix(self.path).detach()))
                except OSError:
                    pass
                else:
                    if await self._converse(transport):
                        pause = FIRST_RETRY_S
                await anyio.sleep(pause)
                pause = min(LAST_RETRY_S, pause * 2)
        finally:
            self._failure = self._failure or errors.Unavailable("the connection was closed")

    async def _converse(self, transport: Transport) -> bool:
        """Until the connection ends; whether it ever was up."""
        was_up = False
        self._transport = transport
        self._gathering = self._blocked = False
        try:
            self.send(self._hello)
            await self._loop.pump(transport.sock, self._receive, self._flush)
        except (OSError, ProtocolError, anyio.ClosedResourceError) as error:
            log.warning("lost the bus at %s: %s", self.path, error)
        finally:
            was_up, self.up = self.up, False
            self._transport = None
            anyio.notify_closing(transport.sock)
            transport.close()
            if was_up:
                self._news = anyio.Event()
                self._disconnected()
        return was_up

    async def wait_up(self, timeout_s: float | None = WAIT_FOR_BUS_S) -> None:
        """Until it's connected. Raises what the broker refused us with, or ``Unavailable`` after ``timeout_s``."""
        with anyio.move_on_after(timeout_s):
            while not self.up:
                await self._news.wait()
                if self._failure is not None:
                    break
            else:
                return
        raise self._failure or errors.Unavailable(f"no connection to the bus at {self.path}")

    # --- reading -----------------------------------------------------------------------------------------------------

    def _receive(self) -> bool | None:
        transport = self._transport
        assert transport is not None
        try:
            frames = transport.receive()
        except BlockingIOError:
            return None
        if frames is None:
            raise ProtocolError("closed by the broker")
        self._gathering = True
        woken = 0
        dispatch = self._dispatch if self.up else self._greeted
        for index, frame in enumerate(frames):
            try:
                if dispatch(frame):
                    woken += 1
            except BaseException:
                for rest in frames[index:]:
                    close_fds(rest.fds)
                raise
            if not index:
                dispatch = self._dispatch if self.up else self._greeted
        if woken > 1:
            return True  # they'll write soon: _flush is called when they have
        self._flush()
        return False

    def _greeted(self, frame: Frame) -> bool:
        """The first frame of a connection."""
        if frame.kind == WELCOME:
            self.bus_id, _ = welcome(frame)
            self._failure = None
            self.up = True
            self._connected()
            self._news.set()
            return True
        if frame.kind == ERROR and not frame.serial:
            self._failure = refusal(frame)
            self._news.set()
            self._news = anyio.Event()
            raise ProtocolError(self._failure.message)
        if frame.kind == PING:
            self.send(pong(frame))
            return False
        raise ProtocolError(f"unexpected {frame!r} before WELCOME")

    # --- writing -----------------------------------------------------------------------------------------------------

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Write a frame; if the connection is gone whoever waits has been told.

        ``fds`` stay yours; raises ``Internal`` if they can't be passed.
        """
        transport = self._transport
        if transport is None or transport.closed:
            return
        try:
            if (self._gathering or self._blocked) and not fds:
                transport.push(data)
                if self._blocked or transport.queued_bytes < MAX_GATHERED:
                    return
                done = transport.flush()
            elif self._blocked:
                transport.push(data, [os.dup(fd) for fd in fds])
                return
            else:
                done = transport.send(data, fds)
        except OSError as error:
            if fds and error.errno in _NOT_THE_SOCKETS:
                raise errors.Internal(f"can't pass descriptors over the bus: {error}") from error
            return  # the reader sees the same, and handles it
        if not done:
            self._wait_writable(transport)

    def send_and_gather(self, data: bytes) -> None:
        """As ``send``, for what comes in bursts: what follows until the other tasks have run goes out together."""
        self.send(data)
        if not self._gathering:
            self._gathering = self._gather_ends = True
            self._gather_end.wake()

    async def _end_gathering(self) -> None:
        while True:
            while not self._gather_ends:
                await self._gather_end.wait()
            await self._loop.tick()
            self._gather_ends = False
            self._flush()

    def _flush(self) -> None:
        self._gathering = False
        transport = self._transport
        if transport is None or self._blocked or not transport.queue:
            return
        try:
            if not transport.flush():
                self._wait_writable(transport)
        except OSError:
            pass  # the reader sees the same

    def close(self) -> None:
        """Nothing more is to come: write what was gathered, as far as the kernel takes it."""
        self._flush()

    def _wait_writable(self, transport: Transport) -> None:
        if self._blocked:
            return
        assert self._group is not None
        self._blocked = True
        self._group.start_soon(self._drain, transport)

    async def _drain(self, transport: Transport) -> None:
        try:
            while not transport.closed:
                await anyio.wait_writable(transport.sock)
                if transport.flush():
                    break
        except (OSError, anyio.ClosedResourceError):
            pass
        finally:
            if transport is self._transport:
                self._blocked = False
