"""The shim: one tiny process per running container, and the zygote it is forked from.

This file is run by path (``python -I -S -OO shim.py``) and imports nothing outside the standard library's C modules, so that a shim
costs about a megabyte. containerd imports it too, for the codec and the constants: both sides of the wire are here. It is one long
file for that reason: what is run by path can't import its neighbours.

Theory of operation
-------------------
containerd starts the *zygote* with a SEQPACKET socket as descriptor 3. Its arguments are the cgroup.procs files of the cgroups it and
the shims shall live in (else that would be containerd's, which systemd may kill). A ``FORK`` message carries the bundle directory and
one end of a socketpair; the zygote forks, and the child is the shim of that container with its first connection in hand. The zygote
ends when containerd does; shims live on.

A *shim* sits in its bundle directory (so every name it uses is relative and short), is a subreaper, and therefore becomes the parent
of the container's init once the OCI runtime, which it runs, has exited. It:

- runs the runtime (``SPAWN`` for init and exec processes, ``RUNTIME`` for delete, pause, resume),
- holds stdin's write end, the read ends of stdout and stderr, or the pty master, so that no reader's restart breaks a pipe, and the
  pipes of the clients attached from the start, for a restarted logd to go on with; it never holds an end whose closing the container
  waits for (stdout's write end), and never reads data,
- reaps, and writes init's exit status to ``exit`` in the bundle before telling anybody,
- listens on ``shim.sock`` for a restarted containerd,
- sends signals: as the parent it can't hit a reused PID.

It ends on ``RELEASE``; or on its own if it has no container (none was ever started, or the start failed) and its last connection is
gone: then nobody can miss it.

Wire (one SEQPACKET datagram a message): version u8, kind u8, serial u32, field count u16, then each field as length u32 and bytes,
all big endian; descriptors by SCM_RIGHTS. A reply repeats the request's serial. Numbers in fields are decimal text.

====== ===== ================================================================== ==========================================
kind   value request fields (descriptors)                                       reply fields (descriptors)
====== ===== ================================================================== ==========================================
FORK   1     bundle, id (connection)                                            none: the shim answers on the connection
SPAWN  2     key ("" = init), tty "0|1", rows, columns, pid file, names of kept OK: pid (tty: the master)
             descriptors separated by spaces, argv... (stdin, stdout, stderr
             unless tty; then the kept ones)
KILL   3     key, signal                                                        OK
STATE  4     -  (answered when init's start is over, if one is under way)       OK: shim's pid, init's pid or 0, "running" |
                                                                                "exited" | "none", code, signal, time_ns
FDS    5     "take" to give stdin away                                          OK: names (descriptors)
RUN    6     argv...                                                            OK: exit code
END    7     -                                                                  OK, then the shim is gone
WARM   8     path of a cgroup.procs (zygote only)                               none
OK     64    reply
FAILED 65    errno, or 0; the runtime's exit code; what failed                  reply
EXITED 66    pushed, serial 0: key, code, signal, time_ns
====== ===== ================================================================== ==========================================
"""

from __future__ import annotations

import _socket
import errno
import os
import select
import struct
import time

VERSION = 1
FORK, SPAWN, KILL, STATE, FDS, RUN, END, WARM = 1, 2, 3, 4, 5, 6, 7, 8
OK, FAILED, EXITED = 64, 65, 66

MAX_MESSAGE_BYTES = 128 * 1024  # below the default socket buffer (208 KiB); argv here is a runtime's, never the container's
MAX_FDS = 16
SOCKET_NAME = "shim.sock"
EXIT_NAME = "exit"

_HEAD = struct.Struct(">BBIH")
_LENGTH = struct.Struct(">I")
_MSG_CMSG_CLOEXEC = 0x40000000
_SIGCHLD, _SIGPIPE, _SIGXFSZ = 17, 13, 25
_TIOCSWINSZ = 0x5414
_OOM_SCORE_ADJ = b"-998"  # the last to go: it keeps the exit status


class ProtocolError(Exception):
    """Bytes that aren't a message of this protocol."""


def encode(kind: int, serial: int, fields: list[bytes]) -> bytes:
    """One message's bytes."""
    parts = [_HEAD.pack(VERSION, kind, serial, len(fields))]
    for field in fields:
        parts.append(_LENGTH.pack(len(field)))
        parts.append(field)
    return b"".join(parts)


