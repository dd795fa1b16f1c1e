"""Who wants which events, and from where: subscriptions, durable ones and their positions, heartbeats. No sockets.

``Events`` delivers; this is the book it looks into.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeGuard

from msgpack import packb, unpackb

from .. import errors
from ..filters import Filter, parse
from ..wire import HEARTBEAT, RESULT, Frame, ProtocolError, encode
from .journal import Cursor, Journal
from .peers import Peer
from .positions import Position, Positions

MAX_SUBSCRIPTIONS_PER_PEER = 64
# Of frames the broker decodes itself: a byte of msgpack can become an object of 64.
MAX_OWN_BODY = 64 << 10
MIN_HEARTBEAT_MS = 100
MAX_HEARTBEAT_MS = 24 * 3600 * 1000

# (subscription, whether it's certain without a look at the payload)
Recipients = tuple[tuple["Subscription", bool], ...]


class Subscription:
    """``cursor`` is None while it's live. ``position`` keeps a durable one's place."""

    __slots__ = ("cursor", "filter", "heartbeat_ns", "id", "peer", "position", "quiet_since_ns")

    def __init__(self, peer: Peer, id_: int, filter_: Filter, heartbeat_ms: int) -> None:
        self.peer = peer
        self.id = id_
        self.filter = filter_
        self.heartbeat_ns = heartbeat_ms * 1_000_000
        self.quiet_since_ns = 0
        self.cursor: Cursor | None = None
        self.position: Position | None = None


class Subscriptions:
    """All of them. ``routes`` remembers by publisher's connection who gets a topic's events, as long as the set stays the same.

    ``ready`` are the reading ones that may go on, in turn.
    """

    def __init__(self, journal: Journal, positions: Positions, monotonic_ns: Callable[[], int]) -> None:
        self.journal = journal
        self.positions = positions
        self.routes: dict[int, dict[bytes, Recipients]] = {}
        self.ready: dict[Subscription, None] = {}
        self._monotonic_ns = monotonic_ns
        self._all: dict[tuple[int, int], Subscription] = {}
        self._same: dict[Recipients, Recipients] = {}  # so that topics with equal recipients have the same object
        self._durable: dict[tuple[int, str], Subscription] = {}
        self._beating: set[Subscription] = set()
        # By user: they would go on, but their user's connections hold too much.
        self._starved: dict[int, dict[Subscription, None]] = {}

    def __len__(self) -> int:
        return len(self._all)

    @property
    def beating(self) -> bool:
        """Somebody wants heartbeats."""
        return bool(self._beating)

    def wait_for_user(self, subscription: Subscription) -> None:
        """Until some connection of its user has taken what it was sent, or is gone."""
        self._starved.setdefault(subscription.peer.uid, {})[subscription] = None

    def user_has_room(self, uid: int) -> None:
        if uid in self._starved:
            self.ready.update(self._starved.pop(uid))

    def behind(self) -> list[int]:
        """The offsets the reading ones are at."""
        return [s.cursor.offset for s in self._all.values() if s.cursor is not None]

    def find(self, topic: str, source: bytes) -> Recipients:
        """Who gets events of a topic and source."""
        found = []
        name = source.decode()
        for subscription in self._all.values():
            passes = subscription.filter.topic(topic, name)
            if passes is not False:
                found.append((subscription, passes is True))
        recipients = tuple(found)
        return self._same.setdefault(recipients, recipients)

    def subscribe(self, peer: Peer, frame: Frame) -> None:
        """Answers with RESULT; raises ``BusError``s of what is wrong with the request, ``ProtocolError``."""
        body = unpack_map(frame)
        filter_ = parse(body.get("patterns"), body.get("filters"))
        since, since_ns, heartbeat_ms, name = _options(body)
        if since is not None and since > self.journal.next_offset:
            raise errors.InvalidArgument(
                f"offset {since} is beyond the journal's end, {self.journal.next_offset}",
                hint="is it another journal's?",
            )
        if not frame.peer or frame.peer in peer.subscriptions:
            raise errors.AlreadyExists(f"subscription {frame.peer} is 0 or in use")
        if (
            len(peer.subscriptions) >= MAX_SUBSCRIPTIONS_PER_PEER
            or peer.user.subscriptions >= peer.user.max_subscriptions
        ):
            raise errors.ResourceExhausted(
                f"more than {MAX_SUBSCRIPTIONS_PER_PEER} subscriptions of a connection or {peer.user.max_subscriptions} of a user"
            )
        if peer.user.wishes + filter_.size > peer.user.max_wishes and not peer.trusted:
            raise errors.ResourceExhausted(f"more than {peer.user.max_wishes} patterns and values of filters of a user")
        subscription = Subscription(peer, frame.peer, filter_, heartbeat_ms)
        start = self.journal.next_offset if since is None else since
        if name:
            if since_ns is not None and self.positions.get(peer.uid, name) is None:
                raise errors.InvalidArgument(
                    f'the new durable subscription "{name}" can\'t begin at a time, but at an offset'
                )
            start, since_ns = self._open_durable(subscription, name, start), None
        self._add(subscription)
        if since_ns is not None:
            subscription.cursor = self.journal.seek_time(since_ns)
            start = 0  # not known before it's read
        elif start != self.journal.next_offset:
            subscription.cursor = self.journal.seek(start)
        if subscription.cursor is not None:
            self.ready[subscription] = None
        peer.send(encode(RESULT, b"", packb({"next_offset": start, "bus": self.journal.id}), 0, frame.serial))

    def _open_durable(self, subscription: Subscription, name: str, start: int) -> int:
        uid = subscription.peer.uid
        if (uid, name) in self._durable:
            holder = self._durable[uid, name].peer
            raise errors.Conflict(f'the durable subscription "{name}" is in use by process {holder.pid}')
        position = self.positions.open(name, uid, start or self.journal.oldest_offset)
        subscription.position = position
        self._durable[uid, name] = subscription
        return min(position.offset, self.journal.next_offset)

    def _add(self, subscription: Subscription) -> None:
        peer = subscription.peer
        peer.subscriptions[subscription.id] = subscription
        peer.user.subscriptions += 1
        peer.user.wishes += subscription.filter.size
        self._all[peer.id, subscription.id] = subscription
        self._changed()
        if subscription.heartbeat_ns:
            subscription.quiet_since_ns = self._monotonic_ns()
            self._beating.add(subscription)

    def _changed(self) -> None:
        self.routes.clear()
        self._same.clear()

    def unsubscribe(self, peer: Peer, subscription_id: int) -> None:
        """No more for this one. Unknown IDs are ignored: a client may have given up before it was told of a failure."""
        subscription = peer.subscriptions.pop(subscription_id, None)
        if subscription is None:
            return
        peer.user.subscriptions -= 1
        peer.user.wishes -= subscription.filter.size
        del self._all[peer.id, subscription_id]
        self._changed()
        self._beating.discard(subscription)
        self.ready.pop(subscription, None)
        self._starved.get(peer.uid, {}).pop(subscription, None)
        if subscription.position is not None:
            del self._durable[peer.uid, subscription.position.name]
            subscription.position.close()

    def acknowledge(self, peer: Peer, frame: Frame) -> None:
        """A durable subscriber is done with everything up to an offset."""
        subscription = peer.subscriptions.get(frame.peer)
        if subscription is None:
            return  # just ended
        if subscription.position is None or frame.arg >= self.journal.next_offset:
            raise ProtocolError(f"{frame!r} acknowledges what it wasn't sent, or isn't durable")
        subscription.position.ack(frame.arg)

    def forget(self, uid: int, name: str) -> None:
        """Remove a user's durable subscription. Raises ``Conflict`` while it's in use, ``NotFound``."""
        if (uid, name) in self._durable:
            raise errors.Conflict(
                f'the durable subscription "{name}" is in use by process {self._durable[uid, name].peer.pid}'
            )
        self.positions.remove(uid, name)

    def beat(self) -> int:
        """Send the heartbeats that are due. Until the next one in ns; 0 if nobody wants any."""
        if not self._beating:
            return 0
        now = self._monotonic_ns()
        wait = 1 << 62
        for subscription in self._beating:
            left = subscription.quiet_since_ns + subscription.heartbeat_ns - now
            if left <= 0:
                if subscription.cursor is None and not subscription.peer.queued_bytes:
                    subscription.peer.send(encode(HEARTBEAT, b"", b"", subscription.id, 0, self.journal.next_offset))
                subscription.quiet_since_ns = now
                left = subscription.heartbeat_ns
            wait = min(wait, left)
        return wait

    def durables(self, uid: int | None) -> list[dict[str, object]]:
        """A user's durable subscriptions, or everybody's, for ``bus.durables``."""
        found: list[dict[str, object]] = []
        for position in self.positions.list():
            if uid is None or position.uid == uid:
                holder = self._durable.get((position.uid, position.name))
                found.append(
                    {
                        "name": position.name,
                        "uid": position.uid,
                        "offset": position.offset,
                        "acked_ns": position.acked_ns,
                        "pid": holder.peer.pid if holder is not None else 0,
                    }
                )
        return found


def _options(body: dict[str, object]) -> tuple[int | None, int | None, int, str]:
    """(since as an offset, 0 for the beginning; since_ns; heartbeat_ms; the durable name or "") of a SUBSCRIBE.

    Raises ``InvalidArgument``.
    """
    since, since_ns = body.get("since"), body.get("since_ns")
    name, heartbeat_ms = body.get("durable") or "", body.get("heartbeat_ms") or 0
    if since == "beginning":
        since = 0
    if not (since is None or _is_offset(since)) or not (since_ns is None or _is_offset(since_ns)):
        raise errors.InvalidArgument(
            f'since must be an offset, "beginning" or null, not {since!r}; since_ns a time in ns'
        )
    if not _is_offset(heartbeat_ms) or not (heartbeat_ms == 0 or MIN_HEARTBEAT_MS <= heartbeat_ms <= MAX_HEARTBEAT_MS):
        raise errors.InvalidArgument(
            f"heartbeat_ms must be {MIN_HEARTBEAT_MS} to {MAX_HEARTBEAT_MS}, not {heartbeat_ms!r}"
        )
    if not isinstance(name, str):
        raise errors.InvalidArgument(f"a durable subscription's name is a text, not {name!r}")
    return since, since_ns, heartbeat_ms, name


def _is_offset(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def unpack_map(frame: Frame) -> dict[str, object]:
    """A frame's body as a map. Raises ``ProtocolError``."""
    if len(frame.body) > MAX_OWN_BODY:
        raise ProtocolError(f"{frame!r} is larger than the {MAX_OWN_BODY} bytes the broker takes for itself")
    try:
        value = unpackb(frame.body) if frame.body else {}
    except Exception as error:  # msgpack raises its own, ValueError and UnicodeDecodeError
        raise ProtocolError(f"{frame!r} is not msgpack: {error}") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"{frame!r} holds no map")
    return value
