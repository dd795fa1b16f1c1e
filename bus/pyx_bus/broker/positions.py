"""How far durable subscriptions have got: one small file for each, named by its user and its name. Every user has names of its own.

An acknowledged position is in the kernel when `Position.ack` returns: it survives the broker's being killed. A power cut may take it a
little back, so that events acknowledged just before come once more; never forward.

A file is 64 bytes, little endian, written in one go::

    magic 8 bytes · crc32 u32 of what follows · uid u32 · journal's identity 16 bytes · offset u64 · acked_ns u64 · 16 bytes 0
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from logging import getLogger
from pathlib import Path
from struct import Struct
from zlib import crc32

from ..errors import InvalidArgument, NotFound, ResourceExhausted, Unavailable
from .segment import synchronise, write_all

_log = getLogger(__name__)

# Each keeps a file and, while it's in use, a descriptor; and one user's mustn't use up what others may have.
MAX_OF_USER = 64
MAX_POSITIONS = 1024
MAX_NAME = 64

_FORM = Struct("<8sII16sQQ16x")
_REST = Struct("<I16sQQ16x")
_MAGIC = b"pyxposi1"
_FIRST = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
_FURTHER = _FIRST | frozenset("_.-")
_SUFFIX = ".position"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Position:
    """One durable subscription: ``offset`` is the first event it hasn't acknowledged, ``acked_ns`` when it last did."""

    __slots__ = ("_fd", "_positions", "acked_ns", "name", "offset", "uid")

    def __init__(self, positions: Positions, name: str, uid: int, offset: int, acked_ns: int) -> None:
        self._positions = positions
        self._fd = -1
        self.name = name
        self.uid = uid
        self.offset = offset
        self.acked_ns = acked_ns

    def ack(self, offset: int) -> None:
        """Everything up to and including ``offset`` is processed. An older one than is known changes nothing.

        Should the disk fail, the position is kept in memory, the failure logged, and the next one written all the same.
        """
        if offset < self.offset:
            return
        self.offset = offset + 1
        self.acked_ns = self._positions.now_ns()
        try:
            self._write()
        except OSError as e:
            _log.error("can't write the position of the durable subscription '%s': %s", self.name, e)

    def _write(self, flags: int = 0) -> None:
        if self._fd < 0:
            self._fd = os.open(self._positions.path(self.uid, self.name), os.O_WRONLY | os.O_CLOEXEC | flags, 0o600)
        rest = _REST.pack(self.uid, self._positions.journal_id, self.offset, self.acked_ns)
        write_all(self._fd, _MAGIC + crc32(rest).to_bytes(4, "little") + rest, 0)

    def close(self) -> None:
        """It isn't in use now; it stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Positions:
    """All there are. ``journal_id``: offsets of another journal mean nothing in this one."""

    def __init__(self, directory: Path, journal_id: str = "", *, now_ns: Callable[[], int] = time.time_ns) -> None:
        """Read what's in ``directory``, which is made if it isn't there. Raises ``OSError``."""
        self.now_ns = now_ns
        self.journal_id = journal_id.encode()[:16].ljust(16, b"\0")
        self._directory = directory
        self._all: dict[tuple[int, str], Position] = {}
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
        for path in directory.glob("*" + _SUFFIX):
            uid, _, name = path.name.removesuffix(_SUFFIX).partition(".")
            if uid.isdecimal() and is_valid_name(name):
                self._all[int(uid), name] = self._load(path, int(uid), name)

    def _load(self, path: Path, owner: int, name: str) -> Position:
        data = path.read_bytes()
        if len(data) == _FORM.size:
            magic, crc, uid, journal_id, offset, acked_ns = _FORM.unpack(data)
            if magic == _MAGIC and crc == crc32(data[_FORM.size - _REST.size :]) and uid == owner:
                if journal_id != self.journal_id:  # all there is in this journal came after what it saw
                    offset = 0
                return Position(self, name, uid, offset, acked_ns)
        _log.error(
            'the position of the durable subscription "%s" of user %d is damaged: it begins at the oldest event',
            name,
            owner,
        )
        return Position(self, name, owner, 0, 0)

    def path(self, uid: int, name: str) -> Path:
        return self._directory / f"{uid}.{name}{_SUFFIX}"

    def open(self, name: str, uid: int, start_offset: int) -> Position:
        """The position of that name; a new one is at ``start_offset``.

        A new one is on the disk when this returns: after a power cut it mustn't begin later than now. Raises ``InvalidArgument`` (name),
        ``ResourceExhausted`` (too many, or no room on the disk), ``Unavailable`` (the disk failed).
        """
        if not is_valid_name(name):
            raise InvalidArgument(
                f"'{name[:100]}' can't name a durable subscription",
                hint=f"letters, digits and _.- after the first, {MAX_NAME} at most",
            )
        position = self._all.get((uid, name))
        if position is not None:
            return position
        if len(self._all) >= MAX_POSITIONS or sum(owner == uid for owner, _ in self._all) >= MAX_OF_USER:
            raise ResourceExhausted(
                f"too many durable subscriptions: {MAX_OF_USER} of a user, {MAX_POSITIONS} in all",
                hint="remove one that isn't used",
            )
        position = Position(self, name, uid, start_offset, self.now_ns())
        try:
            position._write(os.O_CREAT | os.O_TRUNC)
            os.fsync(position._fd)
            synchronise(self._directory)
        except OSError as e:
            position.close()
            self.path(uid, name).unlink(missing_ok=True)
            reason = f"can't write the position of the durable subscription '{name}': {(e.strerror or str(e)).lower()}"
            raise (ResourceExhausted if e.errno in _FULL else Unavailable)(reason) from e
        self._all[uid, name] = position
        return position

    def get(self, uid: int, name: str) -> Position | None:
        return self._all.get((uid, name))

    def list(self) -> list[Position]:
        """All of them, by user and name."""
        return [self._all[key] for key in sorted(self._all)]

    def remove(self, uid: int, name: str) -> None:
        """Raises ``NotFound``, ``OSError``."""
        position = self._all.get((uid, name))
        if position is None:
            raise NotFound(f"no durable subscription '{name[:100]}'")
        self.path(uid, name).unlink(missing_ok=True)
        position.close()
        del self._all[uid, name]

    def close(self) -> None:
        for position in self._all.values():
            position.close()


def is_valid_name(name: str) -> bool:
    """Letters, digits and ``_.-``, the first a letter or digit, 64 at most: a file's name that can't lead anywhere else."""
    return 0 < len(name) <= MAX_NAME and name[0] in _FIRST and _FURTHER.issuperset(name)
