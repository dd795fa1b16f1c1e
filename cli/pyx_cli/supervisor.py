"""The embedded supervisor: ``pyx system up`` where no systemd runs the services. Imported by ``system`` commands only.

It imports once what the services share, freezes it out of the garbage collector's sight, and forks each service from there: their
pages are shared, a restart costs a fork and not an interpreter start. It stays a single thread without an event loop of its
own: only then is forking safe.

- A service is its own process and session. It gets SIGTERM when the supervisor dies, however that happens; containers and their
  shims belong to neither and go on.
- What dies is started again: after 100 ms, then twice as long each time up to 10 s; who lived for 10 s begins anew.
- ``<run>/supervisor.pid`` is locked (flock) for as long as the supervisor lives, so a stale file says nothing.
  ``<run>/services`` lists the children, for the next supervisor to wait for those that outlived a killed one.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import select
import signal
import sys
import time
import traceback
from importlib import import_module, metadata
from pathlib import Path

from .grammar import CliError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_SHARED = ("trio", "anyio", "anyio._backends._trio", "msgpack", "msgspec", "structlog", "sqlite3", "httpx", "pyroute2", "tomllib")
_BACKOFF_FIRST_S, _BACKOFF_LAST_S, _STEADY_S = 0.1, 10.0, 10.0
_STOP_S = 15.0  # how long a service may take for its orderly end; it takes 10 s itself to finish what it has begun
_LOG_LIMIT = 8 << 20  # a log above this is moved aside (one predecessor is kept)
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_BROKER = "busd"
_BROKER_TRIES = 2  # so many may end before their time until it's said that it doesn't start
_FIRST_TO_STOP = "containerd"
_HANDLED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _Child:
    """One service: how it's started, and how it fares."""

    def __init__(self, name: str, module: str, function: str) -> None:
        self.name = name
        self.module = module
        self.function = function
        self.pid = 0
        self.started_at = 0.0
        self.backoff_s = _BACKOFF_FIRST_S
        self.start_at = 0.0


def services() -> list[_Child]:
    """Every service the distribution installs (its ``pyx-*`` commands), the broker first."""
    found = []
    for entry in metadata.distribution("pyx").entry_points:
        if entry.group == "console_scripts" and entry.name.startswith("pyx-") and entry.name != "pyx-shim":
            found.append(_Child(entry.name[4:], entry.module, entry.attr))
    return sorted({child.name: child for child in found}.values(), key=lambda child: (child.name != _BROKER, child.name))


