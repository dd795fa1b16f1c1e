"""A broker as a process of its own, and blocking peers that speak its frames, for tests that look at it from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgpack import packb, unpackb

from pyx_bus import wire
from pyx_bus.sync import connect_unix
from pyx_bus.wire import Decoder, Frame


class BrokerProcess:
    def __init__(self, directory: Path, config: str = "") -> None:
        self.directory = directory
        self.path = directory / "bus.sock"
        self.config = config
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it listens (sd_notify(3))."""
        environment = {**os.environ, "PYX_RUN": str(self.directory), "PYX_ROOT": str(self.directory / "root")}
        environment.pop("PYX_BUS", None)
        environment.pop("PYX_LOG_LEVEL", None)
        if self.config:
            (self.directory / "config.toml").write_text(self.config)
            environment["PYX_CONFIG"] = str(self.directory / "config.toml")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            address = self.directory / "ready"
            address.unlink(missing_ok=True)
            ready.bind(str(address))
            ready.settimeout(20)
            environment["NOTIFY_SOCKET"] = str(address)
            with open(self.directory / "broker.log", "ab") as log:
                self.process = subprocess.Popen([sys.executable, "-m", "pyx_bus.broker"], env=environment, stderr=log)
            assert ready.recv(100) == b"READY=1"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """kill -9, and gone."""
        self.stop(signal.SIGKILL)

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(20)
            self.process = None

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def pss_bytes(self) -> int:
        """Proportional set size (proc(5), smaps_rollup)."""
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
        raise AssertionError("no Pss in smaps_rollup")


@contextlib.contextmanager
def broker_process(directory: Path, config: str = "") -> Iterator[BrokerProcess]:
    broker = BrokerProcess(directory, config)
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()


class RawPeer:
    """A blocking connection that deals in frames."""

    def __init__(self, path: Path, name: str = "raw", publisher: str = "") -> None:
        self.sock = socket.socket(fileno=connect_unix(str(path)).detach())
        self.sock.settimeout(20)
        self._decoder = Decoder()
        self._frames: list[Frame] = []
        hello = {
            "version": wire.PROTOCOL_VERSION,
            "oldest": wire.PROTOCOL_VERSION,
            "name": name,
            "publisher": publisher,
        }
        self.send(wire.HELLO, b"", packb(hello))
        self.welcome = unpackb(self.expect(wire.WELCOME).body)

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, kind: int, route: bytes = b"", body: bytes = b"", **fields: int) -> None:
        self.sock.sendall(Frame(kind, route, body, **fields).encode())

    def receive(self) -> Frame:
        """The next frame; ``EOFError`` at the end, ``TimeoutError`` after 20 s."""
        while not self._frames:
            data = self.sock.recv(1 << 20)
            if not data:
                raise EOFError
            self._frames = self._decoder.feed(data)
        return self._frames.pop(0)

    def expect(self, kind: int) -> Frame:
        """The next frame, which has to be of this kind."""
        frame = self.receive()
        assert frame.kind == kind, frame
        return frame

    def call(self, method: bytes, body: bytes = b"\x80", serial: int = 1) -> Any:
        self.send(wire.CALL, method, body, serial=serial)
        return unpackb(self.expect(wire.RESULT).body)

    def subscribe(self, *patterns: str, **options: Any) -> int:
        """Returns the offset it begins at."""
        self.send(wire.SUBSCRIBE, b"", packb({"patterns": list(patterns), **options}), peer=1, serial=77)
        return int(unpackb(self.expect(wire.RESULT).body)["next_offset"])

    def publish(self, topic: bytes, first: int, count: int = 1, size: int = 300) -> None:
        """In one go; events carry their number as their actor's ID and are about ``size`` bytes."""
        filler = "y" * max(0, size - 60)
        frames = [
            wire.encode(
                wire.PUBLISH,
                topic,
                packb({"id": str(n), "time_ns": time.time_ns(), "attributes": {"x": filler}}),
                0,
                0,
                n,
            )
            for n in range(first, first + count)
        ]
        self.sock.sendall(b"".join(frames))

    def wait_acknowledged(self, sequence: int) -> None:
        while self.expect(wire.ACK).arg < sequence:
            pass

    def events_until(self, offset: int) -> tuple[list[int], list[tuple[int, int]]]:
        """(offsets of events, ranges of gaps) until ``offset`` has come."""
        offsets: list[int] = []
        gaps: list[tuple[int, int]] = []
        while not offsets or offsets[-1] < offset:
            frame = self.receive()
            if frame.kind == wire.EVENT:
                offsets.extend(range(frame.arg, frame.arg + frame.serial))
            elif frame.kind == wire.GAP:
                gap = unpackb(frame.body)
                gaps.append((gap["first_offset"], gap["last_offset"]))
        return offsets, gaps
