"""containerd's side of the shim protocol (its theory is in ``shim.py``).

``Zygote`` keeps the process shims are forked from; ``Shim`` is one connection to one shim. A shim outlives its connection: after a
restart ``Shim.connect`` finds it again through its socket.
"""

from __future__ import annotations

import _socket
import errno
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from pyx_bus import errors

from . import kernel
from . import shim as wire

REPLY_TIMEOUT_S = 10.0
RUNTIME_TIMEOUT_S = 60.0  # a runtime under memory pressure, with a cold page cache


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended. ``key`` is "" for init, else the exec's."""

    key: str
    code: int
    signal: int
    time_ns: int


@dataclass(frozen=True, slots=True)
class ShimState:
    """What a shim says of itself: ``phase`` is none, running or exited."""

    shim_pid: int
    init_pid: int
    phase: str
    exit: Exit


class RuntimeFailed(Exception):
    """The OCI runtime ended with ``exit_code``; what it said is in its log."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"exit code {exit_code}")
        self.exit_code = exit_code


class Zygote:
    """The process shims are forked from. Started when first needed, and again whenever it has died.

    ``cgroup``: what it and so the shims shall move into, where systemd keeps services in cgroups (see ``kernel.shim_cgroups``).
    """

    def __init__(self, cgroup: str = "") -> None:
        self._cgroup = cgroup
        self._pid = 0
        self._control: _socket.socket | None = None

    def start(self) -> None:
        """Start it. Its interpreter's start (about 15 ms) goes on in the background: messages wait in the socket."""
        self.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            fd = theirs.fileno()
            moves = kernel.shim_cgroups(self._cgroup) if self._cgroup else []
            argv = [sys.executable, "-I", "-S", "-OO", wire.__file__, *moves]
            # the zygote wants its socket as descriptor 3; sh-free: a preexec would fork the whole service
            spawned = os.posix_spawn(
                sys.executable,
                argv,
                {"PATH": os.environ.get("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"), "LC_ALL": "C.UTF-8"},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_DUP2, fd, 3),
                ],
                setsigmask=(),
            )
        self._pid = spawned
        self._control = ours

    @property
    def pid(self) -> int:
        return self._pid if self._control is not None else 0

    def _send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        for attempt in (1, 2):
            if self._control is None:
                self.start()
            assert self._control is not None
            try:
                wire.send_message(self._control, data, fds)
                return
            except OSError as error:
                if attempt == 2 or error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
                    raise errors.Unavailable(f"can't reach the shims' zygote: {error}") from None
                self.close()

    def fork(self, bundle: Path, container_id: str) -> socket.socket:
        """Fork a shim that lives in ``bundle``; returns its first connection. If the fork fails, that is at its end."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._send(wire.encode(wire.FORK, 0, [os.fsencode(bundle), container_id.encode()]), (theirs.fileno(),))
            except BaseException:
                ours.close()
                raise
        return ours

    def warm(self, cgroup_procs: str) -> None:
        """Have the kernel's cgroup lock warmed (see ``shim._warm``). Best effort, doesn't wait."""
        if cgroup_procs and self._control is not None:
            try:
                wire.send_message(self._control, wire.encode(wire.WARM, 0, [cgroup_procs.encode()]))
            except OSError:
                pass

    def close(self) -> None:
        """Close the control socket: the zygote ends (the shims don't), and is reaped."""
        if self._control is not None:
            self._control.close()
            self._control = None
            try:
                os.waitpid(self._pid, 0)
            except ChildProcessError:
                pass


OnExit = Callable[[Exit], Awaitable[None]]
OnLost = Callable[[], Awaitable[None]]


class _Reply:
    def __init__(self) -> None:
        self.event = trio.Event()
        self.kind = 0
        self.fields: list[bytes] = []
        self.fds: list[int] = []
        self.wanted = True


class Shim:
    """A connection to a shim. ``serve`` must run as a task of the service while it is used."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._serial = 0
        self._replies: dict[int, _Reply] = {}
        self._open = True

    @classmethod
    def connect(cls, bundle: Path) -> Shim:
        """Find the shim that lives in ``bundle`` again. OSError if there's none (ECONNREFUSED, ENOENT)."""
        directory = os.open(bundle, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            # through the descriptor, since a socket's path may have at most 107 bytes
            sock.connect(f"/proc/self/fd/{directory}/{wire.SOCKET_NAME}")
        except OSError:
            sock.close()
            raise
        finally:
            os.close(directory)
        return cls(sock)

    @property
    def is_open(self) -> bool:
        return self._open

    async def serve(self, on_exit: OnExit, on_lost: OnLost) -> None:
        """Read replies and exits until the connection ends. ``on_lost`` is called if it ended without ``close``."""
        while self._open:
            try:
                await trio.lowlevel.wait_readable(self._sock)
            except (trio.ClosedResourceError, ValueError):  # closed by us meanwhile
                return
            while self._open:
                try:
                    data, fds = wire.receive_message(self._sock)
                    kind, serial, fields = wire.decode(data) if data else (0, 0, [])
                except BlockingIOError:
                    break
                except (OSError, wire.ProtocolError):
                    kind, serial, fields, fds = 0, 0, [], []
                if not kind:
                    self._end()
                    await on_lost()
                    return
                if kind == wire.EXITED:
                    code, signal, time_ns = (int(word) for word in fields[1:4])
                    await on_exit(Exit(fields[0].decode(), code, signal, time_ns))
                    continue
                reply = self._replies.pop(serial, None)
                if reply is None or not reply.wanted:
                    wire.close_all(fds)
                    continue
                reply.kind, reply.fields, reply.fds = kind, fields, fds
                reply.event.set()

    def _end(self) -> None:
        if self._open:
            self._open = False
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()
        for reply in self._replies.values():
            reply.event.set()
        self._replies.clear()

    def close(self) -> None:
        """Let go of the connection. The shim goes on if it has a container."""
        self._end()

    async def _request(
        self, kind: int, fields: list[bytes], fds: tuple[int, ...] = (), timeout_s: float = REPLY_TIMEOUT_S
    ) -> tuple[list[bytes], list[int]]:
        if not self._open:
            raise errors.Unavailable("the container's shim is gone")
        self._serial += 1
        serial = self._serial
        reply = self._replies[serial] = _Reply()
        try:
            with trio.fail_after(timeout_s):
                while True:
                    try:
                        wire.send_message(self._sock, wire.encode(kind, serial, fields), fds)
                        break
                    except BlockingIOError:
                        await trio.lowlevel.wait_writable(self._sock)
                    except OSError:
                        raise errors.Unavailable("the container's shim is gone") from None
                await reply.event.wait()
        except trio.TooSlowError:
            raise errors.DeadlineExceeded(f"the container's shim didn't answer within {timeout_s:g} s") from None
        finally:
            if not reply.event.is_set():
                reply.wanted = False
        if reply.kind == wire.OK:
            return reply.fields, reply.fds
        wire.close_all(reply.fds)
        if reply.kind == 0:
            raise errors.Unavailable("the container's shim is gone")
        number, code, what = int(reply.fields[0]), int(reply.fields[1]), reply.fields[2].decode(errors="replace")
        if number == errno.ESRCH:
            raise ProcessLookupError(number, what)
        if number:
            raise errors.Internal(f"the shim failed: {what}", details={"errno": str(number)})
        raise RuntimeFailed(code)

    async def spawn(
        self,
        key: str,
        argv: list[str],
        pid_file: str,
        *,
        stdio: tuple[int, int, int] | None,
        kept: dict[str, int] | None = None,
        size: tuple[int, int] = (0, 0),
    ) -> tuple[int, int]:
        """Run the runtime for init (key "") or an exec. ``stdio`` None: a terminal. ``kept``: what the shim shall hold on to.

        Returns (pid, the terminal's master or -1; yours). The descriptors given stay yours. Raises ``RuntimeFailed``.
        """
        kept = kept or {}
        fields = [
            key.encode(),
            b"1" if stdio is None else b"0",
            b"%d" % size[0],
            b"%d" % size[1],
            pid_file.encode(),
            " ".join(kept).encode(),
            *(os.fsencode(argument) for argument in argv),
        ]
        fds = (*(stdio or ()), *kept.values())
        result, masters = await self._request(wire.SPAWN, fields, fds, RUNTIME_TIMEOUT_S)
        master = masters.pop(0) if masters else -1
        wire.close_all(masters)
        return int(result[0]), master

    async def kill(self, key: str, signal: int) -> None:
        """Raises ProcessLookupError if it has ended."""
        await self._request(wire.KILL, [key.encode(), b"%d" % signal])

    async def state(self) -> ShimState:
        fields, fds = await self._request(wire.STATE, [], timeout_s=RUNTIME_TIMEOUT_S)
        wire.close_all(fds)
        code, signal, time_ns = (int(word) for word in fields[3:6])
        return ShimState(int(fields[0]), int(fields[1]), fields[2].decode(), Exit("", code, signal, time_ns))

    async def descriptors(self, *, take_stdin: bool = False) -> dict[str, int]:
        """Duplicates of what the shim holds (stdin, stdout, stderr or tty, and clients), yours. ``take_stdin``: it gives stdin away."""
        names, fds = await self._request(wire.FDS, [b"take" if take_stdin else b""])
        return {name.decode(): fd for name, fd in zip(names, fds, strict=True)}

    async def run(self, argv: list[str]) -> int:
        """Run the runtime for anything else (delete, pause, resume). Its exit code."""
        fields, _ = await self._request(wire.RUN, [os.fsencode(argument) for argument in argv], timeout_s=RUNTIME_TIMEOUT_S)
        return int(fields[0])

    async def end(self) -> None:
        """Tell it to go, and let go of it."""
        try:
            await self._request(wire.END, [])
        except (errors.Unavailable, errors.DeadlineExceeded):
            pass
        self.close()
