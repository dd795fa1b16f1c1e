"""The broker's I/O: accepts connections, checks who they are, feeds the router, writes what it says.

A task per connection waits for readability and hands over what a read brought; answers are written at once. Only a socket that the
kernel finds full gets a task that waits for it. So nobody's slowness is anybody else's.
"""

from __future__ import annotations

import errno
import gc
import grp
import os
import secrets
import socket
import struct
import time
import traceback
from pathlib import Path

import structlog
import trio
from msgpack import packb

from . import errors
from .journal import Journal
from .router import Peer, Router
from .transport import Transport, close_fds
from .wire import ERROR, MAX_HELLO, Frame, ProtocolError, encode

log = structlog.get_logger("bus")

HELLO_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 4096
# Frames are taken from one connection this many reads long before others get their turn.
READS_PER_TURN = 16
SO_PEERGROUPS = 59  # Linux 4.13; not in Python's socket module


class Connection(Peer):
    """A peer on a socket."""

    __slots__ = ("blocked", "broker", "scope", "transport")

    def __init__(self, broker: Broker, sock: socket.socket, uid: int, gid: int, pid: int) -> None:
        super().__init__(uid, gid, pid)
        self.broker = broker
        self.transport = Transport(sock, first_frame_limit=MAX_HELLO)
        self.blocked = False
        self.scope = trio.CancelScope()

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        if self.transport.closed:
            close_fds(fds or ())
            return
        self.transport.push(data, fds)
        if not self.blocked:
            self.broker.dirty[self.id] = self

    @property
    def queued_bytes(self) -> int:
        return self.transport.queued_bytes

    def disconnect(self, reason: str) -> None:
        log.warning("disconnecting", peer=self.name, pid=self.pid, reason=reason)
        self.scope.cancel()


