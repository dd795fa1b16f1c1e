"""logd over a real bus, with pipes for containers and clients."""

from __future__ import annotations

import json
import os
import pty
import tty
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from pyx_bus import testing
from pyx_bus.client import Bus, connect
from pyx_bus.contract import logd
from pyx_bus.contract.base import Retain
from pyx_bus.errors import BusError, FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from pyx_logd.__main__ import setup

ID = "c0ffee" + "0" * 58


@dataclass
class Stack:
    bus: Bus
    root: Path
    run: Path

    def log(self, container: str = ID) -> list[dict[str, str]]:
        return [json.loads(line) for line in (self.root / container / f"{container}-json.log").read_bytes().splitlines()]


@asynccontextmanager
async def stack(directory: Path) -> AsyncIterator[Stack]:
    async with testing.broker(directory) as path:
        async with testing.serve(path, "logd", setup) as context, connect(str(path), "test") as bus:
            yield Stack(bus, context.root, context.run)


class Container:
    """What a container has: the write ends of its streams."""

    def __init__(self, stack: Stack, container: str = ID) -> None:
        self.stack = stack
        self.id = container
        self.out_read, self.out = os.pipe()
        self.err_read, self.err = os.pipe()

    async def open(self, run: int = 1, clients: list[int] | None = None, **more: object) -> logd.LogOpened:
        clients = clients or []
        request = logd.OpenLog(container_id=self.id, run=run, streams=["stdout", "stderr"], attached=len(clients), **more)  # type: ignore[arg-type]
        return await self.stack.bus.call(logd.OPEN, request, fds=[self.out_read, self.err_read, *clients])

    async def end(self, run: int = 1) -> None:
        self.close()
        await self.stack.bus.call(logd.WAIT_DRAINED, logd.WaitDrained(container_id=self.id, run=run), timeout_s=10)

    def close(self) -> None:
        for name in ("out", "err", "out_read", "err_read"):
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)


async def read_all(fd: int) -> bytes:
    data = b""
    os.set_blocking(fd, False)
    while True:
        try:
            block = os.read(fd, 1 << 20)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(fd)
            continue
        if not block:
            os.close(fd)
            return data
        data += block


async def read_some(fd: int, size: int) -> bytes:
    data = b""
    os.set_blocking(fd, False)
    while len(data) < size:
        try:
            block = os.read(fd, size - len(data))
        except BlockingIOError:
            await trio.lowlevel.wait_readable(fd)
            continue
        assert block, "ended early"
        data += block
    return data


def demultiplex(data: bytes) -> dict[str, bytes]:
    streams = {"stdout": b"", "stderr": b""}
    while data:
        assert data[1:4] == b"\0\0\0"
        size = int.from_bytes(data[4:8], "big")
        streams[{1: "stdout", 2: "stderr"}[data[0]]] += data[8 : 8 + size]
        assert len(data) >= 8 + size
        data = data[8 + size :]
    return streams


async def logs(stack: Stack, container: str = ID, **options: object) -> bytes:
    read, write = os.pipe()
    result = b""
    error: BusError | None = None

    async def collect() -> None:
        nonlocal result
        result = await read_all(read)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(collect)
        try:
            await stack.bus.call(logd.READ, logd.ReadLogs(container_id=container, **options), fds=[write])  # type: ignore[arg-type]
        except BusError as failed:
            error = failed
        finally:
            os.close(write)
    if error is not None:
        raise error
    return result


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(5):
        while not condition():
            await trio.sleep(0.002)


