"""A stream's read buffer that outlives the process, so that no byte is lost or stored twice when logd is killed.

The kernel forgets what a read(2) handed out. So the read goes straight into a shared mapping of a file (in the run directory, which is
a tmpfs: nothing of it ever reaches a disk), and a header in the same mapping says how far things are. What a kill -9 leaves is then
one of these, told apart by `recover`:

- *settled*: nothing was being read; the pending bytes are the unfinished line so far.
- *delivering*: settled, but attached clients may not have all of what was read last. A table says how much of its frame each client
  has (by its pipe's inode), and a client who comes again gets the rest. A kill between a client's write(2) and the table's update,
  a few microseconds, repeats that write: nothing tells whether a pipe took it, and twice beats never.
- *reading, the read didn't happen*: as settled. FIONREAD said how many bytes there are, we are the only reader, and so read(2)
  returns all of them or didn't run; in the first case the last of them replaced a canary.
- *reading, the read happened*: whatever was written to the log since is cut off again (the header has the log's mark from before),
  and the bytes are stored again.

Then there may be both a log to repair and clients to serve: what was stored again counts as not delivered to anybody.

The header holds two slots, each with a pending area of its own; a one-byte store switches between them, so that a kill in the middle
of an update finds the other one whole. (A crash of the host ends the containers with their pipes; the file goes with the boot.)

Layout: byte 0 the slot in use; slots at 64 and 128: ``<Q mark's file, Q mark's size, I pending length, I read length, B state``;
the table of clients at 256: 16 times ``<Q inode, I bytes``;
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
_STATE = _SLOT.size - 1
_SETTLED, _READING, _DELIVERING = range(3)
_CLIENT = struct.Struct("<QI")
_CLIENTS, _CLIENTS_MAX = 256, 16
_NOTHING = 0xFFFFFFFF  # came after the read: nothing of it is for this client
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
        self._count = 0
        self._clients: dict[int, tuple[int, int]] = {}  # inode → place in the table, bytes
        self.pending = self._load().pending
        """The unfinished line so far."""
        self.undelivered = self._load_undelivered()
        """What an earlier process had read and perhaps not sent to everybody; for each client less what `has` says."""

    def _load(self) -> Recovered:
        file, size, pending_len, read_len, state = _SLOT.unpack_from(self._map, _SLOTS[self._slot])
        if pending_len > LINE_MAX_BYTES or read_len > READ_MAX_BYTES or state > _DELIVERING:  # not ours; begin anew
            return Recovered(b"", b"", None)
        start = _PENDING[self._slot]
        pending = self._map[start : start + pending_len]
        data = self._map[_READ : _READ + read_len]
        self._count = read_len
        if state != _READING or data[-len(_CANARY) :] == _CANARY[-read_len:]:
            return Recovered(pending, b"", None)
        return Recovered(pending, data, (file, size))

    def _load_undelivered(self) -> bytes:
        _, _, _, read_len, state = _SLOT.unpack_from(self._map, _SLOTS[self._slot])
        if state != _DELIVERING or read_len > READ_MAX_BYTES:
            return b""
        for place in range(_CLIENTS_MAX):
            inode, sent = _CLIENT.unpack_from(self._map, _CLIENTS + place * _CLIENT.size)
            if inode:
                self._clients[inode] = place, sent
        return self._map[_READ : _READ + read_len]

    def recover(self) -> Recovered:
        """What an earlier process left here. Follow it with `settle`."""
        return self._load()

    def read(self, fd: int, mark: Mark, limit: int = READ_MAX_BYTES) -> bytes | None:
        """Read what's there, up to ``limit`` (at most `READ_MAX_BYTES`), and return it after the pending bytes; None if nothing is
        there *now*.

        ``mark`` is the log's position before these bytes are stored. Follow it with `settle` once they are. Whether None means the end
        only a further read(2) of the caller's can tell. Raises OSError as read(2).
        """
        count = available(fd)
        if not count:
            return None
        count = min(count, limit)
        length = min(count, len(_CANARY))
        self._map[_READ + count - length : _READ + count] = _CANARY[:length]
        offset = _SLOTS[self._slot]
        _SLOT.pack_into(self._map, offset, *mark, len(self.pending), count, 0)
        self._map[offset + _STATE] = _READING
        got = os.readv(fd, [self._area[:count]])
        if got != count:  # a terminal may give less than it said; the rest is old bytes and the canary
            _SLOT.pack_into(self._map, offset, *mark, len(self.pending), got, _READING)
        self._count = got
        return b"".join((self.pending, self._area[:got]))

    def settle(self, pending: bytes, *, deliver: bool = False) -> None:
        """What was read is stored but for ``pending``, the unfinished line. With ``deliver`` it's kept until `delivered`."""
        slot = 1 - self._slot
        start = _PENDING[slot]
        self._map[start : start + len(pending)] = pending
        if deliver:
            self._clients.clear()
            self._map[_CLIENTS : _CLIENTS + _CLIENTS_MAX * _CLIENT.size] = bytes(_CLIENTS_MAX * _CLIENT.size)
        state = _DELIVERING if deliver else _SETTLED
        _SLOT.pack_into(self._map, _SLOTS[slot], 0, 0, len(pending), self._count, state)
        self._map[0] = slot
        self._slot = slot
        self.pending = pending

    @property
    def delivering(self) -> bool:
        return self._map[_SLOTS[self._slot] + _STATE] == _DELIVERING

    def sent(self, inode: int, count: int) -> None:
        """The client with that pipe has ``count`` more bytes of its frame. Beyond 16 clients it isn't remembered."""
        place, before = self._clients.get(inode, (len(self._clients), 0))
        if place < _CLIENTS_MAX and before != _NOTHING:
            self._clients[inode] = place, before + count
            _CLIENT.pack_into(self._map, _CLIENTS + place * _CLIENT.size, inode, before + count)

    def excuse(self, inode: int) -> None:
        """The client with that pipe came after the read: it gets nothing of it."""
        self.sent(inode, _NOTHING)

    def has(self, inode: int) -> int:
        """How many bytes of its frame of `undelivered` the client has."""
        return self._clients.get(inode, (0, 0))[1]

    def delivered(self) -> None:
        """Every client has what was read."""
        self.undelivered = b""
        self._map[_SLOTS[self._slot] + _STATE] = _SETTLED

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
