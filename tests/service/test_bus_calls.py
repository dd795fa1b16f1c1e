"""The client and the broker together, on a real socket: calls, streams, errors, descriptors, cancellation, reconnection."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
import trio
import trio.testing

from pyx_bus import client, errors, sync, testing, wire
from pyx_bus.contract.base import Empty, Message, Method
from pyx_bus.contract.volumed import VolumeCreated
from pyx_bus.service import Call, Context, Service


class Ask(Message, frozen=True, kw_only=True):
    text: str = ""
    count: int = 0


class Answer(Message, frozen=True, kw_only=True):
    text: str = ""


ECHO = Method("toy.echo", Ask, Answer, idempotent=True)
FAIL = Method("toy.fail", Ask, Answer)
CRASH = Method("toy.crash", Ask, Answer)
COUNT = Method("toy.count", Ask, Answer, item=Ask)
SWAP = Method("toy.swap", Ask, Answer)
HANG = Method("toy.hang", Ask, Answer)
MISSING = Method("toy.missing", Ask, Answer)


class Toy:
    """A service whose handlers leave traces for the tests to look at."""

    def __init__(self) -> None:
        self.hanging = trio.Event()
        self.cancelled = trio.Event()
        self.sent = 0

    async def setup(self, context: Context) -> Service:
        service = Service("toy")

        @service.method(ECHO)
        async def echo(call: Call, request: Ask) -> Answer:
            return Answer(text=request.text)

        @service.method(FAIL)
        async def fail(call: Call, request: Ask) -> Answer:
            raise errors.Conflict(f'"{request.text}" is in use', hint="take another", details={"who": "me"})

        @service.method(CRASH)
        async def crash(call: Call, request: Ask) -> Answer:
            raise ZeroDivisionError("oops")

        @service.method(COUNT)
        async def count(call: Call, request: Ask) -> Answer:
            for i in range(request.count):
                await call.send(Ask(count=i))
                self.sent = i + 1
            return Answer(text="done")

        @service.method(SWAP)
        async def swap(call: Call, request: Ask) -> Answer:
            (write_end,) = call.take_fds()
            os.write(write_end, b"from the service")
            os.close(write_end)
            read_end, write_end = os.pipe()
            os.write(write_end, b"in the answer")
            os.close(write_end)
            call.reply_fds.append(read_end)
            return Answer()

        @service.method(HANG)
        async def hang(call: Call, request: Ask) -> Answer:
            self.hanging.set()
            try:
                await trio.sleep_forever()
            finally:
                self.cancelled.set()
            raise AssertionError

        return service


@pytest.fixture
async def bus_path(tmp_path: Path) -> AsyncIterator[Path]:
    async with testing.broker(tmp_path) as path:
        yield path


@pytest.fixture
async def toy(bus_path: Path) -> AsyncIterator[Toy]:
    toy = Toy()
    async with testing.serve(bus_path, "toy", toy.setup):
        yield toy


@pytest.fixture
async def bus(bus_path: Path, toy: Toy) -> AsyncIterator[client.Bus]:
    async with client.connect(str(bus_path)) as bus:
        yield bus


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_call_returns_the_typed_result(bus: client.Bus) -> None:
    assert await bus.call(ECHO, Ask(text="hello")) == Answer(text="hello")


async def test_typed_error_keeps_code_hint_and_details(bus: client.Bus) -> None:
    with pytest.raises(errors.Conflict) as caught:
        await bus.call(FAIL, Ask(text="x"))
    assert (caught.value.message, caught.value.hint, caught.value.details) == ('"x" is in use', "take another", {"who": "me"})


async def test_unexpected_exception_is_internal_and_the_service_lives(bus: client.Bus) -> None:
    with pytest.raises(errors.Internal, match="oops"):
        await bus.call(CRASH, Ask())
    assert await bus.call(ECHO, Ask(text="still here")) == Answer(text="still here")


async def test_unknown_method_and_service(bus: client.Bus) -> None:
    with pytest.raises(errors.Unimplemented):
        await bus.call(MISSING, Ask())
    with pytest.raises(errors.Unavailable, match="nobody"):
        await bus.call(Method("nobody.home", Empty, Empty), Empty())


async def test_request_is_validated_at_the_edge(bus: client.Bus, bus_path: Path) -> None:
    def wrong_type() -> None:
        with sync.Connection(str(bus_path)) as connection:
            connection.call("toy.echo", {"text": 7})

    with pytest.raises(errors.InvalidArgument, match="Expected `str`"):
        await trio.to_thread.run_sync(wrong_type)


async def test_stream_is_flow_controlled(bus: client.Bus, toy: Toy) -> None:
    async with bus.stream(COUNT, Ask(count=500)) as stream:
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert toy.sent <= 64, "the service ran ahead of its window"
        seen = [item.count async for item in stream]
        assert seen == list(range(500))
        assert (await stream.result()).text == "done"


async def test_descriptors_travel_both_ways_and_none_leaks(bus: client.Bus) -> None:
    before = open_fds()
    for _ in range(50):
        read_end, write_end = os.pipe()
        _, (received,) = await bus.call_fds(SWAP, Ask(), fds=[write_end])
        os.close(write_end)
        assert os.read(read_end, 100) == b"from the service"
        assert os.read(read_end, 100) == b""
        assert os.read(received, 100) == b"in the answer"
        os.close(read_end)
        os.close(received)
    assert open_fds() == before


async def test_descriptors_nobody_takes_are_closed(bus: client.Bus) -> None:
    before = open_fds()
    read_end, write_end = os.pipe()
    await bus.call(ECHO, Ask(), fds=[write_end])
    with pytest.raises(errors.Unimplemented):
        await bus.call(MISSING, Ask(), fds=[write_end])
    with pytest.raises(errors.Unavailable):
        await bus.call(Method("nobody.home", Empty, Empty), Empty(), fds=[write_end])
    os.close(write_end)
    assert os.read(read_end, 1) == b""
    os.close(read_end)
    assert open_fds() == before


async def test_cancelling_the_caller_cancels_the_callee(bus: client.Bus, toy: Toy) -> None:
    with trio.move_on_after(5) as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bus.call, HANG, Ask())
            await toy.hanging.wait()
            nursery.cancel_scope.cancel()
        await toy.cancelled.wait()
    assert not scope.cancelled_caught


async def test_deadline_reaches_caller_and_callee(bus: client.Bus, toy: Toy) -> None:
    with pytest.raises(errors.DeadlineExceeded):
        await bus.call(HANG, Ask(), timeout_s=0.05)
    with trio.fail_after(5):
        await toy.cancelled.wait()


async def test_lost_caller_cancels_the_callee(bus_path: Path, toy: Toy) -> None:
    def call_and_leave() -> None:
        with sync.Connection(str(bus_path)) as connection:
            connection.open("toy.hang")
            trio.from_thread.run(toy.hanging.wait)

    with trio.fail_after(5):
        await trio.to_thread.run_sync(call_and_leave)
        await toy.cancelled.wait()


async def test_lost_service_fails_its_callers(bus_path: Path) -> None:
    toy = Toy()
    async with client.connect(str(bus_path)) as bus, trio.open_nursery() as nursery:

        async def caller() -> None:
            with pytest.raises(errors.Unavailable):
                await bus.call(HANG, Ask())

        with trio.fail_after(5):
            async with testing.serve(bus_path, "toy", toy.setup):
                nursery.start_soon(caller)
                await toy.hanging.wait()


async def start_broker(nursery: trio.Nursery, path: Path) -> trio.CancelScope:
    """A broker that the test can end while the rest goes on."""
    scope = trio.CancelScope()

    async def run(task_status: trio.TaskStatus[None]) -> None:
        with scope:
            async with testing.broker(path.parent):
                task_status.started()
                await trio.sleep_forever()

    await nursery.start(run)
    return scope


async def test_broker_restart_is_survived(tmp_path: Path) -> None:
    """Client and service come back by themselves; an idempotent call made meanwhile succeeds; an unacknowledged event arrives."""
    toy = Toy()
    path = tmp_path / "bus.sock"
    answers: list[Answer] = []
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            first = await start_broker(nursery, path)
            async with testing.serve(path, "toy", toy.setup) as context, client.connect(str(path)) as bus:
                assert (await bus.call(ECHO, Ask(text="1"))).text == "1"
                first.cancel()
                while bus.connected or context.bus.connected:
                    await trio.sleep(0.001)
                context.bus.publish(VolumeCreated(id="v", time_ns=1))
                async with trio.open_nursery() as callers:

                    @callers.start_soon
                    async def call() -> None:
                        answers.append(await bus.call(ECHO, Ask(text="2")))

                    second = await start_broker(nursery, path)
                    async with client.connect(str(path)) as watcher:
                        async with watcher.events("volume.>", since="beginning") as events:
                            event = await anext(events)
                assert (event.topic, event.payload.id) == ("volume.create", "v")
                assert answers == [Answer(text="2")]
            second.cancel()


async def test_second_registration_is_refused(bus_path: Path, toy: Toy) -> None:
    async with client.connect(str(bus_path)) as other:
        with pytest.raises(errors.AlreadyExists):
            await other.serve(Service("toy"))


async def test_client_works_on_asyncio_too(bus_path: Path, toy: Toy) -> None:
    async def watch() -> str:
        async with client.connect(str(bus_path)) as bus:
            return (await bus.call(ECHO, Ask(text="from asyncio"))).text

    assert await trio.to_thread.run_sync(lambda: anyio.run(watch, backend="asyncio")) == "from asyncio"


async def test_an_error_that_quotes_anything_reaches_its_caller(tmp_path: Path) -> None:
    """What a message quotes may be as long as a frame and hold bytes that are no text."""

    async def setup(context: Context) -> Service:
        service = Service("toy")

        @service.method(FAIL)
        async def fail(call: Call, request: Ask) -> Answer:
            text = "\udc80" if request.count else request.text
            raise errors.NotFound(f'no such thing: "{text}"', hint=f"not {text}", details={"what": text})

        return service

    async with testing.broker(tmp_path) as path, testing.serve(path, "toy", setup), client.connect(str(path)) as bus:
        with pytest.raises(errors.NotFound) as caught:
            await bus.call(FAIL, Ask(text="x" * (wire.MAX_FRAME - 100)), timeout_s=5)
        assert caught.value.message.startswith('no such thing: "xxx') and len(caught.value.message) < 20_000
        with pytest.raises(errors.NotFound) as caught:
            await bus.call(FAIL, Ask(count=1), timeout_s=5)
        assert caught.value.message == 'no such thing: "\\udc80"'


async def test_a_cancelled_call_s_number_can_be_used_again(tmp_path: Path) -> None:
    """Its handler may shield itself and answer late: that isn't the answer to the call that has its number now."""
    first_ends, first_ended = trio.Event(), trio.Event()

    async def setup(context: Context) -> Service:
        service = Service("toy")

        @service.method(ECHO)
        async def echo(call: Call, request: Ask) -> Answer:
            if request.text == "first":
                with trio.CancelScope(shield=True):
                    await first_ends.wait()
                first_ended.set()
                return Answer(text="first")
            if request.text == "third":
                return Answer()
            await trio.sleep_forever()
            raise AssertionError

        return service

    async with testing.broker(tmp_path) as path, testing.serve(path, "toy", setup), client.connect(str(path)) as bus:
        with trio.move_on_after(0.05):
            await bus.call(ECHO, Ask(text="first"))
        await bus.call(ECHO, Ask(text="third"))  # frames stay in order: the service has seen the cancellation
        bus._serial = 0
        with trio.move_on_after(0.05) as second:
            async with bus.stream(ECHO, Ask(text="second")) as stream:
                first_ends.set()
                await first_ended.wait()
                await stream.result()
        assert second.cancelled_caught


async def test_a_subscription_given_up_leaves_nothing(tmp_path: Path) -> None:
    async with testing.broker(tmp_path) as path, client.connect(str(path)) as bus:
        async with bus.events("a.*"):
            assert bus._pending == {}
        with trio.CancelScope() as scope:
            scope.cancel()
            async with bus.events("b.*"):
                pass
        assert bus.subscriptions == {} and bus._pending == {}


async def test_descriptors_that_cannot_be_passed_are_an_error(tmp_path: Path) -> None:
    async with testing.broker(tmp_path) as path, client.connect(str(path)) as bus:
        with trio.fail_after(5), pytest.raises(errors.Internal, match="descriptors"):
            await bus.call(ECHO, Ask(), fds=[999_999])  # no such descriptor