def _start_time(pid: int) -> str:
    """When a process started, in the kernel's ticks: tells it from a later one with the same number. Empty if there's none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]


def _log(message: str) -> None:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    os.write(2, f"timestamp={stamp}Z service=supervisor event={message!r}\n".encode())


class Stack:
    """A stack by its directories: ``up`` makes this process (or a child of it) its supervisor."""

    def __init__(self, root: str, run: str) -> None:
        self.root = Path(root).absolute()
        self.run = Path(run).absolute()
        self._lock = -1

    @property
    def _pidfile(self) -> Path:
        return self.run / "supervisor.pid"

    def supervisor_pid(self) -> int:
        """The living supervisor's process ID, 0 if there's none."""
        try:
            fd = os.open(self._pidfile, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.read(fd, 32).strip()
            return int(text) if text.isdigit() else 0
        finally:
            os.close(fd)
        return 0

    def up(self, detach: bool, timeout_s: float) -> int:
        """Start the stack. Returns when it ended, or with ``detach`` as soon as every service serves (at once if all do already)."""
        if os.geteuid() != 0:
            raise CliError("the stack needs root: mounts, namespaces and networks are made by it")
        self._directories()
        running = self._take_lock()
        if running and detach:
            sys.stderr.write(f"the stack in {self.run} is already running\n")
            return self._await_ready(running, timeout_s, ours=False)
        if running:
            raise CliError(f"the stack in {self.run} is already running (supervisor {running})", 1, "stop it with: pyx system down")
        os.environ.update(PYX_ROOT=str(self.root), PYX_RUN=str(self.run), PYX_BUS=str(self.run / "bus.sock"))
        if not detach:
            self._outlive_predecessors()
            return Supervisor(self, to_files=False).main()
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._become_daemon()
        os.close(self._lock)
        return self._await_ready(pid, timeout_s)

    def _directories(self) -> None:
        for path, mode in ((self.root, 0o711), (self.run, 0o755)):
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(mode)
            try:
                import grp

                os.chown(path, 0, grp.getgrnam("pyx").gr_gid)
            except KeyError:
                pass  # no such group: root alone uses the stack

    def _take_lock(self) -> int:
        """Become the one supervisor of this stack: 0, or the process ID of the one there is."""
        self._lock = os.open(self._pidfile, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.read(self._lock, 32).strip()
            os.close(self._lock)
            return int(text) if text.isdigit() else -1
        return 0

    def write_pid(self) -> None:
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """In a forked service: the lock is the supervisor's alone."""
        os.close(self._lock)

    def _become_daemon(self) -> None:
        """The forked child: never returns."""
        status = 1
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            log = self.open_log("supervisor")
            os.dup2(null, 0)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(null)
            os.close(log)
            os.chdir("/")
            self._outlive_predecessors()
            status = Supervisor(self, to_files=True).main()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def log_path(self, name: str) -> Path:
        return self.run / f"{name}.log"

    def open_log(self, name: str) -> int:
        self.bound_log(name)
        return os.open(self.log_path(name), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)

    def bound_log(self, name: str) -> None:
        """Copy a log that has grown too large aside and empty it: its writers append to the same file."""
        path = self.log_path(name)
        try:
            if path.stat().st_size > _LOG_LIMIT:
                path.with_suffix(".log.1").write_bytes(path.read_bytes())
                os.truncate(path, 0)
        except FileNotFoundError:
            pass

    def _outlive_predecessors(self) -> None:
        """After ``kill -9`` of a supervisor its services got SIGTERM; two of a kind must not work on the same state."""
        try:
            lines = (self.run / "services").read_text().splitlines()
        except FileNotFoundError:
            return
        deadline = time.monotonic() + _STOP_S
        for line in lines:
            name, pid, started = [*line.split(), "", "", ""][:3]
            if not pid.isdigit() or not started or _start_time(int(pid)) != started:
                continue
            try:
                fd = os.pidfd_open(int(pid))
            except ProcessLookupError:
                continue
            try:
                poller = select.poll()
                poller.register(fd, select.POLLIN)
                if not poller.poll(max(0, (deadline - time.monotonic()) * 1000)):
                    _log(f"{name} of the previous supervisor (pid {pid}) doesn't end: killing it")
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                    poller.poll(5000)
            finally:
                os.close(fd)
        (self.run / "services").unlink(missing_ok=True)

    def service_pids(self) -> dict[str, int]:
        """What the supervisor wrote down last; its services are only those of that name and number."""
        try:
            lines = (self.run / "services").read_text().splitlines()
        except FileNotFoundError:
            return {}
        return {words[0]: int(words[1]) for words in map(str.split, lines) if len(words) > 1}

    def _await_ready(self, pid: int, timeout_s: float, *, ours: bool = True) -> int:
        """Wait until every service is registered on the bus; CliError with what the logs say if one isn't in time.

        ``ours``: the supervisor is our child, and may end while we wait.
        """
        from pyx_bus.errors import BusError
        from pyx_bus.sync import Connection

        deadline = time.monotonic() + timeout_s
        wanted = {child.name for child in services()} - {_BROKER}
        missing = set(wanted)
        brokers: set[int] = set()  # that were started and couldn't be reached
        connection: Connection | None = None
        while time.monotonic() < deadline:
            if ours and os.waitpid(pid, os.WNOHANG)[0]:
                raise CliError(f"the supervisor ended at once\n{self._tail('supervisor')}")
            try:
                if self._pidfile.read_text().strip() != str(pid):
                    time.sleep(0.01)  # it still waits for what a killed predecessor left: those don't count
                    continue
                if connection is None:
                    brokers.add(self.service_pids().get(_BROKER, 0))
                    connection = Connection(str(self.run / "bus.sock"), "pyx", 1.0)
                    brokers.clear()
                    connection.subscribe(["service.up"])
                found = connection.call("bus.services", timeout_s=2.0).get("services", [])
                pids = self.service_pids()
                there = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
                missing = wanted - {str(one["name"]) for one in there if pids.get(str(one["name"])) == one.get("pid")}
                if not missing:
                    connection.close()
                    return 0
                connection.receive(0.2)
            except (BusError, OSError):
                connection = None
                if len(brokers - {0}) > _BROKER_TRIES:
                    break  # it ends at each start: nobody can be ready without it
                time.sleep(0.01)  # between two looks at whether the broker listens yet
        if connection is None and brokers - {0}:
            raise CliError(
                f"the broker, {_BROKER}, doesn't start\n{self._tail(_BROKER)}".rstrip(), 1,
                f"the rest waits for it; the logs are in {self.run}, pyx system down stops it",
            )  # fmt: skip
        tails = "".join(self._tail(name) for name in sorted(missing))
        raise CliError(
            f"not ready within {timeout_s:g} s: {', '.join(sorted(missing))}\n{tails}".rstrip(), 1,
            f"the rest is running; the logs are in {self.run}, pyx system down stops it",
        )  # fmt: skip

    def _tail(self, name: str, lines: int = 8) -> str:
        try:
            text = self.log_path(name).read_text(errors="replace").splitlines()[-lines:]
        except OSError:
            return ""
        return f"--- {self.log_path(name)}\n" + "".join(f"{line}\n" for line in text)

    def down(self) -> int:
        """Stop the supervisor and wait for its end; what isn't running is fine."""
        pid = self.supervisor_pid()
        if not pid:
            sys.stderr.write(f"the stack in {self.run} isn't running\n")
            return 0
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return 0
        if self.supervisor_pid() != pid:  # it ended, and the number may be somebody else's already
            return 0
        signal.pidfd_send_signal(fd, signal.SIGTERM)
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        if not poller.poll((3 * _STOP_S + 10) * 1000):
            raise CliError(f"the supervisor (pid {pid}) doesn't end", 1, f"its log is {self.log_path('supervisor')}")
        os.close(fd)
        return 0


