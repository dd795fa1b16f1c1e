"""A few namespaces made beforehand, so that a container's start needn't wait for one."""

from __future__ import annotations

import trio
from structlog.typing import FilteringBoundLogger

from pyx_bus.errors import BusError

from .kernel import namespaces, syscalls
from .kernel.namespaces import Namespace

_REFILL_DELAY_S = 0.03
"""Making a namespace takes a millisecond of CPU; the start that took one shall have it first."""

_RETRY_DELAY_S = 5.0


class NamespacePool:
    """Up to ``size`` namespaces in reserve, refilled in the background by ``run``."""

    def __init__(self, size: int, log: FilteringBoundLogger) -> None:
        self._size = size
        self._log = log
        self._ready: list[Namespace] = []
        self._wanted = trio.Event()
        self._wanted.set()

    async def take(self) -> Namespace:
        """A new namespace, the caller's to close. Errors: as ``syscalls.failure``."""
        self._wanted.set()
        if self._ready:
            return self._ready.pop()
        return (await self._make(1))[0]

    async def run(self) -> None:
        """Keep the reserve filled, until cancelled; then drop it."""
        try:
            while True:
                await self._wanted.wait()
                self._wanted = trio.Event()
                if self._ready:
                    await trio.sleep(_REFILL_DELAY_S)
                missing = self._size - len(self._ready)
                if missing <= 0:
                    continue
                try:
                    self._ready.extend(await self._make(missing))
                except BusError as error:
                    self._log.warning("can't make namespaces beforehand", error=str(error))
                    await trio.sleep(_RETRY_DELAY_S)
        finally:
            while self._ready:
                self._ready.pop().close()

    async def _make(self, count: int) -> list[Namespace]:
        try:
            return await trio.to_thread.run_sync(namespaces.make, count)
        except OSError as error:
            raise syscalls.failure("make a network namespace", error) from error
