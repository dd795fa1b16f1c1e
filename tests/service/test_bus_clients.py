"""The clients of the bus, on asyncio, on trio and blocking: events that are never lost, twice or out of order, whatever happens between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import anyio
import anyio.lowlevel
import pytest
from msgpack import packb

from pyx_bus import __version__, client, errors, sync, sync_streams
from pyx_bus.broker.server import Broker, make
from pyx_bus.client import subscription
from pyx_bus.client.payloads import Gap, Heartbeat
from pyx_bus.contract.base import Empty, Event, Message, Method
from pyx_bus.contract.bus import DURABLES, SERVICES
from pyx_bus.contract.volumed import VolumeCreated
from pyx_bus.server import Call, Service
from pyx_bus.wire import CALL, FLAG_MONITOR, GAP, MAX_BATCH, RESULT, Decoder, Frame

EXAMPLES = Path(__file__).parents[2] / "docs/examples"


class Told(Event, frozen=True, kw_only=True):
    """An event of a service that this version's contract doesn't know."""

    topic: ClassVar[str] = "toy.told"

    number: int = 0


class Count(Message, frozen=True, kw_only=True):
    count: int = 0


class State(Message, frozen=True, kw_only=True):
    numbers: list[int] = []


class Text(Message, frozen=True, kw_only=True):
    text: str


LARGE = Method("toy.large", Text, Text)
COUNT = Method("toy.count", Count, Empty, item=Count)
LIST = Method("toy.list", Empty, State, read_only=True)
PLAIN = Method("toy.plain", Count, Count)
BLIND = Method("toy.blind", Empty, Empty)
MUTE = Method("toy.mute", Empty, Empty)


class BrokerThread:
    """A broker beside the event loop of whoever tests: it can end and begin again meanwhile."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "bus.sock"
        self.journal = directory / "bus"
        self._thread: threading.Thread | None = None
        self._wake = (-1, -1)
        self.start()

    def start(self) -> None:
        self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._ending = False
        broker = make(self.path, self.journal)
        broker.watch(self._wake[0])
        self._thread = threading.Thread(target=self._run, args=(broker,))
        self._thread.start()

    def _run(self, broker: Broker) -> None:
        while not self._ending:
            broker.step(broker.timeout_s())
        self.path.unlink(missing_ok=True)
        broker.close()

    def stop(self) -> None:
        if self._thread is not None:
            self._ending = True
            os.write(self._wake[1], b"x")
            self._thread.join(10)
            self._thread = None
            for fd in self._wake:
                os.close(fd)

    def restart(self) -> None:
        self.stop()
        self.start()

    def forget(self) -> None:
        """Come back without the journal."""
        self.stop()
        shutil.rmtree(self.journal)
        self.start()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerThread]:
    broker = BrokerThread(tmp_path)
    yield broker
    broker.stop()


Test = Callable[[Callable[[], Awaitable[None]]], None]


@pytest.fixture(params=["asyncio", "trio"])
def on_loop(request: pytest.FixtureRequest) -> Test:
    """Runs an async function on either event loop, with a deadline."""

    def run(function: Callable[[], Awaitable[None]]) -> None:
        async def with_deadline() -> None:
            with anyio.fail_after(30):
                await function()

        anyio.run(with_deadline, backend=request.param)

    return run


def numbers(bus: client.Bus, first: int, last: int, size: int = 1) -> None:
    for number in range(first, last + 1):
        bus.publish(Told(id="x" * size, time_ns=number, number=number))


async def take(events: client.Events, count: int) -> list[int]:
    return [(await anext(events)).payload["number"] for _ in range(count)]


# --- events ----------------------------------------------------------------------------------------------------------


def test_a_bare_loop_subscribes_and_its_end_unsubscribes(broker: BrokerThread, on_loop: Test) -> None:
    async def scenario() -> None:
        async with client.connect(str(broker.path)) as bus:
            numbers(bus, 1, 10)
            seen = []
            async for event in bus.events("toy.*", since="beginning"):
                seen.append(event.payload["number"])
                if len(seen) == 5:
                    break
            assert seen == [1, 2, 3, 4, 5]
            assert bus.subscriptions == {}
            async for following in bus.events("toy.*", since=event.offset + 1):
                assert following.payload["number"] == 6
                break

    on_loop(scenario)


def test_payloads_are_typed_where_the_contract_knows_them(broker: BrokerThread, on_loop: Test) -> None:
    async def scenario() -> None:
        async with client.connect(str(broker.path), "volumed") as bus, bus.events(">") as events:
            bus.publish(VolumeCreated(id="v", time_ns=7, attributes={"driver": "local"}))
            bus.publish(Told(id="t", time_ns=8, number=3))
            event = await anext(events)
            assert event.payload == VolumeCreated(id="v", time_ns=7, attributes={"driver": "local"})
            assert (event.topic, event.source, event.id, event.attributes) == ("volume.create", "volumed", "v", {"driver": "local"})
            assert abs(event.time_ns - time.time_ns()) < 10**10
            unknown = await anext(events)
            assert unknown.payload == {"id": "t", "time_ns": 8, "number": 3, "attributes": {}}
            assert (unknown.id, unknown.attributes, unknown.offset) == ("t", {}, event.offset + 1)

    on_loop(scenario)


