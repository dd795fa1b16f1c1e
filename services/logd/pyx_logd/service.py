"""The use cases of logd, over all containers."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable

import structlog
import trio

from pyx_bus.contract.base import Event
from pyx_bus.errors import InvalidArgument, NotFound, ResourceExhausted

from .clients import check_client
from .drivers import factory
from .log import ContainerLog
from .model import ContainerID, check_streams
from .reader import Selection
from .run import check_source
from .store import Meta, Store


class LogService:
    """Every method owns the descriptors it's given, whatever happens."""

    def __init__(
        self,
        store: Store,
        nursery: trio.Nursery,
        publish: Callable[[Event], None],
        logger: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self._store = store
        self._nursery = nursery
        self._publish = publish
        self._logger = logger
        self._logs: dict[ContainerID, ContainerLog] = {}

    def start(self) -> None:
        """Take up what an earlier process left: delete what it was deleting, store what it had read."""
        for trash in self._store.leftovers():
            self._nursery.start_soon(trio.to_thread.run_sync, self._store.delete, trash)
        for container in self._store.containers():
            if self._store.windows(container):
                self._find(container)

    def _find(self, container: ContainerID) -> ContainerLog | None:
        log = self._logs.get(container)
        if log is None:
            meta = self._store.load(container)
            if meta is not None:
                log = self._logs[container] = ContainerLog(container, meta, self._store, self._publish, self._logger)
        return log

    def _get(self, container: ContainerID) -> ContainerLog:
        log = self._find(container)
        if log is None:
            raise NotFound(f'no log of container "{container}"')
        return log

    def open(
        self, container: ContainerID, run: int, streams: list[str], attached: int, driver: str, options: dict[str, str], fds: list[int]
    ) -> str:
        """Begin to read a run's streams; returns the log's path. Without an await, so that two calls can't interleave."""
        try:
            check_streams(streams)
            if attached < 0 or len(fds) != len(streams) + attached:
                raise InvalidArgument(f"{len(streams)} streams and {attached} clients need as many descriptors, not {len(fds)}")
            for stream, fd in zip(streams, fds, strict=False):
                check_source(fd, stream)
            for fd in fds[len(streams) :]:
                check_client(fd)
            factory(driver)(self._store.directory(container), options, lambda what, error, lost: None)  # checks the options
            log = self._find(container)
            created_ns = log.meta.created_ns if log else time.time_ns()
            meta = Meta(driver=driver, options=options, tty=streams == ["tty"], run=run, created_ns=created_ns)
            if log is None:
                log = self._logs[container] = ContainerLog(container, meta, self._store, self._publish, self._logger)
            opened = log.open_run(run, streams, fds, meta)
        except BaseException as error:
            for fd in fds:
                os.close(fd)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE):
                raise ResourceExhausted(f'cannot open the log of container "{container}": {error.strerror}') from error
            raise
        if opened is None:
            for fd in fds:
                os.close(fd)
        else:
            self._nursery.start_soon(log.serve, opened)
        return log.driver.path

    def attach(self, container: ContainerID, fd: int, *, logs: bool, stdout: bool, stderr: bool) -> None:
        try:
            check_client(fd)
            log = self._get(container)
        except BaseException:
            os.close(fd)
            raise
        log.attach(fd, logs=logs, stdout=stdout, stderr=stderr)

    async def read(self, container: ContainerID, fd: int, selection: Selection, *, follow: bool) -> None:
        try:
            check_client(fd)
            log = self._get(container)
        except BaseException:
            os.close(fd)
            raise
        await log.read(fd, selection, follow=follow)

    async def wait_drained(self, container: ContainerID, run: int) -> None:
        log = self._find(container)
        if log is not None:
            await log.wait_drained(run)

    async def remove(self, container: ContainerID) -> None:
        """Idempotent. The files are gone from sight when it returns; deleting them goes on in the background."""
        log = self._logs.pop(container, None)
        trash = self._store.discard(container)
        if log is not None:
            await log.stop()
        self._nursery.start_soon(trio.to_thread.run_sync, self._store.delete, trash)

    async def retain(self, living: set[str], before_ns: int) -> list[str]:
        """Remove the logs of all other containers, if they were begun before."""
        released: list[str] = []
        for container in self._store.containers():
            if container in living:
                continue
            log = self._logs.get(container)
            meta = log.meta if log else self._store.load(container)
            if meta is not None and meta.created_ns < before_ns:
                await self.remove(container)
                released.append(container)
        return released
