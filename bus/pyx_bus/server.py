"""The serving side: a service's methods, and one call as its handler sees it."""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

import anyio
import msgspec
import structlog
from msgpack import packb

from . import errors
from .contract.base import Message, Method
from .transport import close_fds
from .wire import ERROR, ITEM, RESULT, STREAM_WINDOW, Frame, ProtocolError, encode

log = structlog.get_logger("bus.server")

Req = TypeVar("Req", bound=Message)
Res = TypeVar("Res", bound=Message)

_encode_body = msgspec.msgpack.encode


class Reply(Protocol):
    def __call__(self, data: bytes, fds: Sequence[int] = ...) -> None: ...


def _to_nobody(data: bytes, fds: Sequence[int] = ()) -> None:
    """An answer nobody waits for."""


class Call:
    """One call being served.

    ``uid`` is the caller's user. ``fds`` came with the request: what is still in the list when the handler ends is closed.
    ``reply_fds`` travel with the result and are closed after it was sent.
    """

    __slots__ = ("_credit", "_peer", "_serial", "_wake", "fds", "method", "reply", "reply_fds", "scope", "timeout_s", "uid")

    def __init__(self, reply: Reply, frame: Frame) -> None:
        self.reply = reply
        self.method = frame.route.decode("utf-8", "replace")
        self.uid = frame.arg >> 32
        self.timeout_s = (frame.arg & 0xFFFFFFFF) / 1000 or None
        self.fds = frame.fds
        self.reply_fds: list[int] = []
        self.scope = anyio.CancelScope()
        self._peer = frame.peer
        self._serial = frame.serial
        self._credit = STREAM_WINDOW
        self._wake: anyio.Event | None = None

    def take_fds(self) -> list[int]:
        """The request's descriptors; they're yours then."""
        fds = list(self.fds)
        self.fds.clear()
        return fds

    async def send(self, item: Message, fds: Sequence[int] = ()) -> None:
        """Stream an item; ``fds`` stay yours. Waits while the caller has ``STREAM_WINDOW`` items it hasn't taken."""
        while self._credit <= 0:
            self._wake = anyio.Event()
            await self._wake.wait()
        self._credit -= 1
        self.reply(encode(ITEM, b"", _encode_body(item), self._peer, self._serial, 0, len(fds)), fds)

    def add_credit(self, items: int) -> None:
        self._credit += items
        if self._wake is not None:
            self._wake.set()

    def finish(self, result: Message) -> None:
        data = encode(RESULT, b"", _encode_body(result), self._peer, self._serial, 0, len(self.reply_fds))
        self.reply(data, self.reply_fds)
        self.close()

    def fail(self, error: errors.BusError) -> None:
        self.reply(encode(ERROR, b"", packb(errors.to_body(error)), self._peer, self._serial))
        self.close()

    def abandon(self) -> None:
        """The caller has cancelled. Nothing is answered any more, even if the handler shields itself: the caller may use the serial
        for another call."""
        self.reply = _to_nobody
        self.scope.cancel()

    def close(self) -> None:
        close_fds(self.take_fds())
        close_fds(self.reply_fds)
        self.reply_fds = []


Handler = Callable[[Call, Any], Awaitable[Message]]
_Handler = Callable[[Call, Req], Awaitable[Res]]


class Service:
    """A name and its methods. A service's ``api.py`` fills one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.handlers: dict[str, tuple[msgspec.msgpack.Decoder[Any], Handler]] = {}

    def method(self, method: Method[Req, Res]) -> Callable[[_Handler[Req, Res]], _Handler[Req, Res]]:
        """Decorator: ``async def handler(call, request) -> result`` serves ``method``."""
        if method.name.partition(".")[0] != self.name:
            raise ValueError(f"{method.name} is not a method of {self.name}")

        def register(handler: _Handler[Req, Res]) -> _Handler[Req, Res]:
            self.handlers[method.name] = (msgspec.msgpack.Decoder(method.request), handler)
            return handler

        return register


async def serve_call(service: Service, call: Call, frame: Frame, done: Callable[[], None]) -> None:
    """Run one handler to its end and answer. Never raises but for cancellation from outside."""
    try:
        with call.scope, anyio.fail_after(call.timeout_s):
            entry = service.handlers.get(call.method)
            if entry is None:
                raise errors.Unimplemented(f'no method "{call.method}"')
            decoder, handler = entry
            try:
                request = decoder.decode(frame.body or b"\x80")
            except (msgspec.DecodeError, msgspec.ValidationError) as error:
                raise errors.InvalidArgument(f"bad request to {call.method}: {error}") from error
            result = await handler(call, request)
            call.finish(result)
    except errors.BusError as error:
        call.fail(error)
    except TimeoutError:
        call.fail(errors.DeadlineExceeded(f"{call.method} didn't finish within {call.timeout_s} s"))
    except ProtocolError as error:  # the answer is larger than a frame may be
        call.fail(errors.ResourceExhausted(f"the answer of {call.method} is too large: {error}"))
    except Exception as error:
        log.error("call failed", method=call.method, error=repr(error), traceback=traceback.format_exc())
        call.fail(errors.Internal(f"internal error in {call.method}: {error!r}", hint=f"see the log of {service.name}"))
    finally:
        call.close()
        done()
