"""Who may do what: a real broker process, and peers that the kernel says other users and groups of.

Peers connect in a child process that has become somebody else (setgroups, setresgid, setresuid) and hands the socket back: the kernel
keeps the credentials of the moment of connecting. Users and groups are numbers that need no entry on the host. Needs root.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from msgpack import packb, unpackb

from pyx_bus import client, errors, sync, wire
from pyx_bus.broker import roles
from pyx_bus.service import first_error
from pyx_bus.wire import Frame

USERS, MONITORS, NETD, LOGD = 61_001, 61_002, 61_003, 61_004
MEMBER, OTHER_MEMBER, WATCHER, STRANGER = 61_011, 61_012, 61_013, 61_014
NOBODYS = 61_099  # a group that means nothing
TIMEOUT_S = 20.0
# Within this everybody else is served while one user is at its limits. Alone a call takes a fraction of a millisecond.
SERVED_WITHIN_S = 2.0

BROKER = """
import json, sys
from pathlib import Path
from pyx_bus.broker.server import Broker, listen
from pyx_bus.broker.roles import Roles

directory, given = Path(sys.argv[1]), json.loads(sys.argv[2])
given["service_uids"] = {int(uid): name for uid, name in given["service_uids"].items()}
broker = Broker(listen(directory / "bus.sock"), directory / "bus", Roles(**given))
print("ready", flush=True)
while True:
    broker.step(broker.timeout_s())
"""


@pytest.fixture(scope="module")
def bus() -> Iterator[str]:
    """The socket of a broker that knows the users and groups above. One for all tests: each gives back what it took."""
    directory = Path(tempfile.mkdtemp(prefix="bus-roles-"))
    directory.chmod(0o755)
    given = {
        "user_gids": [USERS],
        "monitor_gids": [MONITORS],
        "service_uids": {NETD: "netd", LOGD: "logd"},
    }
    process = subprocess.Popen(
        [sys.executable, "-c", BROKER, str(directory), json.dumps(given)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield str(directory / "bus.sock")
        assert process.poll() is None, "the broker ended"
    finally:
        process.kill()
        process.communicate()
        shutil.rmtree(directory)


@pytest.fixture
def peers(bus: str) -> Iterator[Peers]:
    made = Peers(bus)
    try:
        yield made
    finally:
        made.close()


class Peer:
    """One connection, blocking."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(TIMEOUT_S)
        self.sock = sock
        self.decoder = wire.Decoder()
        self.inbox: list[Frame] = []
        self.serial = 0

    def send(self, kind: int, route: str = "", body: dict[str, Any] | None = None, **fields: int) -> None:
        self.sock.sendall(wire.encode(kind, route.encode(), packb(body or {}), **fields))

    def receive(self) -> Frame:
        """The next frame. Raises ``EOFError`` at the end, ``TimeoutError``."""
        while not self.inbox:
            data = self.sock.recv(1 << 20)
            if not data:
                raise EOFError
            self.inbox += self.decoder.feed(data, None)
        return self.inbox.pop(0)

    def expect(self, kind: int) -> Frame:
        """The next frame, which must be of that kind. Raises the error that comes in its place."""
        frame = self.receive()
        if frame.kind == wire.ERROR != kind:
            raise errors.from_body(unpackb(frame.body))
        assert frame.kind == kind, frame
        return frame

    def hello(self, name: str = "peer", publisher: str = "") -> dict[str, Any]:
        version = wire.PROTOCOL_VERSION
        with contextlib.suppress(BrokenPipeError):  # refused already: why is there to be read
            self.send(wire.HELLO, body={"version": version, "oldest": version, "name": name, "publisher": publisher})
        return dict(unpackb(self.expect(wire.WELCOME).body))

    def ask(self, kind: int, route: str = "", body: dict[str, Any] | None = None, **fields: int) -> dict[str, Any]:
        """Send what has one answer, and wait for it."""
        self.serial += 1
        self.send(kind, route, body, serial=self.serial, **fields)
        frame = self.expect(wire.RESULT)
        assert frame.serial == self.serial
        return dict(unpackb(frame.body))

    def call(self, method: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return self.ask(wire.CALL, method, body)

    def register(self, name: str, methods: dict[str, bool] | None = None) -> None:
        self.ask(wire.REGISTER, name, None if methods is None else {"methods": methods})

    def subscribe(self, *patterns: str, subscription: int = 1) -> int:
        answer = self.ask(wire.SUBSCRIBE, body={"patterns": list(patterns)}, peer=subscription)
        return int(answer["next_offset"])

    def publish(self, first: int, *topics: str) -> None:
        """Events with sequence numbers from ``first`` on, in one go."""
        events = [
            wire.encode(wire.PUBLISH, topic.encode(), packb({"id": "x", "n": first + i}), arg=first + i)
            for i, topic in enumerate(topics)
        ]
        self.sock.sendall(b"".join(events))

    def refusals(self, last: int) -> list[int]:
        """Which of the events published up to ``last`` were refused, by their sequence numbers. Each event has one answer, in order."""
        refused: list[int] = []
        answered = 0
        while answered < last:
            frame = self.receive()
            assert frame.arg > answered, f"{frame} after {answered}"
            answered = frame.arg
            if frame.kind != wire.ACK:
                assert (frame.kind, frame.serial) == (wire.ERROR, 0)
                assert isinstance(errors.from_body(unpackb(frame.body)), errors.PermissionDenied)
                refused.append(frame.arg)
        return refused

    def events(self, count: int) -> list[tuple[int, str, int]]:
        """(offset, topic, ``n`` of the payload) of the next events."""
        found: list[tuple[int, str, int]] = []
        while len(found) < count:
            frame = self.expect(wire.EVENT)
            for i, (topic, payload) in enumerate(wire.split_events(frame.body)[1]):
                found.append((frame.arg + i, topic.decode(), unpackb(payload).get("n", 0)))
        return found

    def silent(self) -> bool:
        """Whether nothing has come: what was caused before is answered before a PING is."""
        self.send(wire.PING, serial=77)
        return self.receive().kind == wire.PONG

    def ended(self) -> bool:
        """Whether the broker has closed the connection, after whatever it had to say."""
        try:
            while True:
                self.receive()
        except (EOFError, ConnectionResetError):
            return True
        except TimeoutError:
            return False

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)  # a thread that reads would keep it open
        self.sock.close()


