"""The broker's decisions, without I/O: who gets a frame, what happens when a peer comes, goes, or sends nonsense.

The router never decodes the body of a call or an answer; an event, which it keeps, it only checks for being a map. Connections are
``Peer`` objects; frames for one are handed to its ``send``, and the I/O side flushes them afterwards.

Answers are matched to calls: a service can only answer what it was asked, under the caller's connection and serial number. When
a caller leaves, its calls are cancelled at the services; when a service leaves, its callers get ``unavailable``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from msgpack import packb, unpackb

from . import __version__, errors
from .journal import Journal
from .wire import (
    ACK,
    CALL,
    CANCEL,
    CREDIT,
    ERROR,
    EVENT,
    GAP,
    HELLO,
    ITEM,
    MAX_EVENT,
    MAX_FRAME,
    PING,
    PONG,
    PROTOCOL_VERSION,
    PUBLISH,
    REGISTER,
    RESULT,
    SUBSCRIBE,
    UNSUBSCRIBE,
    WELCOME,
    Frame,
    ProtocolError,
    encode,
    topic_matches,
)

# What waits for a peer that doesn't read. Beyond it a subscriber loses events (and is told how many), a service gets no more calls,
# and a caller that doesn't take its answers is disconnected.
MAX_QUEUED_BYTES = 8 << 20
MAX_CALLS_PER_PEER = 4096
MAX_SUBSCRIPTIONS_PER_PEER = 64
MAX_PATTERNS = 64


class Peer(ABC):
    """One connection as the router sees it. ``uid``, ``gid`` and ``pid`` are the kernel's word (SO_PEERCRED)."""

    __slots__ = ("calls", "gid", "id", "incoming", "lost", "name", "pid", "publisher", "service", "subscriptions", "uid")

    def __init__(self, uid: int, gid: int, pid: int) -> None:
        self.uid = uid
        self.gid = gid
        self.pid = pid
        self.id = 0
        self.name = ""
        self.publisher = ""
        self.service = ""
        self.calls: dict[int, Peer] = {}  # my open calls: serial → the service that has it
        self.incoming: set[tuple[int, int]] = set()  # calls I have as a service: (caller's ID, serial)
        self.subscriptions: dict[int, list[str]] = {}
        self.lost: dict[int, tuple[int, int, int]] = {}  # subscription → (count, first, last) not delivered

    @abstractmethod
    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        """Queue bytes for this peer; ``fds`` are closed once they're sent."""

    @property
    @abstractmethod
    def queued_bytes(self) -> int:
        """What the peer hasn't taken yet."""

    @abstractmethod
    def disconnect(self, reason: str) -> None:
        """End the connection."""


class Service:
    """A registered name."""

    __slots__ = ("peer", "since_ns", "version")

    def __init__(self, peer: Peer, since_ns: int, version: str) -> None:
        self.peer = peer
        self.since_ns = since_ns
        self.version = version