def test_since_a_time_and_filters(broker: BrokerThread, on_loop: Test) -> None:
    async def scenario() -> None:
        async with client.connect(str(broker.path)) as bus:
            numbers(bus, 1, 3)
            await bus.flush()
            await anyio.sleep(0.01)
            moment = datetime.now(UTC)
            await anyio.sleep(0.01)
            numbers(bus, 4, 6)
            bus.publish(VolumeCreated(id="v", time_ns=1))
            async with bus.events(">", since=moment, filters={"type!": "volume"}) as events:
                numbers(bus, 7, 7)
                assert await take(events, 4) == [4, 5, 6, 7]
            async with bus.events(">", since=moment, filters={"type": ["volume", "image"]}) as events:
                assert (await anext(events)).topic == "volume.create"
            with pytest.raises(errors.InvalidArgument):
                async with bus.events(">", filters={"colour": ["red"]}):
                    pass
            with pytest.raises(errors.InvalidArgument):
                bus.events(">", since="yesterday")

    on_loop(scenario)


def test_events_go_on_at_the_right_offset_over_restarts_of_the_broker(broker: BrokerThread, on_loop: Test) -> None:
    async def scenario() -> None:
        async with client.connect(str(broker.path)) as bus, client.connect(str(broker.path)) as publisher:
            async with bus.events("toy.*") as events:
                for turn in range(5):
                    numbers(publisher, turn * 100 + 1, turn * 100 + 50)
                    if turn % 2:  # at times the reader has taken everything, at times it has to come
                        assert await take(events, 50) == list(range(turn * 100 + 1, turn * 100 + 51))
                    await anyio.to_thread.run_sync(broker.stop)
                    numbers(publisher, turn * 100 + 51, turn * 100 + 100)
                    await anyio.to_thread.run_sync(broker.start)
                    rest = range(turn * 100 + (51 if turn % 2 else 1), turn * 100 + 101)
                    assert await take(events, len(rest)) == list(rest)

    on_loop(scenario)


def test_another_journal_is_told_and_read_from_its_beginning(broker: BrokerThread, on_loop: Test) -> None:
    async def scenario() -> None:
        async with client.connect(str(broker.path)) as bus:
            async with bus.events("toy.*", durable="d") as events:
                numbers(bus, 1, 20)
                assert await take(events, 10) == list(range(1, 11))
                await bus.flush()
                old = bus.bus_id
                await anyio.to_thread.run_sync(broker.forget)
                numbers(bus, 21, 25)
                seen: list[Any] = []
                while len(seen) < 16:
                    event = await anext(events)
                    seen.append(event.payload if event.topic == "bus.gap" else event.payload["number"])
                    assert event.journal == (old if len(seen) <= 10 else bus.bus_id)
                assert seen == [*range(11, 21), Gap(lost=-1, journal=bus.bus_id), *range(21, 26)]
                assert bus.bus_id != old

    on_loop(scenario)


def test_a_reader_that_lags_is_bounded_and_loses_nothing(
    broker: BrokerThread, on_loop: Test, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscription, "MAX_BUFFERED_EVENTS", 500)
    count = 5000

    async def scenario() -> None:
        async with client.connect(str(broker.path)) as bus, client.connect(str(broker.path)) as publisher:
            async with bus.events("toy.*") as late, bus.events("toy.*", durable="d") as durable:
                numbers(publisher, 1, count, 1000)
                await publisher.flush()
                while bus.subscriptions:  # till both have been sent as much as they may have
                    await anyio.sleep(0.001)
                assert late._subscription._buffered_events < 500 + MAX_BATCH // 1000
                for events in (late, durable):
                    expected = 1
                    while expected <= count:
                        assert (await anext(events)).payload["number"] == expected
                        expected += 1

    on_loop(scenario)


def test_large_events_are_bounded_by_bytes(broker: BrokerThread, on_loop: Test, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscription, "MAX_BUFFERED_BYTES", 1 << 20)

    async def scenario() -> None:
        async with client.connect(str(broker.path)) as bus:
            async with bus.events("toy.*") as events:
                for number in range(1, 31):
                    bus.publish(Told(id="x" * 300_000, time_ns=1, number=number))
                await bus.flush()
                assert events._subscription._buffered_bytes < 3 << 20
                assert await take(events, 30) == list(range(1, 31))

    on_loop(scenario)


def test_heartbeats(broker: BrokerThread, on_loop: Test) -> None:
    async def scenario() -> None:
        async with client.connect(str(broker.path)) as bus:
            async with bus.events("volume.*", heartbeat_s=0.1) as events:
                first = await anext(events)
                numbers(bus, 1, 3)  # not for this subscription, but it moves on
                await bus.flush()
                seen = [first.payload.next_offset]
                while seen[-1] != seen[0] + 3:  # one may come between them
                    later = await anext(events)
                    assert isinstance(later.payload, Heartbeat) and later.topic == "bus.heartbeat"
                    seen.append(later.payload.next_offset)
                assert seen == sorted(seen)

    on_loop(scenario)


