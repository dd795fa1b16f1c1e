"""One run of a container: its streams are read, stored, and shown to whoever is attached, until they end."""

from __future__ import annotations

import os
import select
import stat
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from pyx_bus.errors import InvalidArgument

from .clients import Client
from .drivers import Driver
from .jsonfile import cut
from .window import READ_MAX_BYTES, Window

_TURN_S = 0.003
"""Then others get their turn. A full read of ordinary lines takes about 0.3 ms, one of empty lines 40 ms: each gets a record of its own,
so such a stream is read in smaller pieces."""
_READ_LEAST_BYTES = 4096


@dataclass(slots=True)
class Source:
    """A stream of the container: ``fd`` is ours alone to read from. ``name`` is what it's stored as."""

    name: str
    fd: int
    window: Window


class Run:
    """Reads the sources until they end (or `cancel`). ``changed`` is called whenever something was stored."""

    def __init__(self, number: int, driver: Driver, sources: list[Source], clients: list[Client], changed: Callable[[], None]) -> None:
        self.number = number
        self.drained = trio.Event()
        """The streams have ended, everything is stored, every attached client has it."""
        self.clients = clients
        self._driver = driver
        self._sources = sources
        self._changed = changed
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._ended = False
        self._early: list[Callable[[], Awaitable[None]]] = []

    def resume(self) -> None:
        """Send the clients what an earlier process had read for them and not sent."""
        for source in self._sources:
            for client in self.clients:
                client.send_nowait(source.name, source.window.undelivered, source.window.sent, has=source.window.has(client.inode))

    async def serve(self) -> None:
        """Read until the end. Cancelled, it leaves the windows to the next process."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    for source in self._sources:
                        nursery.start_soon(self._pump, source)
                    for task in self._early:
                        nursery.start_soon(task)
                self._nursery, self._ended = None, True
                for client in list(self.clients):
                    await client.flush()
        finally:
            over = self._ended or self._scope.cancel_called
            self._nursery, self._ended = None, True
            for client in self.clients:
                client.close()
            self.clients.clear()
            for source in self._sources:
                source.window.close(remove=over)
                os.close(source.fd)
            self._sources.clear()
            self.drained.set()
            self._changed()

    def cancel(self) -> None:
        """Stop reading: nobody wants this container's output any more."""
        self._scope.cancel()

    def join(self, client: Client, *, with_pending: bool = False) -> None:
        """Send ``client`` what comes from now on; ``with_pending`` the unfinished lines first, as it has all that's stored."""
        if with_pending:
            for source in self._sources:
                client.send_nowait(source.name, source.window.pending)
        for other in list(self.clients):
            if other.check_gone():  # else those who come and go would pile up while nothing is written
                self._drop(other)
        for source in self._sources:
            if source.window.delivering:
                source.window.excuse(client.inode)
        self.clients.append(client)

    def _drop(self, client: Client) -> None:
        client.close()
        if client in self.clients:  # the other stream's reader may have been quicker
            self.clients.remove(client)

    def start(self, task: Callable[[], Awaitable[None]]) -> bool:
        """Run ``task`` as a part of this run, which isn't drained before it's done. False if the streams have ended."""
        if self._nursery is None:
            self._early.append(task)
            return not self._ended
        try:
            self._nursery.start_soon(task)
        except RuntimeError:  # all of it has just ended
            return False
        return True

    async def _pump(self, source: Source) -> None:
        fd, window, driver, stream = source.fd, source.window, self._driver, source.name
        woken = False
        most = READ_MAX_BYTES
        turn = time.monotonic()
        if window.undelivered:
            await self._flush_clients()
            window.delivered()
        while True:
            known = len(window.pending)
            begun = time.monotonic()
            try:
                data = window.read(fd, driver.mark(), most)
            except OSError:  # a terminal whose other side has hung up between the two calls
                data = None
            if data is None:
                if woken and at_end(fd):
                    break
                await trio.lowlevel.wait_readable(fd)
                woken, turn = True, time.monotonic()
                continue
            chunks, rest = cut(stream, data, time.time_ns())
            if chunks:
                driver.write(chunks)
            window.settle(rest, deliver=bool(self.clients))
            for client in self.clients:
                client.send_nowait(stream, data[known:], window.sent)
            stored = time.monotonic()
            most = max(_READ_LEAST_BYTES, most // 2) if stored - begun > _TURN_S else min(READ_MAX_BYTES, most * 2)
            if chunks:
                self._changed()
                await driver.wait_ready()
            if self.clients:
                await self._flush_clients()
                window.delivered()
            woken = False
            if stored - turn > _TURN_S:
                await trio.lowlevel.checkpoint()
                turn = time.monotonic()
        if window.pending:
            chunks, rest = cut(stream, window.pending, time.time_ns(), ended=True)
            driver.write(chunks)
            window.settle(rest)
            self._changed()

    async def _flush_clients(self) -> None:
        """Hold the stream back until every client has what was sent; drop those that are gone."""
        for client in list(self.clients):
            if client.waiting:
                await client.flush()
            if client.gone:
                self._drop(client)


def at_end(fd: int) -> bool:
    """Whether a readable ``fd`` with nothing in it has ended: nobody has the other side open any more."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    events = dict(poll.poll(0)).get(fd, 0)
    return bool(events & (select.POLLHUP | select.POLLERR)) and not events & select.POLLIN


def check_source(fd: int, stream: str) -> None:
    """Whether ``fd`` is what ``stream`` says: a pipe, or a terminal. Raises invalid_argument."""
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISCHR(mode) if stream == "tty" else stat.S_ISFIFO(mode)):
        raise InvalidArgument(f"the descriptor of {stream} must be a {'terminal' if stream == 'tty' else 'pipe'}")
