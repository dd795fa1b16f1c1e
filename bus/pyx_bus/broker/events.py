"""The broker's events: journal, acknowledge, deliver. No sockets.

*Publishing.* Events come in runs. A run is checked, written to the journal by one system call, acknowledged, and only then sent on: what
anybody has heard of is in the journal. Who gets an event depends on its topic alone for most subscriptions, so that it's looked up
once per topic and kept; neighbouring events with the same recipients go out as one slice of the run. Only for filters on fields is an
event decoded.

*Live and reading.* A subscription is live while its connection takes what it's sent. One that begins in the past, or whose queue is
full, reads from the journal instead, a piece at a time whenever its queue is empty, and is live again when it has reached the end.
So a slow reader costs a queue of ``MAX_EVENT_QUEUE`` and loses nothing, until retention passes it: then it's told which offsets it
won't see (GAP).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from copy import copy

import msgspec
from msgpack import packb

from .. import errors
from ..wire import (
    ACK,
    ERROR,
    GAP,
    HEADER_SIZE,
    MAX_BATCH,
    MAX_EVENT,
    PUBLISH,
    ProtocolError,
    Run,
    encode,
    encode_batch_head,
    frame_bounds,
)
from .journal import Cursor, Hole, Journal, JournalError, Record
from .peers import Peer
from .positions import Positions
from .roles import ROOT, owner_of
from .subscriptions import Recipients, Subscription, Subscriptions

# What waits for a subscriber that doesn't read, beyond what the kernel's socket buffer has; one batch more may be on top.
MAX_EVENT_QUEUE = 1 << 20
# Topics a publisher's recipients are remembered for. The contract has some dozens.
MAX_ROUTES = 4096
# Runs of a publisher of which the offsets are remembered: a service's answer tells the last event before it, which is mostly the last.
MAX_RECENT = 64
_JOIN_BELOW = 4096  # bytes: a small batch is copied behind its head to go out in one piece


class Actor(msgspec.Struct):
    """What every payload is a map with. Decoding it checks all of the payload for being msgpack."""

    id: str = ""
    time_ns: int = 0
    attributes: dict[str, str] = {}


_decode = msgspec.msgpack.Decoder(Actor).decode
_TOPIC_BYTES = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789_-.")

Bounds = list[tuple[int, int, int]]
# (who, from, to) of neighbouring events with the same recipients
Groups = list[tuple[Recipients, int, int]]


class Batch:
    """Events that were published in one go, on their way to subscribers: what several of them need is made once."""

    __slots__ = ("_actors", "_packed", "_slices", "data", "frames", "offset", "source", "time_ns")

    def __init__(self, source: bytes, data: bytes, frames: Bounds, offset: int, time_ns: int) -> None:
        self.source = source
        self.data = data
        self.frames = frames
        self.offset = offset
        self.time_ns = time_ns
        self._actors: dict[int, Actor] = {}
        self._slices: dict[tuple[int, int], bytes] = {}
        self._packed: dict[tuple[int, int, int], tuple[bytes, bytes]] = {}

    def actor(self, index: int) -> Actor:
        found = self._actors.get(index)
        if found is None:
            _, payload, end = self.frames[index]
            found = self._actors[index] = _decode(self.data[payload:end])
        return found

    def packed(self, subscription_id: int, begin: int, end: int) -> tuple[bytes, bytes]:
        """The EVENT frame for part of it, in one piece if it's small, else its head and a slice that all share."""
        key = (subscription_id, begin, end)
        pair = self._packed.get(key)
        if pair is None:
            chunk = self._slice(begin, end)
            head = encode_batch_head(
                self.source, subscription_id, end - begin, self.offset + begin, self.time_ns, len(chunk)
            )
            pair = self._packed[key] = (head + chunk, b"") if len(chunk) < _JOIN_BELOW else (head, chunk)
        return pair

    def _slice(self, begin: int, end: int) -> bytes:
        if end - begin == len(self.frames):
            return self.data
        chunk = self._slices.get((begin, end))
        if chunk is None:
            chunk = self._slices[begin, end] = self.data[self.frames[begin][0] : self.frames[end - 1][2]]
        return chunk


