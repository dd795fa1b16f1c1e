"""The broker's I/O: accepts connections, checks who they are, feeds the router, writes what it says.

One thread and one epoll(7): a read that brings frames is handled to its end, then what it caused is written, at once. Only a socket
that the kernel finds full is watched for room. So nobody's slowness is anybody else's. Between two looks at the sockets at most one
piece of the journal is read for those who catch up.

This is a plain loop, not a trio program, on purpose: everything here is a reaction to a readable socket, nothing ever waits in the
middle. It takes 10 MB less memory than the same in trio, and who is served when is decided here. ``step`` is one turn, so that a test
may run a broker inside any other loop by waiting for ``fileno`` to be readable.
"""

from __future__ import annotations

import errno
import gc
import logging
import os
import select
import socket
import time
import traceback
from pathlib import Path

from msgpack import packb

from .. import errors
from ..sync import connect_unix
from ..transport import Transport, close_fds
from ..wire import ERROR, MAX_HELLO, Frame, ProtocolError, encode
from .events import Events
from .journal import Journal, JournalError, Limits
from .memory import give_back, resident_bytes
from .peers import Peer
from .positions import Positions
from .roles import GROUP, KEPT_FOR_ROOT, MAX_CONNECTIONS, ROOT, SERVICE, Roles, User, credentials, group_id, groups
from .router import Router

log = logging.getLogger("pyx.bus")

HELLO_TIMEOUT_S = 5.0
# Less than a socket takes at once (212,992 bytes, wmem_default): what was read of a publisher goes out to readers in one write each.
READ_SIZE = 128 << 10
ACCEPT_PAUSE_S = 0.1
EXPIRE_EVERY_S = 60.0
# After a connection has ended, what it needed is given back, if it was much. It takes a few ms: what was there at the start isn't
# looked at (``settle``).
TIDY_AFTER_S = 0.5
SPARE_BYTES = 4 << 20
# One turn of the loop: so much is read of one connection of an ordinary user (root's and services' are read to ``READ_SIZE``), so long
# are frames of one connection handled, and so long those of one ordinary user's connections together; the rest comes in the next turn,
# after what root and the services have sent meanwhile. So whoever sends as fast as it can costs others some ms of waiting.
READ_SIZE_OF_USERS = 16 << 10
SLICE_S = 0.002
SLICE_OF_USER_S = 0.004
ACCEPTS_PER_TURN = 16
_LOOK_EVERY = 8  # frames between two looks at the clock
# A frame that's half received counts against its user's quota from here on; smaller ones are everyday.
_SMALL = 64 << 10
_BACKLOG = 1024
_IN, _OUT = select.EPOLLIN, select.EPOLLOUT


class Connection(Peer):
    """A peer on a socket. ``accounted`` is what of ``user.queued_bytes`` is due to it."""

    __slots__ = ("accounted", "blocked", "broker", "frames", "next_frame", "sock", "transport")

    def __init__(
        self, broker: Broker, sock: socket.socket, user: User, gid: int, pid: int, role: str, may_be: str
    ) -> None:
        super().__init__(user, gid, pid, role, may_be)
        self.broker = broker
        self.sock = sock
        self.transport = Transport(sock, first_frame_limit=MAX_HELLO, runs=True, buffer=broker.buffer)
        self.blocked = False
        self.accounted = 0
        self.frames: list[Frame] = []  # read, and from ``next_frame`` on not handled yet
        self.next_frame = 0

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        if self.transport.closed:
            close_fds(fds or ())
            return
        self.transport.push(data, fds)
        self.broker.router.bytes_out += len(data)
        if not self.blocked:
            self.broker.dirty[self.id] = self

    @property
    def queued_bytes(self) -> int:
        return self.transport.queued_bytes

    def disconnect(self, reason: str) -> None:
        self.broker.condemn(self, reason)

    def account(self) -> None:
        """Bring the user's account up to date with what is held for this connection."""
        held = self.transport.queued_bytes
        partial = self.transport.decoder.buffered_bytes
        if partial > _SMALL:
            held += partial
        self.user.queued_bytes += held - self.accounted
        self.accounted = held


