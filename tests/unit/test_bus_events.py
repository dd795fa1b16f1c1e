"""The broker's events on recording peers: journal, filters, live and reading subscriptions, gaps, durables, heartbeats, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from msgpack import packb, unpackb
from tests.bus_bench import Bench, Recorder, errors_in, event, events_in

from pyx_bus import wire
from pyx_bus.broker.events import MAX_EVENT_QUEUE
from pyx_bus.broker.journal import JournalError, Limits
from pyx_bus.broker.roles import MONITOR, SERVICE, USER
from pyx_bus.broker.subscriptions import MAX_SUBSCRIPTIONS_PER_PEER
from pyx_bus.filters import parse
from pyx_bus.wire import Frame, ProtocolError


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def topics(peer: Recorder) -> list[str]:
    return [topic for _, topic, _ in events_in(peer.take())]


def test_events_reach_matching_subscribers_with_growing_offsets(bench: Bench) -> None:
    publisher, everything, volumes = bench.peer("pub"), bench.peer(), bench.peer()
    bench.subscribe(everything, [">"])
    bench.subscribe(volumes, ["volume.*"])
    everything.take(), volumes.take()
    frames = [
        Frame(wire.PUBLISH, t, event(n), arg=n) for n, t in enumerate((b"container.start", b"volume.create", b"a.b"), 1)
    ]
    bench.receive(publisher, *frames)
    assert [f.arg for f in publisher.take() if f.kind == wire.ACK] == [3]
    first = bench.journal.next_offset - 3
    (batch,) = everything.take()
    assert events_in([batch]) == [
        (first, "container.start", "1"),
        (first + 1, "volume.create", "2"),
        (first + 2, "a.b", "3"),
    ]
    assert batch.body[8:] == b"".join(frame.encode() for frame in frames)  # as they came
    assert (batch.route, wire.split_events(batch.body)[0]) == (b"pub", 1000)
    assert events_in(volumes.take()) == [(first + 1, "volume.create", "2")]


def test_repeated_sequence_number_is_acknowledged_but_not_journalled_twice(bench: Bench) -> None:
    publisher, reader = bench.peer("pub"), bench.peer()
    bench.subscribe(reader, [">"])
    reader.take()
    bench.publish(publisher, b"a.b", 1, 2)
    bench.publish(publisher, b"a.b", 1, 2)
    bench.publish(publisher, b"a.b", 2, 3, 4)  # again in part
    assert [actor for _, _, actor in events_in(reader.take())] == ["1", "2", "3", "4"]
    assert [f.arg for f in publisher.take()] == [2, 2, 4]
    again = bench.peer("pub")  # the same publisher on another connection
    bench.publish(again, b"a.b", 4, 5)
    assert [actor for _, _, actor in events_in(reader.take())] == ["5"]


def test_another_user_cannot_use_up_a_publisher_s_numbers(bench: Bench) -> None:
    bench.publish(bench.peer("pub", uid=5, role=SERVICE, may_be="logd"), b"log.x", 1000)
    publisher, reader = bench.peer("pub"), bench.peer()
    bench.subscribe(reader, ["a.*"])
    reader.take()
    bench.publish(publisher, b"a.b", 1)
    assert topics(reader) == ["a.b"]


def test_a_slow_subscriber_reads_on_from_the_journal_and_loses_nothing(bench: Bench) -> None:
    publisher, slow, other = bench.peer("pub"), bench.peer(), bench.peer()
    for peer in (slow, other):
        bench.subscribe(peer, [">"])
        peer.take()
    slow.backlog = MAX_EVENT_QUEUE + 1
    bench.publish(publisher, b"a.b", 1, 2, 3)
    bench.publish(publisher, b"a.b", 4)
    assert slow.take() == []
    assert len(events_in(other.take())) == 4
    assert bench.events.body()["slow_readers"] == 1
    assert bench.events.body()["most_behind"] == 4
    slow.backlog = 0
    bench.events.drained(slow)
    bench.read_on()
    bench.publish(publisher, b"a.b", 5)
    assert [actor for _, _, actor in events_in(slow.take())] == ["1", "2", "3", "4", "5"]
    assert bench.events.body()["slow_readers"] == 0


def test_who_falls_behind_in_the_middle_of_a_run_misses_and_repeats_nothing(bench: Bench) -> None:
    publisher, slow = bench.peer("pub"), bench.peer()
    bench.subscribe(slow, ["a.*"])
    slow.take()
    send = slow.send

    def fill(data: bytes, fds: list[int] | None = None) -> None:
        send(data, fds)
        slow.backlog = MAX_EVENT_QUEUE + 1

    slow.send = fill  # type: ignore[method-assign]
    mixed = [Frame(wire.PUBLISH, b"a.b" if n % 3 else b"x.y", event(n), arg=n) for n in range(1, 12)]
    bench.receive(publisher, *mixed)
    slow.send = send  # type: ignore[method-assign]
    slow.backlog = 0
    bench.events.drained(slow)
    bench.read_on()
    assert [int(actor) for _, _, actor in events_in(slow.take())] == [n for n in range(1, 12) if n % 3]


def test_what_retention_took_is_a_gap_with_its_range(tmp_path: Path) -> None:
    bench = Bench(tmp_path, Limits(segment_bytes=4096, max_bytes=8192))
    publisher, reader = bench.peer("pub"), bench.peer()
    for n in range(1, 200):
        bench.publish(publisher, b"a.b", n)
    bench.subscribe(reader, ["a.*"], since=1)
    bench.read_on()
    _, gap, *events = reader.take()
    oldest = bench.journal.oldest_offset
    assert oldest > 100
    assert (gap.kind, gap.arg, gap.peer) == (wire.GAP, oldest - 1, 1)
    assert unpackb(gap.body) == {"lost": oldest - 1, "first_offset": 1, "last_offset": oldest - 1}
    assert [offset for offset, _, _ in events_in(events)] == list(range(oldest, 200))
    assert (bench.events.gaps, bench.events.events_lost) == (1, oldest - 1)
    bench.close()


def test_since_an_offset_a_time_or_the_beginning(bench: Bench) -> None:
    publisher = bench.peer("pub")
    for n in range(1, 6):
        bench.now_ns = n * 1000
        bench.publish(publisher, b"a.b", n)
    last = bench.journal.next_offset - 1
    for options, first in (
        ({"since": last - 1}, 4),
        ({"since": "beginning"}, 1),
        ({"since_ns": 2500}, 3),
        ({"since_ns": 3000}, 3),
        ({"since_ns": 9000}, 6),
        ({"since": last + 1}, 6),
        ({}, 6),
    ):
        reader = bench.peer()
        bench.subscribe(reader, ["a.>"], **options)  # type: ignore[arg-type]
        bench.read_on()
        bench.publish(bench.peer("other"), b"x.y", 1)  # nobody's
        assert [int(actor) for _, _, actor in events_in(reader.take())] == list(range(first, 6)), options
    reader = bench.peer()
    bench.subscribe(reader, ["a.b"], since=bench.journal.next_offset + 1)
    assert errors_in(reader.take()) == ["invalid_argument"]


def test_a_long_history_is_read_in_pieces(bench: Bench) -> None:
    publisher, reader = bench.peer("pub"), bench.peer()
    payload = event(1, x="y" * 30_000)
    for n in range(1, 41):
        bench.publish(publisher, b"a.b", n, payload=payload)
    bench.subscribe(reader, ["a.b"], since="beginning")
    reader.take()
    pieces = 0
    total = 0
    while bench.events.subscriptions.ready:
        bench.events.read_on()
        got = events_in(reader.take())
        total += len(got)
        pieces += 1
        assert len(got) * 30_000 < 2 * wire.MAX_BATCH
    assert total == 40
    assert pieces > 3


FILTERED = {
    "container.start": {"id": "c" * 64, "attributes": {"name": "web", "image": "shop:1", "app": "shop"}},
    "container.exec.start": {"id": "c" * 64, "attributes": {"name": "web", "image": "shop:1", "execID": "e"}},
    "container.die": {"id": "d" * 64, "attributes": {"name": "db", "image": "localhost:5000/pg", "app": "pg"}},
    "container.health_status": {"id": "d" * 64, "attributes": {"name": "db", "health_status": "healthy"}},
    "image.pull": {"id": "sha256:" + "a" * 64, "attributes": {"name": "shop:1"}},
    "network.connect": {"id": "e" * 64, "attributes": {"name": "bridge", "container": "c" * 64}},
    "volume.mount": {"id": "data", "attributes": {"container": "d" * 64}},
}


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"type": ["container"]}, "start exec.start die health_status"),
        ({"type!": ["container"]}, "pull connect mount"),
        ({"event": ["start", "die"]}, "start die"),
        ({"event": ["exec_start"]}, "exec.start"),
        ({"event": ["health_status"]}, "health_status"),
        ({"event": ["health_status: healthy"]}, "health_status"),
        ({"event": ["health_status: unhealthy"]}, ""),
        ({"event!": ["health_status: healthy", "exec_start"]}, "start die pull connect mount"),
        ({"container": ["web"]}, "start exec.start"),
        ({"container": ["cccc"]}, "start exec.start connect"),
        ({"container": ["ccc"]}, ""),
        ({"container": ["d" * 64, "web"]}, "start exec.start die health_status mount"),
        ({"container!": ["web"]}, "die health_status pull connect mount"),
        ({"container": ["cccc"], "event": ["start"]}, "start"),
        ({"image": ["shop:1"]}, "start exec.start pull"),
        ({"image": ["shop"]}, "start exec.start pull"),
        ({"image": ["localhost:5000/pg"]}, "die"),
        ({"image": ["aaaa"]}, "pull"),
        ({"network": ["bridge"]}, "connect"),
        ({"volume": ["data"]}, "mount"),
        ({"label": ["app"]}, "start die"),
        ({"label": ["app=shop"]}, "start"),
        ({"label": ["app", "name=db"]}, "die"),
        ({"label!": ["app"]}, "exec.start health_status pull connect mount"),
        ({"service": ["pub"]}, "start exec.start die health_status pull connect mount"),
        ({"service!": ["pub"]}, ""),
    ],
)
def test_filters_live_and_from_the_journal(bench: Bench, filters: dict[str, list[str]], expected: str) -> None:
    publisher, live, later = bench.peer("pub"), bench.peer(), bench.peer()
    bench.subscribe(live, [">"], filters=filters)
    begin = bench.journal.next_offset
    live.take()
    frames = [Frame(wire.PUBLISH, t.encode(), packb(p), arg=n) for n, (t, p) in enumerate(FILTERED.items(), 1)]
    bench.receive(publisher, *frames)
    wanted = expected.split()
    got = events_in(live.take())
    assert [topic.partition(".")[2] for _, topic, _ in got] == wanted
    numbers = {topic: begin + index for index, topic in enumerate(FILTERED)}
    assert all(offset == numbers[topic] for offset, topic, _ in got)
    bench.subscribe(later, [">"], since=begin, filters=filters)
    bench.read_on()
    assert [topic.partition(".")[2] for topic in topics(later)] == wanted


def test_order_is_kept_when_some_topics_need_a_look_and_others_do_not(bench: Bench) -> None:
    publisher, reader = bench.peer("pub"), bench.peer()
    bench.subscribe(reader, [">"], filters={"event": ["start", "health_status: healthy"]})
    reader.take()
    frames = []
    for n in range(1, 30):
        topic, payload = (b"a.start", event(n)) if n % 2 else (b"a.health_status", event(n, health_status="healthy"))
        frames.append(Frame(wire.PUBLISH, topic, payload, arg=n))
    bench.receive(publisher, *frames)
    assert [int(actor) for _, _, actor in events_in(reader.take())] == list(range(1, 30))


def test_bad_filters_are_refused(bench: Bench) -> None:
    peer = bench.peer()
    for filters in (
        {"colour": ["red"]},
        {"type": "container"},
        {"type": []},
        {"type": [1]},
        ["type"],
        {"type!!": ["x"]},
    ):
        bench.subscribe(peer, [">"], filters=filters)
        assert errors_in(peer.take()) == ["invalid_argument"], filters
    for pattern in ("a..b", ".", "a.>.b", ""):
        bench.subscribe(peer, [pattern])
        assert errors_in(peer.take()) == ["invalid_argument"], pattern


def test_a_filter_never_passes_what_is_no_event() -> None:
    wanted = parse([">"], {"container": ["web"]})
    assert not any(
        wanted.payload("container.start", raw) for raw in (b"\xc1", b"\x90", b"\x80", packb({"id": 1, "attributes": 7}))
    )


def test_a_durable_subscription_goes_on_where_it_was_acknowledged(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    publisher, reader = bench.peer("pub"), bench.peer()
    bench.subscribe(reader, ["a.*"], durable="mine")
    bench.publish(publisher, b"a.b", 1, 2, 3)
    got = events_in(reader.take())
    bench.receive(reader, Frame(wire.ACK, peer=1, arg=got[1][0]))
    second = bench.peer()
    bench.subscribe(second, ["a.*"], durable="mine")
    assert errors_in(second.take()) == ["conflict"]
    bench.router.drop(reader)
    bench.publish(publisher, b"a.b", 4)
    bench.subscribe(second, ["a.*"], durable="mine", since="beginning")
    bench.read_on()
    assert [actor for _, _, actor in events_in(second.take())] == ["3", "4"]
    assert bench.events.subscriptions.durables(None)[0]["offset"] == got[2][0]
    bench.close()
    # ... also after the broker's restart
    bench = Bench(tmp_path)
    reader = bench.peer()
    bench.subscribe(reader, ["a.*"], durable="mine")
    bench.read_on()
    assert [actor for _, _, actor in events_in(reader.take())] == ["3", "4"]
    bench.call(reader, b"bus.forget", 5, packb({"name": "mine"}))
    assert errors_in(reader.take()) == ["conflict"]
    bench.receive(reader, Frame(wire.UNSUBSCRIBE, peer=1))
    bench.call(reader, b"bus.forget", 6, packb({"name": "mine"}))
    bench.call(reader, b"bus.forget", 7, packb({"name": "mine"}))
    assert errors_in(reader.take()) == ["not_found"]
    bench.close()


def test_every_user_has_durable_names_of_its_own(bench: Bench) -> None:
    publisher, monitor = bench.peer("pub"), bench.peer(uid=5, role=MONITOR, may_be="")
    bench.subscribe(monitor, ["a.*"], durable="mine")
    root = bench.peer()
    bench.subscribe(root, ["a.*"], durable="mine", since="beginning")
    assert errors_in(monitor.take()) + errors_in(root.take()) == []
    bench.publish(publisher, b"a.b", 1)
    (offset,) = (offset for offset, _, _ in events_in(monitor.take()))
    bench.receive(monitor, Frame(wire.ACK, peer=1, arg=offset))
    assert {(one["uid"], one["offset"]) for one in bench.events.subscriptions.durables(None)} == {
        (0, 1),
        (5, offset + 1),
    }
    assert [one["uid"] for one in bench.events.subscriptions.durables(5)] == [5]
    bench.router.drop(root)
    other = bench.peer(uid=6, role=USER, may_be="")
    for serial, body in enumerate(({"name": "mine"}, {"name": "mine", "uid": 0}), 1):
        bench.call(other, b"bus.forget", serial, packb(body))
    assert errors_in(other.take()) == ["not_found", "permission_denied"]
    bench.receive(monitor, Frame(wire.UNSUBSCRIBE, peer=1))
    bench.call(monitor, b"bus.forget", 9, packb({"name": "mine"}))  # its own, monitors too
    assert errors_in(monitor.take()) == []
    assert [one["uid"] for one in bench.events.subscriptions.durables(None)] == [0]


def test_an_event_that_cannot_be_filtered_ends_nobody(bench: Bench) -> None:
    """Lists in one another, as deep as msgpack's reader bears, where a text belongs: refused, or a reader that filters would fail."""
    publisher = bench.peer("pub")
    for number, depth in enumerate((1, 500, 985, 990, 5000), 1):
        nested = b"\x91" * depth + b"\xa1x"
        payload = b"\x82\xa2id\xa1x\xaaattributes\x81\xa4name" + nested
        bench.publish(publisher, b"image.pull", number, payload=payload)
    assert errors_in(publisher.take()) == ["invalid_argument"] * 5
    assert bench.journal.next_offset == 1


