"""Publishers and brokers that are killed at any moment: what was published is in the journal, once and in order."""

from __future__ import annotations

import ctypes
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import msgpack
import pytest
import trio
import trio.testing

from pyx_bus.broker.journal import Hole, Journal
from pyx_bus.client import Bus, connect, spool
from pyx_bus.client import bus as client_bus
from pyx_bus.client.publisher import Publisher
from pyx_bus.client.spool import Spool, claim
from pyx_bus.contract.base import Empty, Event, Method
from pyx_bus.server import Call, Service
from pyx_bus.testing import broker
from pyx_bus.wire import HEADER_SIZE, frame_bounds

ROUNDS = 30
DEADLINE_S = 30
_NUMBER = struct.Struct("<I")
_libc = ctypes.CDLL(None, use_errno=True)

# Publishes 0, 1, 2 and on, and says of each that it's published. Ends when its input does, once all of it is in the journal.
_PUBLISHER = """
import os, random, struct, sys, time
from pathlib import Path
from typing import ClassVar
import trio
from pyx_bus.client import connect
from pyx_bus.contract.base import Event

class Told(Event, frozen=True, kw_only=True):
    topic: ClassVar[str] = "toy.told"
    number: int

async def main(directory, round_, last):
    rng = random.Random(round_)
    async with connect(str(directory / "bus.sock"), "toy", wait=False, spool=directory / "events") as bus:
        number = 0
        while number < last:
            for _ in range(min(last - number, rng.choice((1, 1, 5, 200)))):
                attributes = {"padding": "x" * rng.choice((0, 100, 3000))}
                bus.publish(Told(id=str(round_), time_ns=time.time_ns(), number=number, attributes=attributes))
                os.write(1, struct.pack("<I", number))
                number += 1
            await trio.sleep(rng.choice((0, 0, 0.002)))
        await bus.flush()

trio.run(main, Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
"""


class Told(Event, frozen=True, kw_only=True):
    topic: ClassVar[str] = "toy.told"

    number: int


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    assert _libc.mount(b"tmpfs", str(tmp_path).encode(), b"tmpfs", 0, b"size=1m") == 0
    yield tmp_path
    _libc.umount2(str(tmp_path).encode(), 2)


