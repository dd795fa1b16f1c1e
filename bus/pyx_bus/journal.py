"""The journal of events: offsets that only grow, and the latest events in memory.

Bounded by count and by bytes; what falls out of it is gone, and a reader that asks for it is told so. ``id`` names the journal:
offsets of two journals can't be compared.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

MAX_EVENTS = 65_536
MAX_BYTES = 32 << 20


class Journal:
    """``append`` is O(1); ``read`` starts at its offset without a search, as offsets have no holes."""

    def __init__(self, journal_id: str, *, max_events: int = MAX_EVENTS, max_bytes: int = MAX_BYTES) -> None:
        self.id = journal_id
        self.first_ever = 1
        self.next_offset = 1
        self._events: deque[tuple[int, bytes, bytes]] = deque()
        self._bytes = 0
        self._max_events = max_events
        self._max_bytes = max_bytes

    @property
    def oldest_offset(self) -> int:
        """The oldest event still here, or the next one's offset if there's none."""
        return self._events[0][0] if self._events else self.next_offset

    def append(self, topic: bytes, body: bytes) -> int:
        """Keep an event; its offset."""
        offset = self.next_offset
        self.next_offset += 1
        self._events.append((offset, topic, body))
        self._bytes += len(topic) + len(body)
        while self._events and (self._bytes > self._max_bytes or len(self._events) > self._max_events):
            _, old_topic, old_body = self._events.popleft()
            self._bytes -= len(old_topic) + len(old_body)
        return offset

    def read(self, since: int) -> Iterator[tuple[int, bytes, bytes]]:
        """(offset, topic, body) from ``since`` on; older ones that are gone are left out."""
        start = max(0, since - self.oldest_offset)
        return islice(self._events, start, None)
