"""What the async client needs of an event loop beyond anyio, as cheap as the loop can do it: trio or asyncio, chosen per connection.

A call through the bus takes some 100 us, most of which is this process being woken and writing again. So the fast path has no
cancel scope, no task and no anyio object of its own: a task that waits is parked directly (``Wakeup``), deadlines of all calls share one
timer (``Deadlines``), and what the tasks woken by one read write is gathered and sent at once (``pump``).
"""

from __future__ import annotations

import math
import sys
from _socket import socket as Socket
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any, Protocol

import anyio

if TYPE_CHECKING:
    import asyncio  # a service on trio doesn't pay for it


class Wakeup(Protocol):
    """One task waits, anybody wakes it. Not an event: waking nobody is forgotten, so look at what you wait for first."""

    async def wait(self) -> None: ...

    def wake(self) -> bool:
        """Whether somebody was waiting."""
        ...


# ``receive``: read once and act; None if there was nothing to read, True if several tasks are about to go on because of it.
Receive = Callable[[], "bool | None"]


class Scope(Protocol):
    """A cancel scope, trio's or anyio's."""

    deadline: float

    @property
    def cancelled_caught(self) -> bool: ...

    # Positional for trio, which has more parameters.
    def cancel(self) -> object: ...

    def __enter__(self) -> Any: ...

    def __exit__(self, kind: Any, error: Any, traceback: Any, /) -> bool | None: ...


class Group(Protocol):
    """A nursery or task group."""

    def start_soon(self, function: Callable[..., Awaitable[Any]], /, *args: Any) -> object: ...

    @property
    def cancel_scope(self) -> Any: ...


class Loop(Protocol):
    """The event loop a connection runs in."""

    def group(self) -> AbstractAsyncContextManager[Any]:
        """The loop's own ``Group``: a task per call served is all it costs, while anyio's on trio adds a scope of its own to each task."""
        ...

    def scope(self, deadline: float) -> Scope: ...

    def wakeup(self) -> Wakeup: ...

    def now(self) -> float:
        """The clock that ``anyio.current_time`` and deadlines go by, in seconds."""
        ...

    async def tick(self) -> None:
        """Let every task that can run do so once."""
        ...

    async def pump(self, sock: Socket, receive: Receive, flush: Callable[[], None]) -> None:
        """Call ``receive`` whenever ``sock`` is readable, until it raises. When it has woken several tasks, they run before ``flush``."""
        ...


def current_loop() -> Loop:
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_task():
        return _trio_loop()
    return AsyncioLoop()


def _busy() -> RuntimeError:
    return RuntimeError("another task is waiting here already")


class AsyncioWakeup:
    __slots__ = ("_future", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._future: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        if self._future is not None:
            raise _busy()
        self._future = self._loop.create_future()
        try:
            await self._future
        finally:
            self._future = None

    def wake(self) -> bool:
        future = self._future
        if future is None or future.done():
            return False
        future.set_result(None)
        return True


class AsyncioLoop:
    def __init__(self) -> None:
        import asyncio

        self._loop = asyncio.get_running_loop()
        self._sleep = asyncio.sleep
        self.now = self._loop.time

    def group(self) -> AbstractAsyncContextManager[Any]:
        return anyio.create_task_group()

    def scope(self, deadline: float) -> Scope:
        return anyio.CancelScope(deadline=deadline)

    def wakeup(self) -> AsyncioWakeup:
        return AsyncioWakeup(self._loop)

    async def tick(self) -> None:
        await self._sleep(0)

    async def pump(self, sock: Socket, receive: Receive, flush: Callable[[], None]) -> None:
        # Everything happens in the loop's own callback: no task is switched to for a read.
        loop = self._loop
        ended: asyncio.Future[None] = loop.create_future()

        def readable() -> None:
            try:
                if receive():
                    loop.call_soon(flush)  # callbacks run in order: after the tasks that were just woken
            except BaseException as error:
                loop.remove_reader(sock)
                if not ended.done():
                    ended.set_exception(error)

        loop.add_reader(sock, readable)
        try:
            await ended
        finally:
            loop.remove_reader(sock)


def _trio_loop() -> Loop:
    import trio

    class TrioWakeup:
        __slots__ = ("_task",)

        def __init__(self) -> None:
            self._task: trio.lowlevel.Task | None = None

        async def wait(self) -> None:
            if self._task is not None:
                raise _busy()
            self._task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)

        def _abort(self, _: Any) -> trio.lowlevel.Abort:
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED

        def wake(self) -> bool:
            task = self._task
            if task is None:
                return False
            self._task = None
            trio.lowlevel.reschedule(task)
            return True

    checkpoint, shielded_checkpoint = trio.lowlevel.checkpoint, trio.lowlevel.cancel_shielded_checkpoint

    class TrioLoop:
        def __init__(self) -> None:
            self.wakeup = TrioWakeup
            self.now = trio.current_time
            self.group = trio.open_nursery

        def scope(self, deadline: float) -> Scope:
            return trio.CancelScope(deadline=deadline)

        async def tick(self) -> None:
            # trio runs the tasks of a batch in either order: only the second round is sure to be after all of the first.
            await checkpoint()
            await shielded_checkpoint()

        async def pump(self, sock: Socket, receive: Receive, flush: Callable[[], None]) -> None:
            while True:
                await trio.lowlevel.wait_readable(sock)
                while receive():
                    await checkpoint()
                    await shielded_checkpoint()
                    flush()

    global _trio_loop
    _trio_loop = TrioLoop  # built once
    return TrioLoop()


class Deadlines:
    """Timers of one connection: a heap, and one task that sleeps until the earliest. Setting one costs no more than a push."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._heap: list[tuple[float, int, Timer]] = []
        self._number = 0
        self._cancelled = 0
        self._scope: anyio.CancelScope | None = None

    def at(self, when: float, action: Callable[[], None]) -> Timer:
        """Call ``action`` at ``when`` (of the loop's clock), unless ``cancel`` is called with the timer before."""
        timer = Timer(action)
        self._number += 1
        heappush(self._heap, (when, self._number, timer))
        if self._scope is not None and self._heap[0][2] is timer:
            self._scope.deadline = when
        return timer

    def cancel(self, timer: Timer) -> None:
        if timer.action is None:
            return
        timer.action = None
        self._cancelled += 1
        if self._cancelled > 64 and self._cancelled > len(self._heap) // 2:  # calls end long before their deadline
            self._heap = [entry for entry in self._heap if entry[2].action is not None]
            heapify(self._heap)
            self._cancelled = 0

    async def run(self) -> None:
        while True:
            while self._heap and (self._heap[0][0] <= self._loop.now() or self._heap[0][2].action is None):
                timer = heappop(self._heap)[2]
                action, timer.action = timer.action, None
                if action is None:
                    self._cancelled -= 1
                else:
                    action()
            with anyio.CancelScope(deadline=self._heap[0][0] if self._heap else math.inf) as self._scope:
                await anyio.sleep_forever()


class Timer:
    __slots__ = ("action",)

    def __init__(self, action: Callable[[], None]) -> None:
        self.action: Callable[[], None] | None = action