def _start_broker(directory: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYX_RUN": str(directory), "PYX_ROOT": str(directory), "PYX_LOG_LEVEL": "error"}
    for name in ("PYX_BUS", "PYX_CONFIG", "NOTIFY_SOCKET"):
        environment.pop(name, None)
    return subprocess.Popen([sys.executable, "-m", "pyx_bus.broker"], env=environment)


def _start_publisher(directory: Path, round_: int, last: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _PUBLISHER, str(directory), str(round_), str(last)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _read(pipe: int, count: int) -> int:
    """How many numbers came, ``count`` or, where that's more, what's there until the end of the pipe (count of 0)."""
    data = bytearray()
    deadline = time.monotonic() + DEADLINE_S
    while not count or len(data) < count * _NUMBER.size:
        assert select.select([pipe], [], [], deadline - time.monotonic())[0], "it publishes nothing"
        piece = os.read(pipe, _NUMBER.size * count - len(data) if count else 1 << 16)
        if not piece:
            break
        data += piece
    return len(data) // _NUMBER.size


def _journalled(directory: Path) -> list[tuple[int, int]]:
    """(round, number) of the toy's events, in the journal's order."""
    journal = Journal(directory / "bus" / "journal")
    try:
        cursor = journal.seek(1)
        found = journal.read(cursor)
        while not cursor.at_end:
            found += journal.read(cursor)
    finally:
        journal.close()
    told = []
    for record in found:
        assert not isinstance(record, Hole)
        for start, payload, end in frame_bounds(record.frames):
            if record.frames[start + HEADER_SIZE : payload] == b"toy.told":
                body = msgpack.unpackb(record.frames[payload:end])
                told.append((int(body["id"]), body["number"]))
    return told


def test_what_was_published_survives_the_publisher_and_the_broker(tmp_path: Path) -> None:
    rng = random.Random(7)
    returned = []  # by round, how many `publish` has returned for
    left_something = 0
    broker: subprocess.Popen[bytes] | None = None
    try:
        for round_ in range(ROUNDS):
            if broker is None and round_ % 4:  # else there's none all the time
                broker = _start_broker(tmp_path)
            process = _start_publisher(tmp_path, round_, 1 << 30)
            assert process.stdout is not None
            pipe = process.stdout.fileno()
            count = _read(pipe, rng.choice((1, 20, 300, 3000)))
            victims = [process]
            if broker is not None and round_ % 3:
                if round_ % 2:
                    broker.send_signal(signal.SIGSTOP)  # what's published from here on it never sees
                    count += _read(pipe, rng.choice((1, 300)))
                victims.append(broker)
                broker = None
            rng.shuffle(victims)
            for victim in victims:
                victim.send_signal(signal.SIGKILL)
            for victim in victims:
                victim.wait()
            count += _read(pipe, 0)
            process.stdout.close()
            returned.append(count)
            left, lingering = claim(tmp_path / "events", "")
            assert not lingering
            left_something += any(each.load() for each in left)
            for each in left:
                each.close(empty=False)
        broker = broker or _start_broker(tmp_path)
        process = _start_publisher(tmp_path, ROUNDS, 10)
        assert process.stdout is not None
        assert _read(process.stdout.fileno(), 0) == 10
        process.stdout.close()
        assert process.wait(DEADLINE_S) == 0
        returned.append(10)
        broker.terminate()
        assert broker.wait(DEADLINE_S) == 0
        broker = None
    finally:
        if broker is not None:
            _kill(broker)
    told = _journalled(tmp_path)
    assert left_something > ROUNDS // 3, "the kills came too late to show anything"
    assert told == sorted(set(told)), "an event came twice, or out of order"
    for round_, count in enumerate(returned):
        numbers = [number for of, number in told if of == round_]
        # The one that it was killed in, or before it could tell, may be there too.
        assert numbers == list(range(len(numbers)))
        assert count <= len(numbers) <= count + 1
    assert not [path for path in tmp_path.glob("events-*") if path.suffix != ".new"]  # these go when they're a minute old


async def test_one_that_lingers_keeps_its_events_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_bus, "FIRST_LOOK_S", 0.01)
    place = tmp_path / "events"
    nowhere = str(tmp_path / "nowhere.sock")
    with trio.fail_after(DEADLINE_S):
        async with broker(tmp_path) as path, connect(str(path), "watcher") as watcher, watcher.events("toy.told") as events:
            async with connect(nowhere, "old", wait=False, spool=place) as old:
                for number in range(3):
                    old.publish(Told(id="old", time_ns=1, number=number))
                async with connect(str(path), "new", spool=place) as new:
                    new.publish(Told(id="new", time_ns=1, number=0))
                    await new.flush()
                    assert (await anext(events)).id == "new"
                    old.publish(Told(id="old", time_ns=1, number=3))
                    old.close()  # it ends
                    seen = [await anext(events) for _ in range(4)]
                    assert [(event.id, event.payload["number"]) for event in seen] == [("old", number) for number in range(4)]
                    while len(list(tmp_path.glob("events-*"))) > 1:
                        await trio.sleep(0.01)
        assert not list(tmp_path.glob("events-*"))


async def test_a_list_made_while_a_predecessors_events_are_under_way_includes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_publish, asked = trio.Event(), trio.Event()
    publish_left = Bus._publish_left

    async def later(self: Bus, left: Spool) -> None:
        await may_publish.wait()
        await publish_left(self, left)

    monkeypatch.setattr(Bus, "_publish_left", later)
    place = tmp_path / "events"
    listed = Method("toy.list", Empty, Empty, read_only=True)
    service = Service("toy")

    @service.method(listed)
    def list_(call: Call, request: Empty) -> Empty:
        call.snapshot()  # of a state that has the event that was left
        asked.set()
        return Empty()

    async def watch(path: Path, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with connect(str(path), "watcher") as watcher:
            task_status.started()
            async with watcher.watch(listed, Empty(), "toy.told") as (_, events):
                assert may_publish.is_set()
                toy.publish(Told(id="new", time_ns=1, number=1))
                assert (await anext(events)).id == "new"

    with trio.fail_after(DEADLINE_S):
        async with connect(str(tmp_path / "nowhere.sock"), "toy", wait=False, spool=place) as old:
            old.publish(Told(id="old", time_ns=1, number=0))
        async with broker(tmp_path) as path, connect(str(path), "toy", spool=place) as toy:
            await toy.serve(service)
            async with trio.open_nursery() as nursery:
                await nursery.start(watch, path)
                await asked.wait()
                await trio.testing.wait_all_tasks_blocked(0.03)
                may_publish.set()


def test_on_a_full_file_system_events_are_in_memory_and_in_the_file_again_when_there_is_room(
    small: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spool, "FIRST_PAUSE_S", 1e-9)
    monkeypatch.setattr(spool, "LAST_PAUSE_S", 1e-9)
    sent: list[bytes] = []
    kept = Spool(small / "events")
    publisher = Publisher(sent.append, kept)
    for _ in range(400):  # twice of what there's room for, cut off in the middle of one
        publisher.publish(b"toy.told", b"\x80" + bytes(4999))
    assert len(publisher) == 400
    assert len([record for record in caplog.records if "can't be kept" in record.message]) == 1
    assert not list(small.glob("*.new"))
    publisher.connected()
    publisher.acknowledged(370)
    publisher.publish(b"toy.told", b"\x80")
    assert [number for number, _ in _left_by(kept)] == list(range(371, 402))
    assert [int.from_bytes(frame[16:24], "little") for frame in sent] == list(range(1, 402))


def test_what_a_full_file_system_kept_until_then_is_there(small: Path) -> None:
    kept = Spool(small / "events")
    publisher = Publisher(lambda frame: None, kept)
    for _ in range(400):
        publisher.publish(b"toy.told", b"\x80" + bytes(4999))
    numbers = [number for number, _ in _left_by(kept)]
    assert 150 < len(numbers) < 400
    assert numbers == list(range(1, len(numbers) + 1))


def _left_by(ended: Spool) -> list[tuple[int, bytes]]:
    ended.close(empty=False)
    (left,), _ = claim(ended.place, "")
    events = left.load()
    left.close(empty=True)
    return events