class Broker:
    """Serves one listening socket. ``step`` until it's to end, then ``close``."""

    def __init__(
        self,
        listener: socket.socket,
        directory: Path,
        roles: Roles,
        *,
        limits: Limits | None = None,
        trace: bool = False,
    ) -> None:
        self.roles = roles
        self.buffer = bytearray(READ_SIZE)
        self.dirty: dict[int, Connection] = {}
        self._journal = Journal(directory / "journal", limits or Limits())
        self._positions = Positions(directory / "durable", self._journal.id)
        self.events = Events(self._journal, self._positions, time.time_ns, time.monotonic_ns)
        self.router = Router(self.events, time.time_ns, time.monotonic_ns)
        self._listener = listener
        self._connections: dict[int, Connection] = {}
        self._unintroduced: dict[Connection, float] = {}  # when its HELLO is overdue, in that order
        self._unfinished: dict[Connection, None] = {}  # they have frames that were read and not handled
        self._condemned: dict[Connection, str] = {}
        self._tidy_at = 0.0
        self._usual_bytes = resident_bytes()
        self._accept_again_at = 0.0
        self._expire_at = time.monotonic() + EXPIRE_EVERY_S
        self._trace = trace
        self._wake_fd = -1
        self._epoll = select.epoll()
        self._epoll.register(listener, _IN)

    def fileno(self) -> int:
        """Readable when ``step`` has something to do; besides, it wants to be called after ``timeout_s``."""
        return self._epoll.fileno()

    def watch(self, fd: int) -> None:
        """Let ``step`` return when this is readable, and read it empty: a pipe that wakes."""
        self._wake_fd = fd
        self._epoll.register(fd, _IN)

    def timeout_s(self) -> float:
        """How long ``step`` may wait."""
        subscriptions = self.events.subscriptions
        if subscriptions.ready or self.dirty or self._unfinished:
            return 0.0
        if not (self._unintroduced or self._tidy_at or self._accept_again_at or subscriptions.beating):
            return EXPIRE_EVERY_S  # the usual case, and this is asked twice a call
        now = time.monotonic()
        until = self._expire_at
        if self._unintroduced:
            until = min(until, next(iter(self._unintroduced.values())))
        if self._tidy_at:
            until = min(until, self._tidy_at)
        if self._accept_again_at:
            until = min(until, self._accept_again_at)
        wait = max(0.0, until - now)
        beat_ns = subscriptions.beat()
        if beat_ns:
            self._flush()
            wait = min(wait, beat_ns / 1e9)
        return wait

    def step(self, timeout_s: float) -> None:
        """One turn: wait, handle what has come, write."""
        ordinary = list(self._unfinished) if self._unfinished else []
        for fd, mask in self._epoll.poll(timeout_s):
            peer = self._connections.get(fd)
            if peer is None:
                if fd == self._wake_fd:
                    os.read(fd, 4096)
                elif fd == self._listener.fileno():
                    self._accept()
                continue
            if mask & _OUT:
                self._flush_one(peer)
            if not mask & ~_OUT or peer in self._unfinished:
                continue
            if peer.trusted:
                self._receive(peer)
            else:
                ordinary.append(peer)
        if ordinary:
            self._take_turns(ordinary)
        if self.events.subscriptions.ready:
            self._read_on()
        if self.dirty:
            self._flush()
        if (
            self._unintroduced
            or self._condemned
            or self._tidy_at
            or self._accept_again_at
            or time.monotonic() >= self._expire_at
        ):
            self._housekeeping()

    def _take_turns(self, peers: list[Connection]) -> None:
        """Those who have frames left over, then the ordinary users' connections that are readable, each user for its slice of time.

        Who doesn't come to its turn is still readable in the next one (epoll(7): and then behind those who did).
        """
        spent: dict[int, float] = {}
        for peer in peers:
            used = spent.get(peer.uid, 0.0)
            if used >= SLICE_OF_USER_S and not peer.trusted:
                continue
            started = time.monotonic()
            if peer in self._unfinished:
                del self._unfinished[peer]  # it goes to the end, if it isn't done then
                self._handle(peer)
            else:
                self._receive(peer)
            spent[peer.uid] = used + time.monotonic() - started

    def _read_on(self) -> None:
        subscription = next(iter(self.events.subscriptions.ready))
        try:
            self.events.read_on()
        except Exception:  # a bug of ours costs a reader its connection, never the others theirs
            log.error('a subscription failed peer="%s"\n%s', subscription.peer.name, traceback.format_exc())
            subscription.peer.disconnect("its subscription failed")

    def _housekeeping(self) -> None:
        now = time.monotonic()
        while self._unintroduced:
            peer, overdue_at = next(iter(self._unintroduced.items()))
            if not peer.name and overdue_at > now:
                break
            del self._unintroduced[peer]
            if not peer.name:
                self._refuse(peer.sock, errors.DeadlineExceeded(f"no HELLO within {HELLO_TIMEOUT_S} s"))
                self._end(peer)
        while self._condemned:
            peer, reason = self._condemned.popitem()
            if not peer.transport.closed:
                log.warning('disconnecting peer="%s" pid=%d uid=%d reason="%s"', peer.name, peer.pid, peer.uid, reason)
                self._end(peer)
        if self._accept_again_at and now >= self._accept_again_at:
            self._accept_again_at = 0.0
            self._epoll.register(self._listener, _IN)
        if self._tidy_at and now >= self._tidy_at:
            self._tidy_at = 0.0
            give_back(self._usual_bytes + SPARE_BYTES)
        if now >= self._expire_at:
            self._expire_at = now + EXPIRE_EVERY_S
            self._journal.expire(time.time_ns())
        if self.dirty:
            self._flush()

    def condemn(self, peer: Connection, reason: str) -> None:
        """Disconnect it at the end of this turn: whoever asks is in the middle of something."""
        self._condemned.setdefault(peer, reason)

    def close(self) -> None:
        """End the listener, every connection and the journal."""
        self._listener.close()
        for peer in list(self._connections.values()):
            self._forget(peer)
        self._epoll.close()
        self._positions.close()
        self._journal.close()

    # --- connections -------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                log.error('cannot accept error="%s"', error)
                self._epoll.unregister(self._listener)  # it stays readable: without a pause this would spin
                self._accept_again_at = time.monotonic() + ACCEPT_PAUSE_S
                return
            try:
                peer = self._admit(sock)
            except errors.BusError as error:
                self.router.refused += 1
                self._refuse(sock, error)
                sock.close()
            except OSError:
                sock.close()
            else:
                self._connections[peer.transport.fd] = peer
                self._epoll.register(peer.transport.fd, _IN)
                self._unintroduced[peer] = time.monotonic() + HELLO_TIMEOUT_S

    def _admit(self, sock: socket.socket) -> Connection:
        """Raises ``PermissionDenied``, ``ResourceExhausted``."""
        uid, gid, pid = credentials(sock)
        role, may_be = self.roles.of(uid, gid, groups(sock))
        trusted = role in (ROOT, SERVICE)
        if len(self._connections) >= MAX_CONNECTIONS - (0 if trusted else KEPT_FOR_ROOT):
            raise errors.ResourceExhausted(f"the bus has {len(self._connections)} connections already")
        user = self.router.user(uid)
        if not trusted and user.connections >= user.max_connections:
            raise errors.ResourceExhausted(f"user {uid} has {user.connections} connections already")
        peer = Connection(self, sock, user, gid, pid, role, may_be)
        self.router.add(peer)
        return peer

    def _receive(self, peer: Connection) -> None:
        """Read once, and handle what that brought."""
        transport = peer.transport
        if transport.closed:
            return
        try:
            frames = transport.receive(0 if peer.trusted else READ_SIZE_OF_USERS)
        except BlockingIOError:
            return
        except ProtocolError as error:
            self._break_off(peer, error)
            return
        except OSError as error:
            if error.errno not in (errno.ECONNRESET, errno.EPIPE, errno.EBADF):
                log.warning('connection failed peer="%s" pid=%d error="%s"', peer.name, peer.pid, error)
            self._end(peer)
            return
        if frames is None:
            self._end(peer)
            return
        self.router.bytes_in += transport.read_bytes
        peer.frames, peer.next_frame = frames, 0
        self._handle(peer)

    def _handle(self, peer: Connection) -> None:
        """The frames that were read, for a slice of time; then write what that caused."""
        if peer.transport.closed:
            return
        frames, index = peer.frames, peer.next_frame
        receive = self.router.receive
        until = time.monotonic() + SLICE_S if len(frames) > _LOOK_EVERY else 0.0
        try:
            while index < len(frames):
                frame = frames[index]
                index += 1
                if self._trace:
                    log.debug('frame peer="%s" %r', peer.name, frame)
                receive(peer, frame)
                if until and not index % _LOOK_EVERY and time.monotonic() > until:
                    break
            peer.next_frame = index
            if index < len(frames):
                self._unfinished[peer] = None
            else:
                peer.frames = []
        except ProtocolError as error:
            close_fds(frames[index - 1].fds)  # a frame that's refused is still whole
            peer.next_frame = index
            self._break_off(peer, error)
        except Exception as error:  # a bug of ours costs this peer its connection, never the others theirs
            # Of a frame that failed otherwise nobody knows who has its descriptors by now.
            log.error(
                'connection failed peer="%s" pid=%d error="%r"\n%s', peer.name, peer.pid, error, traceback.format_exc()
            )
            peer.next_frame = index
            self._end(peer)
        else:
            if peer.transport.decoder.buffered_bytes > _SMALL or peer.accounted:
                peer.account()
                if peer.user_is_full:
                    too_much = f"user {peer.uid} has more than {peer.user.max_queued_bytes} bytes under way"
                    self._break_off(peer, ProtocolError(too_much))
        if self.dirty:
            self._flush()

    def _break_off(self, peer: Connection, error: ProtocolError) -> None:
        self.router.protocol_errors += 1
        log.warning('protocol error peer="%s" pid=%d uid=%d error="%s"', peer.name, peer.pid, peer.uid, error)
        self._refuse(peer.sock, errors.InvalidArgument(str(error)))
        self._end(peer)

    def _end(self, peer: Connection) -> None:
        if not peer.transport.closed:
            self._forget(peer)
            self._flush()

    def _forget(self, peer: Connection) -> None:
        self.router.drop(peer)
        self._tidy_at = self._tidy_at or time.monotonic() + TIDY_AFTER_S
        self._unintroduced.pop(peer, None)
        self._unfinished.pop(peer, None)
        for frame in peer.frames[peer.next_frame :]:
            close_fds(frame.fds)
        peer.frames = []
        del self._connections[peer.transport.fd]
        self._epoll.unregister(peer.transport.fd)
        self.dirty.pop(peer.id, None)
        peer.transport.close()
        peer.user.queued_bytes -= peer.accounted
        peer.accounted = 0
        self.events.subscriptions.user_has_room(peer.uid)

    def _refuse(self, sock: socket.socket, error: errors.BusError) -> None:
        """Tell the peer why, as far as its socket takes it now; whoever called closes it."""
        try:
            sock.setblocking(False)
            sock.send(encode(ERROR, b"", packb(errors.to_body(error))), socket.MSG_NOSIGNAL)
        except OSError:
            pass

    # --- writing -----------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        dirty = self.dirty
        while dirty:
            _, peer = dirty.popitem()
            if not peer.blocked and not peer.transport.closed:
                self._flush_one(peer)

    def _flush_one(self, peer: Connection) -> None:
        transport = peer.transport
        if transport.closed:
            return
        try:
            empty = transport.flush()
        except OSError:
            self.condemn(peer, "it's gone")
            return
        if not empty and not peer.blocked:
            peer.blocked = True
            self._epoll.modify(transport.fd, _IN | _OUT)
        elif empty and peer.blocked:
            peer.blocked = False
            self._epoll.modify(transport.fd, _IN)
            self.events.drained(peer)
        if not empty or peer.accounted:
            peer.account()
            if empty:
                self.events.subscriptions.user_has_room(peer.uid)