class Peers:
    """Connections of a test, closed at its end."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._made: list[Peer] = []

    def raw(self, uid: int, gid: int = NOBODYS, groups: list[int] | None = None, count: int = 1) -> list[Peer]:
        """Connections of a user, with nothing said on them."""
        found = [Peer(sock) for sock in connect_as(self._path, uid, gid, groups or [], count)]
        self._made += found
        return found

    def __call__(self, uid: int, gid: int = NOBODYS, groups: list[int] | None = None, publisher: str = "") -> Peer:
        (peer,) = self.raw(uid, gid, groups)
        peer.hello(f"user{uid}", publisher)
        return peer

    def close(self) -> None:
        for peer in self._made:
            peer.close()


def connect_as(path: str, uid: int, gid: int, groups: list[int], count: int = 1) -> list[socket.socket]:
    """Connect in a child process that is somebody else, and take the sockets over."""
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            for _ in range(count):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sock.connect(path)
                socket.send_fds(theirs, [b"x"], [sock.fileno()])
                sock.close()
            status = 0
        finally:
            os._exit(status)
    theirs.close()
    made: list[socket.socket] = []
    with ours:
        while len(made) < count:
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
            if not fds:
                break
            made.append(socket.socket(fileno=fds[0]))
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child of user {uid} failed"
    return made


class Service:
    """A service on a peer, in a thread: answers ``answer``, keeps ``hold`` unanswered, sends 4 MiB for ``big``; ``seen`` are the calls
    (method, uid, flags), ``cancelled`` counts."""

    METHODS = {"answer": True, "hold": True, "big": True, "change": False}

    def __init__(self, peer: Peer, name: str, methods: dict[str, bool] | None = METHODS) -> None:
        peer.register(name, methods)
        self.peer = peer
        self.seen: list[tuple[str, int, int]] = []
        self.cancelled = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            self.peer.sock.settimeout(None)
            while True:
                frame = self.peer.receive()
                if frame.kind == wire.CANCEL:
                    self.cancelled += 1
                if frame.kind != wire.CALL:
                    continue
                self.seen.append((frame.route.decode(), frame.arg >> 32, frame.flags))
                verb = frame.route.partition(b".")[2]
                if verb != b"hold":
                    body = {"data": b"x" * (wire.MAX_FRAME - 1024)} if verb == b"big" else {}
                    self.peer.send(wire.RESULT, body=body, peer=frame.peer, serial=frame.serial)

    def wait_for_calls(self, count: int) -> None:
        wait_for(lambda: len(self.seen) == count, f"{count} calls at the service")


@pytest.fixture
def netd(peers: Peers) -> Service:
    return Service(peers(NETD), "netd")


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} didn't come true within {TIMEOUT_S} s"
        time.sleep(0.005)


def account(root: Peer, uid: int) -> dict[str, int]:
    """What the broker has on a user; zeros for one it knows nothing of."""
    for user in root.call("bus.stats")["users"]:
        if user["uid"] == uid:
            return dict(user)
    return {"uid": uid, "connections": 0, "subscriptions": 0, "calls": 0, "call_bytes": 0, "queued_bytes": 0}


def assert_forgotten(root: Peer, uid: int) -> None:
    """Nothing is left of a user's account."""
    wait_for(
        lambda: not any(value for key, value in account(root, uid).items() if key != "uid"), f"user {uid} to be gone"
    )


