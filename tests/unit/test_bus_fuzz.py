"""The bus's core under any input, as far as a few seconds go; ``make fuzz`` goes on for ten minutes. See tests/fuzz/world.py for what
is promised."""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgpack import packb
from tests.bus_bench import Bench, Recorder, events_in
from tests.fuzz import parts
from tests.fuzz.world import Worlds

from pyx_bus import session, wire
from pyx_bus.broker.roles import USER
from pyx_bus.wire import Decoder, Frame, ProtocolError, encode

CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus"


@pytest.fixture(scope="module")
def worlds() -> Iterator[Worlds]:
    made = Worlds()
    yield made
    made.close()


def programs(target: str) -> list[Path]:
    found = sorted((CORPUS / target).iterdir())
    assert len(found) > 20
    return found


def test_what_the_fuzzer_found_in_the_brokers_core(worlds: Worlds) -> None:
    for path in programs("world"):
        try:
            worlds.run(path.read_bytes())
        except Exception as error:
            error.add_note(f"by {path}")
            raise


def test_what_the_fuzzer_found_in_the_parts() -> None:
    for path in programs("parts"):
        try:
            parts.run(path.read_bytes())
        except Exception as error:
            error.add_note(f"by {path}")
            raise


@settings(max_examples=500, deadline=None)
@given(program=st.binary(max_size=800))
def test_any_peers(worlds: Worlds, program: bytes) -> None:
    worlds.run(program)


@settings(max_examples=200, deadline=None)
@given(part=st.integers(0, len(parts.PARTS) - 1), program=st.binary(max_size=400))
def test_any_part(part: int, program: bytes) -> None:
    parts.run(bytes([part]) + program)


@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.binary(max_size=40)), max_size=12),
    st.lists(st.integers(1, 90), max_size=30),
)
def test_runs_hold_what_was_published(events: list[tuple[int, bytes]], cuts: list[int]) -> None:
    """Whatever the sequence numbers and wherever the stream is cut: a run has consecutive ones, and nothing is lost or moved."""
    said = b"".join(encode(wire.PUBLISH, b"a.b", payload, 0, 0, sequence) for sequence, payload in events)
    decoder = Decoder(runs=True)
    came: list[tuple[int, bytes]] = []
    for size in [*cuts, len(said) + 1]:
        for run in decoder.feed(said[:size]):
            assert isinstance(run, wire.Run)
            assert run.arg - run.first == len(run.frames) - 1
            came += [(run.first + index, run.body[payload:end]) for index, (_, payload, end) in enumerate(run.frames)]
        said = said[size:]
    assert came == events


@given(st.binary(max_size=300))
def test_a_client_survives_any_batch(body: bytes) -> None:
    try:
        wire.split_events(body)
    except ProtocolError:
        pass


def test_a_reader_goes_on_though_its_user_is_over_its_quota(tmp_path: Path) -> None:
    """Another connection of the same user doesn't read. This one does: it's behind, and never blocked, so that nothing but room of its
    user's can tell the broker to go on."""
    bench = Bench(tmp_path)
    reader, publisher = bench.peer(uid=7, role=USER, may_be=""), bench.peer()
    bench.subscribe(reader, [">"])
    reader.take()
    reader.user.queued_bytes = reader.user.max_queued_bytes + 1
    bench.publish(publisher, b"a.b", 1)
    bench.read_on()
    assert (reader.take(), bench.events.subscriptions.behind()) == ([], [1])
    reader.user.queued_bytes = 0
    bench.events.subscriptions.user_has_room(7)
    bench.read_on()
    assert events_in(reader.take()) == [(1, "a.b", "1")]
    assert bench.events.subscriptions.behind() == []
    bench.close()


def test_refusing_many_events_takes_no_longer_than_taking_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody who may connect can send events that are refused: a read's worth of them mustn't hold the broker up for seconds."""
    bench = Bench(tmp_path)
    user = bench.peer(uid=1002, role=USER, may_be="")
    sent: list[bytes] = []
    monkeypatch.setattr(Recorder, "send", lambda self, data, fds=None: sent.append(data))
    runs = Decoder(runs=True).feed(b"".join(encode(wire.PUBLISH, b"a.b", b"\x80", 0, 0, n) for n in range(1, 8001)))
    started = time.perf_counter()
    for run in runs:
        bench.router.receive(user, run)
    assert time.perf_counter() - started < 1
    assert [frame.arg for data in sent for frame in Decoder().feed(data)] == list(range(1, 8001))
    bench.close()


def test_refused_events_are_gone_at_once(tmp_path: Path) -> None:
    """An error that's kept in a variable of the frame it was raised in keeps that frame, and the event, until the next collection."""
    bench = Bench(tmp_path)
    user = bench.peer(uid=1002, role=USER, may_be="")
    bench.publish(user, b"a.b", 1, payload=bytes(packb({"id": "x"})))
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for sequence in range(2, 12):
            bench.publish(user, b"a.b", sequence, payload=bytes(packb({"id": "x" * 1_000_000})))
        assert tracemalloc.get_traced_memory()[0] < 2 << 20
    finally:
        tracemalloc.stop()
        gc.enable()
        bench.close()


@pytest.mark.parametrize("item", [b"\x80", b"\x90"])
@pytest.mark.parametrize(
    ("kind", "route"), [(wire.SUBSCRIBE, b""), (wire.REGISTER, b"toy"), (wire.CALL, b"bus.forget"), (wire.HELLO, b"")]
)
def test_what_the_broker_decodes_itself_is_small(tmp_path: Path, kind: int, route: bytes, item: bytes) -> None:
    """A byte of msgpack can become an object of 64 bytes: a frame of 4 MiB that's decoded would cost 300 MB."""
    bench = Bench(tmp_path)
    peer = bench.peer()
    count = 1 << 20
    frame = Frame(kind, route, b"\x81\xa1x\xdd" + count.to_bytes(4, "big") + item * count, peer=1, serial=1)
    tracemalloc.start()
    try:
        try:
            bench.receive(peer, frame)
        except ProtocolError:
            pass
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
        bench.close()


@pytest.mark.parametrize("number", [float("inf"), float("nan"), None, "x", [], b""])
def test_a_broker_that_lies_with_numbers(number: object) -> None:
    body = packb(
        {
            "lost": number,
            "first_offset": number,
            "last_offset": number,
            "next_offset": number,
            "connection": number,
            "bus": "x",
        }
    )
    with pytest.raises(ProtocolError):
        session.gap_body(Frame(wire.GAP, b"", body))
    with pytest.raises(ProtocolError):
        session.next_offset(body)
    with pytest.raises(ProtocolError):
        session.Session().receive(Frame(wire.WELCOME, b"", body))
