"""Hostile input on the live socket of a broker process: it stays up, others are served within their deadline meanwhile, and its memory
and descriptors are as before when the hostile have gone.

The hostile are a user, or root where only root gets that far; each attack is a process of its own, as are those who are to be served:
a service and a caller, two other users, who calls every few milliseconds. Needs root.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgpack import packb, unpackb
from tests.bus_process import BrokerProcess, RawPeer

from pyx_bus import wire
from pyx_bus.wire import HEADER, encode

# What a caller among the unsuspecting allows its call, on a machine that runs other tests too; alone it takes some 100 us.
DEADLINE_S = 1.0
# The allocator keeps some pages of what an attack made it ask for; a leak of an attack's size is ten times that.
SLACK_BYTES = 8 << 20
# What one hostile frame of 4 MiB may make the broker allocate for a moment.
PEAK_BYTES = 48 << 20
# An event, with as many and as costly subscriptions as one user may have.
PUBLISHED_WITHIN_S = 0.5
RECOVERY_S = 15.0
# Of 65,536 that the broker may have.
MOST_DESCRIPTORS = 32_768

USERS, NETD, CALLER, HOSTILE = 61_001, 61_003, 61_011, 61_012

HELLO = encode(wire.HELLO, b"", packb({"version": wire.PROTOCOL_VERSION, "oldest": wire.PROTOCOL_VERSION, "name": "hostile"}))
NESTED = b"\x91" * 3000


# The host's users and groups replaced by ones that need no entry there; all else is the program as it runs.
PROGRAM = f"""
from pyx_bus.broker import __main__
from pyx_bus.broker import roles
known = roles.Roles(user_gids=[{USERS}], service_uids={{{NETD}: "netd"}})
roles.Roles.of_host = classmethod(lambda cls: known)
__main__.main()
"""


class Broker(BrokerProcess):
    def start(self) -> None:
        config = self.directory / "config.toml"
        config.write_text("[bus]\njournal_segment_bytes = 1048576\njournal_max_bytes = 4194304\n")
        run, root = str(self.directory), str(self.directory / "root")
        environment = {**os.environ, "PYX_RUN": run, "PYX_ROOT": root, "PYX_CONFIG": str(config)}
        environment.pop("PYX_BUS", None)
        with open(self.directory / "broker.log", "ab") as log:
            self.process = subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, stderr=log)
        deadline = time.monotonic() + 20
        while True:
            try:
                return RawPeer(self.path).sock.close()
            except OSError:
                assert time.monotonic() < deadline and self.process.poll() is None, "the broker doesn't start"
                time.sleep(0.01)


@pytest.fixture
def broker() -> Iterator[Broker]:
    """A broker in its everyday state: it has routed, published and forgotten a bit."""
    directory = Path(tempfile.mkdtemp(prefix="bus-hostile-"))
    directory.chmod(0o755)
    made = Broker(directory)
    try:
        made.start()
        with RawPeer(made.path, "first", "p") as peer:
            peer.subscribe(">")
            peer.publish(b"a.b", 1, 2000)
        for _ in range(20):
            with RawPeer(made.path) as peer:
                assert peer.call(b"bus.stats")["connections"] <= 2
        yield made
        assert made.process is not None and made.process.poll() is None, "the broker ended"
    finally:
        made.stop()
        shutil.rmtree(directory)


@contextlib.contextmanager
def unharmed(broker: Broker) -> Iterator[None]:
    """Around an attack: others are served meanwhile, and afterwards all is as before."""
    descriptors, memory = settled(broker)
    with bystanders(broker):
        yield
    deadline = time.monotonic() + RECOVERY_S
    while True:
        now = settled(broker)
        if now[0] == descriptors and now[1] < memory + SLACK_BYTES:
            return
        assert time.monotonic() < deadline, f"(descriptors, PSS) were {descriptors, memory}, and are {now}"
        time.sleep(0.05)


def settled(broker: Broker) -> tuple[int, int]:
    """(descriptors, PSS) when the broker has dealt with everything up to now, this connection's own aside."""
    with RawPeer(broker.path) as peer:
        peer.call(b"bus.stats")
        return broker.descriptors() - 1, broker.pss_bytes()


