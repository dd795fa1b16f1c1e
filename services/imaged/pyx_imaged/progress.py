"""Progress of a pull or load on its way to the caller: bounded, paced, and never in the transfer's way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from pyx_bus.contract import imaged as contract

Send = Callable[[contract.Progress], Awaitable[None]]


class Reporter:
    """Progress for a caller: the latest state of each layer, sent at most ten times a second; a slow caller misses states only."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._pending: dict[str, contract.Progress] = {}
        self._more = trio.Event()

    def now(self, layer: str, status: str, current: int = 0, total: int = 0) -> None:
        self._pending[layer] = contract.Progress(
            id=layer, status=status, current_bytes=current, total_bytes=max(total, 0)
        )
        self._more.set()

    async def flush(self) -> None:
        pending, self._pending = self._pending, {}
        for item in pending.values():
            await self._send(item)

    async def run(self) -> None:
        while True:
            await self._more.wait()
            self._more = trio.Event()
            await self.flush()
            await trio.sleep(0.1)  # paces the reports
