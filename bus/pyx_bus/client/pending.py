"""What a connection of the async client has open: calls and streams, and what arrived for them and nobody took yet."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from .. import errors
from ..contract.base import Message
from ..session import refusal
from ..transport import close_fds
from ..wire import ERROR, ITEM, RESULT, STREAM_WINDOW, Frame

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..wakeup import Timer, Wakeup

Res = TypeVar("Res", bound=Message)

_decoders: dict[type[Message], Callable[[bytes], Any]] = {}


def decode_body(kind: type[Res], raw: bytes) -> Res:
    """Decode and validate. Raises ``InvalidArgument``."""
    decode = _decoders.get(kind)
    if decode is None:
        decode = _decoders[kind] = msgspec.msgpack.Decoder(kind).decode
    try:
        value: Res = decode(raw or b"\x80")
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise errors.InvalidArgument(f"bad {kind.__name__}: {error}") from error
    return value


class Pending:
    """An open call. Answers are taken in order; then comes what ended it: a lost connection, a deadline."""

    __slots__ = ("failure", "inbox", "serial", "timer", "wakeup")

    def __init__(self, serial: int, wakeup: Wakeup) -> None:
        self.serial = serial
        self.inbox: deque[Frame] = deque()
        self.wakeup = wakeup
        self.failure: errors.BusError | None = None
        self.timer: Timer | None = None

    def push(self, frame: Frame) -> bool:
        """Whether that woke a task."""
        self.inbox.append(frame)
        return self.wakeup.wake()

    def fail(self, error: errors.BusError) -> None:
        self.failure = error
        self.wakeup.wake()

    async def pop(self) -> Frame:
        """The next ITEM, or the RESULT. Raises the call's error."""
        while not self.inbox:
            if self.failure is not None:
                raise self.failure
            await self.wakeup.wait()
        frame = self.inbox.popleft()
        if frame.kind == ERROR:
            close_fds(frame.fds)
            raise refusal(frame)
        return frame

    def close(self) -> None:
        for frame in self.inbox:
            close_fds(frame.fds)
        self.inbox.clear()


class Answer:
    """An answer that isn't a call's: whoever asked is told by ``push``, and knows by other ways that the connection is gone."""

    __slots__ = ("push", "timer")

    def __init__(self, push: Callable[[Frame], bool]) -> None:
        self.push = push
        self.timer: Timer | None = None

    def fail(self, error: errors.BusError) -> None:
        """See above."""


class Stream(Generic[Res]):
    """A call that streams. Iterate over its items, then ask for the ``result``.

    After the call's deadline both raise ``DeadlineExceeded``; whatever else the block does isn't interrupted by it.
    """

    def __init__(
        self, item_taken: Callable[[Pending, int], None], pending: Pending, item: type[Message], result: type[Res]
    ) -> None:
        self._item_taken = item_taken
        self._taken = 0
        self._pending = pending
        self._item = item
        self._result_type = result
        self._result: Frame | None = None
        self._fds: list[int] = []

    def __aiter__(self) -> Stream[Res]:
        return self

    async def __anext__(self) -> Any:
        frame = await self._next()
        if frame is None:
            raise StopAsyncIteration
        return decode_body(self._item, frame.body)

    async def _next(self) -> Frame | None:
        if self._result is not None:
            return None
        self.close()
        frame = await self._pending.pop()
        self._fds = frame.fds
        if frame.kind == RESULT:
            self._result = frame
            return None
        assert frame.kind == ITEM
        self._taken += 1
        if self._taken >= STREAM_WINDOW // 2:
            self._item_taken(self._pending, self._taken)
            self._taken = 0
        return frame

    def take_fds(self) -> list[int]:
        """The descriptors of the latest item or of the result; they're yours then."""
        fds, self._fds = self._fds, []
        return fds

    def close(self) -> None:
        close_fds(self.take_fds())

    async def result(self) -> Res:
        """Wait for the end, passing over items not yet taken. Raises the call's error."""
        while self._result is None:
            await self._next()
        return decode_body(self._result_type, self._result.body)