def assert_others_are_served(peers: Peers, uids: tuple[int, ...] = (0, OTHER_MEMBER)) -> None:
    """Others connect, call and subscribe, each in time."""
    for uid in uids:
        began = time.monotonic()
        peer = peers(uid, USERS if uid else 0)
        assert peer.call("netd.answer") == {}
        peer.subscribe("network.>")
        took = time.monotonic() - began
        assert took < SERVED_WITHIN_S, f"user {uid} had to wait {took:.1f} s"
        peer.close()


# who may connect ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uid", "gid", "groups", "role"),
    [
        (0, 0, [], "root"),
        (0, NOBODYS, [MONITORS], "root"),
        (NETD, NOBODYS, [], "service"),
        (NETD, MONITORS, [], "service"),
        (MEMBER, USERS, [], "user"),
        (MEMBER, NOBODYS, [USERS], "user"),
        (MEMBER, NOBODYS, [MONITORS, USERS], "user"),
        (MEMBER, MONITORS, [USERS], "user"),
        (WATCHER, MONITORS, [], "monitor"),
        (WATCHER, NOBODYS, [NOBODYS + 1, MONITORS], "monitor"),
    ],
)
def test_the_role_follows_from_the_kernels_word(peers: Peers, uid: int, gid: int, groups: list[int], role: str) -> None:
    (peer,) = peers.raw(uid, gid, groups)
    welcome = peer.hello()
    assert (welcome["role"], welcome["uid"]) == (role, uid)


@pytest.mark.parametrize("count", [255, 256, 257, 300, 5000])
def test_membership_in_many_groups(peers: Peers, count: int) -> None:
    """The kernel hands over any number; Python's getsockopt takes 256 at most."""
    many = list(range(100_000, 100_000 + count - 1))
    for last, role in ((USERS, "user"), (MONITORS, "monitor")):
        (peer,) = peers.raw(MEMBER, NOBODYS, [*many, last])
        assert peer.hello()["role"] == role
    (peer,) = peers.raw(STRANGER, NOBODYS, many)
    with pytest.raises(errors.PermissionDenied):
        peer.hello()