def become(uid: int, gid: int) -> None:
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def forked(run: Callable[[], None]) -> int:
    """The PID of a child that runs it; its status says whether it came to its end."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        run()
        status = 0
    except BaseException as error:
        os.write(2, f"a child of the test failed: {error!r}\n".encode())
    finally:
        os._exit(status)


def serve(broker: Broker, tell: int) -> None:
    """A service that answers everything at once, until killed."""
    become(NETD, NETD)
    service = RawPeer(broker.path, "netd")
    service.send(wire.REGISTER, b"netd", packb({"methods": {"echo": True}}), serial=1)
    service.expect(wire.RESULT)
    service.sock.settimeout(None)
    os.write(tell, b"ready\n")
    decoder = wire.Decoder()
    while data := service.sock.recv(1 << 18):
        calls = [frame for frame in decoder.feed(data) if frame.kind == wire.CALL]
        service.sock.sendall(b"".join([encode(wire.RESULT, b"", b"\x80", call.peer, call.serial) for call in calls]))


def call_on(broker: Broker, done: int, tell: int) -> None:
    """Call until told to be ``done``; tell how it went."""
    become(CALLER, USERS)
    calls, slowest_s, failure = 0, 0.0, ""
    try:
        with RawPeer(broker.path, "unsuspecting") as caller:
            while not calls or not select.select([done], [], [], 0.002)[0]:
                started = time.monotonic()
                assert caller.call(b"netd.echo") == {}
                slowest_s = max(slowest_s, time.monotonic() - started)
                calls += 1
    except BaseException as error:
        failure = repr(error)
    os.write(tell, json.dumps({"calls": calls, "slowest_s": slowest_s, "failure": failure}).encode())


@contextlib.contextmanager
def bystanders(broker: Broker) -> Iterator[None]:
    """A service and its caller, whose every call is answered in time."""
    done, stop = os.pipe()
    told, tell = os.pipe()
    service = forked(lambda: serve(broker, tell))
    with os.fdopen(told) as lines:
        assert lines.readline() == "ready\n"
        caller = forked(lambda: call_on(broker, done, tell))
        os.close(tell)
        os.close(done)
        try:
            yield
        finally:
            os.write(stop, b"x")
            os.waitpid(caller, 0)
            os.close(stop)
            os.kill(service, signal.SIGKILL)
            os.waitpid(service, 0)
        report = json.loads(lines.read())
    assert not report["failure"], report
    assert report["slowest_s"] < DEADLINE_S, report


def attack(attacker: Callable[[], None], uid: int = HOSTILE, gid: int = USERS) -> None:
    """In a process of its own, which ends with all its connections."""

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (20_000, 20_000))
        become(uid, gid)
        attacker()

    assert os.waitpid(forked(run), 0)[1] == 0


def attack_as_root(attacker: Callable[[], None]) -> None:
    attack(attacker, 0, 0)


Attack = Callable[[Callable[[], None]], None]


def raw(broker: Broker) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(broker.path))  # waits while the queue of those who want to connect is full
    sock.settimeout(20)
    return sock


def said(sock: socket.socket) -> bytes:
    """Everything the broker still says, up to its closing the connection."""
    data = b""
    while True:
        try:
            chunk = sock.recv(1 << 20)
        except ConnectionResetError:
            return data
        if not chunk:
            return data
        data += chunk


def push(sock: socket.socket, data: bytes, seconds: float) -> bool:
    """Say it over and over without ever reading, until the broker has had enough or takes no more. Whether it has ended it."""
    end = time.monotonic() + seconds
    sock.setblocking(False)
    rest = memoryview(data)
    while time.monotonic() < end:
        try:
            rest = rest[sock.send(rest, socket.MSG_NOSIGNAL) :] or memoryview(data)
        except BlockingIOError:
            select.select([], [sock], [], 0.05)
        except (BrokenPipeError, ConnectionResetError):
            return True
    return False


# --- nonsense ----------------------------------------------------------------------------------------------------------


def garbage() -> Iterator[bytes]:
    generator = random.Random(1)
    for _ in range(50):
        yield generator.randbytes(generator.randint(24, 2000)) + b"\xff" * 24
        yield HELLO + generator.randbytes(generator.randint(24, 2000)) + b"\xff" * 24
    for size in (0, 1, 23, wire.MAX_FRAME + 1, 1 << 31, (1 << 32) - 1):
        for kind in wire.KIND_NAMES:
            yield HELLO + HEADER.pack(size, kind, 0, 0, 255, 0, 1, 0)
    yield HEADER.pack(wire.MAX_HELLO + 1, wire.HELLO, 0, 0, 0, 0, 0, 0)
    for body in (NESTED, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xc1", b"\x81\xa1a", b"\x90"):
        yield encode(wire.HELLO, b"", body)
        yield HELLO + encode(wire.SUBSCRIBE, b"", body, 1, 1)
        yield HELLO + encode(wire.REGISTER, b"hostile", body, 0, 1)
        yield HELLO + encode(wire.CALL, b"bus.forget", body, 0, 1)
    for kind in (wire.HELLO, wire.WELCOME, wire.EVENT, wire.GAP, wire.HEARTBEAT, 0, 99, 255):
        yield HELLO + encode(kind, b"", b"")


@pytest.mark.parametrize("attack_as", [attack, attack_as_root])
def test_garbage_ends_the_connection_and_nothing_else(broker: Broker, attack_as: Attack) -> None:
    def attacker() -> None:
        for data in garbage():
            with raw(broker) as sock:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                assert said(sock)

    with unharmed(broker):
        attack_as(attacker)
    with RawPeer(broker.path) as peer:
        assert peer.call(b"bus.stats")["protocol_errors"] > 200


def test_why_is_told_before_the_end(broker: Broker) -> None:
    with raw(broker) as sock:
        sock.sendall(HELLO + HEADER.pack(wire.MAX_FRAME + 1, wire.CALL, 0, 0, 0, 0, 1, 0))
        assert b"bad frame header" in said(sock)


@pytest.mark.parametrize("payload", [NESTED, b"\xdd\xff\xff\xff\xff", b"\x81\xa1a", b"\xc1", b"\xc0", b""])
def test_an_event_that_is_nonsense_is_refused_alone(broker: Broker, payload: bytes) -> None:
    """A publisher's other events aren't its fault."""
    with RawPeer(broker.path, "publisher", "q") as publisher, RawPeer(broker.path) as reader:
        first = reader.subscribe("a.*")
        good = encode(wire.PUBLISH, b"a.b", packb({"id": "x"}), arg=1), encode(wire.PUBLISH, b"a.b", packb({"id": "z"}), arg=3)
        publisher.sock.sendall(good[0] + encode(wire.PUBLISH, b"a.b", payload, arg=2) + good[1])
        refused = [f for f in (publisher.receive() for _ in range(2)) if f.kind == wire.ERROR]
        assert [(f.serial, f.arg, unpackb(f.body)["code"]) for f in refused] == [(0, 2, "invalid_argument")]
        assert reader.events_until(first + 1) == ([first, first + 1], [])


def test_frames_cut_off_anywhere(broker: Broker) -> None:
    conversation = (
        HELLO
        + encode(wire.SUBSCRIBE, b"", packb({"patterns": [">"]}), 1, 1)
        + encode(wire.CALL, b"netd.hang", b"\x80", 0, 2)
        + encode(wire.PUBLISH, b"a.b", packb({"id": "x"}), arg=1)
        + encode(wire.REGISTER, b"hostile", b"\x80", 0, 3)
    )

    def attacker() -> None:
        for end in range(len(conversation) + 1):
            with raw(broker) as sock:
                sock.sendall(conversation[:end])
                if end % 2:
                    sock.shutdown(socket.SHUT_WR)
                    said(sock)

    with unharmed(broker):
        attack(attacker)


@pytest.mark.parametrize("attack_as", [attack, attack_as_root])
def test_frames_of_which_the_end_never_comes(broker: Broker, attack_as: Attack) -> None:
    """What has come of them is held, up to a user's quota, and given back with the connection."""

    def attacker() -> None:
        socks = []
        for _ in range(30):
            sock = raw(broker)
            socks.append(sock)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(HELLO + encode(wire.CALL, b"netd.echo", bytes(wire.MAX_FRAME - 100), 0, 1)[:-1])

    with unharmed(broker):
        attack_as(attacker)


