"""One container's log: how it's kept, the runs that write it, and who reads it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import structlog
import trio

from pyx_bus.contract.base import Event
from pyx_bus.contract.logd import LogRecovered, LogTrouble
from pyx_bus.errors import FailedPrecondition

from . import frames
from .clients import Client
from .drivers import Driver, factory
from .jsonfile import cut
from .model import ContainerID
from .reader import LogReader, Selection
from .run import Run, Source
from .store import Meta, Store
from .window import Window

_REOPEN_S = 2.0
"""How long after a restart of logd containerd may take to bring the descriptors of a running container again."""

_COMPLAIN_EVERY_S = 10.0
_RECOVERED_AFTER_S = 1.0


class ContainerLog:
    """Exists for every log somebody asked for; `open_run` makes it a writing one."""

    def __init__(
        self,
        container: ContainerID,
        meta: Meta,
        store: Store,
        publish: Callable[[Event], None],
        logger: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self.container = container
        self.meta = meta
        self._store = store
        self._publish = publish
        self._logger = logger
        self._runs: dict[int, Run] = {}
        self._changed = trio.lowlevel.ParkingLot()
        self._complained_at = -_COMPLAIN_EVERY_S
        self._complaints = 0
        self._lost_bytes = 0  # since trouble began; 0 when there's none
        self._lost_at = 0.0
        self.removed = False
        self.driver = self._make_driver(meta)
        if any(True for _ in store.windows(container)):
            self._recover()

    def _make_driver(self, meta: Meta) -> Driver:
        return factory(meta.driver)(self._store.directory(self.container), meta.options, self._trouble)

    @property
    def frame(self) -> frames.Frame:
        """How a client sees it: a terminal's bytes aren't framed."""
        return frames.raw if self.meta.tty else frames.multiplexed

    @property
    def active(self) -> bool:
        """Whether more may come."""
        return not self.removed and any(not run.drained.is_set() for run in self._runs.values())

    def _notify(self) -> None:
        self._changed.unpark_all()

    def _trouble(self, what: str, error: OSError, lost_bytes: int) -> None:
        if lost_bytes and not self._lost_bytes:
            attributes = {**self._attributes(), "reason": (error.strerror or str(error)).lower()}
            self._publish(
                LogTrouble(id=self.container, time_ns=time.time_ns(), attributes=attributes, errno=error.errno or 0)
            )
        now = time.monotonic()
        if lost_bytes:
            self._lost_at = now
        self._lost_bytes += lost_bytes
        self._complaints += 1
        if now - self._complained_at >= _COMPLAIN_EVERY_S:
            self._complained_at = now
            text = "output lost: it can't be stored" if lost_bytes else "trouble with a log"
            self._logger.error(text, container=self.container, what=what, error=str(error), times=self._complaints)
            self._complaints = 0

    def _attributes(self) -> dict[str, str]:
        return {"container": self.container, "driver": self.meta.driver}

    def _stored(self) -> None:
        """A run has given the driver something to store, or has ended. On a disk that's nearly full small writes still succeed between
        larger ones that don't: trouble is over when nothing was lost for a while."""
        if self._lost_bytes and (not self.active or time.monotonic() - self._lost_at >= _RECOVERED_AFTER_S):
            attributes = {**self._attributes(), "lostBytes": str(self._lost_bytes)}
            self._publish(
                LogRecovered(id=self.container, time_ns=time.time_ns(), attributes=attributes, lost_bytes=self._lost_bytes)
            )
            self._lost_bytes = 0
        self._notify()

    def _recover(self) -> None:
        """Store again what was read and not surely stored when logd was killed. At most one read was under way."""
        self.driver.open()
        for run, stream, path in self._store.windows(self.container):
            window = Window(path)
            left = window.recover()
            if left.mark is not None:
                self.driver.rewind(left.mark)
                chunks, rest = cut(stream, left.pending + left.data, time.time_ns())
                self.driver.write(chunks)
                window.settle(rest, deliver=True)
                self._logger.info("took up after a kill", container=self.container, run=run, stream=stream, bytes=len(left.data))
            window.close(remove=False)

    def open_run(self, number: int, streams: list[str], fds: list[int], meta: Meta) -> Run | None:
        """Begin to read ``streams``, whose descriptors come first in ``fds``, and to send to the clients, whose come after.

        The run owns them, unless this raises, or returns None: that run is being read, or was to its end.
        """
        if number in self._runs:
            return None
        if (meta.driver, meta.options) != (self.meta.driver, self.meta.options) and not self.active:
            self.driver = self._make_driver(meta)
        self._store.save(self.container, meta)
        self.meta = meta
        self.driver.open()
        self._flush_older(number)
        sources: list[Source] = []
        try:
            for stream, fd in zip(streams, fds, strict=False):
                name = "stdout" if stream == "tty" else stream
                if stream != "tty":  # a pipe's read end is ours alone; a terminal's description isn't, and is left as it is
                    os.set_blocking(fd, False)
                sources.append(Source(name, fd, Window(self._store.window(self.container, number, name))))
        except BaseException:
            for source in sources:
                source.window.close(remove=True)
            raise
        run = Run(number, self.driver, sources, [Client(fd, self.frame) for fd in fds[len(streams) :]], self._stored)
        run.resume()
        for old in [old for old, other in self._runs.items() if other.drained.is_set()]:
            del self._runs[old]
        self._runs[number] = run
        self._notify()
        return run

    def _flush_older(self, number: int) -> None:
        """Unfinished lines of a run whose end nobody told us about."""
        for run, stream, path in self._store.windows(self.container):
            if run == number or run in self._runs:
                continue
            window = Window(path)
            chunks, _ = cut(stream, window.pending, time.time_ns(), ended=True)
            self.driver.write(chunks)
            window.close(remove=True)

    async def serve(self, run: Run) -> None:
        """Read a run's streams to their end."""
        await run.serve()
        self._store.drop_windows(self.container)
        if not self.active:
            await self.driver.aclose()

    def attach(self, fd: int, *, logs: bool, stdout: bool, stderr: bool) -> None:
        """Show what comes to ``fd``, which it owns. Errors: failed_precondition (the streams have ended)."""
        client = Client(fd, self.frame, stdout=stdout, stderr=stderr)
        run = next((run for run in self._runs.values() if not run.drained.is_set()), None)
        if run is None:
            client.close()
            raise FailedPrecondition(f'container "{self.container[:12]}" writes nothing any more', hint="see its stored output: logs")
        if not logs or not self.driver.readable:
            run.join(client)
            return
        reader = LogReader(self.driver, Selection(stdout=stdout, stderr=stderr), self.frame)
        reader.follow()

        async def replay() -> None:
            try:
                while True:
                    await reader.send_to(client)
                    if client.gone or reader.caught_up():
                        break
            except BaseException:
                client.close()
                raise
            finally:
                reader.close()
            run.join(client, with_pending=True)  # nothing ran since caught_up: no gap, no overlap

        if not run.start(replay):
            reader.close()
            client.close()
            raise FailedPrecondition(f'container "{self.container[:12]}" writes nothing any more', hint="see its stored output: logs")

    async def read(self, fd: int, selection: Selection, *, follow: bool) -> None:
        """Send stored output to ``fd``, which it owns. Errors: failed_precondition (the driver keeps none)."""
        client = Client(fd, self.frame)
        try:
            if not self.driver.readable:
                raise FailedPrecondition(f'the log driver "{self.meta.driver}" keeps no log to read')
            if follow and not self.active:
                await self._wait_reopened(self.meta.run)
            reader = LogReader(self.driver, selection, self.frame)
            try:
                if follow:
                    reader.follow()
                while True:
                    active = self.active
                    await reader.send_to(client)
                    if not follow or client.gone or reader.past_until:
                        break
                    if reader.caught_up():
                        if not active:
                            break
                        if self.active:
                            await self._changed.park()
            finally:
                reader.close()
        finally:
            client.close()

    async def wait_drained(self, number: int) -> None:
        """Return when that run is over; a run never heard of is."""
        if number not in self._runs:
            await self._wait_reopened(number)
        run = self._runs.get(number)
        if run is not None:
            await run.drained.wait()

    async def _wait_reopened(self, number: int) -> None:
        """Give containerd a moment to bring the descriptors of a run that was being read before logd was restarted."""
        if any(run == number for run, _, _ in self._store.windows(self.container)):
            with trio.move_on_after(_REOPEN_S):
                while number not in self._runs and not self.removed:
                    await self._changed.park()

    async def stop(self) -> None:
        """Read no more: the log is being removed."""
        self.removed = True
        for run in self._runs.values():
            run.cancel()
        self._notify()
        for run in list(self._runs.values()):
            await run.drained.wait()
        await self.driver.aclose()
