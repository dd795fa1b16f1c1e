"""What a log driver is.

logd calls a driver from its event loop, one call at a time for one container. A driver that sends over a network keeps a bounded
queue: `write` puts chunks in and returns at once, `wait_ready` is where it holds the container's output back (or, in Docker's
``mode=non-blocking``, never does and counts what it drops).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..model import Chunk
from ..window import Mark

Trouble = Callable[[str, OSError, int], None]
"""Told when something fails: what was tried, why it failed, and how many bytes of records were lost by it (0: none). The container goes
on."""


@dataclass(slots=True)
class Segment:
    """An open file of stored records; whoever got it closes ``fd``. ``size_bytes`` is how much of it is whole records now."""

    fd: int
    size_bytes: int


class Driver(Protocol):
    """One container's log. Constructed with (directory, options, trouble): checks the options (invalid_argument) and touches nothing.

    Guarantees: `write` never raises for a full disk or a lost peer, it tells ``trouble`` and drops the chunks; chunks written before
    `close` are stored or sent before it returns.
    """

    path: str
    """The local file, empty if there's none."""
    readable: bool
    """Whether `segments` has what was written."""

    def open(self) -> None:
        """Be ready to write. Idempotent."""
        ...

    def write(self, chunks: Sequence[Chunk]) -> None:
        """Take chunks, in the order read."""
        ...

    async def wait_ready(self) -> None:
        """Return when there's room for more; at once if there is."""
        ...

    def mark(self) -> Mark:
        """Where the next write goes."""
        ...

    def rewind(self, mark: Mark) -> None:
        """Forget what was written since ``mark``, a kill -9 ago. A driver that can't (a network) does nothing: twice beats never."""
        ...

    def segments(self) -> list[Segment]:
        """What's stored, oldest first, the one being written last."""
        ...

    def on_rotate(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call ``listener`` whenever a new file was begun, until the returned function is called."""
        ...

    async def aclose(self) -> None:
        """Everything is stored or sent, or given up. Idempotent."""
        ...