@pytest.mark.parametrize(
    ("kind", "route"), [(wire.SUBSCRIBE, b""), (wire.REGISTER, b"hostile"), (wire.CALL, b"bus.forget"), (wire.CALL, b"bus.stats")]
)
@pytest.mark.parametrize("item", [b"\x80", b"\x90", b"\xa0", b"\xc0"])
def test_a_large_body_of_many_small_things_costs_little(broker: Broker, kind: int, route: bytes, item: bytes) -> None:
    """A byte of msgpack can become an object of 64 bytes, and a frame has four million."""
    count = wire.MAX_FRAME - 100
    body = b"\x81\xa1x\xdd" + count.to_bytes(4, "big") + item * count

    def attacker() -> None:
        for _ in range(3):
            with raw(broker) as sock:
                sock.sendall(HELLO + encode(kind, route, body[: wire.MAX_FRAME - 64], 1, 1))
                sock.shutdown(socket.SHUT_WR)
                said(sock)

    with unharmed(broker):
        before = peak_bytes(broker, reset=True)
        attack_as_root(attacker)
        assert peak_bytes(broker) - before < PEAK_BYTES


def peak_bytes(broker: Broker, *, reset: bool = False) -> int:
    """The largest resident size (proc(5), VmHWM); ``reset`` starts again at what it is now."""
    if reset:
        Path(f"/proc/{broker.pid}/clear_refs").write_text("5")
    for line in Path(f"/proc/{broker.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmHWM in status")