def test_an_offset_of_another_journal_is_told(broker: BrokerThread, on_loop: Test) -> None:
    async def scenario() -> None:
        async with client.connect(str(broker.path)) as bus:
            numbers(bus, 1, 5)
            async with bus.events("toy.*", since="beginning") as events:
                kept = [await anext(events) for _ in range(3)][-1]
            async for event in bus.events("toy.*", since=kept.offset + 1, journal=kept.journal):
                assert event.payload["number"] == 4
                break
            with pytest.raises(errors.InvalidArgument):
                bus.events("toy.*", journal=kept.journal)
            await anyio.to_thread.run_sync(broker.forget)
            numbers(bus, 6, 7)
            await bus.flush()
            assert bus.bus_id != kept.journal
            for offset in (1, kept.offset + 1, 1000):
                for durable in ("", f"d{offset}"):
                    async with bus.events("toy.*", since=offset, journal=kept.journal, durable=durable) as events:
                        gap = await anext(events)
                        assert (gap.topic, gap.offset, gap.journal) == ("bus.gap", 0, bus.bus_id)
                        assert gap.payload == Gap(lost=-1, journal=bus.bus_id)
                        assert await take(events, 2) == [6, 7]
                        await anyio.to_thread.run_sync(broker.restart)
                        numbers(bus, 8, 8)
                        assert await take(events, 1) == [8]
                    await anyio.to_thread.run_sync(broker.forget)
                    numbers(bus, 6, 7)
                    await bus.flush()
            # Without the journal it's the broker's own.
            async with bus.events("toy.*", since=2) as events:
                assert await take(events, 1) == [7]

    on_loop(scenario)


# --- durable subscriptions -------------------------------------------------------------------------------------------


def test_a_durable_position_is_where_the_reader_was(broker: BrokerThread, on_loop: Test) -> None:
    async def scenario() -> None:
        async with client.connect(str(broker.path)) as bus:
            numbers(bus, 1, 30)
            async with bus.events("toy.*", since="beginning", durable="d") as events:
                assert await take(events, 10) == list(range(1, 11))
            # The block ended well: what was taken is processed.
            with pytest.raises(RuntimeError):
                async with bus.events("toy.*", durable="d") as events:
                    assert await take(events, 5) == list(range(11, 16))
                    raise RuntimeError("while at 15")
            assert await position(bus, "d") == 15  # else the broker may end before it has read the acknowledgement
            await anyio.to_thread.run_sync(broker.restart)
            async with bus.events("toy.*", durable="d") as events:
                assert await take(events, 6) == list(range(15, 21))
                with pytest.raises(errors.Conflict):
                    async with client.connect(str(broker.path)) as other:
                        await anext(other.events("toy.*", durable="d"))
            async with bus.events("toy.*", durable="d", auto_ack=False) as events:
                seen = [await anext(events) for _ in range(5)]
                seen[2].ack()
            async with bus.events("toy.*", durable="d", auto_ack=False) as events:
                assert await take(events, 1) == [24]

    on_loop(scenario)


def test_a_durable_reader_sees_nothing_twice_while_it_lives(broker: BrokerThread, on_loop: Test) -> None:
    async def scenario() -> None:
        async with client.connect(str(broker.path)) as bus, client.connect(str(broker.path)) as publisher:
            async with bus.events("toy.*", durable="d") as events:
                numbers(publisher, 1, 100)
                assert await take(events, 30) == list(range(1, 31))
                await anyio.to_thread.run_sync(broker.restart)
                numbers(publisher, 101, 110)
                assert await take(events, 80) == list(range(31, 111))

    on_loop(scenario)


def test_an_acknowledgement_goes_out_though_no_other_event_comes(broker: BrokerThread, on_loop: Test) -> None:
    async def scenario() -> None:
        async with client.connect(str(broker.path)) as bus:
            numbers(bus, 1, 3)
            async with bus.events("toy.*", since="beginning", durable="d", auto_ack=False) as events:
                for _ in range(3):
                    event = await anext(events)
                event.ack()
                while events._subscription._acknowledged != event.offset:  # by a timer: nobody iterates any more
                    await anyio.sleep(0.005)

    on_loop(scenario)


async def position(bus: client.Bus, name: str) -> int:
    """The next offset a durable subscription wants, after all that was said on this connection."""
    durables = (await bus.call(DURABLES, Empty())).durables
    return next(one.offset for one in durables if one.name == name)


def position_of(connection: sync.Connection, name: str) -> int:
    durables: Any = connection.call("bus.durables")["durables"]
    return next(int(one["offset"]) for one in durables if one["name"] == name)