def test_many_events_of_one_topic_are_decoded_once_for_all_filters(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyx_bus.broker import events

    decoded = []
    decode = events._decode
    publisher = bench.peer("pub")
    for number in range(40):
        bench.subscribe(bench.peer(), ["a.*"], filters={"label!": [f"x={number}"]})
    monkeypatch.setattr(events, "_decode", lambda raw: decoded.append(raw) or decode(raw))
    bench.publish(publisher, b"a.b", 1, 2, 3)
    assert len(decoded) == 6  # to check them, and to filter


def test_subscriptions_of_one_connection_read_in_turn(bench: Bench) -> None:
    """The peer takes a piece at a time: both get their share."""
    publisher, reader = bench.peer("pub"), bench.peer()
    payload = event(1, x="y" * 60_000)
    for n in range(1, 41):
        bench.publish(publisher, b"a.b", n, payload=payload)
    for id_ in (1, 2):
        bench.subscribe(reader, ["a.b"], since="beginning", id_=id_)
    reader.take()
    order = []
    for _ in range(12):
        bench.events.subscriptions.ready.clear()
        bench.events.drained(reader)
        bench.events.read_on()
        order += sorted({frame.peer for frame in reader.take()})
    assert sorted(order[:6]) == [1, 1, 1, 2, 2, 2]


def test_only_durable_ones_acknowledge_and_only_what_there_is(bench: Bench) -> None:
    reader = bench.peer()
    bench.subscribe(reader, [">"])
    bench.subscribe(reader, [">"], id_=2, durable="d")
    for id_, offset in ((1, 0), (2, bench.journal.next_offset)):
        with pytest.raises(ProtocolError):
            bench.receive(reader, Frame(wire.ACK, peer=id_, arg=offset))
    bench.receive(reader, Frame(wire.ACK, peer=77, arg=1))  # one that has just ended


def test_heartbeats_come_in_silence_only(bench: Bench) -> None:
    publisher, reader = bench.peer("pub"), bench.peer()
    bench.subscribe(reader, ["a.*"], heartbeat_ms=100)
    reader.take()
    assert bench.events.subscriptions.beat() == 100_000_000
    bench.now_ns += 60_000_000
    bench.publish(publisher, b"a.b", 1)
    reader.take()
    bench.now_ns += 60_000_000
    assert bench.events.subscriptions.beat() == 40_000_000
    assert reader.take() == []
    bench.now_ns += 40_000_000
    assert bench.events.subscriptions.beat() == 100_000_000
    (beat,) = reader.take()
    assert (beat.kind, beat.peer, beat.arg) == (wire.HEARTBEAT, 1, bench.journal.next_offset)
    reader.backlog = 1  # it has yet to read: nothing is added
    bench.now_ns += 100_000_000
    bench.events.subscriptions.beat()
    assert reader.take() == []
    bench.router.drop(reader)
    assert bench.events.subscriptions.beat() == 0


def test_only_the_owner_of_a_topic_publishes_it_and_the_rest_of_a_run_goes_through(bench: Bench) -> None:
    logd, user, watcher = (
        bench.peer("logd", uid=5, role=SERVICE, may_be="logd"),
        bench.peer(uid=6, role=USER, may_be=""),
        bench.peer(),
    )
    bench.subscribe(watcher, ["container.*", "log.*", "service.*"])
    watcher.take()
    order = (b"log.a", b"container.die", b"log.b", b"service.up", b"log.c")
    bench.receive(logd, *(Frame(wire.PUBLISH, topic, event(n), arg=n) for n, topic in enumerate(order, 1)))
    assert topics(watcher) == ["log.a", "log.b", "log.c"]
    answers = logd.take()
    assert [(f.kind, f.arg, f.serial) for f in answers] == [
        (wire.ACK, 1, 0),
        (wire.ERROR, 2, 0),
        (wire.ACK, 3, 0),
        (wire.ERROR, 4, 0),
        (wire.ACK, 5, 0),
    ]
    assert errors_in(answers) == ["permission_denied"] * 2
    bench.publish(user, b"container.die", 1)
    bench.publish(user, b"mine.x", 2)
    assert errors_in(user.take()) == ["permission_denied"] * 2
    assert topics(watcher) == []


def test_an_event_nobody_could_read_never_gets_into_the_journal(bench: Bench) -> None:
    publisher = bench.peer("publisher")
    bad = (b"\xc1", b"\x81", b"\x90", b"", b"\x80\x80", b"\x81" * 10_000)
    for number, payload in enumerate(bad, 1):
        bench.receive(publisher, Frame(wire.PUBLISH, b"service.up", payload, arg=number))
    for number, topic in enumerate((b"", b"A", b"a..b", b".a", b"a.", b"\xff", b"a b"), 101):
        bench.receive(publisher, Frame(wire.PUBLISH, topic, event(1), arg=number))
    assert errors_in(publisher.take()) == ["invalid_argument"] * (len(bad) + 7)
    assert bench.journal.oldest_offset == bench.journal.next_offset


def blob(size: int) -> bytes:
    """A map of exactly so many bytes."""
    return b"\x81\xa0\xc6" + (size - 7).to_bytes(4, "big") + bytes(size - 7)


def test_an_event_too_large_to_be_delivered_never_gets_into_the_journal(bench: Bench) -> None:
    publisher, reader = bench.peer("publisher"), bench.peer("reader")
    payload = blob(wire.MAX_FRAME - wire.HEADER_SIZE - len(b"a.b"))
    bench.receive(publisher, Frame(wire.PUBLISH, b"a.b", payload, arg=1))
    bench.receive(publisher, Frame(wire.PUBLISH, b"a.b", blob(wire.MAX_EVENT - 3), arg=2))
    assert errors_in(publisher.take()) == ["invalid_argument"]
    bench.subscribe(reader, [">"], since="beginning")
    bench.read_on()
    assert [frame.kind for frame in reader.take()] == [wire.RESULT, wire.EVENT]


def test_what_cannot_be_written_is_asked_for_again_in_order(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher, reader = bench.peer("pub"), bench.peer()
    bench.subscribe(reader, [">"])
    reader.take()
    bench.publish(publisher, b"a.b", 1)
    with monkeypatch.context() as patch:

        def full(*_: object) -> int:
            raise JournalError("disk full")

        patch.setattr(bench.journal, "append", full)
        bench.publish(publisher, b"a.b", 2, 3)
    assert bench.events.body()["journal_error"] == "disk full"
    bench.publish(publisher, b"a.b", 4)  # sent before the refusal arrived
    answers = publisher.take()
    assert [(f.kind, f.arg) for f in answers] == [(wire.ACK, 1), (wire.ERROR, 2)]
    assert errors_in(answers) == ["unavailable"]
    bench.publish(publisher, b"a.b", 2, 3, 4, 5)
    assert bench.events.body()["journal_error"] == ""
    assert [actor for _, _, actor in events_in(reader.take())] == ["1", "2", "3", "4", "5"]


def test_subscriptions_are_bounded_and_given_back(bench: Bench) -> None:
    peer = bench.peer(uid=5, role=USER, may_be="")
    for id_ in range(1, MAX_SUBSCRIPTIONS_PER_PEER + 1):
        bench.subscribe(peer, [">"], id_=id_)
    assert errors_in(peer.take()) == []
    bench.subscribe(peer, [">"], id_=100)
    bench.subscribe(peer, [">"], id_=1)
    assert errors_in(peer.take()) == ["resource_exhausted", "already_exists"]
    bench.receive(peer, Frame(wire.UNSUBSCRIBE, peer=1))
    bench.subscribe(peer, [">"], id_=100)
    assert errors_in(peer.take()) == []
    bench.subscribe(peer, [">"], id_=101, filters={"label": ["x"] * 256, "label!": ["x"] * 256})
    user = peer.user
    many = bench.peer(uid=5, role=USER, may_be="")
    for id_ in range(1, 35):
        bench.subscribe(many, [">"], id_=id_, filters={field: ["x"] * 256 for field in ("label", "label!")})
    assert errors_in(many.take()) == ["resource_exhausted"] * 3  # 513 each, and 64 of the other's
    bench.router.drop(many)
    bench.router.drop(peer)
    assert (user.subscriptions, user.wishes) == (0, 0)
    assert bench.events.body()["subscriptions"] == 0


def test_services_coming_and_going_is_told(bench: Bench) -> None:
    watcher = bench.peer()
    bench.subscribe(watcher, ["service.*"])
    watcher.take()
    service = bench.peer(service="toy")
    bench.router.drop(service)
    assert [(topic, actor) for _, topic, actor in events_in(watcher.take())] == [
        ("service.up", "toy"),
        ("service.down", "toy"),
    ]