# --- connections -------------------------------------------------------------------------------------------------------


def test_thousands_of_connections_that_say_nothing(broker: Broker) -> None:
    """They are closed when their HELLO is overdue."""

    def attacker() -> None:
        socks = [raw(broker) for _ in range(3000)]
        for sock in socks:
            assert b"deadline_exceeded" in said(sock)

    with unharmed(broker):
        attack_as_root(attacker)


def test_thousands_of_connections_that_are_idle(broker: Broker) -> None:
    """Up to the bound; who comes then is told."""
    told, tell = os.pipe()

    def attacker() -> None:
        socks = []
        for _ in range(3000):
            sock = raw(broker)
            sock.sendall(HELLO)
            socks.append(sock)
        for sock in socks:
            assert sock.recv(24)[4] == wire.WELCOME
        refused = b""
        for _ in range(1200):
            sock = raw(broker)
            with contextlib.suppress(BrokenPipeError):
                sock.sendall(HELLO)
            first = sock.recv(4096)
            if first[4] == wire.ERROR:
                refused = first
            socks.append(sock)
        os.write(tell, refused)

    with unharmed(broker):
        attack_as_root(attacker)
    assert b"resource_exhausted" in os.read(told, 4096)
    os.close(told)
    os.close(tell)


def test_connections_that_come_and_go(broker: Broker) -> None:
    def attacker() -> None:
        for number in range(20_000):
            with raw(broker) as sock:
                if number % 4 == 0:
                    sock.sendall(HELLO)

    with unharmed(broker):
        attack(attacker)


# --- descriptors -------------------------------------------------------------------------------------------------------


