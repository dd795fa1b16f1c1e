"""A non-blocking unix socket with frames on it: what the broker and the client do at the edge of the kernel.

Writes go out at once; what the kernel doesn't take waits in a queue of shared chunks (never copied, never joined) and goes out by
sendmsg(2) with an iovec when the socket is writable. A chunk that carries descriptors is sent by a sendmsg of its own, so that they
stay attached to its first byte. Imports are the bare minimum: the command line uses this module.
"""

from __future__ import annotations

import _socket
import os

from .wire import MAX_FDS, MAX_FRAME, Decoder, Frame, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

READ_SIZE = 64 << 10
IOV_MAX = 512
_INT = 4
_ANCILLARY = _socket.CMSG_SPACE(2 * MAX_FDS * _INT)
_SOL_SOCKET = _socket.SOL_SOCKET
_SCM_RIGHTS = _socket.SCM_RIGHTS
_CLOEXEC = _socket.MSG_CMSG_CLOEXEC
_CTRUNC = _socket.MSG_CTRUNC
_NOSIGNAL = _socket.MSG_NOSIGNAL

Chunk = bytes | memoryview | tuple[bytes, list[int]]


def pack_fds(fds: Sequence[int]) -> bytes:
    return b"".join([fd.to_bytes(_INT, "little") for fd in fds])


def unpack_fds(data: bytes) -> list[int]:
    return [int.from_bytes(data[i : i + _INT], "little") for i in range(0, len(data) - len(data) % _INT, _INT)]


def close_fds(fds: Sequence[int]) -> None:
    for fd in fds:
        try:
            os.close(fd)
        except OSError:
            pass


class Transport:
    """Frames over one connected, non-blocking unix stream socket.

    ``queued_bytes`` is what the kernel hasn't taken yet; the owner sets the bound and decides what happens beyond it. ``buffer`` is
    where reads go first: whoever serves thousands of sockets in one thread lets them share one. ``read_bytes`` is what the last read
    brought. ``runs``: see ``Decoder``.
    """

    __slots__ = ("_buffer", "_view", "closed", "decoder", "fd", "queue", "queued_bytes", "read_bytes", "sock")

    def __init__(
        self,
        sock: _socket.socket,
        *,
        first_frame_limit: int = MAX_FRAME,
        runs: bool = False,
        buffer: bytearray | None = None,
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.fd = sock.fileno()
        self.decoder = Decoder(first_frame_limit, runs=runs)
        self.queue: list[Chunk] = []
        self.queued_bytes = 0
        self.closed = False
        self.read_bytes = 0
        self._buffer = bytearray(READ_SIZE) if buffer is None else buffer
        self._view = memoryview(self._buffer)

    def receive(self, limit: int = 0) -> list[Frame] | None:
        """Read once, at most ``limit`` bytes if given: the frames completed by it (maybe none), or None at the end of the stream.

        Raises ``BlockingIOError`` if there's nothing to read, ``ProtocolError``, or ``OSError`` of a broken connection.
        """
        size, ancillary, flags, _ = self.sock.recvmsg_into(
            [self._view[:limit] if limit else self._buffer], _ANCILLARY, _CLOEXEC
        )
        self.read_bytes = size
        fds: list[int] | None = None
        if ancillary:
            fds = []
            for level, kind, data in ancillary:
                if level == _SOL_SOCKET and kind == _SCM_RIGHTS:
                    fds.extend(unpack_fds(data))
            if flags & _CTRUNC:
                close_fds(fds)
                raise ProtocolError("more descriptors than a frame may carry")
        if not size:
            close_fds(fds or ())
            return None
        return self.decoder.feed(bytes(self._view[:size]), fds)

    def send(self, data: bytes, fds: Sequence[int] = ()) -> bool:
        """Queue a frame and try to write. ``fds`` are duplicated if they have to wait: they stay the caller's. True if all is out."""
        if not self.queue:
            try:
                if fds:
                    sent = self.sock.sendmsg([data], [(_SOL_SOCKET, _SCM_RIGHTS, pack_fds(fds))], _NOSIGNAL)
                else:
                    sent = self.sock.send(data, _NOSIGNAL)
            except BlockingIOError:
                self.push(data, [os.dup(fd) for fd in fds])
                return False
            if sent == len(data):
                return True
            self.push(memoryview(data)[sent:])
            return False
        self.push(data, [os.dup(fd) for fd in fds])
        return self.flush()

    def push(self, data: bytes | memoryview, owned_fds: list[int] | None = None) -> None:
        """Queue without writing. ``owned_fds`` are closed once they're sent."""
        if owned_fds:
            self.queue.append((bytes(data), owned_fds))
        else:
            self.queue.append(data)
        self.queued_bytes += len(data)

    def flush(self) -> bool:
        """Write as much as the kernel takes. True if the queue is empty; raises ``OSError`` of a broken connection."""
        queue = self.queue
        try:
            while queue:
                first = queue[0]
                if isinstance(first, tuple):
                    data, fds = first
                    sent = self.sock.sendmsg([data], [(_SOL_SOCKET, _SCM_RIGHTS, pack_fds(fds))], _NOSIGNAL)
                    close_fds(fds)
                    self.queued_bytes -= sent
                    if sent == len(data):
                        del queue[0]
                    else:
                        queue[0] = memoryview(data)[sent:]
                    continue
                if len(queue) == 1:
                    sent = self.sock.send(first, _NOSIGNAL)
                else:
                    sent = self.sock.sendmsg(self._plain_run(), (), _NOSIGNAL)
                self.queued_bytes -= sent
                self._consume(sent)
        except BlockingIOError:
            return False
        return True

    def _plain_run(self) -> list[bytes | memoryview]:
        run: list[bytes | memoryview] = []
        for chunk in self.queue[:IOV_MAX]:
            if isinstance(chunk, tuple):
                break
            run.append(chunk)
        return run

    def _consume(self, sent: int) -> None:
        queue = self.queue
        done = 0
        while sent:
            chunk = queue[done]
            assert not isinstance(chunk, tuple)
            if sent < len(chunk):
                queue[done] = memoryview(chunk)[sent:]
                break
            sent -= len(chunk)
            done += 1
        del queue[:done]

    def close(self) -> None:
        """Close the socket and every descriptor still in flight here. Idempotent."""
        if self.closed:
            return
        self.closed = True
        for chunk in self.queue:
            if isinstance(chunk, tuple):
                close_fds(chunk[1])
        self.queue.clear()
        close_fds(self.decoder.take_fds())
        self.sock.close()