def test_others_are_refused_and_told_why(peers: Peers) -> None:
    root = peers(0)
    before = root.call("bus.stats")["refused"]
    for uid, gid, groups in ((STRANGER, NOBODYS, []), (STRANGER, 0, [0]), (USERS, NOBODYS, [NETD])):
        (peer,) = peers.raw(uid, gid, groups)
        frame = peer.receive()  # without a word of ours
        assert (frame.kind, frame.serial, frame.arg) == (wire.ERROR, 0, 0)
        error = errors.from_body(unpackb(frame.body))
        assert isinstance(error, errors.PermissionDenied)
        assert str(uid) in error.message
        assert "pyx" in error.hint and "pyx-monitor" in error.hint
        assert peer.ended()
    assert root.call("bus.stats")["refused"] == before + 3
    assert account(root, STRANGER)["connections"] == 0


@pytest.mark.parametrize("which", ["blocking", "trio", "asyncio"])
def test_the_clients_tell_who_is_refused_why(bus: str, which: str) -> None:
    """However soon the broker has closed the connection: before our HELLO is out, too."""

    def blocking() -> None:
        sync.Connection(bus).close()

    async def connecting() -> None:
        async with client.connect(bus, "stranger"):
            pass

    def attempt() -> str:
        said = "connected"
        try:
            blocking() if which == "blocking" else anyio.run(connecting, backend=which)
        except* errors.BusError as group:  # the async client's comes out of a nursery
            error = first_error(group)
            said = f"{error.code}: {error.message}"
        return said

    said = as_somebody_else(STRANGER, lambda: sorted({attempt() for _ in range(30)}))
    assert said == [f"permission_denied: user {STRANGER} may not use this bus"]


