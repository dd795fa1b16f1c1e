"""A call whose process's terminal or pipes are ours: run, start -a, attach and exec share this one loop.

One poll() waits for the bus, the container's output, our own stdin, room in the container's input and in our own output, and
signals. Nothing in it blocks but poll itself, so that no side can hold up another: a full stdout only pauses reading the
output, a full input only pauses reading stdin.

If the bus or containerd goes away after the start, the output pipe goes on (it's logd's), and the loop asks for the exit
status again, by ``containerd.wait``, as soon as they're back.
"""

from __future__ import annotations

import os
import select
import sys
import time

from .demux import STDERR, Demux
from .grammar import CliError
from .sink import Sink
from .terminal import DetachScanner, RawMode, set_window_size, window_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Sequence

    from pyx_bus.session import Incoming
    from pyx_bus.sync import Connection
else:
    import _signal as signal  # the signal module proper costs an import of enum

# Stopping and continuing are between the user's shell and this process; SIGWINCH is a terminal's, SIGPIPE an error code here.
# glibc keeps 32 and 33 to itself.
_NOT_PROXIED = {"SIGKILL", "SIGSTOP", "SIGCHLD", "SIGCLD", "SIGPIPE", "SIGURG", "SIGWINCH", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGCONT",
                "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGIOT", "SIGTRAP", "SIGSYS", "SIGPROF", "SIGVTALRM"}  # fmt: skip
PROXIED = sorted(
    {
        int(getattr(signal, name))
        for name in dir(signal)
        if name.startswith("SIG") and not name.startswith(("SIG_", "SIGRT")) and name not in _NOT_PROXIED
    }
)
_ENDING = (int(signal.SIGHUP), int(signal.SIGINT), int(signal.SIGQUIT), int(signal.SIGTERM))

_PIPE_CHUNK = 4096  # PIPE_BUF: a write this small to a pipe that polls writable doesn't block
_TTY_CHUNK = 512
_READ = 1 << 18
_SILENCE_S = 1.0  # after an exec has ended, how long others who still hold its output (its background children) may be silent
_RECOVER_S = 120.0


