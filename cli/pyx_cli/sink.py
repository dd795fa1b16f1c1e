"""Writes to the user's standard output and error that never block the loop and never lose a byte.

The user's descriptors are shared with the shell and whoever else: O_NONBLOCK is never set on them. A pipe or terminal is opened
once more through /proc instead, which gives an open file description of our own (proc(5)); a file is simply written to.
"""

from __future__ import annotations

import os
import stat

LIMIT = 1 << 20  # above this much waiting, the reader pauses: the writer in the container is held back, as with any pipe


def own_nonblocking(fd: int) -> int:
    """A non-blocking descriptor for what ``fd`` is open on, or ``fd`` itself where that can't be had (file, socket, no right)."""
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISFIFO(mode) or (stat.S_ISCHR(mode) and os.isatty(fd)):
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        pass
    return fd


class Sink:
    """``write`` takes everything at once; what the other end doesn't take yet stays in order until ``flush``."""

    def __init__(self) -> None:
        self._own: dict[int, int] = {}
        self._queue: list[tuple[int, memoryview]] = []
        self._waiting = 0

    def write(self, fd: int, data: bytes) -> None:
        """Raises BrokenPipeError when nobody reads any more."""
        self._queue.append((fd, memoryview(data)))
        self._waiting += len(data)
        self.flush()

    def flush(self) -> None:
        queue = self._queue
        while queue:
            fd, data = queue[0]
            own = self._own.get(fd, -1)
            if own < 0:
                own = self._own[fd] = own_nonblocking(fd)
            try:
                written = os.write(own, data)
            except BlockingIOError:
                return
            except BrokenPipeError:
                raise
            except OSError as error:
                if error.errno not in (5, 9):  # EIO: the terminal was hung up; EBADF: started with it closed. Nobody to tell.
                    raise
                written = len(data)
            self._waiting -= written
            if written == len(data):
                del queue[0]
            else:
                queue[0] = (fd, data[written:])

    @property
    def blocked_on(self) -> int:
        """The descriptor to poll for POLLOUT; -1 if everything is written."""
        return self._own.get(self._queue[0][0], -1) if self._queue else -1

    @property
    def full(self) -> bool:
        return self._waiting > LIMIT

    def drain(self) -> None:
        """Write what's left, waiting as long as it takes."""
        import select

        while self._queue:
            self.flush()
            fd = self.blocked_on
            if fd >= 0:
                poller = select.poll()
                poller.register(fd, select.POLLOUT)
                poller.poll()