def as_somebody_else(uid: int, call: Callable[[], object]) -> Any:
    """What a function returns in a child process of that user, by way of JSON."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODYS, NOBODYS, NOBODYS)
            os.setresuid(uid, uid, uid)
            os.write(write_end, json.dumps(call()).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return json.loads(said)


def test_a_role_is_of_the_connection_not_of_the_process(peers: Peers) -> None:
    """Two connections of one user with different groups, as after newgrp(1)."""
    user, monitor = peers(MEMBER, USERS), peers(MEMBER, MONITORS)
    Service(peers(NETD), "netd")
    user.call("netd.change")
    with pytest.raises(errors.PermissionDenied):
        monitor.call("netd.change")
    assert account(peers(0), MEMBER)["connections"] == 2


# monitors -----------------------------------------------------------------------------------------------------------------


def test_a_monitor_calls_what_only_reads(peers: Peers, netd: Service) -> None:
    watcher, member = peers(WATCHER, MONITORS), peers(MEMBER, USERS)
    watcher.call("netd.answer")
    member.call("netd.answer")
    # the service is told that it's a monitor, to mask secrets for it
    assert netd.seen == [("netd.answer", WATCHER, wire.FLAG_MONITOR), ("netd.answer", MEMBER, 0)]
    with pytest.raises(errors.PermissionDenied, match="monitors"):
        watcher.call("netd.change")
    member.call("netd.change")
    assert netd.seen[2:] == [("netd.change", MEMBER, 0)], "the monitor's call got through"


def test_methods_that_nobody_listed_are_refused(peers: Peers, netd: Service) -> None:
    for peer in (peers(0), peers(MEMBER, USERS), peers(WATCHER, MONITORS)):
        for method in ("netd.nosuch", "netd.", "netd", "netd.answer.more"):
            with pytest.raises(errors.Unimplemented):
                peer.call(method)
    assert netd.seen == []


def test_a_service_that_lists_nothing_is_for_users_alone(peers: Peers) -> None:
    service = Service(peers(LOGD), "logd", None)
    peers(MEMBER, USERS).call("logd.anything")
    with pytest.raises(errors.PermissionDenied):
        peers(WATCHER, MONITORS).call("logd.anything")
    assert service.seen == [("logd.anything", MEMBER, 0)]


def test_a_monitor_sees_events_and_the_brokers_figures(peers: Peers, netd: Service) -> None:
    watcher = peers(WATCHER, MONITORS)
    assert [service["name"] for service in watcher.call("bus.services")["services"]] == ["netd"]
    assert watcher.call("bus.stats")["connections_by_role"] == {"service": 1, "monitor": 1}
    offset = watcher.subscribe("network.>")
    netd.peer.publish(1, "network.create", "network.destroy")
    assert watcher.events(2) == [(offset, "network.create", 1), (offset + 1, "network.destroy", 2)]


def test_a_monitor_registers_and_publishes_nothing_and_forgets_only_its_own(peers: Peers) -> None:
    watcher, member = peers(WATCHER, MONITORS), peers(MEMBER, USERS)
    # somebody's durable subscription that a monitor would like to be rid of
    member.ask(wire.SUBSCRIBE, body={"patterns": [">"], "durable": "keep"}, peer=1)
    member.close()
    with pytest.raises(errors.PermissionDenied):
        watcher.call("bus.forget", {"name": "keep", "uid": MEMBER})
    watcher.ask(wire.SUBSCRIBE, body={"patterns": [">"], "durable": "keep"}, peer=1)
    watcher.send(wire.UNSUBSCRIBE, peer=1)
    assert [durable["uid"] for durable in watcher.call("bus.durables")["durables"]] == [WATCHER]  # it sees its own
    watcher.call("bus.forget", {"name": "keep"})
    assert_no_service(watcher)
    peers(0).call("bus.forget", {"name": "keep", "uid": MEMBER})


# who may register and publish ---------------------------------------------------------------------------------------------


def assert_no_service(peer: Peer) -> None:
    """It can neither register anything nor publish anything."""
    for name in (*roles.SERVICES, "mine"):
        with pytest.raises(errors.PermissionDenied, match=name):
            peer.register(name, {})
    topics = [f"{word}.create" for word in (*roles.TOPIC_OWNERS, "mine")]
    peer.publish(1, *topics)
    assert peer.refusals(len(topics)) == list(range(1, len(topics) + 1))


def test_a_user_neither_registers_nor_publishes(peers: Peers) -> None:
    watcher = peers(0)
    watcher.subscribe(">")
    assert_no_service(peers(MEMBER, USERS))
    assert watcher.silent(), "an event of a user's got through"


def test_a_service_registers_its_own_name_alone(peers: Peers) -> None:
    peer = peers(NETD)
    for name in ("logd", "containerd", "toy"):
        with pytest.raises(errors.PermissionDenied, match="netd|" + name):
            peer.register(name, {})
    with pytest.raises(errors.InvalidArgument):
        peer.register("bus", {})
    peer.register("netd", {})
    (described,) = peer.call("bus.services")["services"]
    assert (described["name"], described["uid"]) == ("netd", NETD)


def test_a_service_publishes_its_own_topics_alone(peers: Peers) -> None:
    """What isn't its own is refused by its number; the rest of the run goes through, in order and without a hole."""
    watcher = peers(MEMBER, USERS)
    offset = watcher.subscribe(">")
    service = peers(NETD, publisher="netd")
    topics = [
        "network.create", "container.die", "network.connect", "service.down", "daemon.reload", "log.trouble", "toy.x",
        "network.destroy", "netd.own",
    ]  # fmt: skip
    service.publish(10, *topics)
    assert service.refusals(18) == [11, 13, 14, 15, 16]
    assert watcher.events(4) == [
        (offset, "network.create", 10),
        (offset + 1, "network.connect", 12),
        (offset + 2, "network.destroy", 17),
        (offset + 3, "netd.own", 18),
    ]
    assert watcher.silent()


def test_a_name_is_taken_once(peers: Peers, netd: Service) -> None:
    with pytest.raises(errors.AlreadyExists):
        peers(NETD).register("netd", {})


