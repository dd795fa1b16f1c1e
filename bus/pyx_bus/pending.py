"""What a connection of the async client has open: calls, streams, subscriptions, and what arrived for them and nobody took yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import anyio
import msgspec

from . import errors
from .contract.base import Message
from .session import Incoming
from .transport import close_fds

Res = TypeVar("Res", bound=Message)

# Events a subscriber of this process hasn't taken yet; beyond it the oldest are dropped and a gap is told.
MAX_BUFFERED_EVENTS = 16_384

_decoders: dict[type[Message], msgspec.msgpack.Decoder[Any]] = {}


def decode_body(kind: type[Res], raw: bytes) -> Res:
    """Decode and validate. Raises ``InvalidArgument``."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        value: Res = decoder.decode(raw or b"\x80")
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise errors.InvalidArgument(f"bad {kind.__name__}: {error}") from error
    return value


class ReceivedEvent:
    """An event as a subscriber gets it. A gap has the topic ``bus.gap`` and lost, first_offset and last_offset in its payload."""

    __slots__ = ("offset", "payload", "source", "time_ns", "topic")

    def __init__(self, topic: str, offset: int, source: str, time_ns: int, payload: dict[str, Any]) -> None:
        self.topic = topic
        self.offset = offset
        self.source = source
        self.time_ns = time_ns
        self.payload = payload


class Subscription:
    def __init__(self, patterns: list[str], since: int | str | None) -> None:
        self.patterns = patterns
        self.since = since
        self.bus_id = ""
        self.events: deque[Incoming] = deque()
        self.dropped = 0
        self.first_dropped = 0
        self.wake = anyio.Event()

    def push(self, message: Incoming) -> None:
        self.since = message.offset + 1
        if len(self.events) >= MAX_BUFFERED_EVENTS:
            oldest = self.events.popleft()
            self.first_dropped = self.first_dropped or oldest.offset
            self.dropped += 1
        self.events.append(message)
        self.wake.set()


class Pending:
    """An open call: what arrived for it and nobody took yet."""

    __slots__ = ("inbox", "wake")

    def __init__(self) -> None:
        self.inbox: deque[Incoming | errors.BusError] = deque()
        self.wake = anyio.Event()

    def push(self, message: Incoming | errors.BusError) -> None:
        self.inbox.append(message)
        self.wake.set()

    async def pop(self) -> Incoming:
        while not self.inbox:
            self.wake = anyio.Event()
            await self.wake.wait()
        message = self.inbox.popleft()
        if isinstance(message, errors.BusError):
            raise message
        if message.kind == "error":
            close_fds(message.fds)
            raise message.error()
        return message

    def close(self) -> None:
        for message in self.inbox:
            if isinstance(message, Incoming):
                close_fds(message.fds)


class Stream(Generic[Res]):
    """A call that streams. Iterate over its items, then ask for the ``result``."""

    def __init__(self, item_taken: Callable[[int], None], serial: int, pending: Pending, item: type[Message], result: type[Res]) -> None:
        self._item_taken = item_taken
        self._serial = serial
        self._pending = pending
        self._item = item
        self._result_type = result
        self._result: Incoming | None = None
        self._fds: list[int] = []

    def __aiter__(self) -> Stream[Res]:
        return self

    async def __anext__(self) -> Any:
        message = await self._next()
        if message is None:
            raise StopAsyncIteration
        return decode_body(self._item, message.raw)

    async def _next(self) -> Incoming | None:
        if self._result is not None:
            return None
        close_fds(self.take_fds())
        message = await self._pending.pop()
        self._fds = message.fds
        if message.kind == "result":
            self._result = message
            return None
        self._item_taken(self._serial)
        return message

    def take_fds(self) -> list[int]:
        """The descriptors of the latest item or of the result; they're yours then."""
        fds, self._fds = self._fds, []
        return fds

    async def result(self) -> Res:
        """Wait for the end, passing over items not yet taken. Raises the call's error."""
        while self._result is None:
            await self._next()
        return decode_body(self._result_type, self._result.raw)
