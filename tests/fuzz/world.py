"""A broker without sockets, driven by bytes: whatever they are, the promises of docs/bus.md hold.

The bytes are read as a program: peers of all roles connect, say sense and nonsense, in pieces cut anywhere, stop reading, leave; the
journal fails now and then, and is so small that it soon forgets. ``World.run`` ends by letting everybody read to the end and raises
``AssertionError`` if anything but a ``ProtocolError`` came out of the broker's core, or if

- a peer was sent bytes that aren't whole frames of the protocol;
- a subscriber got an event twice, out of order, or not at all without being told (the journal's content says which it should get);
- an event was acknowledged and not kept, or kept twice;
- an answer went to anybody but the caller, or a call wasn't answered exactly once;
- a descriptor was neither passed on nor closed, or both;
- something was left of those who have gone, or a user's account isn't even.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from msgpack import packb, unpackb

from pyx_bus import errors, filters, wire
from pyx_bus.broker import events, roles, router
from pyx_bus.broker.journal import Journal, JournalError, Limits
from pyx_bus.broker.peers import Peer
from pyx_bus.broker.positions import Positions
from pyx_bus.wire import HEADER, Decoder, Frame, ProtocolError, encode

TOPICS = (
    b"container.start", b"container.exec.start", b"container.health_status", b"image.pull", b"toy.x", b"service.up", b"\xff", b"a..b", b"",
)  # fmt: skip
PATTERNS = ("container.*", ">", "container.exec.>", "*.start", "image.pull", "container", "a..b", ">.a", "*", "toy.*", "")
METHODS = (
    b"containerd.run", b"containerd.look", b"toy.x", b"bus.stats", b"bus.services", b"bus.durables", b"bus.forget", b"nobody.x", b"",
    b"\xff.x",
)  # fmt: skip
NAMES = (b"containerd", b"toy", b"bus", b"", b"a.b", b"\xff")
DURABLES = ("one", "two", "../x", "")
ROLES = ((0, 0), (1001, 1001), (1002, 50), (1003, 60), (1004, 70))
VALUES = ("container", "start", "toy", "bus", "a", "a=1", "alpine", "0000", "exec_start", "health_status: healthy", "!")
PAYLOADS = (
    packb({"id": "0" * 64, "time_ns": 1, "attributes": {"image": "alpine:3", "name": "a", "a": "1"}}),
    packb({"id": "a", "time_ns": 2, "attributes": {"container": "0" * 64, "health_status": "healthy"}}),
    packb({"id": 7, "attributes": []}),
    packb({"id": "a", "attributes": {"a": 1}}),
    packb({}),
    packb([1]),
    packb("x" * 3000),
    packb({"id": "b", "attributes": {"image": "x" * 2000}}),
    b"", b"\xc1", b"\x81\xa1", b"\x91" * 600, b"\xdf\xff\xff\xff\xff", b"\x80\x80",
)  # fmt: skip
FIRST_FAKE_FD = 1 << 24
SMALL_BATCH = 4096  # a piece of the journal: so reading it takes several turns


class Data:
    """A program's bytes; zeros after its end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        return self._at < len(self._data)

    def byte(self) -> int:
        value = self._data[self._at] if self._at < len(self._data) else 0
        self._at += 1
        return value

    def below(self, count: int) -> int:
        return self.byte() % count

    def one(self, choices: Any) -> Any:
        return choices[self.below(len(choices))]

    def some(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        self._at += count
        return part

    def number(self) -> int:
        """Small ones mostly, and the ends of every width."""
        kind = self.byte()
        return kind if kind < 240 else (0, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)[kind % 5]


class SmallUser(roles.User):
    """One whose quotas are soon used up."""

    __slots__ = ()

    max_subscriptions = 5
    max_calls = 6
    max_call_bytes = 4000
    max_queued_bytes = 6000


class FlakyJournal(Journal):
    """The real journal, which fails when it's told to and remembers what it has been given."""

    failures = 0

    def append(
        self, source: bytes, publisher: bytes, frames: bytes | memoryview, count: int, last_sequence: int, time_ns: int
    ) -> int:
        if self.failures:
            self.failures -= 1
            raise JournalError("no room", 28)
        offset = super().append(source, publisher, frames, count, last_sequence, time_ns)
        data = bytes(frames)
        bounds = wire.frame_bounds(data)
        assert len(bounds) == count
        for index, (start, payload, end) in enumerate(bounds):
            sequence = HEADER.unpack_from(data, start)[7]
            self.kept[offset + index] = (source, data[start + wire.HEADER_SIZE : payload], data[payload:end])
            if publisher:
                assert sequence > self.last_of.get(publisher, 0), "an event was kept twice"
                self.last_of[publisher] = sequence
        for old in range(self.forgotten, self.oldest_offset):
            self.kept.pop(old, None)
        self.forgotten = max(self.forgotten, self.oldest_offset)
        return offset

    kept: dict[int, tuple[bytes, bytes, bytes]]
    last_of: dict[bytes, int]
    forgotten = 1


class Reader:
    """What a subscription has been sent, and whether that's right."""

    def __init__(self, wanted: filters.Filter) -> None:
        self.wanted = wanted
        self.start = -1  # not answered yet
        self.next = 0
        self.offsets: list[int] = []
        self.gaps: list[tuple[int, int]] = []

    def events(self, first: int, count: int) -> None:
        assert self.start >= 0, "events before the answer"
        assert first >= self.next, f"offset {first} after {self.next - 1}"
        self.offsets.extend(range(first, first + count))
        self.next = first + count

    def gap(self, first: int, last: int) -> None:
        assert self.next <= first <= last, f"a gap from {first} to {last} after {self.next - 1}"
        self.gaps.append((first, last))
        self.next = last + 1


class FuzzPeer(Peer):
    """A connection whose other end decodes all it's sent, as a client would."""

    __slots__ = (
        "accounted", "asked", "blocked", "condemned", "decoder", "far", "gone", "open", "pending", "readers", "sent", "waiting", "wild",
        "world",
    )  # fmt: skip

    def __init__(self, world: World, uid: int, gid: int) -> None:
        role, may_be = world.roles.of(uid, gid, [])
        super().__init__(world.router.users.setdefault(uid, SmallUser(uid)), gid, 1, role, may_be)
        self.world = world
        self.decoder = Decoder(wire.MAX_HELLO, runs=True)
        self.far = Decoder()
        self.pending = b""  # said, and not arrived yet
        self.waiting: list[bytes] = []  # sent by the broker while ``blocked``
        self.blocked = False
        self.accounted = 0
        self.condemned = False
        self.gone = False
        self.wild = False  # it has said what isn't known here: it may be sent anything
        self.open: set[int] = set()  # calls it waits for
        self.asked: dict[int, tuple[int, Reader]] = {}  # by serial: the subscription it asked for
        self.readers: dict[int, Reader] = {}
        self.sent: set[int] = set()  # sequence numbers published and neither acknowledged nor refused

    def send(self, data: bytes, fds: list[int] | None = None) -> None:
        if self.gone:
            router.close_fds(fds or [])
            return
        for fd in fds or ():
            self.world.dispose(fd)
        self.waiting.append(data)

    @property
    def queued_bytes(self) -> int:
        return sum(map(len, self.waiting)) * (self.world.weight if self.blocked else 1)

    def disconnect(self, reason: str) -> None:
        self.condemned = True

    def expect(self, serial: int) -> None:
        """An answer to this call, or if it's in use already, whatever comes."""
        self.wild = self.wild or serial in self.open
        self.open.add(serial)

    def flush(self) -> None:
        """What the broker does with its queue at the end of a turn."""
        if not self.blocked:
            waiting, self.waiting = self.waiting, []
            for data in waiting:
                self.arrive(data)
        self.account()

    def unblock(self) -> None:
        if self.blocked and not self.gone:
            self.blocked = False
            self.flush()
            self.world.events.drained(self)

    def account(self) -> None:
        held = 0 if self.gone else self.queued_bytes
        self.user.queued_bytes += held - self.accounted
        self.accounted = held

    def arrive(self, data: bytes) -> None:
        carried = data[6] if len(data) >= wire.HEADER_SIZE and not self.far.buffered_bytes else 0
        for frame in self.far.feed(bytes(data), [-1] * carried):
            if not self.wild:
                self.understand(frame)

    def understand(self, frame: Frame) -> None:
        kind = frame.kind
        if kind == wire.EVENT:
            _, events = wire.split_events(frame.body)
            assert len(events) == frame.serial > 0
            reader = self.readers.get(frame.peer)
            if reader is None:
                raise AssertionError(f"an event for subscription {frame.peer}, which isn't there")
            reader.events(frame.arg, len(events))
            for index, (topic, payload) in enumerate(events):
                kept = self.world.journal.kept.get(frame.arg + index)
                assert kept is None or kept == (frame.route, topic, payload), "another event than was published"
        elif kind == wire.GAP:
            body = unpackb(frame.body)
            assert body["last_offset"] == frame.arg
            assert body["lost"] == frame.arg + 1 - body["first_offset"]
            assert frame.arg < max(self.world.journal.oldest_offset, self.world.journal.forgotten)
            self.readers[frame.peer].gap(body["first_offset"], frame.arg)
        elif kind == wire.HEARTBEAT:
            reader = self.readers[frame.peer]
            assert reader.next <= frame.arg <= self.world.journal.next_offset
            self.world.complete(reader, frame.arg)
        elif kind in (wire.RESULT, wire.ERROR, wire.ITEM):
            self.answer(frame)
        elif kind == wire.ACK:
            for sequence in [s for s in self.sent if s <= frame.arg]:
                self.sent.discard(sequence)
                last = self.world.journal.last_of.get(self.publisher, 0)
                assert not self.publisher or sequence <= last, "acknowledged and not kept"
        else:
            assert kind in (wire.WELCOME, wire.CALL, wire.CANCEL, wire.CREDIT, wire.PONG), frame

    def answer(self, frame: Frame) -> None:
        if frame.kind == wire.ERROR:
            body = unpackb(frame.body)
            assert errors.from_body(body).code == body["code"] != "internal"
            if not frame.serial:
                retry = body["code"] == "unavailable"
                self.sent = {s for s in self.sent if s < frame.arg or (not retry and s != frame.arg)}
                return
        assert frame.serial in self.open, f"an answer to nothing: {frame!r}"
        if frame.kind != wire.ITEM:
            self.open.discard(frame.serial)
        asked = self.asked.pop(frame.serial, None)
        if asked and frame.kind == wire.RESULT:
            subscription, reader = asked
            reader.start = reader.next = unpackb(frame.body)["next_offset"]
            self.readers[subscription] = reader


class World:
    """One broker and its peers. The journal lives on from program to program, as opening one takes longer than running most."""

    def __init__(self, journal: FlakyJournal, positions: Positions) -> None:
        self.journal = journal
        self.now = 1 << 40
        self.roles = roles.Roles(own_uid=0, user_gids=[50], monitor_gids=[60], service_uids={1001: "containerd"})
        self.events = events.Events(journal, positions, lambda: self.now, lambda: self.now)
        self.book = self.events.subscriptions
        self.router = router.Router(self.events, lambda: self.now, lambda: self.now)
        self.peers: list[FuzzPeer] = []
        self.weight = 1
        self.held: set[int] = set()  # descriptors somebody has to dispose of
        self.next_fd = FIRST_FAKE_FD
        self.sequences: dict[str, int] = {}
        self.suffix = str(journal.next_offset)

    def dispose(self, fd: int) -> None:
        assert fd in self.held, f"descriptor {fd} disposed of twice, or nobody's"
        self.held.discard(fd)

    # --- the program -------------------------------------------------------------------------------------------------

    def run(self, program: bytes) -> None:
        data = Data(program)
        steps = (
            self.connect, self.hello, self.say_garbage, self.say_frame, self.register, self.call, self.call, self.answer, self.answer,
            self.subscribe, self.subscribe, self.publish, self.publish, self.publish, self.unsubscribe, self.acknowledge, self.cancel,
            self.leave, self.block, self.unblock, self.read_on, self.pass_time, self.fail_journal, self.own_method,
        )  # fmt: skip
        close_fds, router.close_fds = router.close_fds, self.close_fds
        max_batch, events.MAX_BATCH = events.MAX_BATCH, SMALL_BATCH
        try:
            self.weight = (1, 200, 20_000)[data.below(3)]
            self.connect(data)
            while data:
                data.one(steps)(data)
                self.end_turn()
            self.finish()
        finally:
            router.close_fds, events.MAX_BATCH = close_fds, max_batch
            self.journal.failures = 0
            for position in self.book.positions.list():
                self.book.positions.remove(position.uid, position.name)

    def close_fds(self, fds: Iterable[int]) -> None:
        for fd in fds:
            self.dispose(fd)

    def peer(self, data: Data) -> FuzzPeer | None:
        return self.peers[data.below(len(self.peers))] if self.peers else None

    def connect(self, data: Data) -> None:
        try:
            peer = FuzzPeer(self, *data.one(ROLES))
        except errors.PermissionDenied:
            return
        self.router.add(peer)
        self.peers.append(peer)
        if data.below(4):
            self.hello(data, peer)

    def hello(self, data: Data, peer: FuzzPeer | None = None) -> None:
        peer = peer or self.peer(data)
        if peer is None:
            return
        choice = data.byte()
        publisher = ("", "p" + self.suffix, "q" + self.suffix)[choice % 3]
        body: Any = {"version": 2, "oldest": 1, "name": ("a", "b\n", "é" * 40, "")[choice // 3 % 4], "publisher": publisher}
        if choice > 240:
            body = data.one(({}, {"version": "2"}, {"version": 1}, {"version": 3, "oldest": 3}, [], {"version": 2, "name": 7}))
        self.say(data, peer, encode(wire.HELLO, b"", packb(body)))

    def say(self, data: Data, peer: FuzzPeer, said: bytes, fds: int = 0) -> None:
        """Let it arrive: whole, or in part, the rest before whatever the peer says next."""
        given = []
        for _ in range(fds):
            self.next_fd += 1
            given.append(self.next_fd)
        self.held.update(given)
        said = peer.pending + said
        cut = data.byte()
        arriving, peer.pending = (said, b"") if cut < 200 else (said[: cut - 200], said[cut - 200 :])
        frames: list[Frame] = []
        try:
            frames = peer.decoder.feed(arriving, given)
            while frames:
                self.router.receive(peer, frames[0])
                del frames[0]
        except ProtocolError:
            for frame in frames:
                self.held.difference_update(frame.fds)  # the router may have closed those of the bad one already
            self.drop(peer)

    def say_garbage(self, data: Data) -> None:
        peer = self.peer(data)
        if peer is not None:
            peer.wild = True
            self.say(data, peer, data.some(data.byte()), data.below(64) // 60)

    def say_frame(self, data: Data) -> None:
        """Any frame that a header can describe, mostly a right one."""
        peer = self.peer(data)
        if peer is None:
            return
        kind, flags, fds, route = data.byte() % 24, data.byte(), data.below(64) // 58, data.one(NAMES + TOPICS + METHODS)
        body = data.one((*PAYLOADS, b"", data.some(20)))
        serial, arg, of = data.number() & 0xFFFFFFFF, data.number(), data.number() & 0xFFFFFFFF
        if kind in (wire.CALL, wire.REGISTER):
            peer.expect(serial)
        size = wire.HEADER_SIZE + len(route) + len(body)
        if data.byte() > 250:
            size += 1
            peer.wild = True
        elif kind in (wire.SUBSCRIBE, wire.UNSUBSCRIBE, wire.CANCEL):
            peer.wild = True
        self.say(data, peer, HEADER.pack(size, kind, flags, fds, len(route), of, serial, arg) + route + body, fds)

    def serial(self, data: Data, peer: FuzzPeer) -> int:
        """One that's free, mostly."""
        if data.byte() > 250:
            return data.number() & 0xFFFFFFFF
        return max(peer.open, default=0) % 0xFFFFFFFF + 1

    def register(self, data: Data) -> None:
        peer = self.peer(data)
        if peer is None:
            return
        body: Any = ({}, {"methods": {"run": False, "look": True, "x": True}}, {"methods": [1]}, [], {"methods": {"a": 1}})[data.below(5)]
        serial = self.serial(data, peer)
        peer.expect(serial)
        self.say(data, peer, encode(wire.REGISTER, data.one(NAMES), packb(body), 0, serial))

    def call(self, data: Data) -> None:
        peer = self.peer(data)
        if peer is None:
            return
        serial, fds = self.serial(data, peer), data.below(40) // 30
        peer.expect(serial)
        self.say(data, peer, encode(wire.CALL, data.one(METHODS[:3]), data.one(PAYLOADS), 0, serial, data.number(), fds), fds)

    def own_method(self, data: Data) -> None:
        peer = self.peer(data)
        if peer is None:
            return
        serial = self.serial(data, peer)
        peer.expect(serial)
        body = data.one((b"", packb({"name": data.one(DURABLES)}), packb({"name": 1}), b"\xc1"))
        self.say(data, peer, encode(wire.CALL, data.one(METHODS), body, 0, serial))

    def answer(self, data: Data) -> None:
        """A service answers one of its calls, or what nobody has asked."""
        services = [peer for peer in self.peers if peer.incoming]
        peer = services[data.below(len(services))] if services else self.peer(data)
        if peer is None:
            return
        calls = sorted(peer.incoming) or [(data.number() & 0xFFFFFFFF, data.number() & 0xFFFFFFFF)]
        caller, serial = calls[data.below(len(calls))]
        kind, fds = data.one((wire.RESULT, wire.ERROR, wire.ITEM, wire.RESULT)), data.below(40) // 30
        body = packb({"code": "conflict", "message": "x"}) if kind == wire.ERROR else data.one(PAYLOADS)
        if kind == wire.ERROR:
            fds = 0
        self.say(data, peer, encode(kind, b"", body, caller, serial, data.number(), fds), fds)

    def subscribe(self, data: Data) -> None:
        peer = self.peer(data)
        if peer is None:
            return
        choice = data.byte()
        next_offset = self.journal.next_offset
        body: dict[str, Any] = {"patterns": [data.one(PATTERNS) for _ in range(1 + choice % 2)]}
        if choice & 4:
            since = (None, "beginning", max(0, next_offset - data.byte()), next_offset, next_offset + data.byte(), 0, True, -1, 1.5, [])
            body["since"] = data.one(since)
        if choice & 8:
            fields = (*filters.FIELDS, *(field + "!" for field in filters.FIELDS), "nonsense")
            body["filters"] = {data.one(fields): [data.one(VALUES) for _ in range(data.below(3))] for _ in range(data.below(3))}
        if choice & 16:
            body["heartbeat_ms"] = data.one((100, 1000, 0, 99, -1, 1 << 40, "x"))
        if choice & 32:
            body["durable"] = data.one(DURABLES)
        if choice & 64 and choice & 128:
            body["since_ns"] = data.one((self.now, 0, 1, 1 << 63, -1, self.now - data.byte(), "x"))
        serial, subscription = self.serial(data, peer), data.below(4)
        peer.expect(serial)
        try:
            peer.asked[serial] = subscription, Reader(filters.parse(body["patterns"], body.get("filters")))
        except errors.InvalidArgument:
            pass
        self.say(data, peer, encode(wire.SUBSCRIBE, b"", packb(body), subscription, serial))

    def unsubscribe(self, data: Data) -> None:
        peer = self.peer(data)
        if peer is None or peer.pending:
            return
        subscription = data.below(4)
        if peer.blocked:
            return  # what waits for it may still come
        self.say(data, peer, encode(wire.UNSUBSCRIBE, b"", b"", subscription))
        self.end_turn()
        if peer.pending:
            self.drop(peer)
        elif subscription not in peer.subscriptions:
            peer.readers.pop(subscription, None)

    def publish(self, data: Data) -> None:
        peer = self.peer(data)
        if peer is None:
            return
        key = f"{peer.uid}{peer.publisher!r}"
        sequence = self.sequences.get(key, 1)
        choice = data.byte()
        if choice > 200:
            sequence = max(1, sequence - (choice & 7))  # again
        elif choice > 190:
            sequence += 3
        said = []
        for _ in range(1 + choice % 5):
            said.append(encode(wire.PUBLISH, data.one(TOPICS), data.one(PAYLOADS), 0, 0, sequence))
            peer.sent.add(sequence)
            sequence += 1
        self.sequences[key] = max(sequence, self.sequences.get(key, 1))
        self.say(data, peer, b"".join(said))

    def acknowledge(self, data: Data) -> None:
        peer = self.peer(data)
        if peer is None:
            return
        self.say(data, peer, encode(wire.ACK, b"", b"", data.below(4), 0, max(0, self.journal.next_offset - data.byte())))

    def cancel(self, data: Data) -> None:
        peer = self.peer(data)
        if peer is None or peer.blocked or peer.pending:
            return
        serial = data.one(sorted(peer.calls) or [1])
        kind = data.one((wire.CANCEL, wire.CREDIT))
        self.say(data, peer, encode(kind, b"", b"", 0, serial, data.number()))
        if kind == wire.CANCEL and not peer.gone and serial not in peer.calls:
            peer.open.discard(serial)

    def leave(self, data: Data) -> None:
        peer = self.peer(data)
        if peer is not None:
            self.drop(peer)

    def block(self, data: Data) -> None:
        peer = self.peer(data)
        if peer is not None:
            peer.blocked = True

    def unblock(self, data: Data) -> None:
        peer = self.peer(data)
        if peer is not None:
            peer.unblock()

    def read_on(self, data: Data) -> None:
        for _ in range(data.below(8)):
            if self.book.ready:
                self.events.read_on()
                self.end_turn()

    def pass_time(self, data: Data) -> None:
        self.now += data.byte() * 10_000_000
        assert self.book.beat() >= 0

    def fail_journal(self, data: Data) -> None:
        self.journal.failures = data.below(3)

    # --- what the broker's loop does ---------------------------------------------------------------------------------

    def end_turn(self) -> None:
        for peer in list(self.peers):
            peer.flush()
            if peer.condemned:
                self.drop(peer)

    def drop(self, peer: FuzzPeer) -> None:
        if not peer.gone:
            self.router.drop(peer)
            peer.gone = True
            peer.account()
            self.close_fds(peer.decoder.take_fds())
            self.peers.remove(peer)

    def finish(self) -> None:
        """Everybody reads to the end; then all leave."""
        self.journal.failures = 0
        for peer in list(self.peers):
            peer.unblock()
        self.end_turn()
        for _ in range(10_000):  # a turn each
            if not self.book.ready:
                break
            self.events.read_on()
            self.end_turn()
        else:
            raise AssertionError("reading the journal never ends")
        for peer in self.peers:
            if peer.wild:
                continue
            for number, reader in peer.readers.items():
                if number in peer.subscriptions:
                    assert peer.subscriptions[number].cursor is None, "nothing waits, and it isn't live"
                    self.complete(reader, self.journal.next_offset)
            assert peer.open >= set(peer.calls), "an open call that the caller doesn't wait for"
        self.balance()
        for peer in list(self.peers):
            self.drop(peer)
        self.balance()
        assert not self.router.peers and not self.router.services and not self.router.users
        assert not self.book.ready and not len(self.book) and not self.book._beating and not self.book._durable
        assert not self.held, f"descriptors {self.held} are left open"

    def balance(self) -> None:
        for user in self.router.users.values():
            peers = [peer for peer in self.peers if peer.user is user]
            assert user.connections == len(peers)
            assert user.calls == sum(len(peer.calls) for peer in peers)
            assert user.call_bytes == sum(call[3] for peer in peers for call in peer.calls.values())
            assert user.subscriptions == sum(len(peer.subscriptions) for peer in peers)
        incoming = {(caller, serial) for peer in self.peers for caller, serial in peer.incoming}
        assert incoming == {(peer.id, serial) for peer in self.peers for serial in peer.calls}

    def complete(self, reader: Reader, until: int) -> None:
        """It has got all it asked for of what's still there, or was told."""
        got = set(reader.offsets)
        for offset, (source, topic, payload) in self.journal.kept.items():
            if not max(reader.start, self.journal.oldest_offset) <= offset < until:
                continue
            name = topic.decode()
            passes = reader.wanted.topic(name, source.decode())
            if passes is None:
                passes = reader.wanted.payload(name, payload)
            if reader.start > 0:
                assert passes == (offset in got), f"{name} at {offset} should {'' if passes else 'not '}have come"
            else:  # since a time, or the beginning, which may have been forgotten meanwhile
                assert passes or offset not in got


class Worlds:
    """Makes worlds on one journal in a directory of its own."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="pyx-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self._open()

    def _open(self) -> None:
        limits = Limits(segment_bytes=16 << 10, max_bytes=64 << 10, sync_interval_s=60.0)
        self.journal = FlakyJournal(self._directory / "journal", limits)
        self.journal.kept, self.journal.last_of = {}, {}
        self.journal.forgotten = self.journal.oldest_offset
        self.positions = Positions(self._directory / "durable", self.journal.id)

    def run(self, program: bytes) -> None:
        if len(self.journal.last_of) > 10_000:
            self.journal.last_of.clear()
        World(self.journal, self.positions).run(program)

    def close(self) -> None:
        self.journal.close()
        shutil.rmtree(self._directory)