def test_a_heartbeat_acknowledges_what_came_before_it(broker: BrokerThread, on_loop: Test) -> None:
    async def scenario() -> None:
        async with client.connect(str(broker.path)) as bus:
            async with bus.events("toy.*", durable="d", heartbeat_s=0.1, auto_ack=False) as events:
                bus.publish(VolumeCreated(id="v", time_ns=1))
                await bus.flush()
                for _ in range(3):
                    beat = await anext(events)
                    assert beat.offset == beat.payload.next_offset - 1
                    beat.ack()
                    events.ack(beat.offset + 1)  # hasn't come: not to be acknowledged, nor a reason to lose the connection
                subscription_id = events._subscription.id
                numbers(bus, 1, 1)
                await bus.flush()
                beat.ack()
                events.ack(beat.offset)
            assert list(bus.subscriptions) == [] and subscription_id == 1, "subscribed more than once"
            assert await position(bus, "d") == beat.offset + 1
            async with bus.events("toy.*", durable="d") as events:
                assert await take(events, 1) == [1]

    on_loop(scenario)


def volumes(bus: client.Bus, count: int) -> None:
    for _ in range(count):
        bus.publish(VolumeCreated(id="v", time_ns=1))


def test_a_durable_place_moves_on_where_nothing_matches(
    broker: BrokerThread, on_loop: Test, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscription, "DURABLE_HEARTBEAT_S", 0.1)

    async def moved(bus: client.Bus, place: int) -> None:
        while await position(bus, "d") != place:
            await anyio.sleep(0.005)

    async def scenario() -> None:
        async with client.connect(str(broker.path)) as bus:
            for auto_ack in (False, True):
                async with bus.events("toy.*", durable="d", auto_ack=auto_ack) as events:
                    numbers(bus, 1, 1)
                    volumes(bus, 5)
                    await bus.flush()
                    event = await anext(events)
                    seen: list[client.ReceivedEvent] = []

                    async def one_more(events: client.Events = events, seen: list[client.ReceivedEvent] = seen) -> None:
                        seen.append(await anext(events))

                    async with anyio.create_task_group() as group:
                        group.start_soon(one_more)
                        if not auto_ack:
                            while events._subscription._next <= event.offset + 5:
                                await anyio.sleep(0.005)
                            assert await position(bus, "d") == event.offset, "acknowledged what isn't processed"
                            event.ack()
                        await moved(bus, event.offset + 6)
                        volumes(bus, 3)
                        await moved(bus, event.offset + 9)
                        assert seen == [], "a heartbeat nobody asked for"
                        numbers(bus, 2, 2)
                    assert seen[0].payload["number"] == 2
                    seen[0].ack()

    on_loop(scenario)


def a_gap(events: int, first: int, last: int) -> Frame:
    return Frame(GAP, b"", packb({"lost": last + 1 - first, "first_offset": first, "last_offset": last}), events, 0, last)


def test_a_gap_leaves_out_what_has_come(broker: BrokerThread, on_loop: Test) -> None:
    async def scenario() -> None:
        async with client.connect(str(broker.path)) as bus:
            numbers(bus, 1, 5)
            async with bus.events("toy.*", since="beginning") as events:
                assert await take(events, 5) == [1, 2, 3, 4, 5]
                bus._dispatch(a_gap(events._subscription.id, 1, 5))
                bus._dispatch(a_gap(events._subscription.id, 2, 20))
                gap = await anext(events)
                assert (gap.offset, gap.payload) == (20, Gap(lost=15, first_offset=6, last_offset=20))
                bus._dispatch(a_gap(events._subscription.id, 30, 31))
                assert (await anext(events)).payload == Gap(lost=2, first_offset=30, last_offset=31)

    on_loop(scenario)


# --- state now, then everything after --------------------------------------------------------------------------------