def carrying(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def with_announced(frame: bytes, count: int) -> bytes:
    return frame[:6] + bytes([count]) + frame[7:]


MISPLACED = {
    "before HELLO, in the middle of a frame": (b"\x18", 1),
    "with HELLO": (HELLO, 1),
    "announced in HELLO": (with_announced(HELLO, 1), 1),
    **{
        f"with {name}": (HELLO + encode(kind, b"a.b", b"\x80", 1, 1), 1)
        for kind, name in wire.KIND_NAMES.items()
        if kind not in (wire.HELLO,)
    },
    **{
        f"announced in {name}": (HELLO + with_announced(encode(kind, b"a.b", b"\x80", 1, 1), 1), 1)
        for kind, name in wire.KIND_NAMES.items()
        if kind not in (wire.HELLO, wire.CALL, wire.RESULT, wire.ITEM)
    },
    "fewer than announced": (HELLO + with_announced(encode(wire.CALL, b"netd.echo", b"\x80", 0, 1), 3), 1),
    "more than announced": (HELLO + with_announced(encode(wire.CALL, b"netd.echo", b"\x80", 0, 1), 1), 3),
    "more than a frame may have": (HELLO + with_announced(encode(wire.CALL, b"netd.echo", b"\x80", 0, 1), 17), 17),
    "as many as the kernel lets pass": (HELLO + encode(wire.PING, b"", b""), 253),
    "in a call to nobody": (HELLO + with_announced(encode(wire.CALL, b"nobody.x", b"\x80", 0, 1), 1), 1),
    "in a call to the broker": (HELLO + with_announced(encode(wire.CALL, b"bus.stats", b"\x80", 0, 1), 1), 1),
    "in a bad call to the broker": (HELLO + with_announced(encode(wire.CALL, b"bus.forget", b"\xc1", 0, 1), 1), 1),
    "in a call to a method that isn't there": (HELLO + with_announced(encode(wire.CALL, b"netd.nothing", b"\x80", 0, 1), 1), 1),
    "in an answer nobody waits for": (HELLO + with_announced(encode(wire.RESULT, b"", b"\x80", 9, 9), 1), 1),
    "in a frame that doesn't end": (HELLO + with_announced(encode(wire.CALL, b"netd.echo", b"\x80" * 9, 0, 1), 1)[:-1], 1),
}


@pytest.mark.parametrize("case", MISPLACED)
def test_descriptors_where_none_belong_are_closed(broker: Broker, case: str) -> None:
    data, count = MISPLACED[case]

    def attacker() -> None:
        for _ in range(3):
            read_end, write_end = os.pipe()
            with raw(broker) as sock:
                carrying(sock, data, [write_end] * count)
                os.close(write_end)
                sock.shutdown(socket.SHUT_WR)
                said(sock)
            assert select.select([read_end], [], [], 10)[0], "the broker kept the descriptor"
            assert os.read(read_end, 1) == b""
            os.close(read_end)

    with unharmed(broker):
        attack(attacker)


def test_descriptors_for_a_service_that_never_reads(broker: Broker) -> None:
    """The broker doesn't hoard them until it has none left for connections."""

    def attacker() -> None:
        null = os.open("/dev/null", os.O_RDONLY)
        frames = [with_announced(encode(wire.CALL, b"deaf.x", b"\x80", 0, serial), 16) for serial in range(1, 4000)]
        for _ in range(8):
            caller = raw(broker)
            callers.append(caller)
            caller.sendall(HELLO)
            caller.settimeout(0.2)
            with contextlib.suppress(OSError):
                for frame in frames:
                    carrying(caller, frame, [null] * 16)
        os.write(tell, b"x")
        os.read(wait, 1)

    callers: list[socket.socket] = []
    told, tell = os.pipe()
    wait, go = os.pipe()
    with unharmed(broker), RawPeer(broker.path, "deaf") as service:
        service.send(wire.REGISTER, b"deaf", packb({"methods": {"x": True}}), serial=1)
        service.expect(wire.RESULT)
        child = forked(lambda: become(HOSTILE, USERS) or attacker())
        assert os.read(told, 1) == b"x"
        with RawPeer(broker.path) as newcomer:
            newcomer.call(b"bus.stats")
        held = broker.descriptors()
        os.write(go, b"x")
        os.waitpid(child, 0)
        assert held < MOST_DESCRIPTORS
    for fd in (told, tell, wait, go):
        os.close(fd)


# --- peers that never read ---------------------------------------------------------------------------------------------

FLOODS = {
    "calls to the broker": encode(wire.CALL, b"bus.stats", b"\x80", 0, 1),
    "calls to a service": b"".join(encode(wire.CALL, b"netd.echo", b"\x80", 0, serial) for serial in range(1, 100)),
    "large calls to a service": encode(wire.CALL, b"netd.echo", b"\xc6\x00\x0f\xff\xf0" + bytes(0xFFFF0), 0, 1),
    "calls to nobody": encode(wire.CALL, b"nobody.x", b"\x80", 0, 1),
    "answers nobody waits for": encode(wire.RESULT, b"", b"\x80" * 100, 1, 1),
    "items nobody waits for": encode(wire.ITEM, b"", b"\x80" * 100, 1, 1),
    "errors nobody waits for": encode(wire.ERROR, b"", b"\x80", 1, 1),
    "cancels of nothing": encode(wire.CANCEL, b"", b"", 0, 1),
    "calls and cancels": encode(wire.CALL, b"netd.echo", b"\x80", 0, 1) + encode(wire.CANCEL, b"", b"", 0, 1),
    "credit for nothing": encode(wire.CREDIT, b"", b"", 0, 1, 64),
    "registrations": encode(wire.REGISTER, b"bus", b"\x80", 0, 1),
    "subscriptions": encode(wire.SUBSCRIBE, b"", packb({"patterns": [">"]}), 1, 1),
    "subscriptions that end": encode(wire.SUBSCRIBE, b"", packb({"patterns": [">"]}), 1, 1) + encode(wire.UNSUBSCRIBE, b"", b"", 1),
    "subscriptions to all there was": encode(wire.SUBSCRIBE, b"", packb({"patterns": [">"], "since": "beginning"}), 1, 1)
    + encode(wire.UNSUBSCRIBE, b"", b"", 1),
    "subscriptions to nothing": encode(wire.UNSUBSCRIBE, b"", b"", 7),
    "events": b"".join(encode(wire.PUBLISH, b"a.b", packb({"id": "x"}), 0, 0, number) for number in range(1, 2000)),
    "large events": encode(wire.PUBLISH, b"a.b", packb({"id": "x" * 1_000_000}), 0, 0, 1),
    "events that are nonsense": encode(wire.PUBLISH, b"a..b", b"\xc1", 0, 0, 1),
    "events on ever other topics": b"".join(
        encode(wire.PUBLISH, b"a.%d" % number, packb({"id": "x"}), 0, 0, number) for number in range(1, 20_000)
    ),
    "acknowledgements of nothing": encode(wire.ACK, b"", b"", 1, 0, 1),
    "pings": encode(wire.PING, b"", b"", 0, 1),
    "pongs": encode(wire.PONG, b"", b"", 0, 1),
}


@pytest.mark.parametrize("attack_as", [attack, attack_as_root])
@pytest.mark.parametrize("what", FLOODS)
def test_flood_by_peers_that_never_read(broker: Broker, what: str, attack_as: Attack) -> None:
    data = FLOODS[what]
    data *= max(1, 65536 // len(data))

    def attacker() -> None:
        for _ in range(2):
            sock = raw(broker)
            sock.sendall(HELLO)
            push(sock, data, 0.4)
            sock.close()

    with unharmed(broker):
        before = peak_bytes(broker, reset=True)
        attack_as(attacker)
        assert peak_bytes(broker) - before < PEAK_BYTES


def test_a_caller_that_never_takes_its_answers_is_disconnected(broker: Broker) -> None:
    with RawPeer(broker.path, "big") as service, RawPeer(broker.path, "deaf") as deaf, RawPeer(broker.path) as peer:
        service.send(wire.REGISTER, b"big", packb({"methods": {"x": True}}), serial=1)
        service.expect(wire.RESULT)
        answer = bytes(wire.MAX_FRAME - 100)
        for serial in range(1, 20):
            deaf.send(wire.CALL, b"big.x", b"\x80", serial=serial)
            call = service.expect(wire.CALL)
            service.send(wire.RESULT, b"", answer, peer=call.peer, serial=call.serial)
            service.send(wire.PING)
            while service.receive().kind != wire.PONG:
                pass
            if peer.call(b"bus.stats")["connections"] == 2:
                assert serial > 2
                return
        raise AssertionError("19 answers of 4 MiB wait for somebody who never reads")


def test_subscribers_that_never_read(broker: Broker) -> None:
    def attacker() -> None:
        deaf = [RawPeer(broker.path, "deaf") for _ in range(40)]
        for peer in deaf:
            peer.subscribe(">")
        with RawPeer(broker.path, "publisher", "r") as publisher:
            for first in range(1, 30_000, 300):
                publisher.publish(b"big.event", first, 300, 1000)
                publisher.wait_acknowledged(first + 299)

    with unharmed(broker):
        attack_as_root(attacker)


def test_heartbeats_and_filters_without_number(broker: Broker) -> None:
    """As many subscriptions as a user may have, each with all the work that one can make."""
    values = {f"{field}!": [field * 4 + str(i) for i in range(256)] for field in ("container", "image", "network", "volume")}
    body = packb({"patterns": [f"a{i}.*" for i in range(63)] + [">"], "filters": values, "heartbeat_ms": 100})
    assert len(body) < 64 << 10

    def attacker() -> None:
        peers = [RawPeer(broker.path, "busy") for _ in range(16)]
        for peer in peers:
            for number in range(1, 65):
                peer.send(wire.SUBSCRIBE, b"", body, peer=number, serial=number)
        os.write(tell, b"x")
        os.read(wait, 1)

    told, tell = os.pipe()
    wait, go = os.pipe()
    with unharmed(broker):
        child = forked(lambda: become(HOSTILE, USERS) or attacker())
        assert os.read(told, 1) == b"x"
        with RawPeer(broker.path, "publisher", "s") as publisher:
            slowest_s = 0.0
            for sequence in range(1, 11):
                started = time.monotonic()
                said = dict.fromkeys(("container", "image", "network", "volume"), "0" * 64)
                event = packb({"id": "1" * 64, "time_ns": 1, "attributes": said})
                publisher.send(wire.PUBLISH, b"container.event", event, arg=sequence)
                publisher.wait_acknowledged(sequence)
                slowest_s = max(slowest_s, time.monotonic() - started)
        os.write(go, b"x")
        os.waitpid(child, 0)
        assert slowest_s < PUBLISHED_WITHIN_S
    for fd in (told, tell, wait, go):
        os.close(fd)
