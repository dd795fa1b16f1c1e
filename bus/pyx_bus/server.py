"""The serving side: a service's methods, and one call as its handler sees it."""

from __future__ import annotations

import inspect
import logging
import math
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

import anyio
import msgspec
from msgpack import packb

from . import __version__, errors
from .contract.base import Message, Method
from .transport import close_fds
from .wakeup import Loop, Scope
from .wire import ERROR, FLAG_MONITOR, ITEM, RESULT, STREAM_WINDOW, Frame, ProtocolError, encode

log = logging.getLogger("pyx_bus.server")

Req = TypeVar("Req", bound=Message)
Res = TypeVar("Res", bound=Message)

_encode_body = msgspec.msgpack.Encoder().encode


class Reply(Protocol):
    def __call__(self, data: bytes, fds: Sequence[int] = ...) -> None: ...


def _to_nobody(data: bytes, fds: Sequence[int] = ()) -> None:
    """An answer nobody waits for."""


class Call:
    """One call being served.

    ``uid`` is the caller's user; ``monitor`` says that the caller may only look, and must not see secrets. ``fds`` came with the request:
    what is still in the list when the handler ends is closed. ``reply_fds`` travel with the result and are closed after it was sent.
    """

    __slots__ = (
        "_abandoned",
        "_credit",
        "_peer",
        "_published",
        "_serial",
        "_snapshot",
        "_wake",
        "fds",
        "method",
        "monitor",
        "reply",
        "reply_fds",
        "scope",
        "timeout_s",
        "uid",
    )

    def __init__(self, reply: Reply, frame: Frame, published: Callable[[], int]) -> None:
        self.reply = reply
        self.method = frame.route.decode("utf-8", "replace")
        self.uid = frame.arg >> 32
        self.monitor = bool(frame.flags & FLAG_MONITOR)
        self.timeout_s = (frame.arg & 0xFFFFFFFF) / 1000 or None
        self.fds = frame.fds
        self.reply_fds: list[int] = []
        self.scope: Scope | None = None
        self._peer = frame.peer
        self._serial = frame.serial
        self._published = published
        self._snapshot = 0
        self._credit = STREAM_WINDOW
        self._wake: anyio.Event | None = None
        self._abandoned = False

    def take_fds(self) -> list[int]:
        """The request's descriptors; they're yours then."""
        fds = list(self.fds)
        self.fds.clear()
        return fds

    def snapshot(self) -> None:
        """The state that the result will tell is read now: it includes all this service has published so far, and nothing of what it
        publishes from now on. So the caller can subscribe to just what comes after (``Bus.watch``).

        To be called with no ``await`` between it and the reading, and where changes are published with none after they're made.
        """
        self._snapshot = self._published() + 1

    async def send(self, item: Message, fds: Sequence[int] = ()) -> None:
        """Stream an item; ``fds`` stay yours. Waits while the caller has ``STREAM_WINDOW`` items it hasn't taken.

        Raises ``Cancelled`` when the caller is gone: a handler that shields itself learns it here, and doesn't wait for ever for somebody
        to take its items.
        """
        while self._credit <= 0 and not self._abandoned:
            self._wake = anyio.Event()
            await self._wake.wait()
        if self._abandoned:
            raise errors.Cancelled(f"the caller of {self.method} is gone")
        self._credit -= 1
        self.reply(encode(ITEM, b"", _encode_body(item), self._peer, self._serial, 0, len(fds)), fds)

    def add_credit(self, items: int) -> None:
        self._credit += items
        if self._wake is not None:
            self._wake.set()

    def finish(self, result: Message) -> None:
        fds = self.reply_fds
        self.reply(encode(RESULT, b"", _encode_body(result), self._peer, self._serial, self._snapshot, len(fds)), fds)
        self.close()

    def fail(self, error: errors.BusError) -> None:
        self.reply(encode(ERROR, b"", packb(errors.to_body(error)), self._peer, self._serial))
        self.close()

    def abandon(self) -> None:
        """The caller has cancelled, or is gone. Nothing is answered any more, even if the handler shields itself: the caller may use the
        serial for another call, and over another connection it would be somebody else's."""
        self.reply = _to_nobody
        self._abandoned = True
        if self.scope is not None:
            self.scope.cancel()
        if self._wake is not None:
            self._wake.set()

    @property
    def abandoned(self) -> bool:
        """Nobody waits for the answer any more."""
        return self._abandoned

    def close(self) -> None:
        if self.fds:
            close_fds(self.take_fds())
        if self.reply_fds:
            close_fds(self.reply_fds)
            self.reply_fds = []


