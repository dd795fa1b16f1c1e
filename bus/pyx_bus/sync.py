"""The blocking client: for the command line and for scripts. Bodies are plain dicts.

It imports the socket module's C part and msgpack, nothing else: a command's own start stays within a few milliseconds.
"""

from __future__ import annotations

import _socket
import os
import select
import time

from msgpack import packb

from . import errors
from .session import Incoming, Session, hello, pong, subscribe_body
from .transport import Transport, close_fds
from .wire import PING, Frame, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .session import Filters, Since
    from .sync_streams import Events, Stream


def default_path() -> str:
    """$PYX_BUS, else bus.sock in $PYX_RUN, else the system's own bus."""
    return os.environ.get("PYX_BUS") or os.environ.get("PYX_RUN", "/run/pyx") + "/bus.sock"


def connect_unix(path: str) -> _socket.socket:
    """A connected stream socket. Paths longer than a socket address holds (unix(7): 108 bytes) are reached through their directory."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        if len(os.fsencode(path)) < 108:
            sock.connect(path)
        else:
            directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                sock.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
            finally:
                os.close(directory)
    except BaseException:
        sock.close()
        raise
    return sock


class Connection:
    """One connection, used by one thread. Raises ``errors.Unavailable`` if the bus can't be reached or goes away.

    An interrupt (Ctrl-C) may come at any time: while something is waited for nothing is lost by it; in the middle of a read it closes
    the connection, since where the stream stands isn't known then. ``events`` connect again by themselves.
    """

    def __init__(self, path: str = "", name: str = "pyx", timeout_s: float = 5.0) -> None:
        self.path = path or default_path()
        self._name = name
        self._inbox: list[Incoming] = []
        self._events: dict[int, Events | None] = {}  # who gets what a subscription brings; None: the inbox
        self.connect(timeout_s)

    def connect(self, timeout_s: float = 5.0) -> None:
        """Anew, after the connection was lost: calls that were open have failed, ``events`` go on. Raises ``Unavailable``."""
        try:
            sock = connect_unix(self.path)
        except OSError as error:
            raise errors.Unavailable(
                f"cannot connect to the bus at {self.path}: {os.strerror(error.errno or 0).lower()}",
                hint="is the stack running? start it with: pyx system up --detach",
                details={"errno": str(error.errno)},
            ) from error
        self._transport = Transport(sock)
        self._session = Session()
        for events in self._events.values():
            if events is not None:
                events.lost()
        self._events.clear()
        try:
            try:
                self._transport.send(hello(self._name))  # into an empty socket: it takes all of it
            except OSError:
                pass  # closed already: if we were refused, the reason is there to be read
            deadline = time.monotonic() + timeout_s
            while not self._session.welcomed:
                if not self.read(deadline):
                    raise errors.Unavailable(f"the bus at {self.path} doesn't answer")
        except BaseException:
            self._transport.close()
            raise

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def bus_id(self) -> str:
        """The identity of the broker's journal: offsets are comparable within one."""
        return self._session.bus_id

    @property
    def closed(self) -> bool:
        """By ``close``, or lost."""
        return self._transport.closed

    def fileno(self) -> int:
        return self._transport.fd

    def pending(self) -> bool:
        """A message is here already: ``receive`` won't block."""
        return bool(self._inbox)

    def close(self) -> None:
        self._transport.close()
        for message in self._inbox:
            close_fds(message.fds)
        self._inbox.clear()

    # --- calls -------------------------------------------------------------------------------------------------------

    def call(
        self, method: str, body: dict[str, object] | None = None, fds: Sequence[int] = (), timeout_s: float | None = None
    ) -> dict[str, object]:
        """Call and wait for the result; items of a stream are passed over. ``timeout_s`` None: no deadline."""
        result, received = self.call_fds(method, body, fds, timeout_s)
        close_fds(received)
        return result

    def call_fds(
        self, method: str, body: dict[str, object] | None = None, fds: Sequence[int] = (), timeout_s: float | None = None
    ) -> tuple[dict[str, object], list[int]]:
        """As ``call``, with the descriptors that came with the result; they're the caller's."""
        serial = self.open(method, body, fds, timeout_s)
        return self._wait(serial, timeout_s)

    def stream(
        self, method: str, body: dict[str, object] | None = None, fds: Sequence[int] = (), timeout_s: float | None = None
    ) -> Stream:
        """Call, and take the items as they come: ``with connection.stream("imaged.pull", {...}) as items: for item in items``."""
        from .sync_streams import Stream

        return Stream(self, self.open(method, body, fds, timeout_s), timeout_s)

    def open(
        self, method: str, body: dict[str, object] | None = None, fds: Sequence[int] = (), timeout_s: float | None = None
    ) -> int:
        """Start a call; its items and result come by ``receive``. Returns its serial. ``fds`` stay the caller's."""
        timeout_ms = 0 if timeout_s is None else max(1, int(timeout_s * 1000))
        serial, data = self._session.call(method, packb(body or {}), len(fds), timeout_ms)
        self._write(data, fds)
        return serial

    def cancel(self, serial: int) -> None:
        self._write(self._session.cancel(serial))

    # --- events ------------------------------------------------------------------------------------------------------

    def events(
        self,
        *patterns: str,
        since: Since = None,
        journal: str = "",
        filters: Filters | None = None,
        durable: str = "",
        heartbeat_s: float | None = None,
        auto_ack: bool = True,
        retry_for_s: float | None = None,
    ) -> Events:
        """Subscribe: ``for event in connection.events("container.*", since="beginning"): ...``. Subscribed when this returns.

        Each event has ``topic``, ``offset``, ``source``, ``time_ns`` and ``payload``; lost events are told by one of the topic ``bus.gap``
        with ``lost``, ``first_offset``, ``last_offset`` in its payload. When the connection breaks it's made again, for ``retry_for_s``
        (for ever by default), and goes on at the right offset. The parameters are those of ``pyx_bus.client.Bus.events``.
        """
        from .sync_streams import Events

        return Events(
            self,
            subscribe_body,
            patterns,
            since,
            journal,
            filters,
            durable,
            heartbeat_s,
            auto_ack=auto_ack,
            retry_for_s=retry_for_s,
        )

    def subscribe(
        self,
        patterns: Sequence[str],
        since: Since = None,
        *,
        filters: Filters | None = None,
        durable: str = "",
        heartbeat_s: float | None = None,
    ) -> int:
        """Subscribe to topics; events then come by ``receive`` with this ID as ``serial``: for programs with a loop of their own.

        ``since``: an offset, "beginning" (the oldest kept), a ``datetime``, or None for what comes from now on.
        """
        body = subscribe_body(patterns, since, filters=filters, durable=durable, heartbeat_s=heartbeat_s)
        return self.ask_to_subscribe(body, None)[0]

    def ask_to_subscribe(self, body: bytes, events: Events | None) -> tuple[int, dict[str, object]]:
        """(the subscription's ID, the answer). What it brings goes to ``events`` if given."""
        serial, subscription, data = self._session.subscribe(body)
        self._events[subscription] = events
        try:
            self._write(data)
            return subscription, self._wait(serial, None)[0]
        except BaseException:
            self._events.pop(subscription, None)
            raise

    def unsubscribe(self, subscription: int) -> None:
        self._events.pop(subscription, None)
        self._write(self._session.unsubscribe(subscription))

    # --- the connection ----------------------------------------------------------------------------------------------

    def receive(self, timeout_s: float | None = None) -> Incoming | None:
        """The next item, result, error, event, gap or heartbeat; None if nothing came within ``timeout_s``."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._inbox:
            if not self.read(deadline):
                return None
        return self._inbox.pop(0)

    def next_answer(self, serial: int, deadline: float | None) -> Incoming | None:
        """The next item or the result of a call. Raises its error; None at the deadline (of ``time.monotonic``)."""
        seen = 0
        while True:
            while seen < len(self._inbox):
                message = self._inbox[seen]
                if message.serial != serial or message.kind not in ("item", "result", "error"):
                    seen += 1
                    continue
                del self._inbox[seen]
                if message.kind == "error":
                    close_fds(message.fds)
                    raise message.error()
                return message
            if not self.read(deadline):
                return None

    def _wait(self, serial: int, timeout_s: float | None) -> tuple[dict[str, object], list[int]]:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            message = self.next_answer(serial, deadline)
            if message is None:
                self.cancel(serial)
                raise errors.DeadlineExceeded(f"no answer within {timeout_s} s")
            if message.kind == "result":
                return message.body, message.fds
            close_fds(message.fds)

    def read(self, deadline: float | None) -> bool:
        """Read once, and put what came where it belongs; False if the deadline passed first."""
        transport = self._transport
        while True:
            if transport.closed:
                raise errors.Unavailable(f"the connection to the bus at {self.path} is closed")
            try:
                frames = transport.receive()
                if frames is not None:
                    for frame in frames:
                        self._dispatch(frame)
                    return True
            except BlockingIOError:
                poller = select.poll()
                poller.register(transport.fd, select.POLLIN)
                timeout_ms = None if deadline is None else max(0, int((deadline - time.monotonic()) * 1000) + 1)
                if not poller.poll(timeout_ms):
                    return False
                continue
            except (OSError, ProtocolError) as error:
                transport.close()
                raise errors.Unavailable(f"lost the connection to the bus at {self.path}: {error}") from error
            except BaseException:  # refused; or interrupted between the kernel's buffer and ours
                transport.close()
                raise
            transport.close()
            raise errors.Unavailable(f"the bus at {self.path} closed the connection")

    def _dispatch(self, frame: Frame) -> None:
        if frame.kind == PING:
            self._write(pong(frame))
            return
        messages = self._session.receive(frame)
        if not messages:
            close_fds(frame.fds)
            return
        first = messages[0]
        if first.kind == "item":
            credit = self._session.item_consumed(first.serial)
            if credit is not None:
                self._write(credit)
        elif first.kind in ("event", "gap", "heartbeat"):
            if first.serial not in self._events:
                return  # unsubscribed meanwhile
            events = self._events[first.serial]
            if events is not None:
                events.push(messages, len(frame.body))
                return
        self._inbox += messages

    def send(self, data: bytes) -> None:
        self._write(data)

    def _write(self, data: bytes, fds: Sequence[int] = ()) -> None:
        transport = self._transport
        try:
            if transport.send(data, fds):
                return
            poller = select.poll()
            poller.register(transport.fd, select.POLLOUT)
            while not transport.flush():
                poller.poll()
        except OSError as error:
            transport.close()
            raise errors.Unavailable(f"lost the connection to the bus at {self.path}: {error}") from error
        except BaseException:  # interrupted: part of a frame may be out
            transport.close()
            raise