def test_sequence_numbers_are_a_users_own(peers: Peers) -> None:
    """Two users that call their publisher the same: neither's numbers are taken for the other's repetitions."""
    watcher = peers(MEMBER, USERS)
    offset = watcher.subscribe(">")
    netd, logd = peers(NETD, publisher="same"), peers(LOGD, publisher="same")
    netd.publish(1 << 40, "network.create")
    assert netd.expect(wire.ACK).arg == 1 << 40
    logd.publish(1, "log.trouble")
    assert logd.expect(wire.ACK).arg == 1
    netd.publish(1 << 40, "network.create")  # this is a repetition
    assert netd.expect(wire.ACK).arg == 1 << 40
    assert watcher.events(2) == [(offset, "network.create", 1 << 40), (offset + 1, "log.trouble", 1)]
    assert watcher.silent()


# quotas -------------------------------------------------------------------------------------------------------------------


def test_a_users_connections_are_bounded(peers: Peers, netd: Service) -> None:
    root = peers(0)
    limit = roles.User.max_connections
    made = peers.raw(MEMBER, USERS, count=limit)
    for peer in made:
        peer.hello()
    (more,) = peers.raw(MEMBER, USERS)
    with pytest.raises(errors.ResourceExhausted, match=str(limit)):
        more.hello()
    assert more.ended()
    (more,) = peers.raw(MEMBER, MONITORS)  # of the user, whatever the role
    with pytest.raises(errors.ResourceExhausted):
        more.hello()
    assert_others_are_served(peers)
    made[0].close()
    wait_for(lambda: account(root, MEMBER)["connections"] == limit - 1, "one connection's end")
    peers(MEMBER, USERS).call("netd.answer")
    for peer in peers._made:
        if peer not in (root, netd.peer):
            peer.close()
    assert_forgotten(root, MEMBER)


def test_connections_that_say_nothing_count_too(peers: Peers, netd: Service) -> None:
    root = peers(0)
    peers.raw(MEMBER, USERS, count=roles.User.max_connections)
    (more,) = peers.raw(MEMBER, USERS)
    with pytest.raises(errors.ResourceExhausted):
        more.hello()
    assert_others_are_served(peers)
    # nobody closes them but the broker, for want of a HELLO
    assert_forgotten(root, MEMBER)


