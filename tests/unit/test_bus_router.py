"""The broker's decisions on calls, on recording peers: routing, answers only to the asked, roles, quotas, nonsense."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgpack import packb, unpackb
from tests.bus_bench import Bench, Recorder, errors_in

from pyx_bus import wire
from pyx_bus.broker.roles import MONITOR, SERVICE, USER
from pyx_bus.broker.router import MAX_QUEUED_BYTES
from pyx_bus.wire import Frame, ProtocolError


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def test_call_and_answer_are_routed_by_caller_and_serial(bench: Bench) -> None:
    service, caller = bench.peer(service="toy"), bench.peer()
    bench.call(caller, b"toy.x", 5, arg=1000)
    (call,) = service.take()
    assert (call.peer, call.serial, call.arg & 0xFFFFFFFF, call.route) == (caller.id, 5, 1000, b"toy.x")
    bench.receive(service, Frame(wire.RESULT, b"", b"\x81\xa1a\x01", peer=call.peer, serial=5))
    (result,) = caller.take()
    assert (result.kind, result.serial, result.body) == (wire.RESULT, 5, b"\x81\xa1a\x01")
    assert not caller.calls
    assert not service.incoming


def test_a_service_cannot_answer_what_it_was_not_asked(bench: Bench) -> None:
    service, other, caller = bench.peer(service="toy"), bench.peer(service="other"), bench.peer()
    bench.call(caller, b"toy.x", 5)
    bench.receive(other, Frame(wire.RESULT, b"", b"\x80", peer=caller.id, serial=5))
    assert caller.take() == []
    (call,) = service.take()
    for _ in range(2):  # the second answer is nobody's
        bench.receive(service, Frame(wire.RESULT, b"", b"\x80", peer=call.peer, serial=5))
    assert len(caller.take()) == 1


def test_leaving_caller_cancels_and_leaving_service_fails(bench: Bench) -> None:
    service, first, second = bench.peer(service="toy"), bench.peer(), bench.peer()
    bench.call(first, b"toy.x", 1)
    bench.call(second, b"toy.x", 1)
    service.take()
    bench.router.drop(first)
    assert [(f.kind, f.peer) for f in service.take()] == [(wire.CANCEL, first.id)]
    bench.router.drop(service)
    assert errors_in(second.take()) == ["unavailable"]
    bench.call(second, b"toy.x", 2)
    assert errors_in(second.take()) == ["unavailable"]


def test_descriptors_of_a_call_to_nobody_are_closed(bench: Bench) -> None:
    caller = bench.peer()
    read_end, write_end = os.pipe()
    bench.call(caller, b"nobody.x", 1, fds=[write_end])
    assert os.read(read_end, 1) == b""
    os.close(read_end)


def test_busy_service_and_deaf_caller(bench: Bench) -> None:
    service, caller = bench.peer(service="toy"), bench.peer()
    bench.call(caller, b"toy.x", 1)
    service.backlog = MAX_QUEUED_BYTES + 1
    bench.call(caller, b"toy.x", 2)
    assert errors_in(caller.take()) == ["resource_exhausted"]
    caller.backlog = MAX_QUEUED_BYTES + 1
    bench.receive(service, Frame(wire.RESULT, b"", b"\x80", peer=caller.id, serial=1))
    assert caller.gone


@pytest.mark.parametrize(
    "frame",
    [
        Frame(wire.HELLO, b"", packb({"version": 1})),  # a second one
        Frame(wire.WELCOME),
        Frame(200),
        Frame(wire.CALL, b"toy.x", serial=0),
        Frame(wire.SUBSCRIBE, b"", b"\xc1", serial=1),
        Frame(wire.SUBSCRIBE, b"", packb([1]), serial=1),
        Frame(wire.PUBLISH, b"a.b", b"\x80", fds=[999]),
    ],
)
def test_nonsense_is_a_protocol_error(bench: Bench, frame: Frame) -> None:
    with pytest.raises(ProtocolError):
        bench.receive(bench.peer(), frame)


@pytest.mark.parametrize(
    "body",
    [
        {"patterns": []},
        {"patterns": "x"},
        {"patterns": [1]},
        {"patterns": ["a"], "since": "yesterday"},
        {"patterns": ["a"], "since": -1},
        {"patterns": ["a"] * 100},
    ],
)
def test_bad_subscription_is_refused(bench: Bench, body: dict[str, object]) -> None:
    peer = bench.peer()
    bench.receive(peer, Frame(wire.SUBSCRIBE, b"", packb(body), peer=1, serial=1))
    assert errors_in(peer.take()) == ["invalid_argument"]


@pytest.mark.parametrize("hello", [{}, {"version": "1"}, {"version": 1}, {"version": 9, "oldest": 3}])
def test_bad_hello(bench: Bench, hello: dict[str, object]) -> None:
    peer = Recorder(bench.router.user(0))
    bench.router.add(peer)
    with pytest.raises(ProtocolError):
        bench.receive(peer, Frame(wire.HELLO, b"", packb(hello)))


def test_first_frame_must_be_hello(bench: Bench) -> None:
    peer = Recorder(bench.router.user(0))
    bench.router.add(peer)
    with pytest.raises(ProtocolError, match="expected HELLO"):
        bench.receive(peer, Frame(wire.CALL, b"toy.x", serial=1))


def test_names_are_registered_once(bench: Bench) -> None:
    bench.peer(service="toy")
    other = bench.peer()
    for name in (b"toy", b"bus", b"", b"a.b"):
        bench.receive(other, Frame(wire.REGISTER, name, serial=1))
    assert errors_in(other.take()) == ["already_exists", "invalid_argument", "invalid_argument", "invalid_argument"]


def test_who_goes_on_asking_without_reading_is_sent_away(bench: Bench) -> None:
    deaf = bench.peer()
    deaf.backlog = 2 * MAX_QUEUED_BYTES + 1
    for kind in (wire.PING, wire.PUBLISH, wire.CALL, wire.SUBSCRIBE):
        with pytest.raises(ProtocolError, match="doesn't read"):
            bench.receive(deaf, Frame(kind, b"bus.stats", serial=7))
    assert deaf.take() == []


def test_a_monitor_calls_what_only_reads_and_the_service_is_told(bench: Bench) -> None:
    service = bench.peer(service="toy", methods={"look": True, "change": False})
    monitor, user = bench.peer(uid=7, role=MONITOR, may_be=""), bench.peer(uid=8, role=USER, may_be="")
    for peer, method in ((monitor, b"toy.look"), (user, b"toy.look"), (user, b"toy.change")):
        bench.call(peer, method, 1 + len(peer.calls))
        (call,) = service.take()
        assert (call.route, call.arg >> 32, call.flags) == (
            method,
            peer.uid,
            wire.FLAG_MONITOR if peer is monitor else 0,
        )
    bench.call(monitor, b"toy.change", 5)
    bench.call(monitor, b"toy.nothing", 6)
    bench.call(monitor, b"bus.stats", 7)
    bench.call(monitor, b"bus.forget", 8, packb({"name": "x"}))
    assert service.take() == []
    assert errors_in(monitor.take()) == ["permission_denied", "not_implemented", "not_found"]


def test_what_a_service_does_not_declare_is_open_to_users_only(bench: Bench) -> None:
    service = bench.peer(service="toy")
    monitor, user = bench.peer(uid=7, role=MONITOR, may_be=""), bench.peer(uid=8, role=USER, may_be="")
    bench.call(user, b"toy.x", 1)
    bench.call(monitor, b"toy.x", 1)
    assert len(service.take()) == 1
    assert errors_in(monitor.take()) == ["permission_denied"]


def test_only_its_own_user_registers_a_name(bench: Bench) -> None:
    for role, may_be in ((USER, ""), (MONITOR, ""), (SERVICE, "netd")):
        peer = bench.peer(uid=5, role=role, may_be=may_be)
        bench.receive(peer, Frame(wire.REGISTER, b"logd", serial=1))
        assert errors_in(peer.take()) == ["permission_denied"]
    peer = bench.peer(uid=6, role=SERVICE, may_be="logd")
    bench.receive(peer, Frame(wire.REGISTER, b"logd", serial=1))
    assert errors_in(peer.take()) == []


def test_open_calls_are_bounded_by_user_and_given_back(bench: Bench) -> None:
    service = bench.peer(service="toy")
    peers = [bench.peer(uid=9, role=USER, may_be="") for _ in range(3)]
    other = bench.peer(uid=10, role=USER, may_be="")
    big = b"\x81\xa1x\xc6" + (3 << 20).to_bytes(4, "big") + bytes(3 << 20)
    count = peers[0].user.max_call_bytes // len(big)
    for serial in range(1, count + 2):
        bench.call(peers[serial % 3], b"toy.x", serial, big)
    assert [code for peer in peers for code in errors_in(peer.take())] == ["resource_exhausted"]
    bench.call(other, b"toy.x", 1, big)
    assert errors_in(other.take()) == []
    bench.receive(peers[1], Frame(wire.CANCEL, serial=1))
    bench.call(peers[1], b"toy.x", 1, big)
    assert errors_in(peers[1].take()) == []
    user = peers[0].user
    for peer in peers:
        bench.router.drop(peer)
    assert (user.calls, user.call_bytes, user.connections) == (0, 0, 0)
    assert user.uid not in bench.router.users
    service.take()


def test_calls_are_counted_by_method_with_their_latency(bench: Bench) -> None:
    service, caller = bench.peer(service="toy", methods={"x": True, "y": True}), bench.peer()
    for serial, (kind, took_us) in enumerate(((wire.RESULT, 3), (wire.RESULT, 700), (wire.ERROR, 0)), 1):
        bench.call(caller, b"toy.x", serial)
        bench.now_ns += took_us * 1000
        bench.receive(service, Frame(kind, b"", b"\x80", peer=caller.id, serial=serial))
    bench.call(caller, b"toy.y", 9)
    bench.receive(caller, Frame(wire.CANCEL, serial=9))
    caller.take()
    bench.call(caller, b"bus.stats", 10)
    (answer,) = caller.take()
    methods = unpackb(answer.body)["methods"]
    assert methods["toy.x"] == {
        "calls": 3,
        "errors": 1,
        "cancelled": 0,
        "total_us": 703,
        "latency_us_log2": [1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1],
    }
    assert (methods["toy.y"]["calls"], methods["toy.y"]["cancelled"]) == (1, 1)


def test_an_answer_says_up_to_which_event_it_knows(bench: Bench) -> None:
    """State now, then everything after: the service's own sequence number becomes an offset."""
    service, caller = bench.peer("toy", service="toy"), bench.peer()
    bench.publish(service, b"toy.a", 1, 2, 3)
    service.take()

    def position(told: int, serial: int) -> int:
        bench.call(caller, b"toy.list", serial)
        bench.receive(service, Frame(wire.RESULT, b"", b"\x80", peer=caller.id, serial=serial, arg=told))
        (answer,) = caller.take()
        return answer.arg

    third = bench.journal.next_offset - 1
    assert position(0, 1) == 0  # not told
    assert position(3 + 1, 2) == third + 1
    assert position(2 + 1, 3) == third  # the third came while the answer was under way: it's among what follows
    assert position(0 + 1, 4) == third - 2
    assert position(9 + 1, 5) == 0  # not known here yet