def test_a_list_and_what_follows_fit_without_gap_or_overlap(
    broker: BrokerThread, on_loop: Test, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyx_bus.client.bus.WATCH_ATTEMPTS", 4)

    async def scenario() -> None:
        async with client.connect(str(broker.path), "toy") as serving, client.connect(str(broker.path)) as bus:
            service = Service("toy")
            state: list[int] = []

            @service.method(LIST)
            def list_(call: Call, request: Empty) -> State:
                call.snapshot()
                return State(numbers=list(state))

            @service.method(BLIND)
            async def blind(call: Call, request: Empty) -> Empty:
                return Empty()

            await serving.serve(service)

            async def change() -> None:
                for number in range(1, 3001):
                    state.append(number)
                    serving.publish(Told(id="x", time_ns=1, number=number))
                    if number % 7 == 0:
                        await anyio.lowlevel.checkpoint()

            async with bus.watch(LIST, Empty(), "toy.*") as (nothing, events):
                assert nothing.numbers == []
                async with anyio.create_task_group() as group:
                    group.start_soon(change)
                    for _ in range(10):
                        async with bus.watch(LIST, Empty(), "toy.*") as (begun, more):
                            assert begun.numbers + await take(more, 3000 - len(begun.numbers)) == list(range(1, 3001))
                assert await take(events, 3000) == list(range(1, 3001))
            with pytest.raises(errors.Unavailable, match="doesn't say"):
                async with bus.watch(BLIND, Empty(), ">"):
                    pass

    on_loop(scenario)


# --- calls -----------------------------------------------------------------------------------------------------------


def test_plain_handlers_answer_and_fail_like_any(broker: BrokerThread, on_loop: Test) -> None:
    async def scenario() -> None:
        async with client.connect(str(broker.path), "toy") as serving, client.connect(str(broker.path)) as bus:
            service = Service("toy")

            @service.method(PLAIN)
            def plain(call: Call, request: Count) -> Count:
                if request.count < 0:
                    raise errors.Conflict("negative")
                return Count(count=request.count // (request.count - 13) if request.count else 0)

            await serving.serve(service)
            assert (await bus.call(PLAIN, Count(count=26), timeout_s=5)).count == 2
            with pytest.raises(errors.Conflict):
                await bus.call(PLAIN, Count(count=-1))
            with pytest.raises(errors.Internal, match="ZeroDivisionError"):
                await bus.call(PLAIN, Count(count=13))
            with pytest.raises(errors.Unimplemented):
                await bus.call(MUTE, Empty())
            answers: dict[int, int] = {}

            async def caller(count: int) -> None:
                answers[count] = (await bus.call(PLAIN, Count(count=count), timeout_s=10)).count

            async with anyio.create_task_group() as group:
                for count in range(100, 300):
                    group.start_soon(caller, count)
            assert answers == {count: count // (count - 13) for count in range(100, 300)}

    on_loop(scenario)


def test_large_calls_at_a_time_with_descriptors_between(broker: BrokerThread, on_loop: Test) -> None:
    """More than the kernel takes at once, in both directions: what waits stays in order, and descriptors stay with their frames."""

    async def scenario() -> None:
        async with client.connect(str(broker.path), "toy") as serving, client.connect(str(broker.path)) as bus:
            service = Service("toy")

            @service.method(LARGE)
            async def large(call: Call, request: Text) -> Text:
                if call.fds:
                    (writer,) = call.take_fds()
                    os.write(writer, request.text[:4].encode())
                    os.close(writer)
                return request

            await serving.serve(service)
            before = len(os.listdir("/proc/self/fd"))
            served: list[int] = []

            async def caller(number: int) -> None:
                text = f"{number:04}" * 250_000
                reader, writer = os.pipe()
                try:
                    answer = await bus.call(LARGE, Text(text=text), fds=[writer] if number % 3 else [])
                finally:
                    os.close(writer)
                assert answer.text == text
                assert os.read(reader, 100) == (b"%04d" % number if number % 3 else b"")
                os.close(reader)
                served.append(number)

            async with anyio.create_task_group() as group:
                for number in range(6):
                    group.start_soon(caller, number)
            assert sorted(served) == list(range(6))
            assert len(os.listdir("/proc/self/fd")) == before

    on_loop(scenario)


def test_one_task_registers_again_and_ends_when_it_has(
    broker: BrokerThread, on_loop: Test, caplog: pytest.LogCaptureFixture
) -> None:
    """The connection breaks again and again while something else has the name."""

    async def scenario() -> None:
        async with client.connect(str(broker.path), "toy") as bus, client.connect(str(broker.path)) as holder:
            service, held = Service("toy"), Service("toy")

            @service.method(PLAIN)
            def plain(call: Call, request: Count) -> Count:
                return Count(count=request.count + 1)

            async def break_off() -> None:
                connections = bus._connections
                assert bus.link._transport is not None
                bus.link._transport.sock.shutdown(socket.SHUT_RDWR)
                while bus._connections == connections:
                    await anyio.sleep(0.001)

            await holder.serve(held)
            with pytest.raises(errors.AlreadyExists):
                await bus.serve(service)
            await break_off()  # what serve couldn't register isn't registered behind its back
            assert not bus._registering
            bus._service = service  # as if the other one had been faster after a break
            for _ in range(5):
                await break_off()
            for _ in range(5):
                await break_off()
                await anyio.sleep(0.02)
            assert bus._registering
            holder._service = None
            assert holder.link._transport is not None
            holder.link._transport.sock.shutdown(socket.SHUT_RDWR)
            while bus._registering:
                await anyio.sleep(0.005)
            assert (await holder.call(PLAIN, Count(count=1), timeout_s=10)).count == 2
            with pytest.raises(errors.InvalidArgument):
                await bus.serve(Service("toys"))  # a connection has one name
            await break_off()  # and over breaks without anybody in the way
            while bus._registering:
                await anyio.sleep(0.005)
            assert (await holder.call(PLAIN, Count(count=2), timeout_s=10)).count == 3

    on_loop(scenario)
    assert not [record for record in caplog.records if "let us serve" in record.message]


def test_a_service_tells_its_version(broker: BrokerThread, on_loop: Test) -> None:
    async def scenario() -> None:
        async with client.connect(str(broker.path)) as bus, client.connect(str(broker.path)) as other:
            await bus.serve(Service("toy", "7.1"))
            await other.serve(Service("tin"))
            services = (await bus.call(SERVICES, Empty())).services
            assert {one.name: one.version for one in services if one.name != "bus"} == {"toy": "7.1", "tin": __version__}

    on_loop(scenario)


def test_what_a_call_tells_its_handler() -> None:
    sent: list[bytes] = []
    frame = Frame(CALL, b"toy.list", peer=3, serial=4, arg=7 << 32 | 1500, flags=FLAG_MONITOR)
    call = Call(lambda data, fds=(): sent.append(data), frame, lambda: 11)
    assert (call.method, call.uid, call.timeout_s, call.monitor) == ("toy.list", 7, 1.5, True)
    call.snapshot()
    call.finish(State())
    (answer,) = Decoder().feed(sent[0])
    assert (answer.kind, answer.peer, answer.serial, answer.arg) == (RESULT, 3, 4, 12)
    assert not Call(lambda data, fds=(): None, Frame(CALL, b"toy.list"), lambda: 11).monitor


def test_flush_waits_for_the_journal(broker: BrokerThread, on_loop: Test) -> None:
    async def scenario() -> None:
        async with client.connect(str(broker.path)) as bus:
            await bus.flush()
            await anyio.to_thread.run_sync(broker.stop)
            numbers(bus, 1, 3)
            with anyio.move_on_after(0.05) as scope:
                await bus.flush()
            assert scope.cancelled_caught
            await anyio.to_thread.run_sync(broker.start)
            await bus.flush()
            assert len(bus._publisher) == 0
            numbers(bus, 4, 9000, 1000)  # more than the window; leaving the block waits for it
        async with client.connect(str(broker.path)) as bus, bus.events("toy.*", since="beginning") as events:
            assert await take(events, 9000) == list(range(1, 9001))

    on_loop(scenario)


def test_only_the_call_s_own_deadline_is_deadline_exceeded(broker: BrokerThread, on_loop: Test) -> None:
    async def scenario() -> None:
        async with client.connect(str(broker.path), "toy") as serving, client.connect(str(broker.path)) as bus:
            service = Service("toy")
            ended = anyio.Event()

            @service.method(COUNT)
            async def count(call: Call, request: Count) -> Empty:
                await call.send(Count(count=1))
                try:
                    await anyio.sleep_forever()
                finally:
                    ended.set()
                raise AssertionError

            await serving.serve(service)
            with pytest.raises(TimeoutError):
                async with bus.stream(COUNT, Count()) as stream:
                    await anext(stream)  # it has begun
                    raise TimeoutError("the user's own")
            await ended.wait()
            ended = anyio.Event()
            with pytest.raises(errors.DeadlineExceeded):
                async with bus.stream(COUNT, Count(), timeout_s=0.05) as stream:
                    assert (await anext(stream)).count == 1
                    await anext(stream)
            await ended.wait()
            # Many deadlines share a timer: each ends at its own, and calls that end before leave nothing.
            started = anyio.current_time()
            ends: list[tuple[float, float]] = []

            async def caller(timeout_s: float) -> None:
                with pytest.raises(errors.DeadlineExceeded):
                    await bus.call(COUNT, Count(), timeout_s=timeout_s)
                ends.append((timeout_s, anyio.current_time() - started))

            async with anyio.create_task_group() as group:
                for timeout_s in (0.4, 0.1, 0.3, 0.2):
                    group.start_soon(caller, timeout_s)
            assert [timeout_s for timeout_s, _ in ends] == [0.1, 0.2, 0.3, 0.4]
            assert all(took >= timeout_s for timeout_s, took in ends)
            assert bus._pending == {}

    on_loop(scenario)


def test_a_shielded_handler_doesn_t_wait_for_a_caller_that_is_gone(broker: BrokerThread, on_loop: Test) -> None:
    async def scenario() -> None:
        sent, told = anyio.Event(), anyio.Event()
        async with client.connect(str(broker.path), "toy") as serving:
            service = Service("toy")

            @service.method(COUNT)
            async def count(call: Call, request: Count) -> Empty:
                with anyio.CancelScope(shield=True):
                    with pytest.raises(errors.Cancelled):
                        for number in range(1000):
                            await call.send(Count(count=number))
                            if number == 63:
                                sent.set()
                told.set()
                return Empty()

            await serving.serve(service)
            async with client.connect(str(broker.path)) as bus:
                async with bus.stream(COUNT, Count()):
                    await sent.wait()
            await told.wait()

    on_loop(scenario)


# --- the blocking client ---------------------------------------------------------------------------------------------


def publish(path: Path, first: int, last: int, size: int = 1) -> None:
    async def main() -> None:
        async with client.connect(str(path)) as bus:
            numbers(bus, first, last, size)
            await bus.flush()

    anyio.run(main, backend="asyncio")


def publish_volume(path: Path) -> None:
    async def main() -> None:
        async with client.connect(str(path)) as bus:
            bus.publish(VolumeCreated(id="v", time_ns=1))
            await bus.flush()

    anyio.run(main, backend="asyncio")


def test_blocking_events_go_on_over_restarts(broker: BrokerThread) -> None:
    with sync.Connection(str(broker.path)) as connection:
        with connection.events("toy.*", durable="d") as events, connection.events("toy.*") as others:
            publish(broker.path, 1, 10)
            assert [next(events).payload["number"] for _ in range(8)] == list(range(1, 9))
            broker.restart()
            publish(broker.path, 11, 20)
            assert [next(events).payload["number"] for _ in range(12)] == list(range(9, 21))
            assert [next(others).payload["number"] for _ in range(20)] == list(range(1, 21))
            assert connection.call("bus.services") is not None
            assert events.receive(0.05) is None
            broker.forget()
            publish(broker.path, 21, 22)
            gap = next(events)
            assert (gap.topic, gap.payload["lost"], gap.payload["journal"]) == ("bus.gap", -1, connection.bus_id)
            event = next(events)
            assert (event.topic, event.payload["number"]) == ("toy.told", 21)
        with connection.events("toy.*", durable="d", heartbeat_s=0.1) as events:
            assert next(events).payload["number"] == 22
            assert next(events).kind == "heartbeat"


def test_a_heartbeat_s_offset_acknowledges_what_came_before_it_blocking(broker: BrokerThread) -> None:
    with sync.Connection(str(broker.path)) as connection:
        with connection.events("toy.*", durable="d", heartbeat_s=0.1, auto_ack=False) as events:
            publish_volume(broker.path)
            next(events)
            beat = next(events)
            assert (beat.kind, beat.payload) == ("heartbeat", {"next_offset": beat.offset + 1})
            publish(broker.path, 1, 1)
            events.ack(beat.offset + 1)
            events.ack(beat.offset)
        assert position_of(connection, "d") == beat.offset + 1
        with connection.events("toy.*", durable="d") as events:
            assert next(events).payload["number"] == 1


def test_a_durable_place_moves_on_where_nothing_matches_blocking(
    broker: BrokerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync_streams, "DURABLE_HEARTBEAT_S", 0.1)
    with sync.Connection(str(broker.path)) as connection:
        for auto_ack in (False, True):
            with connection.events("toy.*", durable="d", auto_ack=auto_ack) as events:

                def wait_for(condition: Callable[[], bool], events: sync_streams.Events = events) -> None:
                    deadline = time.monotonic() + 20
                    while not condition():
                        assert time.monotonic() < deadline
                        assert events.receive(0.02) is None, "a heartbeat nobody asked for"

                publish(broker.path, 1, 1)
                publish_volume(broker.path)
                event = next(events)
                if not auto_ack:
                    wait_for(lambda place=event.offset + 1: events._idle[1] == place)  # type: ignore[misc]
                    assert position_of(connection, "d") == event.offset, "acknowledged what isn't processed"
                    events.ack(event.offset)
                wait_for(lambda place=event.offset + 2: position_of(connection, "d") == place)  # type: ignore[misc]
                publish_volume(broker.path)
                wait_for(lambda place=event.offset + 3: position_of(connection, "d") == place)  # type: ignore[misc]
                assert not events.pending()


def test_a_gap_leaves_out_what_has_come_blocking(broker: BrokerThread) -> None:
    publish(broker.path, 1, 5)
    with sync.Connection(str(broker.path)) as connection, connection.events("toy.*", since="beginning") as events:
        assert [next(events).payload["number"] for _ in range(5)] == [1, 2, 3, 4, 5]
        connection._dispatch(a_gap(events._id, 1, 5))
        connection._dispatch(a_gap(events._id, 2, 20))
        gap = next(events)
        assert (gap.offset, gap.payload) == (20, {"lost": 15, "first_offset": 6, "last_offset": 20})
        assert not events.pending()


def test_the_command_s_durable_place_moves_on_where_nothing_matches(broker: BrokerThread) -> None:
    command = [sys.executable, "-m", "pyx_cli", "events", "--durable", "d", "-f", "type=volume", "--until", "0s", "--json"]
    environment = {**os.environ, "PYX_BUS": str(broker.path), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with sync.Connection(str(broker.path)) as connection:
        publish_volume(broker.path)
        for told in (1, 0, 0):
            publish(broker.path, 1, 20)
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=True)
            assert len(done.stdout.splitlines()) == told and done.stderr == ""
            assert position_of(connection, "d") == connection.call("bus.stats")["next_offset"]


def test_an_offset_of_another_journal_is_told_blocking(broker: BrokerThread) -> None:
    publish(broker.path, 1, 5)
    with sync.Connection(str(broker.path)) as connection:
        old = connection.bus_id
        with connection.events("toy.*", since=4, journal=old) as events:
            assert next(events).payload["number"] == 4
        with pytest.raises(errors.InvalidArgument):
            connection.events("toy.*", since="beginning", journal=old)
    broker.forget()
    publish(broker.path, 6, 7)
    with sync.Connection(str(broker.path)) as connection, connection.events("toy.*", since=1000, journal=old) as events:
        gap = next(events)
        assert (gap.topic, gap.offset, gap.payload["lost"], gap.payload["journal"]) == ("bus.gap", 0, -1, connection.bus_id)
        assert [next(events).payload["number"] for _ in range(2)] == [6, 7]
    command = [sys.executable, "-m", "pyx_cli", "events", "--json", "--until", "0s", "--since"]
    environment = {**os.environ, "PYX_BUS": str(broker.path), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    for since, told in ((f"offset:2@{old}", [0, 1, 2]), (f"offset:2@{connection.bus_id}", [2]), ("offset:2", [2])):
        done = subprocess.run([*command, since], env=environment, capture_output=True, text=True, timeout=20, check=True)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        assert [record["offset"] for record in records] == told
        assert {record["journal"] for record in records} == {connection.bus_id}
    done = subprocess.run([*command, "offset:2@"], env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 125 and "journal" in done.stderr


def test_blocking_events_give_up_when_told_to(broker: BrokerThread) -> None:
    with sync.Connection(str(broker.path)) as connection:
        events = connection.events("toy.*", retry_for_s=0.2)
        broker.stop()
        with pytest.raises(errors.Unavailable):
            next(events)


def test_blocking_reader_that_calls_meanwhile_is_bounded(broker: BrokerThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_streams, "MAX_BUFFERED_EVENTS", 300)
    with sync.Connection(str(broker.path)) as connection:
        events = connection.events("toy.*")
        publish(broker.path, 1, 3000, 1000)
        for _ in range(20):
            connection.call("bus.services")
        assert len(events._buffer) < 300 + MAX_BATCH // 1000, "more than the bound and a last batch"
        assert not connection.pending(), "what came after the end of the subscription is kept"
        assert [next(events).payload["number"] for _ in range(3000)] == list(range(1, 3001))


def test_blocking_stream(broker: BrokerThread) -> None:
    ready, done = threading.Event(), threading.Event()

    async def main() -> None:
        async with client.connect(str(broker.path), "toy") as bus:
            service = Service("toy")

            @service.method(COUNT)
            async def count(call: Call, request: Count) -> Empty:
                for number in range(request.count):
                    await call.send(Count(count=number))
                return Empty()

            await bus.serve(service)
            ready.set()
            await anyio.to_thread.run_sync(done.wait)

    thread = threading.Thread(target=anyio.run, args=(main,))
    thread.start()
    try:
        assert ready.wait(10)
        with sync.Connection(str(broker.path)) as connection:
            with connection.stream("toy.count", {"count": 200}) as items:
                assert [item.get("count", 0) for item in items] == list(range(200))
                assert items.result() == {}
            with connection.stream("toy.count", {"count": 200}) as items:
                next(items)  # and leave
            assert connection.call("toy.count", {"count": 1}, timeout_s=5) == {}
            with connection.stream("toy.missing") as items, pytest.raises(errors.Unimplemented):
                next(items)
    finally:
        done.set()
        thread.join()


def test_an_interrupt_while_waiting_loses_nothing(broker: BrokerThread) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with sync.Connection(str(broker.path)) as connection:
            with connection.events("toy.*") as events:
                publish(broker.path, 1, 5)
                assert [next(events).payload["number"] for _ in range(5)] == [1, 2, 3, 4, 5]
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                with pytest.raises(KeyboardInterrupt):
                    next(events)
                publish(broker.path, 6, 8)
                assert [next(events).payload["number"] for _ in range(3)] == [6, 7, 8]
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_the_blocking_client_imports_next_to_nothing() -> None:
    """The command line pays for what is imported here at every start."""
    heavy = ("asyncio", "socket", "typing", "logging", "dataclasses", "msgspec", "anyio")
    code = f"import sys, pyx_bus.sync; print([module for module in {heavy} if module in sys.modules])"
    answer = subprocess.run([sys.executable, "-S", "-c", _WITH_PATH + code], capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"


_WITH_PATH = f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}; "


# --- the examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", ["watch_asyncio.py", "watch_trio.py", "watch_blocking.py"])
def test_examples_of_the_documentation(broker: BrokerThread, example: str) -> None:
    from pyx_bus.contract.containerd import ContainerStarted

    async def start_one() -> str:
        async with client.connect(str(broker.path), "containerd") as bus:
            bus.publish(ContainerStarted(id="b01d", time_ns=1, attributes={"name": "before"}))
            bus.publish(ContainerStarted(id="c0ffee", time_ns=1, attributes={"name": "web"}))
            await bus.flush()
            return bus.bus_id

    journal = anyio.run(start_one, backend="asyncio")
    arguments = ["mine"] if "blocking" in example else [journal, "1"]
    environment = {**os.environ, "PYX_BUS": str(broker.path), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    try:
        line = process.stdout.readline()
        if "blocking" in example:
            assert "container.start b01d" in line
            line = process.stdout.readline()
        assert "container.start c0ffee" in line and "web" in line
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stderr.read() == ""
        assert "blocking" in example or line.split()[:2] == [journal, "2"]  # what it goes on behind the next time
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
