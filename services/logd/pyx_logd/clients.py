"""A client's descriptor: written without ever blocking logd, and without changing the client's own view of it."""

from __future__ import annotations

import fcntl
import os
import select
import stat
from collections import deque
from collections.abc import Callable

import trio

from pyx_bus.errors import InvalidArgument

from . import frames

_PIPE_BYTES = 512 * 1024
"""Of memory only when filled; each time one is full costs a wait and a wake-up."""


Progress = Callable[[int, int], None]
"""Told the client's inode and a number of bytes."""


def _ignore(inode: int, count: int) -> None: ...


class Client:
    """Somebody who gets output: an attached terminal, a reader of logs. Owns ``fd``, which `check_client` found good.

    `send_nowait` writes what fits and keeps the rest; `flush` waits until the rest is out. A sender flushes before it sends more, so the
    rest is bounded by what it sent. A client that closed its end is ``gone``: what is sent to it vanishes, nobody else notices.
    """

    def __init__(self, fd: int, frame: frames.Frame, *, stdout: bool = True, stderr: bool = True) -> None:
        self.gone = False
        self._fd = _nonblocking(fd)
        self._frame = frame
        self._wants = {"stdout": stdout, "stderr": stderr}
        self.inode = os.fstat(self._fd).st_ino
        """Names the pipe, whatever descriptor it's known by."""
        self._queue: deque[tuple[memoryview, Progress]] = deque()
        self._flushing = trio.Lock()

    @property
    def waiting(self) -> bool:
        """Whether there's something to `flush`."""
        return bool(self._queue)

    def send_nowait(self, stream: str, payload: bytes, progress: Progress = _ignore, *, has: int = 0) -> None:
        """Send output of ``stream``, if the client wants that one, less the ``has`` bytes of its frame which it got before.

        ``progress`` is told after every write how many bytes it took.
        """
        if self._wants[stream] and payload and not self.gone:
            self._send(memoryview(self._frame(stream, payload))[has:], progress)

    def write_nowait(self, data: bytes) -> None:
        """Send ``data`` as it is."""
        self._send(memoryview(data), _ignore)

    def _send(self, data: memoryview, progress: Progress) -> None:
        if self.gone:
            return
        self._queue.append((data, progress))
        if len(self._queue) == 1:
            self._write()

    def _write(self) -> None:
        """Write what fits, from the queue's head."""
        while self._queue:
            data, progress = self._queue.popleft()
            try:
                count = os.write(self._fd, data) if data else 0
            except BlockingIOError:
                count = 0
            except OSError:  # EPIPE, ECONNRESET: the other end is closed
                self.gone = True
                self._queue.clear()
                return
            progress(self.inode, count)
            if count < len(data):
                self._queue.appendleft((data[count:], progress))  # a view: what's left of a big write isn't copied again and again
                return

    def check_gone(self) -> bool:
        """Whether the other end is closed, which else shows at the next output only."""
        if not self.gone:
            poll = select.poll()
            poll.register(self._fd, 0)
            self.gone = bool(poll.poll(0))  # POLLERR or POLLHUP
        return self.gone

    async def flush(self) -> None:
        """Wait until all is written, or the client is gone. Cancelled, it may have written a part."""
        async with self._flushing:  # stdout's and stderr's readers may both be here
            while self._queue and not self.gone:
                try:
                    await trio.lowlevel.wait_writable(self._fd)
                except trio.ClosedResourceError:  # by the other stream's reader
                    break
                self._write()
        if self.gone:
            self._queue.clear()

    def close(self) -> None:
        """The client sees the end. Idempotent."""
        self.gone = True
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            trio.lowlevel.notify_closing(fd)
            os.close(fd)


def check_client(fd: int) -> None:
    """Whether output can be sent to ``fd``. Raises invalid_argument."""
    mode = os.fstat(fd).st_mode
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY or not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        raise InvalidArgument("the descriptor for output must be the write end of a pipe, or a socket")


def _nonblocking(fd: int) -> int:
    """A descriptor for the same pipe that doesn't block, in place of ``fd``.

    O_NONBLOCK belongs to the open file description, which the client shares with us: a pipe is opened anew, so that only ours has it.
    That can't be done with a socket.
    """
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        try:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        except OSError:  # more than the user may have in pipes; it works with less
            pass
        try:
            fresh = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:  # somebody else's pipe and no right to open it, or no /proc
            pass
        else:
            os.close(fd)
            return fresh
    os.set_blocking(fd, False)
    return fd
