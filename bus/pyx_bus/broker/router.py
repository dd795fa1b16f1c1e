"""The broker's decisions on calls, without I/O: who gets a frame, what happens when a peer comes, goes, or sends nonsense.

The router never decodes the body of a call or an answer. Connections are ``Peer`` objects; frames for one are handed to its ``send``,
and the I/O side flushes them afterwards. Events are next door (``events``).

Answers are matched to calls: a service can only answer what it was asked, under the caller's connection and serial number. When
a caller leaves, its calls are cancelled at the services; when a service leaves, its callers get ``unavailable``.
"""

from __future__ import annotations

from collections.abc import Callable

from msgpack import packb

from .. import __version__, errors
from ..transport import close_fds
from ..wire import (
    ACK,
    CALL,
    CANCEL,
    CREDIT,
    ERROR,
    FLAG_MONITOR,
    HELLO,
    ITEM,
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
    Run,
    encode,
)
from .events import Events
from .metrics import MethodCounters
from .peers import Peer
from .roles import MONITOR, ROOT, User
from .subscriptions import unpack_map

# What waits for a peer that doesn't read. Beyond it a service gets no more calls, and a caller that doesn't take its answers is
# disconnected. Events have a bound of their own.
MAX_QUEUED_BYTES = 8 << 20
MAX_CALLS_PER_PEER = 4096
MAX_METHODS = 512
MAX_NAME_BYTES = 64
# What of a service's queue the calls of ordinary users may fill, all together and each; the rest is root's and the services'.
MAX_QUEUED_OF_USERS = MAX_QUEUED_BYTES // 2
MAX_PUSHED_BYTES = MAX_FRAME


class Service:
    """A registered name. ``methods``: verb → whether a monitor may call it; None if it didn't say."""

    __slots__ = ("counters", "methods", "peer", "since_ns", "version")

    def __init__(self, peer: Peer, since_ns: int, version: str, methods: dict[bytes, bool] | None) -> None:
        self.peer = peer
        self.since_ns = since_ns
        self.version = version
        self.methods = methods
        self.counters: dict[bytes, MethodCounters] = {}