def test_a_users_subscriptions_are_bounded(peers: Peers, netd: Service) -> None:
    root = peers(0)
    limit = roles.User.max_subscriptions
    made = [peers(MEMBER, USERS) for _ in range(limit // 64)]
    for peer in made:
        for subscription in range(1, 65):
            peer.subscribe("network.>", subscription=subscription)
    with pytest.raises(errors.ResourceExhausted):
        made[0].subscribe("network.>", subscription=65)
    more = peers(MEMBER, USERS)
    with pytest.raises(errors.ResourceExhausted):
        more.subscribe("network.>")
    assert account(root, MEMBER)["subscriptions"] == limit
    assert_others_are_served(peers)
    # an event for each of them doesn't keep another subscriber waiting
    other = peers(OTHER_MEMBER, USERS)
    other.subscribe("network.>")
    began = time.monotonic()
    netd.peer.publish(1, "network.create")
    assert len(other.events(1)) == 1
    assert time.monotonic() - began < SERVED_WITHIN_S
    made[0].send(wire.UNSUBSCRIBE, peer=64)
    more.subscribe("network.>")
    for peer in [*made, more]:
        peer.close()
    assert_forgotten(root, MEMBER)


def test_a_users_open_calls_are_bounded(peers: Peers, netd: Service) -> None:
    root = peers(0)
    limit = roles.User.max_calls
    made = [peers(MEMBER, USERS) for _ in range(3)]
    for peer in made[:2]:
        calls = [wire.encode(wire.CALL, b"netd.hold", b"", 0, serial) for serial in range(1, limit // 2 + 1)]
        peer.sock.sendall(b"".join(calls))
    wait_for(lambda: account(root, MEMBER)["calls"] == limit, f"{limit} open calls")
    netd.wait_for_calls(limit)
    with pytest.raises(errors.ResourceExhausted):
        made[2].call("netd.hold")
    assert made[2].call("bus.stats")  # the broker's own take nothing of a service
    assert_others_are_served(peers)
    made[0].send(wire.CANCEL, serial=1)
    wait_for(lambda: account(root, MEMBER)["calls"] == limit - 1, "room after cancelling")
    made[2].call("netd.answer")
    for peer in made:
        peer.close()
    assert_forgotten(root, MEMBER)
    wait_for(lambda: netd.cancelled == limit, "every call cancelled at the service")


def test_bytes_of_a_users_open_calls_are_bounded(peers: Peers, netd: Service) -> None:
    root = peers(0)
    body = packb({"data": b"x" * (3 << 20)})
    limit = roles.User.max_call_bytes // len(body)
    peer = peers(MEMBER, USERS)
    for serial in range(1, limit + 1):
        peer.sock.sendall(wire.encode(wire.CALL, b"netd.hold", body, 0, serial))
        netd.wait_for_calls(serial)
    peer.sock.sendall(wire.encode(wire.CALL, b"netd.hold", body, 0, limit + 1))
    with pytest.raises(errors.ResourceExhausted):
        peer.expect(wire.RESULT)
    assert account(root, MEMBER)["call_bytes"] == limit * len(body)
    assert_others_are_served(peers)
    peer.close()
    assert_forgotten(root, MEMBER)


def test_bytes_of_a_users_half_sent_frames_are_bounded(peers: Peers, netd: Service) -> None:
    root = peers(0)
    limit = roles.User.max_queued_bytes
    part = wire.encode(wire.CALL, b"netd.answer", b"x" * (wire.MAX_FRAME - 1024), 0, 1)[:-1]
    made = [peers(MEMBER, USERS) for _ in range(limit // len(part) + 2)]
    for peer in made:
        with contextlib.suppress(ConnectionError):
            peer.sock.sendall(part)
    wait_for(lambda: account(root, MEMBER)["connections"] < len(made), "the end of who went beyond")
    assert account(root, MEMBER)["queued_bytes"] <= limit
    assert_others_are_served(peers)
    left = account(root, MEMBER)["connections"]
    assert left >= limit // len(part) - 1, "more of them were ended than needed"
    for peer in made:
        peer.close()
    assert_forgotten(root, MEMBER)


def test_bytes_that_a_user_does_not_read_are_bounded(peers: Peers, netd: Service) -> None:
    """Answers of 4 MiB that nobody takes, on many connections: each would be fine alone."""
    root = peers(0)
    limit = roles.User.max_queued_bytes
    made = [peers(MEMBER, USERS) for _ in range(limit // wire.MAX_FRAME + 8)]
    for peer in made:
        peer.send(wire.CALL, "netd.big", serial=1)
    netd.wait_for_calls(len(made))
    wait_for(lambda: account(root, MEMBER)["calls"] == 0, "every answer under way")
    assert account(root, MEMBER)["queued_bytes"] <= limit + wire.MAX_FRAME
    assert_others_are_served(peers)
    for peer in made:
        peer.close()
    assert_forgotten(root, MEMBER)


def test_who_reads_nothing_of_its_events_holds_up_nobody(peers: Peers, netd: Service) -> None:
    """A user's stalled readers, as many as it may have of one event stream: another's gets every event, in time."""
    root = peers(0)
    stalled = [peers(MEMBER, USERS) for _ in range(64)]
    for peer in stalled:
        peer.subscribe("network.>")
    other = peers(OTHER_MEMBER, USERS)
    offset = other.subscribe("network.>")
    count, size = 400, 64 << 10
    payload = packb({"id": "x", "n": 0, "filler": b"x" * size})

    def publish() -> None:
        for sequence in range(1, count + 1):
            netd.peer.sock.sendall(wire.encode(wire.PUBLISH, b"network.create", payload, arg=sequence))

    thread = threading.Thread(target=publish)
    thread.start()
    assert [event[0] for event in other.events(count)] == list(range(offset, offset + count))
    thread.join(TIMEOUT_S)
    assert not thread.is_alive(), "the publisher was held up"
    assert account(root, MEMBER)["queued_bytes"] <= roles.User.max_queued_bytes + wire.MAX_FRAME
    assert_others_are_served(peers)
    for peer in stalled:
        peer.close()
    assert_forgotten(root, MEMBER)
