"""Publishing, without I/O: events are kept until the broker has acknowledged them, and published again when it asks or comes back.

A window bounds what is under way, so that a publisher faster than the broker fills neither the socket's queue nor this process:
what is beyond the window waits here, and what is beyond the bounds is dropped and counted.

With a ``Spool`` they're also in a file, before they're sent, for whoever comes after this process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING

from ..wire import PUBLISH, encode

if TYPE_CHECKING:
    from .spool import Spool

# Events not yet acknowledged. At about 300 bytes each this is 20 MB, some hours of a busy host without its broker; the second bound
# is for large ones.
MAX_UNACKNOWLEDGED = 65_536
MAX_UNACKNOWLEDGED_BYTES = 32 << 20
# Under way to the broker at a time: some rounds of its loop.
WINDOW_BYTES = 4 << 20

# After a refusal for the time being (the journal's disk is full).
FIRST_PAUSE_S = 0.2
LAST_PAUSE_S = 5.0


class Publisher:
    """``send`` writes a frame to the current connection. ``sequence`` is the last event's number, 0 before the first."""

    def __init__(self, send: Callable[[bytes], None], spool: Spool | None = None) -> None:
        self._send = send
        self._spool = spool
        self.sequence = 0
        self.dropped = 0
        self.refused = 0
        self._sent: deque[tuple[int, bytes]] = deque()
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._sent_bytes = 0
        self._kept_bytes = 0
        self._connected = False
        self._paused = False
        self._pause_s = 0.0

    def __len__(self) -> int:
        """Events not yet acknowledged."""
        return len(self._sent) + len(self._waiting)

    @property
    def oldest(self) -> int:
        """The sequence number of the oldest event not yet acknowledged; the next one's if there's none."""
        for events in (self._sent, self._waiting):
            if events:
                return events[0][0]
        return self.sequence + 1

    def restore(self, events: list[tuple[int, bytes]]) -> None:
        """Before anything is published: (sequence number, frame) of what a predecessor left."""
        self._waiting.extend(events)
        self._kept_bytes += sum(len(data) for _, data in events)
        if events:
            self.sequence = events[-1][0]

    def publish(self, topic: bytes, body: bytes) -> None:
        self.sequence += 1
        data = encode(PUBLISH, topic, body, 0, 0, self.sequence)
        self._kept_bytes += len(data)
        if self._spool is not None and not self._spool.append(self.sequence, data, self._kept_bytes):
            others = (frame for _, frame in chain(self._sent, self._waiting))
            oldest = self.oldest if len(self) else self.sequence
            self._spool.rewrite(chain(others, (data,)), oldest - 1, self.sequence)
        if self._connected and not self._paused and not self._waiting and self._sent_bytes < WINDOW_BYTES:
            self._sent_bytes += len(data)
            self._sent.append((self.sequence, data))
            self._send(data)
        else:
            self._waiting.append((self.sequence, data))
        while self._waiting and (len(self) > MAX_UNACKNOWLEDGED or self._kept_bytes > MAX_UNACKNOWLEDGED_BYTES):
            # The oldest of those that aren't under way (which are a fraction of the bounds): what is has probably arrived.
            self._kept_bytes -= len(self._waiting.popleft()[1])
            self.dropped += 1

    def connected(self) -> None:
        """A new connection: everything unacknowledged goes over it."""
        self._again()
        self._connected, self._paused, self._pause_s = True, False, 0.0
        self._fill()

    def disconnected(self) -> None:
        self._connected = False

    def acknowledged(self, sequence: int) -> None:
        while self._sent and self._sent[0][0] <= sequence:
            size = len(self._sent.popleft()[1])
            self._sent_bytes -= size
            self._kept_bytes -= size
            self._pause_s = 0.0
        self._settled()
        if self._waiting:
            self._fill()

    def _settled(self) -> None:
        if self._spool is not None:
            self._spool.settled(self.oldest - 1)

    def refuse(self, sequence: int) -> None:
        """The broker will never take this event."""
        for index, (number, data) in enumerate(self._sent):  # one of the first: those before it have been answered
            if number == sequence:
                del self._sent[index]
                self._sent_bytes -= len(data)
                self._kept_bytes -= len(data)
                self.refused += 1
                self._settled()
                break
        self._fill()

    def pause(self, sequence: int) -> float | None:
        """The broker can't take this event now, and ignores what comes after it. Call ``resume`` after that many seconds.

        None: it's paused already, or this is news from before that.
        """
        if self._paused or not self._sent or not self._sent[0][0] <= sequence <= self._sent[-1][0]:
            return None
        self._paused = True
        self._pause_s = min(LAST_PAUSE_S, self._pause_s * 2) or FIRST_PAUSE_S
        return self._pause_s

    def resume(self) -> None:
        """The pause is over. (Another connection may have ended it already.)"""
        if self._paused:
            self._paused = False
            self._again()
            self._fill()

    def _again(self) -> None:
        while self._sent:
            self._waiting.appendleft(self._sent.pop())
        self._sent_bytes = 0

    def _fill(self) -> None:
        while self._connected and not self._paused and self._waiting and self._sent_bytes < WINDOW_BYTES:
            entry = self._waiting.popleft()
            self._sent_bytes += len(entry[1])
            self._sent.append(entry)
            self._send(entry[1])