class Router:
    """``now_ns`` is the wall clock, ``monotonic_ns`` the one calls are timed with."""

    def __init__(self, events: Events, now_ns: Callable[[], int], monotonic_ns: Callable[[], int]) -> None:
        self.events = events
        self.now_ns = now_ns
        self.monotonic_ns = monotonic_ns
        self.peers: dict[int, Peer] = {}
        self.users: dict[int, User] = {}
        self.services: dict[bytes, Service] = {}
        self._counters: dict[bytes, MethodCounters] = {}  # by method; they outlive the service's connection
        self._next_id = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.refused = 0
        self.protocol_errors = 0

    def user(self, uid: int) -> User:
        """The account of a user, made when it's first needed."""
        found = self.users.get(uid)
        if found is None:
            found = self.users[uid] = User(uid)
        return found

    def add(self, peer: Peer) -> None:
        self._next_id += 1
        peer.id = self._next_id
        peer.user.connections += 1
        self.peers[peer.id] = peer

    def drop(self, peer: Peer) -> None:
        """The connection is gone: free its name, fail its callers, cancel its calls."""
        if self.peers.pop(peer.id, None) is None:
            return
        self.events.subscriptions.routes.pop(peer.id, None)
        for subscription_id in list(peer.subscriptions):
            self.events.subscriptions.unsubscribe(peer, subscription_id)
        if peer.publisher:
            self.events.forget_publisher(peer.publisher)
        if peer.service:
            self._unregister(peer)
        for caller_id, serial in peer.incoming:
            caller = self.peers.get(caller_id)
            if caller is not None and serial in caller.calls:
                self._close_call(caller, serial).errors += 1
                self._error(caller, serial, errors.Unavailable(f"{peer.service} went away during the call"))
        for serial in list(peer.calls):
            service = peer.calls[serial][0]
            self._close_call(peer, serial).cancelled += 1
            service.incoming.discard((peer.id, serial))
            service.send(encode(CANCEL, b"", b"", peer.id, serial))
        user = peer.user
        user.connections -= 1
        if not user.connections:
            self.users.pop(user.uid, None)

    def receive(self, peer: Peer, frame: Frame) -> None:
        """Handle one frame. Takes the frame's descriptors over. Raises ``ProtocolError``: the peer is to be disconnected."""
        kind = frame.kind
        if not peer.name and kind != HELLO:
            raise ProtocolError(f"expected HELLO, got {frame!r}")
        if peer.queued_bytes > 2 * MAX_QUEUED_BYTES:  # what others send it stops at half of that: it's its own doing
            raise ProtocolError("it goes on asking and doesn't read the answers")
        if kind == CALL:
            self._call(peer, frame)
        elif kind == RESULT or kind == ITEM:
            self._answer(peer, frame)
        elif frame.fds:
            raise ProtocolError(f"{frame!r} can't carry descriptors")
        elif kind == ERROR:
            self._answer(peer, frame)
        elif kind == PUBLISH:
            if not isinstance(frame, Run):
                raise ProtocolError(f"{frame!r} can't carry descriptors")
            self.events.publish(peer, frame)
        elif kind in (CANCEL, CREDIT):
            self._pass_on(peer, frame)
        elif kind == SUBSCRIBE:
            try:
                self.events.subscriptions.subscribe(peer, frame)
            except errors.BusError as error:
                self._error(peer, frame.serial, error)
        elif kind == UNSUBSCRIBE:
            self.events.subscriptions.unsubscribe(peer, frame.peer)
        elif kind == ACK:
            self.events.subscriptions.acknowledge(peer, frame)
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
        body = unpack_map(frame)
        newest, oldest = body.get("version"), body.get("oldest", body.get("version"))
        if not isinstance(newest, int) or not isinstance(oldest, int) or peer.name:
            raise ProtocolError("bad HELLO")
        if not oldest <= PROTOCOL_VERSION <= newest:
            raise ProtocolError(
                f"no common protocol version: you speak {oldest} to {newest}, this broker {PROTOCOL_VERSION}"
            )
        publisher = body.get("publisher") or ""
        if not isinstance(publisher, str) or len(publisher.encode(errors="replace")) > MAX_NAME_BYTES:
            raise ProtocolError(f"a publisher's ID has at most {MAX_NAME_BYTES} bytes")
        peer.name = _short(body.get("name")) or "client"
        # Of a service's user it's known what it is, whatever it calls itself.
        peer.source = peer.name.encode() if peer.may_be == "*" else (peer.may_be or peer.name).encode()
        if publisher:
            # By user, so that nobody can use up another's sequence numbers.
            peer.publisher = f"{peer.uid}:{publisher}".encode(errors="replace")
        welcome = {
            "version": PROTOCOL_VERSION,
            "connection": peer.id,
            "bus": self.events.journal.id,
            "next_offset": self.events.journal.next_offset,
            "max_frame": MAX_FRAME,
            "software": f"pyx/{__version__}",
            "role": peer.role,
            "uid": peer.uid,
        }
        peer.send(encode(WELCOME, b"", packb(welcome)))

    def _register(self, peer: Peer, frame: Frame) -> None:
        name = frame.route.decode("ascii", "replace")
        if not name.isalnum() or name == "bus" or peer.service:
            return self._error(peer, frame.serial, errors.InvalidArgument(f'cannot register the name "{name}"'))
        if peer.may_be not in ("*", name):
            return self._error(
                peer,
                frame.serial,
                errors.PermissionDenied(f'user {peer.uid} may not register "{name}"', hint=f"only pyx-{name} may"),
            )
        if frame.route in self.services:
            holder = self.services[frame.route].peer
            return self._error(
                peer, frame.serial, errors.AlreadyExists(f'"{name}" is already registered by process {holder.pid}')
            )
        body = unpack_map(frame)
        methods = body.get("methods")
        if methods is not None and (
            not isinstance(methods, dict)
            or len(methods) > MAX_METHODS
            or not all(isinstance(verb, str) and isinstance(open_, bool) for verb, open_ in methods.items())
        ):
            return self._error(
                peer, frame.serial, errors.InvalidArgument(f"methods are at most {MAX_METHODS} verbs, true or false")
            )
        known = None if methods is None else {f"{name}.{verb}".encode(): open_ for verb, open_ in methods.items()}
        peer.service = name
        peer.source = frame.route
        self.events.subscriptions.routes.pop(peer.id, None)
        self.services[frame.route] = Service(peer, self.now_ns(), _short(body.get("version")), known)
        peer.send(encode(RESULT, b"", packb({}), 0, frame.serial))
        self.events.announce("service.up", name, {"name": name, "pid": str(peer.pid)})
        return None

    def _unregister(self, peer: Peer) -> None:
        del self.services[peer.service.encode()]
        self.events.announce("service.down", peer.service, {"name": peer.service, "pid": str(peer.pid)})

    # --- calls -------------------------------------------------------------------------------------------------------

    def _call(self, peer: Peer, frame: Frame) -> None:
        serial, route = frame.serial, frame.route
        if not serial or serial in peer.calls:
            raise ProtocolError(f"call with serial {serial}, which is 0 or in use")
        name = route.partition(b".")[0]
        service = self.services.get(name)
        if service is None:
            if name == b"bus":
                return self._own_method(peer, frame)
            failure: errors.BusError | None = errors.Unavailable(
                f'no service "{name.decode(errors="replace")}" on the bus',
                hint="it may be starting or have failed: pyx system info",
            )
        else:
            failure = self._objection(peer, frame, service)
        if failure is not None:
            _drop_fds(frame)
            return self._error(peer, serial, failure)
        assert service is not None
        callee = service.peer
        counters = service.counters.get(route)
        if counters is None:
            counters = self._count(service, route)
        counters.calls += 1
        size = len(frame.body)
        user = peer.user
        user.calls += 1
        user.call_bytes += size
        peer.calls[serial] = (callee, counters, self.monotonic_ns(), size)
        callee.incoming.add((peer.id, serial))
        arg = (frame.arg & 0xFFFFFFFF) | peer.uid << 32
        flags = FLAG_MONITOR if peer.role == MONITOR else 0
        callee.send(encode(CALL, route, frame.body, peer.id, serial, arg, len(frame.fds), flags), frame.fds)
        return None

    def _objection(self, peer: Peer, frame: Frame, service: Service) -> errors.BusError | None:
        """Why a call can't be passed on."""
        user = peer.user
        if service.methods is not None and frame.route not in service.methods:
            return errors.Unimplemented(f'no method "{frame.route.decode(errors="replace")}"')
        if peer.role == MONITOR and not (service.methods or {}).get(frame.route):
            return errors.PermissionDenied(
                f"{frame.route.decode(errors='replace')} is not for monitors",
                hint='members of the group "pyx" may call it',
            )
        if len(peer.calls) >= MAX_CALLS_PER_PEER or user.calls >= user.max_calls:
            return errors.ResourceExhausted(
                f"more than {MAX_CALLS_PER_PEER} calls open on a connection, or {user.max_calls} of a user"
            )
        if user.call_bytes + len(frame.body) > user.max_call_bytes:
            return errors.ResourceExhausted(f"user {user.uid} has more than {user.max_call_bytes} bytes in open calls")
        if frame.fds and peer.role == MONITOR:
            return errors.PermissionDenied("monitors pass no descriptors")
        callee = service.peer
        if callee.queued_bytes:
            pushed = callee.pushed.get(peer.uid, 0) + len(frame.body)
            limit = MAX_QUEUED_BYTES if peer.trusted else MAX_QUEUED_OF_USERS
            if callee.queued_bytes > limit or (pushed > MAX_PUSHED_BYTES and not peer.trusted):
                return errors.ResourceExhausted(f"{callee.service} doesn't keep up with its calls")
            callee.pushed[peer.uid] = pushed
        elif callee.pushed:
            callee.pushed.clear()
        return None

    def _count(self, service: Service, route: bytes) -> MethodCounters:
        key = route if service.methods is not None else service.peer.service.encode() + b".*"  # bounded either way
        counters = self._counters.get(key)
        if counters is None:
            counters = self._counters[key] = MethodCounters()
        if service.methods is not None:
            service.counters[route] = counters
        return counters

    def _close_call(self, caller: Peer, serial: int) -> MethodCounters:
        _, counters, started_ns, size = caller.calls.pop(serial)
        caller.user.calls -= 1
        caller.user.call_bytes -= size
        counters.done(self.monotonic_ns() - started_ns)
        return counters

    def _answer(self, service: Peer, frame: Frame) -> None:
        caller = self.peers.get(frame.peer)
        key = (frame.peer, frame.serial)
        if caller is None or key not in service.incoming:  # cancelled or gone meanwhile
            return _drop_fds(frame)
        arg = 0
        if frame.kind != ITEM:
            service.incoming.discard(key)
            counters = self._close_call(caller, frame.serial)
            if frame.kind == ERROR:
                counters.errors += 1
            elif frame.arg:
                arg = self.events.offset_after(service.publisher, frame.arg - 1)
        user = caller.user
        if caller.queued_bytes > MAX_QUEUED_BYTES or (
            user.queued_bytes + len(frame.body) > user.max_queued_bytes and not caller.trusted
        ):
            _drop_fds(frame)
            return caller.disconnect(f"it, or user {user.uid}, doesn't read its answers")
        caller.send(encode(frame.kind, b"", frame.body, 0, frame.serial, arg, len(frame.fds)), frame.fds)
        return None

    def _pass_on(self, peer: Peer, frame: Frame) -> None:
        """CANCEL and CREDIT go to the service that has the call."""
        call = peer.calls.get(frame.serial)
        if call is None:
            return
        service = call[0]
        if frame.kind == CANCEL:
            self._close_call(peer, frame.serial).cancelled += 1
            service.incoming.discard((peer.id, frame.serial))
        elif service.queued_bytes > 2 * MAX_QUEUED_BYTES:
            raise ProtocolError(f"{service.service} doesn't read, and the caller goes on giving it credit")
        service.send(encode(frame.kind, b"", b"", peer.id, frame.serial, frame.arg))

    def _error(self, peer: Peer, serial: int, error: errors.BusError) -> None:
        peer.send(encode(ERROR, b"", packb(errors.to_body(error)), 0, serial))

    # --- the broker's own methods ------------------------------------------------------------------------------------

    def _own_method(self, peer: Peer, frame: Frame) -> None:
        _drop_fds(frame)
        try:
            body = self._answer_own(peer, frame)
        except errors.BusError as error:
            return self._error(peer, frame.serial, error)
        peer.send(encode(RESULT, b"", packb(body), 0, frame.serial))
        return None

    def _answer_own(self, peer: Peer, frame: Frame) -> dict[str, object]:
        if frame.route == b"bus.services":
            return {"services": [self._describe(name, service) for name, service in sorted(self.services.items())]}
        if frame.route == b"bus.stats":
            return self._stats()
        if frame.route == b"bus.durables":
            return {"durables": self.events.subscriptions.durables(peer.uid if peer.role == MONITOR else None)}
        if frame.route == b"bus.forget":
            body = unpack_map(frame)
            name, uid = body.get("name"), body.get("uid", peer.uid)
            if not isinstance(name, str) or not isinstance(uid, int):
                raise errors.InvalidArgument("which durable subscription?")
            if uid != peer.uid and peer.role != ROOT:
                raise errors.PermissionDenied(f'the durable subscription "{name}" is user {uid}\'s')
            self.events.subscriptions.forget(uid, name)
            return {}
        raise errors.Unimplemented(f'no method "{frame.route.decode(errors="replace")}"')

    def _describe(self, name: bytes, service: Service) -> dict[str, object]:
        peer = service.peer
        return {
            "name": name.decode(),
            "pid": peer.pid,
            "uid": peer.uid,
            "since_ns": service.since_ns,
            "version": service.version,
        }

    def _stats(self) -> dict[str, object]:
        by_role: dict[str, int] = {}
        for peer in self.peers.values():
            by_role[peer.role] = by_role.get(peer.role, 0) + 1
        return {
            "connections": len(self.peers),
            "connections_by_role": by_role,
            "users": [
                {
                    "uid": user.uid,
                    "connections": user.connections,
                    "subscriptions": user.subscriptions,
                    "calls": user.calls,
                    "call_bytes": user.call_bytes,
                    "queued_bytes": user.queued_bytes,
                }
                for user in self.users.values()
            ],
            "calls_in_flight": sum(len(peer.calls) for peer in self.peers.values()),
            "calls_total": sum(counters.calls for counters in self._counters.values()),
            "methods": {
                name.decode(errors="replace"): counters.body() for name, counters in sorted(self._counters.items())
            },
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "refused": self.refused,
            "protocol_errors": self.protocol_errors,
            **self.events.body(),
        }


def _drop_fds(frame: Frame) -> None:
    """Close a frame's descriptors, once."""
    fds, frame.fds = frame.fds, []
    close_fds(fds)


def _short(value: object) -> str:
    """A name as a peer gave it, made fit for a route and a log."""
    text = value if isinstance(value, str) else ""
    return (
        "".join(c if c.isprintable() else "?" for c in text)
        .encode("utf-8", "replace")[:MAX_NAME_BYTES]
        .decode("utf-8", "ignore")
    )