class Broker:
    """Serves one listening socket until cancelled."""

    def __init__(self, *, allowed_gids: frozenset[int] = frozenset(), trace: bool = False) -> None:
        self.router = Router(Journal(secrets.token_hex(8)), time.time_ns)
        self.dirty: dict[int, Connection] = {}
        self._allowed_uids = frozenset({0, os.geteuid()})
        self._allowed_gids = allowed_gids
        self._trace = trace

    async def serve(self, listener: socket.socket) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                await trio.lowlevel.wait_readable(listener)
                try:
                    sock, _ = listener.accept()
                except (BlockingIOError, ConnectionAbortedError):
                    continue
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                        raise
                    log.error("cannot accept", error=str(error))
                    await trio.sleep(0.1)  # the listener stays readable: without a pause this would spin
                    continue
                nursery.start_soon(self._serve_connection, nursery, sock)

    def _may_connect(self, sock: socket.socket) -> tuple[int, int, int]:
        """(uid, gid, pid) of the peer; raises ``PermissionDenied``, ``ResourceExhausted``."""
        pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if len(self.router.peers) >= MAX_CONNECTIONS:
            raise errors.ResourceExhausted(f"the bus has {MAX_CONNECTIONS} connections already")
        if uid in self._allowed_uids or gid in self._allowed_gids:
            return uid, gid, pid
        try:
            raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024)  # Python's bound; ERANGE for more than 256 groups
        except OSError:
            raw = b""
        if self._allowed_gids.intersection(struct.unpack(f"{len(raw) // 4}I", raw)):
            return uid, gid, pid
        raise errors.PermissionDenied(
            f"user {uid} may not use this bus", hint='members of the group "pyx" may; that is as good as being root'
        )

    async def _serve_connection(self, nursery: trio.Nursery, sock: socket.socket) -> None:
        try:
            uid, gid, pid = self._may_connect(sock)
        except errors.BusError as error:
            self.router.refused += 1
            self._refuse(sock, error)
            sock.close()
            return
        peer = Connection(self, sock, uid, gid, pid)
        self.router.add(peer)
        try:
            with peer.scope:
                with trio.move_on_after(HELLO_TIMEOUT_S) as hello:
                    await self._read(nursery, peer, until_hello=True)
                if hello.cancelled_caught:
                    self._refuse(sock, errors.DeadlineExceeded(f"no HELLO within {HELLO_TIMEOUT_S} s"))
                    return
                if peer.name:
                    await self._read(nursery, peer, until_hello=False)
        except ProtocolError as error:
            self.router.protocol_errors += 1
            log.warning("protocol error", peer=peer.name, pid=pid, uid=uid, error=str(error))
            self._refuse(sock, errors.InvalidArgument(str(error)))
        except OSError as error:
            if error.errno not in (errno.ECONNRESET, errno.EPIPE, errno.EBADF):
                log.warning("connection failed", peer=peer.name, pid=pid, error=str(error))
        except Exception as error:  # a bug of ours costs this peer its connection, never the others theirs
            log.error("connection failed", peer=peer.name, pid=pid, error=repr(error), traceback=traceback.format_exc())
        finally:
            self.router.drop(peer)
            if not peer.transport.closed:
                trio.lowlevel.notify_closing(sock)  # wakes a task that waits for its writability
                peer.transport.close()
            self._flush(nursery)

    async def _read(self, nursery: trio.Nursery, peer: Connection, *, until_hello: bool) -> None:
        transport = peer.transport
        receive = self.router.receive
        while True:
            await trio.lowlevel.wait_readable(transport.sock)
            for _ in range(READS_PER_TURN):
                try:
                    frames = transport.receive()
                except BlockingIOError:
                    break
                if frames is None:
                    peer.name = peer.name if not until_hello else ""
                    return
                self._handle(receive, peer, frames)
                self._flush(nursery)
                if until_hello and peer.name:
                    return

    def _handle(self, receive: object, peer: Connection, frames: list[Frame]) -> None:
        assert callable(receive)
        for index, frame in enumerate(frames):
            if self._trace:
                log.debug("frame", peer=peer.name, frame=repr(frame))
            try:
                receive(peer, frame)
            except ProtocolError:
                for rest in frames[index:]:
                    close_fds(rest.fds)
                raise

    def _flush(self, nursery: trio.Nursery) -> None:
        while self.dirty:
            _, peer = self.dirty.popitem()
            if peer.blocked or peer.transport.closed:
                continue
            try:
                if not peer.transport.flush():
                    peer.blocked = True
                    nursery.start_soon(self._flush_blocked, nursery, peer)
            except OSError:
                peer.scope.cancel()

    async def _flush_blocked(self, nursery: trio.Nursery, peer: Connection) -> None:
        try:
            while not peer.transport.closed:
                await trio.lowlevel.wait_writable(peer.transport.sock)
                if peer.transport.flush():
                    peer.blocked = False
                    if peer.lost:
                        self.router.drained(peer)
                        self._flush(nursery)
                    return
        except (OSError, trio.ClosedResourceError):
            peer.scope.cancel()

    def _refuse(self, sock: socket.socket, error: errors.BusError) -> None:
        """Tell the peer why, as far as its socket takes it now; whoever called closes it."""
        try:
            sock.setblocking(False)
            sock.send(encode(ERROR, b"", packb(errors.to_body(error))), socket.MSG_NOSIGNAL)
        except OSError:
            pass


def listen(path: Path, *, gid: int = -1) -> socket.socket:
    """A listening socket at ``path`` (mode 0660, group ``gid``), replacing a stale one. A living broker there is ``AlreadyExists``."""
    from .sync import connect_unix

    try:
        connect_unix(str(path)).close()
    except OSError:
        path.unlink(missing_ok=True)
    else:
        raise errors.AlreadyExists(f"another broker already listens on {path}")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    mask = os.umask(0o117)
    try:  # by way of the directory's descriptor: a socket address holds 108 bytes only
        sock.bind(f"/proc/self/fd/{directory}/{path.name}")
    finally:
        os.umask(mask)
        os.close(directory)
    if gid >= 0:
        os.chown(path, -1, gid)
    sock.listen(1024)
    sock.setblocking(False)
    return sock


def pyx_group() -> int:
    """The ID of the group ``pyx``, whose members may use the bus; -1 if the host has none."""
    try:
        return grp.getgrnam("pyx").gr_gid
    except KeyError:
        return -1


async def run_broker(
    path: Path, task_status: trio.TaskStatus[Path] = trio.TASK_STATUS_IGNORED, *, trace: bool = False
) -> None:
    """Serve the bus at ``path`` until cancelled; the socket is removed at the end. ``trace`` logs the header of every frame."""
    gid = pyx_group()
    listener = listen(path, gid=gid)
    broker = Broker(allowed_gids=frozenset({gid} if gid >= 0 else ()), trace=trace)
    gc.freeze()
    try:
        task_status.started(path)
        await broker.serve(listener)
    finally:
        listener.close()
        path.unlink(missing_ok=True)


__all__ = ["Broker", "listen", "run_broker"]
