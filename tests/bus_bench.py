"""The broker's decisions on recording peers, for tests: no socket, a real journal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgpack import packb, unpackb

from pyx_bus import wire
from pyx_bus.broker.events import Events
from pyx_bus.broker.journal import Journal, Limits
from pyx_bus.broker.peers import Peer
from pyx_bus.broker.positions import Positions
from pyx_bus.broker.roles import ROOT, User
from pyx_bus.broker.router import Router
from pyx_bus.wire import Decoder, Frame


class Recorder(Peer):
    """A peer that keeps what it's sent."""

    def __init__(self, user: User, role: str = ROOT, may_be: str = "*") -> None:
        super().__init__(user, user.uid, 1, role, may_be)
        self.data = b""
        self.fds: list[int] = []
        self.gone = ""
        self.backlog = 0

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        self.data += data
        self.fds += fds or []

    @property
    def queued_bytes(self) -> int:
        return self.backlog

    def disconnect(self, reason: str) -> None:
        self.gone = reason

    def take(self) -> list[Frame]:
        frames = Decoder().feed(self.data, self.fds)
        self.data, self.fds = b"", []
        return frames


class Bench:
    """A router with a clock of its own (``now_ns``)."""

    def __init__(self, directory: Path, limits: Limits | None = None) -> None:
        self.now_ns = 1_000
        self.journal = Journal(directory / "journal", limits or Limits())
        self.events = Events(self.journal, Positions(directory / "durable"), lambda: self.now_ns, lambda: self.now_ns)
        self.router = Router(self.events, lambda: self.now_ns, lambda: self.now_ns)

    def close(self) -> None:
        self.journal.close()

    def peer(
        self,
        name: str = "p",
        *,
        service: str = "",
        methods: dict[str, bool] | None = None,
        uid: int = 0,
        role: str = ROOT,
        may_be: str = "*",
    ) -> Recorder:
        peer = Recorder(self.router.user(uid), role, may_be)
        self.router.add(peer)
        version = wire.PROTOCOL_VERSION
        self.receive(peer, Frame(wire.HELLO, b"", packb({"version": version, "name": name, "publisher": name})))
        if service:
            body = b"" if methods is None else packb({"methods": methods})
            self.receive(peer, Frame(wire.REGISTER, service.encode(), body, serial=1))
        peer.take()
        return peer

    def receive(self, peer: Recorder, *frames: Frame) -> None:
        """As they'd come from a socket: through the decoder."""
        fds = [fd for frame in frames for fd in frame.fds]
        for frame in Decoder(runs=True).feed(b"".join(frame.encode() for frame in frames), fds):
            self.router.receive(peer, frame)

    def call(self, peer: Recorder, method: bytes, serial: int, body: bytes = b"\x80", **kwargs: Any) -> None:
        self.receive(peer, Frame(wire.CALL, method, body, serial=serial, **kwargs))

    def subscribe(
        self, peer: Recorder, patterns: list[str], since: int | str | None = None, id_: int = 1, **more: Any
    ) -> None:
        body = packb({"patterns": patterns, "since": since, **more})
        self.receive(peer, Frame(wire.SUBSCRIBE, b"", body, peer=id_, serial=99))

    def publish(self, peer: Recorder, topic: bytes, *sequences: int, payload: bytes = b"") -> None:
        """In one go."""
        self.receive(peer, *(Frame(wire.PUBLISH, topic, payload or event(n), arg=n) for n in sequences))

    def read_on(self) -> None:
        """Let those who catch up do so."""
        while self.events.subscriptions.ready:
            self.events.read_on()


def event(number: int, **attributes: str) -> bytes:
    """A payload."""
    return bytes(packb({"id": str(number), "time_ns": number, "attributes": attributes}))


def errors_in(frames: list[Frame]) -> list[str]:
    return [unpackb(f.body)["code"] for f in frames if f.kind == wire.ERROR]


def events_in(frames: list[Frame]) -> list[tuple[int, str, str]]:
    """(offset, topic, the actor's ID) of every event."""
    found = []
    for frame in frames:
        if frame.kind == wire.EVENT:
            _, events = wire.split_events(frame.body)
            assert len(events) == frame.serial
            found += [(frame.arg + i, t.decode(), unpackb(p)["id"]) for i, (t, p) in enumerate(events)]
    return found
