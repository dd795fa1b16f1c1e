"""A stream's read buffer that outlives the process, so that no byte is lost or stored twice when logd is killed.

The kernel forgets what a read(2) handed out. So the read goes straight into a shared mapping of a file (in the run directory, which is
a tmpfs: nothing of it ever reaches a disk), and a header in the same mapping says how far things are. What a kill -9 leaves is then
one of these, told apart by `recover`:

- *settled*: nothing was being read; the pending bytes are the unfinished line so far.
- *reading, the read didn't happen*: as settled. FIONREAD said how many bytes there are, we are the only reader, and so read(2)
  returns all of them or didn't run; in the first case the last of them replaced a canary.
- *reading, the read happened*: whatever was written to the log since is cut off again (the header has the log's mark from before),
  and the bytes are stored again.

The header holds two slots, each with a pending area of its own; a one-byte store switches between them, so that a kill in the middle
of an update finds the other one whole. (A crash of the host ends the containers with their pipes; the file goes with the boot.)

Layout: byte 0 the slot in use; slots at 64 and 128: ``<Q mark's file, Q mark's size, I pending length, I read length, B reading``;
pending areas of `LINE_MAX_BYTES` at 4096 and 4096 + 16 KiB; the read area after them.
"""

from __future__ import annotations

import array
import fcntl
import mmap
import os
import struct
import termios
from dataclasses import dataclass
from pathlib import Path

from .model import LINE_MAX_BYTES

READ_MAX_BYTES = 128 * 1024
"""Per read: enough to make a read's fixed cost small against its bytes, little enough not to hold the loop more than 1 ms."""

_SLOT = struct.Struct("<QQIIB")
_SLOTS = (64, 128)
_PENDING = (4096, 4096 + LINE_MAX_BYTES)
_READ = 4096 + 2 * LINE_MAX_BYTES
_SIZE = _READ + READ_MAX_BYTES
_READING = _SLOT.size - 1
_CANARY = b"\xff" * 16  # no UTF-8 text has such a byte

Mark = tuple[int, int]
"""A position in the log: the file (its inode) and its size."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """``pending`` and ``data`` (what was read after it), to be stored again after the log was cut back to ``mark``.

    ``mark`` None: settled, nothing to store again; ``data`` is empty then.
    """

    pending: bytes
    data: bytes
    mark: Mark | None


class Window:
    """One stream's buffer, in a file at ``path`` which is made if it isn't there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size != _SIZE:
                os.ftruncate(fd, 0)  # of another size it isn't ours: zeros only
                os.ftruncate(fd, _SIZE)
            self._map = mmap.mmap(fd, _SIZE)
        finally:
            os.close(fd)
        self._area = memoryview(self._map)[_READ:]
        self._slot = self._map[0] & 1
        self.pending = self._load().pending
        """The unfinished line so far."""

    def _load(self) -> Recovered:
        file, size, pending_len, read_len, reading = _SLOT.unpack_from(self._map, _SLOTS[self._slot])
        if pending_len > LINE_MAX_BYTES or read_len > READ_MAX_BYTES:  # not ours; begin anew
            return Recovered(b"", b"", None)
        start = _PENDING[self._slot]
        pending = self._map[start : start + pending_len]
        data = self._map[_READ : _READ + read_len]
        if not reading or data[-len(_CANARY) :] == _CANARY[-read_len:]:
            return Recovered(pending, b"", None)
        return Recovered(pending, data, (file, size))

    def recover(self) -> Recovered:
        """What an earlier process left here. Follow it with `settle`."""
        return self._load()

    def read(self, fd: int, mark: Mark) -> bytes | None:
        """Read what's there, up to `READ_MAX_BYTES`, and return it after the pending bytes; None if nothing is there *now*.

        ``mark`` is the log's position before these bytes are stored. Follow it with `settle` once they are. Whether None means the end
        only a further read(2) of the caller's can tell. Raises OSError as read(2).
        """
        count = available(fd)
        if not count:
            return None
        count = min(count, READ_MAX_BYTES)
        length = min(count, len(_CANARY))
        self._map[_READ + count - length : _READ + count] = _CANARY[:length]
        offset = _SLOTS[self._slot]
        _SLOT.pack_into(self._map, offset, *mark, len(self.pending), count, 0)
        self._map[offset + _READING] = 1
        got = os.readv(fd, [self._area[:count]])
        if got != count:  # a terminal may give less than it said; the rest is old bytes and the canary
            _SLOT.pack_into(self._map, offset, *mark, len(self.pending), got, 1)
        return b"".join((self.pending, self._area[:got]))

    def settle(self, pending: bytes) -> None:
        """What was read is stored but for ``pending``, the unfinished line."""
        slot = 1 - self._slot
        start = _PENDING[slot]
        self._map[start : start + len(pending)] = pending
        _SLOT.pack_into(self._map, _SLOTS[slot], 0, 0, len(pending), 0, 0)
        self._map[0] = slot
        self._slot = slot
        self.pending = pending

    def close(self, *, remove: bool) -> None:
        """Let go of the memory; with ``remove`` of the file too, once the stream has ended and all is stored."""
        self._area.release()
        self._map.close()
        if remove:
            self.path.unlink(missing_ok=True)


_count = array.array("i", [0])


def available(fd: int) -> int:
    """Bytes that a read of ``fd`` would return without waiting."""
    fcntl.ioctl(fd, termios.FIONREAD, _count, True)
    return _count[0]