class Foreground:
    """``run`` returns the exit code, or None if the user detached."""

    def __init__(
        self,
        connect: Callable[[], Connection],
        *,
        tty: bool = False,
        stdin: bool = False,
        proxy: bool = True,
        detach_keys: bytes = b"",
        container: str = "",
        is_exec: bool = False,
        redraw: bool = False,
        on_item: Callable[[dict[str, object]], None] | None = None,
    ) -> None:
        self._connect = connect
        self._connection: Connection | None = None
        self._tty = tty
        self._stdin = stdin
        self._proxy = proxy and not tty and not is_exec
        self._scanner = DetachScanner(detach_keys if tty and stdin else b"")
        self._raw = RawMode(0) if tty and stdin else None
        self._is_exec = is_exec
        self._redraw_wanted = redraw
        self._on_item = on_item
        self.container = container
        self.started = False
        self._serial = 0
        self._status: dict[str, object] | None = None
        self._ended_at = 0.0
        self._detached = False
        self._outputs: dict[int, Demux | int] = {}
        self._input = -1
        self._typed = b""
        self._sink = Sink()
        self._signals: list[int] = []
        self._wakeup = (-1, -1)
        self._previous_wakeup = -1
        self._lost_at = 0.0
        self._retry_at = 0.0
        self._tried_at = -100.0
        self._looking_for_death = 0.0
        self._size = (0, 0)
        self._told_size = (0, 0)  # containerd knows of; it makes an event of each
        self._exec_id = ""

    # -- what the command sets up before run() --

    def add_output(self, fd: int, target: Demux | int) -> None:
        """Read ``fd`` until its end; ``target`` is a demultiplexer, or 1 or 2."""
        os.set_blocking(fd, False)
        self._outputs[fd] = target

    def set_input(self, fd: int) -> None:
        """The write end that gets our stdin (used once the process has started)."""
        self._input = fd

    def run(self, method: str, body: dict[str, object], fds: Sequence[int] = ()) -> int | None:
        """Make the call and see it through. ``fds`` are closed here once they're sent."""
        attach = body.get("attach")
        if isinstance(attach, dict):
            self._told_size = attach.get("rows", 0), attach.get("columns", 0)
        try:
            self._watch_signals()
            try:
                self._connection = self._connect()
                self._serial = self._connection.open(method, body, fds)
            finally:
                for fd in fds:
                    os.close(fd)
            while not self._finished():
                self._step()
            self._sink.drain()
        finally:
            if self._raw is not None:
                self._raw.leave()
            self._unwatch_signals()
            for fd in (*self._outputs, self._input):
                if fd >= 0:
                    os.close(fd)
            if self._detached:
                self._tell_detached()
            if self._connection is not None:
                self._connection.close()
        if self._detached:
            os.write(2, b"read escape sequence\n")
            return None
        status = self._status or {}
        if status.get("error"):
            os.write(2, f"pyx: {status['error']}\n".encode())
        code = status.get("exit_code", 0)
        return code if isinstance(code, int) else 0

    def _tell_detached(self) -> None:
        """The detach becomes an event. It has happened all the same if nobody is there to hear of it."""
        from pyx_bus.errors import BusError

        if self._connection is not None:
            try:
                self._connection.call("containerd.detach", {"container": self.container, "exec_id": self._exec_id}, timeout_s=2)
            except BusError:
                pass

    # -- the loop --

    def _finished(self) -> bool:
        if self._detached:
            return True
        if self._status is None:
            return False
        if not self._outputs:
            return True
        # An exec's pipes are the process's own: a background child may keep them open for ever.
        return self._is_exec and not self._sink.full and time.monotonic() - self._ended_at > _SILENCE_S

    def _step(self) -> None:
        poller = select.poll()
        connection, sink = self._connection, self._sink
        timeout_ms: int | None = None
        if connection is not None:
            poller.register(connection.fileno(), select.POLLIN)
            if connection.pending():
                timeout_ms = 0
        poller.register(self._wakeup[0], select.POLLIN)
        if sink.blocked_on >= 0:
            poller.register(sink.blocked_on, select.POLLOUT)
        # Not before the start is known: a terminal has to be raw when the first output reaches it.
        if not sink.full and (self.started or self._status is not None):
            for fd in self._outputs:
                poller.register(fd, select.POLLIN)
        if self._input >= 0 and self.started and self._stdin:
            if self._typed:
                poller.register(self._input, select.POLLOUT)
            else:
                poller.register(0, select.POLLIN)
        now = time.monotonic()
        for moment in (self._retry_at, self._looking_for_death, self._ended_at + _SILENCE_S if self._ended_at else 0.0):
            if moment and timeout_ms != 0:
                left = max(0, int((moment - now) * 1000) + 1)
                timeout_ms = left if timeout_ms is None else min(timeout_ms, left)
        ready = dict(poller.poll(timeout_ms))
        if self._wakeup[0] in ready:
            self._read_signals()
        if sink.full and self._ended_at:
            self._ended_at = time.monotonic()  # it isn't silent: we haven't listened
        if sink.blocked_on >= 0 and sink.blocked_on in ready:
            sink.flush()
        for fd in [fd for fd in self._outputs if fd in ready]:
            self._read_output(fd)
        if self._input >= 0 and self.started:
            if self._typed and self._input in ready:
                self._write_input()
            elif 0 in ready and not self._typed:
                self._read_stdin()
        if connection is not None and (connection.pending() or connection.fileno() in ready):
            self._read_bus()
        if self._retry_at and time.monotonic() >= self._retry_at:
            self._recover()
        if self._looking_for_death and time.monotonic() >= self._looking_for_death:
            raise CliError(f"container {self.container[:12]} was removed while the bus was away: its exit code isn't known", 125)

    def _read_output(self, fd: int) -> None:
        try:
            data = os.read(fd, _READ)
        except BlockingIOError:
            return
        except OSError:  # EIO: a pty whose other side is closed
            data = b""
        target = self._outputs[fd]
        if not data:
            del self._outputs[fd]
            os.close(fd)
            return
        if self._ended_at:
            self._ended_at = time.monotonic()
        if isinstance(target, int):
            self._sink.write(target, data)
            return
        for stream, payload in target.feed(data):
            self._sink.write(2 if stream == STDERR else 1, payload)

    def _read_stdin(self) -> None:
        try:
            data = os.read(0, _READ)
        except BlockingIOError:
            return  # somebody else set O_NONBLOCK on it
        except OSError:
            data = b""
        if not data:
            self._close_input()
            return
        self._typed, self._detached = self._scanner.feed(data)
        if self._typed:
            self._write_input()

    def _write_input(self) -> None:
        """One write no larger than what a ready descriptor takes without blocking."""
        try:
            written = os.write(self._input, self._typed[: _TTY_CHUNK if self._tty else _PIPE_CHUNK])
        except BlockingIOError:
            return
        except OSError:  # EPIPE, EIO: the process doesn't read any more
            self._typed = b""
            self._close_input()
            return
        self._typed = self._typed[written:]

    def _close_input(self) -> None:
        if self._input >= 0:
            os.close(self._input)
            self._input = -1

    # -- the bus --

    def _read_bus(self) -> None:
        from pyx_bus import errors

        assert self._connection is not None
        try:
            while True:
                message = self._connection.receive(0)
                if message is None:
                    return
                self._message(message)
        except errors.Unavailable:
            if not self.started or self._status is not None:
                raise
            self._connection.close() if self._connection is not None else None
            self._connection = None
            self._again()

    def _message(self, message: Incoming) -> None:
        from pyx_bus import errors

        if message.kind == "event":
            self._event(message)
        elif message.serial != self._serial:
            pass  # the answer to a proxied signal: a process that has just ended can't be signalled, and that's fine
        elif message.kind == "item":
            self._item(message)
        elif message.kind == "result":
            self._status = message.body
            if self._is_exec:
                self._ended_at = time.monotonic()
        elif message.kind == "error":
            error = message.error()
            if self.started and isinstance(error, errors.Unavailable):
                self._again()
            elif self._lost_at and isinstance(error, errors.NotFound):
                self._look_for_death()
            else:
                raise error

    def _item(self, message: Incoming) -> None:
        body = message.body
        phase = body.get("phase")
        if phase in ("created", "started") and body.get("id") and not self._is_exec:
            self.container = str(body["id"])
        if self._is_exec:
            self._exec_id = str(body.get("exec_id", ""))
        fds, message.fds = message.fds, []
        if self._on_item is not None:
            self._on_item(body)
        if phase != "started":
            for fd in fds:
                os.close(fd)
            return
        self.started = True
        if fds:
            self._take_input(fds[0])
            for fd in fds[1:]:
                os.close(fd)
        if self._raw is not None and self._input >= 0:
            self._raw.enter()
        pending, self._signals = self._signals, []
        for number in pending:
            self._signal(number)

    def _take_input(self, fd: int) -> None:
        """A pipe's write end, or the pty master: of an exec it's also where the output comes from."""
        if not self._tty:
            self._input = fd
            return
        self._size = (0, 0)
        if self._is_exec:
            self._outputs[fd] = 1  # left blocking: the description is the shim's too
            if not self._stdin:
                self._input = os.dup(fd)
                self._resize()
                return
            fd = os.dup(fd)
        self._input = fd
        self._resize()

    def _resize(self) -> None:
        size = window_size(0 if self._raw is not None else 1)
        if self._tty and self._input >= 0 and size != (0, 0) and size != self._size:
            self._size = size
            if self._redraw_wanted:
                # A full-screen program paints itself anew on a change of the size: make sure that there is one.
                self._redraw_wanted = False
                set_window_size(self._input, size[0] + 1, size[1])
            set_window_size(self._input, *size)  # at once, and whether or not anybody is there to be told
            if not self._is_exec and size != self._told_size and self._connection is not None:
                self._told_size = size
                self._send("containerd.resize", {"container": self.container, "rows": size[0], "columns": size[1]})

    def _again(self) -> None:
        now = time.monotonic()
        if now - self._tried_at > 5:  # the last attempt held for a while: this is another loss
            self._lost_at = now
        if self._is_exec:
            raise CliError("lost the service that held the command's exit code; the command itself goes on", 125)
        if now - self._lost_at > _RECOVER_S:
            raise CliError(f"the bus hasn't come back within {_RECOVER_S:.0f} s; the container goes on", 125)
        self._retry_at = now + 0.1

    def _recover(self) -> None:
        from pyx_bus import errors

        self._retry_at, self._tried_at = 0.0, time.monotonic()
        try:
            if self._connection is None:
                self._connection = self._connect()
            self._serial = self._connection.open("containerd.wait", {"container": self.container})
        except (errors.Unavailable, CliError):
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            self._again()

    def _look_for_death(self) -> None:
        """It was removed (``--rm``) before we could ask: the journal of events still knows how it ended."""
        assert self._connection is not None
        self._looking_for_death = time.monotonic() + 3
        self._connection.subscribe(["container.die"], "beginning")

    def _event(self, message: Incoming) -> None:
        payload = message.body.get("payload")
        if isinstance(payload, dict) and payload.get("id") == self.container:
            self._looking_for_death = 0.0
            self._status = {"exit_code": payload.get("exit_code", 0)}

    # -- signals --

    def _watch_signals(self) -> None:
        read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._wakeup = (read, write)
        self._previous_wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in PROXIED if self._proxy else _ENDING if self._tty or not self._is_exec else ():
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup stays nohup
                signal.signal(number, _noted)
        if self._tty:
            signal.signal(signal.SIGWINCH, _noted)

    def _unwatch_signals(self) -> None:
        if self._wakeup[0] < 0:
            return
        signal.set_wakeup_fd(self._previous_wakeup)
        for fd in self._wakeup:
            os.close(fd)
        self._wakeup = (-1, -1)

    def _read_signals(self) -> None:
        for number in os.read(self._wakeup[0], 256):
            self._signal(number)

    def _signal(self, number: int) -> None:
        if number == signal.SIGWINCH:
            self._resize()
        elif self._proxy and self.container and self._status is None:
            if not self.started:
                self._signals.append(number)
                return
            self._forward(number)
        elif number in _ENDING and self._status is None:
            # Still pulling, or signals aren't to be passed on: it's this command that was meant.
            if self._connection is not None and not self.started:
                self._connection.cancel(self._serial)
            raise Ended(number)

    def _forward(self, number: int) -> None:
        if self._connection is not None:
            self._send("containerd.kill", {"container": self.container, "signal": str(number)})

    def _send(self, method: str, body: dict[str, object]) -> None:
        """Call without waiting for the answer, which the loop passes over."""
        from pyx_bus import errors

        assert self._connection is not None
        try:
            self._connection.open(method, body)
        except errors.Unavailable:
            self._connection.close()
            self._connection = None
            self._again()


class Ended(CliError):
    """A signal ended this command; the status is what a shell shows for that."""

    def __init__(self, number: int) -> None:
        super().__init__("", 128 + number)


def _noted(number: int, frame: object) -> None:
    """The wake-up descriptor has it already."""


def connection_size() -> tuple[int, int]:
    """The size of the terminal the command runs on, for the call that starts a process with one."""
    for fd in (0, 1, 2):
        size = window_size(fd)
        if size != (0, 0):
            return size
    return 0, 0


def output_pipe() -> tuple[int, int]:
    """A pipe for a container's output, as large as an ordinary user may make it: fewer switches between logd and us."""
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        import fcntl

        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 1 << 18)
    except OSError:
        pass  # over the user's soft limit: 64 KiB will do
    return read, write


def flush_python_streams() -> None:
    """What print() still holds must come before what the loop writes."""
    sys.stdout.flush()
    sys.stderr.flush()