Handler = Callable[[Call, Any], Any]
# Either ``async def``, or a plain function.
_Handler = Callable[[Call, Req], Awaitable[Res]] | Callable[[Call, Req], Res]
H = TypeVar("H", bound=Callable[[Call, Any], Any])


class Service:
    """A name and its methods. A service's ``api.py`` fills one. ``version`` is the program's; ``bus.services`` tells it."""

    def __init__(self, name: str, version: str = __version__) -> None:
        self.name = name
        self.version = version
        self.handlers: dict[str, tuple[Callable[[bytes], Any], Handler, bool]] = {}
        self.methods: dict[str, Method[Any, Any]] = {}

    def method(self, method: Method[Req, Res]) -> Callable[[H], H]:
        """Decorator: ``async def handler(call, request) -> result`` serves ``method``.

        A plain ``def`` is run at once where calls are read, without a task of its own: right for what answers from memory in some
        microseconds. While it runs nothing else does, so it must not block.
        """
        if method.name.partition(".")[0] != self.name:
            raise ValueError(f"{method.name} is not a method of {self.name}")

        def register(handler: H) -> H:
            decode = msgspec.msgpack.Decoder(method.request).decode
            self.handlers[method.name] = (decode, handler, inspect.iscoroutinefunction(handler))
            self.methods[method.name] = method
            return handler

        return register

    def verbs(self) -> dict[str, bool]:
        """Every method, without the service's name, and whether it's read-only."""
        return {name.partition(".")[2]: method.read_only for name, method in self.methods.items()}

    def begin(self, call: Call, frame: Frame) -> Awaitable[Message] | None:
        """Decode the request and, if the handler is a plain function, answer. What is left to be awaited with ``finish``. Never raises."""
        try:
            entry = self.handlers.get(call.method)
            if entry is None:
                raise errors.Unimplemented(f'no method "{call.method}"')
            decode, handler, is_async = entry
            try:
                request = decode(frame.body or b"\x80")
            except (msgspec.DecodeError, msgspec.ValidationError) as error:
                raise errors.InvalidArgument(f"bad request to {call.method}: {error}") from error
            result = handler(call, request)
            if is_async or not isinstance(result, Message):
                work: Awaitable[Message] = result
                return work  # (a plain function may also return a coroutine)
            call.finish(result)
        except Exception as error:
            self._failed(call, error)
        return None

    async def finish(self, call: Call, work: Any, loop: Loop) -> None:
        """Run an asynchronous handler to its end and answer. Never raises but for cancellation from outside."""
        scope = call.scope = loop.scope(math.inf if call.timeout_s is None else loop.now() + call.timeout_s)
        if call.abandoned:
            scope.cancel()
        try:
            with scope:
                call.finish(await work)
            if scope.cancelled_caught:  # by its deadline; else nobody waits for what we say
                call.fail(errors.DeadlineExceeded(f"{call.method} didn't finish within {call.timeout_s} s"))
        except Exception as error:
            self._failed(call, error)
        finally:
            call.close()

    def _failed(self, call: Call, error: Exception) -> None:
        if isinstance(error, errors.BusError):
            call.fail(error)
        elif isinstance(error, ProtocolError):  # the answer is larger than a frame may be
            call.fail(errors.ResourceExhausted(f"the answer of {call.method} is too large: {error}"))
        else:
            trace = "".join(traceback.format_exception(error))
            log.error("a call of %s failed: %r\n%s", call.method, error, trace)
            call.fail(errors.Internal(f"internal error in {call.method}: {error!r}", hint=f"see the log of {self.name}"))