class Events:
    """``now_ns`` is the wall clock, ``monotonic_ns`` the one that heartbeats go by."""

    def __init__(
        self, journal: Journal, positions: Positions, now_ns: Callable[[], int], monotonic_ns: Callable[[], int]
    ) -> None:
        self.journal = journal
        self._now_ns = now_ns
        self._monotonic_ns = monotonic_ns
        self.subscriptions = Subscriptions(journal, positions, monotonic_ns)
        self._recent: dict[bytes, deque[tuple[int, int, int]]] = {}  # publisher → (first, last sequence, offset after)
        self.journal_error = ""  # why the last event couldn't be written
        self.published = 0
        self.duplicates = 0
        self.refused = 0
        self.gaps = 0
        self.events_lost = 0
        self.fell_behind = 0

    # --- publishing --------------------------------------------------------------------------------------------------

    def publish(self, peer: Peer, run: Run) -> None:
        """Take a run of events. A sequence number already seen from this publisher is only acknowledged."""
        if peer.refused_from:
            if run.first > peer.refused_from:
                return
            peer.refused_from = 0
        data, frames, first = run.body, run.frames, run.first
        if peer.publisher:
            if not first:
                raise ProtocolError("a publisher's sequence numbers begin at 1")
            last, _ = self.journal.published(peer.publisher)
            if first <= last:
                seen = min(last - first + 1, len(frames))
                self.duplicates += seen
                if seen == len(frames):
                    peer.send(encode(ACK, b"", b"", 0, 0, run.arg))
                    return
                data, frames, first = *_cut(data, frames, seen), first + seen
        begin = 0
        while begin < len(frames):
            groups, end, refusal = self._check(peer, data, frames, begin)
            if end > begin:
                whole = end - begin == len(frames)
                part, bounds = (data, frames) if whole else _cut(data, frames, begin, end)
                if not self._keep(peer, part, bounds, first + begin, groups):
                    return
                peer.send(encode(ACK, b"", b"", 0, 0, first + end - 1))
            if refusal is not None:
                self.refused += 1
                peer.send(encode(ERROR, b"", packb(errors.to_body(refusal)), 0, 0, first + end))
                self._remember(peer.publisher, first + end + 1, first + end)  # none of them has an offset
                end += 1
            begin = end

    def announce(self, topic: str, actor: str, attributes: dict[str, str]) -> None:
        """An event of the broker's own."""
        payload = packb({"id": actor, "time_ns": self._now_ns(), "attributes": attributes})
        data = encode(PUBLISH, topic.encode(), payload)
        frames = frame_bounds(data)
        tail = self.journal.tail()
        try:
            offset = self.journal.append(b"bus", b"", data, 1, 0, self._now_ns())
        except JournalError as error:
            self.journal_error = str(error)  # there's nobody to repeat it
            return
        self.journal_error = ""
        self._deliver(b"bus", data, frames, offset, [(self.subscriptions.find(topic, b"bus"), 0, 1)], tail)

    def _check(self, peer: Peer, data: bytes, frames: Bounds, begin: int) -> tuple[Groups, int, errors.BusError | None]:
        """Who gets the events from ``begin`` on, up to the first that can't be taken: (groups, where that is, why it can't)."""
        routes = self.subscriptions.routes.setdefault(peer.id, {})
        view = memoryview(data)
        groups: Groups = []
        current: Recipients | None = None
        since = index = begin
        refusal: errors.BusError | None = None
        try:
            for index in range(begin, len(frames)):
                start, payload, end = frames[index]
                topic = data[start + HEADER_SIZE : payload]
                recipients = routes.get(topic)
                if recipients is None:
                    recipients = self._route(peer, topic)
                if end - start > MAX_EVENT + HEADER_SIZE:
                    raise errors.InvalidArgument(f"event is larger than the limit of {MAX_EVENT} bytes")
                _decode(view[payload:end])
                if recipients is not current:
                    if current is not None:
                        groups.append((current, since - begin, index - begin))
                    current = recipients
                    since = index
            index = len(frames)
        except errors.BusError as error:
            # Without its traceback, which would hold this frame, and so the run, until the next collection.
            refusal = error.with_traceback(None)
        except (msgspec.DecodeError, RecursionError) as error:
            refusal = errors.InvalidArgument(f"payload of {topic!r} is no event: {error}")
        if current is not None:
            groups.append((current, since - begin, index - begin))
        return groups, index, refusal

    def _route(self, peer: Peer, route: bytes) -> Recipients:
        """Who gets events of this topic from this publisher. Raises ``InvalidArgument``, ``PermissionDenied``."""
        if not route or not _TOPIC_BYTES.issuperset(route) or b".." in route or route[0] == 46 or route[-1] == 46:
            raise errors.InvalidArgument(f"bad topic {route!r}")
        topic = route.decode()
        owner = owner_of(topic)
        if peer.may_be not in ("*", owner) or (owner == "bus" and peer.role != ROOT):
            raise errors.PermissionDenied(
                f'user {peer.uid} may not publish "{topic}"', hint=f"only the user of {owner} may"
            )
        routes = self.subscriptions.routes.setdefault(peer.id, {})
        if len(routes) >= MAX_ROUTES:
            routes.clear()
        found = routes[route] = self.subscriptions.find(topic, peer.source)
        return found

    def _keep(self, peer: Peer, data: bytes, frames: Bounds, first: int, groups: Groups) -> bool:
        """Write to the journal and deliver. False if it couldn't be written: the publisher is told to come again."""
        count = len(frames)
        tail = self.journal.tail()
        try:
            offset = self.journal.append(peer.source, peer.publisher, data, count, first + count - 1, self._now_ns())
        except JournalError as error:
            self.journal_error = str(error)
            peer.refused_from = first
            problem = errors.Unavailable(f"the event journal can't be written: {error}")
            peer.send(encode(ERROR, b"", packb(errors.to_body(problem)), 0, 0, first))
            return False
        self.journal_error = ""
        self.published += count
        self._remember(peer.publisher, first, first + count - 1)
        self._deliver(peer.source, data, frames, offset, groups, tail)
        return True

    def _remember(self, publisher: bytes, first: int, last: int) -> None:
        """That these, the latest of a publisher, are dealt with: what comes after them begins at the journal's end."""
        if publisher:
            recent = self._recent.get(publisher)
            if recent is None:
                recent = self._recent[publisher] = deque(maxlen=MAX_RECENT)
            recent.append((first, last, self.journal.next_offset))

    def offset_after(self, publisher: bytes, sequence: int) -> int:
        """The offset that follows a publisher's event; 0 if that isn't known."""
        for first, last, after in reversed(self._recent.get(publisher, ())):
            if first - 1 <= sequence <= last:
                return after - (last - sequence)
        last, after = self.journal.published(publisher)
        if sequence == last:
            return after or self.journal.next_offset
        return 0

    def forget_publisher(self, publisher: bytes) -> None:
        """Its connection is gone."""
        self._recent.pop(publisher, None)

    # --- delivering --------------------------------------------------------------------------------------------------

    def _deliver(self, source: bytes, data: bytes, frames: Bounds, offset: int, groups: Groups, tail: Cursor) -> None:
        batch = Batch(source, data, frames, offset, self.journal.last_time_ns)
        for (subscription, certain), begin, end in _by_recipient(groups):
            if subscription.cursor is not None:
                continue  # it will read this from the journal
            peer = subscription.peer
            if peer.queued_bytes > MAX_EVENT_QUEUE or peer.user_is_full:
                self.fell_behind += 1
                subscription.cursor = copy(tail)
                subscription.cursor.offset = offset + begin
                self.subscriptions.ready[subscription] = None  # its peer may take more at the end of this turn
                continue
            if certain:
                self._send(subscription, batch, begin, end)
            else:
                self._send_matching(subscription, batch, begin, end)

    def _send_matching(self, subscription: Subscription, batch: Batch, begin: int, end: int) -> None:
        """Send those of consecutive events that pass, in as few batches as that takes."""
        filter_ = subscription.filter
        since = -1
        verdicts: dict[bytes, bool | None] = {}
        name = batch.source.decode()
        for index in range(begin, end):
            start, payload, _ = batch.frames[index]
            route = batch.data[start + HEADER_SIZE : payload]
            if route not in verdicts:
                verdicts[route] = filter_.topic(route.decode(), name)
            passes = verdicts[route]
            if passes is None:
                actor = batch.actor(index)
                passes = filter_.holds(route.decode(), actor.id, actor.attributes)
            if passes and since < 0:
                since = index
            elif not passes and since >= 0:
                self._send(subscription, batch, since, index)
                since = -1
        if since >= 0:
            self._send(subscription, batch, since, end)

    def _send(self, subscription: Subscription, batch: Batch, begin: int, end: int) -> None:
        head, chunk = batch.packed(subscription.id, begin, end)
        subscription.peer.send(head)
        if chunk:
            subscription.peer.send(chunk)
        if subscription.heartbeat_ns:
            subscription.quiet_since_ns = self._monotonic_ns()

    # --- reading from the journal ------------------------------------------------------------------------------------

    def drained(self, peer: Peer) -> None:
        """The peer's queue is empty: what reads for it may go on."""
        for subscription in peer.subscriptions.values():
            if subscription.cursor is not None:
                self.subscriptions.ready[subscription] = None

    def read_on(self) -> None:
        """A piece of the journal for the one of ``ready`` whose turn it is. To be called until ``ready`` is empty."""
        subscription = next(iter(self.subscriptions.ready))
        del self.subscriptions.ready[subscription]
        cursor, peer = subscription.cursor, subscription.peer
        if cursor is None or peer.queued_bytes:
            return  # its time comes when it's drained
        if peer.user_is_full:
            self.subscriptions.wait_for_user(subscription)
            return
        # The next time another subscription of the same connection comes first.
        peer.subscriptions[subscription.id] = peer.subscriptions.pop(subscription.id)
        for item in self.journal.read(cursor, MAX_BATCH):
            if isinstance(item, Hole):
                self._tell_gap(subscription, item)
            else:
                self._send_record(subscription, item)
        if cursor.at_end:
            subscription.cursor = None
        else:
            self.subscriptions.ready[subscription] = None

    def _send_record(self, subscription: Subscription, record: Record) -> None:
        if subscription.filter.everything:
            frames: Bounds = [(0, 0, 0)] * record.count  # which nobody looks at
            batch = Batch(record.source, record.frames, frames, record.first_offset, record.time_ns)
            self._send(subscription, batch, 0, record.count)
            return
        frames = frame_bounds(record.frames)
        batch = Batch(record.source, record.frames, frames, record.first_offset, record.time_ns)
        self._send_matching(subscription, batch, 0, record.count)

    def _tell_gap(self, subscription: Subscription, hole: Hole) -> None:
        self.gaps += 1
        self.events_lost += hole.lost
        body = packb({"lost": hole.lost, "first_offset": hole.first_offset, "last_offset": hole.last_offset})
        subscription.peer.send(encode(GAP, b"", body, subscription.id, 0, hole.last_offset))

    def body(self) -> dict[str, object]:
        """The counters, as ``bus.stats`` tells them."""
        journal = self.journal
        behind = self.subscriptions.behind()
        return {
            "subscriptions": len(self.subscriptions),
            "events_total": self.published,
            "events_duplicate": self.duplicates,
            "events_refused": self.refused,
            "events_lost": self.events_lost,
            "gaps": self.gaps,
            "slow_readers": len(behind),
            "slow_readers_total": self.fell_behind,
            "most_behind": max((journal.next_offset - max(o, journal.oldest_offset) for o in behind), default=0),
            "journal_id": journal.id,
            "journal_error": self.journal_error,
            "journal_bytes": journal.size_bytes,
            "journal_segments": journal.segment_count,
            "oldest_offset": journal.oldest_offset,
            "next_offset": journal.next_offset,
        }


def _by_recipient(groups: Groups) -> list[tuple[tuple[Subscription, bool], int, int]]:
    """Who gets which stretches of the run; for each they're as long as they can be."""
    if len(groups) == 1:
        recipients, begin, end = groups[0]
        return [(recipient, begin, end) for recipient in recipients]
    found: dict[Subscription, list[tuple[tuple[Subscription, bool], int, int]]] = {}
    for recipients, begin, end in groups:
        for recipient in recipients:
            stretches = found.setdefault(recipient[0], [])
            if stretches and stretches[-1][0] == recipient and stretches[-1][2] == begin:
                stretches[-1] = (recipient, stretches[-1][1], end)
            else:
                stretches.append((recipient, begin, end))
    return [stretch for stretches in found.values() for stretch in stretches]


def _cut(data: bytes, frames: Bounds, begin: int, end: int | None = None) -> tuple[bytes, Bounds]:
    """Part of a run."""
    part = frames[begin:end]
    if not part:
        return b"", []
    base = part[0][0]
    return data[base : part[-1][2]], [(start - base, payload - base, stop - base) for start, payload, stop in part]