def listen(path: Path, *, gid: int = -1) -> socket.socket:
    """A listening socket at ``path``, replacing a stale one. A living broker there is ``AlreadyExists``.

    Everybody may connect (mode 0666) and is then looked at, so that who is refused is told why; ``gid`` owns it, for people's eyes.
    """
    try:
        connect_unix(str(path)).close()
    except OSError:
        path.unlink(missing_ok=True)
    else:
        raise errors.AlreadyExists(f"another broker already listens on {path}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    mask = os.umask(0o111)
    try:  # by way of the directory's descriptor: a socket address holds 108 bytes only
        sock.bind(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.umask(mask)
        os.close(directory)
    if gid >= 0:
        os.chown(path, -1, gid)
    sock.listen(_BACKLOG)
    sock.setblocking(False)
    return sock


def make(path: Path, directory: Path, *, limits: Limits | None = None, trace: bool = False) -> Broker:
    """A broker that listens at ``path`` and keeps its journal in ``directory``. Raises ``BusError``s if it can't."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise errors.FailedPrecondition(f"cannot make the directory of the event journal: {error}") from error
    listener = listen(path, gid=group_id(GROUP))
    try:
        return Broker(listener, directory, Roles.of_host(), limits=limits, trace=trace)
    except (JournalError, OSError) as error:
        listener.close()
        path.unlink(missing_ok=True)
        raise errors.FailedPrecondition(f"cannot open the event journal in {directory}: {error}") from error


def settle() -> None:
    """What was allocated until now stays: keep the collector from looking at it again."""
    gc.collect()
    gc.freeze()


__all__ = ["Broker", "listen", "make", "settle"]