class Supervisor:
    """The loop: start, reap, start again; on SIGTERM or SIGINT stop everything, containerd first and the broker last."""

    def __init__(self, stack: Stack, to_files: bool) -> None:
        self._stack = stack
        self._to_files = to_files
        self._children = services()
        self._stopping = False
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._wakeup = (-1, -1)

    def main(self) -> int:
        self._wakeup = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
        for number in _HANDLED:
            signal.signal(number, lambda *_: None)
        self._stack.write_pid()
        os.environ.pop("NOTIFY_SOCKET", None)
        self._title("pyx-supervisor")
        self._import_shared()
        logs_at = time.monotonic() + 60
        while not self._stopping:
            now = time.monotonic()
            for child in self._children:
                if not child.pid and child.start_at <= now:
                    self._start(child)
            self._wait(min([child.start_at for child in self._children if not child.pid] + [logs_at]))
            if time.monotonic() >= logs_at:
                logs_at = time.monotonic() + 60
                for name in ("supervisor", *(child.name for child in self._children)) if self._to_files else ():
                    self._stack.bound_log(name)
        self._stop()
        return 0

    def _import_shared(self) -> None:
        for name in (*_SHARED, *(child.module for child in self._children)):
            try:
                import_module(name)
            except ImportError as error:
                _log(f"cannot import {name}: {error}")  # the service that needs it fails, and says so in its own log
        threads = len(os.listdir("/proc/self/task"))
        if threads != 1:
            _log(f"{threads} threads after the imports: forking isn't safe")
        gc.collect()
        gc.freeze()

    def _start(self, child: _Child) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        # Until the child has its own ways with signals ours would swallow its SIGTERM, and wake us by the pipe that is shared.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        try:
            pid = os.fork()
            if pid == 0:
                self._become(child, parent, before)
        except OSError as error:  # a limit on processes, or no memory: the others go on meanwhile
            _log(f"cannot start {child.name}: {error.strerror}; trying again in {_BACKOFF_LAST_S:g} s")
            child.start_at = time.monotonic() + _BACKOFF_LAST_S
            return
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        child.pid = pid
        child.started_at = time.monotonic()
        self._write_children()

    def _write_children(self) -> None:
        """Atomically, for a successor (see the module's docstring)."""
        text = "".join(f"{child.name} {child.pid} {_start_time(child.pid)}\n" for child in self._children if child.pid)
        path = self._stack.run / "services.new"
        path.write_text(text)
        path.rename(self._stack.run / "services")

    def _become(self, child: _Child, parent: int, mask: set[int]) -> None:
        """The forked service: never returns."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for fd in self._wakeup:
                os.close(fd)
            self._stack.release()
            os.setsid()
            self._libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
            if os.getppid() != parent:  # it died before we could ask to be told
                os._exit(1)
            self._title(f"pyx-{child.name}")
            null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            os.dup2(null, 0)
            os.close(null)
            if self._to_files:
                log = self._stack.open_log(child.name)
                os.dup2(log, 1)
                os.dup2(log, 2)
                os.close(log)
            sys.argv = [f"pyx-{child.name}"]
            entry: Callable[[], object] = getattr(import_module(child.module), child.function)
            result = entry()
            status = result if isinstance(result, int) else 0
        except SystemExit as error:
            if isinstance(error.code, int) or error.code is None:
                status = error.code or 0
            else:
                sys.stderr.write(f"{error.code}\n")
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)

    def _title(self, title: str) -> None:
        """What ps and top show: the thread's name (15 characters), and the memory the arguments were given in."""
        data = title.encode()
        self._libc.prctl(_PR_SET_NAME, data[:15], 0, 0, 0)
        try:
            fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
            start, end = int(fields[45]), int(fields[46])  # proc(5): arg_start (48), arg_end (49)
        except (OSError, ValueError, IndexError):
            return
        if 0 < start < end:
            ctypes.memmove(start, data.ljust(end - start, b"\0")[: end - start - 1] + b"\0", end - start)

    def _wait(self, until: float) -> None:
        poller = select.poll()
        poller.register(self._wakeup[0], select.POLLIN)
        if poller.poll(max(0, int((until - time.monotonic()) * 1000) + 1)):
            for number in os.read(self._wakeup[0], 256):
                if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                    self._stopping = True
        self._reap()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            for child in self._children:
                if child.pid == pid:
                    self._ended(child, status)

    def _ended(self, child: _Child, status: int) -> None:
        child.pid = 0
        if self._stopping:
            return
        now = time.monotonic()
        if now - child.started_at >= _STEADY_S:
            child.backoff_s = _BACKOFF_FIRST_S
        child.start_at = now + child.backoff_s
        code = os.waitstatus_to_exitcode(status)
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        _log(f"{child.name} ended ({how}); starting it again in {child.backoff_s:g} s")
        child.backoff_s = min(child.backoff_s * 2, _BACKOFF_LAST_S)

    def _stop(self) -> None:
        """SIGTERM to containerd, which needs the others to clean up after containers that have just ended; when it's gone to the
        other services, and then to the broker, so that their last events still get through."""
        first, last = ([c for c in self._children if c.name == name] for name in (_FIRST_TO_STOP, _BROKER))
        for group in (first, [c for c in self._children if c not in (*first, *last)], last):
            for child in group:
                if child.pid:
                    os.kill(child.pid, signal.SIGTERM)  # our unreaped child: the number can't be anybody else's
            deadline = time.monotonic() + _STOP_S
            while any(child.pid for child in group):
                now = time.monotonic()
                if now >= deadline:
                    for child in group:
                        if child.pid:
                            _log(f"{child.name} doesn't end: killing it")
                            os.kill(child.pid, signal.SIGKILL)
                    deadline = now + _STOP_S
                self._wait(deadline)
        (self._stack.run / "services").unlink(missing_ok=True)  # the pid file stays: unlocked it says that nobody is there