def decode(data: bytes) -> tuple[int, int, list[bytes]]:
    """(kind, serial, fields) of one message; ``ProtocolError`` if it isn't one."""
    if len(data) < _HEAD.size:
        raise ProtocolError("short message")
    version, kind, serial, count = _HEAD.unpack_from(data)
    if version != VERSION:
        raise ProtocolError(f"version {version}")
    at = _HEAD.size
    fields = []
    for _ in range(count):
        if at + 4 > len(data):
            raise ProtocolError("truncated field")
        (size,) = _LENGTH.unpack_from(data, at)
        at += 4
        if at + size > len(data):
            raise ProtocolError("truncated field")
        fields.append(data[at : at + size])
        at += size
    if at != len(data):
        raise ProtocolError("trailing bytes")
    return kind, serial, fields


def send_message(sock: _socket.socket, data: bytes, fds: list[int] | tuple[int, ...] = ()) -> None:
    """Send one datagram with descriptors; the descriptors stay the caller's. OSError as sendmsg(2)."""
    if fds:
        rights = struct.pack(f"{len(fds)}i", *fds)
        sock.sendmsg([data], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
    else:
        sock.send(data)


def receive_message(sock: _socket.socket) -> tuple[bytes, list[int]]:
    """One datagram and its descriptors (close-on-exec, the caller's to close). Empty bytes: the peer is gone."""
    data, ancillary, flags, _ = sock.recvmsg(MAX_MESSAGE_BYTES, _socket.CMSG_SPACE(4 * MAX_FDS), _MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, type_, rights in ancillary:
        if level == _socket.SOL_SOCKET and type_ == _socket.SCM_RIGHTS:
            count = len(rights) // 4
            fds.extend(struct.unpack(f"{count}i", rights[: 4 * count]))
    if flags & (_socket.MSG_TRUNC | _socket.MSG_CTRUNC):
        close_all(fds)
        raise ProtocolError("message too large")
    return data, fds


def close_all(fds: list[int]) -> None:
    """Close every descriptor of the list and empty it."""
    while fds:
        try:
            os.close(fds.pop())
        except OSError:
            pass


def exit_of(status: int) -> tuple[int, int]:
    """(exit code, signal) of a wait status; the code is 128 + signal if a signal ended it."""
    if os.WIFSIGNALED(status):
        signal = os.WTERMSIG(status)
        return 128 + signal, signal
    return os.WEXITSTATUS(status), 0


class _Operation:
    """A runtime process at work: what to do when it ends."""

    def __init__(self, conn: _Connection, serial: int, key: bytes | None) -> None:
        self.conn = conn
        self.serial = serial
        self.key = key  # None: a RUN
        self.pid_file = b""
        self.listener: _socket.socket | None = None
        self.console = b""
        self.size = (0, 0)
        self.master = -1
        self.kept: dict[bytes, int] = {}


class _Connection:
    def __init__(self, sock: _socket.socket) -> None:
        self.sock = sock
        self.open = True


class _Shim:
    """The state and the loop of one shim."""

    def __init__(self, first: _socket.socket, wakeup: int) -> None:
        self.poll = select.poll()
        self.connections: dict[int, _Connection] = {}
        self.operations: dict[int, _Operation] = {}  # by the runtime's pid
        self.consoles: dict[int, _Operation] = {}  # by the console listener's descriptor
        self.init_pid = 0
        self.exit: tuple[int, int, int] | None = None
        self.execs: dict[int, tuple[bytes, int]] = {}  # pid → key, master or -1
        self.strays: dict[int, tuple[int, int]] = {}  # reaped before the runtime told whose they are: pid → status, time
        self.kept: dict[bytes, int] = {}
        self.waiting: list[tuple[_Connection, int]] = []
        self.counter = 0
        self.ending = False
        self.wakeup = wakeup
        self.null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self.oom_fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        self.adjust_oom(_OOM_SCORE_ADJ)
        self.listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
        try:
            os.unlink(SOCKET_NAME)
        except FileNotFoundError:
            pass
        self.listener.bind(SOCKET_NAME)
        self.listener.listen(8)
        self.listener.setblocking(False)
        self.poll.register(self.listener.fileno(), select.POLLIN)
        self.poll.register(wakeup, select.POLLIN)
        self.add_connection(first)

    def add_connection(self, sock: _socket.socket) -> None:
        sock.setblocking(False)
        self.connections[sock.fileno()] = _Connection(sock)
        self.poll.register(sock.fileno(), select.POLLIN)

    def drop_connection(self, conn: _Connection) -> None:
        if conn.open:
            conn.open = False
            fd = conn.sock.fileno()
            self.poll.unregister(fd)
            del self.connections[fd]
            conn.sock.close()

    def run(self) -> None:
        while not self.ending:
            if not self.connections and not self.operations and (not self.init_pid and self.exit is None):
                return  # no container and nobody who could ask for one
            for fd, _ in self.poll.poll():
                if fd == self.wakeup:
                    os.read(fd, 512)
                    self.reap()
                elif fd == self.listener.fileno():
                    try:
                        accepted, _address = self.listener._accept()  # type: ignore[attr-defined]
                    except OSError:
                        continue
                    self.add_connection(_socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, accepted))
                elif fd in self.consoles:
                    self.take_master(self.consoles[fd])
                elif fd in self.connections:
                    self.serve(self.connections[fd])

    def serve(self, conn: _Connection) -> None:
        fds: list[int] = []
        try:
            data, fds = receive_message(conn.sock)
            if not data:
                self.drop_connection(conn)
                return
            kind, serial, fields = decode(data)
        except BlockingIOError:
            return
        except (OSError, ProtocolError):
            close_all(fds)
            self.drop_connection(conn)
            return
        try:
            self.handle(conn, kind, serial, fields, fds)
        except OSError as error:
            self.reply(conn, FAILED, serial, [b"%d" % (error.errno or 0), b"0", str(error).encode()])
        except (ValueError, IndexError) as error:
            self.reply(conn, FAILED, serial, [b"%d" % errno.EINVAL, b"0", str(error).encode()])
        finally:
            close_all(fds)

    def handle(self, conn: _Connection, kind: int, serial: int, fields: list[bytes], fds: list[int]) -> None:
        if kind == SPAWN:
            self.spawn(conn, serial, fields, fds)
        elif kind == KILL:
            self.kill(fields[0], int(fields[1]))
            self.reply(conn, OK, serial, [])
        elif kind == STATE:
            if any(operation.key == b"" for operation in self.operations.values()):
                self.waiting.append((conn, serial))  # init is being started: whoever asks needs to know how that went
            else:
                self.reply_state(conn, serial)
        elif kind == FDS:
            self.reply(conn, OK, serial, list(self.kept), list(self.kept.values()))
            if fields and fields[0] == b"take" and b"stdin" in self.kept:
                os.close(self.kept.pop(b"stdin"))
        elif kind == RUN:
            pid = self.execute(fields, [self.null, self.null, self.null])
            self.operations[pid] = _Operation(conn, serial, None)
        elif kind == END:
            self.reply(conn, OK, serial, [])
            self.ending = True
        else:
            self.reply(conn, FAILED, serial, [b"%d" % errno.ENOSYS, b"0", b"unknown request"])

    def reply_state(self, conn: _Connection, serial: int) -> None:
        code, signal, time_ns = self.exit or (0, 0, 0)
        word = b"exited" if self.exit else (b"running" if self.init_pid else b"none")
        numbers = [b"%d" % number for number in (code, signal, time_ns)]
        self.reply(conn, OK, serial, [b"%d" % os.getpid(), b"%d" % self.init_pid, word, *numbers])

    def reply(self, conn: _Connection, kind: int, serial: int, fields: list[bytes], fds: list[int] | None = None) -> None:
        if not conn.open:
            return
        try:
            send_message(conn.sock, encode(kind, serial, fields), fds or ())
        except OSError:
            self.drop_connection(conn)  # gone, or it doesn't read: it'll ask for the state when it is back

    def adjust_oom(self, score: bytes) -> None:
        try:
            os.write(self.oom_fd, score)
        except OSError:  # without CAP_SYS_RESOURCE it can't be lowered
            pass

    def execute(self, argv: list[bytes], stdio: list[int]) -> int:
        # The runtime starts from the kernel's default, not from ours: crun takes an oomScoreAdj of 0 for none and would let the
        # container have what it inherited.
        self.adjust_oom(b"0")
        try:
            # Python ignores SIGPIPE and SIGXFSZ; an ignored signal is inherited through exec, down to the container's init.
            return os.posix_spawn(
                argv[0],
                argv,
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, stdio[number], number) for number in range(3)],
                setsigdef=(_SIGPIPE, _SIGXFSZ, _SIGCHLD),
                setsigmask=(),
            )
        finally:
            self.adjust_oom(_OOM_SCORE_ADJ)

    def spawn(self, conn: _Connection, serial: int, fields: list[bytes], fds: list[int]) -> None:
        key, tty, rows, columns, pid_file, names = fields[:6]
        argv = fields[6:]
        if not key and (self.init_pid or self.exit):
            raise OSError(errno.EALREADY, "init was already started")
        operation = _Operation(conn, serial, key)
        operation.pid_file = pid_file
        stdio = [self.null, self.null, self.null]
        kept = names.split()
        first_kept = 0 if tty == b"1" else 3
        if len(fds) != first_kept + len(kept):
            raise ValueError("wrong number of descriptors")
        if tty == b"1":
            operation.size = (int(rows), int(columns))
            self.counter += 1
            operation.console = b"console%d" % self.counter
            listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
            operation.listener = listener
            listener.bind(operation.console)
            listener.listen(1)
            listener.setblocking(False)
            at = argv.index(b"{console}")
            argv[at] = operation.console
            self.consoles[listener.fileno()] = operation
            self.poll.register(listener.fileno(), select.POLLIN)
        else:
            stdio = fds[:3]
        try:
            pid = self.execute(argv, stdio)
        except OSError:
            self.close_console(operation)
            raise
        for name, fd in zip(kept, fds[first_kept:], strict=True):
            operation.kept[name] = fd
        del fds[first_kept:]
        self.operations[pid] = operation

    def take_master(self, operation: _Operation) -> None:
        """The runtime has connected to the console socket: its one message carries the pty master."""
        if operation.listener is None:
            return
        try:
            accepted, _address = operation.listener._accept()  # type: ignore[attr-defined]
        except OSError:
            return
        conn = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, accepted)
        try:
            conn.settimeout(5)  # the sender is the runtime, at most about to send
            _, fds = receive_message(conn)
        except (OSError, ProtocolError):
            fds = []
        conn.close()
        if fds:
            operation.master = fds.pop(0)
            close_all(fds)
            if operation.size != (0, 0):
                set_window_size(operation.master, *operation.size)
        self.close_console(operation)

    def close_console(self, operation: _Operation) -> None:
        if operation.listener is not None:
            self.poll.unregister(operation.listener.fileno())
            del self.consoles[operation.listener.fileno()]
            operation.listener.close()
            operation.listener = None
            try:
                os.unlink(operation.console)
            except OSError:
                pass

    def kill(self, key: bytes, signal: int) -> None:
        if not key:
            if not self.init_pid or self.exit:
                raise ProcessLookupError(errno.ESRCH, "no such process")
            os.kill(self.init_pid, signal)
            return
        for pid, (name, _) in self.execs.items():
            if name == key:
                os.kill(pid, signal)
                return
        raise ProcessLookupError(errno.ESRCH, "no such process")

    def reap(self) -> None:
        finished: list[tuple[_Operation, int]] = []
        init: tuple[int, int] | None = None
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            now = time.time_ns()
            if pid in self.operations:
                finished.append((self.operations.pop(pid), status))
            elif pid == self.init_pid and self.exit is None:
                init = (status, now)
            elif pid in self.execs:
                self.exec_exited(pid, status, now)
            else:
                self.strays[pid] = (status, now)
        if init is not None:  # after the execs that ended with it: its end is the end of those nobody heard of
            self.init_exited(*init)
        for operation, status in finished:
            self.finish(operation, status)
            if operation.key == b"":
                for conn, serial in self.waiting:
                    self.reply_state(conn, serial)
                self.waiting.clear()
        if not self.operations:
            self.strays.clear()  # a container's orphans, nobody asks for them

    def finish(self, operation: _Operation, status: int) -> None:
        """A runtime process has ended."""
        code, _ = exit_of(status)
        if operation.key is None:
            self.reply(operation.conn, OK, operation.serial, [b"%d" % code])
            return
        self.take_master(operation)
        self.close_console(operation)
        pid = 0
        if code == 0:
            try:
                fd = os.open(operation.pid_file, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    pid = int(os.read(fd, 32))
                finally:
                    os.close(fd)
            except (OSError, ValueError):
                pid = 0
        if pid == 0:
            close_all(list(operation.kept.values()))
            if operation.master >= 0:
                os.close(operation.master)
            self.reply(operation.conn, FAILED, operation.serial, [b"0", b"%d" % (code or 255), b"the runtime failed"])
            return
        masters = [operation.master] if operation.master >= 0 else []
        self.reply(operation.conn, OK, operation.serial, [b"%d" % pid], masters)
        early = self.strays.pop(pid, None)
        if not operation.key:
            self.init_pid = pid
            self.kept = operation.kept
            if masters:
                self.kept[b"tty"] = operation.master
            if early:
                self.init_exited(*early)
        else:
            self.execs[pid] = (operation.key, operation.master)
            if early:
                self.exec_exited(pid, *early)

    def init_exited(self, status: int, now: int) -> None:
        code, signal = exit_of(status)
        self.exit = (code, signal, now)
        save_exit(code, signal, now)
        self.push([b"", b"%d" % code, b"%d" % signal, b"%d" % now])

    def exec_exited(self, pid: int, status: int, now: int) -> None:
        code, signal = exit_of(status)
        key, master = self.execs.pop(pid)
        if master >= 0:
            os.close(master)
        self.push([key, b"%d" % code, b"%d" % signal, b"%d" % now])

    def push(self, fields: list[bytes]) -> None:
        for conn in list(self.connections.values()):
            self.reply(conn, EXITED, 0, fields)


def set_window_size(fd: int, rows: int, columns: int) -> None:
    """TIOCSWINSZ; a master that's already hung up is left alone."""
    import fcntl

    try:
        fcntl.ioctl(fd, _TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    except OSError:
        pass


def save_exit(code: int, signal: int, time_ns: int) -> None:
    """Write the exit status durably: complete under its name or not there at all."""
    try:
        fd = os.open("exit.tmp", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.write(fd, b"%d %d %d\n" % (code, signal, time_ns))
        os.fsync(fd)
        os.close(fd)
        os.rename("exit.tmp", EXIT_NAME)
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        os.fsync(directory)
        os.close(directory)
    except OSError:
        pass  # a full disk mustn't keep the status from those who are connected: it's in memory, too


def read_exit(text: bytes) -> tuple[int, int, int] | None:
    """(code, signal, time_ns) of an exit file's content; None if it isn't one."""
    try:
        code, signal, time_ns = (int(word) for word in text.split())
    except ValueError:
        return None
    return code, signal, time_ns


def _prctl(option: int, value: object) -> None:
    import ctypes

    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _become_shim(conn: _socket.socket, bundle: bytes, name: bytes) -> None:
    """In the forked child: turn into the shim of ``bundle``, and never return."""
    import _signal  # type: ignore[import-not-found]

    try:
        os.setsid()
        os.chdir(bundle)
        os.dup2(1, 2)  # /dev/null: whoever reads containerd's stderr mustn't wait for the container's end
        _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
        _prctl(15, b"pyx-s:" + name[:9])  # PR_SET_NAME, 15 bytes
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        _signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        _signal.signal(_SIGCHLD, lambda *_: None)
        _Shim(conn, reader).run()
    except BaseException as error:
        try:
            send_message(conn, encode(FAILED, 0, [b"0", b"0", repr(error).encode()]))
        except OSError:
            pass
        os._exit(1)
    os._exit(0)


def _warm(path: bytes) -> None:
    """Move this short-lived process into a cgroup: the first migration after a while waits for an RCU grace period (about 16 ms),
    the next ones don't; so the runtime's, moments later, find the way already free."""
    _enter_cgroup(path)
    os._exit(0)


def _enter_cgroup(procs: bytes | str) -> None:
    """Move this process into the cgroup whose cgroup.procs that is, as far as that's possible."""
    try:
        fd = os.open(procs, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.write(fd, b"0")
    except OSError:
        pass
    os.close(fd)


def zygote(control: int) -> None:
    """Fork shims on request until the other end of ``control`` is closed."""
    import _signal
    import gc

    _signal.signal(_SIGCHLD, _signal.SIG_IGN)  # shims aren't waited for: the kernel reaps them
    _signal.signal(2, _signal.SIG_IGN)  # a terminal's ctrl-c is for the foreground program, the zygote follows containerd
    import fcntl  # noqa: F401  loaded here once, shared by every shim
    import sys

    for path in sys.argv[1:]:
        _enter_cgroup(path)

    _prctl(15, b"pyx-zygote")
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, control)
    os.set_inheritable(control, False)
    gc.disable()
    gc.collect()
    gc.freeze()
    while True:
        try:
            data, fds = receive_message(sock)
        except InterruptedError:
            continue
        except (OSError, ProtocolError):
            return
        if not data:
            return
        try:
            kind, _, fields = decode(data)
            if kind == FORK and len(fds) == 1:
                if os.fork() == 0:
                    conn = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fds[0])
                    sock.close()
                    _become_shim(conn, fields[0], fields[1])
            elif kind == WARM and os.fork() == 0:
                _warm(fields[0])
        except (OSError, ProtocolError, IndexError):
            pass  # the connection is closed below: that's the answer
        close_all(fds)


if __name__ == "__main__":
    zygote(3)
    os._exit(0)
