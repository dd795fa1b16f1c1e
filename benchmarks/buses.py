"""The buses that are measured: how each is started, and what its raw bytes are.

Every bus gets the same load from the same code (``busload.py``): what differs is a few functions here that make a connection, a
message and a call, all serialised before the clock runs. So the figures are what the daemons cost, not what a client library does.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from msgpack import packb, unpackb

from benchmarks.engines import which
from pyx_bus import wire

EVENT_BYTES = 300
TOPIC = b"container.start"


def event_payload(time_ns: int = 0) -> bytes:
    """A container's event as containerd publishes it, of 300 bytes."""
    attributes = {"image": "docker.io/library/alpine:3.19", "name": "some-name", "com.example.label": ""}
    event = {"id": "0" * 64, "time_ns": time_ns or 1 << 62, "attributes": attributes}
    attributes["com.example.label"] = "y" * (EVENT_BYTES - len(packb(event)) - 1)
    payload: bytes = packb(event)
    assert len(payload) == EVENT_BYTES, len(payload)
    return payload


class Bus:
    """A daemon of one kind, started in ``directory`` and reached at ``path``."""

    name = ""
    program: list[str] = []
    counts_bytes = True  # an event is as many bytes for every subscriber, always

    def __init__(self, directory: Path) -> None:
        self.directory = directory / self.name
        self.directory.mkdir()
        self.path = str(self.directory / "bus.sock")
        self.process: subprocess.Popen[bytes] | None = None

    @classmethod
    def available(cls) -> bool:
        return bool(which(cls.program[0]))

    def command(self) -> list[str]:
        raise AssertionError("each kind says how it's started")

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def start(self) -> None:
        log = (self.directory / "log").open("wb")
        self.process = subprocess.Popen(self.command(), env=self.environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        log.close()
        deadline = time.monotonic() + 10
        while True:
            try:
                self.connect(self.path).close()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{self.name} doesn't start: {(self.directory / 'log').read_text()[-2000:]}") from None
                time.sleep(0.01)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    # What the load uses, in processes of its own: only ``path`` is known there.

    @staticmethod
    def connect(path: str, name: str = "bench") -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(path)
        return sock

    @staticmethod
    def subscribe(sock: socket.socket) -> None:
        """Returns when the subscription holds."""

    @staticmethod
    def events(count: int, payload: bytes, first: int = 1) -> bytes:
        """``count`` published events, as sent; ``first`` is the first one's sequence number."""
        raise AssertionError("each kind has its own bytes")



class Pyx(Bus):
    """The broker in a process of its own, as systemd starts it."""

    name = "pyx"
    counts_bytes = False  # it sends events in batches: what it counts is in their headers

    @classmethod
    def available(cls) -> bool:
        return True

    def command(self) -> list[str]:
        return [sys.executable, "-m", "pyx_bus.broker"]

    def environment(self) -> dict[str, str]:
        run, root = self.directory / "run", self.directory / "root"
        return {**os.environ, "PYX_BUS": self.path, "PYX_RUN": str(run), "PYX_ROOT": str(root), "PYX_LOG_LEVEL": "error"}

    @staticmethod
    def connect(path: str, name: str = "bench") -> socket.socket:
        sock = Bus.connect(path)
        hello = {"version": wire.PROTOCOL_VERSION, "oldest": wire.PROTOCOL_VERSION, "name": name, "publisher": os.urandom(8).hex()}
        sock.sendall(wire.encode(wire.HELLO, b"", packb(hello)))
        answer = read_frame(sock)
        if answer.kind != wire.WELCOME:
            raise OSError(str(unpackb(answer.body)))
        return sock

    @staticmethod
    def subscribe(sock: socket.socket) -> None:
        sock.sendall(wire.encode(wire.SUBSCRIBE, b"", packb({"patterns": ["container.*"], "since": None}), 1, 1))
        answer = read_frame(sock)
        if answer.kind != wire.RESULT:
            raise OSError(str(unpackb(answer.body)))

    @staticmethod
    def events(count: int, payload: bytes, first: int = 1) -> bytes:
        return b"".join([wire.encode(wire.PUBLISH, TOPIC, payload, 0, 0, sequence) for sequence in range(first, first + count)])


def read_frame(sock: socket.socket) -> wire.Frame:
    """One frame, and not a byte more."""
    head = sock.recv(wire.HEADER_SIZE, socket.MSG_WAITALL)
    if len(head) < wire.HEADER_SIZE:
        raise OSError("the broker has closed the connection")
    rest = int.from_bytes(head[:4], "little") - len(head)
    (frame,) = wire.Decoder().feed(head + (sock.recv(rest, socket.MSG_WAITALL) if rest else b""))
    return frame


def resp(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


class Redis(Bus):
    """Publish and subscribe of redis-server, which keeps nothing on disk here."""

    name = "redis"
    program = ["redis-server"]

    def command(self) -> list[str]:
        # Its bound for slow subscribers is off: it would cut those off that the load makes slow for a moment.
        return [
            which("redis-server"), "--port", "0", "--unixsocket", self.path, "--save", "", "--appendonly", "no",
            "--dir", str(self.directory), "--daemonize", "no", "--client-output-buffer-limit", "pubsub 0 0 0",
        ]  # fmt: skip

    @staticmethod
    def subscribe(sock: socket.socket) -> None:
        sock.sendall(resp(b"SUBSCRIBE", TOPIC))
        wanted = len(b"*3\r\n$9\r\nsubscribe\r\n") + len(b"$%d\r\n%s\r\n:1\r\n" % (len(TOPIC), TOPIC))
        sock.recv(wanted, socket.MSG_WAITALL)

    @staticmethod
    def events(count: int, payload: bytes, first: int = 1) -> bytes:
        return resp(b"PUBLISH", TOPIC, payload) * count


class Dbus(Bus):
    """dbus-daemon with the limits of a session's bus (session.conf(5)), and signals."""

    name = "dbus"
    program = ["dbus-daemon"]

    CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>session</type><listen>unix:path={path}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy>
<limit name="max_incoming_bytes">1000000000</limit><limit name="max_outgoing_bytes">1000000000</limit>
<limit name="max_message_size">1000000000</limit><limit name="max_completed_connections">100000</limit>
<limit name="max_connections_per_user">100000</limit><limit name="max_match_rules_per_connection">50000</limit>
<limit name="max_replies_per_connection">50000</limit></busconfig>"""

    def command(self) -> list[str]:
        config = self.directory / "bus.conf"
        config.write_text(self.CONFIG.format(path=self.path))
        return [which("dbus-daemon"), f"--config-file={config}", "--nofork", "--nopidfile"]

    @staticmethod
    def connect(path: str, name: str = "bench") -> socket.socket:
        sock = Bus.connect(path)
        sock.sendall(b"\0AUTH EXTERNAL %s\r\n" % str(os.getuid()).encode().hex().encode())
        if not sock.recv(1000).startswith(b"OK"):
            raise OSError("dbus-daemon refuses us")
        sock.sendall(b"BEGIN\r\n")
        dbus_call(sock, "Hello")
        return sock

    @staticmethod
    def subscribe(sock: socket.socket) -> None:
        dbus_call(sock, "AddMatch", "type='signal',interface='org.pyx.Bench'")

    @staticmethod
    def events(count: int, payload: bytes, first: int = 1) -> bytes:
        # Its strings are UTF-8; what's in it is all the same to the daemon. The length's four bytes and the end are in its 300.
        text = "y" * (EVENT_BYTES - 5)
        return dbus_message(4, 5, text, path="/bench", interface="org.pyx.Bench", member="Start") * count


_FIELDS = {"path": (1, "o"), "interface": (2, "s"), "member": (3, "s"), "reply_serial": (5, "u"), "destination": (6, "s")}


def dbus_message(kind: int, serial: int, *strings: str, flags: int = 0, **fields: str | int) -> bytes:
    """A message of the D-Bus specification's "Message Protocol": little endian, body of strings."""

    def pad(data: bytearray, alignment: int) -> None:
        data.extend(bytes(-len(data) % alignment))

    def string(data: bytearray, text: str) -> None:
        pad(data, 4)
        data.extend(struct.pack("<I", len(text)) + text.encode() + b"\0")

    body = bytearray()
    for text in strings:
        string(body, text)
    head = bytearray(struct.pack("<cBBBIII", b"l", kind, flags, 1, len(body), serial, 0))
    for field, value in fields.items():
        pad(head, 8)
        code, signature = _FIELDS[field]
        head.extend(bytes([code, 1]) + signature.encode() + b"\0")
        if isinstance(value, int):
            pad(head, 4)
            head.extend(struct.pack("<I", value))
        else:
            string(head, value)
    if strings:
        pad(head, 8)
        head.extend(bytes([8, 1]) + b"g\0" + bytes([len(strings)]) + b"s" * len(strings) + b"\0")
    struct.pack_into("<I", head, 12, len(head) - 16)
    pad(head, 8)
    return bytes(head + body)


def dbus_size(data: bytes | bytearray | memoryview, offset: int = 0) -> int:
    """Of the message that begins there; 16 bytes of it must be."""
    body, _, fields = struct.unpack_from("<III", data, offset + 4)
    size: int = 16 + fields + -fields % 8 + body
    return size


def dbus_read(sock: socket.socket) -> bytes:
    head = sock.recv(16, socket.MSG_WAITALL)
    if len(head) < 16:
        raise OSError("dbus-daemon has closed the connection")
    return head + sock.recv(dbus_size(head) - 16, socket.MSG_WAITALL)


def dbus_call(sock: socket.socket, member: str, *strings: str) -> bytes:
    """A call of the daemon itself; its answer."""
    destination = path = interface = "org.freedesktop.DBus"
    path = "/org/freedesktop/DBus"
    sock.sendall(dbus_message(1, 1, *strings, path=path, interface=interface, member=member, destination=destination))
    while True:
        answer = dbus_read(sock)
        if answer[1] in (2, 3):  # the daemon also tells us our name by a signal
            if answer[1] == 3:
                raise OSError(f"dbus-daemon: {answer!r}")
            return answer


# --- calls, raw --------------------------------------------------------------------------------------------------------

REQUEST = "0123456789abcdef" * 4
ANSWER = "running, 12345, docker.io/library/alpine:3.19".ljust(90)


class PyxCalls:
    """Calls between two raw connections, by way of the broker."""

    head_size = wire.HEADER_SIZE

    @staticmethod
    def size(data: bytes, offset: int) -> int:
        return int.from_bytes(data[offset : offset + 4], "little")

    @staticmethod
    def serve(path: str) -> tuple[socket.socket, str]:
        """(the service's connection, what a caller calls it)."""
        sock = Pyx.connect(path)
        sock.sendall(wire.encode(wire.REGISTER, b"raw", packb({"methods": {"state": True}}), 0, 1))
        answer = read_frame(sock)
        if answer.kind != wire.RESULT:
            raise OSError(str(unpackb(answer.body)))
        return sock, "raw"

    @staticmethod
    def answer(data: bytes, offset: int) -> bytes:
        _, kind, _, _, _, peer, serial, _ = wire.HEADER.unpack_from(data, offset)
        return wire.HEADER.pack(_ANSWER_SIZE, wire.RESULT, 0, 0, 0, peer, serial, 0) + _ANSWER if kind == wire.CALL else b""

    @staticmethod
    def call(path: str, service: str) -> tuple[socket.socket, Callable[[int], bytes]]:
        """(a caller's connection, the bytes of a call with some serial)."""
        body = packb({"text": REQUEST})
        return Pyx.connect(path), lambda serial: wire.encode(wire.CALL, b"raw.state", body, 0, serial)


_ANSWER = packb({"text": ANSWER})
_ANSWER_SIZE = wire.HEADER_SIZE + len(_ANSWER)


class DbusCalls:
    """The same by way of dbus-daemon."""

    head_size = 16
    _prepared: dict[str, bytes] = {}

    @staticmethod
    def size(data: bytes, offset: int) -> int:
        return dbus_size(data, offset)

    @staticmethod
    def serve(path: str) -> tuple[socket.socket, str]:
        sock = Dbus.connect(path)
        return sock, dbus_name(sock)

    @staticmethod
    def answer(data: bytes, offset: int) -> bytes:
        if data[offset + 1] != 1:
            return b""
        whole = data[offset : offset + dbus_size(data, offset)]
        at = whole.index(b"\x07\x01s\0") + 4  # the sender's field, which the daemon adds
        sender = whole[at + 4 : at + 4 + int.from_bytes(whole[at : at + 4], "little")].decode()
        serial = int.from_bytes(whole[8:12], "little")
        prepared = DbusCalls._prepared.get(sender)
        if prepared is None:
            prepared = dbus_message(2, 1, ANSWER, flags=1, reply_serial=0x7A7A7A7A, destination=sender)
            DbusCalls._prepared[sender] = prepared
        return prepared.replace(b"zzzz", struct.pack("<I", serial), 1)

    @staticmethod
    def call(path: str, service: str) -> tuple[socket.socket, Callable[[int], bytes]]:
        message = dbus_message(
            1, 0x7A7A7A7A, REQUEST, path="/bench", interface="org.pyx.Bench", member="State", destination=service
        )
        return Dbus.connect(path), lambda serial: message.replace(b"zzzz", struct.pack("<I", serial), 1)


def dbus_name(sock: socket.socket) -> str:
    """The connection's own unique name: it's the destination of whatever the daemon answers."""
    answer = dbus_call(sock, "GetId")
    at = answer.index(b"\x06\x01s\0") + 4
    return answer[at + 4 : at + 4 + int.from_bytes(answer[at : at + 4], "little")].decode()


KINDS: dict[str, type[Bus]] = {kind.name: kind for kind in (Pyx, Redis, Dbus)}
CALLS: dict[str, type[PyxCalls] | type[DbusCalls]] = {"pyx": PyxCalls, "dbus": DbusCalls}
