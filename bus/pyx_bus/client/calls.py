"""The calling half of the async client: calls and streams, their deadlines, retries and ends.

The fast path has no task, no cancel scope and no context manager of its own; see ``wakeup``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio
import msgspec

from .. import errors
from ..contract.base import Message, Method
from ..transport import close_fds
from ..wakeup import Deadlines, Loop
from ..wire import CALL, CANCEL, CREDIT, RESULT, Frame, encode
from .link import FIRST_RETRY_S, LAST_RETRY_S, WAIT_FOR_BUS_S, Link
from .pending import Answer, Pending, Stream, decode_body

Req = TypeVar("Req", bound=Message)
Res = TypeVar("Res", bound=Message)

RETRY_FOR_S = 30.0
MAX_SERIAL = 0xFFFFFFFF

_encode_body = msgspec.msgpack.Encoder().encode


class Calls:
    """What ``Bus`` inherits. Answers come by ``_pending``, which the reader of the connection looks into."""

    def __init__(self, link: Link, loop: Loop) -> None:
        self.link = link
        self.loop = loop
        self.deadlines = Deadlines(loop)
        self._serial = 0
        self._pending: dict[int, Pending | Answer] = {}

    async def call(
        self, method: Method[Req, Res], request: Req, *, fds: Sequence[int] = (), timeout_s: float | None = None
    ) -> Res:
        """Call and wait for the result; a stream's items are passed over.

        Raises ``BusError``s; ``DeadlineExceeded`` after ``timeout_s``. Cancelling cancels the callee. An idempotent method is
        called again when the connection broke or the service was away, until the deadline (if there's none, while it has been away for
        less than ``RETRY_FOR_S``); ``fds`` stay yours.
        """
        frame = await self._call(method, request, fds, timeout_s)
        if frame.fds:
            close_fds(frame.fds)
        return decode_body(method.result, frame.body)

    async def call_fds(
        self, method: Method[Req, Res], request: Req, *, fds: Sequence[int] = (), timeout_s: float | None = None
    ) -> tuple[Res, list[int]]:
        """As ``call``, with the descriptors that came with the result; they're yours."""
        frame = await self._call(method, request, fds, timeout_s)
        try:
            return decode_body(method.result, frame.body), frame.fds
        except errors.InvalidArgument:
            close_fds(frame.fds)
            raise

    async def _call(self, method: Method[Req, Res], request: Req, fds: Sequence[int], timeout_s: float | None) -> Frame:
        """The RESULT."""
        now = self.loop.now
        started = now()
        end = None if timeout_s is None else started + timeout_s
        pause = FIRST_RETRY_S
        give_up = started + RETRY_FOR_S
        while True:
            try:
                return await self._call_once(method, request, fds, timeout_s)
            except errors.Unavailable:
                failed = now()
                if failed - started > pause:  # it was under way: what broke it is news, and has its own time to mend
                    give_up, pause = failed + RETRY_FOR_S, FIRST_RETRY_S
                if not method.idempotent or failed + pause > (give_up if end is None else end):
                    raise
            await anyio.sleep(pause)
            pause = min(LAST_RETRY_S, pause * 2)
            started = now()
            if end is not None:
                timeout_s = max(0.001, end - started)

    async def _call_once(
        self, method: Method[Req, Res], request: Req, fds: Sequence[int], timeout_s: float | None
    ) -> Frame:
        pending = await self._open(method, request, fds, timeout_s)
        try:
            while True:
                frame = await pending.pop()
                if frame.kind == RESULT:
                    return frame
                close_fds(frame.fds)
                self._items_taken(pending, 1)
        except BaseException:
            self._give_up(pending)
            raise

    @asynccontextmanager
    async def stream(
        self, method: Method[Req, Res], request: Req, *, fds: Sequence[int] = (), timeout_s: float | None = None
    ) -> AsyncIterator[Stream[Res]]:
        """Start a call and take its items as they come. Leaving the block before the end cancels the call.

        The deadline is the call's: when it has passed, the stream raises ``DeadlineExceeded``. What else the block waits for isn't
        interrupted.
        """
        pending = await self._open(method, request, fds, timeout_s)
        stream = Stream(self._items_taken, pending, method.item or Message, method.result)
        try:
            yield stream
        finally:
            self._give_up(pending)
            stream.close()

    async def _open(
        self, method: Method[Req, Res], request: Req, fds: Sequence[int], timeout_s: float | None
    ) -> Pending:
        body = _encode_body(request)
        timeout_ms, end = 0, 0.0
        if timeout_s is not None:
            end = self.loop.now() + timeout_s
            timeout_ms = min(MAX_SERIAL, max(1, int(timeout_s * 1000)))
        if not self.link.up:
            await self._wait_up(method, timeout_s)
        serial = self._next_serial()
        data = encode(CALL, method.name.encode(), body, 0, serial, timeout_ms, len(fds))
        pending = self._pending[serial] = Pending(serial, self.loop.wakeup())
        if timeout_ms:
            pending.timer = self.deadlines.at(end, lambda: self._expired(pending, method.name, timeout_s))
        try:
            self.link.send(data, fds)
        except errors.BusError:
            self._forget(pending)
            raise
        return pending

    async def _wait_up(self, method: Method[Req, Res], timeout_s: float | None) -> None:
        if timeout_s is None or timeout_s > WAIT_FOR_BUS_S:
            await self.link.wait_up()
            return
        try:
            await self.link.wait_up(timeout_s)
        except errors.Unavailable as error:
            raise errors.DeadlineExceeded(f"{method.name} didn't answer within {timeout_s} s: {error.message}") from error

    def _next_serial(self) -> int:
        serial = self._serial
        while True:
            serial = serial + 1 if serial < MAX_SERIAL else 1
            if serial not in self._pending:
                self._serial = serial
                return serial

    def _forget(self, pending: Pending) -> bool:
        """It isn't waited for any more. Whether it was still open."""
        if self._pending.get(pending.serial) is not pending:
            return False
        del self._pending[pending.serial]
        if pending.timer is not None:
            self.deadlines.cancel(pending.timer)
        return True

    def _give_up(self, pending: Pending) -> None:
        if self._forget(pending):
            self.link.send(encode(CANCEL, b"", b"", 0, pending.serial))
        pending.close()

    def _expired(self, pending: Pending, method: str, timeout_s: float | None) -> None:
        if self._forget(pending):
            self.link.send(encode(CANCEL, b"", b"", 0, pending.serial))
            pending.fail(errors.DeadlineExceeded(f"{method} didn't answer within {timeout_s} s"))

    def _items_taken(self, pending: Pending, count: int) -> None:
        if self._pending.get(pending.serial) is pending:
            self.link.send(encode(CREDIT, b"", b"", 0, pending.serial, count))

    def _fail_all(self, error: errors.BusError) -> None:
        """The connection is gone."""
        pending, self._pending = self._pending, {}
        for waiter in pending.values():
            if waiter.timer is not None:
                self.deadlines.cancel(waiter.timer)
            waiter.fail(error)
