"""One stack for all end-to-end tests: real processes, started and stopped by the command line; and a terminal to drive it by."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.images import busybox_tar

from pyx_bus.service import stack_prefix

PYX = Path(sys.executable).parent / "pyx"


def wait_for(condition: Callable[[], object], timeout_s: float = 10, what: str = "the condition") -> None:
    """Poll a condition nobody tells us of, up to a deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} didn't come true within {timeout_s} s")
        time.sleep(0.02)


@dataclass
class Stack:
    """A running stack and ``pyx`` on it."""

    root: Path
    run: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keep = {key: value for key, value in os.environ.items() if not key.startswith("PYX_")}
        self.env = {**keep, "PYX_ROOT": str(self.root), "PYX_RUN": str(self.run)}

    @property
    def prefix(self) -> str:
        return stack_prefix(self.run)

    def pyx(
        self, *args: str, input: str | None = None, timeout: float = 60, check: bool = False
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [PYX, *args], env=self.env, text=True, capture_output=True, timeout=timeout,
            **({"input": input} if input is not None else {"stdin": subprocess.DEVNULL}),
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"pyx {' '.join(args)} failed ({done.returncode}): {done.stderr}")
        return done

    def popen(self, *args: str, **options: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen([PYX, *args], env=self.env, **options)  # type: ignore[call-overload, no-any-return]

    def service_pid(self, name: str) -> int:
        """The process of a service, as the supervisor wrote it down."""
        for line in (self.run / "services").read_text().splitlines():
            if line.split()[0] == name:
                return int(line.split()[1])
        raise AssertionError(f"no service {name}")

    def state(self, container: str) -> str:
        return self.pyx("inspect", "--format", "{{.State.Status}}", container, check=True).stdout.strip()

    def leftovers(self) -> list[str]:
        """What of this stack the host still has: processes, mounts, links, tables, cgroups."""
        found = []
        mark = f"PYX_RUN={self.run}".encode()
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                if (
                    mark in (entry / "environ").read_bytes().split(b"\0")
                    or str(self.run) in (entry / "cmdline").read_text()
                ):
                    found.append(f"process {entry.name}: {(entry / 'cmdline').read_text()!r}")
            except OSError:
                continue
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if str(self.root) in line or str(self.run) in line:
                found.append(f"mount {line}")
        found += [f"link {name}" for name in os.listdir("/sys/class/net") if name.startswith(self.prefix)]
        tables = json.loads(subprocess.run(["nft", "-j", "list", "tables"], capture_output=True, check=True).stdout)[
            "nftables"
        ]
        names = [entry["table"]["name"] for entry in tables if "table" in entry]
        found += [f"table {name}" for name in names if name.startswith((self.prefix, self.prefix.replace("-", "_")))]
        for directory, children, _ in os.walk("/sys/fs/cgroup"):
            found += [f"cgroup {directory}/{name}" for name in children if name.startswith(self.prefix)]
        return found


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Started once, with the image ``busybox``; at the end everything is removed, and nothing may be left on the host."""
    base = tmp_path_factory.mktemp("stack")
    stack = Stack(base / "root", base / "run")
    started = stack.pyx("system", "up", "--detach")
    try:
        assert started.returncode == 0, started.stderr
        stack.pyx("import", str(busybox_tar(base / "busybox.tar")), "busybox", check=True)
        yield stack
        ids = stack.pyx("ps", "-aq", check=True).stdout.split()
        if ids:
            stack.pyx("rm", "-f", "-v", *ids, check=True)
    finally:
        stack.pyx("system", "down", check=True)
    wait_for(lambda: not stack.leftovers(), 10, f"a clean host; left: {stack.leftovers()}")


class Terminal:
    """A command on a pseudo-terminal of its own, as a person would sit at it."""

    def __init__(self, argv: list[str], env: dict[str, str], rows: int = 24, columns: int = 80) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            try:
                os.execve(argv[0], argv, env)
            finally:
                os._exit(127)
        self.resize(rows, columns)
        self.text = ""
        self.status: int | None = None

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def flags(self) -> tuple[bool, bool]:
        """(echo, canonical) of the terminal: both on in its ordinary state."""
        local = termios.tcgetattr(self.fd)[3]
        return bool(local & termios.ECHO), bool(local & termios.ICANON)

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self.fd], [], [], timeout_s)[0]:
            return False
        try:
            data = os.read(self.fd, 65536)
        except OSError:
            data = b""
        self.text += data.decode(errors="replace")
        return bool(data)

    def expect(self, wanted: str, timeout_s: float = 15) -> str:
        """Read until ``wanted`` shows; what came before it. Later calls look at what follows."""
        deadline = time.monotonic() + timeout_s
        while wanted not in self.text:
            left = deadline - time.monotonic()
            if left <= 0 or not self._read(left):
                raise AssertionError(f"{wanted!r} never showed up; there was {self.text!r}")
        before, _, self.text = self.text.partition(wanted)
        return before

    def wait(self, timeout_s: float = 15) -> int:
        """The exit status; output goes on being read meanwhile."""
        deadline = time.monotonic() + timeout_s
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                while self._read(0):
                    pass
                self.status = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() > deadline:
                raise AssertionError(f"the command doesn't end; it printed {self.text!r}")
            self._read(0.05)
        return self.status

    def close(self) -> None:
        if self.status is None:
            try:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
            except OSError:
                pass
        os.close(self.fd)


@pytest.fixture
def terminal(stack: Stack) -> Iterator[Callable[..., Terminal]]:
    """``terminal("run", "-it", …)`` runs pyx on a new pseudo-terminal."""
    opened: list[Terminal] = []

    def start(*args: str, rows: int = 24, columns: int = 80, program: str = "") -> Terminal:
        argv = [program, *args] if program else [str(PYX), *args]
        opened.append(Terminal(argv, stack.env, rows, columns))
        return opened[-1]

    yield start
    for one in opened:
        one.close()