async def test_output_is_stored_and_read_back(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        container = Container(s)
        opened = await container.open()
        assert opened.path == str(s.root / ID / f"{ID}-json.log")
        os.write(container.out, b"one\ntw")
        os.write(container.err, b"oops <&>\n")
        await until(lambda: len(s.log()) == 2)
        os.write(container.out, b"o\nunfinished")
        await container.end()
        assert sorted(r["log"] for r in s.log()) == ["one\n", "oops <&>\n", "two\n", "unfinished"]
        assert demultiplex(await logs(s)) == {"stdout": b"one\ntwo\nunfinished", "stderr": b"oops <&>\n"}
        assert demultiplex(await logs(s, stderr=False)) == {"stdout": b"one\ntwo\nunfinished", "stderr": b""}
        assert list(s.run.iterdir()) == []  # no window is left of a run that ended


async def test_a_terminal_is_one_raw_stream(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        master, slave = pty.openpty()
        tty.setraw(slave)
        read, write = os.pipe()
        request = logd.OpenLog(container_id=ID, run=1, streams=["tty"], attached=1)
        await s.bus.call(logd.OPEN, request, fds=[master, write])
        os.close(write)
        os.write(slave, b"$ ")
        assert await read_some(read, 2) == b"$ "
        os.write(slave, b"ls\r\nfile\r\n")
        assert await read_some(read, 10) == b"ls\r\nfile\r\n"
        assert os.get_blocking(master)  # its description is shared with others
        os.close(slave)
        await s.bus.call(logd.WAIT_DRAINED, logd.WaitDrained(container_id=ID, run=1), timeout_s=5)
        assert await read_all(read) == b""
        os.close(master)
        assert await logs(s) == b"$ ls\r\nfile\r\n"


async def test_attached_clients_get_everything_and_the_end(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        container = Container(s)
        first_read, first = os.pipe()
        await container.open(clients=[first])
        os.close(first)
        assert os.get_blocking(first_read)
        os.write(container.out, b"prompt> ")
        assert demultiplex(await read_some(first_read, 16))["stdout"] == b"prompt> "
        late_read, late = os.pipe()
        await s.bus.call(logd.ATTACH, logd.AttachLog(container_id=ID, stdout=False), fds=[late])
        os.close(late)
        os.write(container.out, b"yes\n")
        os.write(container.err, b"err\n")
        await container.end()
        assert demultiplex(await read_all(first_read)) == {"stdout": b"yes\n", "stderr": b"err\n"}
        assert demultiplex(await read_all(late_read)) == {"stdout": b"", "stderr": b"err\n"}
        _, write = os.pipe()
        with pytest.raises(FailedPrecondition):
            await s.bus.call(logd.ATTACH, logd.AttachLog(container_id=ID), fds=[write])


async def test_a_client_that_does_not_read_holds_the_container_back(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        container = Container(s)
        read, write = os.pipe()
        await container.open(clients=[write])
        os.close(write)
        os.set_blocking(container.out, False)
        written = 0
        with trio.move_on_after(0.5):
            while True:
                try:
                    written += os.write(container.out, b"0123456789\n" * 100)
                except BlockingIOError:
                    with trio.move_on_after(0.1) as timeout:
                        await trio.lowlevel.wait_writable(container.out)
                    if timeout.cancelled_caught:
                        break
        assert 0 < written < 2_000_000

        async def reads() -> None:
            assert len(demultiplex(await read_all(read))["stdout"]) == written

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reads)
            await container.end()


async def test_a_client_that_left_is_dropped(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        container = Container(s)
        read, write = os.pipe()
        await container.open(clients=[write])
        os.close(write)
        os.close(read)
        for number in range(3):
            os.write(container.out, b"%d\n" % number)
            await until(lambda number=number: len(s.log()) == number + 1)  # type: ignore[misc]
        await container.end()


@pytest.mark.parametrize("options", [{}, {"max-size": "20k", "max-file": "500"}])
async def test_attach_with_logs_has_no_gap_and_no_overlap(tmp_path: Path, options: dict[str, str]) -> None:
    async with stack(tmp_path) as s:
        container = Container(s)
        await container.open(options=options)
        count = 20_000
        done = trio.Event()

        async def write_lines() -> None:
            os.set_blocking(container.out, False)
            data = b"".join(b"line %d\n" % number for number in range(count))
            while data:
                try:
                    data = data[os.write(container.out, data[:1000]) :]
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(container.out)
                await trio.lowlevel.checkpoint()
            done.set()

        results: list[bytes] = []

        async def attach_at(lines: int) -> None:
            await until(lambda: done.is_set() or (s.root / ID / f"{ID}-json.log").stat().st_size > lines)
            read, write = os.pipe()
            await s.bus.call(logd.ATTACH, logd.AttachLog(container_id=ID, logs=True), fds=[write])
            os.close(write)
            results.append(demultiplex(await read_all(read))["stdout"])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_lines)
            for moment in (0, 1, 3000, 9000):
                nursery.start_soon(attach_at, moment)
            await done.wait()
            await trio.sleep(0.05)
            await container.end()
        for result in results:
            assert result == b"".join(b"line %d\n" % number for number in range(count))


async def test_follow_ends_with_the_container(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        container = Container(s)
        await container.open()
        os.write(container.out, b"before\n")
        await until(lambda: len(s.log()) == 1)
        followed = b""

        async def follow() -> None:
            nonlocal followed
            followed = demultiplex(await logs(s, follow=True))["stdout"]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow)
            for number in range(50):
                os.write(container.out, b"%d\n" % number)
                await trio.lowlevel.checkpoint()
            await container.end()
        assert followed == b"before\n" + b"".join(b"%d\n" % n for n in range(50))
        again = Container(s)
        await again.open(run=2)
        os.write(again.out, b"second run\n")
        await again.end(run=2)
        assert demultiplex(await logs(s, follow=True, tail=1))["stdout"] == b"second run\n"


async def test_tail_since_until_timestamps(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        container = Container(s)
        await container.open(options={"max-size": "3k", "max-file": "4"})
        for number in range(60):
            os.write(container.out, b"line %d\n" % number)
            await until(lambda number=number: s.log()[-1:] != [] and s.log()[-1]["log"] == f"line {number}\n")  # type: ignore[misc]
        everything = [line for n in (3, 2, 1) for line in rotated(s, n)] + s.log()
        assert [r["log"] for r in everything] == [f"line {n}\n" for n in range(60)]
        for tail in (0, 1, 5, 45, 60, 100):
            got = demultiplex(await logs(s, tail=tail))["stdout"].splitlines()
            assert got == [b"line %d" % n for n in range(max(0, 60 - tail), 60)]
        from pyx_logd.jsonfile import format_time_fixed, parse_time

        times = [parse_time(r["time"].encode()) for r in everything]
        got = demultiplex(await logs(s, since_ns=times[20], until_ns=times[40], timestamps=True))["stdout"].splitlines()
        assert got == [format_time_fixed(times[n] or 0) + b" line %d" % n for n in range(20, 41)]
        await container.end()


def rotated(s: Stack, number: int) -> list[dict[str, str]]:
    path = s.root / ID / f"{ID}-json.log.{number}"
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


async def test_rotation_keeps_max_file_files(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        container = Container(s)
        await container.open(options={"max-size": "1k", "max-file": "3"})
        for number in range(200):
            os.write(container.out, b"line %d\n" % number)
        await container.end()
        files = sorted(p.name for p in (s.root / ID).iterdir())
        assert files == [f"{ID}-json.log", f"{ID}-json.log.1", f"{ID}-json.log.2", "log.json"]
        record = max(len(line) for line in (s.root / ID / f"{ID}-json.log.1").read_bytes().splitlines(keepends=True))
        assert all(1024 <= (s.root / ID / f"{ID}-json.log.{n}").stat().st_size < 1024 + record for n in (1, 2))
        got = demultiplex(await logs(s))["stdout"].splitlines()
        assert got == [b"line %d" % n for n in range(200 - len(got), 200)]


async def test_follow_across_rotation(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        container = Container(s)
        await container.open(options={"max-size": "1k", "max-file": "2"})
        followed = b""

        async def follow() -> None:
            nonlocal followed
            followed = demultiplex(await logs(s, follow=True))["stdout"]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow)
            await trio.testing.wait_all_tasks_blocked(0.05)
            for number in range(100):
                os.write(container.out, b"line %d\n" % number)
                await until(lambda number=number: f"line {number}\\n" in (s.root / ID / f"{ID}-json.log").read_text())  # type: ignore[misc]
            await container.end()
        assert followed == b"".join(b"line %d\n" % n for n in range(100))


async def test_opening_twice_changes_nothing(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        container = Container(s)
        await container.open()
        await container.open()
        os.write(container.out, b"once\n")
        await container.end()
        assert [r["log"] for r in s.log()] == ["once\n"]


async def test_remove_and_retain(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        keep, drop = Container(s, "a" * 64), Container(s, "b" * 64)
        await keep.open()
        await drop.open()
        request = Retain(container_ids=["a" * 64], before_ns=1)
        assert (await s.bus.call(logd.RETAIN, request)).container_ids == []
        released = await s.bus.call(logd.RETAIN, Retain(container_ids=["a" * 64], before_ns=2**62))
        assert released.container_ids == ["b" * 64]
        with pytest.raises(NotFound, match="no log of container"):
            await logs(s, "b" * 64)
        await s.bus.call(logd.REMOVE, logd.RemoveLog(container_id="a" * 64))
        await s.bus.call(logd.REMOVE, logd.RemoveLog(container_id="a" * 64))
        await until(lambda: list(s.root.iterdir()) == [] and list(s.run.iterdir()) == [])
        keep.close()
        drop.close()


async def test_the_none_driver_keeps_nothing_but_shows_all(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        container = Container(s)
        read, write = os.pipe()
        opened = await container.open(clients=[write], driver="none")
        assert opened.path == ""
        os.close(write)
        os.write(container.out, b"seen\n")
        await container.end()
        assert demultiplex(await read_all(read))["stdout"] == b"seen\n"
        with pytest.raises(FailedPrecondition, match='"none"'):
            await logs(s)


async def test_bad_requests_leave_nothing(tmp_path: Path) -> None:
    async with stack(tmp_path) as s:
        container = Container(s)
        before = sorted(os.listdir("/proc/self/fd"))
        for more in (
            {"driver": "gelff"}, {"options": {"max-siz": "1"}}, {"options": {"max-size": "much"}}, {"options": {"max-file": "0"}},
            {"options": {"max-file": "3"}}, {"driver": "none", "options": {"max-size": "1m"}},
        ):
            with pytest.raises(InvalidArgument):
                await container.open(**more)
        with pytest.raises(Unimplemented):
            await container.open(options={"compress": "true"})
        for bad in ("", "../x", "/etc", "a/b", ".hidden", "x" * 200):
            with pytest.raises(InvalidArgument, match="container ID"):
                await s.bus.call(logd.OPEN, logd.OpenLog(container_id=bad, run=1, streams=["tty"]))
        with pytest.raises(InvalidArgument, match="descriptors"):
            await s.bus.call(logd.OPEN, logd.OpenLog(container_id=ID, run=1, streams=["stdout"]))
        with pytest.raises(InvalidArgument, match="must be a pipe"), open("/dev/null") as null:
            await s.bus.call(logd.OPEN, logd.OpenLog(container_id=ID, run=1, streams=["stdout"]), fds=[null.fileno()])
        assert list(s.root.iterdir()) == []
        assert sorted(os.listdir("/proc/self/fd")) == before
        container.close()
