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
from .session import Incoming, Session, pong
from .transport import Transport, close_fds
from .wire import PING, Frame, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


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
    """One connection, used by one thread. Raises ``errors.Unavailable`` if the bus can't be reached or goes away."""

    def __init__(self, path: str = "", name: str = "pyx", timeout_s: float = 5.0) -> None:
        self.path = path or default_path()
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
        self._inbox: list[Incoming] = []
        self._write(self._session.hello(name))
        deadline = time.monotonic() + timeout_s
        while not self._session.welcomed:
            if not self._read(deadline):
                self.close()
                raise errors.Unavailable(f"the bus at {self.path} doesn't answer")

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def bus_id(self) -> str:
        """The identity of the broker's journal: offsets are comparable within one."""
        return self._session.bus_id

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

    def subscribe(self, patterns: list[str], since: int | str | None = None) -> int:
        """Subscribe to topics; events then come by ``receive`` with this subscription ID as ``serial``.

        ``since``: an offset, "beginning" (the oldest kept), or None for what comes from now on.
        """
        serial, subscription, data = self._session.subscribe(patterns, since)
        self._write(data)
        self._wait(serial, None)
        return subscription

    def receive(self, timeout_s: float | None = None) -> Incoming | None:
        """The next item, result, error, event or gap; None if nothing came within ``timeout_s``."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._inbox:
            if not self._read(deadline):
                return None
        return self._inbox.pop(0)

    def _wait(self, serial: int, timeout_s: float | None) -> tuple[dict[str, object], list[int]]:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        seen = 0
        while True:
            while seen < len(self._inbox):
                message = self._inbox[seen]
                if message.serial != serial or message.kind in ("event", "gap"):
                    seen += 1
                    continue
                del self._inbox[seen]
                if message.kind == "result":
                    return message.body, message.fds
                close_fds(message.fds)
                if message.kind == "error":
                    raise message.error()
            if not self._read(deadline):
                self.cancel(serial)
                raise errors.DeadlineExceeded(f"no answer within {timeout_s} s")

    def _read(self, deadline: float | None) -> bool:
        """Read once into the inbox; False if the deadline passed first."""
        transport = self._transport
        while True:
            try:
                frames = transport.receive()
            except BlockingIOError:
                poller = select.poll()
                poller.register(transport.fd, select.POLLIN)
                timeout_ms = None if deadline is None else max(0, int((deadline - time.monotonic()) * 1000))
                if not poller.poll(timeout_ms):
                    return False
                continue
            except (OSError, ProtocolError) as error:
                self.close()
                raise errors.Unavailable(f"lost the connection to the bus at {self.path}: {error}") from error
            if frames is None:
                self.close()
                raise errors.Unavailable(f"the bus at {self.path} closed the connection")
            for frame in frames:
                self._dispatch(frame)
            return True

    def _dispatch(self, frame: Frame) -> None:
        if frame.kind == PING:
            self._write(pong(frame))
            return
        message = self._session.receive(frame)
        if message is None:
            close_fds(frame.fds)
            return
        if message.kind == "item":
            credit = self._session.item_consumed(message.serial)
            if credit is not None:
                self._write(credit)
        self._inbox.append(message)

    def _write(self, data: bytes, fds: Sequence[int] = ()) -> None:
        try:
            if self._transport.send(data, fds):
                return
            poller = select.poll()
            poller.register(self._transport.fd, select.POLLOUT)
            while not self._transport.flush():
                poller.poll()
        except OSError as error:
            self.close()
            raise errors.Unavailable(f"lost the connection to the bus at {self.path}: {error}") from error