class Router:
    """``now_ns`` is the wall clock; ``journal`` keeps the events and hands out their offsets."""

    def __init__(self, journal: Journal, now_ns: Callable[[], int]) -> None:
        self.journal = journal
        self.now_ns = now_ns
        self.peers: dict[int, Peer] = {}
        self.services: dict[str, Service] = {}
        self._service_keys: dict[bytes, Peer] = {}
        self._next_id = 0
        self._published: dict[str, int] = {}
        self.calls_total = 0
        self.events_dropped = 0
        self.refused = 0
        self.protocol_errors = 0

    def add(self, peer: Peer) -> None:
        self._next_id += 1
        peer.id = self._next_id
        self.peers[peer.id] = peer

    def drop(self, peer: Peer) -> None:
        """The connection is gone: free its name, fail its callers, cancel its calls."""
        if self.peers.pop(peer.id, None) is None:
            return
        if peer.service:
            self._unregister(peer)
        for caller_id, serial in peer.incoming:
            caller = self.peers.get(caller_id)
            if caller is not None and caller.calls.pop(serial, None) is peer:
                self._error(caller, serial, errors.Unavailable(f"{peer.service} went away during the call"))
        for serial, service in peer.calls.items():
            service.incoming.discard((peer.id, serial))
            service.send(encode(CANCEL, b"", b"", peer.id, serial))

    def receive(self, peer: Peer, frame: Frame) -> None:
        """Handle one frame. Takes the frame's descriptors over. Raises ``ProtocolError``: the peer is to be disconnected."""
        kind = frame.kind
        if not peer.name and kind != HELLO:
            raise ProtocolError(f"expected HELLO, got {frame!r}")
        if frame.fds and kind not in (CALL, RESULT, ITEM):
            raise ProtocolError(f"{frame!r} can't carry descriptors")
        if peer.queued_bytes > 2 * MAX_QUEUED_BYTES:  # what others send it stops at half of that: it's its own doing
            raise ProtocolError("it goes on asking and doesn't read the answers")
        if kind == CALL:
            self._call(peer, frame)
        elif kind in (RESULT, ERROR, ITEM):
            self._answer(peer, frame)
        elif kind == PUBLISH:
            self._publish(peer, frame)
        elif kind in (CANCEL, CREDIT):
            self._pass_on(peer, frame)
        elif kind == SUBSCRIBE:
            self._subscribe(peer, frame)
        elif kind == UNSUBSCRIBE:
            peer.subscriptions.pop(frame.peer, None)
            peer.lost.pop(frame.peer, None)
        elif kind == REGISTER:
            self._register(peer, frame)
        elif kind == HELLO:
            self._hello(peer, frame)
        elif kind == PING:
            peer.send(encode(PONG, b"", b"", 0, frame.serial))
        elif kind != PONG:
            raise ProtocolError(f"unexpected {frame!r}")

    # --- connections -------------------------------------------------------------------------------------------------

    def _hello(self, peer: Peer, frame: Frame) -> None:
        body = _map(frame)
        newest, oldest = body.get("version"), body.get("oldest", body.get("version"))
        if not isinstance(newest, int) or not isinstance(oldest, int) or peer.name:
            raise ProtocolError("bad HELLO")
        if not oldest <= PROTOCOL_VERSION <= newest:
            raise ProtocolError(f"no common protocol version: you speak {oldest} to {newest}, this broker {PROTOCOL_VERSION}")
        peer.name = str(body.get("name") or "client")[:64]
        peer.publisher = str(body.get("publisher") or "")[:64]
        welcome = {
            "version": PROTOCOL_VERSION,
            "connection": peer.id,
            "bus": self.journal.id,
            "next_offset": self.journal.next_offset,
            "max_frame": MAX_FRAME,
            "software": f"pyx/{__version__}",
        }
        peer.send(encode(WELCOME, b"", packb(welcome)))

    def _register(self, peer: Peer, frame: Frame) -> None:
        name = frame.route.decode("ascii", "replace")
        if not name.isalnum() or name == "bus" or peer.service:
            return self._error(peer, frame.serial, errors.InvalidArgument(f'cannot register the name "{name}"'))
        if name in self.services:
            holder = self.services[name].peer
            return self._error(
                peer, frame.serial, errors.AlreadyExists(f'"{name}" is already registered by process {holder.pid}')
            )
        peer.service = name
        self.services[name] = Service(peer, self.now_ns(), __version__)
        self._service_keys[frame.route] = peer
        peer.send(encode(RESULT, b"", packb({}), 0, frame.serial))
        self.announce("service.up", name, {"pid": str(peer.pid)})
        return None

    def _unregister(self, peer: Peer) -> None:
        del self.services[peer.service]
        del self._service_keys[peer.service.encode()]
        self.announce("service.down", peer.service, {"pid": str(peer.pid)})

    # --- calls -------------------------------------------------------------------------------------------------------

    def _call(self, peer: Peer, frame: Frame) -> None:
        serial = frame.serial
        if not serial or serial in peer.calls:
            raise ProtocolError(f"call with serial {serial}, which is 0 or in use")
        name, _, _ = frame.route.partition(b".")
        service = self._service_keys.get(name)
        failure: errors.BusError | None = None
        if service is None:
            if name == b"bus":
                return self._own_method(peer, frame)
            failure = errors.Unavailable(
                f'no service "{name.decode(errors="replace")}" on the bus',
                hint="it may be starting or have failed: pyx system info",
            )
        elif len(peer.calls) >= MAX_CALLS_PER_PEER:
            failure = errors.ResourceExhausted(f"more than {MAX_CALLS_PER_PEER} calls open on one connection")
        elif service.queued_bytes > MAX_QUEUED_BYTES:
            failure = errors.ResourceExhausted(f"{service.service} doesn't keep up with its calls")
        if failure is not None:
            _close(frame.fds)
            return self._error(peer, serial, failure)
        assert service is not None
        self.calls_total += 1
        peer.calls[serial] = service
        service.incoming.add((peer.id, serial))
        arg = (frame.arg & 0xFFFFFFFF) | peer.uid << 32
        service.send(encode(CALL, frame.route, frame.body, peer.id, serial, arg, len(frame.fds)), frame.fds)
        return None

    def _answer(self, service: Peer, frame: Frame) -> None:
        caller = self.peers.get(frame.peer)
        key = (frame.peer, frame.serial)
        if caller is None or key not in service.incoming:  # cancelled or gone meanwhile
            return _close(frame.fds)
        if frame.kind != ITEM:
            service.incoming.discard(key)
            del caller.calls[frame.serial]
        if caller.queued_bytes > MAX_QUEUED_BYTES:
            _close(frame.fds)
            return caller.disconnect("it doesn't read its answers")
        caller.send(encode(frame.kind, b"", frame.body, 0, frame.serial, frame.arg, len(frame.fds)), frame.fds)
        return None

    def _pass_on(self, peer: Peer, frame: Frame) -> None:
        """CANCEL and CREDIT go to the service that has the call."""
        service = peer.calls.get(frame.serial)
        if service is None:
            return
        if frame.kind == CANCEL:
            del peer.calls[frame.serial]
            service.incoming.discard((peer.id, frame.serial))
        elif service.queued_bytes > 2 * MAX_QUEUED_BYTES:
            raise ProtocolError(f"{service.service} doesn't read, and the caller goes on giving it credit")
        service.send(encode(frame.kind, b"", b"", peer.id, frame.serial, frame.arg))

    def _error(self, peer: Peer, serial: int, error: errors.BusError) -> None:
        peer.send(encode(ERROR, b"", packb(errors.to_body(error)), 0, serial))

    def _own_method(self, peer: Peer, frame: Frame) -> None:
        _close(frame.fds)
        if frame.route == b"bus.services":
            body: dict[str, object] = {
                "services": [
                    {
                        "name": name,
                        "pid": s.peer.pid,
                        "uid": s.peer.uid,
                        "since_ns": s.since_ns,
                        "version": s.version,
                    }
                    for name, s in sorted(self.services.items())
                ]
            }
        elif frame.route == b"bus.stats":
            body = {
                "connections": len(self.peers),
                "calls_in_flight": sum(len(p.calls) for p in self.peers.values()),
                "calls_total": self.calls_total,
                "events_total": self.journal.next_offset - self.journal.first_ever,
                "events_dropped": self.events_dropped,
                "refused": self.refused,
                "protocol_errors": self.protocol_errors,
            }
        else:
            method = frame.route.decode(errors="replace")
            return self._error(peer, frame.serial, errors.Unimplemented(f'no method "{method}"'))
        peer.send(encode(RESULT, b"", packb(body), 0, frame.serial))
        return None

    # --- events ------------------------------------------------------------------------------------------------------

    def _publish(self, peer: Peer, frame: Frame) -> None:
        """Journal, acknowledge, deliver. A sequence number already seen from this publisher is only acknowledged."""
        if len(frame.route) + len(frame.body) > MAX_EVENT:  # in the journal it would end every subscriber's connection
            raise ProtocolError(f"event of {len(frame.body)} bytes is larger than the limit of {MAX_EVENT}")
        _map(frame)  # nor anything that a subscriber couldn't read
        if peer.publisher:
            if frame.arg <= self._published.get(peer.publisher, 0):
                peer.send(encode(ACK, b"", b"", 0, 0, frame.arg))
                return
            self._published[peer.publisher] = frame.arg
        topic = frame.route.decode("utf-8", "replace")
        self._append(topic, frame.route, peer.service or peer.name, frame.body)
        peer.send(encode(ACK, b"", b"", 0, 0, frame.arg))

    def announce(self, topic: str, actor: str, attributes: dict[str, str]) -> None:
        """An event of the broker's own."""
        payload = packb({"id": actor, "time_ns": self.now_ns(), "attributes": attributes})
        self._append(topic, topic.encode(), "bus", payload)

    def _append(self, topic: str, route: bytes, source: str, payload: bytes) -> None:
        body = b"\x93" + packb(source) + packb(self.now_ns()) + payload
        offset = self.journal.append(route, body)
        frames: dict[int, bytes] = {}  # one encoding for all who use the same subscription ID
        for peer in self.peers.values():
            for subscription, patterns in peer.subscriptions.items():
                if any(topic_matches(pattern, topic) for pattern in patterns):
                    data = frames.get(subscription)
                    if data is None:
                        data = frames[subscription] = encode(EVENT, route, body, subscription, 0, offset)
                    self._deliver(peer, subscription, offset, data)

    def _deliver(self, peer: Peer, subscription: int, offset: int, data: bytes) -> None:
        lost = peer.lost.get(subscription)
        if peer.queued_bytes > MAX_QUEUED_BYTES // (1 if lost is None else 2):
            self.events_dropped += 1
            count, first, _ = lost or (0, offset, offset)
            peer.lost[subscription] = (count + 1, first, offset)
            return
        if lost is not None:
            self._tell_gap(peer, subscription)
        peer.send(data)

    def _tell_gap(self, peer: Peer, subscription: int) -> None:
        count, first, last = peer.lost.pop(subscription)
        body = packb({"lost": count, "first_offset": first, "last_offset": last})
        peer.send(encode(GAP, b"", body, subscription, 0, last))

    def drained(self, peer: Peer) -> None:
        """The peer's queue is empty again: tell it what it missed, without waiting for the next event."""
        for subscription in list(peer.lost):
            self._tell_gap(peer, subscription)

    def _subscribe(self, peer: Peer, frame: Frame) -> None:
        body = _map(frame)
        patterns = body.get("patterns")
        since = body.get("since")
        subscription = frame.peer
        if (
            not isinstance(patterns, list)
            or not 0 < len(patterns) <= MAX_PATTERNS
            or not all(isinstance(p, str) and p for p in patterns)
            or not (since is None or since == "beginning" or (isinstance(since, int) and since >= 0))
        ):
            return self._error(peer, frame.serial, errors.InvalidArgument("bad patterns or since in the subscription"))
        if not subscription or subscription in peer.subscriptions:
            return self._error(peer, frame.serial, errors.AlreadyExists(f"subscription {subscription} is 0 or in use"))
        if len(peer.subscriptions) >= MAX_SUBSCRIPTIONS_PER_PEER:
            return self._error(
                peer, frame.serial, errors.ResourceExhausted(f"more than {MAX_SUBSCRIPTIONS_PER_PEER} subscriptions")
            )
        peer.subscriptions[subscription] = patterns
        peer.send(encode(RESULT, b"", packb({"next_offset": self.journal.next_offset}), 0, frame.serial))
        if since is not None:
            self._replay(peer, subscription, patterns, 0 if since == "beginning" else since)
        return None

    def _replay(self, peer: Peer, subscription: int, patterns: list[str], since: int) -> None:
        oldest = self.journal.oldest_offset
        if since and since < oldest:
            body = packb({"lost": oldest - since, "first_offset": since, "last_offset": oldest - 1})
            peer.send(encode(GAP, b"", body, subscription, 0, oldest - 1))
        for offset, route, event in self.journal.read(since):
            topic = route.decode("utf-8", "replace")
            if any(topic_matches(pattern, topic) for pattern in patterns):
                self._deliver(peer, subscription, offset, encode(EVENT, route, event, subscription, 0, offset))


def _map(frame: Frame) -> dict[str, object]:
    try:
        value = unpackb(frame.body)
    except Exception as error:  # msgpack raises its own, ValueError and UnicodeDecodeError
        raise ProtocolError(f"{frame!r} is not msgpack: {error}") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"{frame!r} holds no map")
    return value


def _close(fds: list[int]) -> None:
    from .transport import close_fds

    close_fds(fds)
